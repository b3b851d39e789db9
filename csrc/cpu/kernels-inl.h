// The bodies of all CPU kernels, over the small vector type V of vec_*.h. Included once for each instruction-set level, inside
// that level's namespace; nothing here may come from a header that other levels share as inline code (the linker would keep
// one copy, perhaps the one that an older CPU cannot run).
#pragma once

#include <math.h>

#include "../quant.h"
#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

using F = V::F;
using I = V::I;
using B = V::B;
constexpr int W = V::W;
constexpr int kGroups = kPanel / W;  // vectors that cover a panel's 32 rows

#if defined(__GNUC__)
#define GEMMA_PREFETCH(p) __builtin_prefetch(p)
#define GEMMA_INLINE __attribute__((always_inline)) inline
#else
#define GEMMA_PREFETCH(p) (void)(p)
#define GEMMA_INLINE inline
#endif

// ---- elementary functions ----------------------------------------------------------------------------------------------

// e^x, 2 ulp; 0 below -87.3 (so masked scores vanish), clamped above 88.3; NaN stays.
inline F exp(F x) {
  // x = n ln2 + r, |r| <= ln2 / 2; e^r by its series.
  F c = V::max(V::set(-87.3f), V::min(V::set(88.3f), x));
  I n = V::round(V::mul(c, V::set(1.44269504f)));
  F f = V::to_float(n);
  F r = V::fnma(f, V::set(-2.12194440e-4f), V::fnma(f, V::set(0.693359375f), c));
  F p = V::set(1.0f / 5040);
  p = V::fma(p, r, V::set(1.0f / 720));
  p = V::fma(p, r, V::set(1.0f / 120));
  p = V::fma(p, r, V::set(1.0f / 24));
  p = V::fma(p, r, V::set(1.0f / 6));
  p = V::fma(p, r, V::set(0.5f));
  p = V::fma(p, r, V::set(1.0f));
  p = V::fma(p, r, V::set(1.0f));
  p = V::mul(p, V::as_float(V::shl_i<23>(V::add_i(n, V::set_i(127)))));
  return V::less(x, V::set(-87.3f), V::zero(), p);
}

// tanh x: from (e^2x - 1) / (e^2x + 1), with e^2x - 1 by its series near 0, where the difference would cancel.
inline F tanh(F x) {
  F t = V::add(x, x);
  F s = V::set(1.0f / 479001600);
  const float inverse[] = {1.0f / 39916800, 1.0f / 3628800, 1.0f / 362880, 1.0f / 40320, 1.0f / 5040, 1.0f / 720,
                           1.0f / 120,      1.0f / 24,      1.0f / 6,      0.5f,         1.0f};
  for (float c : inverse) s = V::fma(s, t, V::set(c));
  s = V::mul(s, t);
  F near = V::div(s, V::add(s, V::set(2.0f)));
  F far = V::sub(V::set(1.0f), V::div(V::set(2.0f), V::add(exp(t), V::set(1.0f))));
  return V::less(V::abs(t), V::set(1.0f), near, far);
}

// x gelu: 0.5 x (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
inline F gelu(F x) {
  F u = V::mul(V::mul(V::set(-1.59576912f), x), V::fma(V::mul(x, x), V::set(0.044715f), V::set(1.0f)));
  return V::div(x, V::add(V::set(1.0f), exp(u)));
}

// ---- pointwise ---------------------------------------------------------------------------------------------------------

void rms_norm(const float* x, const float* w, int64_t n, float eps, float* out) {
  F s = V::zero(), t = V::zero();
  int64_t i = 0;
  for (; i + 2 * W <= n; i += 2 * W) {
    F a = V::load(x + i), b = V::load(x + i + W);
    s = V::fma(a, a, s);
    t = V::fma(b, b, t);
  }
  for (; i < n; i += W) {
    F a = V::load_n(x + i, n - i);
    s = V::fma(a, a, s);
  }
  const F scale = V::set(1.0f / V::root(V::sum(V::add(s, t)) / static_cast<float>(n) + eps));
  for (i = 0; i < n; i += W)
    V::store_n(out + i, V::mul(V::mul(V::load_n(x + i, n - i), scale), V::load_n(w + i, n - i)), n - i);
}

void geglu(const float* gate, const float* up, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += W)
    V::store_n(out + i, V::mul(gelu(V::load_n(gate + i, n - i)), V::load_n(up + i, n - i)), n - i);
}

void add(float* x, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += W) V::store_n(x + i, V::add(V::load_n(x + i, n - i), V::load_n(y + i, n - i)), n - i);
}

inline F cap(F x, float c) { return V::mul(V::set(c), tanh(V::div(x, V::set(c)))); }

void softcap(float* x, int64_t n, float c) {
  for (int64_t i = 0; i < n; i += W) V::store_n(x + i, cap(V::load_n(x + i, n - i), c), n - i);
}

void rope(float* x, const float* cos, const float* sin, int64_t half, float scale) {
  const F k = V::set(scale);
  for (int64_t i = 0; i < half; i += W) {
    const int64_t n = half - i;
    F a = V::load_n(x + i, n), b = V::load_n(x + half + i, n), c = V::load_n(cos + i, n), s = V::load_n(sin + i, n);
    V::store_n(x + i, V::mul(V::fnma(b, s, V::mul(a, c)), k), n);
    V::store_n(x + half + i, V::mul(V::fma(a, s, V::mul(b, c)), k), n);
  }
}

void log_sum(const float* x, int64_t n, float* max, float* sum) {
  F m = V::set(-INFINITY);
  int64_t i = 0;
  for (; i + W <= n; i += W) m = V::max(m, V::load(x + i));
  for (; i < n; ++i) m = V::max(m, V::set(x[i]));
  const float top = V::max_of(m);
  F s = V::zero();
  for (i = 0; i < n; i += W)
    s = V::add(s, V::between(exp(V::sub(V::load_n(x + i, n - i), V::set(top))), V::zero(), 0,
                             n - i < W ? static_cast<int>(n - i) : W));
  *max = top;
  *sum = V::sum(s);
}

// ---- activations -------------------------------------------------------------------------------------------------------

// W half blocks of 16 values at a time, so that their maxima and sums fill a vector: those of W / 2 blocks, `from` each its 32 values.
void quantize_blocks(const float* const* from, bool fine, int8_t* const* q, ActScale* const* scale) {
  constexpr int kVectors = 16 / W;  // a half
  auto max_bits = [](F a, F b) { return V::as_float(V::max_i(V::as_int(a), V::as_int(b))); };
  auto add_bits = [](F a, F b) { return V::as_float(V::add_i(V::as_int(a), V::as_int(b))); };
  F v[W][kVectors], bits[W];
  for (int i = 0; i < W; ++i)
    for (int g = 0; g < kVectors; ++g) {
      v[i][g] = V::load(from[i / 2] + i % 2 * 16 + g * W);
      bits[i] = g ? max_bits(bits[i], V::abs(v[i][g])) : V::abs(v[i][g]);
    }
  // As integers, magnitudes order like floats, with infinities and NaN above all.
  I most = V::as_int(V::join(bits, max_bits));
  const I either = V::max_i(most, V::swap_pairs(most));
  if (!fine) most = either;
  const F amax = V::as_float(most), d = V::mul(amax, V::set(1.0f / 127.0f));
  alignas(64) int32_t top[W], sum[W];
  alignas(64) float inverse[W], each_d[W], each_dsum[W];
  V::store_i(top, either);
  V::store(inverse, V::less(V::set(1e-30f), amax, V::div(V::set(127.0f), amax), V::zero()));
  for (int i = 0; i < W; ++i) {
    I total = V::set_i(0);
    for (int g = 0; g < kVectors; ++g) {
      const I r = top[i] < 0x7f800000 ? V::round(V::mul(v[i][g], V::set(inverse[i]))) : V::set_i(0);
      V::store_i8(q[i / 2] + i % 2 * 16 + g * W, r);
      total = V::add_i(total, r);
    }
    bits[i] = V::as_float(total);
  }
  const I sums = V::as_int(V::join(bits, add_bits));
  V::store_i(sum, sums);
  V::store(each_d, d);
  V::store(each_dsum, V::mul(d, V::to_float(sums)));
  for (int i = 0; i < W; i += 2) {
    const bool finite = top[i] < 0x7f800000;
    ActScale& s = *scale[i / 2];
    s.d[0] = finite ? each_d[i] : NAN;
    s.d[1] = finite ? each_d[i + 1] : NAN;
    s.dsum = finite ? each_dsum[i] + each_dsum[i + 1] : NAN;
    s.sum = sum[i] + sum[i + 1];
    s.sum0 = sum[i];
  }
}

void quantize(const float* x, int64_t ldx, int n, int64_t k, bool fine, int8_t* q, ActScale* scale, int rows) {
  constexpr int kItems = W / 2;
  float rest[kItems][kBlock];  // blocks that the row does not fill
  int8_t no_q[kBlock];
  ActScale no_scale;
  const int64_t items = (k + kBlock - 1) / kBlock * n;
  int64_t block = 0;
  int row = 0;
  for (int64_t done = 0; done < items; done += kItems) {
    const float* from[kItems];
    int8_t* to[kItems];
    ActScale* to_scale[kItems];
    for (int i = 0; i < kItems; ++i) {
      const int64_t at = block * kBlock, slot = block * rows + row;
      from[i] = x + row * ldx + at;
      to[i] = q + slot * kBlock;
      to_scale[i] = scale + slot;
      if (at + kBlock > k) {
        for (int j = 0; j < kBlock; ++j) rest[i][j] = at + j < k ? from[i][j] : 0.0f;
        from[i] = rest[i];
      }
      if (done + i >= items) {
        to[i] = no_q;
        to_scale[i] = &no_scale;
      }
      if (++row == n) row = 0, ++block;
    }
    quantize_blocks(from, fine, to, to_scale);
  }
}

constexpr int64_t kDepth = 1024;  // K values that the rows of a packed piece share

int64_t pack_bytes(int64_t k) { return (k + 31) / 32 * 32 * V::kPackedSize; }

// Where K values [from, from + kDepth) of row 0 begin among `rows` packed rows, and how far apart the rows are there: a piece is
// contiguous, so that it fills a cache evenly.
inline int64_t piece_at(int64_t from, int64_t rows) { return from * rows * V::kPackedSize; }
inline int64_t piece_stride(int64_t from, int64_t k) { return pack_bytes(k - from < kDepth ? k - from : kDepth); }

void pack(const float* x, int64_t at, int64_t count, int64_t k, void* out, int64_t row, int64_t rows) {
  for (int64_t i = at; i < at + count; i += 32, x += 32) {
    const int64_t from = i / kDepth * kDepth;
    uint8_t* o =
        static_cast<uint8_t*>(out) + piece_at(from, rows) + row * piece_stride(from, k) + (i - from) * V::kPackedSize;
    if (i + 32 <= at + count) {
      V::pack32(x, o);
    } else {
      float rest[32] = {};
      for (int64_t j = 0; i + j < at + count; ++j) rest[j] = x[j];
      V::pack32(rest, o);
    }
  }
}

// ---- quantised weights: one decoder an encoding ------------------------------------------------------------------------

template <int G>
inline void load_4bit(const uint8_t* plane, B* w) {
  constexpr int at = G * W % 16 * 4;
  for (int i = 0; i < 8; ++i) {
    B x = V::load_b(plane + i * 64 + at);
    w[i] = G * W >= 16 ? V::high4(x) : V::low4(x);
  }
}

template <int G>
inline void load_8bit(const uint8_t* high, const uint8_t* low, B* w) {
  constexpr int at = G * W % 16 * 4;
  for (int i = 0; i < 8; ++i) {
    const B h = V::load_b(high + i * 64 + at), l = V::load_b(low + i * 64 + at);
    w[i] = G * W >= 16 ? V::join_high(h, l) : V::join_low(h, l);
  }
}

template <int G>
inline void load_5bit(const uint8_t* plane1, const uint8_t* plane4, B* w) {
  load_4bit<G>(plane4, w);
  const B p = V::load_b(plane1 + G * W * 4);
  w[0] = V::or_bit<0>(w[0], p);
  w[1] = V::or_bit<1>(w[1], p);
  w[2] = V::or_bit<2>(w[2], p);
  w[3] = V::or_bit<3>(w[3], p);
  w[4] = V::or_bit<4>(w[4], p);
  w[5] = V::or_bit<5>(w[5], p);
  w[6] = V::or_bit<6>(w[6], p);
  w[7] = V::or_bit<7>(w[7], p);
}

template <int G>
inline void load_6bit(const uint8_t* plane2, const uint8_t* plane4, B* w) {
  load_4bit<G>(plane4, w);
  for (int h = 0; h < 2; ++h) {
    const B p = V::load_b(plane2 + h * 128 + G * W * 4);
    w[4 * h + 0] = V::or_pair<0>(w[4 * h + 0], p);
    w[4 * h + 1] = V::or_pair<1>(w[4 * h + 1], p);
    w[4 * h + 2] = V::or_pair<2>(w[4 * h + 2], p);
    w[4 * h + 3] = V::or_pair<3>(w[4 * h + 3], p);
  }
}

// A block of 32 along K for the W rows of group G: their values as unsigned bytes (value = byte - kOffset), a scale for each
// kSubs-th of the block, and an offset where kMin says so.
struct Block {
  B w[8];
  F scale[2];
  F min;
};

template <int BITS, bool MIN>
struct Simple {  // Q4_0 Q4_1 Q5_0 Q5_1
  static constexpr int kBits = BITS, kOffset = MIN ? 0 : 1 << (BITS - 1), kSubs = 1, kUnitBlocks = 1;
  static constexpr bool kMin = MIN;
  static constexpr int kScales = MIN ? 128 : 64;
  static constexpr int kUnit = kScales + BITS * 128, kTail = 0, kLeaves = 0;
  template <int G>
  static void decode(const uint8_t* unit, const uint8_t*, int, Block& b) {
    b.scale[0] = V::load_half(unit + G * W * 2);
    if (MIN) b.min = V::load_half(unit + 64 + G * W * 2);
    if (BITS == 5) load_5bit<G>(unit + kScales, unit + kScales + 128, b.w);
    if (BITS == 4) load_4bit<G>(unit + kScales, b.w);
  }
};

struct EightBit {  // Q8_0
  static constexpr int kBits = 8, kOffset = 128, kSubs = 1, kUnitBlocks = 1;
  static constexpr bool kMin = false;
  static constexpr int kUnit = 576, kTail = 512, kLeaves = 0;
  template <int G>
  static void decode(const uint8_t* unit, const uint8_t* tail, int, Block& b) {
    b.scale[0] = V::load_half(unit + G * W * 2);
    load_8bit<G>(unit + 64, tail, b.w);
  }
};

struct HighHalf {  // Q8_0 by its high halves: 16 (h - 8) + 7.5
  static constexpr int kBits = 4, kOffset = 8, kSubs = 1, kUnitBlocks = 1;
  static constexpr bool kMin = true;
  static constexpr int kUnit = 576, kTail = 0, kLeaves = 512;
  template <int G>
  static void decode(const uint8_t* unit, const uint8_t*, int, Block& b) {
    const F d = V::load_half(unit + G * W * 2);
    b.scale[0] = V::mul(d, V::set(16.0f));
    b.min = V::mul(d, V::set(7.5f));
    load_4bit<G>(unit + 64, b.w);
  }
};

template <int BITS>
struct TwoLevel {  // Q4_K Q5_K
  static constexpr int kBits = BITS, kOffset = 0, kSubs = 1, kUnitBlocks = 8;
  static constexpr bool kMin = true;
  static constexpr int kHeader = 512;
  static constexpr int kUnit = kHeader + 8 * BITS * 128, kTail = 0, kLeaves = 0;
  template <int G>
  static void decode(const uint8_t* unit, const uint8_t*, int j, Block& b) {
    const I hi = V::shr_i(V::load_i(unit + 128 + G * W * 4), 4 * j);
    const I lo = V::load_u8(unit + 256 + j * 32 + G * W);
    const I three = V::set_i(3);
    const I sc = V::or_i(V::and_i(lo, V::set_i(15)), V::shl_i<4>(V::and_i(hi, three)));
    const I mn = V::or_i(V::shr_i(lo, 4), V::shl_i<4>(V::and_i(V::shr_i(hi, 2), three)));
    b.scale[0] = V::mul(V::load_half(unit + G * W * 2), V::to_float(sc));
    b.min = V::sub(V::zero(), V::mul(V::load_half(unit + 64 + G * W * 2), V::to_float(mn)));
    const uint8_t* planes = unit + kHeader + j * BITS * 128;
    if (BITS == 5) load_5bit<G>(planes, planes + 128, b.w);
    if (BITS == 4) load_4bit<G>(planes, b.w);
  }
};

struct SixBit {  // Q6_K
  static constexpr int kBits = 6, kOffset = 32, kSubs = 2, kUnitBlocks = 8;
  static constexpr bool kMin = false;
  static constexpr int kUnit = 64 + 8 * 832, kTail = 0, kLeaves = 0;
  template <int G>
  static void decode(const uint8_t* unit, const uint8_t*, int j, Block& b) {
    const uint8_t* block = unit + 64 + j * 832;
    const F d = V::load_half(unit + G * W * 2);
    b.scale[0] = V::mul(d, V::to_float(V::load_i8(block + G * W)));
    b.scale[1] = V::mul(d, V::to_float(V::load_i8(block + 32 + G * W)));
    load_6bit<G>(block + 64, block + 64 + 256, b.w);
  }
};

// acc += scale * (w . q) * d + min * d * sum(q): one block, one activation row. The order is the specification: for each scale
// the integer dot product and one fma, then one for the offset.
template <class Q, bool FINE>
inline F block_dot(const Block& b, const int8_t* q, const ActScale& s, F acc) {
  if (Q::kSubs == 1 && !FINE) {
    acc = V::fma(V::to_float(V::template dot<Q::kBits, Q::kOffset, 8>(b.w, q, s.sum)),
                 V::mul(b.scale[0], V::set(s.d[0])), acc);
  } else {
    const F second = b.scale[Q::kSubs - 1];
    acc = V::fma(V::to_float(V::template dot<Q::kBits, Q::kOffset, 4>(b.w, q, s.sum0)),
                 V::mul(b.scale[0], V::set(s.d[0])), acc);
    acc = V::fma(V::to_float(V::template dot<Q::kBits, Q::kOffset, 4>(b.w + 4, q + 16, s.sum - s.sum0)),
                 V::mul(second, V::set(s.d[1])), acc);
  }
  if (Q::kMin) acc = V::fma(b.min, V::set(s.dsum), acc);
  return acc;
}

// One activation row: sums stay in registers and the panel is read once, in order.
template <class Q, bool FINE, int G>
struct OneRow {
  static GEMMA_INLINE void step(const uint8_t* unit, const uint8_t* tail, int j, const int8_t* q, const ActScale& s,
                                F* acc) {
    OneRow<Q, FINE, G - 1>::step(unit, tail, j, q, s, acc);
    Block b;
    Q::template decode<G - 1>(unit, tail, j, b);
    acc[G - 1] = block_dot<Q, FINE>(b, q, s, acc[G - 1]);
  }
};
template <class Q, bool FINE>
struct OneRow<Q, FINE, 0> {
  static GEMMA_INLINE void step(const uint8_t*, const uint8_t*, int, const int8_t*, const ActScale&, F*) {}
};

// Several rows: a block of weights stays in registers while all activation rows stream past it; sums lie in the L1 tile.
constexpr int kHeld = W == 16 ? 2 : 1;  // groups held at once: 16 of 32 registers, or 8 of 16

template <class Q, bool FINE, int G>
struct ManyRows {
  static void step(const uint8_t* unit, const uint8_t* tail, int j, const int8_t* q, const ActScale* s, int rows,
                   float* tile) {
    ManyRows<Q, FINE, G - kHeld>::step(unit, tail, j, q, s, rows, tile);
    Block b0, b1;
    Q::template decode<G - kHeld>(unit, tail, j, b0);
    if (kHeld == 2) Q::template decode<G - 1>(unit, tail, j, b1);
    for (int i = 0; i < rows; ++i) {
      float* t = tile + i * kPanel + (G - kHeld) * W;
      F x = V::load(t);
      F y = kHeld == 2 ? V::load(t + W) : x;
      x = block_dot<Q, FINE>(b0, q + i * kBlock, s[i], x);
      if (kHeld == 2) y = block_dot<Q, FINE>(b1, q + i * kBlock, s[i], y);
      V::store(t, x);
      if (kHeld == 2) V::store(t + W, y);
    }
  }
};
template <class Q, bool FINE>
struct ManyRows<Q, FINE, 0> {
  static void step(const uint8_t*, const uint8_t*, int, const int8_t*, const ActScale*, int, float*) {}
};

// Where blocks [first, first + count) of a panel lie. For the few rows of a decode step, that is all the kernel waits for.
struct Run {
  const uint8_t* panel;
  int64_t blocks, first, count;
  bool add;
};

template <class Q, bool FINE>
void panel_rows(const Run& run, const QuantActs& a, float* tile) {
  constexpr int kBlockBytes = Q::kUnit / Q::kUnitBlocks;
  const uint8_t* unit = run.panel + run.first * kBlockBytes;
  const uint8_t* tail = run.panel + run.blocks * kBlockBytes + run.first * Q::kTail;
  const int8_t* q = a.q;
  const ActScale* s = a.scale;
  if (a.rows == 1) {
    F acc[kGroups];
    for (int g = 0; g < kGroups; ++g) acc[g] = run.add ? V::load(tile + g * W) : V::zero();
    for (int64_t u = 0; u < run.count / Q::kUnitBlocks; ++u, unit += Q::kUnit, tail += Q::kTail)
      for (int j = 0; j < Q::kUnitBlocks; ++j, q += kBlock, ++s) {
        // Hardware prefetch ends with a page and knows nothing of where the low halves are left out.
        constexpr int kAhead = 16 * kBlockBytes;
        const uint8_t* ahead = unit + (Q::kLeaves ? run.blocks * (Q::kUnit + Q::kLeaves) : j * kBlockBytes + kAhead);
        for (int p = 0; p < kBlockBytes; p += 64) GEMMA_PREFETCH(ahead + p);
        for (int p = 0; p < Q::kTail; p += 64) GEMMA_PREFETCH(tail + 16 * Q::kTail + p);
        OneRow<Q, FINE, kGroups>::step(unit, tail, j, q, *s, acc);
      }
    for (int g = 0; g < kGroups; ++g) V::store(tile + g * W, acc[g]);
    return;
  }
  for (int i = 0; !run.add && i < a.rows * kPanel; i += W) V::store(tile + i, V::zero());
  for (int64_t u = 0; u < run.count / Q::kUnitBlocks; ++u, unit += Q::kUnit, tail += Q::kTail)
    for (int j = 0; j < Q::kUnitBlocks; ++j, q += kBlock * a.rows, s += a.rows) {
      // With few rows the kernel would wait for memory: 16 blocks ahead keeps the reads in flight.
      for (int p = 0; p < kBlockBytes; p += 64) GEMMA_PREFETCH(unit + (j + 16) * kBlockBytes + p);
      for (int p = 0; p < Q::kTail; p += 64) GEMMA_PREFETCH(tail + 16 * Q::kTail + p);
      ManyRows<Q, FINE, kGroups>::step(unit, tail, j, q, s, a.rows, tile);
    }
}

template <class Q>
inline void panel_of(const Run& run, const QuantActs& a, float* tile) {
  a.fine ? panel_rows<Q, true>(run, a, tile) : panel_rows<Q, false>(run, a, tile);
}

void panel(DType type, const uint8_t* data, int64_t blocks, int64_t first, int64_t count, const QuantActs& a, bool add,
           float* tile) {
  const Run run{data, blocks, first, count, add};
  switch (type) {
    case DType::Q8_0:
      return panel_of<EightBit>(run, a, tile);
    case DType::Q4_0:
      return panel_of<Simple<4, false>>(run, a, tile);
    case DType::Q4_1:
      return panel_of<Simple<4, true>>(run, a, tile);
    case DType::Q5_0:
      return panel_of<Simple<5, false>>(run, a, tile);
    case DType::Q5_1:
      return panel_of<Simple<5, true>>(run, a, tile);
    case DType::Q4_K:
      return panel_of<TwoLevel<4>>(run, a, tile);
    case DType::Q5_K:
      return panel_of<TwoLevel<5>>(run, a, tile);
    case DType::Q6_K:
      return panel_of<SixBit>(run, a, tile);
    default:
      return;
  }
}

void scan(const uint8_t* data, int64_t blocks, const QuantActs& a, const float* energy, float* tile, float* variance) {
  panel_of<HighHalf>({data, blocks, 0, blocks, false}, a, tile);
  for (int i = 0; i < a.rows; ++i)
    for (int g = 0; g < kGroups; ++g) {
      F sum = V::zero();
      for (int64_t b = 0; b < blocks; ++b) {
        const F d = V::load_half(data + b * HighHalf::kUnit + g * W * 2);
        sum = V::fma(V::mul(d, d), V::set(energy[b * a.rows + i]), sum);
      }
      V::store(variance + i * kPanel + g * W, sum);
    }
}

// ---- bf16 weights in file order: lane j sums k = j modulo the step, one fixed tree closes the row ------------------------

constexpr int kStep = V::kBf16Step;
constexpr int64_t kSpan =
    4096;  // K values of a panel's weights that stay in L2; a piece of a tile's activations stays in L1

// Adds K values [from, to) to the sums of R weight rows and M activation rows; `from` 0 starts them. `tail` holds the last values
// of each weight row, padded with zeros. `ahead` is where the next tile's weights lie, null when they are in the cache.
template <int R, int M, bool AHEAD>
inline void bf16_steps(const uint16_t* w, int64_t ldw, const uint8_t* x, int64_t ldx, int64_t from, int64_t to,
                       const uint16_t (*tail)[32], const uint16_t* ahead, V::Sum (*sum)[V::kBf16TileX]) {
  V::Sum s[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) s[r][m] = from ? sum[r][m] : V::sum_zero();
  int64_t i = from;
  for (; i + kStep <= to; i += kStep) {
    V::Wide v[R];
    for (int r = 0; r < R; ++r) {
      v[r] = V::load_w(w + r * ldw + i);
      if (AHEAD) GEMMA_PREFETCH(ahead + r * ldw + (i - from));
    }
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) V::dot_bf16(s[r][m], v[r], x + m * ldx + (i - from) * V::kPackedSize);
  }
  if (i < to)
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) V::dot_bf16(s[r][m], V::load_w(tail[r]), x + m * ldx + (i - from) * V::kPackedSize);
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sum[r][m] = s[r][m];
}

// The same for `rows` <= kBf16TileW weight rows and m <= M activation rows.
template <int M>
struct Bf16Tile {
  static void add(int rows, int m, const uint16_t* w, int64_t ldw, const uint8_t* x, int64_t ldx, int64_t from,
                  int64_t to, const uint16_t (*tail)[32], const uint16_t* ahead, V::Sum (*sum)[V::kBf16TileX]) {
    constexpr int R = V::kBf16TileW;
    if (m < M) return Bf16Tile<M - 1>::add(rows, m, w, ldw, x, ldx, from, to, tail, ahead, sum);
    if (rows == R && ahead) return bf16_steps<R, M, true>(w, ldw, x, ldx, from, to, tail, ahead, sum);
    if (rows == R) return bf16_steps<R, M, false>(w, ldw, x, ldx, from, to, tail, ahead, sum);
    for (int r = 0; r < rows; ++r)
      bf16_steps<1, M, false>(w + r * ldw, ldw, x, ldx, from, to, tail + r, ahead, sum + r);
  }
};
template <>
struct Bf16Tile<0> {
  static void add(int, int, const uint16_t*, int64_t, const uint8_t*, int64_t, int64_t, int64_t, const uint16_t (*)[32],
                  const uint16_t*, V::Sum (*)[V::kBf16TileX]) {}
};

void bf16(const uint16_t* w, int64_t ldw, int rows, int64_t k, const void* acts, int64_t first, int m, int64_t n,
          float* out, int64_t ldo) {
  constexpr int R = V::kBf16TileW, M = V::kBf16TileX, kTiles = (kActChunk + M - 1) / M;
  static_assert(kBf16Rows % R == 0, "a call is a whole number of tiles");
  V::Sum sums[kTiles][kBf16Rows][M];
  uint16_t tail[kBf16Rows][32] = {};
  for (int r = 0; r < rows; ++r)
    for (int64_t j = k / kStep * kStep; j < k; ++j) tail[r][j % kStep] = w[r * ldw + j];
  const int64_t depth = n == 1 ? k : kDepth;  // a single row is one piece in all, and reads the weights in their order
  for (int64_t begin = 0; begin < k; begin += kSpan) {
    const int64_t end = n > 1 && begin + kSpan < k ? begin + kSpan : k;
    for (int t = 0; t < m; t += M) {
      const int tile = m - t < M ? m - t : M;
      V::Sum(*sum)[M] = sums[t / M];
      for (int64_t from = begin; from < end; from += depth) {
        const int64_t to = from + depth < end ? from + depth : end, ldx = piece_stride(from, k);
        const uint8_t* x = static_cast<const uint8_t*>(acts) + piece_at(from, n) + (first + t) * ldx;
        for (int r = 0; r < rows; r += R) {
          // Hardware prefetch ends with a page: ask for the tile after this one, be it beside it, further along K or the next call's.
          const uint16_t* next = r + R < rows ? w + (r + R) * ldw + from : to < k ? w + to : w + rows * ldw;
          Bf16Tile<M>::add(rows - r < R ? rows - r : R, tile, w + r * ldw, ldw, x, ldx, from, to, tail + r,
                           t ? nullptr : next, sum + r);
        }
      }
      for (int i = 0; end == k && i < tile; ++i) V::close(&sum[0][i], M, rows, out + (t + i) * ldo);
    }
    if (end == k) break;
  }
}

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

template <bool F32, int R>
void attend_rows(const float* q, int64_t e, const void* k, const void* v, const void* next, const int* lo,
                 const int* hi, float c, float* max, float* sum, float* out) {
  // A step over a long context waits for memory: while scores are computed the values are fetched, and then the next keys.
  constexpr int kBytes = F32 ? 4 : 2;
  const auto* fetch = static_cast<const uint8_t*>(v);
  const auto* fetch_keys = static_cast<const uint8_t*>(next);
  alignas(64) float p[R][kKeys];
  int first = kKeys, last = 0;  // keys that some row sees
  for (int r = 0; r < R; ++r)
    if (lo[r] < hi[r]) {
      first = lo[r] < first ? lo[r] : first;
      last = hi[r] > last ? hi[r] : last;
    }
  if (first >= last) return;
  // Keys that every row sees; beside them each row takes only its own, since 0 * NaN would let a masked value through.
  int from = first, to = last;
  for (int r = 0; r < R; ++r) {
    from = lo[r] > from ? lo[r] : from;
    to = hi[r] < to ? hi[r] : to;
  }
  if (from >= to) from = to = last;

  constexpr int kVectors = R <= 2 ? 4 : 2;  // key vectors at once: enough chains to hide the latency of fma
  constexpr int kWide = kVectors * W < kKeys ? kVectors * W : kKeys;
  for (int key = first / kWide * kWide; key < last; key += kWide) {
    F s[R][kWide / W];
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kWide / W; ++i) s[r][i] = V::zero();
    for (int64_t d = 0; d < e / 2; ++d) {
      for (int line = 0; line < 2 * kWide * kBytes; line += 64, fetch += 64) GEMMA_PREFETCH(fetch);
      for (int i = 0; i < kWide / W; ++i) {
        F a, b;
        load_keys<F32>(k, e, d, key + i * W, a, b);
        for (int r = 0; r < R; ++r)
          s[r][i] = V::fma(V::set(q[r * e + 2 * d + 1]), b, V::fma(V::set(q[r * e + 2 * d]), a, s[r][i]));
      }
    }
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < kWide / W; ++i) {
        F x = c > 0 ? cap(s[r][i], c) : s[r][i];
        const int at = key + i * W;
        V::store(&p[r][at], V::between(x, V::set(-INFINITY), lo[r] - at, hi[r] - at));
      }
  }
  const int begin = first / kWide * kWide, end = (last + kWide - 1) / kWide * kWide;
  for (int r = 0; r < R; ++r) {
    if (lo[r] >= hi[r]) {
      for (int i = begin; i < end; i += W) V::store(&p[r][i], V::zero());
      continue;
    }
    // Vectors outside [begin, end) would add exact zeros: skipping them keeps the sum's order.
    F m = V::load(&p[r][begin]);
    for (int i = begin + W; i < end; i += W) m = V::max(m, V::load(&p[r][i]));
    max[r] = V::max_of(m);
    F s = V::zero();
    for (int i = begin; i < end; i += W) {
      F x = exp(V::sub(V::load(&p[r][i]), V::set(max[r])));
      V::store(&p[r][i], x);
      s = V::add(s, x);
    }
    sum[r] = V::sum(s);
  }
  for (int64_t d = 0; d < e; d += 32)
    for (int i = 0; i < 16 / W; ++i) {
      F x[R], y[R];
      for (int r = 0; r < R; ++r) x[r] = y[r] = V::zero();
      auto join = [&](int begin, int end, bool shared) {
        for (int key = begin; key < end; ++key) {
          F a, b;
          load_values<F32>(v, d * kKeys + key * 32, i, a, b);
          if (fetch_keys && i == 0) {
            for (int line = 0; line < 32 * kBytes; line += 64, fetch_keys += 64) GEMMA_PREFETCH(fetch_keys);
          }
          for (int r = 0; r < R; ++r) {
            if (!shared && (key < lo[r] || key >= hi[r])) continue;
            const F w = V::set(p[r][key]);
            x[r] = V::fma(w, a, x[r]);
            y[r] = V::fma(w, b, y[r]);
          }
        }
      };
      join(first, from, false);
      join(from, to, true);
      join(to, last, false);
      for (int r = 0; r < R; ++r)
        if (lo[r] < hi[r]) {
          V::store(out + r * e + d + i * W, x[r]);
          V::store(out + r * e + d + 16 + i * W, y[r]);
        }
    }
}

constexpr int kRowTile = W == 16 ? 8 : 4;  // query rows whose sums fit the registers

template <bool F32>
void attend_any(const float* q, int rows, int64_t e, const void* k, const void* v, const void* next, const int* lo,
                const int* hi, float c, float* max, float* sum, float* out) {
  for (int r = 0; r < rows;) {
    const int n = rows - r;
    const float* qr = q + r * e;
    float* o = out + r * e;
    if (n >= 8 && kRowTile >= 8) {
      attend_rows<F32, kRowTile>(qr, e, k, v, next, lo + r, hi + r, c, max + r, sum + r, o);
      r += kRowTile;
    } else if (n >= 4) {
      attend_rows<F32, 4>(qr, e, k, v, next, lo + r, hi + r, c, max + r, sum + r, o);
      r += 4;
    } else if (n >= 2) {
      attend_rows<F32, 2>(qr, e, k, v, next, lo + r, hi + r, c, max + r, sum + r, o);
      r += 2;
    } else {
      attend_rows<F32, 1>(qr, e, k, v, next, lo + r, hi + r, c, max + r, sum + r, o);
      r += 1;
    }
  }
}

void attend(bool f32, const float* q, int rows, int64_t e, const void* k, const void* v, const void* next,
            const int* lo, const int* hi, float c, float* max, float* sum, float* out) {
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

// ---- ceilings ----------------------------------------------------------------------------------------------------------

uint32_t read(const uint8_t* p, int64_t n) {
  constexpr int kStride = 4 * W;
  I s[4] = {V::set_i(0), V::set_i(0), V::set_i(0), V::set_i(0)};
  for (int64_t i = 0; i + 4 * kStride <= n; i += 4 * kStride)
    for (int j = 0; j < 4; ++j) s[j] = V::add_i(s[j], V::load_i(p + i + j * kStride));
  return static_cast<uint32_t>(V::sum_i(V::add_i(V::add_i(s[0], s[1]), V::add_i(s[2], s[3]))));
}

// Twelve chains hide any latency; the registers are made opaque to the compiler after every round, so that nothing is folded away.
template <class Acc, class Step>
inline double chains(int64_t rounds, Acc zero, Step step) {
  Acc a0 = zero, a1 = zero, a2 = zero, a3 = zero, a4 = zero, a5 = zero;
  Acc a6 = zero, a7 = zero, a8 = zero, a9 = zero, a10 = zero, a11 = zero;
  for (int64_t i = 0; i < rounds; ++i) {
    step(a0), step(a1), step(a2), step(a3), step(a4), step(a5);
    step(a6), step(a7), step(a8), step(a9), step(a10), step(a11);
    V::opaque(a0, a1, a2, a3), V::opaque(a4, a5, a6, a7), V::opaque(a8, a9, a10, a11);
  }
  return 12.0 * static_cast<double>(rounds);
}

double peak_int8(int64_t rounds) {
  const B w =
      V::load_b(reinterpret_cast<const uint8_t*>("0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"));
  return chains(rounds, V::set_i(0), [&](I& a) { a = V::dot_step(a, w); }) * 8 * W;
}

double peak_bf16(int64_t rounds) {
  alignas(64) float x[32] = {};
  alignas(64) uint16_t bits[32] = {};
  const V::Wide w = V::load_w(bits);
  const V::Packed p = V::load_packed(x);
  return chains(rounds, V::peak_zero(), [&](V::PeakSum& a) { V::peak_step(a, w, p); }) * V::kPeakOps;
}

double peak_f32(int64_t rounds) {
  const F x = V::set(0.5f);
  return chains(rounds, V::zero(), [&](F& a) { a = V::fma(x, x, a); }) * 2 * W;
}

constexpr Kernels make_table(const char* name) {
  Kernels k{};
  k.name = name;
  k.rms_norm = rms_norm;
  k.quantize = quantize;
  k.pack = pack;
  k.pack_bytes = pack_bytes;
  k.panel = panel;
  k.scan = scan;
  k.bf16 = bf16;
  k.geglu = geglu;
  k.add = add;
  k.softcap = softcap;
  k.rope = rope;
  k.log_sum = log_sum;
  k.attend = attend;
  k.fold = fold;
  k.divide = divide;
  k.read = read;
  k.peak_int8 = peak_int8;
  k.peak_bf16 = peak_bf16;
  k.peak_f32 = peak_f32;
  return k;
}

}  // namespace GEMMA_ISA
}  // namespace gemma
