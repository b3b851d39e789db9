"""Gemma with words: load a checkpoint, generate, stream, chat, score.

Generation is one loop for every caller: prompts are prefilled together, each step decodes one token for every sequence that
still runs, and a sequence's tokens do not depend on its company.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from . import _native
from .checkpoint import Checkpoint, Progress
from .config import Config
from .sampling import SamplingParams, distinct, is_integer, make_params
from .sequence import Completion, Prefix, Rows, Running
from .speculation import Guesses
from .stream import Stream
from .weights import open_checkpoint

if TYPE_CHECKING:
    from .chat import Chat, Message
    from .tokenizer import Tokenizer

MAX_BATCH = 64  # sequences that run at once; more prompts wait their turn, so that their caches need not exist yet
MOST_CHANGED = 2048  # tokens with biases and penalties, beyond which all logits are asked for


@dataclass
class Score:
    """Log-probabilities (natural logs) that the model gives a text's tokens, each after those before it."""

    tokens: list[int]  # the first is not scored
    logprobs: NDArray[np.float32]  # [len(tokens) - 1]; the i-th is that of tokens[i + 1]
    perplexity: float = field(init=False)  # exp of the mean negative log-probability

    def __post_init__(self) -> None:
        with np.errstate(over="ignore"):  # a text that the model takes for impossible has an infinite one
            self.perplexity = float(np.exp(-self.logprobs.mean(dtype=np.float64)))


class Gemma:
    """A Gemma model and its tokenizer. Make one with `Gemma.load`."""

    def __init__(
        self,
        model: _native.Model,
        config: Config,
        tokenizer: Any,
        chat_template: str | None,
        loaded_with: dict[str, Any],
        context: int,
    ) -> None:
        self._model: _native.Model | None = model
        self._config = config
        self._build_tokenizer = tokenizer
        self._tokenizer: Tokenizer | None = None
        self._chat_template = chat_template
        self._loaded_with = loaded_with
        self._context = context
        # Whether a token's logits are the same however the tokens so far were split into passes.
        self._split_keeps_bits = model.device == "cpu" or bool(loaded_with.get("deterministic"))
        self._running: set[_native.CancelFlag] = set()
        self._kept: deque[Prefix] = deque(maxlen=1)  # of the last prompt; its methods are atomic
        self._warned = False
        self._counted = False  # the vocabulary's size was compared with the embedding's

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        device: str = "auto",
        weights: Literal["auto", "bf16", "int8", "int4"] = "auto",
        kv: Literal["bf16", "f32"] = "bf16",
        threads: int | None = None,
        context: int | None = None,
        deterministic: bool = False,
        progress: Progress | None = None,
    ) -> Gemma:
        """Opens a checkpoint and puts it on a device.

        source: a directory (config.json, *.safetensors, tokenizer.model), a .gguf or packed .safetensors file, a Hugging Face
            Hub id, or "demo".
        device: "auto" (the first GPU that works, else the CPU) | "cpu" | "cuda" | "cuda:1". weights: "auto" (as stored) | "bf16" | "int8" | "int4".
        kv: the KV cache, "bf16" | "f32". threads: of the CPU; default: the physical cores that may be used.
        context: tokens a sequence may have, at most (and by default) what the model was made for.
        deterministic: on CUDA, the same bits for any split of a prompt; the CPU always keeps them.
        progress: called with (bytes done, bytes in all) in place of the bar that a terminal shows.

        Raises FileNotFoundError, FormatError, MissingDependency, TypeError and ValueError (settings), MemoryError, RuntimeError (device).
        """
        settings: dict[str, Any] = {
            "device": device, "weights": weights, "kv": kv, "threads": threads, "deterministic": deterministic,
        }  # fmt: skip
        _check_settings(settings, context)
        settings["threads"], context = _plain(threads), _plain(context)
        checkpoint = open_checkpoint(source, progress)
        try:
            config = checkpoint.config
            if context is not None and not 1 <= context <= config.context_length:
                raise ValueError(f"context must be between 1 and {config.context_length} tokens, not {context}")
            model = _build(checkpoint, settings)
            name = os.fspath(source)
            at = name if source == "demo" or not os.path.exists(name) else os.path.abspath(name)
            loaded_with = {"source": at, "context": context, **settings}
            gemma = cls(
                model,
                config,
                checkpoint.tokenizer,
                checkpoint.chat_template,
                loaded_with,
                context or config.context_length,
            )
            if checkpoint.pieces is not None:
                gemma._counted = True
                _warn_of_pieces(checkpoint.pieces, config)
            return gemma
        finally:
            checkpoint.close()

    # --- what it is ---

    @property
    def model(self) -> _native.Model:
        """The native model: tokens in, logits out. Raises RuntimeError after `close()`."""
        if self._model is None:
            raise RuntimeError("this Gemma is closed")
        return self._model

    @property
    def config(self) -> Config:
        return self._config

    @property
    def has_tokenizer(self) -> bool:
        return self._build_tokenizer is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """Built on first use. Raises ValueError where the checkpoint has none."""
        if self._tokenizer is None:
            if self._build_tokenizer is None:
                raise ValueError(
                    f"{self._loaded_with['source']}: no tokenizer.model or tokenizer.json; only generate() and score() of token ids work"
                )
            tokenizer = self._build_tokenizer()
            if not self._counted:
                _warn_of_pieces(tokenizer.vocab_size, self.config)
            self._tokenizer = tokenizer
        return self._tokenizer

    def __repr__(self) -> str:
        state = "closed" if self._model is None else self._model.device
        return f"<Gemma {self._loaded_with['source']!r} ({self.config.architecture}, {state})>"

    def __enter__(self) -> Gemma:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops what runs and gives the memory back, once no chat or stream is left. Later calls raise RuntimeError."""
        self.cancel()
        self._model = None
        self.drop_cache()

    def drop_cache(self) -> None:
        """Gives back the memory of the last prompt's KV cache, which is kept for a next prompt that begins alike. A chat has its own
        until it is reset or gone."""
        self._kept.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reload, (self._loaded_with,)

    # --- running calls ---

    def cancel(self) -> None:
        """Stops every running call, from any thread: they end with finish_reason "cancelled", `score` with Cancelled."""
        for flag in list(self._running):
            flag.set()

    def _begin(self) -> _native.CancelFlag:
        flag = _native.CancelFlag()
        self._running.add(flag)
        return flag

    def _end(self, flag: _native.CancelFlag) -> None:
        self._running.discard(flag)

    def _steps(self, sequences: list[Running], flag: _native.CancelFlag) -> Generator[list[str], None, None]:
        """Runs sequences to their ends, at most MAX_BATCH at once; after each step yields the text that it gave each of
        those. Prompts are appended to the caches as far as they are not there yet."""
        waiting = deque(sequences)
        own = [s for s in sequences if s.cache is None]
        try:
            for pieces in self._run(waiting, flag):
                self._give_back(own, waiting)
                yield pieces
        finally:
            self._give_back(own, waiting)

    def _run(self, waiting: deque[Running], flag: _native.CancelFlag) -> Iterator[list[str]]:
        model = self.model
        if self._kept and len(waiting) > 1:
            self._put_first_who_shares_most(waiting)
        live: list[Running] = []
        while True:
            while waiting and len(live) < MAX_BATCH and self._start(waiting[0], flag):
                live.append(waiting.popleft())
            if not live:
                return
            if len(live) == 1 and not waiting and live[0].tokens and (guesses := self._guesses(live[0])):
                yield [self._checked_step(live[0], guesses, flag)]
                if live[0].finish_reason:
                    return
                continue
            tokens, caches = [], []
            for s in live:
                assert s.cache is not None
                new = s.tokens[-1:] if s.tokens else s.prompt[s.cache.length :]
                if not s.tokens:
                    s.read = len(new)
                tokens.append(new)
                caches.append(s.cache)
            wanted = self._wanted(live)
            began = time.perf_counter()
            try:
                if flag.is_set():
                    raise _native.Cancelled
                rows = Rows.of(model.forward_batch(tokens, caches, **wanted, cancel=flag), wanted)
            except _native.Cancelled:
                for s in live:
                    if not s.tokens and s.cache is not None:
                        s.read -= len(s.prompt) - s.cache.length
                yield [s.end("cancelled") for s in [*live, *waiting]]
                return
            yield [s.take(rows, i, began) for i, s in enumerate(live)]
            live = [s for s in live if not s.finish_reason]

    def _wanted(self, live: list[Running], guesses: Sequence[int] = ()) -> dict[str, Any]:
        """What the next step is to return: nothing said for all logits."""
        needed = [s.params.best_needed for s in live]
        vocab = self.config.vocab_size
        if not all(needed):
            return {}
        if not any(s.params.reshapes for s in live):
            return {"top_k": min(max(needed), vocab)}
        # Guesses that prove right are penalised within the step.
        also = distinct(np.concatenate([s.sampler.changed(vocab) for s in live] + [np.asarray(guesses, np.int32)]))
        k = min(max(needed), vocab - len(also))
        if len(also) > MOST_CHANGED or k < 1:
            return {}
        return {"top_k": k, "also": also} if len(also) else {"top_k": k}

    def _guesses(self, s: Running) -> Guesses | None:
        """None unless they are wanted, and cost no bits."""
        if s.guesses is None and s.params.speculate and self._split_keeps_bits:
            s.guesses = Guesses([*s.prompt, *s.tokens])
        return s.guesses

    def _checked_step(self, s: Running, guesses: Guesses, flag: _native.CancelFlag) -> str:
        """A step with as many guesses as there are: the text of one token or more."""
        cache, model = s.cache, self.model
        assert cache is not None
        start = cache.length
        # A full cache ends a sequence: guesses must not fill it.
        tried = guesses.next(min(s.params.max_tokens - len(s.tokens), cache.capacity - start - 1) - 1)
        wanted = self._wanted([s], tried)
        began = time.perf_counter()
        try:
            if flag.is_set():
                raise _native.Cancelled
            new = [s.tokens[-1], *tried]
            rows = Rows.of(model.forward(new, cache, all_logits=True, **wanted, cancel=flag), wanted)
        except _native.Cancelled:  # nothing was appended
            return s.end("cancelled")
        step, pieces, right, row = time.perf_counter() - began, [], 0, 0
        try:
            for row, guess in enumerate([*tried, None]):
                pieces.append(s.take(rows, row, began))
                began = time.perf_counter()
                if s.finish_reason:
                    break
                guesses.add(s.tokens[-1])
                if s.tokens[-1] != guess:
                    break
                right += 1
        finally:
            cache.truncate(start + row + 1)
        guesses.took(step, len(tried), right)
        return "".join(pieces)

    def _start(self, s: Running, flag: _native.CancelFlag) -> bool:
        """Gives a sequence its cache. False: it has to wait until the first of its prompt has read the prompt."""
        if s.cache is not None:
            return True
        if s.first is not s:
            source = s.first.cache
            assert source is not None
            if source.length < len(s.prompt):
                return False
            try:
                s.cache = Prefix(source.clone(cancel=flag), s.prompt).rewind(s.prompt, flag)
            except _native.Cancelled:  # the first pass will say so
                s.cache = self._new_cache(len(s.prompt))
        else:
            s.cache = self._cache(s.prompt, min(self._context, len(s.prompt) + s.params.max_tokens), flag)
        return True

    def _put_first_who_shares_most(self, waiting: deque[Running]) -> None:
        """With the last prompt, whose cache the first will take."""
        for prefix in list(self._kept):
            best = max((s for s in waiting if s.first is s), key=lambda s: prefix.shared(s.prompt))
            waiting.remove(best)
            waiting.appendleft(best)

    def _cache(self, prompt: list[int], needed: int, flag: _native.CancelFlag | None = None) -> _native.Cache:
        """That of the last prompt, cut to what both begin with, or an empty one, for `needed` positions at least."""
        prefix: Prefix | None = None
        try:
            prefix = self._kept.pop()
            if prefix.cache.capacity >= needed:
                return prefix.rewind(prompt, flag)
        except (IndexError, _native.Cancelled):  # cancelled: the first pass will say so
            pass
        prefix = None  # its memory goes first
        return self._new_cache(needed)

    def _new_cache(self, needed: int) -> _native.Cache:
        """An empty cache for that many positions at least."""
        if self.model.device == "cpu":  # memory is taken as it is used
            return self.model.new_cache(self._context)
        self.drop_cache()  # at once: no more than is needed, and not beside one that nobody uses
        return self.model.new_cache(needed)

    def _give_back(self, own: list[Running], waiting: Iterable[Running]) -> None:
        """Takes the caches of sequences that have ended, unless one that waits will clone it, and keeps the last."""
        cloned = {id(s.first) for s in waiting}
        for s in own:
            if s.finish_reason and id(s) not in cloned and (prefix := s.prefix()):
                s.cache = None
                self._keep(prefix)

    def _keep(self, prefix: Prefix) -> None:
        """For the next prompt that begins alike, instead of what was kept so far."""
        if self._split_keeps_bits:
            self._kept.append(prefix)
        if self._model is None:  # closed, perhaps this instant
            self.drop_cache()

    # --- prompts ---

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, (bytes, dict)) or not hasattr(prompt, "__len__"):
            raise TypeError(f"a prompt is text or a list of token ids, not {type(prompt).__name__}")
        else:
            ids = [_token(t) for t in prompt]
        if not ids:
            raise ValueError("the prompt has no tokens; at least one is needed")
        rows = self.config.vocab_size
        for t in ids:
            if not 0 <= t < rows:
                raise ValueError(f"token id {t} is outside the embedding's rows [0, {rows})")
        if len(ids) > self._context:
            raise ValueError(f"the prompt has {len(ids)} tokens, more than the context of {self._context}")
        return ids

    def _ends(self, params: SamplingParams) -> frozenset[int]:
        ends = set(params.stop_tokens)
        if not params.ignore_eos:
            ends.update(self.config.eos_token_ids)
            if self.has_tokenizer:
                turn = self.tokenizer.id("<end_of_turn>")
                if turn is not None and self.tokenizer.is_control(turn):
                    ends.add(turn)
        return frozenset(ends)

    def _check(self, params: SamplingParams) -> None:
        """What the settings alone do not tell. Raises ValueError, or RuntimeError after `close()`."""
        if params.stop and not self.has_tokenizer:
            raise ValueError("stop strings need a tokenizer, which this checkpoint does not have; use stop_tokens")
        for token in params.logit_bias:
            if token >= self.config.vocab_size:
                raise ValueError(f"logit_bias: token id {token} is outside the vocabulary of {self.config.vocab_size}")
        self.model  # noqa: B018

    def _sequences(self, prompts: list[list[int]], params: SamplingParams) -> list[Running]:
        self._check(params)
        tokenizer = self.tokenizer if self.has_tokenizer else None
        ends = self._ends(params)
        out = []
        for ids in prompts:
            group = [Running(ids, params, i, None, tokenizer, ends) for i in range(params.n)]
            for s in group:
                s.first = group[0]
            out += group
        return out

    # --- text in, text out ---

    @overload
    def generate(
        self, prompt: str | list[int], params: SamplingParams | None = None, **settings: Any
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], params: SamplingParams | None = None, **settings: Any
    ) -> list[Completion]: ...

    def generate(self, prompt: Any, params: SamplingParams | None = None, **settings: Any) -> Any:
        """Continues a prompt, or a list of prompts as one batch (each gets what it would get alone).

        prompt: text (BOS is put in front), a list of token ids (used as given), or a list of either.
        params, settings: see SamplingParams. With n > 1, a list of n completions stands for each prompt.

        Raises ValueError (prompt too long or empty, token ids out of range, settings), TypeError.
        """
        chosen = make_params(params, settings)
        if isinstance(prompt, list) and not prompt:
            raise ValueError("the list is empty: a prompt needs at least one token, a batch at least one prompt")
        batch = _is_batch(prompt)
        flag = self._begin()
        try:
            prompts = [self._ids(p) for p in prompt] if batch else [self._ids(prompt)]
            sequences = self._sequences(prompts, chosen)
            for _ in self._steps(sequences, flag):
                pass
        finally:
            self._end(flag)
        results = [s.result() for s in sequences]
        if chosen.n > 1:
            grouped = [results[i : i + chosen.n] for i in range(0, len(results), chosen.n)]
            return grouped if batch else grouped[0]
        return results if batch else results[0]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None, **settings: Any) -> Stream:
        """Like `generate` for one prompt, but gives whole characters of text as they come. See `Stream`."""
        chosen = make_params(params, settings)
        if chosen.n != 1:
            raise ValueError(f"stream gives one continuation; n is {chosen.n}")
        if _is_batch(prompt):
            raise TypeError("stream takes one prompt; generate takes a list of them")
        self.tokenizer  # noqa: B018  (text is wanted: say now if there is no tokenizer)
        flag = self._begin()
        try:
            sequence = self._sequences([self._ids(prompt)], chosen)[0]
            return Stream(sequence, self._steps([sequence], flag), flag, self._end)
        except BaseException:
            self._end(flag)
            raise

    def chat(self, system: str | None = None, messages: Iterable[Message] = ()) -> Chat:
        """Starts a conversation, or goes on with one.

        system: how the model should behave; it stands before the first user text.
        messages: what was said before, by the user and the model in turn: (role, text), as `Chat.messages` has them, or
            {"role": ..., "content": ...}; the model's role is "model" or "assistant". The first may be a "system" message,
            which stands for system=; the last is the model's, since what the user says next is for `send` or `stream`.

        Raises ValueError where the vocabulary has no turns, and for messages in another order; TypeError.
        """
        from .chat import Chat

        if self._chat_template is None and not self._warned:
            self._warned = True
            warnings.warn(
                "this checkpoint has no chat template: it is probably a base model, which continues text rather than answers",
                stacklevel=2,
            )
        return Chat(self, system, messages)

    def score(self, text: str | Sequence[int]) -> Score:
        """How probable the model finds a text: log-probabilities of each token after the first, and the perplexity.

        text: scored after BOS; or token ids, used as given. Raises ValueError for fewer than two tokens or too many, and
        Cancelled when `cancel()` or `close()` stops it.
        """
        ids = self._ids(text)
        if len(ids) < 2:
            raise ValueError("a text to score needs at least two tokens (BOS counts)")
        flag = self._begin()
        try:
            return Score(ids, self.model.score(ids, self._new_cache(len(ids)), cancel=flag))
        finally:
            self._end(flag)

    def infill(self, prefix: str, suffix: str, params: SamplingParams | None = None, **settings: Any) -> Completion:
        """What stands between prefix and suffix, by CodeGemma's fill-in-the-middle. Raises ValueError for a vocabulary without it."""
        chosen = make_params(params, settings)
        t = self.tokenizer
        names = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_separator|>")
        marks = [t.id(name) for name in names]
        if None in marks:
            marks = [67, 68, 69, 70]  # CodeGemma's, which some conversions leave unnamed
            if self.config.architecture != "gemma" or not all(t.is_control(m) for m in marks if m is not None):
                raise ValueError(
                    "this vocabulary has no fill-in-the-middle tokens; infill needs a CodeGemma checkpoint"
                )
        first, middle, last, separator = (int(m) for m in marks if m is not None)
        ids = [first, *t.encode(prefix, bos=False), last, *t.encode(suffix, bos=False), middle]
        if t.bos_id is not None:
            ids.insert(0, t.bos_id)
        stops = [*chosen.stop_tokens, first, middle, last, separator]
        return self.generate(ids, make_params(chosen, {"stop_tokens": stops}))


def _check_settings(settings: dict[str, Any], context: int | None) -> None:
    for name in ("device", "weights", "kv"):
        if not isinstance(settings[name], str):
            raise TypeError(f"{name} must be a string, not {settings[name]!r:.60}")
    for name, value in (("threads", settings["threads"]), ("context", context)):
        if value is not None and not is_integer(value):
            raise TypeError(f"{name} must be an integer or None, not {value!r:.60}")
    if settings["threads"] is not None and not 1 <= settings["threads"] <= 1024:
        raise ValueError(f"threads must be between 1 and 1024, not {settings['threads']!r:.60}")
    if not isinstance(settings["deterministic"], bool):
        raise TypeError(f"deterministic must be True or False, not {settings['deterministic']!r:.60}")


def _plain(value: int | None) -> int | None:
    """An integer of NumPy as one of Python, which pickles without it."""
    return None if value is None else int(value)


def _build(checkpoint: Checkpoint, settings: dict[str, Any]) -> _native.Model:
    """The model on the device of the settings. "auto" becomes "cuda", or "cpu" where no GPU can be used."""

    def build(device: str) -> _native.Model:
        settings["device"] = device
        return checkpoint.model(**settings)

    if settings["device"] != "auto":
        return build(settings["device"])
    if not _native.cuda_status():
        try:
            return build("cuda")
        except (MemoryError, RuntimeError) as e:
            warnings.warn(f"the GPU cannot be used: {e}; the CPU is", stacklevel=3)
            checkpoint.restart()
    return build("cpu")


def _warn_of_pieces(pieces: int, config: Config) -> None:
    if pieces > config.vocab_size:
        warnings.warn(
            f"the tokenizer has {pieces} pieces, but the model's embedding {config.vocab_size} rows: text that needs the rest is refused",
            stacklevel=3,
        )


def _reload(arguments: dict[str, Any]) -> Gemma:
    return Gemma.load(**arguments)


def _token(value: Any) -> int:
    if not is_integer(value):
        raise TypeError(f"token ids are integers, not {value!r:.60}")
    return int(value)


def _is_batch(prompt: Any) -> bool:
    """A list of ints (or an integer array) is one prompt; a list of strings or of lists is several."""
    if isinstance(prompt, (str, bytes, dict)) or not hasattr(prompt, "__len__"):
        return False
    if isinstance(prompt, np.ndarray):
        return prompt.ndim > 1
    return all(isinstance(p, str) or hasattr(p, "__len__") for p in prompt) and len(prompt) > 0
