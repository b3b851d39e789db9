"""The specification against Hugging Face transformers in float32 (golden/*.npz, written by make_golden.py)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import reference
import tiny
from make_golden import GOLDEN, SEED

from gemma_native.weights import open_checkpoint


@pytest.mark.parametrize("dialect", [4, 5])
@pytest.mark.parametrize("case", tiny.CASES)
def test_reference_equals_transformers(case: str, dialect: int, tmp_path: Path) -> None:
    golden = np.load(GOLDEN / f"{case}.npz")
    checkpoint = open_checkpoint(tiny.write_hf(tmp_path, case, SEED, dialect=dialect, shards=1 if dialect == 5 else 3))
    weights = reference.weights_of(checkpoint.tensors)
    logits = reference.forward(checkpoint.config, weights, golden["tokens"])
    assert reference.nse(logits, golden["logits"]) <= 1e-10
    # The prompt is longer than the window, so that the mask is part of the comparison.
    assert checkpoint.config.sliding_window < len(golden["tokens"])

    tokens = np.concatenate([golden["tokens"], golden["greedy"]])
    after = reference.forward(checkpoint.config, weights, tokens[:-1])[len(golden["tokens"]) - 1 :]
    np.testing.assert_array_equal(after.argmax(-1), golden["greedy"])


@pytest.mark.parametrize("case", tiny.CASES)
def test_tiny_checkpoints_are_not_degenerate(case: str, tmp_path: Path) -> None:
    """What the other tests rest on: each part of the model moves these logits by far more than any tolerance."""
    golden = np.load(GOLDEN / f"{case}.npz")
    checkpoint = open_checkpoint(tiny.write_hf(tmp_path, case, SEED))
    config, weights = checkpoint.config, reference.weights_of(checkpoint.tensors)
    logits = golden["logits"]
    assert 1.5 < logits.std() < 5

    def moved(**changes: object) -> float:
        other = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
        return reference.nse(reference.forward(other, weights, golden["tokens"]), logits)

    assert moved(query_scale=config.query_scale * 1.5) > 3e-3
    assert moved(rope_base=100.0) > 3e-3
    assert moved(norm_offset=0.9) > 3e-3
    if config.sliding_window:
        assert moved(sliding_window=config.sliding_window + 1) > 3e-3
        assert moved(sliding_layers=tuple(not s for s in config.sliding_layers)) > 3e-3
    if config.attn_softcap:
        assert moved(attn_softcap=config.attn_softcap * 1.5) > 3e-3
        assert moved(final_softcap=config.final_softcap * 2) > 3e-3
    if config.rope_scale != 1:
        assert moved(rope_scale=1.0) > 3e-3
    if config.qk_norm:
        assert moved(rope_base_local=100.0) > 3e-3
