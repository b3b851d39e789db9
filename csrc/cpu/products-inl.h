// Products with quantised weights. Part of kernels-inl.h.
#pragma once

#include "encodings-inl.h"
#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

// Rows whose sums fit the registers where a panel is two groups: half a block of weights leaves room for more than a whole one.
template <class Q, bool FINE>
constexpr int kFew = kParts<Q, FINE> == 2 ? 8 : 4;

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
  with_decoder(type, [&](auto decoder) { panel_of<decltype(decoder)>(run, a, tile); });
}

}  // namespace GEMMA_ISA
}  // namespace gemma
