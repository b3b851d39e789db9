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

// Estimates of 32 rows' products with one activation row, and margins in which to expect the products themselves.
template <class Q, bool FINE>
struct ScanSums {
  F estimate[kGroups], margin[kGroups];

  template <int G = kGroups>
  GEMMA_INLINE void step(const uint8_t* unit, int j, const int8_t* q, const ScanScale& s) {
    if constexpr (G > 1) step<G - 1>(unit, j, q, s);
    F scale[Q::kSubs], none;
    Q::template scales<G - 1>(unit, j, scale, none);
    B w[8];
    high_bits<G - 1>(Q::high(unit, j), w);
    F sum = V::set(s.offset[0]);
    if constexpr (Q::kSubs == 1 && !FINE) {
      sum = V::fma(V::to_float(V::template dot<4, 0, 8>(w, q, 0)), V::set(s.d[0]), sum);
    } else {
      sum = V::fma(V::to_float(V::template dot<4, 0, 4>(w, q, 0)), V::set(s.d[0]), sum);
      if constexpr (Q::kSubs == 2) {
        add(G - 1, scale[0], sum, s.energy[0]);
        sum = V::set(s.offset[1]);
      }
      sum = V::fma(V::to_float(V::template dot<4, 0, 4>(w + 4, q + 16, 0)), V::set(s.d[1]), sum);
    }
    add(G - 1, scale[Q::kSubs - 1], sum, s.energy[Q::kSubs - 1]);
  }

  GEMMA_INLINE void add(int g, F scale, F sum, float energy) {
    estimate[g] = V::fma(scale, sum, estimate[g]);
    margin[g] = V::fma(V::mul(scale, scale), V::set(energy), margin[g]);
  }
};

template <class Q, bool FINE>
void scan_panel(const uint8_t* units, int64_t blocks, const QuantActs& a, const ScanScale* scales, uint32_t skip,
                float* low, float* high, int64_t ld) {
  constexpr int32_t kBits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  constexpr int kBytes = Q::kUnit / Q::kUnitBlocks;
  const F nothing = V::set(-INFINITY);
  for (int i = 0; i < a.rows; ++i) {
    ScanSums<Q, FINE> sums;
    for (int g = 0; g < kGroups; ++g) sums.estimate[g] = sums.margin[g] = V::zero();
    const uint8_t* unit = units;
    const int8_t* q = a.q + i * kBlock;
    const ScanScale* s = scales + i;
    for (int64_t u = 0; u < blocks / Q::kUnitBlocks; ++u, unit += Q::kUnit)
      for (int j = 0; j < Q::kUnitBlocks; ++j, q += a.rows * kBlock, s += a.rows) {
        for (int p = 0; i == 0 && p < kBytes; p += 64) GEMMA_PREFETCH(unit + (j + V::kAhead) * kBytes + p);
        sums.step(unit, j, q, *s);
      }
    F lo = nothing, hi = nothing;
    for (int g = 0; g < kGroups; ++g) {
      const F margin = V::sqrt(sums.margin[g]);
      const F left_out = V::to_float(V::and_i(V::set_i(static_cast<int32_t>(skip >> g * W)), V::load_i(kBits)));
      // A row without a number is no measure for the others (`max` takes its second operand then), and may itself be the best.
      F up = V::add(sums.estimate[g], margin);
      up = V::less(nothing, up, up, V::set(INFINITY));
      lo = V::max(V::less(V::zero(), left_out, nothing, V::sub(sums.estimate[g], margin)), lo);
      hi = V::max(V::less(V::zero(), left_out, nothing, up), hi);
    }
    low[i * ld] = V::max_of(lo);
    high[i * ld] = V::max_of(hi);
  }
}

void scan(DType type, const uint8_t* units, int64_t blocks, const QuantActs& a, const ScanScale* scales, uint32_t skip,
          float* low, float* high, int64_t ld) {
  // Where weights have a scale for either half, activations always seem to have one.
  const auto panel = type == DType::Q6_K ? scan_panel<SixBit, true>
                     : a.fine            ? scan_panel<EightBit, true>
                                         : scan_panel<EightBit, false>;
  panel(units, blocks, a, scales, skip, low, high, ld);
}

}  // namespace GEMMA_ISA
}  // namespace gemma
