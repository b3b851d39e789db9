"""Packed files: replaced only when whole, and every field of their tables with values that mean nothing."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from opening import CASE, Q_PROJ, arrays, logits, refused
from tiny import header_of, put_header

from gemma_native import _native
from gemma_native.errors import FormatError
from gemma_native.packed import VERSION, save_packed
from gemma_native.weights import open_checkpoint


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    checkpoint = open_checkpoint(tiny.write_hf(tmp_path / "src", CASE))
    model = _native.Model(checkpoint.config, checkpoint.tensors, weights="int8")
    path = tmp_path / "model.safetensors"
    save_packed(path, checkpoint.config, model.packed(), b"not a tokenizer", "{{ template }}")
    return path


def test_packed_file_replaces_only_when_whole(packed: Path) -> None:
    before = packed.read_bytes()
    checkpoint = open_checkpoint(packed)

    tensors = dict(checkpoint.tensors)
    tensors["model.norm.weight"] = ("F32", (32,), "not bytes")  # type: ignore[assignment]
    with pytest.raises(TypeError):
        save_packed(packed, checkpoint.config, tensors)
    assert packed.read_bytes() == before and [p.name for p in packed.parent.glob(".*")] == []
    with pytest.raises(FileNotFoundError):
        save_packed(packed.parent / "none" / "x.safetensors", checkpoint.config, checkpoint.tensors)
    threads = [
        threading.Thread(target=save_packed, args=(packed, checkpoint.config, checkpoint.tensors)) for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert arrays(open_checkpoint(packed)) == arrays(checkpoint) and [p.name for p in packed.parent.glob(".*")] == []


def test_packed_extras(packed: Path) -> None:
    checkpoint = open_checkpoint(packed)
    assert checkpoint.chat_template == "{{ template }}" and checkpoint.tokenizer is not None
    with pytest.raises(FormatError, match=f"^{packed}: "):
        checkpoint.tokenizer()


def test_malformed_packed_files(packed: Path) -> None:
    header, data = header_of(packed)
    meta = header["__metadata__"]
    table = json.loads(meta["tensors"])

    def with_meta(**changes: Any) -> None:
        put_header(
            packed, {**header, "__metadata__": {k: v for k, v in {**meta, **changes}.items() if v is not None}}, data
        )

    def with_table(**changes: Any) -> None:
        with_meta(tensors=json.dumps({**table, **changes}))

    for version in (None, "0", str(int(VERSION) - 1), str(int(VERSION) + 1), VERSION + ".0", ""):
        with_meta(gemma_native=version)
        refused(packed, "not a packed file")
    for text in (None, "", "[]", "{}", "nul", "[" * 100_000):
        with_meta(config=text)
        refused(packed)
        with_meta(tensors=text)
        refused(packed)
    for entry in (None, 3, [], ["TILED:Q8_0"], ["TILED:Q8_0", 32], {"a": 1}, ["TILED:Q8_0", [32, 32], 1]):
        with_table(**{Q_PROJ: entry})
        refused(packed, f"tensor {Q_PROJ!r} is listed, but not described")
    for dtype in ("TILED:F32", "TILED:Q9", "Q8_0", "BF16", "F32", "U8", "", None, 3, ["TILED:Q8_0"]):
        with_table(**{Q_PROJ: [dtype, [32, 32]]})
        refused(packed, f"tensor {Q_PROJ!r} is listed as")
    for shape in ([0, 32], [-32, 32], [32.0, 32], [True, 32], ["32", 32], [1 << 40, 32], [[32], 32], [None]):
        with_table(**{Q_PROJ: ["TILED:Q8_0", shape]})
        refused(packed, f"tensor {Q_PROJ!r} has the absurd shape")
    for shape in ([64, 16], [1024], [32, 32, 1], []):
        with_table(**{Q_PROJ: ["TILED:Q8_0", shape]})
        refused(packed, f"tensor {Q_PROJ!r} has shape {tuple(shape)}, the config asks for (32, 32)")
    with_table(**{"model.norm.weight": ["F32", [33]]})
    refused(packed, "'model.norm.weight' is listed as 'F32' (33,), but stored as F32 (32,)")
    with_table(nothing=["F32", [1]])
    refused(packed, "tensor 'nothing' is listed, but not described")
    with_table(**{"tokenizer.model": ["TILED:Q8_0", [1, 15]]})
    refused(packed, "tensor 'tokenizer.model' is not part")
    put_header(packed, header, data[:-64])
    refused(packed, "cut short?")


def test_native_model_refuses_tampered_types(packed: Path) -> None:
    """What only the engine knows, how many bytes a tiled tensor has, it checks itself; the message names the tensor."""
    header, data = header_of(packed)
    meta = header["__metadata__"]
    table = json.loads(meta["tensors"])
    for dtype in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"):
        tampered = json.dumps({**table, Q_PROJ: [f"TILED:{dtype}", [32, 32]]})
        put_header(packed, {**header, "__metadata__": {**meta, "tensors": tampered}}, data)
        checkpoint = open_checkpoint(packed)
        with pytest.raises(ValueError, match="self_attn.q_proj"):
            _native.Model(checkpoint.config, checkpoint.tensors)
    config = json.loads(meta["config"]) | {"hidden_size": 64}
    put_header(packed, {**header, "__metadata__": {**meta, "config": json.dumps(config)}}, data)
    refused(packed, "the config asks for (64, 64)")


def test_packed_tensors_at_odd_addresses(packed: Path) -> None:
    truth = logits(open_checkpoint(packed))
    header, data = header_of(packed)
    for shift in (1, 2, 3, 32):
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64 + shift)
        put_header(packed, text, data)
        try:
            assert np.array_equal(logits(open_checkpoint(packed)), truth)
        except ValueError as error:
            assert "align" in str(error)
