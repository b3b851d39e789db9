"""Settings of every test run, tiny checkpoints that are written once a run, and models of them."""

from __future__ import annotations

import os
import signal

# The NumPy reference multiplies small matrices: its library's own threads only get in the way of the engine's.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A run in the background may have been told to ignore Ctrl-C, and would pass that on to the programs that it tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import tiny  # noqa: E402
from engine import SPECK, GetModel, build, emulated  # noqa: E402
from make_golden import SEED  # noqa: E402

from gemma_native import _native  # noqa: E402
from gemma_native.checkpoint import Checkpoint
from gemma_native.weights import open_checkpoint  # noqa: E402

Open = Callable[[str], Checkpoint]


@pytest.fixture(autouse=True)
def plain_emulator() -> Iterator[None]:
    yield
    if emulated:
        _native.testing.emulator()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """checkpoint("gemma2-gqa"): a case of tiny.CASES; checkpoint("gemma3:Q4_K"): a GGUF file of tiny.GGUF_CASES."""
    folder = tmp_path_factory.mktemp("tiny")
    opened: dict[str, Checkpoint] = {}

    def open_case(name: str) -> Checkpoint:
        if name not in opened:
            case, _, quant = name.partition(":")
            if quant:
                source = tiny.write_gguf(folder / f"{case}-{quant}.gguf", case, quant, SEED)
            else:
                source = tiny.write_hf(folder / case, case, SEED)
            opened[name] = open_checkpoint(source)
        return opened[name]

    return open_case


@pytest.fixture(scope="module")
def model(checkpoint: Open) -> Iterator[GetModel]:
    """model("gemma2-gqa", kv="f32"): a Model of a tiny checkpoint, built once."""
    built: dict[Any, Any] = {}

    def get(name: str, **options: Any) -> Any:
        key = name, tuple(sorted(options.items()))
        if key not in built:
            built[key] = build(checkpoint(name), **options)
        return built[key]

    yield get
    built.clear()


@pytest.fixture(scope="module")
def speck(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Checkpoint]:
    """speck(sliding_window=7): a checkpoint of SPECK with changes."""
    folder = tmp_path_factory.mktemp("speck")
    opened: dict[Any, Checkpoint] = {}

    def get(**changes: Any) -> Checkpoint:
        key = repr(sorted(changes.items()))
        if key not in opened:
            opened[key] = open_checkpoint(tiny.write_hf(folder / str(len(opened)), SPECK, 5, **changes))
        return opened[key]

    return get


@pytest.fixture(scope="module")
def speck_model(speck: Callable[..., Checkpoint]) -> Any:
    return build(speck(), kv="f32")
