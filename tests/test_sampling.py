"""Every sampling setting: its effect, its errors; and that the short way (the k best logits) chooses as the long one does."""

from __future__ import annotations

import pickle
import time
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_native.sampling import Sampler, SamplingParams, make_params, token_logprob

LOGITS = np.log(np.array([0.4, 0.1, 0.3, 0.15, 0.05], np.float32))
DRAWS = 3000


def draw(logits: np.ndarray = LOGITS, n: int = DRAWS, **settings: Any) -> dict[int, float]:
    """Frequencies of the first token over n seeds."""
    counts = Counter(Sampler(SamplingParams(seed=seed, **settings), []).choose(logits) for seed in range(n))
    return {token: count / n for token, count in sorted(counts.items())}


def expect(found: dict[int, float], wanted: dict[int, float], n: int = DRAWS) -> None:
    """Frequencies within five standard deviations; nothing else is ever drawn."""
    assert set(found) <= set(wanted)
    for token, p in wanted.items():
        assert abs(found.get(token, 0) - p) <= 5 * (p * (1 - p) / n) ** 0.5, (token, found, wanted)


def tokens(
    count: int, logits: np.ndarray = LOGITS, prompt: list[int] | None = None, index: int = 0, **settings: Any
) -> list[int]:
    sampler = Sampler(SamplingParams(**settings), prompt or [], index)
    return [sampler.choose(logits) for _ in range(count)]


# --- effects ---


def test_the_defaults_sample_from_the_model_itself() -> None:
    expect(draw(), dict(enumerate([0.4, 0.1, 0.3, 0.15, 0.05])))


def test_temperature() -> None:
    squares = np.array([0.4, 0.1, 0.3, 0.15, 0.05]) ** 2
    expect(draw(temperature=0.5), dict(enumerate(squares / squares.sum())))
    assert draw(temperature=0, n=20) == {0: 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(temperature=1e-310, n=20) == {0: 1.0}  # no overflow on the way to 0
        assert len(draw(temperature=1e30, n=200)) == 5


def test_top_k() -> None:
    expect(draw(top_k=2), {0: 4 / 7, 2: 3 / 7})
    expect(draw(top_k=1, n=50), {0: 1.0})
    expect(draw(top_k=100), dict(enumerate([0.4, 0.1, 0.3, 0.15, 0.05])))


def test_top_p() -> None:
    expect(draw(top_p=0.69), {0: 4 / 7, 2: 3 / 7})
    expect(draw(top_p=0.71), {0: 0.4 / 0.85, 2: 0.3 / 0.85, 3: 0.15 / 0.85})
    expect(draw(top_p=1e-9, n=50), {0: 1.0})
    # After top_k, of what is left: 4/7 alone reaches 0.5.
    expect(draw(top_k=2, top_p=0.5, n=50), {0: 1.0})
    # After temperature: squares are .16 .01 .09 .0225 .0025 of .285, and the first two make 0.877.
    expect(draw(temperature=0.5, top_p=0.87), {0: 16 / 25, 2: 9 / 25})


def test_min_p() -> None:
    expect(draw(min_p=0.3), {0: 0.4 / 0.85, 2: 0.3 / 0.85, 3: 0.15 / 0.85})
    expect(draw(min_p=1.0, n=50), {0: 1.0})
    expect(draw(temperature=0.5, min_p=0.3), {0: 16 / 25, 2: 9 / 25})  # after temperature
    expect(draw(top_p=0.71, min_p=0.5), {0: 4 / 7, 2: 3 / 7})
    expect(draw(top_k=3, min_p=0.5), {0: 4 / 7, 2: 3 / 7})


def test_min_p_keeps_every_equal_of_the_best() -> None:
    expect(draw(np.zeros(4, np.float32), min_p=1.0), dict.fromkeys(range(4), 0.25))


def test_logit_bias() -> None:
    expect(
        draw(logit_bias={0: -np.inf, 1: float(np.log(3))}), {1: 0.3 / 0.8, 2: 0.3 / 0.8, 3: 0.15 / 0.8, 4: 0.05 / 0.8}
    )
    assert tokens(1, temperature=0, logit_bias={4: 50}) == [4]
    assert tokens(1, temperature=0, top_k=1, logit_bias={0: -50}) == [2]
    # On the raw logits, so before a penalty divides: (1 + 2) / 2 beats 1.4; 1 / 2 + 2 would also, but (1 + 0.9) / 2 does not.
    row = np.array([1.0, 1.4], np.float32)
    assert tokens(1, row, [0], temperature=0, repetition_penalty=2.0, logit_bias={0: 2.0}) == [0]
    assert tokens(1, row, [0], temperature=0, repetition_penalty=2.0, logit_bias={0: 0.95}) == [1]


def test_repetition_penalty() -> None:
    row = np.array([3.0, 2.0, -1.0], np.float32)
    assert tokens(3, row, temperature=0, repetition_penalty=2.0) == [0, 1, 0]  # 3, 2 -> 1.5, 2 -> 1.5, 1
    assert tokens(1, row, prompt=[0], temperature=0, repetition_penalty=2.0) == [1]  # the prompt counts
    low = np.array([-1.0, -1.5, -9.0], np.float32)
    assert tokens(2, low, temperature=0, repetition_penalty=2.0) == [0, 1]  # negative logits are multiplied
    assert tokens(2, np.array([2.0, 1.5], np.float32), prompt=[1], temperature=0, repetition_penalty=0.5) == [1, 1]


def test_presence_penalty() -> None:
    row = np.array([3.0, 2.0, 1.9], np.float32)
    assert tokens(4, row, temperature=0, presence_penalty=1.5) == [0, 1, 2, 0]  # once each, however often
    assert tokens(1, row, prompt=[0, 0], temperature=0, presence_penalty=1.5) == [0]  # the prompt does not count
    assert tokens(2, row, temperature=0, presence_penalty=-2) == [0, 0]


def test_frequency_penalty() -> None:
    row = np.array([3.0, 2.0, -9.0], np.float32)
    assert tokens(6, row, temperature=0, frequency_penalty=0.6) == [0, 0, 1, 0, 1, 0]
    assert tokens(1, row, prompt=[0] * 9, temperature=0, frequency_penalty=0.6) == [0]


def test_seed() -> None:
    row = np.zeros(1000, np.float32)
    a = tokens(8, row, seed=1)
    assert a == tokens(8, row, seed=1)
    assert a != tokens(8, row, seed=2)
    assert tokens(8, row) != tokens(8, row)  # no seed: another text each time
    assert tokens(8, row, seed=2**64 - 1) == tokens(8, row, seed=2**64 - 1)


def test_each_of_n_has_its_own_generator() -> None:
    row = np.zeros(1000, np.float32)
    found = [tokens(8, row, index=i, seed=1) for i in range(4)]
    assert len({tuple(t) for t in found}) == 4
    assert found[0] == tokens(8, row, seed=1)


@pytest.mark.parametrize("first", [{}, {"top_k": 1}, {"top_k": 3}, {"top_p": 0.1}, {"min_p": 1.0}])
def test_one_uniform_number_a_token(first: dict[str, Any]) -> None:
    """However the first token was chosen, the second comes from the same place of the generator."""
    even = np.zeros(1000, np.float32)
    expected = tokens(2, even, seed=5)[1]
    sampler = Sampler(SamplingParams(seed=5, **first), [])
    sampler.choose(LOGITS)
    sampler.params = SamplingParams(seed=5)
    assert sampler.choose(even) == expected


def test_logprobs() -> None:
    entry = token_logprob(LOGITS * 1.0 + 7, 3, 2)
    assert entry.token == 3
    assert entry.logprob == pytest.approx(np.log(0.15), abs=1e-5)
    assert [t for t, _ in entry.top] == [0, 2]
    assert [v for _, v in entry.top] == pytest.approx(list(np.log([0.4, 0.3])), abs=1e-5)
    assert token_logprob(LOGITS, 1, 0).top == []
    assert len(token_logprob(LOGITS, 1, 99).top) == 5


# --- ties, extremes ---


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"top_k": 1}, {"top_p": 0.01}])
def test_ties_go_to_the_lower_id(settings: dict[str, Any]) -> None:
    row = np.zeros(3000, np.float32)
    row[[1700, 40, 2999]] = 5
    assert tokens(5, row, **settings) == [40] * 5
    sampler = Sampler(SamplingParams(top_k=2), [])
    assert {sampler.choose(row) for _ in range(100)} == {40, 1700}


@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_logits_are_an_error(settings: dict[str, Any], value: float) -> None:
    row = LOGITS.copy()
    row[2] = value
    with pytest.raises(ValueError, match="broken|finite"):
        tokens(1, row, **settings)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}])
def test_a_ban_on_everything_is_an_error(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="logit_bias"):
        tokens(1, logit_bias=dict.fromkeys(range(5), -np.inf), **settings)


def test_the_logits_are_left_alone() -> None:
    row = LOGITS.copy()
    tokens(
        3,
        row,
        prompt=[1],
        logit_bias={0: 1.0},
        repetition_penalty=1.5,
        presence_penalty=1,
        frequency_penalty=1,
        top_p=0.9,
        min_p=0.1,
    )
    assert np.array_equal(row, LOGITS)


# --- the short way ---


def best(row: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.argsort(-row, kind="stable")[:k].astype(np.int32)
    return ids, row[ids]


@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 2, 5, 40, 1000, 1500]),
    st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    st.sampled_from([0.3, 0.9, 1.0]),
    st.sampled_from([0.0, 0.05]),
    st.booleans(),
)
def test_the_k_best_are_enough(seed: int, k: int, temperature: float, top_p: float, min_p: float, ties: bool) -> None:
    params = SamplingParams(temperature=temperature, top_k=k, top_p=top_p, min_p=min_p, seed=seed)
    short, whole = Sampler(params, [7]), Sampler(params, [7])
    rng = np.random.default_rng(seed)
    for size in (1200, 50):  # one vocabulary smaller than some k
        for _ in range(4):
            row = rng.normal(0, 2, size).astype(np.float32)
            if ties:
                row = np.round(row)
            if params.best_needed:
                assert short.choose_from(*best(row, min(params.best_needed, size))) == whole.choose(row)


def test_when_the_k_best_are_enough() -> None:
    assert SamplingParams(temperature=0).best_needed == 1
    assert SamplingParams(top_k=40).best_needed == 40
    assert SamplingParams(top_k=40, top_p=0.5, min_p=0.1, temperature=2.0, seed=1).best_needed == 40
    assert SamplingParams(top_k=40, repetition_penalty=1.1).best_needed == 40
    for settings in ({}, {"top_p": 0.5}, {"temperature": 0, "logprobs": 0}):
        assert SamplingParams(**settings).best_needed == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"logit_bias": {3: 2.5, 40: -float("inf"), 7: -1.0}},
        {"repetition_penalty": 1.4},
        {"presence_penalty": 0.7, "frequency_penalty": -0.2},
        {"logit_bias": {5: 1.0}, "repetition_penalty": 0.8, "frequency_penalty": 0.5, "top_p": 0.9, "min_p": 0.05},
    ],
)
@pytest.mark.parametrize("mode", [{"temperature": 0}, {"temperature": 0.9, "top_k": 6, "seed": 4}])
def test_changed_logits_beside_the_best(settings: dict[str, Any], mode: dict[str, Any]) -> None:
    """From the k best of the other tokens and those that are changed: the choice from all logits."""
    rng = np.random.default_rng(1)
    params = SamplingParams(**settings, **mode)
    whole, parts = Sampler(params, [3, 9, 9, 20]), Sampler(params, [3, 9, 9, 20])
    for _ in range(200):
        logits = np.round(rng.normal(0, 2, 64), 1).astype(np.float32)  # with ties
        also = np.union1d(parts.changed(64), rng.integers(0, 64, 3)).astype(np.int32)  # others may be listed as well
        others = np.setdiff1d(np.arange(64), also).astype(np.int32)
        ids = others[np.lexsort((others, -logits[others]))[: params.best_needed + 2]]
        assert whole.choose(logits) == parts.choose_from(ids, logits[ids], also, logits[also])
    nan = np.array([np.nan], np.float32)
    with pytest.raises(ValueError, match="nan"):
        parts.choose_from(ids, logits[ids], also[:1], nan)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        Sampler(SamplingParams(logit_bias={64: 1.0}), []).changed(64)


@pytest.mark.parametrize(
    ("settings", "second"),
    [
        ({"logit_bias": {40: 1e39}}, 40),
        ({"logit_bias": {0: 1e39, 40: 1e300}}, 0),
        ({"logit_bias": {40: -1e39}}, 0),
        ({"presence_penalty": -1e39}, 40),
        ({"presence_penalty": 1e39}, 0),
        ({"frequency_penalty": -1e300}, 40),
        ({"repetition_penalty": 1e-46}, 40),
        ({"repetition_penalty": 1e50}, 40),
        ({"repetition_penalty": 1e-46, "presence_penalty": 1e300, "frequency_penalty": 1e300}, 0),
    ],
)
def test_settings_larger_than_a_logit_can_be(settings: dict[str, Any], second: int) -> None:
    """They go as far as they can, without a warning, and nobody takes the model's weights for broken."""
    row = np.zeros(64, np.float32)
    row[40] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokens(4, row, temperature=0, **settings)[1] == second
    row[3] = np.inf
    with pytest.raises(ValueError, match="broken"):
        tokens(1, row, [3], temperature=0, **settings)


# --- wrong values ---

RANGES: dict[str, tuple[list[Any], list[Any], list[Any]]] = {  # good, out of range, of the wrong type
    "max_tokens": ([1, 10**6, np.int32(3)], [0, -1], [1.5, "1", True]),
    "temperature": ([0, 0.0, 2.5, np.float32(0.5)], [-0.1, float("nan"), float("inf")], ["1", None, True]),
    "top_k": ([0, 1, 10**9], [-1], [0.5, "1", True]),
    "top_p": ([1, 0.01], [0, -0.1, 1.01, float("nan")], ["1", None, True]),
    "min_p": ([0, 1, 0.5], [-0.1, 1.01, float("nan")], ["1", None, True]),
    "repetition_penalty": ([0.5, 2], [0, -1, float("inf"), float("nan")], ["1", None, True]),
    "presence_penalty": ([-2, 0, 2], [float("inf"), float("nan"), 10**400], ["1", None, True, 1j, np.complex128(1)]),
    "frequency_penalty": ([-2, 0, 2], [float("inf"), float("nan")], ["1", None, True]),
    "logit_bias": (
        [{}, {1: 2.0}, {np.int64(1): -np.inf}, {1: -(10**400)}],
        [{-1: 1.0}, {1: float("nan")}, {1: 10**400}, {1: 1j}],
        [[1], "x"],
    ),
    "seed": ([None, 0, 2**64 - 1], [-1], [1.5, "1", True]),
    "stop": (["a", ["a", "b"], (), []], ["", ["a", ""]], [None, 5]),
    "stop_tokens": ([[], [0, 5], (np.int64(3),)], [[-1]], [None, 5]),
    "ignore_eos": ([True, False], [], [1, "yes", None]),
    "speculate": ([True, False], [], [1, "yes", None]),
    "logprobs": ([None, 0, 5], [-1], [1.5, "1", True]),
    "n": ([1, 4], [0, -1], [1.5, "1", True]),
}


@pytest.mark.parametrize("name", RANGES)
def test_values_out_of_range(name: str) -> None:
    good, out, wrong = RANGES[name]
    for value in good:
        SamplingParams(**{name: value})
    for value in out:
        with pytest.raises(ValueError, match=name):
            SamplingParams(**{name: value})
    for value in wrong:
        with pytest.raises(TypeError, match=name):
            SamplingParams(**{name: value})


def test_every_setting_is_in_the_table() -> None:
    assert set(RANGES) == set(SamplingParams.__dataclass_fields__)


def test_settings_over_params() -> None:
    params = SamplingParams(top_k=5, seed=1)
    assert make_params(params, {"top_k": 7}) == SamplingParams(top_k=7, seed=1)
    assert make_params(None, {}) == SamplingParams()
    assert params.top_k == 5
    with pytest.raises(TypeError, match="temperature"):
        make_params(None, {"temprature": 1})
    with pytest.raises(TypeError, match="did you mean max_tokens"):
        make_params(None, {"max_new_tokens": 1})
    with pytest.raises(TypeError, match="xyz"):
        make_params(None, {"xyz": 1})
    with pytest.raises(TypeError, match="SamplingParams"):
        make_params({"top_k": 3}, {})  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(params)) == params


def test_a_token_of_a_large_vocabulary_is_chosen_quickly() -> None:
    row = np.random.default_rng(0).normal(0, 3, 262144).astype(np.float32)
    for settings in ({"temperature": 0}, {}, {"top_k": 64, "top_p": 0.95}, {"top_p": 0.95}, {"min_p": 0.05}):
        sampler = Sampler(SamplingParams(seed=1, **settings), [])
        sampler.choose(row)
        started = time.process_time()
        for _ in range(5):
            sampler.choose(row)
        assert (time.process_time() - started) / 5 < 0.2, settings  # a few ms; a Python loop would take longer
