"""A small, checked reader of GGUF files (versions 2 and 3, little-endian).

The file is mapped; metadata is parsed in one pass and large arrays stay compact, so that a 262,144-piece vocabulary costs about
ten milliseconds. Nothing in the file is trusted: every count and size is compared with the bytes that are left before it
is used, and every error is a FormatError that names the file and the field.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _native
from .errors import FormatError

_MAGIC = b"GGUF"
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
# GGML type number: name, values a block, bytes a block
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_MAX_NAME, _MAX_KEYS, _MAX_TENSORS, _MAX_ARRAY = 65535, 65536, 65536, 1 << 24


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. `shape` is (out, in), the reverse of the file's order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int


class GgufFile:
    """The metadata and tensor table of one file. `metadata` maps keys to str, int, float, bool, NumPy array or list of bytes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._at = 0  # the cursor
        with open(self.path, "rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            if self._size < 24:
                raise FormatError(f"{self.path}: {self._size} bytes are too few for a GGUF file")
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._parse()
        except BaseException:
            self.map.close()
            raise

    def _fail(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: {what}")

    def _take(self, size: int, field: str) -> int:
        """Reserves `size` bytes at the cursor and returns where they begin."""
        at = self._at
        if size > self._size - at:
            raise self._fail(
                f"{field} needs {size} bytes at offset {at}, but the file ends at {self._size} (cut short?)"
            )
        self._at = at + size
        return at

    def _unpack(self, form: str, field: str) -> Any:
        return struct.unpack_from(form, self.map, self._take(struct.calcsize(form), field))[0]

    def _string(self, field: str, limit: int | None = None) -> bytes:
        size = self._unpack("<Q", f"the length of {field}")
        if limit is not None and size > limit:
            raise self._fail(f"{field} is {size} bytes long; at most {limit} are allowed")
        at = self._take(size, field)
        return self.map[at : at + size]

    def _text(self, field: str, limit: int | None = None) -> str:
        try:
            return self._string(field, limit).decode()
        except UnicodeDecodeError:
            raise self._fail(f"{field} is not valid UTF-8") from None

    def _value(self, kind: int, field: str) -> Any:
        if kind == _STRING:
            return self._text(field)
        if kind == _ARRAY:
            return self._array(field)
        if kind not in _SCALARS:
            raise self._fail(f"{field} has the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.map, dtype, 1, self._take(dtype.itemsize, field))[0].item()

    def _array(self, field: str) -> Any:
        kind = self._unpack("<I", f"the element type of {field}")
        count = self._unpack("<Q", f"the length of {field}")
        if count > _MAX_ARRAY:
            raise self._fail(f"{field} has {count} elements; at most {_MAX_ARRAY} are allowed")
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            at = self._take(count * dtype.itemsize, field)
            return np.frombuffer(self.map, dtype, count, at).copy()
        if kind != _STRING:
            raise self._fail(f"{field} is an array of type {kind}; only scalars and strings are supported")
        if count * 8 > self._size - self._at:
            raise self._fail(f"{field} has {count} strings, more than the rest of the file can hold")
        strings, self._at = _native.gguf_strings(self.map, self._at, count)
        if len(strings) < count:
            one, left = f"{field}[{len(strings)}]", self._size - self._at
            if left < 8:
                raise self._fail(f"{one} lies past the end of the file (cut short?)")
            length = self._unpack("<Q", one)
            raise self._fail(f"{one} is {length} bytes long, but the file ends after {left - 8}")
        return strings

    def _parse(self) -> None:
        if self.map[self._take(4, "the magic") : 4] != _MAGIC:
            raise self._fail(f"not a GGUF file: it begins with {self.map[:4]!r}")
        version = self._unpack("<I", "the version")
        if version not in (2, 3):
            hint = " (big-endian files are not supported)" if version in (2 << 24, 3 << 24) else ""
            raise self._fail(f"GGUF version {version} is not supported; 2 and 3 are{hint}")
        tensors = self._unpack("<Q", "the number of tensors")
        keys = self._unpack("<Q", "the number of metadata keys")
        if tensors > _MAX_TENSORS or keys > _MAX_KEYS:
            raise self._fail(
                f"{tensors} tensors and {keys} metadata keys; at most {_MAX_TENSORS} and {_MAX_KEYS} are allowed"
            )
        self.metadata: dict[str, Any] = {}
        for i in range(keys):
            key = self._text(f"metadata key {i}", _MAX_NAME)
            field = f"metadata {key!r:.80}"
            kind = self._unpack("<I", f"the type of {field}")
            if key in self.metadata:
                raise self._fail(f"{field} occurs twice")
            self.metadata[key] = self._value(kind, field)
        infos = [self._tensor_info(i) for i in range(tensors)]

        alignment = self.metadata.get("general.alignment", 32)
        if (
            isinstance(alignment, bool)
            or not isinstance(alignment, int)
            or not 1 <= alignment <= 1 << 20
            or alignment & (alignment - 1)
        ):
            raise self._fail(f"general.alignment is {alignment!r:.60}; a power of two is expected")
        start = -(-self._at // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, dtype, shape, offset, nbytes in infos:
            if name in self.tensors:
                raise self._fail(f"tensor {name!r:.80} occurs twice")
            if offset % alignment:
                raise self._fail(f"tensor {name!r:.80}: offset {offset} is not a multiple of the alignment {alignment}")
            if start + offset + nbytes > self._size:
                raise self._fail(
                    f"tensor {name!r:.80} needs bytes {start + offset} to {start + offset + nbytes}, but the file ends at "
                    f"{self._size} (cut short?)"
                )
            self.tensors[name] = GgufTensor(name, dtype, shape, start + offset, nbytes)
        refuse_overlap(self.path, [(t.offset, t.offset + t.nbytes, t.name) for t in self.tensors.values()])

    def _tensor_info(self, i: int) -> tuple[str, str, tuple[int, ...], int, int]:
        name = self._text(f"the name of tensor {i}", _MAX_NAME)
        dims = self._unpack("<I", f"the dimensions of tensor {name!r:.80}")
        if not 1 <= dims <= 4:
            raise self._fail(f"tensor {name!r:.80} has {dims} dimensions; 1 to 4 are allowed")
        shape = tuple(self._unpack("<Q", f"the shape of tensor {name!r:.80}") for _ in range(dims))
        kind = self._unpack("<I", f"the type of tensor {name!r:.80}")
        offset = self._unpack("<Q", f"the offset of tensor {name!r:.80}")
        if any(not 1 <= n < 1 << 32 for n in shape):
            raise self._fail(f"tensor {name!r:.80} has the absurd shape {shape}")
        if kind not in TYPES:
            supported = ", ".join(t[0] for t in TYPES.values())
            raise self._fail(
                f"tensor {name!r:.80} has GGML type {kind}, which is not supported; supported are {supported}"
            )
        dtype, block, block_bytes = TYPES[kind]
        if shape[0] % block:
            raise self._fail(
                f"tensor {name!r:.80} has rows of {shape[0]} values, not a multiple of {dtype}'s block of {block}"
            )
        return name, dtype, shape[::-1], offset, math.prod(shape) // block * block_bytes

    def tensor(self, name: str) -> memoryview:
        """The bytes of a tensor in the map, read-only."""
        t = self.tensors[name]
        return memoryview(self.map)[t.offset : t.offset + t.nbytes]


def refuse_overlap(path: str, ranges: list[tuple[int, int, str]]) -> None:
    """Raises FormatError when two of the (begin, end, name) ranges share bytes."""
    ranges = sorted(ranges)
    for (_, end, first), (begin, _, second) in zip(ranges, ranges[1:], strict=False):
        if begin < end:
            raise FormatError(f"{path}: tensors {first!r:.80} and {second!r:.80} overlap at byte {begin}")
