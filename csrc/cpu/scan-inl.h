// The scan of a head by the high bits of its values, see head.h. Part of kernels-inl.h.
#pragma once

#include <type_traits>

#include "products-inl.h"

namespace gemma {
namespace GEMMA_ISA {

// What an integer sum that began with one of s.begin adds to the estimate.
GEMMA_INLINE F scan_sum(I dot, const ScanScale& s) { return V::sub(V::as_float(dot), V::set(s.zero)); }
// -1 is no offset of weights: the sum begins with what is given as that of q.
template <int N>
GEMMA_INLINE I scan_dot(const B* w, const int8_t* q, int32_t begin) {
  return V::template dot<4, -1, N>(w, q, begin);
}

template <int G, int N = 8>
GEMMA_INLINE void high_bits(const uint8_t* plane, B* w) {
  if constexpr (N > 1) high_bits<G, N - 1>(plane, w);
  w[N - 1] = load_4bit<G, N - 1>(plane);
}

// Estimates of 32 rows' products with R activation rows, and margins in which to expect the products themselves. With two rows, a vector of
// weights is unpacked once for both; their sums fill the registers of AVX2, so that a pass over the panel takes one group.
template <class Q, int R>
struct ScanSums {
  static constexpr int kAtOnce = R == 1 ? kGroups : 1, kSteps = 8 / Q::kSubs;
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
    for (int i = 0; i < R; ++i, q += kBlock, ++s)
      for (int sub = 0; sub < Q::kSubs; ++sub) {
        F& e = estimate[HELD - 1][i];
        F& m = margin[HELD - 1][i];
        e = V::fma(scale[sub], scan_sum(scan_dot<kSteps>(w + sub * kSteps, q + sub * 16, s->begin[sub]), *s), e);
        m = V::fma(square[sub], V::set(s->energy[sub]), m);
      }
  }
};

// The same for two to four rows where a panel is two groups, whose sums all fit the registers if the weights meet them vector by vector.
template <class Vec, class Q, int R>
struct ScanFew {
  static constexpr int kAtOnce = 2, kSteps = 8 / Q::kSubs;
  F estimate[2][R], margin[2][R];

  template <int N>
  static GEMMA_INLINE void meet(const uint8_t* plane, const int8_t* q, I (*dot)[R]) {
    const B w[2] = {load_4bit<0, N>(plane), load_4bit<1, N>(plane)};
    for (int i = 0; i < R; ++i) {
      const B x = Vec::bytes4(q + i * kBlock + 4 * N);
      for (int g = 0; g < 2; ++g) dot[g][i] = Vec::add_dot(dot[g][i], w[g], x);
    }
    if constexpr ((N + 1) % kSteps != 0) meet<N + 1>(plane, q, dot);
  }
  template <int, int SUB = 0>
  GEMMA_INLINE void step(const uint8_t* unit, int j, const int8_t* q, const ScanScale* s) {
    I dot[2][R];
    for (int i = 0; i < R; ++i) dot[0][i] = dot[1][i] = V::set_i(s[i].begin[SUB]);
    meet<SUB * kSteps>(Q::high(unit, j), q, dot);
    F scale[2][Q::kSubs], none;
    Q::template scales<0>(unit, j, scale[0], none);
    Q::template scales<1>(unit, j, scale[1], none);
    for (int g = 0; g < 2; ++g) {
      const F d = scale[g][SUB], square = V::mul(d, d);
      for (int i = 0; i < R; ++i) {
        estimate[g][i] = V::fma(d, scan_sum(dot[g][i], s[i]), estimate[g][i]);
        margin[g][i] = V::fma(square, V::set(s[i].energy[SUB]), margin[g][i]);
      }
    }
    if constexpr (SUB + 1 < Q::kSubs) step<0, SUB + 1>(unit, j, q, s);
  }
};

template <class Q, int R>
using ScanOf = std::conditional_t<kGroups == 2 && (R > 1), ScanFew<V, Q, R>, ScanSums<Q, R>>;

struct Scanned {
  const uint8_t* units;
  int64_t blocks;
  const int8_t* q;  // rows of a block side by side
  const ScanScale* scales;
  int rows;
  uint32_t skip;
  bool cached = false;  // an earlier pass has read the panel
};

// Above 0 in the lanes of group g that do not count.
GEMMA_INLINE F left_out(uint32_t skip, int g) {
  constexpr int32_t kBits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return V::to_float(V::and_i(V::set_i(static_cast<int32_t>(skip >> g * W)), V::load_i(kBits)));
}

// low = the larger of low and estimate - margin, high of high and estimate + margin.
GEMMA_INLINE void add_bounds(F estimate, F square, F out, F& low, F& high) {
  const F nothing = V::set(-INFINITY), margin = V::sqrt(square);
  // A row without a number is no measure for the others (`max` takes its second operand then), and may itself be the best.
  F up = V::add(estimate, margin);
  up = V::less(nothing, up, up, V::set(INFINITY));
  low = V::max(V::less(V::zero(), out, nothing, V::sub(estimate, margin)), low);
  high = V::max(V::less(V::zero(), out, nothing, up), high);
}

// The bounds of groups G and on, of R activation rows.
template <class Q, int R, int G = 0>
GEMMA_INLINE void scan_groups(const Scanned& a, F* low, F* high) {
  constexpr int kBytes = Q::kUnit / Q::kUnitBlocks;
  using Sums = ScanOf<Q, R>;
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
    const F out = left_out(a.skip, G + g);
    for (int i = 0; i < R; ++i) add_bounds(sums.estimate[g][i], sums.margin[g][i], out, low[i], high[i]);
  }
  if constexpr (G + Sums::kAtOnce < kGroups) scan_groups<Q, R, G + Sums::kAtOnce>(a, low, high);
}

// R rows at a time, then the rest.
template <class Q, int R>
void scan_panel(Scanned a, int left, float* low, float* high, int64_t ld) {
  for (; left >= R; left -= R, a.q += R * kBlock, a.scales += R, a.cached = true, low += R * ld, high += R * ld) {
    F lo[R], hi[R];
    for (int i = 0; i < R; ++i) lo[i] = hi[i] = V::set(-INFINITY);
    scan_groups<Q, R>(a, lo, hi);
    for (int i = 0; i < R; ++i) {
      low[i * ld] = V::max_of(lo[i]);
      high[i * ld] = V::max_of(hi[i]);
    }
  }
  if constexpr (R > 1)
    if (left > 0) scan_panel<Q, R - 1>(a, left, low, high, ld);
}

// Rows of a pass at most, whose sums fit the registers.
constexpr int kScanRows = kGroups == 2 ? 4 : 2;

// More rows of Q8_0 where a panel is two groups, in the way of SomeRows: the first four meet weights as they are unpacked, an activation is
// broadcast once for both groups, and the sums lie in L1.
template <class Vec>
struct ScanFour : SumsInTile {
  static constexpr int kFirst = 4;
  B w[2][8];
  F scale[2], square[2];
  I dot[kFirst][2];

  template <int N = 0>
  GEMMA_INLINE void meet(const uint8_t* plane, const int8_t* q) {
    w[0][N] = load_4bit<0, N>(plane);
    w[1][N] = load_4bit<1, N>(plane);
    for (int i = 0; i < kFirst; ++i) {
      const B x = Vec::bytes4(q + i * kBlock + 4 * N);
      for (int g = 0; g < 2; ++g) dot[i][g] = Vec::add_dot(dot[i][g], w[g][N], x);
    }
    if constexpr (N < 7) meet<N + 1>(plane, q);
  }
  GEMMA_INLINE void close(const I* dots, const ScanScale& s, float* estimate, float* margin) const {
    for (int g = 0; g < 2; ++g) {
      V::store(estimate + g * W, V::fma(scale[g], scan_sum(dots[g], s), V::load(estimate + g * W)));
      V::store(margin + g * W, V::fma(square[g], V::set(s.energy[0]), V::load(margin + g * W)));
    }
  }
  GEMMA_INLINE void step(const uint8_t* unit, const int8_t* q, const ScanScale* s, int rows, float* estimate,
                         float* margin) {
    F none;
    EightBit::scales<0>(unit, 0, &scale[0], none);
    EightBit::scales<1>(unit, 0, &scale[1], none);
    for (int g = 0; g < 2; ++g) square[g] = V::mul(scale[g], scale[g]);
    for (int i = 0; i < kFirst; ++i) dot[i][0] = dot[i][1] = V::set_i(s[i].begin[0]);
    meet(EightBit::high(unit, 0), q);
    for (int i = 0; i < kFirst; ++i) close(dot[i], s[i], estimate + i * kPanel, margin + i * kPanel);
    for (int i = kFirst; i < rows; ++i) {
      const int8_t* a = q + i * kBlock;
      const I dots[2] = {scan_dot<8>(w[0], a, s[i].begin[0]), scan_dot<8>(w[1], a, s[i].begin[0])};
      close(dots, s[i], estimate + i * kPanel, margin + i * kPanel);
    }
  }
};

template <class Vec>
void scan_four(const Scanned& a, float* low, float* high, int64_t ld) {
  alignas(64) float estimate[kActChunk * kPanel], margin[kActChunk * kPanel];
  ScanFour<Vec> four;
  four.start(false, a.rows, estimate);
  four.start(false, a.rows, margin);
  const uint8_t* unit = a.units;
  const int8_t* q = a.q;
  const ScanScale* s = a.scales;
  for (int64_t j = 0; j < a.blocks; ++j, unit += EightBit::kUnit, q += a.rows * kBlock, s += a.rows) {
    for (int p = 0; p < EightBit::kUnit; p += 64) GEMMA_PREFETCH(unit + V::kAhead * EightBit::kUnit + p);
    four.step(unit, q, s, a.rows, estimate, margin);
  }
  for (int i = 0; i < a.rows; ++i) {
    F lo = V::set(-INFINITY), hi = lo;
    for (int g = 0; g < kGroups; ++g)
      add_bounds(V::load(estimate + i * kPanel + g * W), V::load(margin + i * kPanel + g * W), left_out(a.skip, g), lo,
                 hi);
    low[i * ld] = V::max_of(lo);
    high[i * ld] = V::max_of(hi);
  }
}

template <class Q>
void scan_rows(const Scanned& a, float* low, float* high, int64_t ld) {
  if constexpr (kGroups == 2 && Q::kSubs == 1)
    if (a.rows > kScanRows) return scan_four<V>(a, low, high, ld);
  scan_panel<Q, kScanRows>(a, a.rows, low, high, ld);
}

void scan(DType type, const uint8_t* units, int64_t blocks, const int8_t* q, const ScanScale* scales, int rows,
          uint32_t skip, float* low, float* high, int64_t ld) {
  const Scanned all{units, blocks, q, scales, rows, skip};
  type == DType::Q6_K ? scan_rows<SixBit>(all, low, high, ld) : scan_rows<EightBit>(all, low, high, ld);
}

}  // namespace GEMMA_ISA
}  // namespace gemma
