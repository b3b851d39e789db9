"""Types of the compiled module (csrc/bindings.cpp): from token ids to logits. Words stay in Python."""

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

Tokens: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
Tensor: TypeAlias = tuple[str, tuple[int, ...], Buffer]
TopK: TypeAlias = tuple[NDArray[np.int32], NDArray[np.float32]]
TopKAlso: TypeAlias = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]

class Cancelled(Exception):
    """A call stopped because its CancelFlag was set."""

class CancelFlag:
    """Stops the calls that it was given to, from any thread, within a layer, or 128 rows of `score`'s logits."""

    def __init__(self) -> None: ...
    def set(self) -> None: ...
    def is_set(self) -> bool: ...

class Cache:
    """One sequence's keys and values; made by Model.new_cache and used with that model alone."""

    @property
    def length(self) -> int: ...
    @property
    def capacity(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Bytes committed so far."""
    def truncate(self, n: int, *, cancel: CancelFlag | None = None) -> None:
        """Keeps the first n positions. ValueError when n > length, or when a sliding layer no longer reaches so far.

        Waits for another thread's call on the model, unless `cancel` is set: then it raises Cancelled.
        """
    def clone(self, *, cancel: CancelFlag | None = None) -> Cache:
        """A copy with a length of its own. Waits as `truncate` does."""

class Model:
    """A Gemma on one device. Calls from several threads queue; the GIL is released while they compute.

    `tensors` maps Hugging Face names to (encoding, shape, buffer). ValueError names a missing or
    extra tensor or a wrong shape; RuntimeError means no such device.
    """

    def __init__(
        self,
        config: Any,
        tensors: Mapping[str, Tensor],
        device: str = "cpu",
        threads: int | None = None,
        *,
        kv: Literal["bf16", "f32"] = "bf16",
        weights: Literal["auto", "bf16", "int8", "int4"] = "auto",
        consumed: Callable[[str, int, int], object] | None = None,
        deterministic: bool = False,
    ) -> None: ...
    @property
    def config(self) -> Any: ...
    @property
    def device(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def kv(self) -> str: ...
    @property
    def isa(self) -> str: ...
    @property
    def nbytes(self) -> int:
        """Bytes of weights in memory, mapped ones included."""
    @property
    def kv_bytes_per_token(self) -> int: ...
    def new_cache(self, capacity: int | None = None) -> Cache:
        """An empty cache for `capacity` positions (None: the context length). Memory is committed as it is used."""
    @overload
    def forward(
        self,
        tokens: Tokens,
        cache: Cache,
        all_logits: bool = False,
        *,
        top_k: None = None,
        cancel: CancelFlag | None = None,
    ) -> NDArray[np.float32]:
        """Appends tokens [n]. float32 [vocab] of the last position, or [n, vocab] with all_logits."""
    @overload
    def forward(
        self,
        tokens: Tokens,
        cache: Cache,
        all_logits: bool = False,
        *,
        top_k: int,
        also: None = None,
        cancel: CancelFlag | None = None,
    ) -> TopK:
        """Appends tokens [n]. (ids int32 [k], logits float32 [k]) of the last position, or both [n, k] with all_logits;
        best first, ties to the lower id."""
    @overload
    def forward(
        self,
        tokens: Tokens,
        cache: Cache,
        all_logits: bool = False,
        *,
        top_k: int,
        also: Tokens,
        cancel: CancelFlag | None = None,
    ) -> TopKAlso:
        """The k best of the tokens that `also` (m ids, in order, each once) does not list, and the logits float32 [m], or
        [n, m] with all_logits, of those."""
    @overload
    def forward_batch(
        self,
        tokens: Sequence[Tokens],
        caches: Sequence[Cache],
        *,
        top_k: None = None,
        cancel: CancelFlag | None = None,
    ) -> NDArray[np.float32]:
        """Appends tokens[i] to caches[i]. float32 [batch, vocab] of each last position."""
    @overload
    def forward_batch(
        self,
        tokens: Sequence[Tokens],
        caches: Sequence[Cache],
        *,
        top_k: int,
        also: None = None,
        cancel: CancelFlag | None = None,
    ) -> TopK:
        """Appends tokens[i] to caches[i]. (ids int32 [batch, k], logits float32 [batch, k])."""
    @overload
    def forward_batch(
        self,
        tokens: Sequence[Tokens],
        caches: Sequence[Cache],
        *,
        top_k: int,
        also: Tokens,
        cancel: CancelFlag | None = None,
    ) -> TopKAlso:
        """The k best of the tokens that `also` does not list, and the logits float32 [batch, m] of those."""
    def score(self, tokens: Tokens, cache: Cache, *, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        """Appends tokens [n]; natural-log probabilities float32 [n - 1] of tokens[1:]."""
    def encodings(self) -> dict[str, str]:
        """Tensor name -> encoding in memory."""
    def ceilings(self, mib: int = 4096, size: int = 8192) -> dict[str, Any] | None:
        """On CUDA, what the device reaches: "read_bandwidth" (bytes/s, of `mib` MiB), "bf16" (operations/s of a product
        of [size, size] matrices), "product" (what made it: cuBLASLt's path or "own kernel"). None on the CPU, which has
        `measure_read_bandwidth` and `measure_peak`."""
    def packed(self) -> dict[str, tuple[str, tuple[int, ...], memoryview]]:
        """Every tensor as this class loads it again; read-only views that live as long as the model."""

MAX_ROWS: int  # tokens a pass
KEY_BLOCK: int  # positions that attention takes at once; a sliding layer's ring holds whole ones

def isa() -> str: ...
def isa_levels() -> list[str]: ...
def bf16_instructions() -> bool: ...
def default_threads() -> int: ...
def gguf_strings(data: Buffer, at: int, count: int) -> tuple[list[bytes], int]:
    """(strings, end): as many of `count` strings as lie whole in data from `at` on, each behind its length in 8 bytes."""

def cuda_status() -> str:
    """An empty string when a CUDA device is usable, else why not."""

def measure_read_bandwidth(threads: int, mib: int = 1024) -> float:
    """Bytes per second of a pure sequential read."""

def measure_peak(threads: int) -> dict[str, float]:
    """Operations per second of the dot products that the kernels use: "int8", "bf16", "f32"."""

testing: ModuleType  # single kernels, for the test suite; not part of the public surface
