"""What tests of the engine share: models of tiny checkpoints, their weights and logits, and comparisons."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import tiny

from gemma_native import _native
from gemma_native.checkpoint import Checkpoint
from gemma_native.config import Config

Array = np.ndarray
GetModel = Callable[..., Any]

emulated = hasattr(_native.testing, "emulator")
needs_emulation = pytest.mark.skipif(not emulated, reason="built without the emulation")

# The smallest model with everything: two layers, the first slides.
SPECK: dict[str, Any] = {
    "model_type": "gemma2",
    "vocab_size": 61,
    "hidden_size": 36,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 64,
    "max_position_embeddings": 4096,
    "attn_logit_softcapping": 6.0,
    "final_logit_softcapping": 8.0,
}
RING = 576  # positions that its sliding layer holds: 64 + 512, a multiple of 64


def build(checkpoint: Checkpoint, **options: Any) -> Any:
    """A Model of a checkpoint; options as Model takes them."""
    return _native.Model(checkpoint.config, checkpoint.tensors, **options)


def random_tokens(n: int, seed: int, vocab: int = 311) -> np.ndarray:
    """<bos> and n - 1 random token ids."""
    tokens = np.random.default_rng(seed).integers(0, vocab, n).astype(np.int32)
    tokens[0] = 2
    return tokens


def all_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Every position's logits, from a fresh cache."""
    return model.forward(tokens, model.new_cache(), all_logits=True)


def row_nse(out: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The normalised squared error of each position."""
    truth = truth.astype(np.float64)
    return ((out - truth) ** 2).sum(-1) / (truth**2).sum(-1)


def held(model: Any) -> tuple[Config, dict[str, Array]]:
    """Config and float32 weights, exactly as the model holds them. Norms have their offset added already."""
    weights = {}
    for name, (dtype, shape, data) in model.packed().items():
        if dtype.startswith("TILED:"):  # rows are padded to whole blocks
            block = tiny.BLOCK[dtype.removeprefix("TILED:")]
            padded = -(-shape[1] // block) * block
            weights[name] = _native.testing.dequantize(dtype, data, shape[0], padded)[:, : shape[1]]
        else:
            weights[name] = reference.to_float32(dtype, shape, data)
    return dataclasses.replace(model.config, norm_offset=0.0), weights


def edited(checkpoint: Checkpoint, name: str, edit: Callable[[Array], None]) -> dict[str, Any]:
    """The checkpoint's tensors, one of them changed, as float32."""
    dtype, shape, data = checkpoint.tensors[name]
    w = reference.to_float32(dtype, shape, data).copy()
    edit(w)
    return {**checkpoint.tensors, name: ("F32", shape, memoryview(w.tobytes()))}


def steps(model: Any, tokens: Array, sizes: list[int], cache: Any = None) -> Array:
    """Every position's logits, in calls of the given sizes, in turn, until the tokens are used up."""
    cache = model.new_cache() if cache is None else cache
    out, at = [], 0
    for i in range(len(tokens)):
        n = sizes[i % len(sizes)]
        out.append(model.forward(tokens[at : at + n], cache, all_logits=True))
        at += n
        if at >= len(tokens):
            break
    return np.concatenate(out)


def same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def exit_code(pid: int, seconds: float) -> int | None:
    """How a child ended; None for one that hangs, which is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def check_tokens_beside_the_best(m: Any) -> None:
    """`also=`: the k best of the other tokens, and the logits of those, for one row, all rows and a batch."""
    rng = np.random.default_rng(0)
    prompt = random_tokens(6, 1)
    logits = m.forward(prompt, m.new_cache(), all_logits=True)
    vocab = logits.shape[1]
    for count, k in ((0, 3), (1, 1), (7, 5), (100, 40), (vocab - 1, 1)):
        also = np.sort(rng.permutation(vocab)[:count]).astype(np.int32)
        others = np.setdiff1d(np.arange(vocab), also)
        ids, values, beside = m.forward(prompt, m.new_cache(), all_logits=True, top_k=k, also=also)
        assert ids.shape == values.shape == (6, k) and beside.shape == (6, count)
        for row in range(6):
            best = others[np.lexsort((others, -logits[row][others]))[:k]]
            assert ids[row].tolist() == best.tolist()
            assert same(values[row], logits[row][best]) and same(beside[row], logits[row][also])
        last = m.forward(prompt, m.new_cache(), top_k=k, also=also)
        assert same(last[0], ids[5]) and same(last[1], values[5]) and same(last[2], beside[5])
        both = m.forward_batch([prompt, prompt], [m.new_cache(), m.new_cache()], top_k=k, also=also)
        assert same(both[2][1], beside[5]) and same(both[0][0], ids[5])
