// Attention by AMX over a block of keys and values of bf16. Queries and the softmax's numerators are float32: each is the exact sum of three
// values of bf16 (but for what is below 2^-126, which AMX takes for zero), multiplied one after another, the largest first. Part of
// tiles-inl.h; for the layouts see attention-inl.h.
#pragma once

#include <cstring>

#include "bf16-tiles-inl.h"
#include "common-inl.h"
#include "functions-inl.h"
#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

constexpr int kSplit = 3;
// [16 keys][place][part][row]: each key's numerator as the lower (place 0) or the upper one (1) of two bf16 values, the other being zero, since
// a word of values has dimensions i and i + 16.
using Words = uint8_t[kKeys / kTile][2][kSplit][kQueryRows][kRowBytes];

// x = the sum of the parts, in order of size; the lower halves of their bits are zeros.
GEMMA_INLINE void split(F x, F* part) {
  for (int i = 0; i < kSplit; ++i) {
    part[i] = V::as_float(V::and_i(V::as_int(x), V::set_i(static_cast<int32_t>(0xffff0000u))));
    x = V::sub(x, part[i]);
  }
}

// As [e / 32][part][row][32] bf16 values.
void tile_queries(const float* q, int rows, int64_t e, void* out) {
  auto* to = static_cast<uint8_t*>(out);
  for (int64_t d = 0; d < e; d += kBlock, to += kSplit * rows * kRowBytes)
    for (int r = 0; r < rows; ++r) {
      F lower[kSplit], upper[kSplit];
      split(V::load(q + r * e + d), lower);
      split(V::load(q + r * e + d + W), upper);
      for (int i = 0; i < kSplit; ++i) {
        float part[kBlock];
        V::store(part, lower[i]);
        V::store(part + W, upper[i]);
        V::pack32(part, to + (i * rows + r) * kRowBytes);
      }
    }
}

// Tiles 0 to 3 are sums of `rows` rows, 4 to 6 have the three parts of what they multiply, and 7 has keys or values.
inline void configure_rows(int rows) {
  TileConfig c;
  for (int t = 0; t < 7; ++t) c.shape(t, rows, kRowBytes);
  c.shape(7, kTile, kRowBytes);
  tile_configure(c);
}

GEMMA_INLINE void load_parts(const uint8_t* p, int64_t part) {
  tile_load<4>(p, kRowBytes);
  tile_load<5>(p + part, kRowBytes);
  tile_load<6>(p + 2 * part, kRowBytes);
}
template <int SUM>
GEMMA_INLINE void dot_parts() {
  tile_dot_bf16<SUM, 4, 7>();
  tile_dot_bf16<SUM, 5, 7>();
  tile_dot_bf16<SUM, 6, 7>();
}

template <int... GROUP>
GEMMA_INLINE void scores(const uint8_t* q, int rows, int64_t e, const uint8_t* k, float (*p)[kKeys]) {
  (tile_zero<GROUP>(), ...);
  for (int64_t d = 0; d < e; d += kBlock, q += kSplit * rows * kRowBytes, k += kTileBytes) {
    load_parts(q, rows * kRowBytes);
    ((tile_load<7>(k + GROUP * kTile * e * 2, kRowBytes), dot_parts<GROUP>()), ...);
  }
  (tile_store<GROUP>(p[0] + GROUP * kTile, sizeof(p[0])), ...);
}

// out[row][32] = the sum of 32 dimensions of 64 values, weighed by `w`, which begins with the first row's words.
GEMMA_INLINE void weigh(const uint8_t* v, const uint8_t* w, float* out, int64_t e) {
  constexpr int64_t kPart = kQueryRows * kRowBytes;
  tile_zero<0>();
  tile_zero<1>();
  for (int j = 0; j < kKeys; j += kTile, v += kTileBytes, w += 2 * kSplit * kPart) {
    tile_load<7>(v, kRowBytes);
    load_parts(w, kPart);
    dot_parts<0>();
    load_parts(w + kSplit * kPart, kPart);
    dot_parts<1>();
  }
  tile_store<0>(out, e * sizeof(float));
  tile_store<1>(out + kTile, e * sizeof(float));
}

// Whether all values of keys [from, to) are finite.
inline bool all_finite(const uint8_t* v, int64_t e, int from, int to) {
  I any = V::set_i(0);
  for (int64_t d = 0; d < e; d += kBlock, v += kKeys * kRowBytes)
    for (int key = from; key < to; ++key)  // an exponent of ones and one more reaches the sign's place
      any =
          V::or_i(any, V::add_i(V::and_i(V::load_i(v + key * kRowBytes), V::set_i(0x7f807f80)), V::set_i(0x00800080)));
  alignas(64) uint32_t word[W];
  V::store_i(word, any);
  uint32_t all = 0;
  for (uint32_t x : word) all |= x;
  return (all & 0x80008000u) == 0;
}

// The kernel for keys and values of float32.
inline decltype(Kernels::attend) other_attend = nullptr;

// See kernels.h.
void tile_attend(bool f32, const void* queries, int rows, int64_t e, const void* keys, const void* values,
                 const void* next, const int* lo, const int* hi, float c, float* max, float* sum, float* out) {
  if (f32) return other_attend(f32, queries, rows, e, keys, values, next, lo, hi, c, max, sum, out);
  alignas(64) float p[kQueryRows][kKeys];
  alignas(64) Words words;
  configure_rows(rows);
  scores<0, 1, 2, 3>(static_cast<const uint8_t*>(queries), rows, e, static_cast<const uint8_t*>(keys), p);
  int from = 0, to = kKeys;  // keys that every row sees
  for (int r = 0; r < rows; ++r) {
    const bool any = lo[r] < hi[r];
    from = max_of(from, lo[r]);
    to = min_of(to, hi[r]);
    for (int i = 0; i < kKeys; i += W) {
      const F x = V::load(p[r] + i), masked = V::set(any ? -INFINITY : 0.0f);
      V::store(p[r] + i, V::between(c > 0 ? cap(x, c) : x, masked, lo[r] - i, hi[r] - i));
    }
    if (any) softmax(p[r], 0, kKeys, &max[r], &sum[r]);
    for (int i = 0; i < kKeys / kTile; ++i) {
      F part[kSplit];
      split(V::load(p[r] + i * kTile), part);
      for (int t = 0; t < kSplit; ++t) {
        V::store_i(words[i][0][t][r], V::shr_i(V::as_int(part[t]), 16));
        V::store_i(words[i][1][t][r], V::as_int(part[t]));
      }
    }
  }
  to = max_of(from, to);
  const auto* v = static_cast<const uint8_t*>(values);
  const bool together = all_finite(v, e, 0, from) && all_finite(v, e, to, kKeys);
  if (!together) configure_rows(1);
  for (int64_t d = 0; d < e; d += kBlock, v += kKeys * kRowBytes) {
    if (together) {
      weigh(v, words[0][0][0][0], out + d, e);
      continue;
    }
    // 0 * NaN would let a masked value through: each row takes zeros in its place.
    for (int r = 0; r < rows; ++r) {
      alignas(64) uint8_t seen[kKeys][kRowBytes] = {};
      if (lo[r] < hi[r]) std::memcpy(seen[lo[r]], v + lo[r] * kRowBytes, (hi[r] - lo[r]) * kRowBytes);
      weigh(seen[0], words[0][0][0][r], out + r * e + d, e);
    }
  }
  tile_release();
}

}  // namespace GEMMA_ISA
}  // namespace gemma
