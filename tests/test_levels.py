"""test_kernels.py, test_model.py and test_model_calls.py again, under every other instruction-set level of this machine and the
emulated ones, a process each.

The level of a process is chosen when the engine is imported. Where GEMMA_NATIVE_ISA is set already, one level is wanted, and
this file is skipped: so are its own children.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_native import _native

VARIABLE = "GEMMA_NATIVE_ISA"
HERE = Path(__file__).parent
LEVELS = _native.isa_levels()

pytestmark = pytest.mark.skipif(VARIABLE in os.environ, reason=f"{VARIABLE} asks for one level")

# Products at the process's level: a hash of all quantised types, either size of activation blocks, one row and many; and one of bf16.
PRODUCTS = """
import hashlib
import numpy as np
from gemma_native import _native
from test_kernels import BLOCK, T, random_blocks

digest = hashlib.sha256()
rng = np.random.default_rng(1)
for name in BLOCK:
    for rows, k in ((33, 256), (70, 1280)):
        data = random_blocks(name, rows, k, rng)
        x = (rng.standard_normal((70, k)) * np.exp(rng.standard_normal((70, 1)) * 3)).astype(np.float32)
        x[5, 32:64] = 0
        x[6] = 0
        for m in (1, 5, 70):
            for fine in (False, True):
                digest.update(T.product(name, data, rows, k, x[:m], threads=2, fine=fine).tobytes())
for name in ("Q8_0", "Q6_K"):
    data = random_blocks(name, 2048, 256, rng)
    for m in (1, 2):
        panels = T.reachable(name, data, 2048, 256, rng.standard_normal((m, 256)).astype(np.float32), 1)
        assert len(panels) < 60
        digest.update(repr(panels).encode())
bf16 = hashlib.sha256()
for rows, k in ((33, 250), (70, 2100)):
    data = (rng.standard_normal((rows, k)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    for m in (1, 3, 70):
        bf16.update(T.product("BF16", data, rows, k, rng.standard_normal((m, k)).astype(np.float32), threads=2).tobytes())
print(_native.isa(), digest.hexdigest(), bf16.hexdigest(), _native.bf16_instructions())
"""


def run(level: str, *arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """A Python process at a level. Its paths are this one's. `without`: as on CPUs that lack an instruction which the level can use."""
    paths = os.pathsep.join([str(HERE), *(p for p in sys.path if p)])
    environment = {**os.environ, VARIABLE: level, "PYTHONPATH": paths}
    if without:
        environment["GEMMA_NATIVE_" + without] = "0"
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_levels_of_this_process() -> None:
    assert LEVELS[0] == "scalar" and set(LEVELS) <= {"scalar", "avx2", "avx512", "amx"}
    assert _native.isa() == LEVELS[-1]  # the best


OPTIONS = {"avx2": "AVX_VNNI", "avx512": "AVX512_BF16", "avx512-emulated": "AVX512_BF16"}
RUNNABLE = [*LEVELS]
if "avx2" in LEVELS and hasattr(_native.testing, "emulator"):
    RUNNABLE += ["avx512-emulated", "amx-emulated"]  # those levels' code on a CPU without
WAYS = [(level, "") for level in RUNNABLE] + [(level, OPTIONS[level]) for level in RUNNABLE if level in OPTIONS]


@pytest.mark.parametrize(("level", "without"), [way for way in WAYS if way != (_native.isa(), "")])
def test_suite(level: str, without: str) -> None:
    files = [str(HERE / name) for name in ("test_kernels.py", "test_model.py", "test_model_calls.py")]
    done = run(level, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *files, without=without)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]


def test_products_are_the_same_bits() -> None:
    quantised, by_fma, rounded = {}, {}, {}
    for level, without in WAYS:
        done = run(level, "-c", PRODUCTS, without=without)
        assert done.returncode == 0, done.stderr
        name, quantised[level, without], bf16, rounding = done.stdout.split()
        assert name == level and not (without and rounding == "True")
        # bf16 instructions round activations, and the portable code joins lanes in another order.
        if rounding == "False" and level != "scalar":
            by_fma[level, without] = bf16
        elif rounding == "True":
            rounded.setdefault(level.removesuffix("-emulated"), set()).add(bf16)
    assert len(set(quantised.values())) == 1, quantised
    assert len(set(by_fma.values())) <= 1, by_fma
    assert all(len(bits) == 1 for bits in rounded.values()), rounded  # emulated or not


@pytest.mark.parametrize("level", ["sse9", "AVX2", " scalar", "scalar,avx2"])
def test_an_unknown_level_is_refused(level: str) -> None:
    done = run(level, "-c", "from gemma_native import _native")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and f"{VARIABLE}={level}" in last, done.stderr
    for supported in LEVELS:
        assert supported in last


def test_an_empty_level_is_the_best() -> None:
    done = run("", "-c", "from gemma_native import _native; print(_native.isa())")
    assert done.stdout.split() == [LEVELS[-1]], done.stderr
