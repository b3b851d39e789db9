// Products with quantised weights. Part of kernels-inl.h.
#pragma once

#include "../quant.h"
#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

// ---- quantised weights: one decoder an encoding ------------------------------------------------------------------------

// The I-th vector of a block for group G of its rows.
template <int G, int I>
inline B load_4bit(const uint8_t* plane) {
  const B x = V::load_b(plane + I * 64 + G * W % 16 * 4);
  return G * W >= 16 ? V::high4(x) : V::low4(x);
}

template <int G, int I>
inline B load_8bit(const uint8_t* high, const uint8_t* low) {
  constexpr int at = I * 64 + G * W % 16 * 4;
  const B h = V::load_b(high + at), l = V::load_b(low + at);
  return G * W >= 16 ? V::join_high(h, l) : V::join_low(h, l);
}

template <int G, int I>
inline B load_5bit(const uint8_t* plane1, const uint8_t* plane4) {
  return V::or_bit<I>(load_4bit<G, I>(plane4), V::load_b(plane1 + G * W * 4));
}

template <int G, int I>
inline B load_6bit(const uint8_t* high, const uint8_t* plane2) {
  const B x = V::load_b(high + I * 64 + G * W % 16 * 4);
  return V::or_pair<I % 4>(G * W >= 16 ? V::high4_up2(x) : V::low4_up2(x), V::load_b(plane2 + I / 4 * 128 + G * W * 4));
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
  static void scales(const uint8_t* unit, int, F* scale, F& min) {
    scale[0] = V::load_half(unit + G * W * 2);
    if (MIN) min = V::load_half(unit + 64 + G * W * 2);
  }
  template <int G, int I>
  static B weight(const uint8_t* unit, const uint8_t*, int) {
    return BITS == 5 ? load_5bit<G, I>(unit + kScales, unit + kScales + 128) : load_4bit<G, I>(unit + kScales);
  }
};

struct EightBit {  // Q8_0
  static constexpr int kBits = 8, kOffset = 128, kSubs = 1, kUnitBlocks = 1;
  static constexpr bool kMin = false;
  static constexpr int kUnit = 64 + 512, kLow = 512;
  static const uint8_t* high(const uint8_t* unit, int) { return unit + 64; }
  template <int G>
  static void scales(const uint8_t* unit, int, F* scale, F&) {
    scale[0] = V::load_half(unit + G * W * 2);
  }
  template <int G, int I>
  static B weight(const uint8_t* unit, const uint8_t* low, int j) {
    return load_8bit<G, I>(high(unit, j), low);
  }
};

template <int BITS>
struct TwoLevel {  // Q4_K Q5_K
  static constexpr int kBits = BITS, kOffset = 0, kSubs = 1, kUnitBlocks = 8;
  static constexpr bool kMin = true;
  static constexpr int kHeader = 512;
  static constexpr int kUnit = kHeader + 8 * BITS * 128, kLow = 0;
  template <int G>
  static void scales(const uint8_t* unit, int j, F* scale, F& min) {
    const I hi = V::shr_i(V::load_i(unit + 128 + G * W * 4), 4 * j);
    const I lo = V::load_u8(unit + 256 + j * 32 + G * W);
    const I three = V::set_i(3);
    const I sc = V::or_i(V::and_i(lo, V::set_i(15)), V::shl_i<4>(V::and_i(hi, three)));
    const I mn = V::or_i(V::shr_i(lo, 4), V::shl_i<4>(V::and_i(V::shr_i(hi, 2), three)));
    scale[0] = V::mul(V::load_half(unit + G * W * 2), V::to_float(sc));
    min = V::sub(V::zero(), V::mul(V::load_half(unit + 64 + G * W * 2), V::to_float(mn)));
  }
  template <int G, int I>
  static B weight(const uint8_t* unit, const uint8_t*, int j) {
    const uint8_t* planes = unit + kHeader + j * BITS * 128;
    return BITS == 5 ? load_5bit<G, I>(planes, planes + 128) : load_4bit<G, I>(planes);
  }
};

struct SixBit {  // Q6_K
  static constexpr int kBits = 6, kOffset = 32, kSubs = 2, kUnitBlocks = 8;
  static constexpr bool kMin = false;
  static constexpr int kStride = 64 + 512, kUnit = 64 + 8 * kStride, kLow = 256;
  static const uint8_t* high(const uint8_t* unit, int j) { return unit + 64 + j * kStride + 64; }
  template <int G>
  static void scales(const uint8_t* unit, int j, F* scale, F&) {
    const uint8_t* block = unit + 64 + j * kStride;
    const F d = V::load_half(unit + G * W * 2);
    scale[0] = V::mul(d, V::to_float(V::load_i8(block + G * W)));
    scale[1] = V::mul(d, V::to_float(V::load_i8(block + 32 + G * W)));
  }
  template <int G, int I>
  static B weight(const uint8_t* unit, const uint8_t* low, int j) {
    return load_6bit<G, I>(high(unit, j), low);
  }
};

template <class Q, int G, int N = 8>
GEMMA_INLINE void decode(const uint8_t* unit, const uint8_t* low, int j, Block& b) {
  if constexpr (N > 1)
    decode<Q, G, N - 1>(unit, low, j, b);
  else
    Q::template scales<G>(unit, j, b.scale, b.min);
  b.w[N - 1] = Q::template weight<G, N - 1>(unit, low, j);
}

// Parts of a block that are multiplied apart: two where either side has a scale for each half.
template <class Q, bool FINE>
constexpr int kParts = FINE || Q::kSubs == 2 ? 2 : 1;

// Rows whose sums fit the registers where a panel is two groups: half a block of weights leaves room for more than a whole one.
template <class Q, bool FINE>
constexpr int kFew = kParts<Q, FINE> == 2 ? 8 : 4;

template <class Q, bool FINE>
GEMMA_INLINE int32_t part_sum(int part, const ActScale& s) {
  return kParts<Q, FINE> == 1 ? s.sum : part == 0 ? s.sum0 : s.sum - s.sum0;
}

// acc += scale * (w . q) * d, and after the last part min * d * sum(q): one block, one activation row. The order is the
// specification: for each part the integer dot product and one fma, then one for the offset.
template <class Q, bool FINE>
GEMMA_INLINE F part_add(const Block& b, int part, I dot, const ActScale& s, F acc) {
  acc = V::fma(V::to_float(dot), V::mul(b.scale[part % Q::kSubs], V::set(s.d[part])), acc);
  if (Q::kMin && part == kParts<Q, FINE> - 1) acc = V::fma(b.min, V::set(s.dsum), acc);
  return acc;
}

template <class Q, bool FINE>
GEMMA_INLINE F part_dot(const Block& b, int part, const int8_t* q, const ActScale& s, F acc) {
  constexpr int n = 8 / kParts<Q, FINE>;
  const I dot = V::template dot<Q::kBits, Q::kOffset, n>(b.w + part * n, q + part * n * 4, part_sum<Q, FINE>(part, s));
  return part_add<Q, FINE>(b, part, dot, s, acc);
}

template <class Q, bool FINE>
GEMMA_INLINE F block_dot(const Block& b, const int8_t* q, const ActScale& s, F acc) {
  for (int part = 0; part < kParts<Q, FINE>; ++part) acc = part_dot<Q, FINE>(b, part, q, s, acc);
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
    decode<Q, G - 1>(unit, low, j, b);
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
// Rows in a turn of the loop, whose end costs a tenth of what a single group takes.
constexpr int kUnrolled = W == 16 ? 1 : 4;

template <class Q, bool FINE>
struct ManyRows : SumsInTile {
  template <int G = kGroups>
  GEMMA_INLINE void step(const uint8_t* unit, const uint8_t* low, int j, const int8_t* q, const ActScale* s, int rows,
                         float* tile) {
    if constexpr (G > kHeld) step<G - kHeld>(unit, low, j, q, s, rows, tile);
    Block b0, b1;
    decode<Q, G - kHeld>(unit, low, j, b0);
    if (kHeld == 2) decode<Q, G - 1>(unit, low, j, b1);
    GEMMA_UNROLL(kUnrolled)
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

// Up to kFew rows where a panel is two groups: sums stay in registers, since a store takes the place of a multiply-add or a dot product
// (on Zen 5 neither begins in a cycle in which a store reads its value).
template <class Vec, class Q, bool FINE, int R>
struct FewRows {
  static constexpr int kParts = GEMMA_ISA::kParts<Q, FINE>, kSteps = 8 / kParts;
  F acc[R][2];

  GEMMA_INLINE void start(bool add, int, float* tile) {
    GEMMA_UNROLL(8)
    for (int i = 0; i < R; ++i)
      for (int g = 0; g < 2; ++g) acc[i][g] = add ? V::load(tile + i * kPanel + g * W) : V::zero();
  }
  template <int N>
  static GEMMA_INLINE void unpack(const uint8_t* unit, const uint8_t* low, int j, Block* b) {
    b[0].w[N] = Q::template weight<0, N>(unit, low, j);
    b[1].w[N] = Q::template weight<1, N>(unit, low, j);
    if constexpr ((N + 1) % kSteps != 0) unpack<N + 1>(unit, low, j, b);
  }
  template <int PART = 0>
  GEMMA_INLINE void step(const uint8_t* unit, const uint8_t* low, int j, const int8_t* q, const ActScale* s, int rows,
                         float* tile) {
    Block b[2];
    unpack<PART * kSteps>(unit, low, j, b);
    Q::template scales<0>(unit, j, b[0].scale, b[0].min);
    Q::template scales<1>(unit, j, b[1].scale, b[1].min);
    GEMMA_UNROLL(8)
    for (int i = 0; i < R; ++i) {
      I dot[2];
      dot[0] = dot[1] = V::set_i(-Q::kOffset * part_sum<Q, FINE>(PART, s[i]));
      for (int n = PART * kSteps; n < (PART + 1) * kSteps; ++n) {
        const B x = Vec::bytes4(q + i * kBlock + 4 * n);
        for (int g = 0; g < 2; ++g) dot[g] = Vec::add_dot(dot[g], b[g].w[n], x);
      }
      for (int g = 0; g < 2; ++g) acc[i][g] = part_add<Q, FINE>(b[g], PART, dot[g], s[i], acc[i][g]);
    }
    if constexpr (PART + 1 < kParts) step<PART + 1>(unit, low, j, q, s, rows, tile);
  }
  GEMMA_INLINE void finish(float* tile) const {
    GEMMA_UNROLL(8)
    for (int i = 0; i < R; ++i)
      for (int g = 0; g < 2; ++g) V::store(tile + i * kPanel + g * W, acc[i][g]);
  }
};

// More rows, up to sixteen, where a panel is two groups. The first ones meet each vector of weights as soon as it is unpacked: unpacking and
// multiplying have ports of their own, and a core does not look far enough ahead to use both when a block comes first and then the rows.
// The sums of the first ones stay in registers for a block.
template <class Vec, class Q, bool FINE>
struct SomeRows : SumsInTile {
  static constexpr int kParts = GEMMA_ISA::kParts<Q, FINE>, kSteps = 8 / kParts;
  static constexpr int kFirst = 4 / kParts, kTo = 16;
  Block b[2];
  I dot[kFirst][2];
  F acc[kFirst][2];

  template <int N>
  GEMMA_INLINE void meet(const uint8_t* unit, const uint8_t* low, int j, const int8_t* q) {
    b[0].w[N] = Q::template weight<0, N>(unit, low, j);
    b[1].w[N] = Q::template weight<1, N>(unit, low, j);
    if (N == 1) Q::template scales<0>(unit, j, b[0].scale, b[0].min);
    if (N == 3) Q::template scales<1>(unit, j, b[1].scale, b[1].min);
    for (int i = 0; i < kFirst; ++i) {
      const B x = Vec::bytes4(q + i * kBlock + 4 * N);
      for (int g = 0; g < 2; ++g) dot[i][g] = Vec::add_dot(dot[i][g], b[g].w[N], x);
    }
    if constexpr ((N + 1) % kSteps != 0) meet<N + 1>(unit, low, j, q);
  }
  template <int PART = 0>
  GEMMA_INLINE void first(const uint8_t* unit, const uint8_t* low, int j, const int8_t* q, const ActScale* s) {
    for (int i = 0; i < kFirst; ++i) dot[i][0] = dot[i][1] = V::set_i(-Q::kOffset * part_sum<Q, FINE>(PART, s[i]));
    meet<PART * kSteps>(unit, low, j, q);
    for (int i = 0; i < kFirst; ++i)
      for (int g = 0; g < 2; ++g) acc[i][g] = part_add<Q, FINE>(b[g], PART, dot[i][g], s[i], acc[i][g]);
    if constexpr (PART + 1 < kParts) first<PART + 1>(unit, low, j, q, s);
  }
  GEMMA_INLINE void step(const uint8_t* unit, const uint8_t* low, int j, const int8_t* q, const ActScale* s, int rows,
                         float* tile) {
    for (int i = 0; i < kFirst; ++i)
      for (int g = 0; g < 2; ++g) acc[i][g] = V::load(tile + i * kPanel + g * W);
    first(unit, low, j, q, s);
    for (int i = 0; i < kFirst; ++i)
      for (int g = 0; g < 2; ++g) V::store(tile + i * kPanel + g * W, acc[i][g]);
    for (int i = kFirst; i < rows; ++i) {
      float* t = tile + i * kPanel;
      F x = V::load(t), y = V::load(t + W);
      // Part by part of both groups: chains of dot products that need not wait for one another.
      for (int part = 0; part < kParts; ++part) {
        x = part_dot<Q, FINE>(b[0], part, q + i * kBlock, s[i], x);
        y = part_dot<Q, FINE>(b[1], part, q + i * kBlock, s[i], y);
      }
      V::store(t, x);
      V::store(t + W, y);
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
  TiledPanel next;
};

// Of what need not lie in the same array.
inline intptr_t distance(const uint8_t* from, const uint8_t* to) {
  return reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from);
}

// A function for each kind of rows, since each wants all registers.
template <class Q, class Rows>
GEMMA_NOINLINE void walk(const Run& run, const QuantActs& a, float* tile) {
  constexpr int kBlockBytes = Q::kUnit / Q::kUnitBlocks;
  const uint8_t* unit = run.panel.units + run.first * kBlockBytes;
  const uint8_t* low = run.panel.low + run.first * Q::kLow;
  // How far ahead memory is asked for: kAhead blocks, of which the last are the beginning of the next panel. Hardware prefetch ends with
  // a page, which one row would wait for and a few all the more.
  intptr_t ahead = V::kAhead * kBlockBytes, low_ahead = V::kAhead * Q::kLow;
  int64_t left = !run.next.units ? -1 : run.count > V::kAhead ? run.count - V::kAhead : 0;
  const int8_t* q = a.q;
  const ActScale* s = a.scale;
  Rows rows;
  rows.start(run.add, a.rows, tile);
  for (int64_t u = 0; u < run.count / Q::kUnitBlocks; ++u, unit += Q::kUnit)
    for (int j = 0; j < Q::kUnitBlocks; ++j, low += Q::kLow, q += kBlock * a.rows, s += a.rows) {
      if (left-- == 0) {
        ahead += distance(run.panel.units + (run.first + run.count) * kBlockBytes, run.next.units);
        low_ahead += distance(run.panel.low + (run.first + run.count) * Q::kLow, run.next.low);
      }
      for (int p = 0; p < kBlockBytes; p += 64) GEMMA_PREFETCH(unit + ahead + j * kBlockBytes + p);
      for (int p = 0; p < Q::kLow; p += 64) GEMMA_PREFETCH(low + low_ahead + p);
      rows.step(unit, low, j, q, s, a.rows, tile);
    }
  rows.finish(tile);
}

template <class Q, bool FINE, int R>
void few_rows(const Run& run, const QuantActs& a, float* tile) {
  if (a.rows == R) return walk<Q, FewRows<V, Q, FINE, R>>(run, a, tile);
  if constexpr (R > 2) few_rows<Q, FINE, R - 1>(run, a, tile);
}

template <class Q, bool FINE>
void panel_rows(const Run& run, const QuantActs& a, float* tile) {
  using Block = L1Block<V, Q, FINE>;
  if (a.rows == 1) return walk<Q, OneRow<Q, FINE>>(run, a, tile);
  if constexpr (V::kL1Block && Block::kFrom <= kActChunk)
    if (a.rows >= Block::kFrom) return walk<Q, Block>(run, a, tile);
  if constexpr (kGroups == 2) {
    if (a.rows <= kFew<Q, FINE>) return few_rows<Q, FINE, kFew<Q, FINE>>(run, a, tile);
    using Some = SomeRows<V, Q, FINE>;
    if (a.rows <= Some::kTo) return walk<Q, Some>(run, a, tile);
  }
  walk<Q, ManyRows<Q, FINE>>(run, a, tile);
}

template <class Q>
inline void panel_of(const Run& run, const QuantActs& a, float* tile) {
  if constexpr (Q::kSubs == 2)
    panel_rows<Q, true>(run, a, tile);  // in two parts whichever way activations are
  else
    a.fine ? panel_rows<Q, true>(run, a, tile) : panel_rows<Q, false>(run, a, tile);
}

void panel(DType type, const TiledPanel& data, int64_t first, int64_t count, const QuantActs& a, bool add,
           const TiledPanel& next, float* tile) {
  const Run run{data, first, count, add, next};
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
