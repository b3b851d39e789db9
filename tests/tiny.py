"""Tiny random Gemmas on disk: Hugging Face directories of each generation, and GGUF files in every quantised type.

Weights are seeded and scaled so that nothing is degenerate: attention is neither uniform nor one-hot, soft caps bite, every
layer changes the residual stream by about its own size. There is no tokenizer in them: they are run on token ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from reference import to_bf16

Shapes = dict[str, tuple[int, ...]]

# name: fields of config.json that all dialects share, and what tests vary
_COMMON: dict[str, Any] = {
    "vocab_size": 311,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GEMMA2 = {"attn_logit_softcapping": 6.0, "final_logit_softcapping": 8.0}

CASES: dict[str, dict[str, Any]] = {
    "gemma-mqa": {
        "model_type": "gemma",
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
    },
    "gemma-mha": {  # heads x head_dim is not hidden_size, as in the 7B; odd sizes
        "model_type": "gemma",
        "hidden_size": 90,
        "intermediate_size": 150,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "hidden_act": "gelu",  # the legacy field, which means nothing
    },
    "gemma2-gqa": {
        "model_type": "gemma2",
        "hidden_size": 104,
        "intermediate_size": 144,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "query_pre_attn_scalar": 144,  # not head_dim, as in the 27B
        "sliding_window": 20,
        **_GEMMA2,
    },
    "gemma2-mha": {
        "model_type": "gemma2",
        "hidden_size": 75,
        "intermediate_size": 131,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 128,
        "query_pre_attn_scalar": 128,
        "sliding_window": 7,
        **_GEMMA2,
    },
    "gemma3-mqa": {
        "model_type": "gemma3_text",
        "hidden_size": 80,
        "intermediate_size": 136,
        "num_hidden_layers": 7,  # one global layer, and a sliding one after it
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 16,
    },
    "gemma3-scaled": {
        "model_type": "gemma3_text",
        "hidden_size": 102,
        "intermediate_size": 168,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 40,
        "sliding_window": 33,
        "pattern": 3,
        "rope_factor": 8.0,
    },
    "gemma3-mha": {
        "model_type": "gemma3_text",
        "hidden_size": 66,
        "intermediate_size": 99,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 20,
        "query_pre_attn_scalar": 20,
        "sliding_window": 5,
        "pattern": 2,
    },
}


def hf_config(case: Mapping[str, Any], dialect: int = 5) -> dict[str, Any]:
    """config.json as transformers 4 or 5 writes it. `case`: an entry of CASES."""
    config = {**_COMMON, **case}
    pattern, factor = config.pop("pattern", None), config.pop("rope_factor", None)
    layers, kind = config["num_hidden_layers"], config["model_type"]
    scaling = {"rope_type": "linear", "factor": factor} if factor else None
    config["architectures"] = [{"gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3"}[kind] + "ForCausalLM"]
    if dialect == 4:
        config["torch_dtype"] = "bfloat16"
        config["rope_theta"] = 1e6 if kind == "gemma3_text" else 10000.0
        if kind == "gemma3_text":
            config |= {"rope_local_base_freq": 10000.0, "rope_scaling": scaling, "sliding_window_pattern": pattern or 6}
        return config
    config["dtype"] = "bfloat16"
    if kind != "gemma":
        every = pattern or (6 if kind == "gemma3_text" else 2)
        types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
        config["layer_types"] = types
    if kind == "gemma3_text":
        full = {"rope_theta": 1e6, **(scaling or {"rope_type": "default"})}
        config["rope_parameters"] = {
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    else:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    return config


def shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a checkpoint's tensors, from config.json."""
    d, f, e = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * e, config["num_key_value_heads"] * e
    layer: Shapes = {
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
    if config["model_type"] != "gemma":
        layer |= {"pre_feedforward_layernorm": (d,), "post_feedforward_layernorm": (d,)}
    if config["model_type"] == "gemma3_text":
        layer |= {"self_attn.q_norm": (e,), "self_attn.k_norm": (e,)}
    out: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for i in range(config["num_hidden_layers"]):
        out |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return out | {"model.norm.weight": (d,)}


def _normal(bits: np.random.PCG64, shape: tuple[int, ...]) -> np.ndarray:
    """Nearly normal float32 numbers from integers alone: the same for every version of NumPy, as its generators' are not."""
    n = int(np.prod(shape))
    quarters = bits.random_raw(n).view(np.uint16).reshape(n, 4).astype(np.int32)
    return ((quarters.sum(-1) - 2 * 0xFFFF).astype(np.float32) * np.float32(2.0**-16 * 3**0.5)).reshape(shape)


def random_weights(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """float32 tensors under Hugging Face names; norm weights are centred at 0 (the model adds 1)."""
    bits = np.random.PCG64(seed)
    e = config["head_dim"]
    scale = config.get("query_pre_attn_scalar", e) ** -0.5
    sharp = 2.5  # standard deviation of the attention scores
    out = {}
    for name, shape in shapes(config).items():
        w = _normal(bits, shape)
        part = name.split(".")[-2]
        k = shape[-1]
        if part.endswith("norm"):
            w *= np.float32(0.25)
            if part in ("q_norm", "k_norm"):  # scores: (1 + w)^2 sqrt(E) scale
                w += np.float32((sharp / (e**0.5 * scale)) ** 0.5 - 1)
            elif part.startswith("post_") and config["model_type"] != "gemma":
                w += np.float32(1.0)  # each half of a layer adds vectors of root mean square 2
            elif name == "model.norm.weight":  # random signs of 1 + w, or the tied head would favour the last token
                w -= (bits.random_raw(k) >> 63).astype(np.float32) * 2
        elif part == "embed_tokens":
            w *= np.float32(2.5 / k**0.5)
        elif part in ("q_proj", "k_proj"):  # scores: s^2 D sqrt(E) scale
            w *= np.float32((sharp / (e**0.5 * scale)) ** 0.5 / k**0.5)
        elif part in ("o_proj", "down_proj"):
            w *= np.float32(3.0 / k**0.5)
        else:
            w *= np.float32(1.2 / k**0.5)
        out[name] = w
    return out


# --- Hugging Face directories ---


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str = "BF16") -> None:
    """float32 arrays as one safetensors file. dtype: "BF16", "F16" or "F32"."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts, at = [], 0
    for name, w in tensors.items():
        data = (to_bf16(w) if dtype == "BF16" else w.astype({"F16": np.float16, "F32": np.float32}[dtype])).tobytes()
        header[name] = {"dtype": dtype, "shape": list(w.shape), "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The parsed header of a safetensors file, and the bytes behind it."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def put_header(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    """Writes a safetensors file with any header (an object, or bytes as they are) and any claim of its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def write_hf(
    folder: Path,
    case: str | Mapping[str, Any],
    seed: int = 0,
    *,
    dialect: int = 5,
    shards: int = 1,
    dtype: str = "BF16",
    **changes: Any,
) -> Path:
    """A Hugging Face directory. case: a name in CASES or such an entry; changes: fields of it that differ."""
    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config({**(CASES[case] if isinstance(case, str) else case), **changes}, dialect)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = random_weights(config, seed)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    names = list(tensors)
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        where |= dict.fromkeys(part, file)
        write_safetensors(folder / file, {name: tensors[name] for name in part}, dtype)
    index = {"metadata": {"total_size": sum(2 * w.size for w in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# --- GGUF files ---

QUANTS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
BLOCK = {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0] for name in QUANTS}

# Tiny Gemmas whose every K (hidden, heads x head_dim, intermediate) is a multiple of 256, or of 32 only.
GGUF_CASES: dict[str, dict[str, Any]] = {
    "gemma": {
        "model_type": "gemma",
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
    },
    "gemma2": {
        "model_type": "gemma2",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "query_pre_attn_scalar": 128,
        "sliding_window": 12,
        **_GEMMA2,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 7,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 16,
        "rope_factor": 8.0,
    },
    "gemma3-narrow": {
        "model_type": "gemma3_text",
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "sliding_window": 10,
        "pattern": 2,
    },
}

_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, post_norms: bool) -> str:
    """A Hugging Face tensor name as GGUF spells it, without ".weight"."""
    plain = name.removesuffix(".weight")
    if not plain.startswith("model.layers."):
        return {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[plain]
    _, _, layer, part = plain.split(".", 3)
    if part == "post_attention_layernorm":
        return f"blk.{layer}.{'post_attention_norm' if post_norms else 'ffn_norm'}"
    return f"blk.{layer}.{_GGUF_NAMES[part]}"


def random_k_blocks(name: str, shape: tuple[int, int], std: float, rng: np.random.Generator) -> np.ndarray:
    """Valid blocks of Q4_K, Q5_K or Q6_K, uint8 [rows, bytes]: random quants and inner scales, values of about the given
    standard deviation. (The gguf package reads these types, but cannot write them.)"""
    kind = gguf.GGMLQuantizationType[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    n = shape[0] * shape[1] // block
    raw = rng.integers(0, 256, (n, size), dtype=np.uint8)

    def put(at: int, values: np.ndarray) -> None:
        raw[:, at : at + 2] = values.astype(np.float16).view(np.uint8).reshape(n, 2)

    # Offsets of d (and dmin), and the dmin that centres the values: half the largest quant.
    d_at, min_at, middle = {"Q4_K": (0, 2, 7.5), "Q5_K": (0, 2, 15.5), "Q6_K": (208, None, 0)}[name]
    typical = {"Q4_K": 300.0, "Q5_K": 620.0, "Q6_K": 1370.0}[name]  # standard deviation of the values where d is 1
    d = std / typical * rng.uniform(0.7, 1.3, n) * rng.choice([-1, 1], n)
    put(d_at, d)
    if min_at is not None:
        put(min_at, d * middle)
    return raw.reshape(shape[0], -1)


def encode(name: str, w: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A matrix in a GGUF type: float32 values in the types that gguf writes, random blocks of like size in the others."""
    if name == "F32":
        return w
    if name == "F16":
        return w.astype(np.float16)
    kind = gguf.GGMLQuantizationType[name]
    if name in ("Q4_K", "Q5_K", "Q6_K"):
        return random_k_blocks(name, w.shape, float(w.std()), rng)
    return gguf.quants.quantize(w, kind)


def write_gguf(
    path: Path,
    case: str | Mapping[str, Any],
    quant: str,
    seed: int = 0,
    *,
    embedding: str | None = None,
    down: str | None = None,
    extra: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A GGUF file whose matrices are all `quant` (the embedding and ffn_down may differ), norms F32 with the 1 added.

    case: a name in GGUF_CASES or such an entry; changes: fields of it that differ; extra: keys below the architecture's
    prefix to add, as arrays of booleans, integers or floats.
    """
    config = hf_config({**(GGUF_CASES[case] if isinstance(case, str) else case), **changes}, 4)
    arch = {"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"}[config["model_type"]]
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if arch != "gemma":
        writer.add_sliding_window(config["sliding_window"])
    if arch == "gemma3":
        writer.add_rope_freq_base(config["rope_theta"])
        if config["rope_scaling"]:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config["rope_scaling"]["factor"])
        if config["sliding_window_pattern"] != 6:
            writer.add_uint32(f"{arch}.attention.sliding_window_pattern", config["sliding_window_pattern"])
    for key, value in (extra or {}).items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{arch}.{key}", value)
        else:
            writer.add_float32(f"{arch}.{key}", value)
    rng = np.random.default_rng([seed, 1])
    for name, w in random_weights(config, seed).items():
        target = gguf_name(name, arch != "gemma") + ".weight"
        if w.ndim == 1:
            writer.add_tensor(target, w + np.float32(1))
            continue
        kind = embedding if embedding and "embed" in name else down if down and "down_proj" in name else quant
        raw = kind not in ("F32", "F16")
        writer.add_tensor(
            target,
            np.ascontiguousarray(encode(kind, w, rng)),
            raw_dtype=gguf.GGMLQuantizationType[kind] if raw else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
