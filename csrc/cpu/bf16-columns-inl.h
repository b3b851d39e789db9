// Products of bf16 weights with many rows of activations, where a lane owns a weight row. Part of kernels-inl.h.
//
// The sums are those of bf16-inl.h, product for product: what one lane adds up there, or one lane of one half of a step, is one pass
// along K here, and the sixteen passes are joined in the tree that closes a row there. But nothing is joined across lanes, and 2 loads
// of weights and kTileRows of activations feed twice as many multiply-adds as the latter.
#pragma once

#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

constexpr int kPasses = 16;
constexpr int kGroup = 2 * W;                // weight rows of a tile
constexpr int kTileRows = V::kColumnTile;    // activation rows of a tile
constexpr int kColumnStep = V::kColumnStep;  // K values of a step, of which a pass takes one, or one pair
constexpr int kWords = kColumnStep / 2;      // 32-bit words of a weight row in a step
constexpr int kShared = kPasses / kWords;    // passes that share a word
constexpr int64_t kColumnSpan = 2048;        // K values of a group's weights, which stay in L2
// Words between the streams of weights that are packed side by side: a store that lies a multiple of 4 KB from a load that follows
// holds it up. (So would streams a multiple of 4 KB apart, which they are for no Gemma model's sizes.)
constexpr int64_t kStreamGap = 128;
inline int64_t stream_length(int64_t steps) { return steps * kGroup + kStreamGap; }

inline int64_t steps_of(int64_t k) { return (k + kColumnStep - 1) / kColumnStep; }
inline int64_t span_at(int64_t from, int64_t k) { return k - from < kColumnSpan ? k - from : kColumnSpan; }
// Tile t of m activation rows begins at this row: as even as may be, since in a small tile each sum would wait for itself.
inline int64_t tile_at(int64_t t, int64_t m, int64_t tiles) { return m * t / tiles; }
inline int64_t tiles_of(int64_t m) { return (m + kTileRows - 1) / kTileRows; }

// Activations lie as [chunk of rows][span][pass][tile][step][row of the tile], in the order in which they are read.
void pack_columns(const float* x, int64_t at, int64_t count, int64_t k, V::Column* out, int64_t row, int64_t rows) {
  const int64_t chunk = row / kActChunk * kActChunk, r = row - chunk;
  const int64_t m = rows - chunk < kActChunk ? rows - chunk : kActChunk, tiles = tiles_of(m);
  const int64_t t = ((r + 1) * tiles + m - 1) / m - 1;  // the last that begins at r or before
  const int64_t first = tile_at(t, m, tiles), width = tile_at(t + 1, m, tiles) - first;
  for (int64_t i = at; i < at + count; i += kColumnStep, x += kColumnStep) {
    float rest[kColumnStep] = {};  // the last step, padded with zeros
    const bool whole = i + kColumnStep <= at + count;
    for (int64_t j = 0; !whole && i + j < at + count; ++j) rest[j] = x[j];
    V::Column c[kPasses];
    V::to_columns(whole ? x : rest, c);
    const int64_t from = i / kColumnSpan * kColumnSpan, steps = steps_of(span_at(from, k));
    V::Column* o = out + chunk * steps_of(k) * kPasses + from / kColumnStep * kPasses * m + steps * first +
                   (i - from) / kColumnStep * width + r - first;
    for (int j = 0; j < kPasses; ++j, o += steps * m) *o = c[j];
  }
}

// A span of a group's weights as [word of a step][half of the group][step][row of the half]. Rows past `rows` repeat the first.
inline void weight_columns(const uint16_t* w, int64_t ldw, int rows, int64_t count, uint32_t* out) {
  const int64_t steps = steps_of(count), stream = stream_length(steps), whole = count / kColumnStep;
  for (int g = 0; g < kGroup; g += W, out += steps * W) {
    const uint16_t* row[W];
    for (int r = 0; r < W; ++r) row[r] = w + (g + r < rows ? g + r : 0) * ldw;
    auto put = [&](int64_t at, int64_t step) {
      I c[kWords];
      V::columns(row, at, c);
      for (int j = 0; j < kWords; ++j) V::store_i(reinterpret_cast<int32_t*>(out + j * stream + step * W), c[j]);
    };
    for (int64_t i = 0; i < whole; ++i) put(i * kColumnStep, i);
    if (whole == steps) continue;
    uint16_t rest[W][kColumnStep] = {};  // the last step, padded with zeros
    for (int r = 0; r < W; ++r) {
      for (int64_t i = whole * kColumnStep; i < count; ++i) rest[r][i - whole * kColumnStep] = row[r][i];
      row[r] = rest[r];
    }
    put(0, whole);
  }
}

// sum[M][kPasses][kGroup] (+)= one pass of a span for a tile; PART: which part of the words it takes.
template <int M, int PART>
inline void column_tile(const uint32_t* w, const V::Column* x, int64_t steps, bool start, float* sum) {
  F a[M][2];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 2; ++v) a[m][v] = start ? V::zero() : V::load(sum + m * kPasses * kGroup + v * W);
  // Else a sixth of the instructions are the loop's own, and whoever shares the core slows all of them down.
  GEMMA_UNROLL(2)
  for (const uint32_t* end = w + steps * W; w != end; w += W, x += M) {
    const V::Part w0 = V::part<PART>(w), w1 = V::part<PART>(w + steps * W);
    for (int m = 0; m < M; ++m) {
      a[m][0] = V::dot_column(w0, x[m], a[m][0]);
      a[m][1] = V::dot_column(w1, x[m], a[m][1]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < 2; ++v) V::store(sum + m * kPasses * kGroup + v * W, a[m][v]);
}

template <int M>
inline void column_tile(int64_t m, int part, const uint32_t* w, const V::Column* x, int64_t steps, bool start,
                        float* sum) {
  if constexpr (M > 1)
    if (m < M) return column_tile<M - 1>(m, part, w, x, steps, start, sum);
  part ? column_tile<M, kShared - 1>(w, x, steps, start, sum) : column_tile<M, 0>(w, x, steps, start, sum);
}

// The sums of 2^LEVEL passes, joined as the lanes of a row are.
template <int LEVEL>
inline F join_passes(const float* sum) {
  if constexpr (LEVEL == 0)
    return V::load(sum);
  else
    return V::add(join_passes<LEVEL - 1>(sum), join_passes<LEVEL - 1>(sum + V::kTree[LEVEL - 1] * kGroup));
}

// As `bf16` of kernels.h.
inline void bf16_columns(const uint16_t* w, int64_t ldw, int rows, int64_t k, const V::Column* acts, int64_t first,
                         int m, int64_t n, uint32_t* packed, bool again, float* out, int64_t ldo) {
  alignas(64) float sums[kActChunk][kPasses][kGroup];
  const int64_t tiles = tiles_of(m);
  const V::Column* chunk = acts + first * steps_of(k) * kPasses;
  for (int g = 0; g < rows; g += kGroup) {
    const uint16_t* group = w + g * ldw;
    const int group_rows = rows - g < kGroup ? rows - g : kGroup;
    for (int64_t from = 0; from < k; from += kColumnSpan) {
      const int64_t count = span_at(from, k), steps = steps_of(count), stream = stream_length(steps);
      if (!again) weight_columns(group + from, ldw, group_rows, count, packed);
      // What will be packed next is asked for into L2 meanwhile: in the first chunk the rest of these weights, in the last one those
      // that come after them. Each pass asks for a row or two, each tile for a part.
      const bool more = from + count < k, ours = more || g + kGroup < rows;
      const bool wanted = ours ? !again : first + m == n;
      const int64_t next_from = more ? from + count : 0, next_count = wanted ? span_at(next_from, k) : 0;
      const uint16_t* next = group + (more ? 0 : kGroup * ldw) + next_from;
      const int64_t each = (next_count / 32 / tiles + 1) * 32;
      const V::Column* x = chunk + from / kColumnStep * kPasses * m;
      for (int j = 0; j < kPasses; ++j)
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t row = tile_at(t, m, tiles), width = tile_at(t + 1, m, tiles) - row;
          for (int r = j; r < kGroup; r += kPasses)
            for (int64_t i = t * each; i < (t + 1) * each && i < next_count; i += 32)
              GEMMA_PREFETCH_L2(next + r * ldw + i);
          column_tile<kTileRows>(width, j % kShared, packed + j / kShared * stream, x, steps, from == 0, sums[row][j]);
          x += width * steps;
        }
      if (n > kActChunk) packed += kWords * stream;  // else no other chunk will ask for them
    }
    for (int i = 0; i < m; ++i)
      for (int v = 0; v < kGroup && v < group_rows; v += W)
        V::store_n(out + i * ldo + g + v, join_passes<4>(sums[i][0] + v), group_rows - v);
  }
}

}  // namespace GEMMA_ISA
}  // namespace gemma
