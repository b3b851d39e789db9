"""A small, checked reader of safetensors files: the header is parsed, the tensors stay mapped (bf16 has no NumPy type to be read as).

Nothing in the file is trusted: every offset and size is compared with the file's length, and every error is a FormatError
that names the file and the tensor.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import FormatError
from .gguf import refuse_overlap

MAX_JSON = 1 << 22  # bytes: twenty times what the largest Gemma needs; the worst takes 25 times as much to parse
_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}


@dataclass
class SafetensorsFile:
    """An open file: its map, and where each tensor lies in it."""

    path: Path
    map: mmap.mmap
    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]  # dtype, shape, begin, end in the file


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key occurs twice")
    return out


def read_safetensors(path: Path) -> SafetensorsFile:
    """Maps a file and checks its header. Raises FormatError naming the file and the tensor."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 10:
            raise FormatError(f"{path}: {size} bytes are too few for a safetensors file")
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise FormatError(f"{path}: its header claims {length} bytes, but the file has {size} (cut short?)")
        if length > MAX_JSON:
            raise FormatError(f"{path}: its header has {length} bytes; at most {MAX_JSON} are allowed")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}: its header is not valid JSON ({error})") from None
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if not isinstance(header, dict):
        raise FormatError(f"{path}: its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(f"{path}: __metadata__ must map strings to strings")
    tensors = {}
    for name, entry in header.items():
        tensors[name] = _entry(path, name, entry, 8 + length, size)
    refuse_overlap(str(path), [(begin, end, name) for name, (_, _, begin, end) in tensors.items()])
    return SafetensorsFile(path, data, metadata, tensors)


def _entry(path: Path, name: str, entry: Any, start: int, size: int) -> tuple[str, tuple[int, ...], int, int]:
    def integers(value: Any) -> bool:
        return isinstance(value, list) and all(
            isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in value
        )

    if not isinstance(entry, dict):
        raise FormatError(f"{path}: tensor {name!r:.80} is not described by an object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or not re.fullmatch(r"[A-Z0-9_]{1,16}", dtype):
        raise FormatError(f"{path}: tensor {name!r:.80} has the dtype {dtype!r:.40}")
    if not integers(shape) or len(shape) > 8:
        raise FormatError(f"{path}: tensor {name!r:.80} has the shape {shape!r:.80}")
    if not integers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"{path}: tensor {name!r:.80} has the data_offsets {offsets!r:.80}")
    begin, end = start + offsets[0], start + offsets[1]
    if end > size:
        raise FormatError(f"{path}: tensor {name!r:.80} ends at byte {end}, but the file has {size} (cut short?)")
    if dtype in _SIZES and math.prod(shape) * _SIZES[dtype] != end - begin:
        raise FormatError(f"{path}: tensor {name!r:.80} is {dtype} {tuple(shape)}, but has {end - begin} bytes")
    return dtype, tuple(shape), begin, end
