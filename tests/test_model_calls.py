"""The calls around the native Model: results, caches, cancelling, what is refused, and values that are not numbers.

`test_levels.py` runs the file again under every other instruction-set level.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import tiny
from engine import (
    RING,
    Array,
    GetModel,
    all_logits,
    build,
    check_tokens_beside_the_best,
    edited,
    random_tokens,
    same,
    steps,
)

from gemma_native import _native
from gemma_native.checkpoint import Checkpoint
from gemma_native.weights import open_checkpoint

# --- results: score, top_k, all_logits ---


@pytest.mark.parametrize("case", ["gemma3-mha", "gemma2:Q4_K"])  # the latter with a soft cap
def test_score(model: GetModel, case: str) -> None:
    m = model(case)
    tokens = random_tokens(600, 12)  # more than one pass
    cache = m.new_cache()
    scores = m.score(tokens, cache)
    assert scores.dtype == np.float32 and scores.shape == (599,) and cache.length == 600
    logprobs = reference.log_softmax(all_logits(m, tokens))
    np.testing.assert_allclose(scores, logprobs[np.arange(599), tokens[1:]], atol=2e-6, rtol=2e-6)
    # After other tokens, and cut elsewhere.
    cache = m.new_cache()
    m.forward(tokens[:77], cache)
    assert same(m.score(tokens[77:], cache), scores[77:])
    assert m.score(tokens[:1], m.new_cache()).shape == (0,)


def test_score_and_top_k_of_a_large_vocabulary(speck: Callable[..., Checkpoint]) -> None:
    vocab = 8192 * 2 + 37  # more than two of the slabs that score works in
    m = build(speck(vocab_size=vocab))
    tokens = random_tokens(20, 13, vocab)
    tokens[3:7] = 0, 8191, 8192, vocab - 1
    logits = all_logits(m, tokens)
    expected = reference.log_softmax(logits)[np.arange(19), tokens[1:]]
    np.testing.assert_allclose(m.score(tokens, m.new_cache()), expected, atol=2e-6, rtol=2e-6)
    for k in (1, 2, 64, 5000, vocab):
        ids, values = m.forward(tokens, m.new_cache(), top_k=k)
        order = np.lexsort((np.arange(vocab), -logits[-1]))[:k]
        np.testing.assert_array_equal(ids, order)
        assert values.tobytes() == logits[-1][order].tobytes()


@pytest.mark.parametrize("case", ["gemma2-gqa", "gemma:Q8_0"])
def test_tokens_beside_the_best(model: GetModel, case: str) -> None:
    check_tokens_beside_the_best(model(case))


@pytest.mark.parametrize("head", ["Q8_0", "Q6_K"])
def test_top_k_of_a_scanned_head(speck: Callable[..., Checkpoint], tmp_path: Path, head: str) -> None:
    """Most of the head is ruled out unread, at every position alike: the ids and bits stay those of all logits."""
    vocab = 4096 + 5
    if head == "Q8_0":
        m = build(speck(vocab_size=vocab), weights="int8")
    else:
        m = build(open_checkpoint(tiny.write_gguf(tmp_path / "a.gguf", "gemma", head, vocab_size=vocab)))
    assert m.encodings()["model.embed_tokens.weight"] == head
    tokens = random_tokens(60, 14, vocab)
    logits = all_logits(m, tokens)
    cache = m.new_cache()
    for i, token in enumerate(tokens):
        k = (1, 3, 40)[i % 3]
        ids, values = m.forward([token], cache, top_k=k)
        np.testing.assert_array_equal(ids, np.argsort(-logits[i], kind="stable")[:k])
        assert values.tobytes() == logits[i][ids].tobytes()


def test_a_head_on_which_the_scan_fails(speck: Callable[..., Checkpoint]) -> None:
    """Low bits that are all alike put a product far beyond what the high bits promise: the best are found all the same."""
    vocab, k = 1024, 256
    c = speck(vocab_size=vocab, hidden_size=k)
    high = np.random.default_rng(15).integers(0, 16, (vocab, k))
    high[5] = np.where(
        np.arange(k) % 2, 8, 6
    )  # 15 and -17: its product with itself is within bounds, that of the next is not
    high[6] = 8
    blocks = np.zeros((vocab, k // 32, 34), np.uint8)
    blocks[..., :2] = np.array([0.001], np.float16).view(np.uint8)
    blocks[..., 2:] = (16 * high + 15 - 128).astype(np.int8).view(np.uint8).reshape(vocab, -1, 32)
    tensors = {name: (d, shape, memoryview(bytes(len(data)))) for name, (d, shape, data) in c.tensors.items()}
    tensors["model.embed_tokens.weight"] = ("Q8_0", (vocab, k), memoryview(blocks.tobytes()))
    config = dataclasses.replace(c.config, final_softcap=0.0)
    for calls in ([[5], [6], [6]], [[5], [5, 6], [5, 6]]):
        m = _native.Model(config, tensors)
        for tokens in calls:
            ids, values = m.forward_batch([[t] for t in tokens], [m.new_cache() for _ in tokens], top_k=1)
            logits = m.forward_batch([[t] for t in tokens], [m.new_cache() for _ in tokens])
            np.testing.assert_array_equal(ids[:, 0], logits.argmax(-1))
            assert same(values[:, 0], logits.max(-1))


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_top_k_ties_go_to_the_lower_id(checkpoint: Callable[[str], Checkpoint], weights: str) -> None:
    c = checkpoint("gemma-mqa")

    def repeat(w: Array) -> None:
        w[:] = w[np.arange(len(w)) % 20]  # every row about sixteen times

    m = _native.Model(c.config, edited(c, "model.embed_tokens.weight", repeat), weights=weights)
    prompts = [random_tokens(n, n) for n in (1, 9, 30)]
    for k in (1, 3, 16, 50, 311):
        ids, values = m.forward_batch(prompts, [m.new_cache() for _ in prompts], top_k=k)
        assert ids.dtype == np.int32 and values.dtype == np.float32 and ids.shape == values.shape == (3, k)
        for i, prompt in enumerate(prompts):
            logits = m.forward(prompt, m.new_cache())
            assert len(np.unique(logits)) <= 20
            order = np.lexsort((np.arange(311), -logits))[:k]
            np.testing.assert_array_equal(ids[i], order)
            assert values[i].tobytes() == logits[order].tobytes()
            one = m.forward(prompt, m.new_cache(), top_k=k)
            assert same(one[0], ids[i]) and same(one[1], values[i])


def test_all_logits(model: GetModel) -> None:
    m = model("gemma3-scaled")
    tokens = random_tokens(130, 14)  # more than two slices of 64 rows
    logits = all_logits(m, tokens)
    assert logits.dtype == np.float32 and logits.shape == (130, 311)
    last = m.forward(tokens, m.new_cache())
    assert last.shape == (311,) and same(last, logits[-1])
    for kind in (np.int8, np.int16, np.uint16, np.int64, np.uint64):
        few = tokens[:20] % 100
        assert same(m.forward(few.astype(kind), m.new_cache()), m.forward(few, m.new_cache()))
    assert same(m.forward(tokens[::-1], m.new_cache()), m.forward([int(t) for t in tokens[::-1]], m.new_cache()))


# --- caches ---


def test_cache_capacity(model: GetModel) -> None:
    m = model("gemma-mqa")
    assert m.new_cache().capacity == 2048
    assert m.kv_bytes_per_token == 2 * 4 * 1 * 32 * 2 and model("gemma-mqa", kv="f32").kv_bytes_per_token == 1024
    tokens = random_tokens(11, 15)
    for call in (
        lambda c: m.forward(tokens, c),
        lambda c: m.forward(tokens, c, all_logits=True),
        lambda c: m.forward(tokens, c, top_k=2),
        lambda c: m.score(tokens, c),
        lambda c: m.forward_batch([tokens[:1], tokens], [m.new_cache(), c]),
    ):
        cache = m.new_cache(10)
        with pytest.raises(ValueError, match="0 of 10"):
            call(cache)
        assert cache.length == 0
        m.forward(tokens[:5], cache)
        with pytest.raises(ValueError, match="5 of 10"):
            call(cache)
        assert cache.length == 5  # nothing was computed
        m.forward(tokens[5:10], cache)
        assert cache.length == 10
    for capacity in (0, -1, 2049, 1 << 70):
        with pytest.raises((ValueError, TypeError)):
            m.new_cache(capacity)
    assert m.new_cache(2048).nbytes == 0  # memory is committed as it is used
    assert cache.nbytes >= 64 * m.kv_bytes_per_token


def test_truncate_rules(model: GetModel, speck_model: Any) -> None:
    m = model("gemma-mqa")  # full attention: any length
    tokens = random_tokens(200, 16)
    cache = m.new_cache()
    m.forward(tokens, cache)
    for bad in (201, -1):
        with pytest.raises(ValueError, match="200 positions"):
            cache.truncate(bad)
    cache.truncate(65)
    copy = cache.clone()  # of what is left
    assert copy.nbytes < cache.nbytes
    assert same(m.forward(tokens[65:], copy), m.forward(tokens[65:], cache))
    for n in (200, 199, 64, 1, 0, 0):
        cache.truncate(n)
        assert cache.length == n
    with pytest.raises(ValueError):
        cache.truncate(1)

    m = speck_model  # sliding layers hold RING positions, and see 64
    tokens = random_tokens(1300, 17, 61)
    cache = m.new_cache()
    m.forward(tokens[:RING], cache)
    cache.truncate(1)  # nothing is overwritten yet
    copy = cache.clone()
    expected = m.forward(tokens, m.new_cache())
    assert same(m.forward(tokens[1:], cache), expected)
    assert same(m.forward(tokens[1:], copy), expected)
    low = 1300 - RING + 64 - 1
    for n in (low - 1, 700, 100, 1):
        with pytest.raises(ValueError, match=f"back to {low} at most, or to 0"):
            cache.truncate(n)
        assert cache.length == 1300
    expected = m.forward(tokens[low:], (whole := m.new_cache(), m.forward(tokens[:low], whole))[0], all_logits=True)
    copy = cache.clone()
    cache.truncate(low)
    assert same(m.forward(tokens[low : low + 10], cache, all_logits=True), expected[:10])
    with pytest.raises(ValueError):  # slots of positions up to 1300 stay overwritten
        cache.truncate(low - 1)
    cache.truncate(low)
    assert same(m.forward(tokens[low:], cache, all_logits=True), expected)
    with pytest.raises(ValueError):
        copy.truncate(low - 1)
    copy.truncate(low)
    assert same(m.forward(tokens[low:], copy, all_logits=True), expected)
    copy.truncate(0)
    m.forward(tokens[:100], copy)
    copy.truncate(1)  # a new start has overwritten nothing
    assert same(m.forward(tokens[1:700], copy), m.forward(tokens[:700], m.new_cache()))


# --- cancelling ---


def set_once_running(flag: Callable[[], None], cache: Any) -> threading.Thread:
    """Calls flag() as soon as the cache holds something."""

    def wait() -> None:
        end = time.monotonic() + 60
        while cache.length == 0 and time.monotonic() < end:
            time.sleep(0.0002)
        flag()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("how", ["forward", "all_logits", "top_k", "batch", "score"])
def test_cancel_from_another_thread(speck_model: Any, how: str) -> None:
    m = speck_model
    tokens = random_tokens(4096, 18, 61)
    for _ in range(100):  # on a busy machine the other thread may come too late
        flag, cache = _native.CancelFlag(), m.new_cache()
        thread = set_once_running(flag.set, cache)
        try:
            if how == "score":
                m.score(tokens, cache, cancel=flag)
            elif how == "batch":
                m.forward_batch([tokens, tokens[:7]], [cache, m.new_cache()], cancel=flag)
            else:
                m.forward(tokens, cache, how == "all_logits", top_k=3 if how == "top_k" else None, cancel=flag)
        except _native.Cancelled:
            break
        finally:
            thread.join()
    else:
        pytest.fail("no call was cancelled")
    n = cache.length
    assert n % 512 == 0 and 0 < n < 4096
    # What was appended is whole: going on from there gives the bits of an undisturbed run.
    end = min(4096, n + 600)
    assert same(m.forward(tokens[n:end], cache), m.forward(tokens[:end], m.new_cache()))


def test_cancel_before_the_call(speck_model: Any) -> None:
    m = speck_model
    tokens = random_tokens(20, 19, 61)
    flag, cache = _native.CancelFlag(), m.new_cache()
    m.forward(tokens[:5], cache)
    flag.set()
    assert flag.is_set()
    for call in (
        lambda: m.forward(tokens[5:], cache, cancel=flag),
        lambda: m.forward_batch([tokens[5:]], [cache], cancel=flag),
        lambda: m.score(tokens[5:], cache, cancel=flag),
    ):
        with pytest.raises(_native.Cancelled):
            call()
        assert cache.length == 5
    fresh = _native.CancelFlag()
    assert same(m.forward(tokens[5:], cache, cancel=fresh), m.forward(tokens, m.new_cache())) and not fresh.is_set()


def test_cancel_while_waiting_for_another_call(speck_model: Any) -> None:
    m = speck_model
    long_flag, flag = _native.CancelFlag(), _native.CancelFlag()
    caches = [m.new_cache() for _ in range(8)]
    tokens = random_tokens(4096, 20, 61)

    def long_call() -> None:
        with contextlib.suppress(_native.Cancelled):
            m.forward_batch([tokens] * len(caches), caches, cancel=long_flag)

    thread = threading.Thread(target=long_call)
    thread.start()
    while caches[0].length == 0:
        time.sleep(0.0002)
    flag.set()
    other = m.new_cache()
    for call in (
        lambda: m.forward(tokens[:1], other, cancel=flag),
        lambda: other.truncate(0, cancel=flag),
        lambda: other.clone(cancel=flag),
    ):
        with pytest.raises(_native.Cancelled):
            call()
    assert caches[-1].length < 4096  # the other call was not waited for
    long_flag.set()
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads on this system")
def test_a_signal_stops_a_call(speck_model: Any) -> None:
    """As Ctrl-C does: a handler's exception comes out of the call, and the cache stands at a whole pass."""

    class Stop(Exception):
        pass

    def handler(*_: object) -> None:
        raise Stop

    m = speck_model
    tokens = np.concatenate([random_tokens(4096, 21, 61)])
    cache = m.new_cache()
    old = signal.signal(signal.SIGUSR1, handler)
    try:
        main = threading.get_ident()
        thread = set_once_running(lambda: signal.pthread_kill(main, signal.SIGUSR1), cache)
        with pytest.raises(Stop):
            for _ in range(1000):  # each call is short
                m.forward(tokens, cache)
                cache.truncate(0)
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, old)
    assert cache.length % 512 == 0
    cache.truncate(0)
    assert same(m.forward(tokens[:50], cache), m.forward(tokens[:50], m.new_cache()))


@pytest.mark.parametrize("raised", [KeyboardInterrupt, TimeoutError, MemoryError])
def test_an_interrupt_while_tokens_are_read(model: GetModel, raised: type[BaseException]) -> None:
    class Interrupted:
        def __array__(self, *args: Any, **kwargs: Any) -> Any:
            raise raised

    m = model("gemma-mqa")
    with pytest.raises(raised):
        m.forward(Interrupted(), m.new_cache())


# --- what is refused ---


def test_bad_tokens(model: GetModel) -> None:
    m = model("gemma-mqa")
    cache = m.new_cache()
    either = (ValueError, TypeError)
    bad: list[tuple[Any, Any, str]] = [
        ([], ValueError, "at least one"),
        (np.array([], np.int32), ValueError, "at least one"),
        ([1.0, 2.0], TypeError, "integers"),
        (np.ones(3), TypeError, "integers"),
        ([True, False], TypeError, "integers"),
        (["a"], TypeError, "integers"),
        ("abc", either, ""),
        ([[1, 2], [3, 4]], ValueError, "dimension"),
        (np.int32(3), ValueError, "dimension"),
        (5, ValueError, "dimension"),
        ([3, -1], ValueError, "-1"),
        ([311], ValueError, "311"),
        ([0, 1 << 31], ValueError, str(1 << 31)),
        ([0, 1 << 62], ValueError, str(1 << 62)),
        ([1 << 70], either, ""),
        (np.array([(1 << 64) - 1], np.uint64), ValueError, "id 18446744073709551615 is out"),
        (None, either, ""),
        ([None], either, ""),
    ]
    for tokens, error, text in bad:
        for call in (
            lambda t: m.forward(t, cache),
            lambda t: m.forward(t, cache, all_logits=True),
            lambda t: m.score(t, cache),
            lambda t: m.forward_batch([[1], t], [m.new_cache(), cache]),
        ):
            with pytest.raises(error) as info:
                call(tokens)
            assert any(part in str(info.value) for part in text.split("|"))
            assert cache.length == 0
    for top_k in (0, -1, 312):
        with pytest.raises(ValueError, match="top_k"):
            m.forward([1], cache, top_k=top_k)
    for also in ([311], [3, 2], [2, 2], [-1], [[1]]):
        with pytest.raises(ValueError):
            m.forward([1], cache, top_k=1, also=also)
    with pytest.raises(ValueError, match="also goes with top_k"):
        m.forward([1], cache, also=[1])
    with pytest.raises(ValueError, match="between 1 and 309"):
        m.forward([1], cache, top_k=310, also=[1, 2])
    assert cache.length == 0
    assert same(m.forward([1], cache), m.forward([1], m.new_cache()))


def test_bad_caches(model: GetModel) -> None:
    m, other = model("gemma-mqa"), model("gemma-mqa", kv="f32")
    cache, foreign = m.new_cache(), other.new_cache()
    for call in (
        lambda: m.forward([1], foreign),
        lambda: m.forward([1], foreign, all_logits=True),
        lambda: m.score([1, 2], foreign),
        lambda: m.forward_batch([[1], [2]], [cache, foreign]),
    ):
        with pytest.raises(ValueError, match="another model"):
            call()
    with pytest.raises(ValueError, match="share one cache"):
        m.forward_batch([[1], [2], [3]], [cache, m.new_cache(), cache])
    with pytest.raises(ValueError, match="2 token arrays but 1 caches"):
        m.forward_batch([[1], [2]], [cache])
    with pytest.raises(ValueError, match="no sequence"):
        m.forward_batch([], [])
    for none in (lambda: m.forward([1], None), lambda: m.forward_batch([[1]], [None]), lambda: m.score([1, 2], None)):
        with pytest.raises(TypeError):
            none()
    assert cache.length == foreign.length == 0


def test_bad_tensors(checkpoint: Callable[[str], Checkpoint]) -> None:
    c = checkpoint("gemma3-scaled")
    tensors = dict(c.tensors)
    q, norm = "model.layers.2.self_attn.q_proj.weight", "model.layers.1.self_attn.k_norm.weight"
    dtype, (rows, cols), data = tensors[q]

    def refused(changes: dict[str, Any], *parts: str, without: str | None = None, error: Any = ValueError) -> None:
        given = {n: t for n, t in {**tensors, **changes}.items() if n != without}
        with pytest.raises(error) as info:
            _native.Model(c.config, given)
        for part in parts:
            assert part in str(info.value)

    for name in (q, norm, "model.embed_tokens.weight", "model.norm.weight"):
        refused({}, name, "missing", without=name)
    refused({"model.layers.9.mlp.up_proj.weight": tensors[q]}, "model.layers.9.mlp.up_proj.weight", "not part")
    refused({q: (dtype, (cols, rows), data)}, q, f"[{cols}, {rows}]", f"[{rows}, {cols}]")
    refused({q: (dtype, (rows * cols,), data)}, q)
    refused({q: (dtype, (rows, cols, 1), data)}, q)
    refused({q: (dtype, (rows, cols), data[:-2])}, q, str(len(data) - 2), str(len(data)))
    refused({q: (dtype, (0, cols), data[:0])}, q)
    refused({q: (dtype, (-rows, -cols), data)}, q)
    refused({q: (dtype, (1 << 40, 1 << 40), data)}, q)
    refused({q: ("Q3_K", (rows, cols), data)}, q, "Q3_K")
    refused({q: ("TILED:BF16", (rows, cols), data)}, q, "BF16")
    refused({q: ("TILED:Q8_0", (rows, cols), data)}, q)
    refused({q: (dtype, (rows, cols))}, q)
    refused({q: data}, q)
    refused({q: ("F32", (rows, cols), np.zeros((rows, 2 * cols), np.float32)[:, ::2])}, q, "contiguous")
    refused({norm: ("BF16", (33,), bytes(66))}, norm, "[33]", "[32]")
    refused({norm: ("Q8_0", (32,), bytes(34))}, norm)
    refused({q: (dtype, (rows, cols), "text")}, error=(TypeError, RuntimeError, ValueError))


def test_bad_options_and_configs(checkpoint: Callable[[str], Checkpoint]) -> None:
    c = checkpoint("gemma-mqa")
    for options in (
        {"device": "tpu"},
        {"device": "cuda:x"},
        {"device": "cuda:"},
        {"device": "cudax"},
        {"kv": "f16"},
        {"weights": "int3"},
        {"threads": 0},
        {"threads": 5000},
    ):
        with pytest.raises(ValueError) as info:
            build(c, **options)
        assert str(*options.values()) in str(info.value)
    if _native.cuda_status():
        with pytest.raises(RuntimeError):
            build(c, device="cuda")
    for field, value in {
        "num_heads": 0,
        "num_kv_heads": 3,
        "head_dim": 31,
        "vocab_size": -1,
        "hidden_size": 1 << 40,
        "num_layers": 1 << 80,
        "query_scale": float("nan"),
        "rms_norm_eps": -1.0,
        "sliding_layers": (True,),
        "rope_scale": 0.0,
    }.items():
        with pytest.raises(ValueError, match=field):
            _native.Model(dataclasses.replace(c.config, **{field: value}), c.tensors)
    for field in ("hidden_size", "num_layers"):
        with pytest.raises((ValueError, TypeError)):
            _native.Model(dataclasses.replace(c.config, **{field: "8"}), c.tensors)
    with pytest.raises(AttributeError):
        _native.Model(object(), c.tensors)


def test_consumed_is_called_and_may_raise(checkpoint: Callable[[str], Checkpoint]) -> None:
    c = checkpoint("gemma:Q4_K")
    seen: dict[str, list[tuple[int, int]]] = {}

    def consumed(name: str, begin: int, end: int) -> None:
        seen.setdefault(name, []).append((begin, end))

    build(c, consumed=consumed)
    for name, (_, shape, data) in c.tensors.items():
        if len(shape) == 2:  # every byte, once
            parts = sorted(seen[name])
            assert parts[0][0] == 0 and parts[-1][1] == len(data)
            assert all(a[1] == b[0] for a, b in zip(parts, parts[1:], strict=False))

    def stop(*_: object) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        build(c, consumed=stop)


# --- values that are not numbers ---


@pytest.mark.parametrize(
    "name", ["model.embed_tokens", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.k_proj", "model.norm"]
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_numbers_do_not_crash(
    checkpoint: Callable[[str], Checkpoint], name: str, value: float
) -> None:
    c = checkpoint("gemma2-gqa")
    tensors = edited(c, name + ".weight", lambda w: w.reshape(-1).__setitem__(slice(0, 40), value))
    m = _native.Model(c.config, tensors)
    tokens = random_tokens(30, 22)
    assert all_logits(m, tokens).shape == (30, 311)
    assert m.score(tokens, m.new_cache()).shape == (29,)
    for k in (5, 311):
        ids, _ = m.forward(tokens, m.new_cache(), top_k=k)
        assert len(set(ids.tolist())) == k and ids.min() >= 0 and ids.max() < 311


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_a_bad_token_stays_in_its_sequence(checkpoint: Callable[[str], Checkpoint], weights: str) -> None:
    """A row of the embedding that is not a number, seen by one sequence alone; and a cache that held it is clean after truncate."""
    c = checkpoint("gemma2-gqa")
    if weights == "int8":
        c = checkpoint("gemma2:Q8_0")
        dtype, shape, data = c.tensors["model.embed_tokens.weight"]
        raw = np.frombuffer(data, np.uint8).reshape(shape[0], -1).copy()
        raw[300, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
        tensors = {**c.tensors, "model.embed_tokens.weight": (dtype, shape, memoryview(raw.tobytes()))}
    else:
        tensors = edited(c, "model.embed_tokens.weight", lambda w: w.__setitem__(300, np.nan))
    m = _native.Model(c.config, tensors)
    good = random_tokens(40, 23, 300)
    bad = np.concatenate([good[:10], [300], good[10:]])
    clean = m.forward(good, m.new_cache())
    assert np.isnan(clean[300]) and np.isfinite(np.delete(clean, 300)).all()
    caches = [m.new_cache() for _ in range(3)]
    m.forward(bad[:10], caches[0])
    batch = m.forward_batch([bad[10:], good, bad], caches)
    assert same(batch[1], clean) and np.isnan(batch[0]).all() and np.isnan(batch[2]).all()
    caches[0].truncate(10)
    assert same(m.forward(good[10:], caches[0]), clean)
    caches[2].truncate(0)
    assert same(m.forward(good, caches[2]), clean)


@pytest.mark.parametrize("case", ["gemma2-gqa", "gemma3-mqa"])
def test_a_bad_value_does_not_reach_earlier_positions(checkpoint: Callable[[str], Checkpoint], case: str) -> None:
    """A masked value is never used, not even times 0: prefill equals decode when a later token's value is NaN."""
    c = checkpoint(case)
    m = _native.Model(c.config, edited(c, "model.embed_tokens.weight", lambda w: w.__setitem__(300, np.nan)))
    tokens = np.arange(20, 90, dtype=np.int32)
    tokens[41] = 300  # not the first of the tokens that share a tile
    prefill = m.forward(tokens, m.new_cache(), all_logits=True)
    assert np.isfinite(np.delete(prefill[:41], 300, axis=1)).all()
    assert np.isnan(prefill[41]).all()
    assert same(prefill[:41], steps(m, tokens[:41], [1]))
