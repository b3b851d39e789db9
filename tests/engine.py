"""What tests of the engine share: building models of tiny checkpoints, and the weights that a model holds as float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import reference

from gemma_native import _native
from gemma_native.config import Config
from gemma_native.weights import Checkpoint

CONTEXT = 2048  # of every tiny checkpoint
RING = 576  # positions that a sliding layer of a tiny checkpoint holds: a window below 64, and 512, in blocks of 64


def build(checkpoint: Checkpoint, **options: Any) -> Any:
    """A Model of a checkpoint; options as Model takes them."""
    return _native.Model(checkpoint.config, checkpoint.tensors, **options)


def held(model: Any) -> tuple[Config, dict[str, np.ndarray]]:
    """Config and float32 weights, exactly as the model holds them. Norms have their offset added already."""
    weights = {}
    for name, (dtype, shape, data) in model.packed().items():
        if dtype.startswith("TILED:"):
            weights[name] = _native.testing.dequantize(dtype, data, *shape)
        else:
            weights[name] = reference.to_float32(dtype, shape, data)
    return dataclasses.replace(model.config, norm_offset=0.0), weights


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
