"""The last prompt's cache serves the next one as far as both begin alike: the same tokens as without, and less to read."""

from __future__ import annotations

import gc
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
    model.reach = reach
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
    model.part = 60
    model.before = lambda _: gemma.cancel()
    first = gemma.generate(LONG, **SETTINGS)
    assert first.finish_reason == "cancelled"
    assert first.timings["prefill_tokens"] == 60
    model.before = None
    assert gemma.generate(LONG, **SETTINGS).tokens == fresh(LONG)
    assert model.read[0] == LONG[60:]


def test_a_failure_leaves_nothing_behind() -> None:
    gemma, model = noisy()
    gemma.generate(LONG, **SETTINGS)

    def fail(batch: Any) -> None:
        if len(model.steps) == 9:  # the fourth step
            raise MemoryError

    model.before = fail
    with pytest.raises(MemoryError):
        gemma.generate(LONG, **SETTINGS)
    model.read.clear()
    assert gemma.generate(LONG, **SETTINGS).tokens == fresh(LONG)
    assert model.read[0] == LONG


def test_sliding_layers_that_do_not_reach_back() -> None:
    gemma, model = noisy(reach=2)
    gemma.generate(LONG, **SETTINGS)
    model.read.clear()
    assert gemma.generate(LONG, **SETTINGS).tokens == fresh(LONG)
    assert model.read[0] == LONG


def test_drop_cache_and_close_give_the_memory_back() -> None:
    gemma, model = noisy()
    for end in (gemma.drop_cache, gemma.close):
        gemma.generate(LONG, **SETTINGS)
        assert model.alive() == 1
        end()
        assert model.alive() == 0


def test_only_one_is_kept() -> None:
    gemma, model = noisy()
    gemma.generate([LONG, [BOS, 5], [BOS, 6]], **SETTINGS)
    assert model.alive() == 1


def test_where_splitting_a_prompt_may_change_its_bits_it_is_read_whole() -> None:
    model = Model(noise)
    model.device = "cuda:0"
    for deterministic in (False, True):
        gemma = fake_native.gemma(model, deterministic=deterministic)
        gemma.generate(LONG, **SETTINGS)
        model.read.clear()
        gemma.generate(LONG, **SETTINGS)
        assert model.read[0] == (LONG[-1:] if deterministic else LONG)


def test_on_a_gpu_there_is_never_a_second_cache_that_nobody_uses() -> None:
    """Its memory is taken at once: a kept one that is too small goes before the next is made."""
    model = Model(noise)
    model.device = "cuda:0"
    gemma = fake_native.gemma(model, deterministic=True)
    make = model.new_cache

    def new_cache(capacity: int | None = None) -> Any:
        assert model.alive() == 0
        return make(capacity)

    model.new_cache = new_cache  # type: ignore[method-assign]
    gemma.generate(LONG, **SETTINGS)
    assert gemma.generate([*LONG, 7], **SETTINGS).tokens == fresh([*LONG, 7])
    gemma.score(LONG)
    assert len(model.caches) == 3


def test_of_a_list_the_prompt_that_shares_most_takes_it() -> None:
    gemma, model = noisy()
    gemma.generate(LONG, **SETTINGS)
    model.read.clear()
    outs = gemma.generate([[BOS, 9], [*LONG, 4]], **SETTINGS)
    assert sorted(len(read) for read in model.read[:2]) == [1, 2]
    assert [o.tokens for o in outs] == [fresh([BOS, 9]), fresh([*LONG, 4])]


def test_closed_while_a_call_ends() -> None:
    gemma, model = noisy()
    model.before = lambda _: gemma.close() if len(model.steps) == 3 else None
    gemma.generate(LONG, **SETTINGS)
    assert not gemma._kept


def test_cancelled_while_another_call_is_waited_for() -> None:
    gemma, model = noisy()
    gemma.generate(LONG, **SETTINGS)
    stream = gemma.stream(LONG[:50], **SETTINGS)
    stream.cancel()
    assert list(stream) == []
    assert stream.result is not None
    assert stream.result.finish_reason == "cancelled"
    assert gemma.generate(LONG, **SETTINGS).tokens == fresh(LONG)


@given(
    st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(20, 22), max_size=4)), max_size=6), st.integers(0, 9)
)
def test_any_prompts_in_turn(calls: list[tuple[int, list[int]]], reach: int) -> None:
    gemma, _ = noisy(reach)
    for shared, rest in calls:
        prompt = [*LONG[: 1 + shared], *rest]
        assert gemma.generate(prompt, **SETTINGS).tokens == fresh(prompt)
