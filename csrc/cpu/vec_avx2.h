// Vectors of 8 floats: AVX2 with FMA and F16C; vpdpbusd where GEMMA_AVX_VNNI says that the file is compiled for it.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

struct V {
  static constexpr int W = 8;
  using F = __m256;
  using I = __m256i;
  using B = __m256i;  // 4 * W bytes: 4 values along K for W weight rows

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n > 8 ? 8 : static_cast<int>(n)), lane_index());
  }
  static F load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, first(n)); }
  static void store_n(float* p, F x, int64_t n) { _mm256_maskstore_ps(p, first(n), x); }
  static float root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }  // c - a * b
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F abs(F a) { return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff))); }
  static F less(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  static float sum(F x) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
  }
  static float max_of(F x) {
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
  }

  static I set_i(int32_t x) { return _mm256_set1_epi32(x); }
  static I load_i(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static I round(F x) { return _mm256_cvtps_epi32(x); }  // to nearest even
  static I truncate(F x) { return _mm256_cvttps_epi32(x); }
  static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  static I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
  static I and_i(I a, I b) { return _mm256_and_si256(a, b); }
  static I or_i(I a, I b) { return _mm256_or_si256(a, b); }
  static I shr_i(I a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }
  template <int N>
  static I shl_i(I a) {
    return _mm256_slli_epi32(a, N);
  }
  static I max_i(I a, I b) { return _mm256_max_epi32(a, b); }
  static F as_float(I a) { return _mm256_castsi256_ps(a); }
  static I as_int(F a) { return _mm256_castps_si256(a); }
  static void store_i(void* p, I x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
  static I swap_pairs(I x) { return _mm256_shuffle_epi32(x, 0xb1); }
  // Lane i: the 8 lanes of v[i] joined by op in the tree of `sum`.
  template <class Op>
  static F join(const F* v, Op op) {
    F t[4], u[2];
    for (int j = 0; j < 4; ++j)  // lanes k and k + 4
      t[j] = op(_mm256_permute2f128_ps(v[j], v[j + 4], 0x20), _mm256_permute2f128_ps(v[j], v[j + 4], 0x31));
    for (int j = 0; j < 2; ++j)  // k and k + 2
      u[j] = op(_mm256_shuffle_ps(t[j], t[j + 2], 0x44), _mm256_shuffle_ps(t[j], t[j + 2], 0xee));
    const __m256i order = _mm256_setr_epi32(0, 2, 1, 3, 4, 6, 5, 7);
    return _mm256_permutevar8x32_ps(op(_mm256_shuffle_ps(u[0], u[1], 0x88), _mm256_shuffle_ps(u[0], u[1], 0xdd)),
                                    order);
  }
  static int32_t sum_i(I x) {
    __m128i q = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
  }
  static I lane_index() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  // lo <= lane < hi ? a : b
  static F between(F a, F b, int lo, int hi) {
    __m256i in = _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(lo), lane_index()),
                                     _mm256_cmpgt_epi32(_mm256_set1_epi32(hi), lane_index()));
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(in));
  }
  static void store_i8(int8_t* p, I x) {
    __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(w, w));
  }
  static I load_u8(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I load_i8(const uint8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static F load_half(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

  static F nearest_half(F x) { return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }

  // Bytes of quantised weights.
  static B load_b(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static B low4(B x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  static B high4(B x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
  // Bytes from their halves: high and low nibbles, of the low (high) nibbles of either.
  static B join_low(B high, B low) {
    const B mask = _mm256_set1_epi8(15);
    return _mm256_or_si256(_mm256_and_si256(low, mask), _mm256_andnot_si256(mask, _mm256_slli_epi16(high, 4)));
  }
  static B join_high(B high, B low) {
    const B mask = _mm256_set1_epi8(15);
    return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(low, 4), mask), _mm256_andnot_si256(mask, high));
  }
  template <int BIT>  // x | (bit BIT of plane) << 4
  static B or_bit(B x, B plane) {
    B p = BIT < 4 ? _mm256_slli_epi16(plane, BIT < 4 ? 4 - BIT : 0) : _mm256_srli_epi16(plane, BIT < 4 ? 0 : BIT - 4);
    return _mm256_or_si256(x, _mm256_and_si256(p, _mm256_set1_epi8(0x10)));
  }
  // Four times the low (high) nibbles.
  static B low4_up2(B x) { return _mm256_and_si256(_mm256_slli_epi16(x, 2), _mm256_set1_epi8(60)); }
  static B high4_up2(B x) { return _mm256_and_si256(_mm256_srli_epi16(x, 2), _mm256_set1_epi8(60)); }
  template <int PAIR>  // x | bits 2 PAIR, 2 PAIR + 1 of plane
  static B or_pair(B x, B plane) {
    return _mm256_or_si256(x, _mm256_and_si256(_mm256_srli_epi16(plane, 2 * PAIR), _mm256_set1_epi8(3)));
  }
  static I bytes4(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return _mm256_set1_epi32(x);
  }
  // sum over N groups of 4 of (w - OFF) * a, given sum = the sum of a. w < 2^BITS.
  template <int BITS, int OFF, int N>
  static GEMMA_INLINE I dot(const B* w, const int8_t* a, int32_t sum) {
#if defined(GEMMA_AVX_VNNI)
    I x = _mm256_set1_epi32(-OFF * sum);
    I y = _mm256_setzero_si256();
    for (int i = 0; i < N; i += 2) {
      x = _mm256_dpbusd_avx_epi32(x, w[i], bytes4(a + 4 * i));
      y = _mm256_dpbusd_avx_epi32(y, w[i + 1], bytes4(a + 4 * i + 4));
    }
    return _mm256_add_epi32(x, y);
#else
    const __m256i ones = _mm256_set1_epi16(1);
    if (BITS == 8) {
      // Signed by signed: |w| <= 128 and |a| <= 127, so a pair stays within 32512.
      I x = _mm256_setzero_si256();
      for (int i = 0; i < N; ++i) {
        __m256i s = _mm256_xor_si256(w[i], _mm256_set1_epi8(static_cast<char>(0x80)));
        x = _mm256_add_epi32(
            x,
            _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(bytes4(a + 4 * i), s)), ones));
      }
      return x;
    }
    // As many 16-bit sums as cannot overflow: 2 * 127 * (2^BITS - 1) * kSums <= 32767.
    constexpr int kSums = BITS == 4 ? 8 : BITS == 5 ? 4 : 2;
    I x = _mm256_set1_epi32(-OFF * sum);
    for (int i = 0; i < N; i += kSums) {
      __m256i h = _mm256_maddubs_epi16(w[i], bytes4(a + 4 * i));
      for (int j = 1; j < kSums && i + j < N; ++j)
        h = _mm256_add_epi16(h, _mm256_maddubs_epi16(w[i + j], bytes4(a + 4 * (i + j))));
      x = _mm256_add_epi32(x, _mm256_madd_epi16(h, ones));
    }
    return x;
#endif
  }

  // Products by l1-block-inl.h, where that is quicker than `dot`.
#if defined(GEMMA_AVX_VNNI)
  static constexpr bool kL1Block = false;
  static constexpr int kAhead = 16;
#else
  static constexpr bool kL1Block = true;
  // How many blocks of weights are asked for ahead. What is asked for occupies one of the core's few miss buffers until memory answers,
  // so it should be no earlier than that takes; and the hardware's own prefetch, which needs none of them, runs ahead by then. The
  // 16 of the other levels are as measured on Zen 5.
  static constexpr int kAhead = 4;
#endif
  static B add8(B a, B b) { return _mm256_add_epi8(a, b); }
  static B sub8(B a, int b) { return _mm256_sub_epi8(a, _mm256_set1_epi8(static_cast<char>(b))); }
  static B even16(B x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }  // signed bytes 0, 2, ... in 16 bits
  static B odd16(B x) { return _mm256_srai_epi16(x, 8); }
  // Pairs of 16-bit values to 32 bits; pairs of bytes, a without and w with a sign, to 16.
  static I dot_words(B a, B w) { return _mm256_madd_epi16(a, w); }
  static I dot_bytes(B a, B w) { return _mm256_maddubs_epi16(a, w); }
  static I set16(int x) { return _mm256_set1_epi16(static_cast<int16_t>(x)); }
  static I add16(I a, I b) { return _mm256_add_epi16(a, b); }
  static I join16(I a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
  template <int BY>  // BY times the sum of 4 unsigned bytes
  static I sum4(B x) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(x, _mm256_set1_epi8(1)), _mm256_set1_epi16(BY));
  }
  // Keeps the compiler from making all products before it adds any, for which there are not enough registers.
  static I in_order(I x) {
#if defined(__GNUC__)
    __asm__("" : "+x"(x));
#endif
    return x;
  }

  // bf16 products, few rows: 16 values along K at a time, activations in float32 with even elements before odd ones. A row of weights is
  // widened in registers.
  static constexpr int kBf16Few = 3;  // rows of activations
  static constexpr int kBf16Step = 16, kBf16Halves = 2;
  static constexpr int bf16_tile(int m, bool) { return m == 1 ? 2 : 1; }  // weight rows that meet so many at a time
  static constexpr int kPackedSize = 4;                                   // bytes of a packed activation
  using Wide = __m256;
  using Packed = __m256;
  struct Sum {
    __m256 half[2];
  };
  static Sum sum_zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
  static Wide load_w(const uint16_t* p, int half) {
    const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm256_castsi256_ps(half ? _mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000u)))
                                    : _mm256_slli_epi32(w, 16));
  }
  static Packed load_packed(const void* x, int half) {
    return _mm256_loadu_ps(static_cast<const float*>(x) + 8 * half);
  }
  static void dot_bf16(Sum& s, int half, Wide w, Packed x) { s.half[half] = _mm256_fmadd_ps(w, x, s.half[half]); }
  static void close(const Sum* s, int stride, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = sum(_mm256_add_ps(s[i * stride].half[0], s[i * stride].half[1]));
  }
  // 32 floats to packed form
  static void pack32(const float* x, void* out) {
    float* f = static_cast<float*>(out);
    for (int h = 0; h < 32; h += 16)
      for (int i = 0; i < 8; ++i) {
        f[h + i] = x[h + 2 * i];
        f[h + 8 + i] = x[h + 2 * i + 1];
      }
  }

  // bf16 products by columns: each of 2 passes takes the lower values of its words, and another one the upper ones.
  struct Column {
    float v[4];
  };
  static constexpr int kColumnStep = 16, kColumnTile = 6,
                       kColumnVectors = 2;  // with two vectors of weights, 12 sums in 16 registers
  static constexpr int kColumnAhead = 0;    // the hardware's own prefetch keeps up
  static constexpr int kJoinFirst = 1;      // `close` joins both halves, then lanes k and k + 4
  static void to_columns(const float* x, Column* c) {
    for (int half = 0; half < 2; ++half, x += 8) {
      const __m128 low = _mm_loadu_ps(x), high = _mm_loadu_ps(x + 4);
      _mm_storeu_ps(c[2 * half].v, _mm_shuffle_ps(low, high, 0x88));
      _mm_storeu_ps(c[2 * half + 1].v, _mm_shuffle_ps(low, high, 0xdd));
    }
  }
  // Values at to at + 7 of 2 rows.
  static I column(const uint16_t* const* rows, int64_t at) {
    auto load = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + at)); };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load(0)), load(1), 1);
  }
  using Part = F;
  template <int PART>
  static Part part(const uint32_t* p) {
    return _mm256_castsi256_ps(PART ? _mm256_and_si256(load_i(p), set_i(static_cast<int>(0xffff0000u)))
                                    : _mm256_slli_epi32(load_i(p), 16));
  }
  static Part four(const Column& x) { return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x.v)); }
  static F dot_column(Part w, Part x, F sum) { return fma(w, x, sum); }
  // Lane 4 g + q: lanes 4 g to 4 g + 3 of v[q] joined as `sum` does.
  static F join4(const F* v) {
    const F w0 = add(_mm256_shuffle_ps(v[0], v[1], 0x44), _mm256_shuffle_ps(v[0], v[1], 0xee));
    const F w1 = add(_mm256_shuffle_ps(v[2], v[3], 0x44), _mm256_shuffle_ps(v[2], v[3], 0xee));
    return add(_mm256_shuffle_ps(w0, w1, 0x88), _mm256_shuffle_ps(w0, w1, 0xdd));
  }

  // bf16 pairs: a = even elements, b = odd elements of 16 values.
  static void load_pairs(const uint16_t* p, F& a, F& b) {
    __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }

  // For the probes: one instruction of each kind (bf16 weights go through fma at this level).
  template <class T>
  static void opaque(T& a, T& b, T& c, T& d) {
#if defined(__GNUC__)
    __asm__ volatile("" : "+x"(a), "+x"(b), "+x"(c), "+x"(d));
#else
    (void)a, (void)b, (void)c, (void)d;
#endif
  }
#if defined(GEMMA_AVX_VNNI)
  static I dot_step(I a, B w) { return _mm256_dpbusd_avx_epi32(a, w, w); }
#else
  static I dot_step(I a, B w) {
    return _mm256_add_epi32(a,
                            _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_xor_si256(a, w), w), _mm256_set1_epi16(1)));
  }
#endif
  using PeakSum = __m256;
  static constexpr int kPeakOps = 16;
  static PeakSum peak_zero() { return _mm256_setzero_ps(); }
  static void peak_step(PeakSum& a, Wide w, Packed x) { a = _mm256_fmadd_ps(w, x, a); }
};

}  // namespace GEMMA_ISA
}  // namespace gemma
