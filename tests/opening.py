"""What tests of opening checkpoints share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_native import _native
from gemma_native.checkpoint import Checkpoint
from gemma_native.errors import FormatError
from gemma_native.weights import open_checkpoint

CASE: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "pattern": 2,
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def refused(source: Path, *named: str, at: Path | None = None) -> None:
    """Opening is a FormatError that begins with the file's name and holds what `named` says."""
    with pytest.raises(FormatError) as error:
        open_checkpoint(source)
    message = str(error.value)
    assert message.startswith(f"{at or source}"), message
    for part in named:
        assert part in message, message
    assert "\n" not in message and len(message) < 1000, message


def arrays(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: data.tobytes() for name, (_, _, data) in checkpoint.tensors.items()}


def logits(checkpoint: Checkpoint, **options: Any) -> np.ndarray:
    model = _native.Model(checkpoint.config, checkpoint.tensors, threads=1, kv="f32", **options)
    return model.forward([2, 5, 9, 33, 63], model.new_cache(64), all_logits=True)
