"""A stand-in for the native model, whose next token a test can dictate, and a small vocabulary to go with it.

It keeps the native classes' promises (lengths, a full cache, cancellation) and records what was asked of it.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gemma_native import _native
from gemma_native.config import Config
from gemma_native.gemma import Gemma
from gemma_native.tokenizer import BYTE, CONTROL, NORMAL, USER_DEFINED, Tokenizer

_MARKERS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", "<unused0>"]
_FIM = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_separator|>"]
_LITERAL = ["\n", "\n\n", "  ", "   ", "<b>", "</b>", "<start_of_image>"]  # runs of spaces as GGUF files spell them
_MERGES = ["he", "ll", "llo", "hello", "or", "▁w", "▁wor", "ld", "▁world", "th", "the", "▁the", "▁a"]
_LETTERS = list("▁abcdehilorstw!.")

PIECES = _MARKERS + _FIM + _LITERAL + [f"<0x{b:02X}>" for b in range(256)] + _LETTERS + _MERGES
TYPES = (
    [CONTROL] * 4  # <unk> too, as in the Gemma 3 GGUF files
    + [USER_DEFINED] * (len(_MARKERS) - 4 + len(_FIM) + len(_LITERAL))
    + [BYTE] * 256
    + [NORMAL] * (len(_LETTERS) + len(_MERGES))
)
SCORES = [0.0] * (len(PIECES) - len(_MERGES)) + [-1.0 - i for i in range(len(_MERGES))]
EOS, BOS, TURN, END = 1, 2, 5, 6
VOCAB = 311  # rows of the embedding: a few more than the vocabulary has pieces, as in real checkpoints
CONTEXT = 600


def tokenizer() -> Tokenizer:
    return Tokenizer.from_pieces(PIECES, SCORES, TYPES, bos=BOS, eos=EOS)


class Cache:
    def __init__(self, capacity: int, reach: int) -> None:
        self.tokens: list[int] = []
        self.capacity = capacity
        self.reach = reach

    @property
    def length(self) -> int:
        return len(self.tokens)

    def truncate(self, n: int, cancel: Any = None) -> None:
        if cancel is not None and cancel.is_set():
            raise _native.Cancelled
        if n and not self.length - self.reach <= n <= self.length:
            raise ValueError(f"truncate: {n} of {self.length}")
        del self.tokens[n:]

    def clone(self, cancel: Any) -> Cache:
        if cancel.is_set():
            raise _native.Cancelled
        return copy.deepcopy(self)


class Model:
    """`logits(tokens so far) -> float32 [VOCAB]` is the whole model; `before(batch)` runs before each step."""

    device, isa, threads = "cpu", "scalar", 1

    def __init__(
        self, logits: Callable[[list[int]], np.ndarray], before: Callable[[Any], object] | None = None
    ) -> None:
        self.logits = logits
        self.before = before
        self.read: list[list[int]] = []  # every list of tokens that was appended to a cache
        self.steps: list[int] = []  # sequences in each step
        self.top_k: list[int | None] = []
        self.caches: list[weakref.ref[Cache]] = []  # all that were made, but for clones
        self.reach = 512  # how far back a cache's truncate goes, as with sliding layers
        self.part = 0  # tokens of a prompt that are read before a pass sees that it is cancelled

    def new_cache(self, capacity: int | None = None) -> Cache:
        cache = Cache(CONTEXT if capacity is None else capacity, self.reach)
        self.caches.append(weakref.ref(cache))
        return cache

    def alive(self) -> int:
        """Caches that someone still holds."""
        return sum(cache() is not None for cache in self.caches)

    def forward_batch(
        self,
        tokens: Sequence[Sequence[int]],
        caches: Sequence[Cache],
        *,
        top_k: int | None = None,
        also: Any = None,
        cancel: Any = None,
    ) -> Any:
        assert len({id(c) for c in caches}) == len(caches) == len(tokens)
        self.steps.append(len(tokens))
        self.top_k.append(top_k)
        for new, cache in zip(tokens, caches, strict=True):
            assert len(new) > 0 and all(0 <= t < VOCAB for t in new)
            if cache.length + len(new) > cache.capacity:
                raise ValueError("the cache is full")
        if self.before is not None:
            self.before(tokens)
        if cancel is not None and cancel.is_set():
            for new, cache in zip(tokens, caches, strict=True):  # a long prompt is read in parts
                cache.tokens += new[: self.part]
            raise _native.Cancelled
        for new, cache in zip(tokens, caches, strict=True):
            self.read.append([int(t) for t in new])
            cache.tokens += self.read[-1]
        rows = np.stack([self.logits(c.tokens) for c in caches]).astype(np.float32)
        if top_k is None:
            return rows
        others = rows.copy()
        if also is not None:
            others[:, also] = -np.inf
        ids = np.argsort(-others, axis=1, kind="stable")[:, :top_k].astype(np.int32)
        best = ids, np.take_along_axis(rows, ids, 1)
        return best if also is None else (*best, rows[:, also])

    def forward(
        self,
        tokens: Sequence[int],
        cache: Cache,
        all_logits: bool = False,
        *,
        top_k: int | None = None,
        cancel: Any = None,
    ) -> Any:
        assert not all_logits
        out = self.forward_batch([tokens], [cache], top_k=top_k, cancel=cancel)
        return out[0] if top_k is None else (out[0][0], out[1][0])

    def score(self, tokens: Sequence[int], cache: Cache, *, cancel: Any = None) -> np.ndarray:
        out = []
        for i, token in enumerate(tokens):
            if i:
                row = self.logits(cache.tokens).astype(np.float64)
                out.append(row[token] - np.log(np.exp(row).sum()))
            self.forward([token], cache, cancel=cancel)
        return np.array(out, np.float32)


def noise(tokens: Sequence[int]) -> np.ndarray:
    """Logits that depend on every token so far; control tokens are unlikely, so that texts have some length."""
    seed = hash(tuple(int(t) for t in tokens)) & 0xFFFFFFFF
    row = np.random.default_rng(seed).normal(0, 2, VOCAB).astype(np.float32)
    row[:12] -= 20
    row[len(PIECES) :] -= 20
    return row


def script(prompt_tokens: int, tokens: Sequence[int]) -> Callable[[list[int]], np.ndarray]:
    """Logits that say these tokens after a prompt of that length, then <eos>."""

    def logits(so_far: list[int]) -> np.ndarray:
        row = np.zeros(VOCAB, np.float32)
        at = len(so_far) - prompt_tokens
        row[tokens[at] if 0 <= at < len(tokens) else EOS] = 30
        return row

    return logits


def config(**changes: Any) -> Config:
    values: dict[str, Any] = dict(
        architecture="gemma", vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=8, context_length=CONTEXT, query_scale=1.0, bos_token_id=BOS, eos_token_ids=(EOS,),
    )  # fmt: skip
    return Config(**(values | changes))


def gemma(
    model: Any,
    *,
    words: Any = tokenizer,
    template: str | None = "a template",
    context: int = CONTEXT,
    deterministic: bool = False,
) -> Gemma:
    """A Gemma around a stand-in model."""
    return Gemma(model, config(), words, template, {"source": "fake", "deterministic": deterministic}, context)


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A thread that does the work, and a list that then holds what came of it."""
    out: list[Any] = []

    def run() -> None:
        try:
            out.append(work())
        except BaseException as error:  # the test looks at it
            out.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, out
