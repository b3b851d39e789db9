"""What goes wrong on a device, and the emulated device itself."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from engine import GetModel, build, needs_emulation, random_tokens, same

from gemma_native import _native
from gemma_native.checkpoint import Checkpoint
from gemma_native.gemma import Gemma


@needs_emulation
def test_out_of_memory(checkpoint: Callable[[str], Checkpoint]) -> None:
    state, limit = _native.testing.emulator_state, _native.testing.emulator
    gc.collect()
    before = state()["allocated"]
    m = build(checkpoint("gemma-mqa"), device="cuda-emulated")
    expected = m.forward([2, 5], m.new_cache())
    loaded = state()["allocated"]
    limit(memory_limit=loaded + 1000)
    with pytest.raises(MemoryError, match=r"a KV cache of \d+ positions needs .* bytes"):
        m.new_cache()
    limit()
    cache = m.new_cache()
    limit(memory_limit=state()["allocated"] + 1000)
    with pytest.raises(MemoryError):
        cache.clone()
    assert same(m.forward([2, 5], cache), expected)  # nothing is allocated in a call
    del cache
    assert state()["allocated"] == loaded
    for room in (1000, (loaded - before) // 2, loaded - before - 1000):
        limit(memory_limit=loaded + room)
        with pytest.raises(MemoryError):
            build(checkpoint("gemma-mqa"), device="cuda-emulated")
        assert state()["allocated"] == loaded
    limit()
    del m
    gc.collect()
    assert state()["allocated"] == before


@needs_emulation
def test_failing_launches(model: GetModel) -> None:
    m = model("gemma2-gqa", device="cuda-emulated")
    tokens = random_tokens(70, 3)
    cache = m.new_cache()
    expected = m.forward(tokens, cache)
    step = m.forward([9], cache.clone())
    for call in (lambda: m.forward(tokens, m.new_cache()), lambda: m.forward([9], cache.clone())):
        for launch in (1, 4, 9):
            _native.testing.emulator(fail_after=launch)
            with pytest.raises(RuntimeError, match="kernel .*as a test asked"):
                call()
            _native.testing.emulator()
    assert same(m.forward(tokens, m.new_cache()), expected)
    assert same(m.forward([9], cache.clone()), step)


def test_no_device(checkpoint: Callable[[str], Checkpoint]) -> None:
    status = _native.cuda_status()
    if status:
        with pytest.raises(RuntimeError, match="cpu"):
            build(checkpoint("gemma-mqa"), device="cuda")
    else:
        with pytest.raises(RuntimeError, match="NVIDIA GPUs"):
            build(checkpoint("gemma-mqa"), device="cuda:99")


def test_automatic_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that seems to be there but cannot load the model: one warning, then the CPU."""
    folder = tiny.write_hf(tmp_path / "m", "gemma-mqa", 1)
    made = _native.Model

    def refuse(config: Any, tensors: Any, device: str, *args: Any, **options: Any) -> Any:
        if device == "cuda":
            raise MemoryError("cuda:0: out of memory: 5 bytes")
        return made(config, tensors, device, *args, **options)

    monkeypatch.setattr(_native, "Model", refuse)
    monkeypatch.setattr(_native, "cuda_status", lambda: "")
    with pytest.warns(UserWarning, match="out of memory") as warned:
        gemma = Gemma.load(folder)
    assert gemma.model.device == "cpu" and len(warned) == 1
    with pytest.raises(MemoryError):
        Gemma.load(folder, device="cuda")


# --- the emulator itself ---


@needs_emulation
def test_emulator_sees_faults() -> None:
    run, limit = _native.testing.faulty_kernel, _native.testing.emulator

    def outcomes(fault: str) -> set[bytes]:
        results = set()
        for order in ("forward", "reverse", "random"):
            limit(order=order, seed=3)
            out = np.zeros(64, np.float32)
            run(fault, out)
            results.add(out.tobytes())
        return results

    assert outcomes("none") == {np.arange(63, -1, -1).astype(np.float32).tobytes()}
    assert len(outcomes("missing barrier")) > 1
    out = np.zeros(64, np.float32)
    for fault, message in (
        ("divergent barrier", "only some threads"),
        ("divergent warp", "only some of its lanes"),
        ("different operations", "one, another|another, one"),
        ("no wait", "did not wait"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(fault, out)
    limit()
    for fault in ("missing wait", "unwritten"):
        run(fault, out)
        assert np.isnan(out).any(), fault
    broken = _native.testing.emulator_state()["broken_guards"]
    run("write outside", out)
    assert _native.testing.emulator_state()["broken_guards"] == broken + 1


@needs_emulation
def test_no_write_outside_device_memory() -> None:
    """After every other test here and in test_cuda.py; the one above broke one guard on purpose."""
    gc.collect()
    assert _native.testing.emulator_state()["broken_guards"] <= 1
