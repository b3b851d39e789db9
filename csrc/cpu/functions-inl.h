// Elementary functions of vectors. Part of kernels-inl.h and tiles-inl.h.
#pragma once

#include <math.h>

#include "common-inl.h"

namespace gemma {
namespace GEMMA_ISA {

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

inline F cap(F x, float c) { return V::mul(V::set(c), tanh(V::div(x, V::set(c)))); }

// What a block of keys adds to the softmax of a query: p[i] = exp(p[i] - max) and their sum, over keys [begin, end) (multiples of W).
// Vectors of keys that are masked would add exact zeros: leaving them out keeps the sum's order.
inline void softmax(float* p, int begin, int end, float* max, float* sum) {
  F m = V::load(p + begin);
  for (int i = begin + W; i < end; i += W) m = V::max(m, V::load(p + i));
  *max = V::max_of(m);
  F s = V::zero();
  for (int i = begin; i < end; i += W) {
    F x = exp(V::sub(V::load(p + i), V::set(*max)));
    V::store(p + i, x);
    s = V::add(s, x);
  }
  *sum = V::sum(s);
}

}  // namespace GEMMA_ISA
}  // namespace gemma
