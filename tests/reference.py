"""Gemma 1, 2 and 3 in plain NumPy float32: the executable specification that the engine is tested against.

It reads like the papers and like csrc/model.cpp, and runs a whole sequence at once, without a cache. It refuses to be fast.

Letters, here and in the engine:
  N tokens of the sequence    D hidden size                F width of the feed-forward network
  H query heads               G key/value heads (G | H)    E size of a head (H E need not be D)
  V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gguf
import numpy as np

Array = np.ndarray
Tensor = tuple[str, tuple[int, ...], Any]  # (dtype, shape, bytes), as a checkpoint holds it
Rounding = Callable[[Array], Array]


# --- weights: from a checkpoint's bytes to float32 ---


def to_float32(dtype: str, shape: tuple[int, ...], data: Any) -> Array:
    """A tensor as the checkpoint stores it, in float32. `shape` is (out, in) or (n,)."""
    raw = np.frombuffer(data, np.uint8)
    if dtype == "F32":
        return raw.view(np.float32).reshape(shape)
    if dtype == "F16":
        return raw.view(np.float16).astype(np.float32).reshape(shape)
    if dtype == "BF16":  # the upper half of a float32
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    kind = gguf.GGMLQuantizationType[dtype]
    return gguf.quants.dequantize(raw.reshape(shape[0], -1), kind).reshape(shape)


def to_bf16(x: Array) -> Array:
    """float32 values rounded to bf16 (nearest, ties to even), as uint16 bits. Not for NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def weights_of(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    """All tensors of a checkpoint in float32, by their Hugging Face names."""
    return {name: to_float32(*tensor) for name, tensor in tensors.items()}


# --- the model ---


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x[..., n] scaled to a root mean square of 1, then by weight[n]."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True, dtype=np.float32) + np.float32(eps)) * weight


def rope(x: Array, positions: Array, base: float, scale: float) -> Array:
    """Rotates x[N, heads, E]: the pair (x[i], x[i + E/2]) by position / scale * base^(-2i/E). Angles are float32."""
    half = x.shape[-1] // 2
    frequency = 1.0 / np.float32(base) ** (np.arange(half, dtype=np.float32) / np.float32(half)) / np.float32(scale)
    angle = (positions.astype(np.float32)[:, None] * frequency)[:, None, :]
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def softcap(x: Array, cap: float) -> Array:
    """cap tanh(x / cap); a cap of 0 is none."""
    return np.float32(cap) * np.tanh(x / np.float32(cap)) if cap else x


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x: Array) -> Array:
    """The tanh form, whatever a config's `hidden_act` says."""
    return np.float32(0.5) * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)))


def attention(q: Array, k: Array, v: Array, window: int, cap: float) -> Array:
    """Causal attention of q[N, H, E] (scaled) over k, v[N, G, E] -> [N, H, E]. window: keys seen, the own included; 0: all."""
    n, heads, _ = q.shape
    group = heads // k.shape[1]  # query heads that share a key/value head
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]
    hidden = (distance < 0) | ((distance >= window) if window else False)
    out = np.empty_like(q)
    for h in range(heads):
        scores = softcap(q[:, h] @ k[:, h // group].T, cap)  # the cap first, then the mask
        out[:, h] = softmax(np.where(hidden, -np.inf, scores)) @ v[:, h // group]
    return out


def hidden_states(config: Any, weights: Mapping[str, Array], tokens: Any, rounding: Rounding | None = None) -> Array:
    """Token ids [N] -> what the head multiplies [N, D]: every layer and the last norm.

    `rounding`, where given, is applied to what goes into each weight matrix: it stands for an engine's rounding of
    activations, so that the rest can be compared closely.
    """
    c = config
    ids = np.asarray(tokens)
    n, eps = len(ids), c.rms_norm_eps
    positions = np.arange(n)

    def norm(x: Array, name: str) -> Array:
        return rms_norm(x, weights[name + ".weight"] + np.float32(c.norm_offset), eps)

    def project(x: Array, name: str) -> Array:
        return (rounding(x) if rounding else x) @ weights[name + ".weight"].T

    x = weights["model.embed_tokens.weight"][ids] * np.sqrt(np.float32(c.hidden_size))  # [N, D]
    for i in range(c.num_layers):
        p = f"model.layers.{i}."
        slides = bool(c.sliding_window and c.sliding_layers and c.sliding_layers[i])
        base, scale = (c.rope_base_local, 1.0) if slides else (c.rope_base, c.rope_scale)

        h = norm(x, p + "input_layernorm")
        q = project(h, p + "self_attn.q_proj").reshape(n, c.num_heads, c.head_dim)
        k = project(h, p + "self_attn.k_proj").reshape(n, c.num_kv_heads, c.head_dim)
        v = project(h, p + "self_attn.v_proj").reshape(n, c.num_kv_heads, c.head_dim)
        if c.qk_norm:  # before RoPE
            q, k = norm(q, p + "self_attn.q_norm"), norm(k, p + "self_attn.k_norm")
        q = rope(q, positions, base, scale) * np.float32(c.query_scale)
        k = rope(k, positions, base, scale)
        y = attention(q, k, v, c.sliding_window if slides else 0, c.attn_softcap)
        y = project(y.reshape(n, -1), p + "self_attn.o_proj")
        x = x + (norm(y, p + "post_attention_layernorm") if c.post_norms else y)

        # In Gemma 1 `post_attention_layernorm` is the norm before the feed-forward network, despite its name.
        h = norm(x, p + ("pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"))
        y = gelu(project(h, p + "mlp.gate_proj")) * project(h, p + "mlp.up_proj")  # [N, F]
        y = project(y, p + "mlp.down_proj")
        x = x + (norm(y, p + "post_feedforward_layernorm") if c.post_norms else y)
    return norm(x, "model.norm")


def head(config: Any, weights: Mapping[str, Array], hidden: Array, rounding: Rounding | None = None) -> Array:
    """[N, D] -> logits [N, V]. The embedding is also the head."""
    logits = (rounding(hidden) if rounding else hidden) @ weights["model.embed_tokens.weight"].T
    return softcap(logits, config.final_softcap)


def forward(config: Any, weights: Mapping[str, Array], tokens: Any, rounding: Rounding | None = None) -> Array:
    """Token ids [N] -> the logits of every position, float32 [N, V]."""
    return head(config, weights, hidden_states(config, weights, tokens, rounding), rounding)


# --- what tests ask about logits ---


def log_softmax(logits: Array) -> Array:
    """Natural logs of the probabilities, in float64."""
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def nse(out: Array, truth: Array) -> float:
    """The normalised squared error |out - truth|^2 / |truth|^2."""
    truth = truth.astype(np.float64)
    return float(((out - truth) ** 2).sum() / (truth**2).sum())


# --- how the engine rounds activations (see `rounding` above) ---


def round_int8_blocks(x: Array, block: int = 16) -> Array:
    """x[N, K] as int8 in blocks along K with one float32 scale each: what quantised weights are multiplied by.

    Blocks are 32 wide; in models as small as the tests' they are 16.
    """
    n, k = x.shape
    padded = np.zeros((n, -(-k // block) * block), np.float32)
    padded[:, :k] = x
    blocks = padded.reshape(n, -1, block)
    top = np.abs(blocks).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    return (np.rint(blocks * inverse) * (top * np.float32(1 / 127))).reshape(n, -1)[:, :k]


def round_bf16(x: Array) -> Array:
    """x as bf16 instructions take it."""
    return (to_bf16(x).astype(np.uint32) << 16).view(np.float32)
