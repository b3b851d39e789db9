"""Random Gemma checkpoints in real shapes, for measuring speed where no real weights are at hand.

Writes tensor by tensor, all but the embedding from a small pool of random blocks, so a 7B file needs a few megabytes of memory. The numbers
mean nothing; their scale is such that activations stay finite. GGUF needs the `gguf` package (extra `test`).

    python bench/checkpoints.py --shape 2b --type Q4_0 bench/checkpoints/2b-Q4_0.gguf
    python bench/checkpoints.py --shape 2b --type hf   bench/checkpoints/2b-hf
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


@dataclass(frozen=True)
class Shape:
    """Sizes of a Gemma 1; see docs/MODEL.md."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int = 256_000
    context: int = 8192


SHAPES = {
    "tiny": Shape(2, 256, 2, 1, 128, 512, 1024, 1024),
    "2b": Shape(18, 2048, 8, 1, 256, 16384),
    "7b": Shape(28, 3072, 16, 16, 256, 24576),
}
TYPES = ("BF16", "Q8_0", "Q4_0", "Q4_K_M", "hf")
STD = 0.02
POOL = 4 << 20  # bytes of random blocks that every tensor of a type is cut from


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(GGUF name, (out, in)) of every tensor, vectors as (n,)."""
    s = shape
    inner = s.heads * s.head_dim
    yield "token_embd.weight", (s.vocab, s.hidden)
    yield "output_norm.weight", (s.hidden,)
    for i in range(s.layers):
        yield f"blk.{i}.attn_norm.weight", (s.hidden,)
        yield f"blk.{i}.attn_q.weight", (inner, s.hidden)
        yield f"blk.{i}.attn_k.weight", (s.kv_heads * s.head_dim, s.hidden)
        yield f"blk.{i}.attn_v.weight", (s.kv_heads * s.head_dim, s.hidden)
        yield f"blk.{i}.attn_output.weight", (s.hidden, inner)
        yield f"blk.{i}.ffn_norm.weight", (s.hidden,)
        yield f"blk.{i}.ffn_gate.weight", (s.ffn, s.hidden)
        yield f"blk.{i}.ffn_up.weight", (s.ffn, s.hidden)
        yield f"blk.{i}.ffn_down.weight", (s.hidden, s.ffn)


def encoding(name: str, mix: str, layers: int) -> str:
    """A tensor's type in a mix, as llama.cpp's quantize tool chooses it."""
    if name.endswith("_norm.weight"):
        return "F32"
    if mix in ("BF16", "Q8_0"):
        return mix
    if name == "token_embd.weight":
        return "Q6_K"
    if mix == "Q4_0":
        return mix
    if name.endswith(("attn_v.weight", "ffn_down.weight")):
        layer = int(name.split(".")[1])
        more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        return "Q6_K" if more else "Q4_K"
    return "Q4_K"


def random_blocks(kind: str, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """A pool uint8 [n, bytes a block] of valid random blocks whose values have a standard deviation near STD."""

    def halves(value: float, n: int) -> np.ndarray[Any, Any]:
        return np.full((n, 1), value, np.float16).view(np.uint8)

    def noise(n: int, size: int) -> np.ndarray[Any, Any]:
        return rng.integers(0, 256, (n, size), np.uint8)

    if kind == "BF16":
        values = (rng.standard_normal(POOL // 2, np.float32) * STD).view(np.uint32)
        return ((values + 0x8000) >> 16).astype(np.uint16).view(np.uint8).reshape(-1, 2)
    if kind == "Q8_0":
        n = POOL // 34
        return np.hstack([halves(STD / 74, n), noise(n, 32)])
    if kind == "Q4_0":
        n = POOL // 18
        return np.hstack([halves(STD / 4.6, n), noise(n, 16)])
    if (
        kind == "Q4_K"
    ):  # d, dmin, 12 bytes of 6-bit scales and minimums (all 21: 0b010101 in every field), 128 of nibbles
        n = POOL // 144
        scales = np.full((n, 12), 0x55, np.uint8)
        d = STD / (4.6 * 21)
        return np.hstack([halves(d, n), halves(d * 7.5, n), scales, noise(n, 128)])
    if kind == "Q6_K":  # 128 low nibbles, 64 high bits, 16 int8 scales, d
        n = POOL // 210
        return np.hstack([noise(n, 192), rng.integers(16, 64, (n, 16), np.uint8), halves(STD / (18.5 * 40), n)])
    raise ValueError(f"no random blocks of type {kind}")


class Repeated:
    """`nbytes` bytes cut from a pool again and again: enough of an array for GGUFWriter.write_tensor_data."""

    def __init__(self, pool: np.ndarray[Any, Any], nbytes: int, start: int) -> None:
        self.nbytes = nbytes
        self._pool = pool.reshape(-1).data
        self._start = start * pool.shape[1] % self._pool.nbytes

    def tofile(self, file: BinaryIO) -> None:
        left, at = self.nbytes, self._start
        while left:
            piece = self._pool[at : at + left]
            file.write(piece)
            left, at = left - piece.nbytes, 0


class Distinct:
    """`nbytes` bytes of random blocks none of which is there twice. An embedding is made so: where its rows repeat, so does the best of
    the vocabulary, and many panels of the head have to be computed."""

    def __init__(self, kind: str, nbytes: int, rng: np.random.Generator) -> None:
        self.nbytes = nbytes
        self._kind, self._rng = kind, rng

    def tofile(self, file: BinaryIO) -> None:
        left = self.nbytes
        while left:
            piece = random_blocks(self._kind, self._rng).reshape(-1).data[:left]
            file.write(piece)
            left -= piece.nbytes


def make_gguf(path: Path, shape: Shape, mix: str, seed: int = 0) -> None:
    """Writes a GGUF file of architecture `gemma`, by another name first."""
    import gguf

    rng = np.random.default_rng(seed)
    temporary = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(temporary, "gemma")
    writer.add_name(f"random {path.stem}")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)

    kinds = gguf.TokenType
    special = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 106: "<start_of_turn>", 107: "<end_of_turn>"}
    first_byte = 217  # where Gemma 1 has its byte pieces
    pieces, types = [], []
    for i in range(shape.vocab):
        if i in special:
            pieces.append(special[i])
            types.append(kinds.UNKNOWN if i == 3 else kinds.CONTROL)
        elif first_byte <= i < first_byte + 256:
            pieces.append(f"<0x{i - first_byte:02X}>")
            types.append(kinds.BYTE)
        else:
            pieces.append(f"\u2581w{i}")
            types.append(kinds.NORMAL)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(shape.vocab)])
    writer.add_token_types(types)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)

    pools: dict[str, np.ndarray[Any, Any]] = {}
    plan: list[Any] = []
    for name, dims in tensors(shape):
        kind = encoding(name, mix, shape.layers)
        qtype = gguf.GGMLQuantizationType[kind]
        values, size = gguf.GGML_QUANT_SIZES[qtype]
        nbytes = int(np.prod(dims)) // values * size
        if kind == "F32":
            plan.append(np.ones(dims, np.float32))  # the 1 of 1 + w is part of a GGUF file's norms
        elif name == "token_embd.weight":
            plan.append(Distinct(kind, nbytes, rng))
        else:
            if kind not in pools:
                pools[kind] = random_blocks(kind, rng)
            plan.append(Repeated(pools[kind], nbytes, int(rng.integers(1 << 30))))
        writer.add_tensor_info(name, dims, np.dtype(np.float32), nbytes, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for data in plan:
        writer.write_tensor_data(data)
    writer.close()
    os.replace(temporary, path)


HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """Hugging Face's name of one of `tensors`."""
    if name.startswith("blk."):
        _, layer, part, _ = name.split(".")
        return f"model.layers.{layer}.{HF_NAMES[part]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def make_hf(path: Path, shape: Shape, seed: int = 0) -> None:
    """Writes config.json and a bfloat16 model.safetensors (no tokenizer) into a directory."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    plan: list[Any] = []
    pool = random_blocks("BF16", rng)
    at = 0
    for name, dims in tensors(shape):
        name = hf_name(name)
        nbytes = 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [at, at + nbytes]}
        at += nbytes
        table = name == "model.embed_tokens.weight"
        plan.append(Distinct("BF16", nbytes, rng) if table else Repeated(pool, nbytes, int(rng.integers(1 << 30))))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path / "model.safetensors.tmp"
    with open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for data in plan:
            data.tofile(file)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    os.replace(temporary, path / "model.safetensors")


def make(path: Path, shape: str, mix: str, seed: int = 0) -> None:
    """Makes the checkpoint at `path` unless it is there already."""
    if (path / "model.safetensors").exists() if mix == "hf" else path.exists():
        return
    print(f"making {path}", file=sys.stderr, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if mix == "hf":
        make_hf(path, SHAPES[shape], seed)
    else:
        make_gguf(path, SHAPES[shape], mix, seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--type", choices=TYPES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("path", type=Path)
    args = parser.parse_args()
    make(args.path, args.shape, args.type, args.seed)
