// The scan of a Q8_0 head by the high halves of its values, see head.h. Part of kernels-inl.h.
#pragma once

#include "products-inl.h"

namespace gemma {
namespace GEMMA_ISA {

// Estimates of 32 rows' products with one activation row, and margins in which to expect the products themselves.
template <bool FINE>
struct ScanSums {
  F estimate[kGroups], margin[kGroups];

  template <int G = kGroups>
  GEMMA_INLINE void step(const uint8_t* unit, const int8_t* q, const ScanScale& s) {
    if constexpr (G > 1) step<G - 1>(unit, q, s);
    const F d = V::load_half(unit + (G - 1) * W * 2);
    B w[8];
    load_4bit<G - 1>(unit + 64, w);
    F sum = V::set(s.offset);
    if (FINE) {
      sum = V::fma(V::to_float(V::template dot<4, 0, 4>(w, q, 0)), V::set(s.d[0]), sum);
      sum = V::fma(V::to_float(V::template dot<4, 0, 4>(w + 4, q + 16, 0)), V::set(s.d[1]), sum);
    } else {
      sum = V::fma(V::to_float(V::template dot<4, 0, 8>(w, q, 0)), V::set(s.d[0]), sum);
    }
    estimate[G - 1] = V::fma(d, sum, estimate[G - 1]);
    margin[G - 1] = V::fma(V::mul(d, d), V::set(s.energy), margin[G - 1]);
  }
};

template <bool FINE>
void scan_panel(const uint8_t* units, int64_t blocks, const QuantActs& a, const ScanScale* scales, uint32_t skip,
                float* low, float* high, int64_t ld) {
  constexpr int32_t kBits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  const F nothing = V::set(-INFINITY);
  for (int i = 0; i < a.rows; ++i) {
    ScanSums<FINE> sums;
    for (int g = 0; g < kGroups; ++g) sums.estimate[g] = sums.margin[g] = V::zero();
    const uint8_t* unit = units;
    for (int64_t b = 0; b < blocks; ++b, unit += kHighUnit) {
      for (int p = 0; i == 0 && p < kHighUnit; p += 64) GEMMA_PREFETCH(unit + V::kAhead * kHighUnit + p);
      sums.step(unit, a.q + (b * a.rows + i) * kBlock, scales[b * a.rows + i]);
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

void scan(const uint8_t* units, int64_t blocks, const QuantActs& a, const ScanScale* scales, uint32_t skip, float* low,
          float* high, int64_t ld) {
  a.fine ? scan_panel<true>(units, blocks, a, scales, skip, low, high, ld)
         : scan_panel<false>(units, blocks, a, scales, skip, low, high, ld);
}

}  // namespace GEMMA_ISA
}  // namespace gemma
