// Products with bf16 weights in file order: each lane sums one value of a step, or one pair, and a fixed tree closes the row. Part of
// kernels-inl.h.
#pragma once

#include "bf16-columns-inl.h"
#include "isa.h"
#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

// Up to so many rows of activations meet the weights as they come; more are worth transposing them.
constexpr int kFewRows = V::kBf16Few;
constexpr int kStep = V::kBf16Step;
constexpr int64_t kNear = 32 << 10;  // bytes of activations that stay in the first cache
constexpr int64_t kPage = 2048;      // weights of 4 KB
constexpr int64_t kFar = 2 * kPage;  // so many weights memory is asked for ahead

int64_t pack_bytes(int64_t k) { return (k + 31) / 32 * 32 * V::kPackedSize; }

void pack(const float* x, int64_t ldx, int n, int64_t at, int64_t count, int64_t k, void* out, int64_t row,
          int64_t rows) {
  if (rows > kFewRows) return pack_columns(x, ldx, n, at, count, k, static_cast<V::Column*>(out), row, rows);
  for (const int64_t end = row + n; row < end; ++row, x += ldx) {
    uint8_t* o = static_cast<uint8_t*>(out) + row * pack_bytes(k) + at * V::kPackedSize;
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) V::pack32(x + i, o + i * V::kPackedSize);
    if (i == count) continue;
    float rest[32] = {};
    for (int64_t j = 0; i + j < count; ++j) rest[j] = x[i + j];
    V::pack32(rest, o + i * V::kPackedSize);
  }
}

// Adds K values [from, to) to the sums of R weight rows, gap * ldw apart, and M packed activation rows; `from` 0 starts them. Of `tail`,
// the last values of each row, and of `sum` every gap-th is theirs. `ahead`: where the weights lie that come next, or null; they are asked
// for as what caches `keep`, or as used once.
template <int R, int M>
inline void bf16_steps(const uint16_t* w, int64_t ldw, const uint16_t (*tail)[32], const uint16_t* ahead, bool keep,
                       const uint8_t* x, int64_t ldx, int64_t from, int64_t to, int gap, V::Sum (*sum)[kFewRows]) {
  V::Sum s[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) s[r][m] = from ? sum[r * gap][m] : V::sum_zero();
  auto step = [&](int64_t i, const uint16_t* at, int64_t apart) {
    for (int half = 0; half < V::kBf16Halves; ++half) {
      V::Wide v[R];
      for (int r = 0; r < R; ++r) v[r] = V::load_w(at + r * apart, half);
      for (int m = 0; m < M; ++m) {
        const V::Packed f = V::load_packed(x + m * ldx + i * V::kPackedSize, half);
        for (int r = 0; r < R; ++r) V::dot_bf16(s[r][m], half, v[r], f);
      }
    }
  };
  int64_t i = from;
  for (; i + kStep <= to; i += kStep) {
    for (int r = 0; r < R && ahead; ++r) {
      const uint16_t* p = ahead + r * gap * ldw + i - from;
      keep ? GEMMA_PREFETCH(p) : GEMMA_PREFETCH_ONCE(p);
    }
    step(i, w + i, gap * ldw);
  }
  if (i < to) step(i, tail[0], gap * 32);
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sum[r * gap][m] = s[r][m];
}

// M rows of activations, which stay in the first cache, in pieces along K if need be, while all weight rows meet them. R weight rows at a
// time, each from a part of the panel of its own: hardware prefetch goes on past the end of a row, which should not be for nothing.
template <int R, int M>
inline void bf16_rows(const uint16_t* w, int64_t ldw, int rows, int64_t k, const uint8_t* x, int64_t piece,
                      const uint16_t* next, float* out, int64_t ldo) {
  uint16_t tail[kBf16Rows][32] = {};  // the last values of each row, padded with zeros to a step
  for (int r = 0; r < rows; ++r)
    for (int64_t j = k / kStep * kStep; j < k; ++j) tail[r][j % kStep] = w[r * ldw + j];
  const int part = rows / R, far = static_cast<int>(min_of<int64_t>(4, 1 + kFar / (R * k + 1)));
  V::Sum sum[kBf16Rows][kFewRows];
  const bool keep = is_intel();  // Emerald Rapids, for one, reads at half the speed what is asked for as used once
  for (int64_t from = 0; from < k; from += piece) {
    const int64_t to = min_of(from + piece, k);
    for (int r = 0; r < part; ++r) {
      // Hardware prefetch ends with a page: ask for what comes next, be it the rows below, the next piece or the next panel.
      const int over = r + far - part;
      const uint16_t* ahead = over < 0 ? w + (r + far) * ldw + from
                              : to < k ? w + over * ldw + to
                              : next   ? next + over * ldw
                                       : nullptr;
      bf16_steps<R, M>(w + r * ldw, ldw, tail + r, ahead, keep, x, pack_bytes(k), from, to, part, sum + r);
    }
    for (int r = R * part; r < rows; ++r)
      bf16_steps<1, M>(w + r * ldw, ldw, tail + r, nullptr, keep, x, pack_bytes(k), from, to, 1, sum + r);
  }
  for (int i = 0; i < M; ++i) V::close(&sum[0][i], kFewRows, rows, out + i * ldo);
}

// m <= M rows of activations. Memory is read fastest in its own order, whole weight rows one after another.
template <int M>
inline void bf16_few(const uint16_t* w, int64_t ldw, int rows, int64_t k, const uint8_t* x, int m, const uint16_t* next,
                     float* out, int64_t ldo) {
  if constexpr (M > 1)
    if (m < M) return bf16_few<M - 1>(w, ldw, rows, k, x, m, next, out, ldo);
  constexpr int64_t kMost = kNear / (M * V::kPackedSize), kPiece = kMost / kPage * kPage;
  static_assert(kPiece > 0);
  if (M == 1 || k <= kMost) return bf16_rows<V::bf16_tile(M, true), M>(w, ldw, rows, k, x, k, next, out, ldo);
  bf16_rows<V::bf16_tile(M, false), M>(w, ldw, rows, k, x, kPiece, next, out, ldo);
}

bool bf16(const uint16_t* w, int64_t ldw, int rows, int64_t k, const void* acts, int64_t first, int m, int64_t n,
          Packed packed, const uint16_t* next, uint8_t* scratch, float* out, int64_t ldo) {
  if (n > kFewRows)
    return bf16_columns(w, ldw, rows, k, static_cast<const V::Column*>(acts), first, m, n, packed, next, scratch, out,
                        ldo);
  bf16_few<kFewRows>(w, ldw, rows, k, static_cast<const uint8_t*>(acts), m, next, out, ldo);
  return false;
}

}  // namespace GEMMA_ISA
}  // namespace gemma
