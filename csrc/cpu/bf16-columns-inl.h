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
constexpr int64_t kColumnSpan = 2048;            // K values of a group's weights at most, which stay in L2

inline int64_t steps_of(int64_t k) { return (k + kColumnStep - 1) / kColumnStep; }
// K values that are multiplied at a time. All spans of a row are equally long, unless that would need more than twice as many of them.
inline int64_t span_of(int64_t k) {
  const int64_t steps = steps_of(k), fewest = (k + kColumnSpan - 1) / kColumnSpan;
  for (int64_t spans = fewest; spans <= 2 * fewest; ++spans)
    if (steps % spans == 0) return steps / spans * kColumnStep;
  return kColumnSpan;
}
inline int64_t length(int64_t from, int64_t k, int64_t span) { return k - from < span ? k - from : span; }
// Tile t of m activation rows begins at this row: as even as may be, since in a small tile each sum would wait for itself.
inline int64_t tile_at(int64_t t, int64_t m, int64_t tiles) { return m * t / tiles; }
inline int64_t tiles_of(int64_t m) { return (m + kTileRows - 1) / kTileRows; }

// Activations lie as [chunk of rows][span][pass][tile][step][row of the tile], in the order in which they are read.
void pack_columns(const float* x, int64_t ldx, int n, int64_t at, int64_t count, int64_t k, V::Column* out, int64_t row,
                  int64_t rows) {
  const int64_t end = row + n, span = span_of(k);
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
        const int64_t from = (at + i) / span * span, steps = steps_of(length(from, k, span));
        V::Column* o = out + chunk * steps_of(k) * kPasses + from / kColumnStep * kPasses * m +
                       steps * (first - chunk) + (at + i - from) / kColumnStep * (last - first) + row - first;
        for (int j = 0; j < kPasses; ++j, o += steps * m) *o = c[j];
      }
  }
}

// Row g of vector v of a group. Vector 4 h + q has rows q, q + 4, ... of the h-th W rows: so four vectors of sums become one with the
// rows in order.
inline int row_of(int v, int g) { return v / 4 * W + v % 4 + 4 * g; }
// A span of a group's weights lies as [kTileVectors vectors][word of a step][step][vector]: where word j of vector v begins.
inline int64_t word_at(int v, int j, int64_t steps) {
  return ((v / kTileVectors * kWords + j) * steps * kTileVectors + v % kTileVectors) * W;
}

// Puts a span of a group's weights there. Rows past `rows` repeat the first.
inline void weight_columns(const uint16_t* w, int64_t ldw, int rows, int64_t count, uint32_t* out) {
  const int64_t steps = steps_of(count), whole = count / kColumnStep;
  for (int v = 0; v < kVectors; ++v) {
    const uint16_t* row[kVectorRows];
    for (int g = 0; g < kVectorRows; ++g) row[g] = w + (row_of(v, g) < rows ? row_of(v, g) : 0) * ldw;
    auto put = [&](int64_t at, int64_t step) {
      for (int j = 0; j < kWords; ++j)
        V::store_i(out + word_at(v, j, steps) + step * kTileVectors * W, V::column(row, at + 8 * j));
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

// What `weight_columns` does for words of a vector's rows, done in passing, a step with every step of a loop: alone it would leave the
// multiplications idle, as they leave loads and stores.
struct Ahead {
  const uint16_t* row[kVectorRows];
  uint32_t* out;
  const uint16_t* later;  // a row for each word that is asked for meanwhile, four rows apart: memory answers late
  int64_t apart;
};

// sum[M][kPasses][kVectors][W] (+)= one pass of a span for a tile and kTileVectors vectors. PART: which part of the words the pass
// takes. WORDS: of the weights to be packed. The last pass of all is joined with the others.
template <int M, int PART, int WORDS>
inline void column_tile(const uint32_t* w, const V::Column* x, int64_t steps, bool start, bool last, const Ahead* pack,
                        float* sum) {
  constexpr int N = kTileVectors, kSums = M * N;
  auto at = [&](int i) { return sum + (i / N * kPasses * kVectors + i % N) * W; };
  const Ahead ahead = WORDS ? *pack : Ahead{};
  F a[kSums];
  GEMMA_UNROLL(24)  // else GCC moves the sums to memory and back before the loop, and after it
  for (int i = 0; i < kSums; ++i) a[i] = start ? V::zero() : V::load(at(i));
  // Else a sixth of the instructions are the loop's own, and whoever shares the core slows all of them down.
  GEMMA_UNROLL(4)
  for (int64_t step = 0; step < steps; ++step, x += M) {
    for (int j = 0; j < WORDS; ++j) {
      V::store_i(ahead.out + (j * steps + step) * N * W, V::column(ahead.row, step * kColumnStep + 8 * j));
      GEMMA_PREFETCH(ahead.later + j * ahead.apart + step * kColumnStep);
    }
    for (int64_t i = 0; V::kColumnAhead && i < static_cast<int64_t>(M * sizeof(V::Column)); i += 64)
      GEMMA_PREFETCH(reinterpret_cast<const char*>(x) + V::kColumnAhead + i);
    V::Part part[N];
    for (int v = 0; v < N; ++v) part[v] = V::part<PART>(w + (step * N + v) * W);
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

template <int M, int WORDS>
inline void column_tile(int64_t m, int part, const uint32_t* w, const V::Column* x, int64_t steps, bool start,
                        bool last, const Ahead* pack, float* sum) {
  if constexpr (M > 1)
    if (m < M) return column_tile<M - 1, WORDS>(m, part, w, x, steps, start, last, pack, sum);
  part ? column_tile<M, kShared - 1, WORDS>(w, x, steps, start, last, pack, sum)
       : column_tile<M, 0, WORDS>(w, x, steps, start, last, pack, sum);
}

// For so many words, a power of 2.
template <int WORDS>
inline auto tile_for(int words) {
  if constexpr (WORDS > 0)
    if (words < WORDS) return tile_for<WORDS / 2>(words);
  return column_tile<kTileRows, WORDS>;
}

// A span of a group of weight rows: where it lies in the file, and where it is or will be packed.
struct Span {
  const uint16_t* w;
  int64_t count;  // of K values
  uint32_t* packed;
};

// sums (+)= the product of a span and m rows of activations. Meanwhile packs another one of as many steps, `then`, if it is not null,
// and asks for the one after it, `later`.
inline void span_product(const Span& now, const V::Column* x, int m, bool start, bool last, const Span* then,
                         const uint16_t* later, int64_t ldw, float (*sums)[kPasses][kVectors][W]) {
  const int64_t steps = steps_of(now.count), tiles = tiles_of(m), calls = kPasses * kVectors / kTileVectors * tiles;
  int words = 1;  // that a call packs, unless it packs none
  while (words < kWords && words * calls < kVectors * kWords) words *= 2;
  const int64_t turns = then ? kVectors * kWords / words : 0;
  int64_t call = 0;
  for (int j = 0; j < kPasses; ++j, x += m * steps)
    for (int v = 0; v < kVectors; v += kTileVectors)
      for (int64_t t = 0; t < tiles; ++t, ++call) {
        const int64_t row = tile_at(t, m, tiles), width = tile_at(t + 1, m, tiles) - row;
        const int64_t turn = call * turns / calls;
        const bool packs = (call + 1) * turns / calls > turn;
        Ahead ahead;
        if (packs) {
          const int u = static_cast<int>(turn) * words / kWords, word = static_cast<int>(turn) * words % kWords;
          for (int g = 0; g < kVectorRows; ++g) ahead.row[g] = then->w + row_of(u, g) * ldw + 8 * word;
          ahead.out = then->packed + word_at(u, word, steps);
          ahead.later = u + 1 < kVectors ? then->w + row_of(u + 1, word) * ldw : later + row_of(0, word) * ldw;
          ahead.apart = 4 * ldw;
        }
        tile_for<kWords>(packs ? words : 0)(width, j % kShared, now.packed + word_at(v, j / kShared, steps),
                                            x + row * steps, steps, start, last && j == kPasses - 1, &ahead,
                                            sums[row][j][v]);
      }
}

// Spans of kBf16Rows weight rows.
inline int64_t regions_of(int64_t k) { return kBf16Rows / kGroup * ((k + span_of(k) - 1) / span_of(k)); }
inline int64_t region_bytes(int64_t k) { return span_of(k) * kGroup * static_cast<int64_t>(sizeof(uint16_t)); }
constexpr int64_t kPlaceBytes = 64;
// Where the first one is, all of them, and one that is packed ahead.
int64_t bf16_scratch(int64_t k) { return kPlaceBytes + (regions_of(k) + 1) * region_bytes(k); }

// As `bf16` of kernels.h. A call for all rows of activations packs each region while it multiplies the one before; so does the first of
// several calls, for the others find the weights packed, and the last of them goes on to `next`.
inline bool bf16_columns(const uint16_t* w, int64_t ldw, int rows, int64_t k, const V::Column* acts, int64_t first,
                         int m, int64_t n, Packed packed, const uint16_t* next, uint8_t* scratch, float* out,
                         int64_t ldo) {
  alignas(64) float sums[kActChunk][kPasses][kVectors][W];
  const int64_t span = span_of(k), spans = (k + span - 1) / span, regions = (rows + kGroup - 1) / kGroup * spans;
  // Regions take turns in two places, unless other chunks of activations will ask for all of them again.
  const int64_t places = n > kActChunk ? regions_of(k) + 1 : 2;
  const int64_t bytes = region_bytes(k);
  int64_t& place = *reinterpret_cast<int64_t*>(scratch);  // of the first
  if (packed == Packed::kNothing) place = 0;
  auto group_rows = [&](int64_t i) {
    const int64_t left = i < regions ? rows - i / spans * kGroup : kGroup;
    return static_cast<int>(left < kGroup ? left : kGroup);
  };
  auto region = [&](int64_t i) {  // the one after the last is the first of `next`
    const uint16_t* from = i < regions ? w + i / spans * kGroup * ldw : next;
    uint8_t* to = scratch + kPlaceBytes + (place + i) % places * bytes;
    return Span{from ? from + i % spans * span : nullptr, length(i % spans * span, k, span),
                reinterpret_cast<uint32_t*>(to)};
  };
  bool ready = packed != Packed::kNothing;
  for (int64_t i = 0; i < regions; ++i) {
    const Span now = region(i), then = region(i + 1);
    const int64_t at = i % spans * span, group = i / spans * kGroup;
    if (!ready) weight_columns(now.w, ldw, group_rows(i), now.count, now.packed);
    const bool there = packed == Packed::kAll && i + 1 < regions;
    // What is of another length, or not of whole steps or groups, cannot be packed in passing.
    const bool pack =
        then.w && !there && then.count == now.count && now.count % kColumnStep == 0 && group_rows(i + 1) == kGroup;
    const int64_t on = (i + 2) % spans ? span : kGroup * ldw - (spans - 1) * span;  // to the one after it
    span_product(now, acts + (first * steps_of(k) + at / kColumnStep * m) * kPasses, m, at == 0, at + now.count == k,
                 pack ? &then : nullptr, pack ? then.w + on : nullptr, ldw, sums);
    ready = there || pack;
    if (at + now.count < k) continue;
    for (int r = 0; r < m; ++r)
      for (int h = 0; h * W < group_rows(i); ++h) {
        F u[4];
        for (int q = 0; q < 4; ++q) u[q] = V::load(sums[r][kPasses - 1][4 * h + q]);
        V::store_n(out + r * ldo + group + h * W, V::join4(u), group_rows(i) - h * W);
      }
  }
  if (ready) place = (place + regions) % places;
  return ready;
}

}  // namespace GEMMA_ISA
}  // namespace gemma
