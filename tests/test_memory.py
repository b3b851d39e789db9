"""How much memory a process has when a model is loaded and has answered, which is the weights and little else; and what if there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's figures of a process")

OPEN = """
import resource, sys
from gemma_native import _native
from gemma_native.weights import open_checkpoint

def figure(what):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(what))

before = figure("VmRSS")
checkpoint = open_checkpoint(sys.argv[1])
"""

# Prints what the process had at most, less what it had before, and what the weights take.
LOAD = """
model = _native.Model(checkpoint.config, checkpoint.tensors, "cpu", threads=2, weights="int8", consumed=checkpoint.consumed)
model.forward([5] * 300, model.new_cache())
print(figure("VmHWM") - before, model.nbytes)
"""


def test_a_source_is_given_back_as_it_is_converted(tmp_path: Path) -> None:
    """96 MiB of bf16 become 51 MiB of int8, and at no time are both there."""
    folder = tiny.write_hf(tmp_path / "m", "gemma-mqa", hidden_size=512, intermediate_size=16384, num_hidden_layers=2)
    run = subprocess.run([sys.executable, "-c", OPEN + LOAD, str(folder)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    most, weights = map(int, run.stdout.split())
    assert 50 * MIB < weights < 56 * MIB
    assert most < weights + 48 * MIB, f"{most / MIB:.0f} MiB for {weights / MIB:.0f} MiB of weights"


# Runs a prompt where there is hardly more address space than the process has, and once more with enough.
SHORT = """
for more in range(0, 128 << 10, 8 << 10):
    model = _native.Model(checkpoint.config, checkpoint.tensors, "cpu", threads=3)
    model.forward([1], model.new_cache())
    cache = model.new_cache()
    resource.setrlimit(resource.RLIMIT_AS, (figure("VmSize") + more, resource.RLIM_INFINITY))
    try:
        model.forward([5] * 600, cache)
    except MemoryError:
        pass
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    cache.truncate(0)
    assert model.forward([5] * 600, cache).tobytes() == model.forward([5] * 600, model.new_cache()).tobytes()
"""


def test_a_lack_of_memory_is_an_exception_in_every_thread(tmp_path: Path) -> None:
    folder = tiny.write_hf(tmp_path / "m", "gemma3-scaled", 3, vocab_size=4101)
    run = subprocess.run([sys.executable, "-c", OPEN + SHORT, str(folder)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
