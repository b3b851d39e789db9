"""Gemma's calls around a stand-in model (fake_native) whose tokens the tests dictate."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import fake_native
import numpy as np
import pytest
from fake_native import BOS, CONTEXT, END, EOS, VOCAB, Model, in_thread, noise, script
from hypothesis import given
from hypothesis import strategies as st

from gemma_native import Gemma, SamplingParams
from gemma_native.gemma import Score

WORDS = fake_native.tokenizer()


def ids(text: str) -> list[int]:
    return WORDS.encode(text, bos=False)


def saying(tokens: list[int] | str, prompt: int = 1, **options: Any) -> Gemma:
    """A Gemma that says these tokens after a prompt of so many tokens, then <eos>."""
    return fake_native.gemma(Model(script(prompt, ids(tokens) if isinstance(tokens, str) else tokens)), **options)


def noisy(**options: Any) -> tuple[Gemma, Model]:
    model = Model(noise)
    return fake_native.gemma(model, **options), model


# --- results ---


def test_a_text_is_continued_after_one_bos() -> None:
    model = Model(script(2, ids(" world!")))
    out = fake_native.gemma(model).generate("hello", temperature=0)
    assert model.read[0] == [BOS, WORDS.id("hello")]
    assert out.text == str(out) == " world!"
    assert out.tokens == ids(" world!")
    assert (out.finish_reason, out.prompt_tokens, out.logprobs) == ("stop", 2, None)
    assert model.read[1:] == [[t] for t in out.tokens]


def test_the_empty_text_is_bos_alone() -> None:
    model = Model(script(1, ids("a")))
    assert fake_native.gemma(model).generate("", temperature=0).text == "a"
    assert model.read[0] == [BOS]


def test_typed_control_strings_stay_text() -> None:
    model = Model(noise)
    fake_native.gemma(model).generate("<bos><start_of_turn>", max_tokens=1)
    assert model.read[0][0] == BOS
    assert not any(WORDS.is_control(t) for t in model.read[0][1:])


def test_timings() -> None:
    gemma = fake_native.gemma(Model(noise, before=lambda _: time.sleep(0.002)))
    t = gemma.generate("hello", max_tokens=5).timings
    assert t["prefill_s"] >= 0.002
    assert t["decode_s"] >= 0.008
    assert t["prefill_tokens_per_s"] == pytest.approx(2 / t["prefill_s"])
    assert t["decode_tokens_per_s"] == pytest.approx(4 / t["decode_s"])


def test_token_ids_are_used_as_given() -> None:
    for prompt in ([7, 20, 300], (7, 20, 300), np.array([7, 20, 300]), np.array([7, 20, 300], np.uint16)):
        gemma, model = noisy()
        out = gemma.generate(prompt, max_tokens=2)  # type: ignore[arg-type]
        assert model.read[0] == [7, 20, 300]
        assert out.prompt_tokens == 3


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([VOCAB], ValueError, str(VOCAB)),
        ([-1], ValueError, "-1"),
        ([5, 2**40], ValueError, "rows"),
        ([1.5], TypeError, "integer"),
        ([True], TypeError, "integer"),
        ([1, "a"], TypeError, "integer"),
        (b"bytes", TypeError, "bytes"),
        ({1: 2}, TypeError, "dict"),
        (None, TypeError, "None"),
        (7, TypeError, "int"),
        ([[5], []], ValueError, "no tokens"),
        ([], ValueError, "at least one prompt"),
        ([5] * (CONTEXT + 1), ValueError, f"{CONTEXT + 1} tokens"),
        ("a!" * CONTEXT, ValueError, "context"),
    ],
)
def test_prompts_that_are_none(prompt: Any, error: type[Exception], message: str) -> None:
    gemma, model = noisy()
    with pytest.raises(error, match=message):
        gemma.generate(prompt)
    assert not model.steps


# --- when it ends ---


def test_max_tokens() -> None:
    gemma, model = noisy()
    out = gemma.generate("hello", max_tokens=3)
    assert (len(out.tokens), out.finish_reason) == (3, "length")
    assert len(model.steps) == 3  # nothing is computed past the last token
    assert len(gemma.generate("hello", ignore_eos=True).tokens) == SamplingParams().max_tokens


def test_a_full_context_ends_with_length() -> None:
    gemma, model = noisy(context=10)
    out = gemma.generate([BOS] * 4, max_tokens=100, ignore_eos=True)
    assert (len(out.tokens), out.finish_reason) == (7, "length")  # the last one needs no place of its own
    out = gemma.generate([BOS] * 10, max_tokens=100)
    assert (len(out.tokens), out.finish_reason) == (1, "length")
    with pytest.raises(ValueError, match="context of 10"):
        gemma.generate([BOS] * 11)


@pytest.mark.parametrize("end", [EOS, END])
def test_end_tokens(end: int) -> None:
    say = [*ids("a b"), end, *ids("c")]
    out = saying(say).generate("", temperature=0)
    assert (out.text, out.tokens, out.finish_reason) == ("a b", say[:3], "stop")
    out = saying(say).generate("", temperature=0, ignore_eos=True, max_tokens=5)
    assert (out.text, out.tokens, out.finish_reason) == ("a bc", say[:5], "length")


def test_stop_tokens() -> None:
    out = saying("a b c").generate("", temperature=0, stop_tokens=[WORDS.id("b")])
    assert (out.text, out.finish_reason) == ("a ", "stop")
    assert out.tokens == ids("a b c")[:2]
    out = saying("a b c").generate("", temperature=0, stop_tokens=[WORDS.id("b")], ignore_eos=True, max_tokens=9)
    assert out.text == "a "  # asked for by the caller, so ignore_eos does not touch them


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("world", "hello the ", "stop"),
        ("o t", "hell", "stop"),  # spans tokens
        (["world", "the"], "hello ", "stop"),  # the first in the text, not in the list
        (["the w", "he"], "", "stop"),  # of stops that begin later and earlier, the earlier
        (["the wor", "w"], "hello the ", "stop"),  # the first that is complete, also where one token completes both
        ("world!!", "hello the world!", "stop"),  # begun but not finished, so it is given out at the end
        ("absent", "hello the world!", "stop"),
        ("hello the world!", "", "stop"),
    ],
)
def test_stop_strings(stop: Any, text: str, reason: str) -> None:
    gemma = saying("hello the world!")
    out = gemma.generate("", temperature=0, stop=stop)
    assert (out.text, out.finish_reason) == (text, reason)
    assert "".join(gemma.stream("", temperature=0, stop=stop)) == text


def test_cancelled_before_the_prompts_second_answer_starts() -> None:
    def logits(so_far: list[int]) -> np.ndarray:
        gemma.cancel()
        return noise(so_far)

    model = Model(logits)
    gemma = fake_native.gemma(model)
    assert [out.finish_reason for out in gemma.generate("hello", n=2, max_tokens=5)] == ["cancelled", "cancelled"]


def test_a_stop_string_that_the_end_completes() -> None:
    first = WORDS.id("<0xE3>")  # of a character that never comes
    assert first is not None
    out = saying([first, *ids("a")]).generate("", temperature=0, max_tokens=1, stop="\ufffd")
    assert (out.text, out.finish_reason) == ("", "stop")


def test_a_stop_string_saves_the_rest_of_the_work() -> None:
    model = Model(script(1, ids("hello the world!")))
    fake_native.gemma(model).generate("", temperature=0, stop="the")
    assert len(model.steps) == len(ids("hello the"))


@given(st.text("ab🦄 \n", max_size=12), st.lists(st.text("ab🦄 \n", min_size=1, max_size=4), max_size=3))
def test_any_text_is_cut_at_its_first_stop_string(text: str, stops: list[str]) -> None:
    gemma = saying(text)
    # Generation ends with the first stop string that is complete, and the text where the earliest complete one begins.
    complete = [n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)]
    found = [text[: complete[0]].find(stop) for stop in stops if stop in text[: complete[0]]] if complete else []
    stream = gemma.stream("", temperature=0, stop=stops)
    pieces = list(stream)
    assert "".join(pieces) == (text[: min(found)] if found else text)
    assert stream.result is not None
    assert stream.result.text == "".join(pieces)
    assert all(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_at_the_end() -> None:
    out = saying(ids("a🦄")).generate("", temperature=0, max_tokens=3)
    assert out.text == "a\ufffd\ufffd"


# --- batches, n, seeds ---


def test_a_batch_gives_each_prompt_what_it_gets_alone() -> None:
    prompts: list[Any] = ["hello", [BOS, 290, 291], "", "the world", [8]]
    settings: dict[str, Any] = dict(max_tokens=40, top_p=0.9, seed=3)
    alone = [noisy()[0].generate(p, **settings) for p in prompts]
    gemma, model = noisy()
    together = gemma.generate(prompts, **settings)
    assert [o.tokens for o in together] == [o.tokens for o in alone]
    assert [o.text for o in together] == [o.text for o in alone]
    assert [o.finish_reason for o in together] == [o.finish_reason for o in alone]
    assert model.steps[0] == 5
    assert gemma.generate(["hello"], **settings)[0].tokens == alone[0].tokens
    assert gemma.generate(prompts[::-1], **settings)[-1].tokens == alone[0].tokens  # whatever its place


def test_sequences_leave_the_batch_as_they_finish() -> None:
    def logits(so_far: list[int]) -> np.ndarray:
        return script(1, [20] * so_far[0])(so_far)

    model = Model(logits)
    outs = fake_native.gemma(model).generate([[12], [14], [13]], temperature=0, max_tokens=99)
    assert [len(o.tokens) for o in outs] == [12, 14, 13]
    assert model.steps == [3] * 13 + [2, 1]


def test_n() -> None:
    gemma, _ = noisy()
    one = gemma.generate("hello", max_tokens=12, seed=4)
    several = gemma.generate("hello", max_tokens=12, seed=4, n=3)
    assert several[0].tokens == one.tokens
    assert len({tuple(o.tokens) for o in several}) == 3
    grouped = gemma.generate(["hello", "the"], max_tokens=12, seed=4, n=3)
    assert [o.tokens for o in grouped[0]] == [o.tokens for o in several]
    assert len(grouped[1]) == 3


def test_n_reads_the_prompt_once() -> None:
    gemma, model = noisy()
    prompt = [BOS, *range(20, 120)]
    several = gemma.generate(prompt, max_tokens=5, seed=4, n=4, ignore_eos=True)
    assert [len(read) for read in model.read[:1]] == [101]
    assert all(len(read) == 1 for read in model.read[1:])
    alone, _ = noisy()
    assert several[0].tokens == alone.generate(prompt, max_tokens=5, seed=4, ignore_eos=True).tokens
    # Where the first has gone too far for its cache to be cut back, the prompt is read again.
    gemma.drop_cache()
    model.read.clear()
    model.reach = 0
    again = gemma.generate(prompt, max_tokens=5, seed=4, n=4, ignore_eos=True)
    assert [o.tokens for o in again] == [o.tokens for o in several]
    assert [len(read) for read in model.read].count(101) == 4


def test_a_long_list_runs_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[BOS, 20 + i] for i in range(11)]
    whole = [o.tokens for o in noisy()[0].generate(prompts, seed=1, max_tokens=30)]
    threes = [[o.tokens for o in group] for group in noisy()[0].generate(prompts[:3], seed=1, max_tokens=30, n=3)]
    monkeypatch.setattr("gemma_native.gemma.MAX_BATCH", 4)
    for device in ("cuda:0", "cpu"):
        model = Model(noise)
        model.device = device
        gemma = fake_native.gemma(model)
        alive: list[int] = []
        model.before = lambda _, model=model, alive=alive: alive.append(model.alive())  # type: ignore[misc]
        assert [o.tokens for o in gemma.generate(prompts, seed=1, max_tokens=30)] == whole
        assert max(model.steps) == 4
        assert len(model.caches) == 11 if device != "cpu" else len(model.caches) < 11  # those that ended serve again
        assert max(alive) <= 4  # a sequence that ended has given its memory back
    assert [
        [o.tokens for o in group] for group in noisy()[0].generate(prompts[:3], seed=1, max_tokens=30, n=3)
    ] == threes


def test_cancelling_a_long_list_ends_those_that_wait_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gemma_native.gemma.MAX_BATCH", 2)
    gemma, model = noisy()
    model.before = lambda _: gemma.cancel() if len(model.steps) == 3 else None
    outs = gemma.generate(["hello"] * 5, max_tokens=50, ignore_eos=True)
    assert [o.finish_reason for o in outs] == ["cancelled"] * 5
    assert [len(o.tokens) for o in outs] == [2, 2, 0, 0, 0]


def test_seed() -> None:
    gemma, _ = noisy()
    assert gemma.generate("hello", seed=1).tokens == gemma.generate("hello", seed=1).tokens
    assert gemma.generate("hello", seed=1).tokens != gemma.generate("hello", seed=2).tokens
    assert gemma.generate("hello").tokens != gemma.generate("hello").tokens


def test_only_what_is_needed_is_asked_of_the_model() -> None:
    for settings, k in (
        ({"temperature": 0}, 1),
        ({"top_k": 9}, 9),
        ({"top_k": 900}, VOCAB),
        ({}, None),
        ({"top_k": 9, "logprobs": 1}, None),
    ):
        gemma, model = noisy()
        gemma.generate("hello", max_tokens=2, **settings)
        assert model.top_k == [k, k]


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"top_k": 5}, {"top_k": 900}, {"top_k": 20, "top_p": 0.8, "min_p": 0.1, "temperature": 2.0}],
)
def test_logprobs_do_not_change_the_text(settings: dict[str, Any]) -> None:
    gemma, _ = noisy()
    a = gemma.generate("hello", seed=1, max_tokens=30, **settings)
    b = gemma.generate("hello", seed=1, max_tokens=30, logprobs=2, **settings)
    assert a.tokens == b.tokens


def test_logprobs_are_the_raw_models() -> None:
    gemma, _ = noisy()
    out = gemma.generate(
        [BOS], max_tokens=6, seed=1, logprobs=3, temperature=2.0, top_k=50, logit_bias={290: 3.0}, presence_penalty=1.0
    )
    assert out.logprobs is not None
    assert [entry.token for entry in out.logprobs] == out.tokens
    for i, entry in enumerate(out.logprobs):
        row = noise([BOS, *out.tokens[:i]]).astype(np.float64)
        logs = row - np.log(np.exp(row).sum())
        assert entry.logprob == pytest.approx(logs[entry.token], abs=1e-5)
        assert [t for t, _ in entry.top] == list(np.argsort(-logs)[:3])
        assert [v for _, v in entry.top] == pytest.approx(sorted(logs)[::-1][:3], abs=1e-5)


def test_settings_reach_the_sampler() -> None:
    gemma, _ = noisy()
    assert set(gemma.generate("hello", max_tokens=5, temperature=0, logit_bias={290: 90.0}).tokens) == {290}
    tokens = gemma.generate(
        "hello", max_tokens=30, temperature=0, presence_penalty=30.0, logit_bias=dict.fromkeys(range(280, 290), 60.0)
    ).tokens
    assert set(tokens[:10]) == set(range(280, 290))
    row = noise([BOS])
    best = int(row.argmax())
    assert gemma.generate([BOS], temperature=0, max_tokens=1).tokens == [best]
    assert gemma.generate(
        [BOS, best][:1], SamplingParams(temperature=0, max_tokens=1), logit_bias={best: -90.0}
    ).tokens != [best]


def test_wrong_settings() -> None:
    gemma, model = noisy()
    for call in (gemma.generate, gemma.stream, gemma.chat().send, gemma.chat().stream):
        with pytest.raises(TypeError, match="max_tokens"):
            call("hello", max_token=3)
        with pytest.raises(ValueError, match="temperature"):
            call("hello", temperature=-1)
        with pytest.raises(TypeError, match="SamplingParams"):
            call("hello", {"temperature": 1})  # type: ignore[call-overload,arg-type]
    with pytest.raises(ValueError, match="logit_bias"):
        gemma.generate("hello", logit_bias={VOCAB: 1.0})
    assert not model.steps


# --- streams ---


def test_a_stream_gives_the_same_text() -> None:
    gemma, _ = noisy()
    out = gemma.generate("hello", max_tokens=60, seed=2, stop="lo")
    stream = gemma.stream("hello", max_tokens=60, seed=2, stop="lo")
    assert iter(stream) is stream
    assert stream.result is None
    assert "".join(stream) == out.text
    assert stream.result is not None
    assert stream.result.tokens == out.tokens
    assert stream.result.finish_reason == out.finish_reason
    assert list(stream) == []


def test_nothing_is_computed_ahead() -> None:
    gemma, model = noisy()
    stream = gemma.stream("hello", max_tokens=50)
    assert model.steps == []
    next(stream)
    steps = len(model.steps)
    assert steps < 10
    stream.close()
    assert len(model.steps) == steps
    assert stream.result is not None
    assert stream.result.finish_reason == "cancelled"
    assert list(stream) == []
    stream.close()


def test_cancel_ends_the_loop() -> None:
    gemma, _ = noisy()
    for cancel in (lambda s: s.cancel(), lambda s: gemma.cancel()):
        stream = gemma.stream("hello", max_tokens=500, ignore_eos=True)
        pieces = []
        for piece in stream:
            pieces.append(piece)
            if len(pieces) == 5:
                cancel(stream)
        assert stream.result is not None
        assert stream.result.finish_reason == "cancelled"
        assert stream.result.text == "".join(pieces)
        assert len(stream.result.tokens) < 40
    assert gemma.generate("hello", max_tokens=3).finish_reason == "length"


def test_a_stream_has_one_prompt_and_one_answer() -> None:
    gemma, _ = noisy()
    with pytest.raises(ValueError, match="n"):
        gemma.stream("hello", n=2)
    with pytest.raises(TypeError, match="one prompt"):
        gemma.stream(["hello", "the"])  # type: ignore[arg-type]


class Gate:
    """Lets a test stop inside a model step: `entered` is set there, and the step goes on when `flag` or `open` is."""

    def __init__(self, at: int = 1) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.count, self.at = 0, at

    def __call__(self, tokens: Any) -> None:
        self.count += 1
        if self.count == self.at:
            self.entered.set()
            assert self.open.wait(20)


@pytest.mark.parametrize("at", [1, 4])
def test_cancel_from_another_thread(at: int) -> None:
    gate = Gate(at)
    gemma = fake_native.gemma(Model(noise, gate))
    thread, out = in_thread(lambda: gemma.generate(["hello", "the"], max_tokens=100, ignore_eos=True))
    assert gate.entered.wait(20)
    gemma.cancel()
    gate.open.set()
    thread.join(20)
    assert [o.finish_reason for o in out[0]] == ["cancelled"] * 2
    assert [len(o.tokens) for o in out[0]] == [at - 1] * 2
    assert gemma.generate("hello", max_tokens=3).finish_reason == "length"


def test_close_of_a_stream_from_another_thread() -> None:
    gate = Gate(2)
    gemma = fake_native.gemma(Model(noise, gate))
    stream = gemma.stream("hello", max_tokens=100, ignore_eos=True)
    thread, out = in_thread(lambda: list(stream))
    assert gate.entered.wait(20)
    stream.close()
    gate.open.set()
    thread.join(20)
    assert isinstance(out[0], list), out
    assert stream.result is not None
    assert stream.result.finish_reason == "cancelled"


def test_an_interrupt_leaves_everything_usable() -> None:
    count = [0]

    def interrupt(_: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt

    gemma = fake_native.gemma(Model(noise, interrupt))
    with pytest.raises(KeyboardInterrupt):
        gemma.generate("hello", ignore_eos=True)
    count[0] = 0
    stream = gemma.stream("hello", ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert stream.result is not None
    assert stream.result.finish_reason == "cancelled"
    assert list(stream) == []
    assert not gemma._running
    count[0] = 9
    assert gemma.generate("hello", max_tokens=3).finish_reason == "length"


@pytest.mark.parametrize("start", [Gemma.generate, Gemma.stream])
def test_cancel_while_a_prompt_is_tokenised(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gemma, model = noisy()
    encode = gemma.tokenizer.encode
    monkeypatch.setattr(gemma.tokenizer, "encode", lambda *args, **more: (gemma.cancel(), encode(*args, **more))[1])
    out = start(gemma, "hello", max_tokens=5)
    if start is Gemma.stream:
        assert list(out) == []
        out = out.result
    assert (out.finish_reason, model.read) == ("cancelled", [])


def test_no_flag_stays_behind() -> None:
    gemma, _ = noisy()
    gemma.generate("hello", max_tokens=2)
    gemma.score("hello")
    list(gemma.stream("hello", max_tokens=2))
    for _ in gemma.stream("hello", max_tokens=200):
        break
    for start in (gemma.generate, gemma.stream):
        with pytest.raises(ValueError, match="outside the embedding"):
            start([VOCAB])
    assert not gemma._running


def test_threads_share_one_gemma() -> None:
    gemma, _ = noisy()
    prompts = ["hello", "the", "world", "a"]
    alone = [gemma.generate(p, seed=1, max_tokens=40).tokens for p in prompts]
    threads = [
        in_thread(lambda p=p: [gemma.generate(p, seed=1, max_tokens=40).tokens for _ in range(5)]) for p in prompts
    ]  # type: ignore[misc]
    for (thread, out), tokens in zip(threads, alone, strict=True):
        thread.join(60)
        assert out == [[tokens] * 5]


def test_after_close_calls_say_so() -> None:
    gemma, _ = noisy()
    chat, stream = gemma.chat(), gemma.stream("hello", max_tokens=99)
    next(stream)
    with gemma as same:
        assert same is gemma
    calls: list[Callable[[], Any]] = [
        lambda: gemma.generate("hello"), lambda: gemma.stream("hello"), lambda: gemma.score("hello"), lambda: chat.send("a"),
        lambda: gemma.model,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError, match="closed"):
            call()
    list(stream)
    assert stream.result is not None
    assert stream.result.finish_reason == "cancelled"
    gemma.close()


# --- without words, with too many of them ---


def test_without_a_tokenizer_only_text_fails() -> None:
    gemma = fake_native.gemma(Model(noise), words=None)
    out = gemma.generate([BOS], max_tokens=3)
    assert len(out.tokens) == 3
    assert len(gemma.score([BOS, 20]).logprobs) == 1
    calls: list[Callable[[], Any]] = [
        lambda: out.text, lambda: gemma.generate("hello"), lambda: gemma.stream([BOS]), lambda: gemma.chat(),
        lambda: gemma.score("a"), lambda: gemma.generate([BOS], stop="a"), lambda: gemma.tokenizer, lambda: gemma.infill("a", "b"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match="tokenizer"):
            call()


# --- score ---


def test_score() -> None:
    gemma, _ = noisy()
    score = gemma.score("hello the")
    assert score.tokens == [BOS, *ids("hello the")]
    for i, value in enumerate(score.logprobs):
        row = noise(score.tokens[: i + 1]).astype(np.float64)
        assert value == pytest.approx(row[score.tokens[i + 1]] - np.log(np.exp(row).sum()), abs=1e-4)
    assert score.perplexity == pytest.approx(math.exp(-float(np.mean(score.logprobs))))
    assert gemma.score(score.tokens).perplexity == score.perplexity
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Score([1, 2], np.array([-800], np.float32)).perplexity == math.inf
    for bad in ("", [BOS]):
        with pytest.raises(ValueError, match="two tokens"):
            gemma.score(bad)
    with pytest.raises(ValueError, match="context"):
        gemma.score([BOS] * (CONTEXT + 1))


# --- infill ---


def test_infill() -> None:
    names = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_separator|>"]
    prefix, suffix, middle, separator = (WORDS.id(name) for name in names)
    for end in (prefix, suffix, middle, separator, EOS):
        prompt = [BOS, prefix, *ids("the "), suffix, *ids(" a"), middle]
        model = Model(script(len(prompt), [*ids("world"), end, *ids("a")]))
        out = fake_native.gemma(model).infill("the ", " a", temperature=0)
        assert model.read[0] == prompt
        assert (out.text, out.finish_reason) == ("world", "stop")
    assert fake_native.gemma(Model(noise)).infill("", "<|fim_suffix|>", max_tokens=1).prompt_tokens > 5


def test_chat_on_base_weights_says_so_once() -> None:
    gemma = saying("a", template=None)
    with pytest.warns(UserWarning, match="base"):
        gemma.chat()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gemma.chat()
        saying("a").chat()
