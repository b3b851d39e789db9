// Products of bf16 weights with many rows of activations, where a lane owns a weight row. Part of kernels-inl.h, for levels
// whose V has a kColumnsFrom above 0.
//
// The sums are those of bf16-inl.h, product for product: what its lane j adds up, k = j modulo 16, is one pass along K here, and the
// sixteen passes are joined in the tree that closes a row there. But nothing is joined across lanes, and 2 loads of weights and 6 of
// activations feed 12 multiply-adds.
#pragma once

#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

constexpr int kPasses = 16;
constexpr int kGroup = 2 * W;          // weight rows of a tile
constexpr int kTileRows = 6;           // activation rows of a tile: with two weight vectors, 12 sums in 16 registers
constexpr int64_t kColumnSpan = 2048;  // K values of a group's weights, which stay in L2
// Words between pairs of passes: packing stores to all of them in turn, and a store that lies a multiple of 4 KB from a load that
// follows holds it up. (So would pairs a multiple of 4 KB apart, which they are for no Gemma model's sizes.)
constexpr int64_t kPairGap = 128;
inline int64_t pair_length(int64_t steps) { return steps * kGroup + kPairGap; }

inline int64_t steps_of(int64_t k) { return (k + kPasses - 1) / kPasses; }
inline int64_t span_at(int64_t from, int64_t k) { return k - from < kColumnSpan ? k - from : kColumnSpan; }
// Tile t of m activation rows begins at this row: as even as may be, since in a small tile each sum would wait for itself.
inline int64_t tile_at(int64_t t, int64_t m, int64_t tiles) { return m * t / tiles; }
inline int64_t tiles_of(int64_t m) { return (m + kTileRows - 1) / kTileRows; }

// Activations lie as [chunk of rows][span][pass][tile][step][row of the tile], in the order in which they are read.
void pack_columns(const float* x, int64_t at, int64_t count, int64_t k, float* out, int64_t row, int64_t rows) {
  const int64_t chunk = row / kActChunk * kActChunk, r = row - chunk;
  const int64_t m = rows - chunk < kActChunk ? rows - chunk : kActChunk, tiles = tiles_of(m);
  const int64_t t = ((r + 1) * tiles + m - 1) / m - 1;  // the last that begins at r or before
  const int64_t first = tile_at(t, m, tiles), width = tile_at(t + 1, m, tiles) - first;
  for (int64_t i = at; i < at + count; i += kPasses, x += kPasses) {
    const int64_t from = i / kColumnSpan * kColumnSpan, steps = steps_of(span_at(from, k));
    float* o =
        out + chunk * steps_of(k) * kPasses + from * m + steps * first + (i - from) / kPasses * width + r - first;
    for (int64_t j = 0; j < kPasses; ++j, o += steps * m) *o = i + j < at + count ? x[j] : 0.0f;
  }
}

// A span of a group's weights as [pass / 2][half of the group][step][row of the half], a word for the two values of passes 2 i and
// 2 i + 1. Rows past `rows` repeat the first.
template <class T>
void weight_columns(const uint16_t* w, int64_t ldw, int rows, int64_t count, uint32_t* out) {
  const int64_t steps = steps_of(count), pair = pair_length(steps), whole = count / kPasses;
  for (int g = 0; g < kGroup; g += W, out += steps * W) {
    const uint16_t* row[W];
    for (int r = 0; r < W; ++r) row[r] = w + (g + r < rows ? g + r : 0) * ldw;
    auto put = [&](int64_t at, int64_t step) {
      I c[kPasses / 2];
      T::columns(row, at, c);
      for (int j = 0; j < kPasses / 2; ++j) V::store_i(reinterpret_cast<int32_t*>(out + j * pair + step * W), c[j]);
    };
    for (int64_t i = 0; i < whole; ++i) put(i * kPasses, i);
    if (whole == steps) continue;
    uint16_t rest[W][kPasses] = {};  // the last step, padded with zeros
    for (int r = 0; r < W; ++r) {
      for (int64_t i = whole * kPasses; i < count; ++i) rest[r][i - whole * kPasses] = row[r][i];
      row[r] = rest[r];
    }
    put(0, whole);
  }
}

// sum[M][kPasses][kGroup] (+)= one pass of a span for a tile; ODD: of the words' upper halves.
template <class T, int M, bool ODD>
inline void column_tile(const uint32_t* w, const float* x, int64_t steps, bool start, float* sum) {
  F a[M][2];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 2; ++v) a[m][v] = start ? V::zero() : V::load(sum + m * kPasses * kGroup + v * W);
  // Else a sixth of the instructions are the loop's own, and whoever shares the core slows all of them down.
  GEMMA_UNROLL_TWICE
  for (int64_t i = 0; i < steps; ++i, w += W, x += M) {
    const F w0 = T::template half<ODD>(w), w1 = T::template half<ODD>(w + steps * W);
    for (int m = 0; m < M; ++m) {
      const F b = V::set(x[m]);
      a[m][0] = V::fma(w0, b, a[m][0]);
      a[m][1] = V::fma(w1, b, a[m][1]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 2; ++v) V::store(sum + m * kPasses * kGroup + v * W, a[m][v]);
}

template <class T, int M>
struct ColumnTile {
  static void add(int64_t m, bool odd, const uint32_t* w, const float* x, int64_t steps, bool start, float* sum) {
    if (m < M) return ColumnTile<T, M - 1>::add(m, odd, w, x, steps, start, sum);
    odd ? column_tile<T, M, true>(w, x, steps, start, sum) : column_tile<T, M, false>(w, x, steps, start, sum);
  }
};
template <class T>
struct ColumnTile<T, 0> {
  static void add(int64_t, bool, const uint32_t*, const float*, int64_t, bool, float*) {}
};

// The sums of 2^LEVEL passes, joined as the lanes of a row are.
template <class T, int LEVEL>
inline F join_passes(const float* sum) {
  if constexpr (LEVEL == 0)
    return V::load(sum);
  else
    return V::add(join_passes<T, LEVEL - 1>(sum), join_passes<T, LEVEL - 1>(sum + T::kTree[LEVEL - 1] * kGroup));
}

// As `bf16` of kernels.h.
template <class T>
void bf16_columns(const uint16_t* w, int64_t ldw, int rows, int64_t k, const float* acts, int64_t first, int m,
                  int64_t n, uint32_t* scratch, bool again, float* out, int64_t ldo) {
  alignas(64) float sums[kActChunk][kPasses][kGroup];
  const int64_t tiles = tiles_of(m);
  const float* chunk = acts + first * steps_of(k) * kPasses;
  for (int g = 0; g < rows; g += kGroup) {
    const uint16_t* group = w + g * ldw;
    const int group_rows = rows - g < kGroup ? rows - g : kGroup;
    for (int64_t from = 0; from < k; from += kColumnSpan) {
      const int64_t count = span_at(from, k), steps = steps_of(count), pair = pair_length(steps);
      if (!again) weight_columns<T>(group + from, ldw, group_rows, count, scratch);
      // What will be packed next is asked for into L2 meanwhile: in the first chunk the rest of these weights, in the last one those
      // that come after them. Pass j asks for row j, each tile for a part.
      static_assert(2 * T::W == kPasses);
      const bool more = from + count < k, ours = more || g + kGroup < rows;
      const bool wanted = ours ? !again : first + m == n;
      const int64_t next_from = more ? from + count : 0, next_count = wanted ? span_at(next_from, k) : 0;
      const uint16_t* next = group + (more ? 0 : kGroup * ldw) + next_from;
      const int64_t part = (next_count / 32 / tiles + 1) * 32;
      const float* x = chunk + from * m;
      for (int j = 0; j < kPasses; ++j)
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t row = tile_at(t, m, tiles), width = tile_at(t + 1, m, tiles) - row;
          for (int64_t i = t * part; i < (t + 1) * part && i < next_count; i += 32)
            GEMMA_PREFETCH_L2(next + j * ldw + i);
          ColumnTile<T, kTileRows>::add(width, j % 2, scratch + j / 2 * pair, x, steps, from == 0, sums[row][j]);
          x += width * steps;
        }
      if (n > kActChunk) scratch += kPasses / 2 * pair;  // else no other chunk will ask for them
    }
    for (int i = 0; i < m; ++i)
      for (int v = 0; v < kGroup && v < group_rows; v += W)
        V::store_n(out + i * ldo + g + v, join_passes<T, 4>(sums[i][0] + v), group_rows - v);
  }
}

}  // namespace GEMMA_ISA
}  // namespace gemma
