"""From a checkpoint as people download it to named, mapped tensors: `open_checkpoint(source)`.

Sources: a Hugging Face directory, a `.gguf` file, a packed `.safetensors` file (written by `packed.save_packed`), a Hugging Face Hub
id, or "demo". Files are mapped, never read whole; every offset and size is checked against the file first. Nothing is
executed: pickled weights (`*.bin`, `*.pt`) are refused.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .checkpoint import Checkpoint, Progress, Tensor, release
from .config import Config, _object, config_from_gguf, config_from_hf
from .download import demo_file, from_hub, gguf_from_hub
from .errors import FormatError
from .gguf import GgufFile
from .packed import open_packed
from .safetensors_file import MAX_JSON, read_safetensors

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

EMBEDDING = "model.embed_tokens.weight"


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
    if source == "demo":  # a folder of that name is "./demo", or a Path
        path = demo_file()
    elif not exists:
        hub_id = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/([\w.-]+\.gguf))?", text)
        if hub_id is None or (hub_id[2] is None and text.endswith((".gguf", ".safetensors"))):
            raise FileNotFoundError(
                f"{text!r:.200}: no such file or directory (the Hub's are owner/name or owner/name/FILE.gguf)"
            )
        path = gguf_from_hub(hub_id[1], hub_id[2]) if hub_id[2] else from_hub(text, _complete)
        if path.is_dir() and not (path / "config.json").is_file():
            raise FormatError(
                f"{text}: no config.json in this repository; if it holds GGUF files, name one: {text}/FILE.gguf"
            )
    if path.is_dir():
        checkpoint = _open_directory(path)
    elif not path.is_file():
        raise FormatError(f"{path}: neither a file nor a directory")
    elif path.suffix == ".gguf" or _begins_with(path, b"GGUF"):
        checkpoint = _open_gguf(path)
    elif path.suffix == ".safetensors":
        checkpoint = open_packed(path)
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
        encoding, found, _ = tensors[name]
        if found != shape:
            raise FormatError(f"{source}: tensor {name!r:.80} has shape {found}, the config asks for {shape}")
        if len(shape) == 1 and encoding not in ("F32", "F16", "BF16"):
            raise FormatError(f"{source}: tensor {name!r:.80} is {encoding}; a norm's weights are F32, F16 or BF16")


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
    _drop_tied_head(str(path), tensors, maps)
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


def _complete(path: Path) -> bool:
    """Whether a cached snapshot has all that is wanted: another program may have fetched less, or a download was cut off."""
    if not (path / "config.json").is_file() or _hf_tokenizer(path) is None:
        return False
    if not any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return False  # shards without their index: how many there should be is not known
    with suppress(FormatError):
        return bool(_shards(path))
    return False


def _drop_tied_head(source: str, tensors: dict[str, Tensor], maps: dict[str, tuple[mmap.mmap, int]]) -> None:
    """An explicit output matrix must be the embedding, which is then used for both."""
    head = "lm_head.weight"
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
            release(data, base + i, base + min(i + step, len(b[2])))


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
    _drop_tied_head(str(path), tensors, maps)
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
