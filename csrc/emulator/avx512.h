// The AVX-512 instructions that vec_avx512.h uses, made of AVX2 ones, so that its kernels can be tested on CPUs without them.
// Names and arguments are Intel's; what a function does is in Intel's Intrinsics Guide. One difference: inputs, sums and results
// of bf16 instructions may be denormal here, where the instructions take them for zero.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../quant.h"

// Macros in the compiler's own header, some of them only without optimisation.
#undef _mm512_setr_epi32
#undef _mm512_cvtps_ph
#undef _mm512_cmp_ps_mask
#undef _mm512_extractf32x8_ps
#undef _mm512_inserti32x4
#undef _mm512_shuffle_epi32
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_ps
#undef _mm512_slli_epi16
#undef _mm512_slli_epi32
#undef _mm512_srli_epi16
#undef _mm512_ternarylogic_epi32

namespace gemma {
namespace emulated {

struct __m512 {
  __m256 low, high;
};
struct __m512i {
  __m256i low, high;
};
struct __m512bh : __m512i {};

// The lanes of a vector, and a vector of lanes. (No std::array: a copy of its functions made here would need AVX2 everywhere.)
template <class T, int N>
struct Lanes {
  T v[N];
  T& operator[](int i) { return v[i]; }
  const T& operator[](int i) const { return v[i]; }
};
template <class T, class V>
inline Lanes<T, sizeof(V) / sizeof(T)> lanes(V x) {
  Lanes<T, sizeof(V) / sizeof(T)> a;
  std::memcpy(&a, &x, sizeof(x));
  return a;
}
template <class V, class T, int N>
inline V vector(const Lanes<T, N>& a) {
  static_assert(sizeof(V) == sizeof(a), "as many bytes");
  V x;
  std::memcpy(&x, &a, sizeof(x));
  return x;
}

inline __m512 halves(__m256 low, __m256 high) { return {low, high}; }
inline __m512i halves(__m256i low, __m256i high) { return {low, high}; }

#define GEMMA_BOTH1(name, A, half) \
  inline auto name(A a) { return halves(half(a.low), half(a.high)); }
#define GEMMA_BOTH2(name, A, half) \
  inline A name(A a, A b) { return halves(half(a.low, b.low), half(a.high, b.high)); }
#define GEMMA_BOTH3(name, A, half) \
  inline A name(A a, A b, A c) { return halves(half(a.low, b.low, c.low), half(a.high, b.high, c.high)); }
#define GEMMA_SHIFT(name, half) \
  inline __m512i name(__m512i a, unsigned n) { return halves(half(a.low, int(n)), half(a.high, int(n))); }

GEMMA_BOTH2(_mm512_add_ps, __m512, _mm256_add_ps)
GEMMA_BOTH2(_mm512_sub_ps, __m512, _mm256_sub_ps)
GEMMA_BOTH2(_mm512_mul_ps, __m512, _mm256_mul_ps)
GEMMA_BOTH2(_mm512_div_ps, __m512, _mm256_div_ps)
GEMMA_BOTH1(_mm512_sqrt_ps, __m512, _mm256_sqrt_ps)
GEMMA_BOTH2(_mm512_max_ps, __m512, _mm256_max_ps)
GEMMA_BOTH2(_mm512_min_ps, __m512, _mm256_min_ps)
GEMMA_BOTH3(_mm512_fmadd_ps, __m512, _mm256_fmadd_ps)
GEMMA_BOTH3(_mm512_fnmadd_ps, __m512, _mm256_fnmadd_ps)
GEMMA_BOTH2(_mm512_and_si512, __m512i, _mm256_and_si256)
GEMMA_BOTH2(_mm512_or_si512, __m512i, _mm256_or_si256)
GEMMA_BOTH2(_mm512_sub_epi8, __m512i, _mm256_sub_epi8)
GEMMA_BOTH2(_mm512_add_epi32, __m512i, _mm256_add_epi32)
GEMMA_BOTH2(_mm512_max_epi32, __m512i, _mm256_max_epi32)
GEMMA_BOTH2(_mm512_unpacklo_epi32, __m512i, _mm256_unpacklo_epi32)
GEMMA_BOTH2(_mm512_unpackhi_epi32, __m512i, _mm256_unpackhi_epi32)
GEMMA_BOTH2(_mm512_unpacklo_epi64, __m512i, _mm256_unpacklo_epi64)
GEMMA_BOTH2(_mm512_unpackhi_epi64, __m512i, _mm256_unpackhi_epi64)
GEMMA_BOTH1(_mm512_castsi512_ps, __m512i, _mm256_castsi256_ps)
GEMMA_BOTH1(_mm512_castps_si512, __m512, _mm256_castps_si256)
GEMMA_BOTH1(_mm512_cvtps_epi32, __m512, _mm256_cvtps_epi32)
GEMMA_BOTH1(_mm512_cvttps_epi32, __m512, _mm256_cvttps_epi32)
GEMMA_BOTH1(_mm512_cvtepi32_ps, __m512i, _mm256_cvtepi32_ps)
GEMMA_SHIFT(_mm512_slli_epi16, _mm256_slli_epi16)
GEMMA_SHIFT(_mm512_srli_epi16, _mm256_srli_epi16)
GEMMA_SHIFT(_mm512_slli_epi32, _mm256_slli_epi32)
#undef GEMMA_BOTH1
#undef GEMMA_BOTH2
#undef GEMMA_BOTH3
#undef GEMMA_SHIFT

inline __m512 _mm512_set1_ps(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.0f); }
inline __m512i _mm512_set1_epi32(int x) { return halves(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
inline __m512i _mm512_set1_epi8(char x) { return halves(_mm256_set1_epi8(x), _mm256_set1_epi8(x)); }
inline __m512i _mm512_setzero_si512() { return _mm512_set1_epi32(0); }
template <class... Ints>
inline __m512i _mm512_setr_epi32(Ints... x) {
  return vector<__m512i>(Lanes<int, 16>{{x...}});
}

inline __m512 _mm512_loadu_ps(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void _mm512_storeu_ps(float* p, __m512 x) { std::memcpy(p, &x, 64); }
inline __m512i _mm512_loadu_si512(const void* p) {
  __m512i x;
  std::memcpy(&x, p, 64);
  return x;
}
inline void _mm512_storeu_si512(void* p, __m512i x) { std::memcpy(p, &x, 64); }
inline __m512 _mm512_maskz_loadu_ps(__mmask16 m, const float* p) {
  Lanes<float, 16> a = {};
  for (int i = 0; i < 16; ++i)
    if (m >> i & 1) a[i] = p[i];
  return vector<__m512>(a);
}
inline void _mm512_mask_storeu_ps(float* p, __mmask16 m, __m512 x) {
  const auto a = lanes<float>(x);
  for (int i = 0; i < 16; ++i)
    if (m >> i & 1) p[i] = a[i];
}
inline __m512 _mm512_mask_blend_ps(__mmask16 m, __m512 no, __m512 yes) {
  auto a = lanes<float>(no);
  const auto b = lanes<float>(yes);
  for (int i = 0; i < 16; ++i)
    if (m >> i & 1) a[i] = b[i];
  return vector<__m512>(a);
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 x, __m512 y, int) {  // _CMP_LT_OQ, the only one wanted
  const auto a = lanes<float>(x), b = lanes<float>(y);
  unsigned m = 0;
  for (int i = 0; i < 16; ++i) m |= static_cast<unsigned>(a[i] < b[i]) << i;
  return static_cast<__mmask16>(m);
}

inline __m256 _mm512_castps512_ps256(__m512 x) { return x.low; }
inline __m256 _mm512_extractf32x8_ps(__m512 x, int high) { return high ? x.high : x.low; }
inline __m128i upper_half(__m128i x) { return _mm_srli_si128(x, 8); }
inline __m512i _mm512_cvtepu8_epi32(__m128i x) {
  return halves(_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(upper_half(x)));
}
inline __m512i _mm512_cvtepi8_epi32(__m128i x) {
  return halves(_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(upper_half(x)));
}
inline __m128i _mm512_cvtepi32_epi8(__m512i x) {
  const auto a = lanes<int32_t>(x);
  Lanes<int8_t, 16> b;
  for (int i = 0; i < 16; ++i) b[i] = static_cast<int8_t>(a[i]);
  return vector<__m128i>(b);
}
inline __m512 _mm512_cvtph_ps(__m256i x) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
inline __m256i _mm512_cvtps_ph(__m512 x, int) {  // to nearest
  return _mm256_set_m128i(_mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
}

inline __m512i _mm512_srl_epi32(__m512i a, __m128i n) {
  return halves(_mm256_srl_epi32(a.low, n), _mm256_srl_epi32(a.high, n));
}
inline __m512i _mm512_ternarylogic_epi32(__m512i x, __m512i y, __m512i z, int table) {
  auto a = lanes<uint64_t>(x);
  const auto b = lanes<uint64_t>(y), c = lanes<uint64_t>(z);
  for (int i = 0; i < 8; ++i) {
    uint64_t r = 0;
    for (int t = 0; t < 8; ++t)
      if (table >> t & 1) r |= (t & 4 ? a[i] : ~a[i]) & (t & 2 ? b[i] : ~b[i]) & (t & 1 ? c[i] : ~c[i]);
    a[i] = r;
  }
  return vector<__m512i>(a);
}

// Four lanes are a group; an order is four numbers of two bits.
template <class T, class V>
inline V shuffle_in_groups(V x, V y, int order) {
  const auto a = lanes<T>(x), b = lanes<T>(y);
  auto r = a;
  for (int i = 0; i < 16; ++i) r[i] = (i % 4 < 2 ? a : b)[i / 4 * 4 + (order >> i % 4 * 2 & 3)];
  return vector<V>(r);
}
inline __m512 _mm512_shuffle_ps(__m512 x, __m512 y, int order) { return shuffle_in_groups<float>(x, y, order); }
inline __m512i _mm512_shuffle_epi32(__m512i x, int order) { return shuffle_in_groups<int32_t>(x, x, order); }
inline __m512 _mm512_shuffle_f32x4(__m512 x, __m512 y, int order) {
  const auto a = lanes<float>(x), b = lanes<float>(y);
  auto r = a;
  for (int i = 0; i < 16; ++i) r[i] = (i < 8 ? a : b)[(order >> i / 4 * 2 & 3) * 4 + i % 4];
  return vector<__m512>(r);
}
inline __m512i _mm512_broadcast_i32x4(__m128i x) {
  const __m256i both = _mm256_broadcastsi128_si256(x);
  return {both, both};
}
inline __m512i _mm512_castsi128_si512(__m128i x) { return halves(_mm256_castsi128_si256(x), _mm256_setzero_si256()); }
inline __m512i _mm512_inserti32x4(__m512i x, __m128i y, int group) {
  auto r = lanes<int32_t>(x);
  std::memcpy(&r[4 * group], &y, sizeof(y));
  return vector<__m512i>(r);
}
inline __m512 _mm512_permutexvar_ps(__m512i order, __m512 x) {
  const auto o = lanes<int32_t>(order);
  const auto a = lanes<float>(x);
  auto r = a;
  for (int i = 0; i < 16; ++i) r[i] = a[o[i] & 15];
  return vector<__m512>(r);
}
inline int _mm512_reduce_add_epi32(__m512i x) {
  const auto a = lanes<uint32_t>(x);
  uint32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += a[i];
  return static_cast<int>(sum);
}

// sum + the four products of unsigned by signed bytes in each lane
inline __m256i dpbusd(__m256i sum, __m256i u, __m256i s) {
  const __m256i low = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(u)),
                                        _mm256_cvtepi8_epi16(_mm256_castsi256_si128(s)));
  const __m256i high = _mm256_madd_epi16(_mm256_cvtepu8_epi16(_mm256_extracti128_si256(u, 1)),
                                         _mm256_cvtepi8_epi16(_mm256_extracti128_si256(s, 1)));
  return _mm256_add_epi32(sum, _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xd8));
}
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i u, __m512i s) {
  return halves(dpbusd(sum.low, u.low, s.low), dpbusd(sum.high, u.high, s.high));
}

inline __m512bh _mm512_cvtne2ps_pbh(__m512 upper, __m512 lower) {
  const auto u = lanes<float>(upper), l = lanes<float>(lower);
  Lanes<uint16_t, 32> r;
  for (int i = 0; i < 16; ++i) r[i] = float_to_bf16(l[i]), r[i + 16] = float_to_bf16(u[i]);
  return vector<__m512bh>(r);
}
// sum + the products of the odd, then of the even elements, each rounded once
inline __m256 dpbf16(__m256 sum, __m256i x, __m256i y) {
  const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(x, odd)), _mm256_castsi256_ps(_mm256_and_si256(y, odd)),
                        sum);
  return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(y, 16)),
                         sum);
}
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh x, __m512bh y) {
  return {dpbf16(sum.low, x.low, y.low), dpbf16(sum.high, x.high, y.high)};
}

}  // namespace emulated
}  // namespace gemma
