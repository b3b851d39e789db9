"""A generation whose text is taken piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

from .sequence import Completion, Running

if TYPE_CHECKING:
    from ._native import CancelFlag


class Stream(Iterator[str]):
    """Pieces of text as they are generated. Leaving the loop stops the work; `result` is there at the end."""

    def __init__(
        self,
        sequence: Running,
        steps: Generator[list[str], None, None],
        flag: CancelFlag,
        end: Callable[[CancelFlag], object],
    ) -> None:
        self._sequence = sequence
        self._steps = steps  # of this sequence alone; they stop by the flag
        self._flag = flag
        self._end = end  # called with the flag when it is no longer needed
        self._failed = False
        self._lock = threading.RLock()  # one thread at a time advances or ends it
        self.result: Completion | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        with self._lock:
            return self._next()

    def _next(self) -> str:
        if self.result is not None:
            raise StopIteration
        try:
            while not self._sequence.finish_reason:
                for piece in next(self._steps, [""]):
                    if piece:
                        if self._sequence.finish_reason:
                            self._finish()
                        return piece
        except BaseException as error:
            self._failed = isinstance(error, Exception)  # Ctrl-C is none
            try:
                if not self._sequence.finish_reason:
                    self._sequence.end("cancelled")
            finally:
                self._finish()
            raise
        self._finish()
        raise StopIteration

    def _finish(self) -> None:
        self._steps.close()
        self._end(self._flag)
        self.result = self._sequence.result()

    def cancel(self) -> None:
        """Stops the generation, from any thread: the loop over the stream ends, with finish_reason "cancelled"."""
        self._flag.set()

    def close(self) -> None:
        """Ends the generation here. Safe to call at any time, and again."""
        self._flag.set()
        if not self._lock.acquire(blocking=False):
            return  # another thread is inside: it sees the flag and ends the stream
        try:
            if self.result is None:
                if not self._sequence.finish_reason:
                    self._sequence.end("cancelled")
                self._finish()
        finally:
            self._lock.release()

    def __del__(self) -> None:
        if hasattr(self, "_end"):
            self._end(self._flag)
