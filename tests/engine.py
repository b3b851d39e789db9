"""What tests of the engine share: building models of tiny checkpoints, and their logits."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma_native import _native
from gemma_native.weights import Checkpoint


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
