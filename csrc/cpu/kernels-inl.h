// The bodies of all CPU kernels, over the small vector type V of vec_*.h. Included once for each instruction-set level, inside
// that level's namespace; nothing here may come from a header that other levels share as inline code (the linker would keep
// one copy, perhaps the one that an older CPU cannot run).
#pragma once

#include "../quant.h"
#include "common-inl.h"
#include "functions-inl.h"
#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

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

// ---- loading -----------------------------------------------------------------------------------------------------------

// Scales in half precision, and their inverses.
struct Q4Scale {
  F d, inverse;
};

GEMMA_INLINE Q4Scale q4_scale(float top, F step) {
  const F d = V::nearest_half(V::div(V::set(top), step));
  return {d, V::div(V::set(1.0f), d)};
}

// (v - value of v in Q4_0)^2. Zero times an infinite inverse is NaN, for which `max` returns its second argument.
GEMMA_INLINE F q4_error(F v, const Q4Scale& s) {
  const F q = V::min(V::max(V::add(V::mul(v, s.inverse), V::set(8.5f)), V::zero()), V::set(15.0f));
  const F e = V::sub(v, V::mul(s.d, V::sub(V::to_float(V::truncate(q)), V::set(8.0f))));
  return V::mul(e, e);
}

void q4_errors(const float* v, float top, float* d, float* error) {
  int s = 0;
  for (; s + W <= kQ4Scales; s += W) {
    const Q4Scale scale = q4_scale(top, V::load(kQ4Steps.at + s));
    F sum = V::zero();
    for (int i = 0; i < kBlock; ++i) sum = V::add(sum, q4_error(V::set(v[i]), scale));
    V::store(d + s, scale.d);
    V::store(error + s, sum);
  }
  for (; s < kQ4Scales; ++s) {  // a vector of values instead, whose errors are added in the same order
    const Q4Scale scale = q4_scale(top, V::set(kQ4Steps.at[s]));
    float each[kBlock];
    V::store(each, scale.d);
    d[s] = each[0];
    for (int i = 0; i < kBlock; i += W) V::store(each + i, q4_error(V::load(v + i), scale));
    float sum = 0;
    for (float e : each) sum += e;
    error[s] = sum;
  }
}

}  // namespace GEMMA_ISA
}  // namespace gemma

// Parts that use what is above.
#include "attention-inl.h"
#include "bf16-inl.h"
#include "products-inl.h"
#include "scan-inl.h"

namespace gemma {
namespace GEMMA_ISA {

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
  const V::Wide w = V::load_w(bits, 0);
  const V::Packed p = V::load_packed(x, 0);
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
  k.bf16_scratch = bf16_scratch;
  k.geglu = geglu;
  k.add = add;
  k.softcap = softcap;
  k.rope = rope;
  k.log_sum = log_sum;
  k.attend = attend;
  k.fold = fold;
  k.divide = divide;
  k.q4_errors = q4_errors;
  k.read = read;
  k.peak_int8 = peak_int8;
  k.peak_bf16 = peak_bf16;
  k.peak_f32 = peak_f32;
  return k;
}

}  // namespace GEMMA_ISA
}  // namespace gemma
