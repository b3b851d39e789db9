"""Packed files: what the engine holds in memory, ready to be mapped. docs/FORMATS.md has the format."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, Tensor, temporary
from .config import Config, _object
from .errors import FormatError
from .gguf import TYPES
from .safetensors_file import read_safetensors

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

VERSION = "4"  # of the tiles' layout: since 4, the low bits of Q8_0 and Q6_K follow the last panel's units
_ALIGN = 64
_TOKENIZER = "tokenizer.model"


def save_packed(
    path: str | os.PathLike[str],
    config: Config,
    tensors: Mapping[str, Tensor],
    tokenizer: bytes | None = None,
    chat_template: str | None = None,
) -> None:
    """Writes `Model.packed()` and its config as one safetensors file that `open_checkpoint` maps and uses where it lies.

    tensors: name to (dtype, shape, bytes); the norms among them have config.norm_offset already added, so the file says 0.
    tokenizer: a serialised SentencePiece model. The file appears under its name only when it is whole.
    """
    header: dict[str, Any] = {
        "__metadata__": {
            "gemma_native": VERSION,
            "config": replace(config, norm_offset=0.0).to_json(),
            "tensors": json.dumps({name: [dtype, list(shape)] for name, (dtype, shape, _) in tensors.items()}),
        }
    }
    if chat_template is not None:
        header["__metadata__"]["chat_template"] = chat_template
    parts: list[memoryview] = []
    at = 0
    blobs = [(name, dtype, shape, data) for name, (dtype, shape, data) in tensors.items()]
    if tokenizer is not None:
        blobs.append((_TOKENIZER, "U8", (len(tokenizer),), memoryview(tokenizer)))
    for name, dtype, shape, data in blobs:
        pad = bytes(-len(data) % _ALIGN)  # a tensor of its own, since the format allows no gaps
        if dtype.startswith("TILED:"):
            dtype, shape = "U8", (len(data),)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
        parts.append(data)
        if pad:
            header[f"padding.{len(parts)}"] = {"dtype": "U8", "shape": [len(pad)], "data_offsets": [at, at + len(pad)]}
            at += len(pad)
            parts.append(memoryview(pad))
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    target = Path(path)
    unfinished = temporary(target)
    try:
        with open(unfinished, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def open_packed(path: Path) -> Checkpoint:
    """Opens what `save_packed` wrote. Raises FormatError, also where another version of the format did."""
    file = read_safetensors(path)
    if file.metadata.get("gemma_native") != VERSION:
        raise FormatError(
            f"{path}: not a packed file of this gemma_native (format {VERSION}); an older one has to be quantised again, "
            "and for a Hugging Face checkpoint give its directory"
        )
    config = Config.from_json(file.metadata.get("config", ""), str(path))
    table = _object(file.metadata.get("tensors", ""), f"{path}: tensors")
    tensors: dict[str, Tensor] = {}
    maps: dict[str, tuple[mmap.mmap, int]] = {}
    quantised = {f"TILED:{t[0]}" for t in TYPES.values() if t[1] > 1}
    for name, entry in table.items():
        if name not in file.tensors or not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list):
            raise FormatError(f"{path}: tensor {name!r:.80} is listed, but not described")
        dtype, shape = entry[0], tuple(entry[1])
        stored, stored_shape, begin, end = file.tensors[name]
        tiled = isinstance(dtype, str) and dtype in quantised and stored == "U8"
        if not tiled and (dtype != stored or dtype not in ("F32", "BF16") or shape != stored_shape):
            raise FormatError(
                f"{path}: tensor {name!r:.80} is listed as {dtype!r:.40} {shape!r:.60}, but stored as {stored} {stored_shape}"
            )
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 1 << 32 for n in shape):
            raise FormatError(f"{path}: tensor {name!r:.80} has the absurd shape {shape!r:.60}")
        tensors[name] = (dtype, shape, memoryview(file.map)[begin:end])
        maps[name] = (file.map, begin)
    build = None
    if _TOKENIZER in file.tensors:
        _, _, begin, end = file.tensors[_TOKENIZER]

        def build() -> Tokenizer:
            from .tokenizer import Tokenizer

            try:
                return Tokenizer.from_sentencepiece(file.map[begin:end])
            except FormatError as error:
                raise FormatError(f"{path}: {error}") from None

    return Checkpoint(str(path), config, tensors, build, file.metadata.get("chat_template"), _maps=maps)
