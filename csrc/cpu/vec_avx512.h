// Vectors of 16 floats: AVX-512 F, BW, DQ, VL with VNNI, and BF16 for products with bf16 weights. Included by kernels_avx512.cpp and kernels_amx.cpp.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

struct V {
  static constexpr int W = 16;
  using F = __m512;
  using I = __m512i;
  using B = __m512i;  // 4 * W bytes: 4 values along K for W weight rows

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }
  static F load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_n(float* p, F x, int64_t n) { _mm512_mask_storeu_ps(p, first(n), x); }
  static float root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F a) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)));
  }
  static F less(F a, F b, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes); }
  static float sum(F x) {
    __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
  static float max_of(F x) {
    __m256 h = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
  }

  static I set_i(int32_t x) { return _mm512_set1_epi32(x); }
  static I load_i(const void* p) { return _mm512_loadu_si512(p); }
  static I round(F x) { return _mm512_cvtps_epi32(x); }  // to nearest even
  static I truncate(F x) { return _mm512_cvttps_epi32(x); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
  static I and_i(I a, I b) { return _mm512_and_si512(a, b); }
  static I or_i(I a, I b) { return _mm512_or_si512(a, b); }
  static I shr_i(I a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }
  template <int N>
  static I shl_i(I a) {
    return _mm512_slli_epi32(a, N);
  }
  static I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
  static F as_float(I a) { return _mm512_castsi512_ps(a); }
  static I as_int(F a) { return _mm512_castps_si512(a); }
  static void store_i(void* p, I x) { _mm512_storeu_si512(p, x); }
  static I swap_pairs(I x) { return _mm512_shuffle_epi32(x, static_cast<_MM_PERM_ENUM>(0xb1)); }
  // Lane i: the 16 lanes of v[i] joined by op in the tree of `sum`.
  template <class Op>
  static F join(const F* v, Op op) {
    F t[8], u[4], w[2];
    for (int j = 0; j < 8; ++j)  // lanes k and k + 8
      t[j] = op(_mm512_shuffle_f32x4(v[j], v[j + 8], 0x44), _mm512_shuffle_f32x4(v[j], v[j + 8], 0xee));
    for (int j = 0; j < 4; ++j)  // k and k + 4
      u[j] = op(_mm512_shuffle_f32x4(t[j], t[j + 4], 0x88), _mm512_shuffle_f32x4(t[j], t[j + 4], 0xdd));
    for (int j = 0; j < 2; ++j)  // k and k + 2
      w[j] = op(_mm512_shuffle_ps(u[j], u[j + 2], 0x44), _mm512_shuffle_ps(u[j], u[j + 2], 0xee));
    const __m512i order = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return _mm512_permutexvar_ps(order, op(_mm512_shuffle_ps(w[0], w[1], 0x88), _mm512_shuffle_ps(w[0], w[1], 0xdd)));
  }
  static int32_t sum_i(I x) { return _mm512_reduce_add_epi32(x); }
  static I lane_index() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  // lo <= lane < hi ? a : b
  static F between(F a, F b, int lo, int hi) {
    lo = lo < 0 ? 0 : lo > 16 ? 16 : lo;
    hi = hi < 0 ? 0 : hi > 16 ? 16 : hi;
    return _mm512_mask_blend_ps(static_cast<__mmask16>(((1u << hi) - 1) & ~((1u << lo) - 1)), b, a);
  }
  static void store_i8(int8_t* p, I x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x)); }
  static I load_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_i8(const uint8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F load_half(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  static F nearest_half(F x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

  // Bytes of quantised weights.
  static B load_b(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static B low4(B x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  static B high4(B x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
  // Bytes from their halves: high and low nibbles, of the low (high) nibbles of either.
  static B join_low(B high, B low) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), low, _mm512_slli_epi16(high, 4), 0xca);
  }
  static B join_high(B high, B low) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(15), _mm512_srli_epi16(low, 4), high, 0xca);
  }
  template <int BIT>  // x | (bit BIT of plane) << 4
  static B or_bit(B x, B plane) {
    B p = BIT < 4 ? _mm512_slli_epi16(plane, BIT < 4 ? 4 - BIT : 0) : _mm512_srli_epi16(plane, BIT < 4 ? 0 : BIT - 4);
    return _mm512_ternarylogic_epi32(x, p, _mm512_set1_epi8(0x10), 0xf8);
  }
  // Four times the low (high) nibbles.
  static B low4_up2(B x) { return _mm512_and_si512(_mm512_slli_epi16(x, 2), _mm512_set1_epi8(60)); }
  static B high4_up2(B x) { return _mm512_and_si512(_mm512_srli_epi16(x, 2), _mm512_set1_epi8(60)); }
  template <int PAIR>  // x | bits 2 PAIR, 2 PAIR + 1 of plane
  static B or_pair(B x, B plane) {
    return _mm512_ternarylogic_epi32(x, _mm512_srli_epi16(plane, 2 * PAIR), _mm512_set1_epi8(3), 0xf8);
  }
  static B sub8(B x, int n) { return _mm512_sub_epi8(x, _mm512_set1_epi8(static_cast<char>(n))); }
  static I bytes4(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return _mm512_set1_epi32(x);
  }
  // sum over N groups of 4 of (w - OFF) * a, given sum = the sum of a. w < 2^BITS.
  template <int BITS, int OFF, int N>
  static GEMMA_INLINE I dot(const B* w, const int8_t* a, int32_t sum) {
    I x = _mm512_set1_epi32(-OFF * sum);
    if constexpr (N <= 4) {
      for (int i = 0; i < N; ++i) x = _mm512_dpbusd_epi32(x, w[i], bytes4(a + 4 * i));
      return x;
    }
    I y = _mm512_setzero_si512();  // a second sum, since a long one would wait for itself
    for (int i = 0; i < N; i += 2) {
      x = _mm512_dpbusd_epi32(x, w[i], bytes4(a + 4 * i));
      y = _mm512_dpbusd_epi32(y, w[i + 1], bytes4(a + 4 * i + 4));
    }
    return _mm512_add_epi32(x, y);
  }

  // sum + the dot product of one group of 4.
  static I add_dot(I sum, B w, I a) { return _mm512_dpbusd_epi32(sum, w, a); }

  static constexpr int kAhead = 16;        // blocks of weights that are asked for ahead
  static constexpr bool kL1Block = false;  // no products by l1-block-inl.h

  // bf16 products, few rows: 32 values along K at a time, activations rounded to bf16.
  static constexpr int kBf16Few = 8;  // rows of activations
  static constexpr int kBf16Step = 32, kBf16Halves = 1;
  // Weight rows that meet so many at a time, `whole` or in pieces: the sums take at most 16 of 32 registers.
  static constexpr int bf16_tile(int m, bool whole) { return m > 4 ? 2 : whole ? 1 : 4; }
  static constexpr int kPackedSize = 2;  // bytes of a packed activation
  using Wide = __m512i;
  using Packed = __m512i;
  static __m512bh as_bf16(__m512i x) {
    __m512bh b;
    std::memcpy(&b, &x, sizeof(b));
    return b;
  }
  struct Sum {
    __m512 x;
  };
  static Sum sum_zero() { return {_mm512_setzero_ps()}; }
  static Wide load_w(const uint16_t* p, int) { return _mm512_loadu_si512(p); }
  static Packed load_packed(const void* x, int) { return _mm512_loadu_si512(x); }
  static void dot_bf16(Sum& s, int, Wide w, Packed x) { s.x = _mm512_dpbf16_ps(s.x, as_bf16(w), as_bf16(x)); }
  // out[i] = sum(s[i * stride]) for i < n: 16 trees at once, each the tree of `sum`.
  static void close(const Sum* s, int stride, int n, float* out) {
    for (int i = 0; i < n; i += 16, s += 16 * stride) {
      F v[16];
      for (int j = 0; j < 16; ++j) v[j] = i + j < n ? s[j * stride].x : zero();
      store_n(out + i, join(v, add), n - i);
    }
  }
  // 32 floats to packed form
  static void pack32(const float* x, void* out) {
    __m512bh b = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + 16), _mm512_loadu_ps(x));
    std::memcpy(out, &b, 64);
  }

  // bf16 products by columns: a pass takes four pairs of a step, two values in a word.
  struct Column {
    uint32_t v[4];
  };
  static constexpr int kColumnStep = 32, kColumnTile = 6,
                       kColumnVectors = 4;  // 24 sums in 32 registers
  // Bytes of activations that are asked for ahead, those of a pass of a tile: a chunk lies in L2 or further away.
  static constexpr int kColumnAhead = 6144;
  static constexpr int kJoinFirst = 2;  // `sum` joins lanes k and k + 8, then k and k + 4
  static void to_columns(const float* x, Column* c) { pack32(x, c); }
  // Values at to at + 7 of 4 rows.
  static I column(const uint16_t* const* rows, int64_t at) {
    return quarters(rows[0] + at, rows[1] + at, rows[2] + at, rows[3] + at);
  }
  static I quarters(const uint16_t* a, const uint16_t* b, const uint16_t* c, const uint16_t* d) {
    auto load = [](const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); };
    I x = _mm512_inserti32x4(_mm512_castsi128_si512(load(a)), load(b), 1);
    x = _mm512_inserti32x4(x, load(c), 2);
    return _mm512_inserti32x4(x, load(d), 3);
  }
  using Part = I;
  template <int>
  static Part part(const uint32_t* p) {
    return load_i(p);
  }
  static Part four(const Column& x) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x.v)));
  }
  static F dot_column(Part w, Part x, F sum) { return _mm512_dpbf16_ps(sum, as_bf16(w), as_bf16(x)); }
  // Lane 4 g + q: lanes 4 g to 4 g + 3 of v[q] joined as `sum` does.
  static F join4(const F* v) {
    const F w0 = add(_mm512_shuffle_ps(v[0], v[1], 0x44), _mm512_shuffle_ps(v[0], v[1], 0xee));
    const F w1 = add(_mm512_shuffle_ps(v[2], v[3], 0x44), _mm512_shuffle_ps(v[2], v[3], 0xee));
    return add(_mm512_shuffle_ps(w0, w1, 0x88), _mm512_shuffle_ps(w0, w1, 0xdd));
  }

  // x[i], lane 4 g + q: x[q], lane 4 g + i.
  static void transpose4(F* x) {
    const F a = _mm512_shuffle_ps(x[0], x[1], 0x44), b = _mm512_shuffle_ps(x[0], x[1], 0xee);
    const F c = _mm512_shuffle_ps(x[2], x[3], 0x44), d = _mm512_shuffle_ps(x[2], x[3], 0xee);
    x[0] = _mm512_shuffle_ps(a, c, 0x88);
    x[1] = _mm512_shuffle_ps(a, c, 0xdd);
    x[2] = _mm512_shuffle_ps(b, d, 0x88);
    x[3] = _mm512_shuffle_ps(b, d, 0xdd);
  }

  // bf16 pairs: a = even elements, b = odd elements of 32 values.
  static void load_pairs(const uint16_t* p, F& a, F& b) {
    __m512i x = _mm512_loadu_si512(p);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  // For the probes: one instruction of each kind.
  template <class T>
  static void opaque(T& a, T& b, T& c, T& d) {
#if defined(__GNUC__) && !defined(GEMMA_EMULATED_AVX512)
    __asm__ volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d));
#else
    (void)a, (void)b, (void)c, (void)d;
#endif
  }
  static I dot_step(I a, B w) { return _mm512_dpbusd_epi32(a, w, w); }
  using PeakSum = __m512;
  static constexpr int kPeakOps = 64;
  static PeakSum peak_zero() { return _mm512_setzero_ps(); }
  static void peak_step(PeakSum& a, Wide w, Packed x) { a = _mm512_dpbf16_ps(a, as_bf16(w), as_bf16(x)); }
};

}  // namespace GEMMA_ISA
}  // namespace gemma
