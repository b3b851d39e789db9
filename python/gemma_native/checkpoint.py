"""An open checkpoint: named tensors in mapped files, and what else a model is built from."""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _native
from .config import Config
from .errors import FormatError

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

Tensor = tuple[str, tuple[int, ...], memoryview]
Progress = Callable[[int, int], None]


@dataclass
class Checkpoint:
    """An open checkpoint. `tensors` maps Hugging Face names to (dtype, shape, bytes); the bytes lie in mapped files."""

    source: str
    config: Config
    tensors: dict[str, Tensor]
    tokenizer: Callable[[], Tokenizer] | None = None  # builds it; None where the checkpoint has none
    chat_template: str | None = None
    pieces: int | None = None  # of the vocabulary, where they can be counted without building the tokenizer
    progress: Progress | None = None  # called with (bytes done, bytes in all); None: a bar in a terminal
    _maps: dict[str, tuple[mmap.mmap, int]] = field(default_factory=dict)  # tensor: its map and where it begins there
    _total: int = field(init=False)  # bytes of all tensors
    _done: int = 0
    _bar: Any = None

    def __post_init__(self) -> None:
        self._total = sum(len(data) for _, _, data in self.tensors.values())

    def model(self, **settings: Any) -> _native.Model:
        """The model in memory; settings and errors are those of `Model`, but for FormatError where a tensor is at fault."""
        try:
            model = _native.Model(self.config, self.tensors, consumed=self.consumed, **settings)
        except ValueError as e:
            if str(e).startswith('tensor "'):
                raise FormatError(f"{self.source}: {e}") from None
            raise
        self._loaded()
        return model

    def consumed(self, name: str, begin: int, end: int) -> None:
        """Bytes [begin, end) of a tensor are no longer needed: gives their pages back and moves the progress bar."""
        found = self._maps.get(name)
        if found is not None:
            data, base = found
            release(data, base + begin, base + end)
        self._done += end - begin
        if self.progress is not None:
            self.progress(self._done, self._total)
        elif sys.stderr is not None and sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=self._total, unit="B", unit_scale=True, desc="loading", leave=False, delay=0.5)
            self._bar.update(end - begin)

    def restart(self) -> None:
        """Loading begins again: progress does."""
        self._end_bar()
        self._done = 0

    def _loaded(self) -> None:
        """The model is built: progress reaches its end (tensors that are used where they lie were never consumed)."""
        if self.progress is not None and self._done < self._total:
            self.progress(self._total, self._total)
        self._done = max(self._done, self._total)
        self._end_bar()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Forgets the tensors. Maps go when the last tensor that is used where it lies does. May be called twice."""
        self._end_bar()
        self.tensors = {}
        self._maps = {}


def release(data: mmap.mmap, begin: int, end: int) -> None:
    """Takes the whole pages of [begin, end) out of this process's memory; reading them again brings them back."""
    if hasattr(mmap, "MADV_DONTNEED"):
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            data.madvise(mmap.MADV_DONTNEED, first, last - first)


def temporary(target: Path) -> Path:
    """Where a file is written before it is renamed: no other process or thread writes there."""
    return target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")
