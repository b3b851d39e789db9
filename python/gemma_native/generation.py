"""One sequence being generated, the loop over a ragged batch of them, and the stream that hands out text as it comes.

Knows token ids, stop conditions and text; where weights come from and what a chat is, it does not know.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ._native import Cache, CancelFlag, Cancelled, Model
from .sampling import Sampler, SamplingParams, TokenLogprob
from .tokenizer import Detokenizer, Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]
MAX_BATCH = 32  # sequences computed at once; more prompts wait, so that their KV caches need not exist yet


@dataclass
class GenerateResult:
    """What a generation gave. `str()` of it is its text."""

    text: str
    """Without stop strings; empty where the checkpoint has no tokenizer."""
    tokens: list[int]
    """All generated tokens except the one that stopped the generation (those of a stop string are in)."""
    finish_reason: FinishReason
    """"stop": an end token, a stop token or a stop string; "length": max_tokens or a full context; "cancelled"."""
    prompt_tokens: int
    """How many tokens the prompt has."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds: prefill_s, decode_s, time_to_first_token_s; tokens/s: prefill_tokens_per_s, decode_tokens_per_s."""
    logprobs: list[TokenLogprob] | None = None
    """One entry a token when `logprobs` was asked for."""

    def __str__(self) -> str:
        return self.text


class Text:
    """Tokens to text that may be shown: whole characters, and nothing that a stop string may still swallow."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        return self._feed(self._detokenizer.push(token)) if self._detokenizer is not None else ""

    def flush(self) -> str:
        """The rest, once no more tokens come."""
        if self.stopped or self._detokenizer is None:
            return ""
        rest = self._feed(self._detokenizer.flush())
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _feed(self, new: str) -> str:
        self._held += new
        if not new or not self._stops:
            out, self._held = self._held, "" if not self._stops else self._held
            return out if not self._stops else ""
        found = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.stopped = True
            out, self._held = self._held[: min(found)], ""
            return out
        for length in range(min(len(self._held), max(map(len, self._stops)) - 1), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                out, self._held = self._held[:-length], tail
                return out
        out, self._held = self._held, ""
        return out


class Sequence_:
    """One sequence on its way: what was asked, what came so far, why it ended."""

    def __init__(
        self, prompt: list[int], params: SamplingParams, tokenizer: Tokenizer | None, stop_ids: frozenset[int],
        room: int, vocab_size: int, seed: int | None = None, index: int = 0,
    ) -> None:
        """`room`: tokens that the context still allows; `seed`, `index`: the generator's, see Sampler."""
        assert isinstance(params.stop, tuple)
        self.prompt = prompt
        self.index = index
        self.sampler = Sampler(params, prompt, seed, index)
        self.enough = None if self.sampler.enough is None else min(self.sampler.enough, vocab_size)
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self.stopped_by_text = False
        self._limit = room if params.max_tokens is None else min(room, params.max_tokens)
        self._stop_ids = stop_ids
        self._text = Text(tokenizer, params.stop)
        self._pieces: list[str] = []
        self._started = time.perf_counter()
        self._first: float | None = None
        self._prefilled = len(prompt)
        self._prefill_s = self._decode_s = 0.0

    def choose(self, logits: Any) -> int:
        """The next token from what the model returned: a row of logits, or (ids, logits) when `enough` is set."""
        return self.sampler.pick(logits) if self.enough is None else self.sampler.pick_from(*logits)

    def take(self, token: int, seconds: float, prefilled: int | None = None) -> str:
        """Adds a token that took so long, and returns the text that may be shown now. Sets `finish` at the end."""
        if self._first is None:
            self._first = time.perf_counter() - self._started
            self._prefill_s = seconds
            if prefilled is not None:
                self._prefilled = prefilled
        else:
            self._decode_s += seconds
        if token in self._stop_ids:
            return self.end("stop")
        self.tokens.append(token)
        piece = self._text.push(token)
        if self._text.stopped:
            self.finish, self.stopped_by_text = "stop", True
        self._pieces.append(piece)
        if self.finish is None and len(self.tokens) >= self._limit:
            piece += self.end("length")
        return piece

    def end(self, reason: FinishReason) -> str:
        """Ends the sequence, and returns the text that was still held back."""
        if self.finish is not None:
            return ""
        rest = self._text.flush()
        self._pieces.append(rest)
        self.finish, self.stopped_by_text = ("stop", True) if self._text.stopped else (reason, False)
        return rest

    @property
    def result(self) -> GenerateResult:
        """What there is so far, as a result."""
        decoded = len(self.tokens) - 1
        timings = {
            "prefill_s": self._prefill_s,
            "decode_s": self._decode_s,
            "time_to_first_token_s": self._first or 0.0,
            "prefill_tokens_per_s": self._prefilled / self._prefill_s if self._prefill_s > 0 else 0.0,
            "decode_tokens_per_s": decoded / self._decode_s if self._decode_s > 0 and decoded > 0 else 0.0,
        }
        logprobs = None if self.sampler.logprobs is None else self.sampler.logprobs[: len(self.tokens)]
        text = "".join(self._pieces)
        return GenerateResult(text, list(self.tokens), self.finish or "cancelled", len(self.prompt), timings, logprobs)


def run_one(
    model: Model, sequence: Sequence_, cache: Cache, tokens: list[int], cancel: CancelFlag
) -> Iterator[str]:
    """Generates one sequence; `tokens` are what the cache lacks of its prompt. Yields text as it may be shown."""
    prefilled = len(tokens)
    while sequence.finish is None:
        started = time.perf_counter()
        try:
            if cancel.is_set():
                raise Cancelled
            logits: Any = model.forward(tokens, cache, top_k=sequence.enough, cancel=cancel)
        except Cancelled:
            piece = sequence.end("cancelled")
        else:
            token = sequence.choose(logits)
            piece = sequence.take(token, time.perf_counter() - started, prefilled)
            tokens = [token]
        if piece:
            yield piece


class _Group:
    """The n sequences of one prompt: the first prefills it, the others start from a clone of its cache."""

    def __init__(self, sequences: list[Sequence_]) -> None:
        self.left = len(sequences)
        self.cache: Cache | None = None
        self.logits: Any = None


def run_batch(
    model: Model, prompts: list[list[Sequence_]], new_cache: Callable[[], Cache], cancel: CancelFlag
) -> None:
    """Generates all sequences, at most MAX_BATCH at a time; as some end, waiting ones join. `prompts` holds for each
    prompt its n sequences, which share their settings. Every sequence has a `finish` afterwards."""
    waiting: deque[tuple[Sequence_, _Group]] = deque()
    for sequences in prompts:
        group = _Group(sequences)
        waiting.extend((sequence, group) for sequence in sequences)
    active: list[tuple[Sequence_, _Group, Cache, list[int]]] = []
    try:
        while waiting or active:
            while waiting and len(active) < MAX_BATCH:
                sequence, group = waiting[0]
                if sequence.index == 0:
                    active.append((sequence, group, new_cache(), sequence.prompt))
                elif group.cache is not None:
                    group.left -= 1
                    token = sequence.choose(group.logits)
                    sequence.take(token, 0.0)
                    if sequence.finish is None:  # the last one needs no copy
                        cache = group.cache.clone() if group.left > 1 else group.cache
                        active.append((sequence, group, cache, [token]))
                else:
                    break  # the first of the group prefills in this step
                waiting.popleft()
            if not active:
                continue
            if cancel.is_set():
                raise Cancelled
            started = time.perf_counter()
            k = active[0][0].enough
            rows: Any = model.forward_batch([a[3] for a in active], [a[2] for a in active], top_k=k, cancel=cancel)
            still = []
            for i, (sequence, group, cache, tokens) in enumerate(active):
                row = rows[i] if k is None else (rows[0][i], rows[1][i])
                if tokens is sequence.prompt and group.left > 1:
                    group.cache, group.logits = cache.clone(), row
                token = sequence.choose(row)
                sequence.take(token, time.perf_counter() - started)
                if sequence.finish is None:
                    still.append((sequence, group, cache, [token]))
            active = still
    except Cancelled:
        for sequence in (sequence for sequences in prompts for sequence in sequences):
            sequence.end("cancelled")


class GenerateStream(Iterator[str]):
    """Iterates over the text of a generation as it is made. Nothing is computed between two steps of the loop, so
    leaving the loop stops the work; `close()` or `with` also lets go of its memory."""

    def __init__(self, sequence: Sequence_, steps: Iterator[str], flag: CancelFlag) -> None:
        self._sequence = sequence
        self._steps: Any = steps
        self._flag = flag
        self._ended = False

    def __iter__(self) -> GenerateStream:
        return self

    def __next__(self) -> str:
        try:
            piece: str = next(self._steps)
            return piece
        except BaseException as error:
            if not (isinstance(error, ValueError) and "already executing" in str(error)):
                self._ended = True
            raise

    def cancel(self) -> None:
        """Stops the generation, from any thread; the loop then ends with finish_reason "cancelled"."""
        self._flag.set()

    def close(self) -> None:
        """Stops the generation and frees its memory; `result` is what there was."""
        self._flag.set()
        try:
            self._steps.close()
        except ValueError:
            return  # another thread is inside it, and the flag stops that one
        self._ended = True

    @property
    def result(self) -> GenerateResult | None:
        """The GenerateResult once the loop has ended or was closed; None before."""
        return self._sequence.result if self._ended else None

    def __enter__(self) -> GenerateStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_steps"):
            self.close()
