// The operands of matvec.cu as fragments of m16n8k16, exactly: a bf16 or quantised weight less its scale is a bf16 value, and a float32
// activation is the sum of three.
#pragma once

#include "kernels.h"

namespace gemma::gpu {

constexpr int kMatvecThreads = 512, kMatvecWarps = kMatvecThreads / 32;
constexpr int kParts = 3;         // bf16 values that an activation is the sum of
constexpr int kMostValues = 128;  // rows of x are padded with zeros to a multiple of this

// ---- weights ---------------------------------------------------------------------------------------------------------------

// A chunk is what a lane reads of a row at once: a quarter of the values of BF16's 8 pieces, of others' 4.
GEMMA_HOST_DEVICE constexpr int chunk_values(DType t) { return t == DType::BF16 ? 64 : 128; }

// The place of lane q of a four in a row's planes.
struct RowAt {
  const uint8_t *low, *more, *high, *scales, *super;
};
template <DType T>
GEMMA_DEVICE RowAt row_at(const Planes& w, int row, int q) {
  const int64_t first = row * static_cast<int64_t>(static_cast<int>(w.pieces));
  RowAt r{};
  r.low = w.low + (first * 16 + q * 16);
  if constexpr (T == DType::BF16) return r;
  if constexpr (T == DType::Q8_0) r.more = w.more + (first * 16 + q * 16);
  if constexpr (high_bytes(T) > 0) r.high = w.high + (first * high_bytes(T) + q * high_bytes(T));
  r.scales = w.scales + first * (T == DType::Q4_1 || T == DType::Q5_1 ? 4 : 2);
  if constexpr (T == DType::Q6_K) r.super = w.super + first / 4;
  return r;
}

template <DType T>
struct Chunk {
  Word4 low, more;
  Word2 high;
  Word4 scales;
  uint32_t super;
};

// Chunk `c` of a row; BF16: zeros for pieces past the row's `pieces`.
template <DType T>
GEMMA_DEVICE Chunk<T> load_chunk(const RowAt& r, int c, int pieces, int q) {
  Chunk<T> v{};
  if constexpr (T == DType::BF16) {
    if (c * 8 + q < pieces) v.low = load_stream(r.low + c * 128);
    if (c * 8 + 4 + q < pieces) v.more = load_stream(r.low + c * 128 + 64);
    return v;
  }
  v.low = load_stream(r.low + c * 64);
  if constexpr (T == DType::Q8_0) v.more = load_stream(r.more + c * 64);
  if constexpr (high_bytes(T) == 4) v.high.x = *reinterpret_cast<const uint32_t*>(r.high + c * 16);
  if constexpr (high_bytes(T) == 8) v.high = *reinterpret_cast<const Word2*>(r.high + c * 32);
  if constexpr (T == DType::Q4_1 || T == DType::Q5_1) {
    v.scales = *reinterpret_cast<const Word4*>(r.scales + c * 16);
  } else if constexpr (T == DType::Q4_K || T == DType::Q5_K) {
    v.scales = *reinterpret_cast<const Word4*>(r.scales + c / 2 * 16);
  } else {
    const Word2 s = *reinterpret_cast<const Word2*>(r.scales + c * 8);
    v.scales.x = s.x;
    v.scales.y = s.y;
  }
  if constexpr (T == DType::Q6_K) v.super = *reinterpret_cast<const uint16_t*>(r.super + c / 2 * 2);
  return v;
}

GEMMA_DEVICE uint32_t word_of(const Word4& w, int i) { return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w; }

template <DType T>
GEMMA_DEVICE Scales chunk_scales(const Chunk<T>& v, int c, int b) {
  Scales s;
  if constexpr (T == DType::Q4_1 || T == DType::Q5_1) {
    const uint32_t dm = word_of(v.scales, b);
    s.scale = float_of_half(static_cast<uint16_t>(dm));
    s.minimum = float_of_half(static_cast<uint16_t>(dm >> 16));
  } else if constexpr (T == DType::Q4_K || T == DType::Q5_K) {
    s = k_scales(v.scales, c % 2 * 4 + b);
  } else {
    const uint32_t two = (b < 2 ? v.scales.x : v.scales.y) >> 16 * (b % 2) & 0xffff;
    if constexpr (T == DType::Q6_K)
      s = q6_scales(two, float_of_half(static_cast<uint16_t>(v.super)));
    else
      s.scale = float_of_half(static_cast<uint16_t>(two));
  }
  return s;
}

// Bit `from` of w becomes bit `to`.
GEMMA_DEVICE uint32_t shifted(uint32_t w, int from, int to) { return from < to ? w << (to - from) : w >> (from - to); }

// A lane's four values of 16 of piece b, first or second half, as two pairs of bf16: values 0 and 2 of the four, then 1 and 3. BF16: values
// 0 and 1, then 2 and 3, of four that stand together.
template <DType T>
GEMMA_DEVICE void fragment(const Chunk<T>& v, int b, int half, uint32_t* pairs) {
  if constexpr (T == DType::BF16) {
    const Word4& w = b ? v.more : v.low;
    pairs[0] = half ? w.z : w.x;
    pairs[1] = half ? w.w : w.y;
  } else if constexpr (T == DType::Q8_0) {
    // u = value + 128: 128 and its lower seven bits, less 128 or, where the highest is 0, 256.
    const uint32_t even = word_of(half ? v.more : v.low, b), odd = even >> 8;
    pairs[0] = add_pairs(masked_or(even, 0x007f007fu, 0x43004300u), masked_not_or(even, 0x00800080u, 0xc300c300u));
    pairs[1] = add_pairs(masked_or(odd, 0x007f007fu, 0x43004300u), masked_not_or(odd, 0x00800080u, 0xc300c300u));
  } else {
    const uint32_t w = word_of(v.low, b) >> 4 * half;
    // 0x4300 is 128 in bf16, and its lowest bit 1.
    uint32_t even = masked_or(w, 0x000f000fu, 0x43004300u), odd = masked_or(w >> 8, 0x000f000fu, 0x43004300u);
    if constexpr (high_bytes(T) == 4) {
      const int bit = 4 * b + 2 * half;
      even = masked_or(shifted(v.high.x, bit, 4), 0x00100010u, even);
      odd = masked_or(shifted(v.high.x, bit + 1, 4), 0x00100010u, odd);
    }
    if constexpr (high_bytes(T) == 8) {
      const uint32_t h = b < 2 ? v.high.x : v.high.y;
      const int bit = b % 2 * 8 + 4 * half;
      even = masked_or(shifted(h, bit, 4), 0x00300030u, even);
      odd = masked_or(shifted(h, bit + 2, 4), 0x00300030u, odd);
    }
    constexpr uint32_t less = bf16_bits_of_integer(-128 - value_offset(T)) * 0x10001u;
    pairs[0] = add_pairs(even, less);
    pairs[1] = add_pairs(odd, less);
  }
}

// ---- activations -----------------------------------------------------------------------------------------------------------

// Rows of x as the tensor cores take them: [K / 16][columns][4] units of four bf16 values, a column for each part of a row, and, where weights
// have a minimum, sums [K / 32][columns] of the values, in the column of a row's first part.
struct Split {
  uint16_t* units;
  float* sums;
  int columns;
};
GEMMA_HOST_DEVICE int64_t padded(int64_t cols) { return (cols + kMostValues - 1) / kMostValues * kMostValues; }
GEMMA_HOST_DEVICE int64_t split_bytes(int64_t cols, int rows) { return padded(cols) * rows * kParts * 2; }
GEMMA_HOST_DEVICE int64_t sums_bytes(int64_t cols, int rows) { return padded(cols) / 32 * rows * kParts * 4; }

// Unit u of row n, four values that stand together, to its place. With `minimum` a warp's lanes have neighbouring units.
GEMMA_DEVICE void split_unit(Float4 v, int u, int n, bool bf16, bool minimum, const Split& to) {
  if (minimum) {
    float s = v.x + v.y + (v.z + v.w);
    for (int m = 1; m < 8; m *= 2) s += shuffle_xor(s, m);
    if (u % 8 < kParts) to.sums[u / 8 * to.columns + n * kParts + u % 8] = u % 8 ? 0.0f : s;
  }
  // Where `fragment` has these four: 16 values by 16, lane, and order within the lane.
  const int at = bf16 ? u / 8 * 2 + u % 2 : u / 4, q = bf16 ? u % 8 / 2 : u % 4;
  float w[4] = {v.x, bf16 ? v.y : v.z, bf16 ? v.z : v.y, v.w};
  uint16_t* unit = to.units + ((at * to.columns + n * kParts) * 4 + q) * 4;
  GEMMA_UNROLL
  for (int p = 0; p < kParts; ++p) {
    const Word2 part = {bf16_pair(w[0], w[1]), bf16_pair(w[2], w[3])};
    *reinterpret_cast<Word2*>(unit + p * 16) = part;
    w[0] -= bits_float(part.x << 16);
    w[1] -= bits_float(part.x & 0xffff0000u);
    w[2] -= bits_float(part.y << 16);
    w[3] -= bits_float(part.y & 0xffff0000u);
  }
}

// The units of x[cols] that a thread has of a batch, from unit `from` on.
constexpr int kUnits = 4, kBatch = kUnits * kMatvecThreads;
GEMMA_DEVICE void load_units(const float* x, int from, int cols, Float4* v) {
  GEMMA_UNROLL
  for (int i = 0; i < kUnits; ++i) v[i] = load_four(x, 4 * (from + i * kMatvecThreads), cols);
}

// Row n of x to its columns, by a block; normed first where a.norm is there, of which `norm` has the first batch. Every launch does it alike,
// so that a row's bits are the same in any company. Loads come before stores, since the compiler cannot know that these hit other memory.
GEMMA_DEVICE void split_row(const MatvecArgs& a, int n, bool bf16, bool minimum, Float4* norm, float* scratch,
                            const Split& to) {
  const float* x = a.x + (a.pick ? a.pick[n] : n) * a.x_stride;
  const int units = static_cast<int>(padded(a.cols)) / 4;
  Float4 v[kUnits];
  load_units(x, thread_x(), a.cols, v);
  float scale = 1;
  if (a.norm) {
    float s = 0;
    for (int from = thread_x();; load_units(x, from, a.cols, v)) {
      GEMMA_UNROLL
      for (int i = 0; i < kUnits; ++i) {
        s = multiply_add(v[i].x, v[i].x, s);
        s = multiply_add(v[i].y, v[i].y, s);
        s = multiply_add(v[i].z, v[i].z, s);
        s = multiply_add(v[i].w, v[i].w, s);
      }
      from += kBatch;
      if (from >= units) break;
    }
    scale = 1.0f / sqrtf(block_sum<kMatvecThreads>(s, scratch) / static_cast<float>(a.cols) + a.eps);
    if (units > kBatch) load_units(x, thread_x(), a.cols, v);
  }
  for (int from = thread_x(); from < units;) {
    if (a.norm) {
      GEMMA_UNROLL
      for (int i = 0; i < kUnits; ++i)
        v[i] = {v[i].x * scale * norm[i].x, v[i].y * scale * norm[i].y, v[i].z * scale * norm[i].z,
                v[i].w * scale * norm[i].w};
    }
    GEMMA_UNROLL
    for (int i = 0; i < kUnits; ++i)
      if (from + i * kMatvecThreads < units) split_unit(v[i], from + i * kMatvecThreads, n, bf16, minimum, to);
    from += kBatch;
    if (from >= units) break;
    load_units(x, from, a.cols, v);
    if (a.norm) load_units(a.norm, from, a.cols, norm);
  }
}

}  // namespace gemma::gpu
