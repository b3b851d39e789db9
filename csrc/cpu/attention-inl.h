// Attention over one block of keys. Part of kernels-inl.h.
#pragma once

#include "../quant.h"
#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

// ---- attention: one block of keys for up to kQueryRows query rows --------------------------------------------------------
// Keys lie as [4][e / 2][16 keys][2] (bf16) or [4][e][16 keys] (f32); values as [e / 32][64 keys][32], the bf16 ones with dimensions
// i and i + 16 side by side, so that one load gives two whole vectors (CpuKv in kv.h writes them).

template <bool F32>
inline void load_keys(const void* k, int64_t e, int64_t pair, int first, F& a, F& b) {
  const int64_t at = first / 16 * 16 * e + first % 16 * (F32 ? 1 : 2) + pair * 32;
  if (F32) {
    const float* p = static_cast<const float*>(k) + at;
    a = V::load(p);
    b = V::load(p + 16);
  } else {
    V::load_pairs(static_cast<const uint16_t*>(k) + at, a, b);
  }
}

template <bool F32>
inline void load_values(const void* v, int64_t at, int i, F& a, F& b) {
  if (F32) {
    const float* p = static_cast<const float*>(v) + at + i * W;
    a = V::load(p);
    b = V::load(p + 16);
  } else {
    V::load_pairs(static_cast<const uint16_t*>(v) + at + 2 * i * W, a, b);
  }
}

// Keys [first, last) of a block: which query row sees which.
template <int R>
struct Seen {
  const int *lo, *hi;           // of each row
  int first = kKeys, last = 0;  // keys that some row sees
  int from, to;                 // keys that every row sees, within those; empty ones end at `last`

  Seen(const int* begins, const int* ends) : lo(begins), hi(ends) {
    for (int r = 0; r < R; ++r)
      if (lo[r] < hi[r]) {
        first = lo[r] < first ? lo[r] : first;
        last = hi[r] > last ? hi[r] : last;
      }
    from = first, to = last;
    for (int r = 0; r < R; ++r) {
      from = lo[r] > from ? lo[r] : from;
      to = hi[r] < to ? hi[r] : to;
    }
    if (from >= to) from = to = last;
  }
};

// p[R][kKeys] = the numerators of the softmax of queries times keys; 0 where a row does not see one. Meanwhile the values are fetched.
template <bool F32, int R>
GEMMA_INLINE void attend_keys(const float* q, int64_t e, const void* k, const void* v, const Seen<R>& seen, float c,
                              float* max, float* sum, float (*p)[kKeys]) {
  const auto* fetch = static_cast<const uint8_t*>(v);
  constexpr int kVectors = R <= 2 ? 4 : 2;  // key vectors at once: enough chains to hide the latency of fma
  constexpr int kWide = kVectors * W < kKeys ? kVectors * W : kKeys;
  for (int key = seen.first / kWide * kWide; key < seen.last; key += kWide) {
    F s[R][kWide / W];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kWide / W; ++i) s[r][i] = V::zero();
    for (int64_t d = 0; d < e / 2; ++d) {
      for (int line = 0; line < 2 * kWide * (F32 ? 4 : 2); line += 64, fetch += 64) GEMMA_PREFETCH(fetch);
      F a[kWide / W], b[kWide / W];
      for (int i = 0; i < kWide / W; ++i) load_keys<F32>(k, e, d, key + i * W, a[i], b[i]);
      for (int r = 0; r < R; ++r) {  // the outer loop, so that no query waits in a register for the next vector of keys
        const F even = V::set(q[r * e + 2 * d]), odd = V::set(q[r * e + 2 * d + 1]);
        for (int i = 0; i < kWide / W; ++i) s[r][i] = V::fma(odd, b[i], V::fma(even, a[i], s[r][i]));
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kWide / W; ++i) {
        F x = c > 0 ? cap(s[r][i], c) : s[r][i];
        const int at = key + i * W;
        V::store(&p[r][at], V::between(x, V::set(-INFINITY), seen.lo[r] - at, seen.hi[r] - at));
      }
  }
  const int begin = seen.first / kWide * kWide, end = (seen.last + kWide - 1) / kWide * kWide;
  for (int r = 0; r < R; ++r) {
    if (seen.lo[r] >= seen.hi[r]) {
      for (int i = begin; i < end; i += W) V::store(&p[r][i], V::zero());
      continue;
    }
    softmax(p[r], begin, end, &max[r], &sum[r]);
  }
}

// out[R][e] = p times values. A row takes only the keys that it sees, since 0 * NaN would let a masked value through. Meanwhile the next
// keys are fetched.
template <bool F32, int R>
GEMMA_INLINE void attend_values(const float (*p)[kKeys], int64_t e, const void* v, const void* next,
                                const Seen<R>& seen, float* out) {
  const auto* fetch = static_cast<const uint8_t*>(next);
  for (int64_t d = 0; d < e; d += 32)
    for (int i = 0; i < 16 / W; ++i) {
      F x[R], y[R];
      for (int r = 0; r < R; ++r) x[r] = y[r] = V::zero();
      auto join = [&](int begin, int end, bool shared) {
        for (int key = begin; key < end; ++key) {
          F a, b;
          load_values<F32>(v, d * kKeys + key * 32, i, a, b);
          if (fetch && i == 0) {
            for (int line = 0; line < 32 * (F32 ? 4 : 2); line += 64, fetch += 64) GEMMA_PREFETCH(fetch);
          }
          for (int r = 0; r < R; ++r) {
            if (!shared && (key < seen.lo[r] || key >= seen.hi[r])) continue;
            const F w = V::set(p[r][key]);
            x[r] = V::fma(w, a, x[r]);
            y[r] = V::fma(w, b, y[r]);
          }
        }
      };
      join(seen.first, seen.from, false);
      join(seen.from, seen.to, true);
      join(seen.to, seen.last, false);
      for (int r = 0; r < R; ++r)
        if (seen.lo[r] < seen.hi[r]) {
          V::store(out + r * e + d + i * W, x[r]);
          V::store(out + r * e + d + 16 + i * W, y[r]);
        }
    }
}

// R rows. A step over a long context waits for memory: hence what is fetched ahead.
template <bool F32, int R>
void attend_rows(const float* q, int64_t e, const void* k, const void* v, const void* next, const int* lo,
                 const int* hi, float c, float* max, float* sum, float* out) {
  const Seen<R> seen(lo, hi);
  if (seen.first >= seen.last) return;
  alignas(64) float p[R][kKeys];
  attend_keys<F32, R>(q, e, k, v, seen, c, max, sum, p);
  attend_values<F32, R>(p, e, v, next, seen, out);
}

constexpr int kRowTile = W == 16 ? 8 : 4;  // query rows whose sums fit the registers

template <bool F32, int R = kRowTile>
void attend_any(const float* q, int rows, int64_t e, const void* k, const void* v, const void* next, const int* lo,
                const int* hi, float c, float* max, float* sum, float* out) {
  int r = 0;
  // The same keys come next unless these rows are the last.
  for (; r + R <= rows; r += R)
    attend_rows<F32, R>(q + r * e, e, k, v, r + R < rows ? k : next, lo + r, hi + r, c, max + r, sum + r, out + r * e);
  if constexpr (R > 1)
    attend_any<F32, R / 2>(q + r * e, rows - r, e, k, v, next, lo + r, hi + r, c, max + r, sum + r, out + r * e);
}

void attend(bool f32, const void* queries, int rows, int64_t e, const void* k, const void* v, const void* next,
            const int* lo, const int* hi, float c, float* max, float* sum, float* out) {
  const auto* q = static_cast<const float*>(queries);
  if (f32)
    attend_any<true>(q, rows, e, k, v, next, lo, hi, c, max, sum, out);
  else
    attend_any<false>(q, rows, e, k, v, next, lo, hi, c, max, sum, out);
}

void fold(float* max, float* sum, float* acc, float block_max, float block_sum, const float* block, int64_t e) {
  const float top = *max > block_max ? *max : block_max;
  alignas(64) float t[W] = {};
  t[0] = *max - top;
  t[1] = block_max - top;
  V::store(t, exp(V::load(t)));
  const F a = V::set(t[0]), b = V::set(t[1]);
  *sum = *sum * t[0] + block_sum * t[1];
  *max = top;
  for (int64_t d = 0; d < e; d += W) V::store(acc + d, V::fma(V::load(block + d), b, V::mul(V::load(acc + d), a)));
}

void divide(const float* acc, float sum, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += W) V::store_n(out + i, V::div(V::load_n(acc + i, n - i), V::set(sum)), n - i);
}

}  // namespace GEMMA_ISA
}  // namespace gemma
