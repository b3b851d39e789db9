// Products with bf16 weights in file order: lane j sums k = j modulo the step, and one fixed tree closes the row. Part of
// kernels-inl.h.
#pragma once

#include "bf16-columns-inl.h"
#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

int64_t pack_bytes(int64_t k) { return (k + 31) / 32 * 32 * V::kPackedSize; }

// Packed rows lie in pieces of K values, each contiguous over the rows, so that it fills a cache evenly. With one chunk of rows the
// weights come from memory, and shorter pieces share the first cache better.
inline int64_t piece(int64_t rows) { return rows <= kActChunk ? V::kPiece : 2 * V::kPiece; }
// How far apart the rows of the piece with value `at` are, and where that value of a row lies.
inline int64_t piece_stride(int64_t at, int64_t k, int64_t rows) {
  const int64_t rest = k - at / piece(rows) * piece(rows);
  return pack_bytes(rest < piece(rows) ? rest : piece(rows));
}
inline int64_t packed_at(int64_t at, int64_t k, int64_t row, int64_t rows) {
  const int64_t from = at / piece(rows) * piece(rows);
  return (from * rows + at - from) * V::kPackedSize + row * piece_stride(at, k, rows);
}

template <class T>
void pack(const float* x, int64_t at, int64_t count, int64_t k, void* out, int64_t row, int64_t rows) {
  if constexpr (T::kColumnsFrom > 0)
    if (rows >= T::kColumnsFrom) return pack_columns(x, at, count, k, static_cast<float*>(out), row, rows);
  for (int64_t i = at; i < at + count; i += 32, x += 32) {
    uint8_t* o = static_cast<uint8_t*>(out) + packed_at(i, k, row, rows);
    if (i + 32 <= at + count) {
      V::pack32(x, o);
    } else {
      float rest[32] = {};
      for (int64_t j = 0; i + j < at + count; ++j) rest[j] = x[j];
      V::pack32(rest, o);
    }
  }
}

constexpr int kStep = V::kBf16Step;
// K values of a panel's weights at a time, which stay in L2. A tile's piece of activations stays in L1.
constexpr int64_t kSpan = 4096;

constexpr int kKept = V::kKeptSize;
// Where the weights of a tile of R rows come from: the file's rows, ldw apart; or, PACKED, steps of R rows side by side, which the
// first tile of activations leaves in `pack`, kKept bytes a value. Files align their rows to 32 bytes at best, so that most loads
// would meet two cache lines.
struct Bf16Rows {
  const uint16_t* w;
  int64_t ldw;
  const uint16_t (*tail)[32];  // the last values of each row, padded with zeros
  uint8_t* pack;               // at K value `from`; null: nothing is kept
  const uint16_t* ahead;       // where the next tile's weights lie; null when they are in the cache
  const uint8_t* x_ahead;      // the next tile's activations, kFetch bytes a step; null when they are in the cache
};

// Bytes of activations to ask for in a step, so that those of the next tile have come by the time that this one has met all weights.
constexpr int kFetch = V::kBf16TileX * V::kPackedSize * kStep * V::kBf16TileW / kBf16Rows;

// Adds K values [from, to) to the sums of R weight rows and M activation rows; `from` 0 starts them.
template <int R, int M, bool PACKED>
inline void bf16_steps(const Bf16Rows& a, const uint8_t* x, int64_t ldx, int64_t from, int64_t to,
                       V::Sum (*sum)[V::kBf16TileX]) {
  V::Sum s[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) s[r][m] = from ? sum[r][m] : V::sum_zero();
  auto step = [&](int64_t i, auto load) {
    for (int half = 0; half < V::kBf16Halves; ++half) {
      V::Wide v[R];
      for (int r = 0; r < R; ++r) v[r] = load(r, half);
      for (int m = 0; m < M; ++m) {
        const V::Packed f = V::load_packed(x + m * ldx + i * V::kPackedSize, half);
        for (int r = 0; r < R; ++r) V::dot_bf16(s[r][m], half, v[r], f);
      }
    }
  };
  const int64_t count = to - from;
  if (PACKED) {
    const uint8_t* w = a.pack;
    for (int64_t i = 0; i < count; i += kStep, w += R * kStep * kKept) {
      if (a.x_ahead) GEMMA_PREFETCH(a.x_ahead + i / kStep * kFetch);
      step(i, [&](int r, int half) { return V::load_kept(w + r * kStep * kKept, half); });
    }
  } else {
    auto file_step = [&](int64_t i, const uint16_t* w, int64_t ldw) {
      step(i, [&](int r, int half) { return V::load_w(w + r * ldw, half); });
      for (int r = 0; r < R && a.pack; ++r) V::keep_w(a.pack + (i * R + r * kStep) * kKept, w + r * ldw);
    };
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
      for (int r = 0; r < R && a.ahead; ++r) GEMMA_PREFETCH(a.ahead + r * a.ldw + i);
      file_step(i, a.w + from + i, a.ldw);
    }
    if (i < count) file_step(i, a.tail[0], 32);
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sum[r][m] = s[r][m];
}

// The same for `rows` <= kBf16TileW weight rows and m <= M activation rows.
template <int M>
struct Bf16Tile {
  static void add(int rows, int m, bool packed, const Bf16Rows& a, const uint8_t* x, int64_t ldx, int64_t from,
                  int64_t to, V::Sum (*sum)[V::kBf16TileX]) {
    constexpr int R = V::kBf16TileW;
    if (m < M) return Bf16Tile<M - 1>::add(rows, m, packed, a, x, ldx, from, to, sum);
    if (rows == R && packed) return bf16_steps<R, M, true>(a, x, ldx, from, to, sum);
    if (rows == R) return bf16_steps<R, M, false>(a, x, ldx, from, to, sum);
    for (int r = 0; r < rows; ++r)
      bf16_steps<1, M, false>({a.w + r * a.ldw, a.ldw, a.tail + r, nullptr, nullptr, nullptr}, x, ldx, from, to,
                              sum + r);
  }
};
template <>
struct Bf16Tile<0> {
  static void add(int, int, bool, const Bf16Rows&, const uint8_t*, int64_t, int64_t, int64_t,
                  V::Sum (*)[V::kBf16TileX]) {}
};

using Bf16Tail = uint16_t[kBf16Rows][32];  // the last values of each row, padded with zeros to a step

// One row of activations: memory is read in few streams, weight row after weight row, and the next rows are on their way.
inline void bf16_one(const uint16_t* w, int64_t ldw, int rows, int64_t k, const uint8_t* x, const Bf16Tail& tail,
                     float* out) {
  constexpr int kRows = V::kBf16Streams;
  V::Sum sums[kBf16Rows][V::kBf16TileX];
  int r = 0;
  for (; r + kRows <= rows; r += kRows)
    bf16_steps<kRows, 1, false>({w + r * ldw, ldw, tail + r, nullptr, w + (r + kRows) * ldw, nullptr}, x, 0, 0, k,
                                sums + r);
  for (; r < rows; ++r)
    bf16_steps<1, 1, false>({w + r * ldw, ldw, tail + r, nullptr, nullptr, nullptr}, x, 0, 0, k, sums + r);
  V::close(sums[0], V::kBf16TileX, rows, out);
}

// Several. For a single chunk, weights are kept for a span. With several, the weights of all K are, and activations come from further
// away than the next cache: they are asked for ahead.
inline void bf16_tiles(const uint16_t* w, int64_t ldw, int rows, int64_t k, const uint8_t* acts, int64_t first, int m,
                       int64_t n, const Bf16Tail& tail, uint8_t* scratch, bool again, float* out, int64_t ldo) {
  constexpr int R = V::kBf16TileW, M = V::kBf16TileX, kTiles = (kActChunk + M - 1) / M;
  static_assert(kBf16Rows % R == 0, "a call is a whole number of tiles");
  V::Sum sums[kTiles][kBf16Rows][M];
  const bool single = n <= kActChunk;
  const int64_t depth = piece(n), kept = single && k > kSpan ? kSpan : (k + 31) / 32 * 32;
  const int tiles = (m + M - 1) / M;
  auto x_at = [&](int64_t row, int64_t at) { return acts + packed_at(at, k, row, n); };
  for (int64_t begin = 0; begin < k; begin += kSpan) {
    const int64_t end = begin + kSpan < k ? begin + kSpan : k, origin = single ? begin : 0;
    for (int t = 0; t < tiles; ++t) {
      // As even as may be: in a small tile each sum would wait for itself.
      const int64_t row = first + m * t / tiles, next_row = first + m * (t + 1) / tiles;
      V::Sum(*sum)[M] = sums[t];
      for (int64_t from = begin; from < end; from += depth) {
        const int64_t to = from + depth < end ? from + depth : end;
        const uint8_t* x = x_at(row, from);
        const uint8_t* next_x = single          ? nullptr
                                : to < end      ? x_at(row, to)
                                : t + 1 < tiles ? x_at(next_row, begin)
                                : end < k       ? x_at(first, end)
                                                : x_at(first + m, 0);
        for (int r = 0; r < rows; r += R) {
          // Hardware prefetch ends with a page: ask for the tile after this one, be it beside it, further along K or the next call's.
          const uint16_t* next = r + R < rows ? w + (r + R) * ldw + from : to < k ? w + to : w + rows * ldw;
          uint8_t* pack = n > M ? scratch + (r * kept + R * (from - origin)) * kKept : nullptr;
          Bf16Tile<M>::add(rows - r < R ? rows - r : R, static_cast<int>(next_row - row), t || again,
                           {w + r * ldw, ldw, tail + r, pack, t || again ? nullptr : next,
                            next_x ? next_x + r * (depth / kStep * kFetch / R) : nullptr},
                           x, piece_stride(from, k, n), from, to, sum + r);
        }
      }
      for (int i = 0; end == k && i < next_row - row; ++i) V::close(&sum[0][i], M, rows, out + (row - first + i) * ldo);
    }
  }
}

template <class T>
void bf16(const uint16_t* w, int64_t ldw, int rows, int64_t k, const void* acts, int64_t first, int m, int64_t n,
          uint8_t* scratch, bool again, float* out, int64_t ldo) {
  if constexpr (T::kColumnsFrom > 0)
    if (n >= T::kColumnsFrom)
      return bf16_columns<T>(w, ldw, rows, k, static_cast<const float*>(acts), first, m, n,
                             reinterpret_cast<uint32_t*>(scratch), again, out, ldo);
  const auto* x = static_cast<const uint8_t*>(acts);
  Bf16Tail tail = {};
  for (int r = 0; r < rows; ++r)
    for (int64_t j = k / kStep * kStep; j < k; ++j) tail[r][j % kStep] = w[r * ldw + j];
  if (n == 1) return bf16_one(w, ldw, rows, k, x, tail, out);
  bf16_tiles(w, ldw, rows, k, x, first, m, n, tail, scratch, again, out, ldo);
}

}  // namespace GEMMA_ISA
}  // namespace gemma
