// The encodings of quantised weights: what a block holds, how it adds to a sum, and the way through the blocks of a panel. Part of
// kernels-inl.h and tiles-inl.h.
#pragma once

#include "../quant.h"
#include "common-inl.h"

namespace gemma {
namespace GEMMA_ISA {

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

// What meets the blocks of a panel one after another: start, a step for each, finish.

// Sums that lie in the tile, in L1.
struct SumsInTile {
  GEMMA_INLINE void start(bool add, int rows, float* tile) {
    for (int i = 0; !add && i < rows * kPanel; i += W) V::store(tile + i, V::zero());
  }
  GEMMA_INLINE void finish(float*) const {}
};

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

// use(decoder) with the decoder of a type.
template <class Use>
inline void with_decoder(DType type, Use use) {
  switch (type) {
    case DType::Q8_0:
      return use(EightBit{});
    case DType::Q4_0:
      return use(Simple<4, false>{});
    case DType::Q4_1:
      return use(Simple<4, true>{});
    case DType::Q5_0:
      return use(Simple<5, false>{});
    case DType::Q5_1:
      return use(Simple<5, true>{});
    case DType::Q4_K:
      return use(TwoLevel<4>{});
    case DType::Q5_K:
      return use(TwoLevel<5>{});
    case DType::Q6_K:
      return use(SixBit{});
    default:
      return;
  }
}

}  // namespace GEMMA_ISA
}  // namespace gemma
