// Vectors of 8 floats spelt out as loops, for every architecture. The compiler may turn them into what SIMD it has.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../quant.h"

namespace gemma {
namespace GEMMA_ISA {

struct V {
  static constexpr int W = 8;
  struct F {
    float v[W];
  };
  struct I {
    int32_t v[W];
  };
  struct B {
    uint8_t v[4 * W];
  };

#define GEMMA_EACH for (int i = 0; i < W; ++i)
  static F zero() { return set(0.0f); }
  static F set(float x) {
    F r;
    GEMMA_EACH r.v[i] = x;
    return r;
  }
  static F load(const float* p) {
    F r;
    GEMMA_EACH r.v[i] = p[i];
    return r;
  }
  static void store(float* p, F x) { GEMMA_EACH p[i] = x.v[i]; }
  static F load_n(const float* p, int64_t n) {
    F r;
    GEMMA_EACH r.v[i] = i < n ? p[i] : 0.0f;
    return r;
  }
  static void store_n(float* p, F x, int64_t n) { GEMMA_EACH if (i < n) p[i] = x.v[i]; }
  static float root(float x) { return sqrtf(x); }
  static F add(F a, F b) {
    GEMMA_EACH a.v[i] += b.v[i];
    return a;
  }
  static F sub(F a, F b) {
    GEMMA_EACH a.v[i] -= b.v[i];
    return a;
  }
  static F mul(F a, F b) {
    GEMMA_EACH a.v[i] *= b.v[i];
    return a;
  }
  static F div(F a, F b) {
    GEMMA_EACH a.v[i] /= b.v[i];
    return a;
  }
  static F fma(F a, F b, F c) {
    GEMMA_EACH c.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
    return c;
  }
  static F fnma(F a, F b, F c) {
    GEMMA_EACH c.v[i] = fmaf(-a.v[i], b.v[i], c.v[i]);
    return c;
  }  // c - a * b
  static F sqrt(F a) {
    GEMMA_EACH a.v[i] = sqrtf(a.v[i]);
    return a;
  }
  static F max(F a, F b) {
    GEMMA_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  static F min(F a, F b) {
    GEMMA_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  static F abs(F a) {
    GEMMA_EACH a.v[i] = fabsf(a.v[i]);
    return a;
  }
  static F less(F a, F b, F yes, F no) {
    GEMMA_EACH no.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i];
    return no;
  }
  static float sum(F x) { return ((x.v[0] + x.v[4]) + (x.v[2] + x.v[6])) + ((x.v[1] + x.v[5]) + (x.v[3] + x.v[7])); }
  static float max_of(F x) {
    float m = x.v[0];
    GEMMA_EACH m = x.v[i] > m ? x.v[i] : m;
    return m;
  }

  static I set_i(int32_t x) {
    I r;
    GEMMA_EACH r.v[i] = x;
    return r;
  }
  static I load_i(const void* p) {
    I r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  // To nearest even. The range check keeps NaN and infinities defined: they give what x86 gives.
  static I round(F x) {
    I r;
    GEMMA_EACH r.v[i] = fabsf(x.v[i]) < 2147483520.0f ? static_cast<int32_t>(nearbyintf(x.v[i])) : INT32_MIN;
    return r;
  }
  static I truncate(F x) {
    I r;
    GEMMA_EACH r.v[i] = static_cast<int32_t>(x.v[i]);
    return r;
  }
  static F to_float(I x) {
    F r;
    GEMMA_EACH r.v[i] = static_cast<float>(x.v[i]);
    return r;
  }
  static I add_i(I a, I b) {
    GEMMA_EACH a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i]));
    return a;
  }
  static I and_i(I a, I b) {
    GEMMA_EACH a.v[i] &= b.v[i];
    return a;
  }
  static I or_i(I a, I b) {
    GEMMA_EACH a.v[i] |= b.v[i];
    return a;
  }
  static I shr_i(I a, int n) {
    GEMMA_EACH a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> n);
    return a;
  }
  template <int N>
  static I shl_i(I a) {
    GEMMA_EACH a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N);
    return a;
  }
  static I max_i(I a, I b) {
    GEMMA_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return a;
  }
  static I as_int(F a) {
    I r;
    std::memcpy(r.v, a.v, sizeof(r.v));
    return r;
  }
  static void store_i(void* p, I x) { std::memcpy(p, x.v, sizeof(x.v)); }
  static I swap_pairs(I x) {
    I r;
    GEMMA_EACH r.v[i] = x.v[i ^ 1];
    return r;
  }
  // Lane i: the lanes of v[i] joined by op in the tree of `sum`.
  template <class Op>
  static F join(const F* v, Op op) {
    F x[W];  // transposed
    for (int j = 0; j < W; ++j) GEMMA_EACH x[j].v[i] = v[i].v[j];
    return op(op(op(x[0], x[4]), op(x[2], x[6])), op(op(x[1], x[5]), op(x[3], x[7])));
  }
  static F as_float(I a) {
    F r;
    std::memcpy(r.v, a.v, sizeof(r.v));
    return r;
  }
  static int32_t sum_i(I x) {
    int32_t s = 0;
    GEMMA_EACH s += x.v[i];
    return s;
  }
  // lo <= lane < hi ? a : b
  static F between(F a, F b, int lo, int hi) {
    GEMMA_EACH b.v[i] = i >= lo && i < hi ? a.v[i] : b.v[i];
    return b;
  }
  static void store_i8(int8_t* p, I x) {
    GEMMA_EACH p[i] = static_cast<int8_t>(x.v[i] < -128 ? -128 : x.v[i] > 127 ? 127 : x.v[i]);
  }
  static I load_u8(const uint8_t* p) {
    I r;
    GEMMA_EACH r.v[i] = p[i];
    return r;
  }
  static I load_i8(const uint8_t* p) {
    I r;
    GEMMA_EACH r.v[i] = static_cast<int8_t>(p[i]);
    return r;
  }
  static F load_half(const uint8_t* p) {
    F r;
    GEMMA_EACH {
      uint16_t h;
      std::memcpy(&h, p + 2 * i, 2);
      r.v[i] = half_to_float(h);
    }
    return r;
  }
  static F nearest_half(F x) {
    GEMMA_EACH x.v[i] = half_to_float(float_to_half(x.v[i]));
    return x;
  }

#define GEMMA_EACH_BYTE for (int i = 0; i < 4 * W; ++i)
  static B load_b(const uint8_t* p) {
    B r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  static B low4(B x) {
    GEMMA_EACH_BYTE x.v[i] &= 15;
    return x;
  }
  static B high4(B x) {
    GEMMA_EACH_BYTE x.v[i] >>= 4;
    return x;
  }
  // Bytes from their halves: high and low nibbles, of the low (high) nibbles of either.
  static B join_low(B high, B low) {
    for (int i = 0; i < 4 * W; ++i) high.v[i] = static_cast<uint8_t>(high.v[i] << 4 | (low.v[i] & 15));
    return high;
  }
  static B join_high(B high, B low) {
    for (int i = 0; i < 4 * W; ++i) high.v[i] = static_cast<uint8_t>((high.v[i] & 0xf0) | low.v[i] >> 4);
    return high;
  }
  template <int BIT>  // x | (bit BIT of plane) << 4
  static B or_bit(B x, B plane) {
    GEMMA_EACH_BYTE x.v[i] |= static_cast<uint8_t>((plane.v[i] >> BIT & 1) << 4);
    return x;
  }
  // Four times the low (high) nibbles.
  static B low4_up2(B x) {
    GEMMA_EACH_BYTE x.v[i] = static_cast<uint8_t>(x.v[i] << 2 & 60);
    return x;
  }
  static B high4_up2(B x) {
    GEMMA_EACH_BYTE x.v[i] = x.v[i] >> 2 & 60;
    return x;
  }
  template <int PAIR>  // x | bits 2 PAIR, 2 PAIR + 1 of plane
  static B or_pair(B x, B plane) {
    GEMMA_EACH_BYTE x.v[i] |= plane.v[i] >> 2 * PAIR & 3;
    return x;
  }
  // sum over N groups of 4 of (w - OFF) * a, given sum = the sum of a. w < 2^BITS.
  template <int BITS, int OFF, int N>
  static I dot(const B* w, const int8_t* a, int32_t sum) {
    I x = set_i(-OFF * sum);
    for (int g = 0; g < N; ++g) GEMMA_EACH for (int j = 0; j < 4; ++j) x.v[i] += w[g].v[4 * i + j] * a[4 * g + j];
    return x;
  }

  static constexpr int kAhead = 4;         // blocks of weights that are asked for ahead
  static constexpr bool kL1Block = false;  // no products by l1-block-inl.h

  // bf16 products, few rows: 16 values along K at a time, activations in float32.
  static constexpr int kBf16Few = 2;  // rows of activations
  static constexpr int kBf16Step = 16, kBf16Halves = 1;
  static constexpr int bf16_tile(int, bool) { return 2; }  // weight rows that meet so many at a time
  static constexpr int kPackedSize = 4;                    // bytes of a packed activation
  struct Wide {
    uint16_t v[16];
  };
  struct Packed {
    float v[16];
  };
  struct Sum {
    float x[16];
  };
  static Sum sum_zero() { return {}; }
  static Wide load_w(const uint16_t* p, int) {
    Wide r;
    std::memcpy(r.v, p, sizeof(r.v));
    return r;
  }
  static Packed load_packed(const void* x, int) {
    Packed r;
    std::memcpy(r.v, x, sizeof(r.v));
    return r;
  }
  static void dot_bf16(Sum& s, int, const Wide& w, const Packed& x) {
    for (int i = 0; i < 16; ++i) s.x[i] = fmaf(bf16_to_float(w.v[i]), x.v[i], s.x[i]);
  }
  static void close(const Sum* s, int stride, int n, float* out) {
    for (int i = 0; i < n; ++i) out[i] = sum(add(load(s[i * stride].x), load(s[i * stride].x + 8)));
  }
  // 32 floats to packed form
  static void pack32(const float* x, void* out) { std::memcpy(out, x, 32 * sizeof(float)); }

  // bf16 products by columns: each of 2 passes takes the first values of a row's quarter, and another one the last ones.
  struct Column {
    float v[4];
  };
  static constexpr int kColumnStep = 16, kColumnTile = 4, kColumnVectors = 2;
  static constexpr int kColumnAhead = 0;
  static constexpr int kJoinFirst = 2;  // `close` joins sums k and k + 8, then k and k + 4
  static void to_columns(const float* x, Column* c) { std::memcpy(c, x, kColumnStep * sizeof(float)); }
  // Values at to at + 7 of 2 rows.
  static I column(const uint16_t* const* rows, int64_t at) {
    I c;
    for (int r = 0; r < 2; ++r) std::memcpy(&c.v[4 * r], rows[r] + at, 4 * sizeof(int32_t));
    return c;
  }
  using Part = F;
  template <int PART>
  static Part part(const uint32_t* p) {
    uint16_t all[16];
    std::memcpy(all, p, sizeof(all));
    F r;
    GEMMA_EACH r.v[i] = bf16_to_float(all[i / 4 * 8 + PART * 4 + i % 4]);
    return r;
  }
  static Part four(const Column& x) {
    F r;
    GEMMA_EACH r.v[i] = x.v[i % 4];
    return r;
  }
  static F dot_column(const Part& w, const Part& x, const F& sum) { return fma(w, x, sum); }
  // Lane 4 g + q: lanes 4 g to 4 g + 3 of v[q] joined as `sum` does.
  static F join4(const F* v) {
    F r;
    GEMMA_EACH {
      const float* x = v[i % 4].v + i / 4 * 4;
      r.v[i] = (x[0] + x[2]) + (x[1] + x[3]);
    }
    return r;
  }

  // bf16 pairs: a = even elements, b = odd elements of 16 values.
  static void load_pairs(const uint16_t* p, F& a, F& b) {
    GEMMA_EACH {
      a.v[i] = bf16_to_float(p[2 * i]);
      b.v[i] = bf16_to_float(p[2 * i + 1]);
    }
  }
#undef GEMMA_EACH
#undef GEMMA_EACH_BYTE

  // For the probes: one step of each kind.
  template <class T>
  static void opaque(T& a, T& b, T& c, T& d) {
#if defined(__GNUC__)
    __asm__ volatile("" : "+m"(a), "+m"(b), "+m"(c), "+m"(d));
#else
    (void)a, (void)b, (void)c, (void)d;
#endif
  }
  static I dot_step(I a, const B& w) { return add_i(a, dot<8, 0, 1>(&w, reinterpret_cast<const int8_t*>(w.v), 0)); }
  using PeakSum = Sum;
  static constexpr int kPeakOps = 32;
  static PeakSum peak_zero() { return {}; }
  static void peak_step(PeakSum& a, const Wide& w, const Packed& x) { dot_bf16(a, 0, w, x); }
};

}  // namespace GEMMA_ISA
}  // namespace gemma
