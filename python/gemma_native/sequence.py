"""One running continuation: the choice of its tokens, its text as they come, and how it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import _native
from .sampling import Sampler, SamplingParams, TokenLogprob, token_logprob
from .speculation import Guesses

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


@dataclass
class Completion:
    """What a prompt was continued with. `str(completion)` is its text."""

    tokens: list[int]  # without the token that ended it
    finish_reason: str  # "stop" | "length" | "cancelled"
    prompt_tokens: int
    # prefill_tokens (of the prompt, those that were not in the cache yet), prefill_s, decode_s, first_token_s,
    # prefill_tokens_per_s, decode_tokens_per_s; with speculate: guessed, guessed_right (tokens)
    timings: dict[str, float]
    logprobs: list[TokenLogprob] | None = None  # one a token, where they were asked for
    _text: str | None = None

    @property
    def text(self) -> str:
        """Without the stop string, if one ended it. Raises ValueError for a checkpoint without a tokenizer."""
        if self._text is None:
            raise ValueError("this checkpoint has no tokenizer: there are .tokens, but no .text")
        return self._text

    def __str__(self) -> str:
        return self.text


class _Text:
    """A sequence's text as its tokens come: whole characters only, held back while they may begin a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        from .tokenizer import Detokenizer

        self._out = Detokenizer(tokenizer)
        self._stops = list(stops)
        self._held = ""
        self.text = ""  # all that was given out

    def push(self, token: int) -> tuple[str, bool]:
        """(new text, whether a stop string was met)."""
        return self._give(self._out.push(token))

    def finish(self) -> tuple[str, bool]:
        """The same of what is left when generation ends for another reason."""
        piece, stopped = self._give(self._out.flush())
        if not stopped:
            self.text += self._held
            piece, self._held = piece + self._held, ""
        return piece, stopped

    def _give(self, new: str) -> tuple[str, bool]:
        self._held += new
        # Of what a token completes at once, the first to be complete: it must not matter how a text is cut into tokens.
        met = [(begin + len(s), begin) for s in self._stops if (begin := self._held.find(s)) >= 0]
        if met:
            keep, stopped = min(met)[1], True
        else:
            # The longest tail that a stop string could still begin with.
            tail = max((n for s in self._stops for n in range(1, len(s)) if self._held.endswith(s[:n])), default=0)
            keep, stopped = len(self._held) - tail, False
        piece, self._held = self._held[:keep], "" if stopped else self._held[keep:]
        self.text += piece
        return piece, stopped


@dataclass
class Rows:
    """What a step gave for each of its rows: all logits, or the best, best first, and those of the tokens `also`."""

    logits: NDArray[np.float32]
    ids: NDArray[np.int32] | None = None
    also: NDArray[np.int32] | None = None
    also_logits: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, results: Any, wanted: dict[str, Any]) -> Rows:
        """From what the model returned for the keywords `wanted`."""
        if "top_k" not in wanted:
            return cls(results)
        return cls(results[1], results[0], wanted.get("also"), results[2] if "also" in wanted else None)


class Prefix:
    """A cache and the tokens that it holds: a prompt that begins like them need not be read from its beginning."""

    def __init__(self, cache: _native.Cache, tokens: list[int]) -> None:
        self.cache = cache
        self._tokens = tokens

    def shared(self, prompt: list[int]) -> int:
        """How many tokens both begin with, without the prompt's last, which is computed for its logits."""
        same = 0
        for a, b in zip(prompt[:-1], self._tokens, strict=False):
            if a != b:
                break
            same += 1
        return same

    def rewind(self, prompt: list[int], cancel: _native.CancelFlag | None = None) -> _native.Cache:
        """The cache, cut to what it shares with the prompt. Raises Cancelled while another call is waited for."""
        same = self.shared(prompt)
        if same < self.cache.length:
            try:
                self.cache.truncate(same, cancel=cancel)
            except ValueError:  # sliding layers no longer hold that far back: everything is read again
                self.cache.truncate(0, cancel=cancel)
        return self.cache


class Running:
    """One running continuation."""

    def __init__(
        self,
        prompt: list[int],
        params: SamplingParams,
        index: int,
        cache: _native.Cache | None,
        tokenizer: Tokenizer | None,
        ends: frozenset[int],
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.cache = cache  # None: made when it starts, and given back when it ends
        self.first = self  # the one of its prompt's n that reads the prompt; the others start from a clone of its cache
        self.sampler = Sampler(params, prompt, index)
        self.text = _Text(tokenizer, params.stop) if tokenizer is not None else None
        self.ends = ends
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] | None = None if params.logprobs is None else []
        self.finish_reason = ""
        self.cut = False  # by a stop string
        self.read = 0  # tokens of the prompt that were computed
        self.guesses: Guesses | None = None
        self.started = time.perf_counter()
        self.first_s = self.prefill_s = self.decode_s = 0.0

    def take(self, rows: Rows, row: int, began: float) -> str:
        """Chooses the next token, in the step that began then, and returns the text that it completes."""
        logits = rows.logits[row]
        if rows.ids is None:
            token = self.sampler.choose(logits)
        else:
            also_logits = None if rows.also is None or rows.also_logits is None else rows.also_logits[row]
            token = self.sampler.choose_from(rows.ids[row], logits, rows.also, also_logits)
        now = time.perf_counter()
        if not self.tokens:
            self.first_s, self.prefill_s = now - self.started, now - began
        else:
            self.decode_s += now - began
        if token in self.ends:
            return self.end("stop")
        self.tokens.append(token)
        if self.logprobs is not None:
            self.logprobs.append(token_logprob(logits, token, self.params.logprobs or 0))
        piece = ""
        if self.text is not None:
            piece, stopped = self.text.push(token)
            if stopped:
                self.finish_reason, self.cut = "stop", True
                return piece
        assert self.cache is not None
        if len(self.tokens) >= self.params.max_tokens or self.cache.length >= self.cache.capacity:
            piece += self.end("length")
        return piece

    def end(self, reason: str) -> str:
        self.finish_reason = reason
        if self.text is None:
            return ""
        piece, self.cut = self.text.finish()
        if self.cut and reason != "cancelled":
            self.finish_reason = "stop"
        return piece

    def prefix(self) -> Prefix | None:
        """What its cache holds."""
        if self.cache is None:
            return None
        return Prefix(self.cache, [*self.prompt, *self.tokens][: self.cache.length])

    def result(self) -> Completion:
        prefill, decode = self.prefill_s, self.decode_s
        timings = {
            "prefill_tokens": self.read,
            "prefill_s": prefill,
            "decode_s": decode,
            "first_token_s": self.first_s,
            "prefill_tokens_per_s": self.read / prefill if prefill > 0 else 0.0,
            "decode_tokens_per_s": (len(self.tokens) - 1) / decode if decode > 0 and len(self.tokens) > 1 else 0.0,
        }
        if self.guesses is not None:
            timings |= {"guessed": self.guesses.guessed, "guessed_right": self.guesses.right}
        text = self.text.text if self.text is not None else None
        return Completion(self.tokens, self.finish_reason, len(self.prompt), timings, self.logprobs, text)
