// Products with quantised weights. Part of kernels-inl.h.
#pragma once

#include "../quant.h"
#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

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
inline void load_6bit(const uint8_t* high, const uint8_t* plane2, B* w) {
  constexpr int at = G * W % 16 * 4;
  for (int i = 0; i < 8; ++i) {
    const B x = V::load_b(high + i * 64 + at);
    w[i] = G * W >= 16 ? V::high4_up2(x) : V::low4_up2(x);
  }
  for (int h = 0; h < 2; ++h) {
    const B p = V::load_b(plane2 + h * 128 + G * W * 4);
    w[4 * h + 0] = V::or_pair<0>(w[4 * h + 0], p);
    w[4 * h + 1] = V::or_pair<1>(w[4 * h + 1], p);
    w[4 * h + 2] = V::or_pair<2>(w[4 * h + 2], p);
    w[4 * h + 3] = V::or_pair<3>(w[4 * h + 3], p);
  }
}

// A block of 32 along K for the W rows of group G: their values as unsigned bytes (value = byte - kOffset), a scale for each
// kSubs-th of the block, and an offset where kMin says so. A unit has kUnitBlocks blocks, whose low bits, kLow bytes each, are apart.
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
  static constexpr int kUnit = kScales + BITS * 128, kLow = 0;
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
  static constexpr int kUnit = 64 + 512, kLow = 512;
  static const uint8_t* high(const uint8_t* unit, int) { return unit + 64; }
  template <int G>
  static void scales(const uint8_t* unit, int, F* scale) {
    scale[0] = V::load_half(unit + G * W * 2);
  }
  template <int G>
  static void decode(const uint8_t* unit, const uint8_t* low, int j, Block& b) {
    scales<G>(unit, j, b.scale);
    load_8bit<G>(high(unit, j), low, b.w);
  }
};

template <int BITS>
struct TwoLevel {  // Q4_K Q5_K
  static constexpr int kBits = BITS, kOffset = 0, kSubs = 1, kUnitBlocks = 8;
  static constexpr bool kMin = true;
  static constexpr int kHeader = 512;
  static constexpr int kUnit = kHeader + 8 * BITS * 128, kLow = 0;
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
  static constexpr int kStride = 64 + 512, kUnit = 64 + 8 * kStride, kLow = 256;
  static const uint8_t* high(const uint8_t* unit, int j) { return unit + 64 + j * kStride + 64; }
  template <int G>
  static void scales(const uint8_t* unit, int j, F* scale) {
    const uint8_t* block = unit + 64 + j * kStride;
    const F d = V::load_half(unit + G * W * 2);
    scale[0] = V::mul(d, V::to_float(V::load_i8(block + G * W)));
    scale[1] = V::mul(d, V::to_float(V::load_i8(block + 32 + G * W)));
  }
  template <int G>
  static void decode(const uint8_t* unit, const uint8_t* low, int j, Block& b) {
    scales<G>(unit, j, b.scale);
    load_6bit<G>(high(unit, j), low, b.w);
  }
};

// acc += scale * (w . q) * d + min * d * sum(q): one block, one activation row. The order is the specification: for each scale
// the integer dot product and one fma, then one for the offset.
template <class Q, bool FINE>
GEMMA_INLINE F block_dot(const Block& b, const int8_t* q, const ActScale& s, F acc) {
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

// What meets the blocks of a panel one after another: start, a step for each, finish.

// One activation row: sums stay in registers and the panel is read once, in order.
template <class Q, bool FINE>
struct OneRow {
  F acc[kGroups];

  GEMMA_INLINE void start(bool add, int, float* tile) {
    for (int g = 0; g < kGroups; ++g) acc[g] = add ? V::load(tile + g * W) : V::zero();
  }
  template <int G = kGroups>
  GEMMA_INLINE void step(const uint8_t* unit, const uint8_t* low, int j, const int8_t* q, const ActScale* s, int rows,
                         float* tile) {
    if constexpr (G > 1) step<G - 1>(unit, low, j, q, s, rows, tile);
    Block b;
    Q::template decode<G - 1>(unit, low, j, b);
    acc[G - 1] = block_dot<Q, FINE>(b, q, *s, acc[G - 1]);
  }
  GEMMA_INLINE void finish(float* tile) const {
    for (int g = 0; g < kGroups; ++g) V::store(tile + g * W, acc[g]);
  }
};

// Sums that lie in the tile, in L1.
struct SumsInTile {
  GEMMA_INLINE void start(bool add, int rows, float* tile) {
    for (int i = 0; !add && i < rows * kPanel; i += W) V::store(tile + i, V::zero());
  }
  GEMMA_INLINE void finish(float*) const {}
};

// Several rows: a block of weights stays in registers while all activation rows stream past it.
constexpr int kHeld = W == 16 ? 2 : 1;  // groups held at once: 16 of 32 registers, or 8 of 16

template <class Q, bool FINE>
struct ManyRows : SumsInTile {
  template <int G = kGroups>
  GEMMA_INLINE void step(const uint8_t* unit, const uint8_t* low, int j, const int8_t* q, const ActScale* s, int rows,
                         float* tile) {
    if constexpr (G > kHeld) step<G - kHeld>(unit, low, j, q, s, rows, tile);
    Block b0, b1;
    Q::template decode<G - kHeld>(unit, low, j, b0);
    if (kHeld == 2) Q::template decode<G - 1>(unit, low, j, b1);
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

}  // namespace GEMMA_ISA
}  // namespace gemma

#include "l1-block-inl.h"

namespace gemma {
namespace GEMMA_ISA {

// Blocks [first, first + count) of a panel.
struct Run {
  TiledPanel panel;
  int64_t first, count;
  bool add;
};

// A function for each kind of rows, since each wants all registers.
template <class Q, class Rows>
GEMMA_NOINLINE void walk(const Run& run, const QuantActs& a, float* tile) {
  constexpr int kBlockBytes = Q::kUnit / Q::kUnitBlocks;
  const uint8_t* unit = run.panel.units + run.first * kBlockBytes;
  const uint8_t* low = run.panel.low + run.first * Q::kLow;
  const int8_t* q = a.q;
  const ActScale* s = a.scale;
  Rows rows;
  rows.start(run.add, a.rows, tile);
  for (int64_t u = 0; u < run.count / Q::kUnitBlocks; ++u, unit += Q::kUnit)
    for (int j = 0; j < Q::kUnitBlocks; ++j, low += Q::kLow, q += kBlock * a.rows, s += a.rows) {
      // Hardware prefetch ends with a page, which one row would wait for and a few all the more.
      for (int p = 0; p < kBlockBytes; p += 64) GEMMA_PREFETCH(unit + (j + V::kAhead) * kBlockBytes + p);
      for (int p = 0; p < Q::kLow; p += 64) GEMMA_PREFETCH(low + V::kAhead * Q::kLow + p);
      rows.step(unit, low, j, q, s, a.rows, tile);
    }
  rows.finish(tile);
}

template <class Q, bool FINE>
void panel_rows(const Run& run, const QuantActs& a, float* tile) {
  using Block = L1Block<V, Q, FINE>;
  if (a.rows == 1) return walk<Q, OneRow<Q, FINE>>(run, a, tile);
  if constexpr (V::kL1Block && Block::kFrom <= kActChunk)
    if (a.rows >= Block::kFrom) return walk<Q, Block>(run, a, tile);
  walk<Q, ManyRows<Q, FINE>>(run, a, tile);
}

template <class Q>
inline void panel_of(const Run& run, const QuantActs& a, float* tile) {
  a.fine ? panel_rows<Q, true>(run, a, tile) : panel_rows<Q, false>(run, a, tile);
}

void panel(DType type, const TiledPanel& data, int64_t first, int64_t count, const QuantActs& a, bool add,
           float* tile) {
  const Run run{data, first, count, add};
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

}  // namespace GEMMA_ISA
}  // namespace gemma
