// The scan of a head by the high bits of its values, see head.h. Part of kernels-inl.h.
#pragma once

#include "products-inl.h"

namespace gemma {
namespace GEMMA_ISA {

template <int G, int N = 8>
GEMMA_INLINE void high_bits(const uint8_t* plane, B* w) {
  if constexpr (N > 1) high_bits<G, N - 1>(plane, w);
  w[N - 1] = load_4bit<G, N - 1>(plane);
}

// Estimates of 32 rows' products with R activation rows, and margins in which to expect the products themselves. With several rows, a
// vector of weights is unpacked once for them all; their sums fill the registers, so that a pass over the panel takes one group.
template <class Q, bool FINE, int R>
struct ScanSums {
  static constexpr int kAtOnce = R == 1 ? kGroups : 1;
  F estimate[kAtOnce][R], margin[kAtOnce][R];

  template <int G, int HELD = kAtOnce>
  GEMMA_INLINE void step(const uint8_t* unit, int j, const int8_t* q, const ScanScale* s) {
    if constexpr (HELD > 1) step<G, HELD - 1>(unit, j, q, s);
    constexpr int g = G + HELD - 1;
    F scale[Q::kSubs], none, square[Q::kSubs];
    Q::template scales<g>(unit, j, scale, none);
    for (int i = 0; i < Q::kSubs; ++i) square[i] = V::mul(scale[i], scale[i]);
    B w[8];
    high_bits<g>(Q::high(unit, j), w);
    GEMMA_UNROLL(8)
    for (int i = 0; i < R; ++i, q += kBlock, ++s) {
      F& e = estimate[HELD - 1][i];
      F& m = margin[HELD - 1][i];
      F sum = V::set(s->offset[0]);
      if constexpr (Q::kSubs == 1 && !FINE) {
        sum = V::fma(V::to_float(V::template dot<4, 0, 8>(w, q, 0)), V::set(s->d[0]), sum);
      } else {
        sum = V::fma(V::to_float(V::template dot<4, 0, 4>(w, q, 0)), V::set(s->d[0]), sum);
        if constexpr (Q::kSubs == 2) {
          e = V::fma(scale[0], sum, e);
          m = V::fma(square[0], V::set(s->energy[0]), m);
          sum = V::set(s->offset[1]);
        }
        sum = V::fma(V::to_float(V::template dot<4, 0, 4>(w + 4, q + 16, 0)), V::set(s->d[1]), sum);
      }
      e = V::fma(scale[Q::kSubs - 1], sum, e);
      m = V::fma(square[Q::kSubs - 1], V::set(s->energy[Q::kSubs - 1]), m);
    }
  }
};

struct Scanned {
  const uint8_t* units;
  int64_t blocks;
  const int8_t* q;  // rows of a block side by side
  const ScanScale* scales;
  int rows;
  uint32_t skip;
  bool cached = false;  // an earlier pass has read the panel
};

// The bounds of groups G and on, of R activation rows.
template <class Q, bool FINE, int R, int G = 0>
GEMMA_INLINE void scan_groups(const Scanned& a, F* low, F* high) {
  constexpr int32_t kBits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  constexpr int kBytes = Q::kUnit / Q::kUnitBlocks;
  using Sums = ScanSums<Q, FINE, R>;
  const F nothing = V::set(-INFINITY);
  Sums sums;
  for (int g = 0; g < Sums::kAtOnce; ++g)
    for (int i = 0; i < R; ++i) sums.estimate[g][i] = sums.margin[g][i] = V::zero();
  const uint8_t* unit = a.units;
  const int8_t* q = a.q;
  const ScanScale* s = a.scales;
  for (int64_t u = 0; u < a.blocks / Q::kUnitBlocks; ++u, unit += Q::kUnit)
    for (int j = 0; j < Q::kUnitBlocks; ++j, q += a.rows * kBlock, s += a.rows) {
      for (int p = 0; G == 0 && !a.cached && p < kBytes; p += 64) GEMMA_PREFETCH(unit + (j + V::kAhead) * kBytes + p);
      sums.template step<G>(unit, j, q, s);
    }
  for (int g = 0; g < Sums::kAtOnce; ++g) {
    const I apart = V::and_i(V::set_i(static_cast<int32_t>(a.skip >> (G + g) * W)), V::load_i(kBits));
    const F left_out = V::to_float(apart);
    for (int i = 0; i < R; ++i) {
      const F estimate = sums.estimate[g][i], margin = V::sqrt(sums.margin[g][i]);
      // A row without a number is no measure for the others (`max` takes its second operand then), and may itself be the best.
      F up = V::add(estimate, margin);
      up = V::less(nothing, up, up, V::set(INFINITY));
      low[i] = V::max(V::less(V::zero(), left_out, nothing, V::sub(estimate, margin)), low[i]);
      high[i] = V::max(V::less(V::zero(), left_out, nothing, up), high[i]);
    }
  }
  if constexpr (G + Sums::kAtOnce < kGroups) scan_groups<Q, FINE, R, G + Sums::kAtOnce>(a, low, high);
}

// R rows at a time, then the rest.
template <class Q, bool FINE, int R>
void scan_panel(Scanned a, int left, float* low, float* high, int64_t ld) {
  for (; left >= R; left -= R, a.q += R * kBlock, a.scales += R, a.cached = true, low += R * ld, high += R * ld) {
    F lo[R], hi[R];
    for (int i = 0; i < R; ++i) lo[i] = hi[i] = V::set(-INFINITY);
    scan_groups<Q, FINE, R>(a, lo, hi);
    for (int i = 0; i < R; ++i) {
      low[i * ld] = V::max_of(lo[i]);
      high[i * ld] = V::max_of(hi[i]);
    }
  }
  if constexpr (R > 1)
    if (left > 0) scan_panel<Q, FINE, R / 2>(a, left, low, high, ld);
}

template <class Q, bool FINE>
void scan_rows(const Scanned& a, float* low, float* high, int64_t ld) {
  a.rows == 1 ? scan_panel<Q, FINE, 1>(a, 1, low, high, ld)
              : scan_panel<Q, FINE, V::kScanRows>(a, a.rows, low, high, ld);
}

void scan(DType type, const uint8_t* units, int64_t blocks, const QuantActs& a, const ScanScale* scales, uint32_t skip,
          float* low, float* high, int64_t ld) {
  const Scanned all{units, blocks, a.q, scales, a.rows, skip};
  // Where weights have a scale for either half, activations always seem to have one.
  if (type == DType::Q6_K)
    scan_rows<SixBit, true>(all, low, high, ld);
  else if (a.fine)
    scan_rows<EightBit, true>(all, low, high, ld);
  else
    scan_rows<EightBit, false>(all, low, high, ld);
}

}  // namespace GEMMA_ISA
}  // namespace gemma
