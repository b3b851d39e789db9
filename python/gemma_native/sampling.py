"""From logits to one token: the settings, and the sampler that applies them.

Order: logit_bias (added to the raw logits, at temperature 0 too), penalties, temperature, top_k, top_p, min_p. Each sequence owns
a generator made from (seed, index) and draws exactly one uniform number a token; ties go to the lower id.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

FAST_K = 1024  # the largest top_k for which the engine's own selection is asked


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Raises ValueError or TypeError for a value out of range.

    The defaults sample from the model's own distribution.
    """

    max_tokens: int = 256  # at most this many new tokens
    temperature: float = 1.0  # logits are divided by this; 0: always the most likely token
    top_k: int = 0  # keep the k most likely; 0: all
    top_p: float = 1.0  # keep the most likely tokens that together reach this probability
    min_p: float = 0.0  # keep tokens at least this probable, relative to the most likely
    repetition_penalty: float = 1.0  # logits of tokens in prompt or output: divided by it if positive, else multiplied
    presence_penalty: float = 0.0  # subtracted once from every token of the output
    frequency_penalty: float = 0.0  # subtracted for every time that a token is in the output
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id: added to its logit
    seed: int | None = None  # None: another one each time
    stop: Sequence[str] | str = ()  # end before any of these strings
    stop_tokens: Sequence[int] = ()  # end at any of these tokens
    ignore_eos: bool = False  # go on past the model's own end tokens
    logprobs: int | None = None  # record log-probabilities of the chosen token and the k best
    n: int = 1  # continuations of each prompt
    speculate: bool = False  # guess repeated text, check several tokens at once: the same output, maybe sooner

    def __post_init__(self) -> None:
        _integer(self, "max_tokens", 1)
        _number(self, "temperature", 0.0, math.inf)
        _integer(self, "top_k", 0)
        _number(self, "top_p", 0.0, 1.0, above=True)
        _number(self, "min_p", 0.0, 1.0)
        _number(self, "repetition_penalty", 0.0, math.inf, above=True)
        _number(self, "presence_penalty", -math.inf, math.inf)
        _number(self, "frequency_penalty", -math.inf, math.inf)
        if not isinstance(self.logit_bias, Mapping):
            raise TypeError("logit_bias must map token ids to numbers")
        biases: dict[int, float] = {}
        for token, bias in self.logit_bias.items():
            if not is_integer(token) or token < 0:
                raise ValueError(f"logit_bias: {token!r} is not a token id")
            number = _float(bias)
            if number is None or math.isnan(number) or number == math.inf:
                raise ValueError(f"logit_bias[{token}] is {bias!r:.80}; a number is expected (-inf bans the token)")
            biases[int(token)] = number
        object.__setattr__(self, "logit_bias", biases)
        if self.seed is not None:
            _integer(self, "seed", 0)
        for name in ("stop", "stop_tokens"):
            if not isinstance(getattr(self, name), Iterable):
                raise TypeError(f"{name} must be a list, not {getattr(self, name)!r:.80}")
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop)
        if not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"stop must be a non-empty string or a list of such, not {self.stop!r:.80}")
        object.__setattr__(self, "stop", tuple(stops))
        tokens = list(self.stop_tokens)
        if not all(is_integer(t) and t >= 0 for t in tokens):
            raise ValueError(f"stop_tokens must be token ids, not {self.stop_tokens!r:.80}")
        object.__setattr__(self, "stop_tokens", tuple(int(t) for t in tokens))
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, not {self.ignore_eos!r:.80}")
        if not isinstance(self.speculate, bool):
            raise TypeError(f"speculate must be True or False, not {self.speculate!r:.80}")
        if self.logprobs is not None:
            _integer(self, "logprobs", 0)
        _integer(self, "n", 1)

    @property
    def reshapes(self) -> bool:
        """Whether logits are changed one by one before the best are taken."""
        penalties = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalties or bool(self.logit_bias)

    @property
    def best_needed(self) -> int:
        """How many of the best raw logits, besides those that are changed one by one, decide the next token; 0: all."""
        if self.logprobs is not None:
            return 0
        if self.temperature == 0:
            return 1
        return self.top_k if 0 < self.top_k <= FAST_K else 0


def distinct(tokens: NDArray[np.integer[Any]]) -> NDArray[Any]:
    """In order, each once: np.unique, which from NumPy 2.3 on is slower and takes the GIL back in a C++ destructor. In a daemon
    thread where the interpreter has ended, a Python before 3.14 ends the process with an error there."""
    tokens = np.sort(tokens)
    return np.concatenate([tokens[:1], tokens[1:][tokens[1:] != tokens[:-1]]])


def is_integer(value: Any) -> bool:
    """An integer of Python or NumPy; True and False are none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _integer(params: SamplingParams, name: str, low: int) -> None:
    value = getattr(params, name)
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, not {value!r:.80}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, not {value}")


def _float(value: Any) -> float | None:
    """None if it is no number."""
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, (bool, np.timedelta64)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _number(params: SamplingParams, name: str, low: float, high: float, above: bool = False) -> None:
    value = getattr(params, name)
    number = _float(value)
    if number is None:
        raise TypeError(f"{name} must be a number, not {value!r:.80}")
    if not (low < number if above else low <= number) or not number <= high or not math.isfinite(number):
        bounds = f"{'above' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
        raise ValueError(f"{name} must be {bounds if low > -math.inf else 'finite'}, not {value!r:.80}")


_FIELDS = {f.name for f in fields(SamplingParams)}
# What other libraries call it.
_ELSEWHERE = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "do_sample": "temperature (0 is greedy)",
    "num_return_sequences": "n",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "stop_strings": "stop",
}


def make_params(params: SamplingParams | None, settings: Mapping[str, Any]) -> SamplingParams:
    """`params` with `settings` on top. Raises TypeError for a setting that does not exist."""
    for name in settings:
        if name not in _FIELDS:
            import difflib

            close = [_ELSEWHERE[name]] if name in _ELSEWHERE else difflib.get_close_matches(name, _FIELDS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"there is no sampling setting {name!r}{hint}")
    if params is None:
        return SamplingParams(**settings)
    if not isinstance(params, SamplingParams):
        raise TypeError(f"params must be SamplingParams, not {type(params).__name__}; settings are given by keyword")
    return SamplingParams(**{**{f.name: getattr(params, f.name) for f in fields(params)}, **settings})


_LARGEST = float(np.finfo(np.float32).max)


def _single(value: float) -> float:
    """What a finite float32 comes nearest, or -inf."""
    return value if value == -math.inf else min(max(value, -_LARGEST), _LARGEST)


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logs under the raw model: of the chosen token, and of the best ones as (token, log-probability)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Sampler:
    """Chooses one sequence's tokens."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], index: int = 0) -> None:
        self.params = params
        self._random = np.random.default_rng(None if params.seed is None else [params.seed, index])
        self._prompt = distinct(np.asarray(prompt, np.int64))
        self._counts: dict[int, int] = {}

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token from raw logits [vocab]."""
        p = self.params
        if p.reshapes:
            changed = self.changed(len(logits))
            logits = logits.copy()
            logits[changed] = self._reshaped(logits[changed], changed)
        if p.temperature == 0:
            token = int(logits.argmax())
            _refuse_nan(logits[token])
            return self._chosen(token)
        _refuse_nan(logits.max())  # of everything: a sort would hide a NaN among the worst
        if p.top_k > 0:  # best first for any k, as choose_from has it
            ids = _best(logits, p.top_k)
            return self._draw(ids, logits[ids])
        if p.top_p < 1:
            return self._nucleus(logits)
        return self._draw(np.arange(len(logits)), logits, ordered=False)

    def changed(self, vocab: int) -> NDArray[np.int32]:
        """The tokens whose logits bias and penalties change now, in order. Raises ValueError for a bias outside the vocabulary."""
        p = self.params
        parts = [np.fromiter(p.logit_bias.keys(), np.int64)]
        if parts[0].size and parts[0].max() >= vocab:
            raise ValueError(f"logit_bias: token id {parts[0].max()} is outside the vocabulary of {vocab}")
        if p.repetition_penalty != 1:
            parts.append(self._prompt)
        if p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty:
            parts.append(np.fromiter(self._counts, np.int64, len(self._counts)))
        return distinct(np.concatenate(parts)).astype(np.int32)

    def choose_from(
        self,
        ids: NDArray[np.int32],
        logits: NDArray[np.float32],
        also: NDArray[np.int32] | None = None,
        also_logits: NDArray[np.float32] | None = None,
    ) -> int:
        """The next token from the `params.best_needed` best raw logits of the tokens that `also` does not list, best first,
        and those of `also` (in order), which has all that are `changed`."""
        k = self.params.top_k if self.params.temperature else 1
        if also is not None and also_logits is not None:
            if np.isnan(also_logits).any():  # a sort would hide it
                _refuse_nan(math.nan)
            ids = np.concatenate([ids[:k], also])
            logits = np.concatenate([logits[:k], self._reshaped(also_logits, also)])
            order = np.lexsort((ids, -logits))
            ids, logits = ids[order], logits[order]
        if self.params.temperature == 0:
            _refuse_nan(logits[0])
            return self._chosen(int(ids[0]))
        return self._draw(ids[:k].astype(np.int64), logits[:k])

    def _chosen(self, token: int) -> int:
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def _reshaped(self, logits: NDArray[np.float32], ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits of the tokens `ids` (in order, with all that are `changed`) after bias and penalties."""
        p = self.params
        out = logits.astype(np.float64)  # in which nothing overflows that settings can ask for

        def places(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
            return np.searchsorted(ids, tokens)

        if p.logit_bias:
            tokens = np.fromiter(p.logit_bias.keys(), np.int64)
            out[places(tokens)] += [_single(b) for b in p.logit_bias.values()]
        if p.repetition_penalty != 1:
            tokens = np.concatenate([self._prompt, np.fromiter(self._counts, np.int64, len(self._counts))])
            seen = places(distinct(tokens))
            values, penalty = out[seen], _single(max(p.repetition_penalty, 1 / _LARGEST))
            out[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._counts and (p.presence_penalty or p.frequency_penalty):
            tokens = places(np.fromiter(self._counts.keys(), np.int64))
            counts = np.fromiter(self._counts.values(), np.float64)
            out[tokens] -= _single(p.presence_penalty) + _single(p.frequency_penalty) * counts
        # What settings make too large is as large as can be; what was not finite before is the model's fault.
        finite = np.isfinite(logits) & np.isfinite(out)
        result: NDArray[np.float32] = np.where(finite, np.clip(out, -_LARGEST, _LARGEST), out).astype(np.float32)
        return result

    def _draw(self, ids: NDArray[np.int64], logits: NDArray[np.float32], ordered: bool = True) -> int:
        """One token of `ids` (best first when `ordered`) after temperature, top_p and min_p."""
        p = self.params
        top = logits[0] if ordered else logits.max()
        _refuse_nan(top)
        weights = self._weights(logits, float(top))
        if p.top_p < 1:
            reached = np.cumsum(weights)
            weights = weights[: int(np.searchsorted(reached, p.top_p * reached[-1])) + 1]
        if p.min_p > 0:
            weights = np.where(weights >= p.min_p, weights, 0.0)  # the best has weight 1
        return self._chosen(int(ids[self._pick(weights)]))

    def _weights(self, logits: NDArray[np.float32], top: float) -> NDArray[np.float64]:
        """Probabilities relative to the best token's, whose raw logit is `top`."""
        with np.errstate(over="ignore"):  # a tiny temperature makes -inf of everything but the best, as it should
            return np.asarray(np.exp((logits.astype(np.float64) - top) / self.params.temperature))

    def _nucleus(self, logits: NDArray[np.float32]) -> int:
        """top_p over the whole vocabulary: sorts only as many of the best as it needs."""
        p = self.params
        weights = self._weights(logits, float(logits.max()))
        wanted = p.top_p * weights.sum()
        k = min(256, len(logits))
        while True:
            ids = _best(logits, k)
            reached = np.cumsum(weights[ids])
            if reached[-1] >= wanted or k == len(logits):
                break
            k = min(8 * k, len(logits))
        ids = ids[: int(np.searchsorted(reached, wanted)) + 1]
        chosen = weights[ids]
        if p.min_p > 0:
            chosen = np.where(chosen >= p.min_p, chosen, 0.0)
        return self._chosen(int(ids[self._pick(chosen)]))

    def _pick(self, weights: NDArray[np.float64]) -> int:
        reached = np.cumsum(weights)
        i = int(np.searchsorted(reached, self._random.random() * reached[-1], side="right"))
        return min(i, int(np.flatnonzero(weights)[-1]))


def _refuse_nan(value: float | np.float32) -> None:
    if not np.isfinite(value):
        raise ValueError(f"the model's best logit is {value}: its weights are broken, or logit_bias bans every token")


def _best(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Ids of the k best logits, best first, ties by id."""
    if k < len(logits):
        bar = np.partition(logits, len(logits) - k)[len(logits) - k]
        above = np.flatnonzero(logits > bar)
        ids = np.concatenate([above, np.flatnonzero(logits == bar)[: k - len(above)]])
    else:
        ids = np.arange(len(logits))
    order = np.lexsort((ids, -logits[ids]))
    return ids[order]


def token_logprob(logits: NDArray[np.float32], token: int, k: int) -> TokenLogprob:
    """Of the raw model, from its logits [vocab]."""
    top = float(logits.max())
    norm = top + math.log(np.exp(logits.astype(np.float64) - top).sum())
    best = [(int(i), float(logits[i]) - norm) for i in _best(logits, min(k, len(logits)))] if k else []
    return TokenLogprob(token, float(logits[token]) - norm, best)
