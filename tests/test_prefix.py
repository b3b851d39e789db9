"""The last prompt's cache serves the next one as far as both begin alike: the same tokens as without, and less to read."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import fake_native
import pytest
from fake_native import BOS, Model, noise
from hypothesis import given
from hypothesis import strategies as st

from gemma_native import Gemma

LONG = [BOS, *range(20, 120)]
SETTINGS: dict[str, Any] = {"max_tokens": 5, "seed": 3, "ignore_eos": True}


def noisy(reach: int = 512) -> tuple[Gemma, Model]:
    model = Model(noise)
    make = model.new_cache
    model.new_cache = lambda capacity=None: vars(cache := make(capacity)).update(reach=reach) or cache  # type: ignore[method-assign,func-returns-value]
    return fake_native.gemma(model), model


def fresh(prompt: Any, **settings: Any) -> list[int]:
    return noisy()[0].generate(prompt, **SETTINGS | settings).tokens


def test_a_prompt_is_read_from_where_it_differs() -> None:
    gemma, model = noisy()
    first = gemma.generate([*LONG, 130, 131], **SETTINGS)
    assert first.timings["prefill_tokens"] == 103
    model.read.clear()
    second = gemma.generate([*LONG, 140, 141, 142], **SETTINGS)
    assert model.read[0] == [140, 141, 142]
    assert second.timings["prefill_tokens"] == 3
    assert second.prompt_tokens == 104
    assert second.tokens == fresh([*LONG, 140, 141, 142])


def test_the_same_prompt_again() -> None:
    gemma, model = noisy()
    first = gemma.generate(LONG, **SETTINGS)
    model.read.clear()
    assert gemma.generate(LONG, **SETTINGS).tokens == first.tokens
    assert model.read[0] == LONG[-1:]


def test_what_was_generated_counts_too() -> None:
    gemma, model = noisy()
    first = gemma.generate(LONG, **SETTINGS)
    further = [*LONG, *first.tokens, 130]
    model.read.clear()
    assert gemma.generate(further, **SETTINGS).tokens == fresh(further)
    assert model.read[0] == further[-2:]  # the last token generated was never read


def test_a_batch_and_several_answers() -> None:
    gemma, _ = noisy()
    gemma.generate(LONG, **SETTINGS)
    prompts = [[*LONG[:50], 7], LONG, [BOS, 30]]
    grouped = gemma.generate(prompts, n=2, **SETTINGS)
    for prompt, group in zip(prompts, grouped, strict=True):
        assert [o.tokens for o in group] == [o.tokens for o in noisy()[0].generate(prompt, n=2, **SETTINGS)]


@pytest.mark.parametrize("how", ["close", "cancel", "break"])
def test_a_stream_left_early(how: str) -> None:
    gemma, model = noisy()
    stream = gemma.stream(LONG, **SETTINGS)
    next(stream)
    if how == "close":
        stream.close()
    elif how == "cancel":
        stream.cancel()
        list(stream)
    else:
        del stream
        gc.collect()
    model.read.clear()
    assert gemma.generate([*LONG, 9], **SETTINGS).tokens == fresh([*LONG, 9])
    assert len(model.read[0]) == (102 if how == "break" else 1)


def test_cancelled_within_the_prompt() -> None:
    gemma, model = noisy()
    model.before = lambda _: gemma.cancel()
    assert gemma.generate(LONG, **SETTINGS).finish_reason == "cancelled"
    model.before = None
    assert gemma.generate(LONG, **SETTINGS).tokens == fresh(LONG)


def test_a_failure_leaves_nothing_behind() -> None:
    gemma, model = noisy()
    gemma.generate(LONG, **SETTINGS)

    def fail(batch: Any) -> None:
        raise MemoryError

    model.before = fail
    with pytest.raises(MemoryError):
        gemma.generate(LONG, **SETTINGS)
    model.before = None
    assert gemma.generate(LONG, **SETTINGS).tokens == fresh(LONG)


def test_sliding_layers_that_do_not_reach_back() -> None:
    gemma, model = noisy(reach=2)
    gemma.generate(LONG, **SETTINGS)
    model.read.clear()
    assert gemma.generate(LONG, **SETTINGS).tokens == fresh(LONG)
    assert model.read[0] == LONG


def test_reset_and_close_give_the_memory_back() -> None:
    gemma, model = noisy()
    caches: list[Any] = []
    make = model.new_cache
    model.new_cache = lambda capacity=None: caches.append(weakref.ref(cache := make(capacity))) or cache  # type: ignore[method-assign,func-returns-value]
    for end in (gemma.reset, gemma.close):
        gemma.generate(LONG, **SETTINGS)
        assert caches[-1]() is not None
        end()
        assert caches[-1]() is None


def test_only_one_is_kept() -> None:
    gemma, model = noisy()
    caches: list[Any] = []
    make = model.new_cache
    model.new_cache = lambda capacity=None: caches.append(weakref.ref(cache := make(capacity))) or cache  # type: ignore[method-assign,func-returns-value]
    gemma.generate([LONG, [BOS, 5], [BOS, 6]], **SETTINGS)
    assert sum(cache() is not None for cache in caches) == 1


def test_where_splitting_a_prompt_may_change_its_bits_it_is_read_whole() -> None:
    model = Model(noise)
    model.device = "cuda:0"
    gemma = fake_native.gemma(model)
    gemma.generate(LONG, **SETTINGS)
    model.read.clear()
    gemma.generate(LONG, **SETTINGS)
    assert model.read[0] == LONG


@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(20, 22), max_size=4)), max_size=6), st.integers(0, 9)
)
def test_any_prompts_in_turn(calls: list[tuple[int, list[int]]], reach: int) -> None:
    gemma, _ = noisy(reach)
    for shared, rest in calls:
        prompt = [*LONG[: 1 + shared], *rest]
        assert gemma.generate(prompt, **SETTINGS).tokens == fresh(prompt)
