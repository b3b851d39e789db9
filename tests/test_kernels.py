"""Every kernel against float64, on odd sizes, with tolerances from eps and norms.

The file runs under the instruction-set level that this process chose; `test_levels.py` runs it again under every other level.
"""

from __future__ import annotations

import zlib

import gguf
import numpy as np
import pytest
import reference

from gemma_native import _native, packed

T = _native.testing
EPS = 2.0**-24  # half a unit in the last place of float32
BLOCK = {"Q8_0": 32, "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q4_K": 256, "Q5_K": 256, "Q6_K": 256}
SIZES = {
    k: (n, v)
    for k, (n, v) in {q.name: gguf.GGML_QUANT_SIZES[q] for q in gguf.GGMLQuantizationType}.items()
    if k in BLOCK
}


def random_blocks(name: str, rows: int, k: int, rng: np.random.Generator) -> bytes:
    """Valid random blocks of a GGUF type: any quants, small finite scales."""
    block, size = SIZES[name]
    n = rows * k // block
    raw = rng.integers(0, 256, (n, size), dtype=np.uint8)
    halves = {
        "Q8_0": [0],
        "Q4_0": [0],
        "Q4_1": [0, 2],
        "Q5_0": [0],
        "Q5_1": [0, 2],
        "Q4_K": [0, 2],
        "Q5_K": [0, 2],
        "Q6_K": [208],
    }
    for at in halves[name]:
        scale = (rng.uniform(0.5, 1.5, n) * rng.choice([-1, 1], n) * 0.01).astype(np.float16)
        raw[:, at : at + 2] = scale.view(np.uint8).reshape(n, 2)
    if name == "Q8_0":
        raw[:, 2:][raw[:, 2:] == 128] = 127  # -128 does not occur in files
    return raw.tobytes()


def dequantize(name: str, data: bytes, rows: int, k: int) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[name]
    return gguf.quants.dequantize(np.frombuffer(data, np.uint8).reshape(rows, -1), kind).reshape(rows, k)


def quantized_activations(x: np.ndarray, block: int) -> np.ndarray:
    """What the kernels' int8 blocks of 32 (or 16) make of x."""
    m, k = x.shape
    b = x.reshape(m, -1, block)
    top = np.abs(b).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    q = np.rint(b * inverse).astype(np.float64)
    return (q * (top * np.float32(1 / 127))).reshape(m, k)


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("m", [1, 2, 3, 5, 63, 64, 65, 130])
@pytest.mark.parametrize("name", BLOCK)
def test_quantized_product(name: str, m: int, fine: bool) -> None:
    rng = np.random.default_rng([m, len(name), ord(name[1])])
    for rows, k in ((1, BLOCK[name]), (31, 256), (33, 768), (70, 512)):
        data = random_blocks(name, rows, k, rng)
        w = dequantize(name, data, rows, k).astype(np.float64)
        x = (rng.standard_normal((m, k)) * np.exp(rng.standard_normal((m, k)))).astype(np.float32)
        y = T.product(name, data, rows, k, x, threads=2, fine=fine)
        q = quantized_activations(x, 16 if fine else 32)
        # Each of K/16 fused additions rounds once, relative to the partial sums, which |w| |q| bounds (offsets included).
        bound = (k // 16 + 8) * 2 * EPS * (np.abs(q) @ (np.abs(w) + np.abs(w).max()).T) + 1e-30
        assert y.shape == (m, rows)
        assert (np.abs(y - q @ w.T) <= bound).all()
        # And the quantisation of activations costs at most half a step a value.
        step = np.abs(x).reshape(m, -1, 32).max(-1).repeat(32, 1) / 127
        assert (np.abs(y - x.astype(np.float64) @ w.T) <= bound + 0.51 * step @ np.abs(w).T).all()


# Where a block's quants lie, high bits included.
QUANTS = {
    "Q8_0": slice(2, 34),
    "Q4_0": slice(2, 18),
    "Q4_1": slice(4, 20),
    "Q5_0": slice(2, 22),
    "Q5_1": slice(4, 24),
    "Q4_K": slice(16, 144),
    "Q5_K": slice(16, 176),
    "Q6_K": slice(0, 192),
}


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("name", BLOCK)
def test_largest_sums_fit(name: str, fine: bool) -> None:
    """Weights and activations at the ends of their ranges, where 16-bit sums come nearest to overflowing."""
    rng = np.random.default_rng(9)
    rows, k = 40, 256
    size = SIZES[name][1]
    raw = np.frombuffer(random_blocks(name, rows, k, rng), np.uint8).reshape(rows, -1, size).copy()
    ends = [0x7F, 0x81] if name == "Q8_0" else [0xFF, 0x00]
    raw[:, :, QUANTS[name]] = rng.choice(ends, (rows, 1, 1))
    raw[-8:, :, QUANTS[name]] = rng.choice(ends, raw[-8:, :, QUANTS[name]].shape)
    data = raw.tobytes()
    w = dequantize(name, data, rows, k).astype(np.float64)
    x = np.concatenate([np.ones((8, k)), -np.ones((8, k)), rng.choice([-1, 1], (48, k))]).astype(np.float32)
    y = T.product(name, data, rows, k, x, fine=fine)
    bound = (k // 16 + 8) * 2 * EPS * (np.abs(x) @ (np.abs(w) + np.abs(w).max()).T)
    assert (np.abs(y - quantized_activations(x, 32) @ w.T) <= bound).all()
    for i in (0, 8, 63):
        assert T.product(name, data, rows, k, x[i : i + 1], fine=fine).tobytes() == y[i].tobytes()


@pytest.mark.parametrize("m", [1, 2, 5, 6, 7, 13, 49, 100])
def test_bf16_product(m: int) -> None:
    rng = np.random.default_rng(m)
    for rows, k in ((1, 1), (3, 31), (32, 32), (33, 100), (70, 333), (5, 4096), (4, 4097), (37, 8200)):
        w16 = (rng.standard_normal((rows, k)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        w = (w16.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        x = rng.standard_normal((m, k)).astype(np.float32)
        y = T.product("BF16", w16.tobytes(), rows, k, x, threads=2)
        # Activations stay float32, except where bf16 instructions round them (8 bits of precision).
        rounding = 2.0**-8 if _native.bf16_instructions() else 0.0
        bound = ((k / 16 + 8) * 2 * EPS + rounding) * (np.abs(x).astype(np.float64) @ np.abs(w).T)
        assert (np.abs(y - x.astype(np.float64) @ w.T) <= bound).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "grain"), [(1, 1), (2, 1), (7, 3), (64, 1), (1000, 16), (1001, 16), (5, 9)])
def test_pieces_of_a_loop(threads: int, count: int, grain: int) -> None:
    """Each item once, also after a loop that ended early; the threads go through their shares in order."""
    for fail in (-1, 0, count // 2, count - 1):
        pieces = sorted(T.pieces(threads, count, grain, fail))
        begins, ends, more = zip(*pieces, strict=True)
        assert begins == (0, *ends[:-1]) and ends[-1] == count
        assert all(begin % grain == 0 for begin in begins)
        assert not any(m and end == count for _, end, m in pieces)
        if threads == 1 or count <= grain:
            assert pieces == [(0, count, False)]


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("name", [*BLOCK, "BF16"])
def test_product_bits_do_not_depend_on_company_or_threads(name: str, fine: bool) -> None:
    rng = np.random.default_rng(7)
    rows, k, m = 100, 768, 150
    if name == "BF16":
        data = (rng.standard_normal((rows, k)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    else:
        data = random_blocks(name, rows, k, rng)
    x = rng.standard_normal((m, k)).astype(np.float32)

    def product(first: int, end: int, threads: int = 2) -> bytes:
        return T.product(name, data, rows, k, x[first:end], threads=threads, fine=fine).tobytes()

    together, row = product(0, m, threads=1), 4 * rows
    for threads in (2, 3):
        assert product(0, m, threads) == together
    for a, b in ((0, 1), (1, 2), (63, 64), (64, 65), (149, 150), (3, 5), (7, 20), (40, 63), (60, 85)):
        assert product(a, b) == together[a * row : b * row]
    for n in range(1, 19):  # a kernel for each of the first few numbers of rows
        assert product(n, 2 * n) == together[n * row : 2 * n * row]


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("name", BLOCK)
def test_a_short_last_chunk_has_the_same_bits(name: str, fine: bool) -> None:
    """K long enough to be taken in two steps, of which the second adds to the first: few rows beyond 64, and the 64."""
    rng = np.random.default_rng(11)
    rows, k = 33, 4352
    data = random_blocks(name, rows, k, rng)
    x = rng.standard_normal((73, k)).astype(np.float32)
    alone = b"".join(T.product(name, data, rows, k, x[i : i + 1], fine=fine).tobytes() for i in range(64, 73))
    for n in range(1, 10):
        y = T.product(name, data, rows, k, x[: 64 + n], fine=fine)
        assert y[64:].tobytes() == alone[: 4 * n * rows]
    for m in (20, 73):
        y = T.product(name, data, rows, k, x[:m], fine=fine)
        for i in (0, 15, 16, 19):
            assert y[i].tobytes() == T.product(name, data, rows, k, x[i : i + 1], fine=fine).tobytes()


@pytest.mark.parametrize(
    ("rows", "k"), [(1, 1), (3, 17), (15, 32), (17, 333), (33, 2047), (40, 2049), (16, 4130), (7, 8230)]
)
def test_bf16_bits_do_not_depend_on_company(rows: int, k: int) -> None:
    """Few rows and many go through different kernels, K through spans, and the last step of a row may be short."""
    rng = np.random.default_rng(k)
    data = (rng.standard_normal((rows, k)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    x = rng.standard_normal((131, k)).astype(np.float32)
    alone = b"".join(T.product("BF16", data, rows, k, x[i : i + 1]).tobytes() for i in range(131))
    for m in (2, 3, 4, 5, 6, 7, 8, 9, 11, 17, 32, 33, 48, 49, 63, 64, 65, 80, 131):
        assert T.product("BF16", data, rows, k, x[:m], threads=2).tobytes() == alone[: 4 * rows * m], m


@pytest.mark.parametrize(("rows", "k"), [(300, 64), (309, 96), (530, 2048), (518, 2144), (530, 2304), (260, 4128)])
def test_bf16_weights_packed_in_passing(rows: int, k: int) -> None:
    """Work items of several panels: while one is multiplied the next one is packed, if all its spans are alike (not with 2,144)."""
    rng = np.random.default_rng(k)
    data = (rng.standard_normal((rows, k)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    x = rng.standard_normal((135, k)).astype(np.float32)
    # Rows of activations: every number of words that a tile packs, and two chunks and three.
    several = (7, 13, 20, 64, 66, 135)
    alone = {i: T.product("BF16", data, rows, k, x[i : i + 1]).tobytes() for m in several for i in (0, m // 2, m - 1)}
    for m in several:
        y = T.product("BF16", data, rows, k, x[:m], threads=1)
        for i in (0, m // 2, m - 1):
            assert y[i].tobytes() == alone[i], (m, i)


def test_more_rows_than_a_sweep() -> None:
    """The amx level sums up to 512 rows of a panel at a time."""
    rng = np.random.default_rng(3)
    rows, k, m = 1300, 72, 1100
    data = (rng.standard_normal((rows, k)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    x = rng.standard_normal((m, k)).astype(np.float32)
    y = T.product("BF16", data, rows, k, x, threads=2)
    for i in (0, 511, 512, 575, 1023, 1024, 1099):
        assert y[i].tobytes() == T.product("BF16", data, rows, k, x[i : i + 1]).tobytes(), i


@pytest.mark.parametrize("m", [3, 40, 70])
def test_bad_activations_stay_bad_with_bf16(m: int) -> None:
    rng = np.random.default_rng(m)
    data = (rng.standard_normal((40, 100)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    x = np.ones((m, 100), np.float32)
    x[1, 77] = np.nan
    x[m - 1, 99] = np.inf
    bad = ~np.isfinite(T.product("BF16", data, 40, 100, x))
    assert bad[[1, m - 1]].all() and bad.sum() == 80


@pytest.mark.parametrize("name", BLOCK)
def test_bad_activations_stay_bad(name: str) -> None:
    """NaN or infinity in a row reaches that row's result, and no other's."""
    data = random_blocks(name, 32, 256, np.random.default_rng(0))
    for m in (3, 20):
        x = np.ones((m, 256), np.float32)
        x[1, 77] = np.nan
        x[2, 3] = np.inf
        y = T.product(name, data, 32, 256, x)
        assert np.isnan(y[1:3]).all() and np.isfinite(np.delete(y, [1, 2], 0)).all()


@pytest.mark.parametrize("name", BLOCK)
def test_tiling(name: str) -> None:
    """Panels hold exactly the file's values, in at most 2 % more bytes."""
    rng = np.random.default_rng(3)
    for rows, k in ((1, 256), (31, 512), (32, 256), (65, 1024)):
        data = random_blocks(name, rows, k, rng)
        tiled = T.tile(name, data, rows, k)
        assert len(tiled) <= 1.02 * len(data) * (-(-rows // 32) * 32) / rows
        assert T.untile(name, tiled, rows, k) == data
        expected = dequantize(name, data, rows, k)
        np.testing.assert_array_equal(T.dequantize(name, data, rows, k), expected)
        np.testing.assert_array_equal(T.dequantize("TILED:" + name, tiled, rows, k), expected)


def test_panels_of_rows_that_are_no_whole_blocks() -> None:
    """A packed file may say so; only of blocks of 32 does the kernels' zero padding stand in for the rest."""
    x = np.ones((1, 264), np.float32)
    assert T.product("TILED:Q8_0", bytes(9 * 1088), 32, 264, x).shape == (1, 32)
    for name, unit in {"Q4_K": 4608, "Q5_K": 5632, "Q6_K": 6720}.items():
        with pytest.raises(ValueError, match=f"rows of 264 values, not a multiple of {name}'s block of 256"):
            T.product("TILED:" + name, bytes(2 * unit), 32, 264, x)


def test_layout_of_tiles() -> None:
    """Packed files hold tiles: another layout (docs/FORMATS.md) makes them files of another format."""
    tiles = {}
    for name in BLOCK:
        data = random_blocks(name, 65, 512, np.random.default_rng(3))
        tiles[name] = zlib.crc32(T.tile(name, data, 65, 512))
    assert (packed.VERSION, tiles) == (
        "4",
        {
            "Q8_0": 0xC381D33D,
            "Q4_0": 0x86A436A5,
            "Q4_1": 0x9736E80B,
            "Q5_0": 0x3A47880F,
            "Q5_1": 0xABCE702A,
            "Q4_K": 0xC89CCB44,
            "Q5_K": 0x9FB3547D,
            "Q6_K": 0xA44255C6,
        },
    )


BYTES_OF_D = {"Q8_0": slice(0, 2), "Q6_K": slice(208, 210)}  # of the encodings whose low bits lie apart


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize(("name", "rows", "k"), [("Q8_0", 4096 + 7, 640), ("Q8_0", 2100, 96), ("Q6_K", 4096 + 7, 768)])
def test_head_scan(name: str, rows: int, k: int, fine: bool) -> None:
    """What the scan rules out is not among the best, and where one token stands out it rules out nearly everything."""
    rng = np.random.default_rng(rows)
    if name == "Q8_0":
        size = np.exp(rng.standard_normal((rows, 1)) / 4)
        data = T.quantize(name, (rng.standard_normal((rows, k)) * size).astype(np.float32))
    else:
        data = random_blocks(name, rows, k, rng)
    w = dequantize(name, data, rows, k)
    w /= w.std()
    for trial in range(24):
        m = trial // 2 % 8 + 1
        x = rng.standard_normal((m, k)).astype(np.float32)
        x[:, rng.integers(k)] *= 30  # one large activation, as models have
        if trial % 2:
            x += 3 * w[rng.integers(rows, size=m)]
        y = T.product(name, data, rows, k, x, fine=fine)
        for best in (1, 5):
            panels = T.reachable(name, data, rows, k, x, best, fine=fine)
            assert panels == sorted(set(panels)) and 0 <= panels[0] and panels[-1] <= rows // 32
            wanted = np.argsort(-y, axis=1, kind="stable")[:, :best]
            assert set((wanted // 32).ravel()) <= set(panels)
        if trial % 2 and k > 96:
            assert len(T.reachable(name, data, rows, k, x, 1, fine=fine)) <= 4 * m


def scales_and_values(name: str, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of file blocks [rows, n, bytes] of Q8_0 or Q6_K: a scale every 16 values [rows, k / 16], and the values [rows, k] from 0 on."""
    rows = len(raw)
    d = raw[..., BYTES_OF_D[name]].copy().view(np.float16).astype(np.float64)
    if name == "Q8_0":
        return d.repeat(2, -1).reshape(rows, -1), raw[..., 2:].view(np.int8).astype(np.int64).reshape(rows, -1) + 128
    bare = raw.copy()
    bare[..., 192:208] = 1
    bare[..., 208:] = np.array([1], np.float16).view(np.uint8)
    values = dequantize(name, bare.tobytes(), rows, raw.shape[1] * 256).astype(np.int64) + 32
    return (d * raw[..., 192:208].view(np.int8)).reshape(rows, -1), values


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("name", BYTES_OF_D)
@pytest.mark.parametrize(
    ("rows", "k", "m"),
    [(75, 768, 1), (33, 512, 2), (64, 256, 3), (33, 768, 4), (40, 512, 5), (96, 2048, 7), (33, 256, 13)],
)
def test_bounds_of_the_scan(name: str, rows: int, k: int, m: int, fine: bool) -> None:
    """The middle of what the high bits leave open, give or take 8 standard deviations; of the rows that count."""
    rng = np.random.default_rng(rows)
    panels = -(-rows // 32)
    blocks = np.frombuffer(random_blocks(name, rows, k, rng), np.uint8).reshape(rows, -1, SIZES[name][1]).copy()
    blocks[31, 0, BYTES_OF_D[name]] = np.array([np.nan], np.float16).view(np.uint8)  # a row without a product
    scales, values = scales_and_values(name, blocks)
    steps, offset = (16, 128) if name == "Q8_0" else (4, 32)  # as many values share their high bits
    x = rng.standard_normal((m, k)) + 1.5  # a sum far from zero shows where the middle is
    x = (x.reshape(m, -1, 32) * np.exp2(rng.integers(-9, 1, (m, k // 32, 1)))).reshape(m, k).astype(np.float32)
    size = 16 if fine else 32
    d = np.abs(x).reshape(m, -1, size).max(-1) * np.float32(1 / 127)
    q = np.rint(quantized_activations(x, size).reshape(m, -1, size) / d[..., None])
    # Rounded once more: a block's unit is the row's largest scale over a power of two, at most twice its own.
    d = d.repeat(size // 16, -1)
    largest = d.reshape(m, -1, 2).max(-1).repeat(2, -1)
    row = d.max(-1, keepdims=True)
    unit = row * np.exp2(-np.maximum(0, np.ceil(np.log2(row / largest) - 1))).astype(np.float32)
    q = np.floor(q.reshape(m, -1, 16).astype(np.float32) * (d / unit)[..., None] + np.float32(0.5)).astype(np.int64)
    together = 1 if name == "Q6_K" else 2  # halves whose sums are one integer
    start = np.rint(((steps - 1) / 2 - offset) / steps * q.sum(-1).reshape(m, -1, together).sum(-1))
    high = (values // steps).reshape(rows, -1, 16)
    dots = np.einsum("mbi,rbi->mrb", q, high).reshape(m, rows, -1, together).sum(-1) + start[:, None]
    middle = steps * (dots * unit[:, None, ::together] * scales[:, ::together]).sum(-1)
    # Of low bits; of weights, times roundings.
    variance = (steps**2 - 1) / 12 * (q**2).sum(-1) + 16 * offset**2 / 3 / 12
    margin = 8 * np.sqrt((unit**2 * variance) @ (scales**2).T)
    apart = rng.random(panels * 32) < 0.3
    apart[rows:] = False
    bits = (apart.reshape(panels, 32) @ (1 << np.arange(32, dtype=np.uint64))).astype(int).tolist()
    counts = ~apart
    counts[31] = False
    counts[rows:] = False
    low, high = np.array(T.head_bounds(name, blocks.tobytes(), rows, k, x, fine, bits)).reshape(2, m, panels)
    for bound, value in ((low, middle - margin), (high, middle + margin)):
        value = np.pad(value, ((0, 0), (0, panels * 32 - rows)))
        wanted = np.where(counts, value, -np.inf).reshape(m, panels, 32).max(-1)
        if bound is high and not apart[31]:
            wanted[:, 0] = np.inf  # it may be the best
        np.testing.assert_allclose(bound, wanted, rtol=1e-5, atol=1e-5 * np.nanmax(np.abs(value)))


@pytest.mark.parametrize("best", [1, 3])
def test_what_the_scan_leaves(best: int) -> None:
    """Panels whose upper bound reaches a row's bar: the best products of the panels with the best lower bounds."""
    rng = np.random.default_rng(6)
    rows, k, m = 16384 - 5, 256, 3
    w = rng.standard_normal((rows, k)).astype(np.float32)
    x = rng.standard_normal((m, k)).astype(np.float32)
    w[3200], w[3201] = x[0], x[0] / 5  # the best of a panel is no measure, but the second best is
    data = T.quantize("Q8_0", w)
    also = [7, *range(32, 64), 3200]  # and a whole panel is none
    apart = [0] * (rows // 32 + 1)
    for row in also:
        apart[row // 32] |= 1 << row % 32
    low, high = np.array(T.head_bounds("Q8_0", data, rows, k, x, False, apart)).reshape(2, m, -1)
    y = np.pad(T.product("Q8_0", data, rows, k, x), ((0, 0), (0, 5)), constant_values=-np.inf)
    y[:, also] = -np.inf
    most = y.reshape(m, -1, 32).max(-1)
    first = np.unique(np.argsort(-low, axis=1)[:, :best])
    bar = np.sort(most[:, first], axis=1)[:, -best]
    left = (high >= bar[:, None]).any(0)
    left[[0, 1, 100]] = True
    assert T.reachable("Q8_0", data, rows, k, x, best, also=also, calls=2) == np.flatnonzero(left).tolist()
    assert left.sum() < (high >= np.sort(low, axis=1)[:, -best, None]).any(0).sum()  # by the bounds alone


def test_head_scan_knows_its_limits() -> None:
    rng = np.random.default_rng(2)
    rows, k = 2048, 64
    w = rng.standard_normal((rows, k)).astype(np.float32)
    data, x = T.quantize("Q8_0", w), 50 * w[:1]
    everything = list(range(rows // 32))
    assert len(T.reachable("Q8_0", data, rows, k, x, 1)) < 5
    # Listed rows are wanted whatever their product, and say nothing of the others: without the best the next best count.
    far = [5, 70, rows - 1]
    assert {r // 32 for r in far} <= set(T.reachable("Q8_0", data, rows, k, x, 1, also=far))
    exact = T.product("Q8_0", data, rows, k, x[:1])[0]
    top = int(exact.argmax())
    second = int(np.delete(exact, top).argmax())
    second += second >= top
    assert second // 32 in T.reachable("Q8_0", data, rows, k, x[:1], 1, also=[top])
    assert T.reachable("Q8_0", data, rows, k, x, 41) == everything  # too many to be worth a scan
    assert T.reachable("Q8_0", data, rows, k, np.repeat(x, 9, 0), 1) == everything
    assert T.reachable("Q8_0", data, rows, k, x, 1, softcap=30.0) == everything  # saturated: different products may tie
    assert len(T.reachable("Q8_0", data, rows, k, x / 100, 1, softcap=30.0)) < 5
    below, ones = T.quantize("Q8_0", np.abs(w) + 1), np.ones((1, k), np.float32)  # all products of -ones are negative
    assert T.reachable("Q8_0", below, rows, k, -ones, 1, softcap=10.0) == everything
    assert len(T.reachable("Q8_0", below, rows, k, -ones / 10, 1, softcap=10.0)) < len(everything)
    assert T.reachable("Q8_0", data, rows, k, 0 * x, 1) == everything
    row = k // 32 * 34
    no_number = data[: 100 * row] + np.float16(np.nan).tobytes() + data[100 * row + 2 :]
    assert T.reachable("Q8_0", no_number, rows, k, 0 * x, 1) == everything
    tiny = np.float32(1e-25) * x  # whose squares are nothing
    assert len(T.reachable("Q8_0", data, rows, k, tiny, 1)) < 5
    x[0, 3] = np.nan
    assert T.reachable("Q8_0", data, rows, k, x, 1) == everything
    data, x = random_blocks("Q6_K", rows, 256, rng), np.eye(1, 256, dtype=np.float32)
    assert len(T.reachable("Q6_K", data, rows, 256, np.repeat(x, 8, 0), 1)) < len(everything)
    assert T.reachable("Q6_K", data, rows, 256, np.repeat(x, 9, 0), 1) == everything
    with pytest.raises(ValueError, match="Q4_0 is not scanned"):
        T.reachable("Q4_0", T.quantize("Q4_0", w), rows, k, x, 1)


def test_head_scan_pauses_where_it_does_not_pay() -> None:
    rng = np.random.default_rng(5)
    rows, k = 2048, 256
    data, x = random_blocks("Q6_K", rows, k, rng), np.eye(1, k, dtype=np.float32)
    left = [len(T.reachable("Q6_K", data, rows, k, x, 1, calls=calls)) for calls in range(1, 11)]
    some = left[1]
    assert rows // 32 / 4 <= some < rows // 32
    every = rows // 32  # in the first call, which checks the estimates, and in the pauses
    assert left == [every, some, every, some, every, every, some, every, every, every]


@pytest.mark.parametrize("name", BYTES_OF_D)
def test_head_scan_ends_where_low_bits_are_not_random(name: str) -> None:
    """A head that was quantised to 4 bits before: all low bits are 0, and estimates are off by the sum of the activations."""
    rng = np.random.default_rng(4)
    rows, k = 4096, 768
    raw = np.frombuffer(random_blocks(name, rows, k, rng), np.uint8).reshape(rows, -1, SIZES[name][1]).copy()
    if name == "Q8_0":
        raw[..., 2:] &= 0xF0
    else:
        raw[..., :128] &= 0xCC  # of the low nibbles, the two lower bits of each
    data = raw.tobytes()
    w = dequantize(name, data, rows, k)
    x = w[:1] / w[:1].std() + rng.standard_normal((1, k)).astype(np.float32)
    x -= x.mean()
    assert len(T.reachable(name, data, rows, k, x, 1)) < 8  # without a sum they are not off
    panels = T.reachable(name, data, rows, k, x + 2, 1)
    assert panels == list(range(rows // 32))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_encoding_weights(name: str) -> None:
    x = np.random.default_rng(5).standard_normal((9, 320)).astype(np.float32)
    back = T.dequantize(name, T.quantize(name, x), 9, 320)
    kind = gguf.GGMLQuantizationType[name]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    assert ((back - x) ** 2).sum() <= 1.0001 * ((theirs - x) ** 2).sum()  # no worse than the format's own encoder


def encoded(name: str, x: np.ndarray) -> bytes:
    """The encoders in NumPy, a block after the other: Q8_0 rounds to nearest, Q4_0 takes the best of 17 scales."""
    f, out = np.float32, b""
    for v in np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(-1, 32):
        top = v[np.abs(v).argmax()]  # the first of several
        if name == "Q8_0":
            d = np.abs(top) / f(127)
            q = v * (f(1) / d if d >= np.finfo(f).tiny else f(0))
            out += np.float16(d).tobytes() + np.trunc(q + np.copysign(0.5, q.astype(float))).astype(np.int8).tobytes()
            continue
        best = f(np.inf), f(0), np.zeros(32, np.uint8)
        for s in range(-8, 9):
            d = f(np.float16(top / (f(-8) + f(0.1) * f(s))))
            q = np.trunc(np.clip(v * (f(1) / d if d else f(0)) + f(8.5), 0, 15))
            error = f(0)
            for e in v - d * (q - f(8)):
                error += e * e
            if error < best[0]:
                best = error, d, q.astype(np.uint8)
        out += np.float16(best[1]).tobytes() + (best[2][:16] | best[2][16:] << 4).tobytes()
    return out


@pytest.mark.parametrize("k", [96, 77])
@pytest.mark.parametrize(("name", "limit"), [("Q8_0", 65504 * 127), ("Q4_0", 65504 * 8)])
def test_encoding_to_the_byte(name: str, limit: float, k: int) -> None:
    x = np.random.default_rng(k).standard_normal((8, k)).astype(np.float32)
    x[1, [3, 9, 20]] = -5, 5, 5  # the farthest from zero, on either side
    x[2, [3, 9, 20]] = 5, -5, -5
    x[3] *= 1e-6  # scales that are denormal in half precision
    x[4] *= 1e-39
    x[5] = 0
    x[6, 40] = limit
    x[7] = np.round(2 * x[7]) / 2  # between two values
    x[7, ::32] = 127
    with np.errstate(all="ignore"):
        assert T.quantize(name, x) == T.quantize(name, x, by_kernels=True) == encoded(name, x)
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match=f"a weight is -?{abs(bad)}: only finite values"):
            T.quantize(name, np.where(np.arange(k) == k - 1, np.float32(bad), x))
    with pytest.raises(ValueError, match=f"{name} reaches .* at most"):
        T.quantize(name, np.where(np.arange(k) == k - 1, np.float32(-1.001 * limit), x))


@pytest.mark.parametrize("size", [1e-9, 1e-3, 1, 1e3])
def test_encoding_in_vectors_is_the_same(size: float) -> None:
    """What loading as int4 writes is what the scalar encoder would write."""
    rng = np.random.default_rng(6)
    x = (size * rng.standard_normal((300, 336)) * np.exp(rng.standard_normal((300, 1)))).astype(np.float32)
    x[:, ::7] = np.round(x[:, ::7] / size) * size
    x[5, :64] = 0
    assert T.quantize("Q4_0", x, by_kernels=True) == T.quantize("Q4_0", x)


@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 33, 640, 1153])
def test_pointwise(n: int) -> None:
    rng = np.random.default_rng(n)
    x = (rng.standard_normal(n) * 4).astype(np.float32)
    y = rng.standard_normal(n).astype(np.float32)
    x64 = x.astype(np.float64)

    norm = x64 / np.sqrt((x64**2).mean() + 1e-6) * y
    assert (np.abs(T.rms_norm(x, y, 1e-6) - norm) <= (n / 8 + 8) * EPS * np.abs(norm) + 1e-30).all()

    gelu = 0.5 * x64 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x64 + 0.044715 * x64**3))) * y
    assert (np.abs(T.geglu(x, y) - gelu) <= 1e-6 * np.abs(gelu) + 1e-6 * np.abs(x64 * y) * (x64 < 0) + 1e-30).all()

    for cap in (30.0, 1.0):
        soft = cap * np.tanh(x64 / cap)
        assert (np.abs(T.softcap(x, cap) - soft) <= 1e-6 * np.abs(soft) + 1e-30).all()

    top, total = T.log_sum(x)
    assert top == x.max()
    assert abs(total - np.exp(x64 - top).sum()) <= (n + 8) * 4 * EPS * total


def test_extreme_values() -> None:
    x = np.array([-1e30, -100, -88, -20, -1e-30, 0, 1e-30, 20, 88, 100, 1e30, np.nan], np.float32)
    with np.errstate(all="ignore"):
        soft = 30 * np.tanh(x.astype(np.float64) / 30)
    np.testing.assert_allclose(T.softcap(x, 30.0), soft, rtol=1e-6, atol=0)
    gelu = T.geglu(x, np.ones_like(x))
    assert np.isnan(gelu[-1]) and (np.abs(gelu[:3]) < 1e-6).all() and gelu[5] == 0
    np.testing.assert_allclose(gelu[7:11], x[7:11], rtol=1e-6)


@pytest.mark.parametrize("f32", [False, True], ids=["bf16", "f32"])
@pytest.mark.parametrize("size", [0.3, 3.0])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 16])
@pytest.mark.parametrize("dim", [8, 40, 256])
def test_attention_to_a_block(dim: int, rows: int, size: float, f32: bool) -> None:
    """Scores of about `size`, against float64: as exact as sums in float32, also where the hardware multiplies bf16 values alone."""
    rng = np.random.default_rng(dim + rows)
    q = (size * rng.standard_normal((rows, dim))).astype(np.float32)
    k = (rng.standard_normal((64, dim)) / np.sqrt(dim)).astype(np.float32)
    v = (1 + rng.standard_normal((64, dim))).astype(np.float32)
    if not f32:
        k, v = reference.round_bf16(k), reference.round_bf16(v)
    lo, hi = rng.integers(0, 30, rows), rng.integers(31, 65, rows)
    lo[0], hi[-1] = 0, 64
    for cap in (0.0, 5.0):
        top, total, out = T.attend(q, k, v, list(lo), list(hi), cap, f32)
        s = q.astype(np.float64) @ k.T.astype(np.float64)
        s = cap * np.tanh(s / cap) if cap else s
        s[(np.arange(64) < lo[:, None]) | (np.arange(64) >= hi[:, None])] = -np.inf
        bound = 4 * EPS * np.linalg.norm(q, axis=1) * np.linalg.norm(k, axis=1).max()  # of a score's error
        assert (np.abs(top - s.max(1)) <= bound).all()
        p = np.exp(s - top[:, None])
        assert (np.abs(total - p.sum(1)) <= (bound + 8 * EPS) * p.sum(1)).all()
        assert (np.abs(out - p @ v) <= (bound + 8 * EPS)[:, None] * (p @ np.abs(v))).all()


@pytest.mark.parametrize("f32", [False, True], ids=["bf16", "f32"])
@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_attention_of_a_row_is_its_own(bad: float, place: str, f32: bool) -> None:
    """A row's bits depend neither on the rows beside it nor on what it does not see, be that NaN."""
    rng = np.random.default_rng(5)
    q = rng.standard_normal((16, 64)).astype(np.float32)
    k, v = rng.standard_normal((2, 64, 64)).astype(np.float32)
    lo, hi = list(range(3, 19)), list(range(60, 44, -1))
    lo[6], hi[6] = 20, 20  # sees nothing
    clean = [T.attend(q[i : i + 1], k, v, [lo[i]], [hi[i]], 0.0, f32) for i in range(16)]
    unseen, first = (slice(3), 3) if place == "before" else (slice(60, 64), 59)
    k[unseen] = v[unseen] = bad
    v[first] = bad  # which the first row sees
    found = T.attend(q, k, v, lo, hi, 0.0, f32)
    for i in set(range(1, 16)) - {6}:
        for got, wanted in zip(found, clean[i], strict=True):
            assert got[i].tobytes() == wanted[0].tobytes()
    assert np.isfinite(bad) or not np.isfinite(found[2][0]).any()
