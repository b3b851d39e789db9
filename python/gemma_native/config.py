"""The numbers that make a Gemma, read from a Hugging Face `config.json` (both dialects) or from GGUF metadata.

Values are checked here, so that what comes out can be trusted: FormatError names the file and the field. It refuses models
that are not Gemma 1, 2 or 3 text models, and features that the engine does not have, by name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from .errors import FormatError


@dataclass(frozen=True)
class Config:
    """One model's numbers. Generations differ in these values alone. See docs/MODEL.md."""

    architecture: str  # "gemma" | "gemma2" | "gemma3"
    vocab_size: int  # rows of the embedding table
    hidden_size: int
    intermediate_size: int  # of one branch of the feed-forward network
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    query_scale: float  # queries are multiplied by this
    rms_norm_eps: float = 1e-6
    norm_offset: float = 1.0  # added to every stored norm weight: 1 for Hugging Face files, 0 for GGUF (already added)
    attn_softcap: float = 0.0  # 0: none
    final_softcap: float = 0.0  # 0: none
    sliding_window: int = 0  # keys that a sliding layer sees, the query's own included; 0: none
    sliding_layers: tuple[bool, ...] = ()  # one a layer; empty: none slides
    rope_base: float = 10000.0  # full-attention layers
    rope_base_local: float = 10000.0  # sliding layers
    rope_scale: float = 1.0  # full-attention layers divide positions by this
    qk_norm: bool = False
    post_norms: bool = False
    bos_token_id: int = 2
    eos_token_ids: tuple[int, ...] = (1,)  # everything that ends a generation

    def to_json(self) -> str:
        """As packed files carry it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str, source: str) -> Config:
        """The inverse of `to_json`. Raises FormatError naming `source`."""
        read = _Reader(_object(text, source), source)
        known = {f.name for f in fields(cls)}
        for name in read.values:
            if name not in known:
                raise FormatError(
                    f"{source}: config has the unknown field {name!r:.60}; was it written by a newer version?"
                )
        raw = dict(read.values)
        for name in ("sliding_layers", "eos_token_ids"):
            if name in raw:
                if not isinstance(raw[name], list):
                    raise FormatError(f"{source}: {name} must be a list, not {raw[name]!r:.60}")
                raw[name] = tuple(raw[name])
        try:
            return _checked(cls(**raw), source)
        except TypeError as error:
            raise FormatError(f"{source}: config is incomplete ({error})") from None


def _object(text: str | bytes, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{source}: a JSON object is expected, not {type(value).__name__}")
    return value


class _Reader:
    """Typed look-ups in a mapping, with messages that name file and field."""

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.values, self.source, self.prefix = values, source, prefix

    def _fail(self, name: str, what: str) -> FormatError:
        return FormatError(f"{self.source}: {self.prefix}{name} {what}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self._fail(name, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or abs(value) >> 62:
            raise self._fail(name, f"must be an integer of sane size, not {value!r:.60}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self._fail(name, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            raise self._fail(name, f"must be a finite number, not {value!r:.60}")
        return float(value)

    def text(self, name: str, default: str) -> str:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self._fail(name, f"must be a string, not {value!r:.60}")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.values.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self._fail(name, f"must be an object, not {value!r:.60}")
        return value


_LIMITS: dict[str, tuple[float, float]] = {
    "vocab_size": (1, 1 << 24),
    "hidden_size": (1, 1 << 20),
    "intermediate_size": (1, 1 << 22),
    "num_layers": (1, 1024),
    "num_heads": (1, 1024),
    "num_kv_heads": (1, 1024),
    "head_dim": (2, 1024),
    "context_length": (1, 1 << 27),
    "query_scale": (1e-6, 1e3),
    "rms_norm_eps": (0, 0.1),
    "norm_offset": (0, 1),
    "attn_softcap": (0, 1e5),
    "final_softcap": (0, 1e5),
    "sliding_window": (0, 1 << 27),
    "rope_base": (1, 1e12),
    "rope_base_local": (1, 1e12),
    "rope_scale": (1e-2, 1e5),
    "bos_token_id": (0, 1 << 24),
}


_WHOLE = {f.name for f in fields(Config) if f.type == "int"}


def _checked(c: Config, source: str) -> Config:
    for name, (low, high) in _LIMITS.items():
        value = getattr(c, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise FormatError(f"{source}: {name} is {value!r:.60}, outside [{low:g}, {high:g}]")
        if name in _WHOLE and not isinstance(value, int):
            raise FormatError(f"{source}: {name} is {value!r:.60}; an integer is expected")
    if c.architecture not in _ARCHITECTURES.values():
        raise FormatError(f"{source}: architecture is {c.architecture!r:.60}; gemma, gemma2 and gemma3 are supported")
    for name, flags in (
        ("qk_norm", (c.qk_norm,)),
        ("post_norms", (c.post_norms,)),
        ("sliding_layers", c.sliding_layers),
    ):
        if not all(isinstance(flag, bool) for flag in flags):
            raise FormatError(f"{source}: {name} is {getattr(c, name)!r:.60}; only true and false are allowed there")
    if c.num_heads % c.num_kv_heads:
        raise FormatError(f"{source}: {c.num_heads} query heads cannot share {c.num_kv_heads} key/value heads evenly")
    if c.head_dim % 2:
        raise FormatError(f"{source}: head_dim is {c.head_dim}; it must be even")
    if c.sliding_layers and len(c.sliding_layers) != c.num_layers:
        raise FormatError(f"{source}: layer types are given for {len(c.sliding_layers)} of {c.num_layers} layers")
    if any(c.sliding_layers) and not c.sliding_window:
        raise FormatError(f"{source}: layers slide, but there is no sliding_window")
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= 1 << 24 for i in c.eos_token_ids):
        raise FormatError(f"{source}: eos token ids must be non-negative integers, not {c.eos_token_ids!r:.60}")
    return c


_ARCHITECTURES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3", "gemma3_text": "gemma3"}
# What transformers assumes where a Gemma 3 text_config is silent (Gemma3TextConfig).
_GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}


def config_from_hf(data: Mapping[str, Any], source: str, generation: Mapping[str, Any] | None = None) -> Config:
    """From the contents of `config.json` and, where there is one, `generation_config.json`. Raises FormatError."""
    kind = data.get("model_type")
    architecture = _ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if architecture is None:
        raise FormatError(f"{source}: model_type is {kind!r:.60}; gemma, gemma2, gemma3 and gemma3_text are supported")
    read = _Reader(data, source)
    values: Mapping[str, Any] = data
    if kind == "gemma3" and "text_config" in data:  # a multimodal checkpoint: its text part
        values = {**_GEMMA3_DEFAULTS, **read.mapping("text_config")}
        read = _Reader(values, source, "text_config.")
        if read.text("model_type", "gemma3_text") not in ("gemma3_text", "gemma3"):
            raise FormatError(f"{source}: text_config.model_type is {values['model_type']!r:.60}, not gemma3_text")
    elif architecture == "gemma3":
        read = _Reader({**_GEMMA3_DEFAULTS, **values}, source)
        values = read.values
    _refuse_what_gemma_has_not(data, values, source)

    layers = read.integer("num_hidden_layers")
    heads = read.integer("num_attention_heads")
    head_dim = read.integer("head_dim", 256)
    name = "head_dim" if architecture == "gemma" else "query_pre_attn_scalar"
    scalar = read.number(name, 256)
    if not scalar > 0:
        raise FormatError(f"{source}: {read.prefix}{name} is {scalar:g}; it must be positive")
    sliding: tuple[bool, ...] = ()
    window = 0
    if architecture != "gemma" and 0 < layers <= 1024:
        window = read.integer("sliding_window", 4096)
        sliding = _hf_sliding(read, architecture, layers)
    base, local, scale = _hf_rope(read, architecture)
    eos: list[int] = []
    for place in (data, values, generation or {}):
        _add_ids(eos, place.get("eos_token_id"), source)
    bos = values.get("bos_token_id", data.get("bos_token_id"))
    return _checked(
        Config(
            architecture=architecture,
            vocab_size=read.integer("vocab_size", 256000),
            hidden_size=read.integer("hidden_size"),
            intermediate_size=read.integer("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=read.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            context_length=read.integer("max_position_embeddings", 8192),
            query_scale=scalar**-0.5,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            attn_softcap=_hf_softcap(read, "attn_logit_softcapping", 50.0 if architecture == "gemma2" else 0.0),
            final_softcap=_hf_softcap(read, "final_logit_softcapping", 30.0 if architecture == "gemma2" else 0.0),
            sliding_window=window if any(sliding) else 0,
            sliding_layers=sliding,
            rope_base=base,
            rope_base_local=local,
            rope_scale=scale,
            qk_norm=architecture == "gemma3",
            post_norms=architecture != "gemma",
            bos_token_id=2 if bos is None else bos,
            eos_token_ids=tuple(eos) or (1,),
        ),
        source,
    )


def _refuse_what_gemma_has_not(data: Mapping[str, Any], values: Mapping[str, Any], source: str) -> None:
    if values.get("use_bidirectional_attention"):
        raise FormatError(f"{source}: use_bidirectional_attention is set; only causal text models are supported")
    if values.get("attention_bias"):
        raise FormatError(f"{source}: attention_bias is set; Gemma has no biases and the engine has none")
    if data.get("quantization_config") or values.get("quantization_config"):
        raise FormatError(
            f"{source}: quantization_config is set; quantised weights are read from GGUF files, here only F32, F16 and BF16"
        )
    activation = values.get("hidden_activation") or values.get("hidden_act") or "gelu_pytorch_tanh"
    if activation not in ("gelu", "gelu_pytorch_tanh", "gelu_tanh", "gelu_new"):
        raise FormatError(f"{source}: hidden_activation is {activation!r:.60}; Gemma's is the tanh GELU")


def _hf_softcap(read: _Reader, name: str, default: float) -> float:
    """What transformers assumes where the field is missing; null means none."""
    return read.number(name, 0.0) if name in read.values else default


def _add_ids(out: list[int], value: Any, source: str) -> None:
    if isinstance(value, list) and len(value) > 1000:
        raise FormatError(f"{source}: eos_token_id holds {len(value)} ids; at most 1000 are allowed")
    for i in value if isinstance(value, list) else [value]:
        if i is None:
            continue
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= 1 << 24:
            raise FormatError(f"{source}: eos_token_id holds {i!r:.60}; token ids are non-negative integers")
        if i not in out:
            out.append(i)


def _hf_sliding(read: _Reader, architecture: str, layers: int) -> tuple[bool, ...]:
    types = read.values.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise read._fail("layer_types", f"must be a list of {layers} names")
        for t in types:
            if t not in ("sliding_attention", "full_attention"):
                raise read._fail("layer_types", f"holds {t!r:.60}, not sliding_attention or full_attention")
        return tuple(t == "sliding_attention" for t in types)
    name = "sliding_window_pattern" if "sliding_window_pattern" in read.values else "_sliding_window_pattern"
    pattern = read.integer(name, 6 if architecture == "gemma3" else 2)
    if pattern < 1:
        raise read._fail(name, f"is {pattern}; it must be positive")
    return tuple((i + 1) % pattern != 0 for i in range(layers))


def _hf_rope(read: _Reader, architecture: str) -> tuple[float, float, float]:
    """(base, base of sliding layers, scale): from `rope_parameters` (transformers 5) or the older fields."""
    base = read.number("rope_theta", 1_000_000.0 if architecture == "gemma3" else 10000.0)
    local = read.number("rope_local_base_freq", 10000.0) if architecture == "gemma3" else base
    full = _Reader(read.mapping("rope_scaling"), read.source, f"{read.prefix}rope_scaling.")
    parameters = _Reader(read.mapping("rope_parameters"), read.source, f"{read.prefix}rope_parameters.")
    if not parameters.values:
        return base, local, _scale(full)
    if architecture == "gemma3" and ("full_attention" in parameters.values or "sliding_attention" in parameters.values):
        inner = _Reader(parameters.mapping("sliding_attention"), read.source, f"{parameters.prefix}sliding_attention.")
        local = inner.number("rope_theta", local)
        if _scale(inner) != 1.0:
            raise FormatError(f"{read.source}: {inner.prefix}factor scales sliding layers, which is not supported")
        parameters = _Reader(parameters.mapping("full_attention"), read.source, f"{parameters.prefix}full_attention.")
    base = parameters.number("rope_theta", base)
    # Where a file has both dialects, transformers lets the older one's scaling win.
    return base, local if architecture == "gemma3" else base, _scale(full if full.values else parameters)


def _scale(read: _Reader) -> float:
    kind = read.text("rope_type", read.text("type", ""))
    if kind == "" and read.values.get("factor") is not None:
        raise read._fail("rope_type", "is missing beside a factor")
    if kind in ("", "default"):
        return 1.0
    if kind != "linear":
        raise read._fail("rope_type", f"is {kind!r:.60}; default and linear are supported")
    return read.number("factor")


# The query scale of a GGUF file is not in the file: models whose scale is not the head size, by (architecture, layers).
_GGUF_QUERY_SCALARS = {("gemma2", 46): 144.0, ("gemma3", 62): 168.0}


def config_from_gguf(metadata: Mapping[str, Any], vocab_size: int, source: str) -> Config:
    """From a GGUF file's metadata; `vocab_size` is the embedding's rows. Raises FormatError."""
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ("gemma", "gemma2", "gemma3"):
        raise FormatError(
            f"{source}: general.architecture is {architecture!r:.60}; gemma, gemma2 and gemma3 are supported"
        )
    prefix = f"{architecture}."
    values = {k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}
    read = _Reader(values, source, prefix)
    layers = read.integer("block_count")
    heads = read.integer("attention.head_count")
    hidden = read.integer("embedding_length")
    head_dim = read.integer("attention.key_length", hidden // heads if heads > 0 else 0)
    if read.integer("attention.value_length", head_dim) != head_dim:
        raise FormatError(f"{source}: {prefix}attention.value_length differs from key_length")
    window, sliding = _gguf_sliding(read, architecture, layers)
    base = read.number("rope.freq_base", 1_000_000.0 if architecture == "gemma3" else 10000.0)
    eos: list[int] = []
    for name in ("eos_token_id", "eot_token_id"):
        _add_ids(eos, metadata.get(f"tokenizer.ggml.{name}"), source)
    scalar = _GGUF_QUERY_SCALARS.get((architecture, layers), float(head_dim))
    return _checked(
        Config(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=read.integer("feed_forward_length"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=read.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            context_length=read.integer("context_length"),
            query_scale=scalar**-0.5 if scalar > 0 else 0.0,
            rms_norm_eps=read.number("attention.layer_norm_rms_epsilon", 1e-6),
            norm_offset=0.0,
            attn_softcap=read.number("attn_logit_softcapping", 50.0 if architecture == "gemma2" else 0.0),
            final_softcap=read.number("final_logit_softcapping", 30.0 if architecture == "gemma2" else 0.0),
            sliding_window=window if any(sliding) else 0,
            sliding_layers=sliding,
            rope_base=base,
            rope_base_local=read.number("rope.freq_base_swa", 10000.0) if architecture == "gemma3" else base,
            rope_scale=_gguf_rope_scale(read),
            qk_norm=architecture == "gemma3",
            post_norms=architecture != "gemma",
            bos_token_id=_Reader(metadata, source).integer("tokenizer.ggml.bos_token_id", 2),
            eos_token_ids=tuple(eos) or (1,),
        ),
        source,
    )


def _gguf_sliding(read: _Reader, architecture: str, layers: int) -> tuple[int, tuple[bool, ...]]:
    """The window, and which layers have it."""
    name = "attention.sliding_window_pattern"
    if architecture == "gemma" or not 0 < layers <= 1024:
        return 0, ()
    window = read.integer("attention.sliding_window", 4096 if architecture == "gemma2" else 0)
    pattern = read.values.get(name)
    if isinstance(pattern, np.ndarray):
        pattern = pattern.tolist()
    if isinstance(pattern, (list, tuple)):
        if len(pattern) != layers or not all(p in (0, 1) for p in pattern):
            raise read._fail(name, f"needs {layers} booleans")
        sliding = tuple(bool(p) for p in pattern)
    else:
        n = read.integer(name, 6 if architecture == "gemma3" else 2)
        if n < 1:
            raise read._fail(name, f"is {n}; it must be positive")
        sliding = tuple((i + 1) % n != 0 for i in range(layers))
    return window, sliding if window else ()


def _gguf_rope_scale(read: _Reader) -> float:
    # llama.cpp takes a factor without a type for a linear one, and knows an older name of it.
    scaling = read.text("rope.scaling.type", "linear")
    if scaling == "linear":
        return read.number("rope.scaling.factor", read.number("rope.scale_linear", 1.0))
    if scaling != "none":
        raise read._fail("rope.scaling.type", f"is {scaling!r:.60}; none and linear are supported")
    return 1.0
