// Products of bf16 weights with many rows of activations, where a vector holds four of the sums of W / 4 weight rows. Part of
// kernels-inl.h.
//
// The sums are those of bf16-inl.h, product for product: the sixteen that are kept there for a row (one a lane, or one a lane of one
// half of a step) are four passes along K here, of four sums each, joined in the same tree. But nothing is joined across lanes until
// the end, kTileVectors loads of weights and kTileRows of activations feed the product of both in multiply-adds, and weights get
// their places by moving quarters of vectors.
#pragma once

#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

constexpr int kPasses = 4;
constexpr int kVectorRows = W / 4;               // weight rows of a vector
constexpr int kVectors = 8;                      // of a group
constexpr int kTileVectors = V::kColumnVectors;  // that meet a tile of activations together
constexpr int kGroup = kVectors * kVectorRows;   // weight rows
constexpr int kTileRows = V::kColumnTile;        // activation rows of a tile
constexpr int kColumnStep = V::kColumnStep;      // K values of a step, of which a pass takes a quarter
constexpr int kWords = kColumnStep / 8;          // vectors that kVectorRows weight rows fill in a step
constexpr int kShared = kPasses / kWords;        // passes that share them
constexpr int64_t kColumnSpan = 2048;            // K values of a group's weights, which stay in L2
// Words between the streams of weights that are packed side by side: a store that lies a multiple of 4 KB from a load that follows
// holds it up. (So would streams a multiple of 4 KB apart, which they are for no Gemma model's sizes.)
constexpr int64_t kStreamGap = 64;
inline int64_t stream_length(int64_t steps) { return steps * W + kStreamGap; }

inline int64_t steps_of(int64_t k) { return (k + kColumnStep - 1) / kColumnStep; }
inline int64_t span_at(int64_t from, int64_t k) { return k - from < kColumnSpan ? k - from : kColumnSpan; }
// Tile t of m activation rows begins at this row: as even as may be, since in a small tile each sum would wait for itself.
inline int64_t tile_at(int64_t t, int64_t m, int64_t tiles) { return m * t / tiles; }
inline int64_t tiles_of(int64_t m) { return (m + kTileRows - 1) / kTileRows; }

// Activations lie as [chunk of rows][span][pass][tile][step][row of the tile], in the order in which they are read.
void pack_columns(const float* x, int64_t ldx, int n, int64_t at, int64_t count, int64_t k, V::Column* out, int64_t row,
                  int64_t rows) {
  const int64_t end = row + n;
  while (row < end) {
    const int64_t chunk = row / kActChunk * kActChunk;
    const int64_t m = rows - chunk < kActChunk ? rows - chunk : kActChunk, tiles = tiles_of(m);
    const int64_t t = ((row - chunk + 1) * tiles + m - 1) / m - 1;  // the last that begins at this row or before
    const int64_t first = chunk + tile_at(t, m, tiles), last = chunk + tile_at(t + 1, m, tiles);
    for (; row < end && row < last; ++row, x += ldx)
      for (int64_t i = 0; i < count; i += kColumnStep) {
        float rest[kColumnStep] = {};  // the last step, padded with zeros
        const bool whole = i + kColumnStep <= count;
        for (int64_t j = 0; !whole && i + j < count; ++j) rest[j] = x[i + j];
        V::Column c[kPasses];
        V::to_columns(whole ? x + i : rest, c);
        const int64_t from = (at + i) / kColumnSpan * kColumnSpan, steps = steps_of(span_at(from, k));
        V::Column* o = out + chunk * steps_of(k) * kPasses + from / kColumnStep * kPasses * m +
                       steps * (first - chunk) + (at + i - from) / kColumnStep * (last - first) + row - first;
        for (int j = 0; j < kPasses; ++j, o += steps * m) *o = c[j];
      }
  }
}

// A span of a group's weights as [vector][word of a step][step]. Vector 4 h + q has rows q, q + 4, ... of the h-th W rows: so four
// vectors of sums become one with the rows in order. Rows past `rows` repeat the first.
inline void weight_columns(const uint16_t* w, int64_t ldw, int rows, int64_t count, uint32_t* out) {
  const int64_t steps = steps_of(count), stream = stream_length(steps), whole = count / kColumnStep;
  for (int v = 0; v < kVectors; ++v, out += kWords * stream) {
    const uint16_t* row[kVectorRows];
    for (int g = 0; g < kVectorRows; ++g) {
      const int r = v / 4 * W + v % 4 + 4 * g;
      row[g] = w + (r < rows ? r : 0) * ldw;
    }
    auto put = [&](int64_t at, int64_t step) {
      I c[kWords];
      V::columns(row, at, c);
      for (int j = 0; j < kWords; ++j) V::store_i(reinterpret_cast<int32_t*>(out + j * stream + step * W), c[j]);
    };
    for (int64_t i = 0; i < whole; ++i) put(i * kColumnStep, i);
    if (whole == steps) continue;
    uint16_t rest[kVectorRows][kColumnStep] = {};  // the last step, padded with zeros
    for (int g = 0; g < kVectorRows; ++g) {
      for (int64_t i = whole * kColumnStep; i < count; ++i) rest[g][i - whole * kColumnStep] = row[g][i];
      row[g] = rest[g];
    }
    put(0, whole);
  }
}

// Weight rows that are asked for into L2, `apart` values apart, a line of each in every step of a loop.
struct Ahead {
  const uint16_t* row;
  int64_t apart;
};
constexpr int kMostAhead = kGroup * kTileVectors / (kPasses * kVectors);  // 1 or 4

// Bytes of activations that are asked for into L1 ahead: with AVX-512 those of a whole pass of a tile. A chunk lies in L2 or further away.
constexpr int64_t kAheadBytes = 6144;

// sum[M][kPasses][kVectors][W] (+)= one pass of a span for a tile and kTileVectors vectors, `stride` words apart. PART: which part of the
// words the pass takes. ROWS: those of `ahead`. The last pass of all is joined with the others.
template <int M, int PART, int ROWS>
inline void column_tile(const uint32_t* w, int64_t stride, const V::Column* x, int64_t steps, bool start, bool last,
                        Ahead ahead, float* sum) {
  constexpr int N = kTileVectors, kSums = M * N;
  auto at = [&](int i) { return sum + (i / N * kPasses * kVectors + i % N) * W; };
  F a[kSums];
  GEMMA_UNROLL(24)  // else GCC moves the sums to memory and back before the loop, and after it
  for (int i = 0; i < kSums; ++i) a[i] = start ? V::zero() : V::load(at(i));
  // Else a sixth of the instructions are the loop's own, and whoever shares the core slows all of them down.
  GEMMA_UNROLL(2)
  for (const uint32_t* end = w + steps * W; w != end; w += W, x += M) {
    for (int r = 0; r < ROWS; ++r) GEMMA_PREFETCH_L2(ahead.row + r * ahead.apart);
    if (ROWS) ahead.row += kColumnStep;
    for (int64_t i = 0; i < static_cast<int64_t>(M * sizeof(V::Column)); i += 64)
      GEMMA_PREFETCH(reinterpret_cast<const char*>(x) + kAheadBytes + i);
    V::Part part[N];
    for (int v = 0; v < N; ++v) part[v] = V::part<PART>(w + v * stride);
    GEMMA_UNROLL(24)
    for (int i = 0; i < kSums; ++i) a[i] = V::dot_column(part[i % N], V::four(x[i / N]), a[i]);
  }
  if (last) {
    auto pass = [&](int j, int i) { return V::load(at(i) - (kPasses - 1 - j) * kVectors * W); };
    GEMMA_UNROLL(24)
    for (int i = 0; i < kSums; ++i)
      a[i] = V::add(V::add(pass(0, i), pass(V::kJoinFirst, i)), V::add(pass(3 - V::kJoinFirst, i), a[i]));
  }
  GEMMA_UNROLL(24)
  for (int i = 0; i < kSums; ++i) V::store(at(i), a[i]);
}

template <int M, int ROWS>
inline void column_tile(int64_t m, int part, const uint32_t* w, int64_t stride, const V::Column* x, int64_t steps,
                        bool start, bool last, Ahead ahead, float* sum) {
  if constexpr (M > 1)
    if (m < M) return column_tile<M - 1, ROWS>(m, part, w, stride, x, steps, start, last, ahead, sum);
  part ? column_tile<M, kShared - 1, ROWS>(w, stride, x, steps, start, last, ahead, sum)
       : column_tile<M, 0, ROWS>(w, stride, x, steps, start, last, ahead, sum);
}

template <int ROWS>
inline auto tile_for(int64_t wanted) {
  if constexpr (ROWS > 0)
    if (wanted < ROWS) return tile_for<ROWS / 2>(wanted);
  return column_tile<kTileRows, ROWS>;
}

// As `bf16` of kernels.h.
inline void bf16_columns(const uint16_t* w, int64_t ldw, int rows, int64_t k, const V::Column* acts, int64_t first,
                         int m, int64_t n, const uint16_t* next, uint32_t* packed, bool again, float* out,
                         int64_t ldo) {
  alignas(64) float sums[kActChunk][kPasses][kVectors][W];
  const int64_t tiles = tiles_of(m), calls = kPasses * kVectors / kTileVectors * tiles;
  const V::Column* chunk = acts + first * steps_of(k) * kPasses;
  for (int g = 0; g < rows; g += kGroup) {
    const uint16_t* group = w + g * ldw;
    const int group_rows = rows - g < kGroup ? rows - g : kGroup;
    for (int64_t from = 0; from < k; from += kColumnSpan) {
      const int64_t count = span_at(from, k), steps = steps_of(count), stream = stream_length(steps);
      if (!again) weight_columns(group + from, ldw, group_rows, count, packed);
      // What will be packed next is asked for meanwhile: in the first chunk the rest of these weights, in the last one those that come
      // after them.
      const bool more = from + count < k, ours = more || g + kGroup < rows;
      const uint16_t* soon = nullptr;
      if (ours && !again) soon = more ? group + from + count : group + kGroup * ldw;
      if (!ours && first + m == n) soon = next;
      const V::Column* x = chunk + from / kColumnStep * kPasses * m;
      int64_t call = 0;
      for (int j = 0; j < kPasses; ++j, x += m * steps)
        for (int v = 0; v < kVectors; v += kTileVectors)
          for (int64_t t = 0; t < tiles; ++t, ++call) {
            const int64_t row = tile_at(t, m, tiles), width = tile_at(t + 1, m, tiles) - row;
            const int64_t asked = call * kGroup / calls, wanted = soon ? (call + 1) * kGroup / calls - asked : 0;
            const Ahead ahead = {soon ? soon + asked * ldw : nullptr, ldw};
            tile_for<kMostAhead>(wanted)(width, j % kShared, packed + (v * kWords + j / kShared) * stream,
                                         kWords * stream, x + row * steps, steps, from == 0,
                                         j == kPasses - 1 && from + count == k, ahead, sums[row][j][v]);
          }
      if (n > kActChunk) packed += kVectors * kWords * stream;  // else no other chunk will ask for them
    }
    for (int i = 0; i < m; ++i)
      for (int h = 0; h * W < group_rows; ++h) {
        F u[4];
        for (int q = 0; q < 4; ++q) u[q] = V::load(sums[i][kPasses - 1][4 * h + q]);
        V::store_n(out + i * ldo + g + h * W, V::join4(u), group_rows - h * W);
      }
  }
}

}  // namespace GEMMA_ISA
}  // namespace gemma
