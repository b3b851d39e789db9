// The specification of the encodings, which quant.cpp and tiling.cpp share: what blocks hold, and how to read them.
#pragma once

#if defined(__SSE2__) || defined(_M_X64)
#define GEMMA_SSE2
#include <emmintrin.h>
#endif

#include <cstddef>
#include <cstring>

#include "quant.h"

namespace gemma {

// The files' blocks, as ggml defines them; q, ql, qh, qs hold packed values, d and m half-precision scales and offsets.
struct BlockQ8_0 {
  uint16_t d;
  int8_t q[32];
};
struct BlockQ4_0 {
  uint16_t d;
  uint8_t q[16];
};
struct BlockQ4_1 {
  uint16_t d, m;
  uint8_t q[16];
};
struct BlockQ5_0 {
  uint16_t d;
  uint8_t qh[4], q[16];
};
struct BlockQ5_1 {
  uint16_t d, m;
  uint8_t qh[4], q[16];
};
struct BlockQ4_K {
  uint16_t d, dmin;
  uint8_t scales[12], q[128];
};
struct BlockQ5_K {
  uint16_t d, dmin;
  uint8_t scales[12], qh[32], q[128];
};
struct BlockQ6_K {
  uint8_t ql[128], qh[64];
  int8_t scales[16];
  uint16_t d;
};
static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20, "as in files");
static_assert(sizeof(BlockQ5_0) == 22 && sizeof(BlockQ5_1) == 24, "as in files");
static_assert(sizeof(BlockQ4_K) == 144 && sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210, "as in files");

inline constexpr Encoding kEncodings[] = {
    {"F32", 1, 4, 0, 0, false},        {"F16", 1, 2, 0, 0, false},           {"BF16", 1, 2, 0, 0, false},
    {"Q8_0", 32, 34, 1088, 512, true}, {"Q4_0", 32, 18, 576, 0, true},       {"Q4_1", 32, 20, 640, 0, true},
    {"Q5_0", 32, 22, 704, 0, true},    {"Q5_1", 32, 24, 768, 0, true},       {"Q4_K", 256, 144, 4608, 0, true},
    {"Q5_K", 256, 176, 5632, 0, true}, {"Q6_K", 256, 210, 6720, 2048, true},
};

// Where a block of 32 along K has its parts, in a file's block and in a panel's unit. -1: it has none.
struct Layout {
  int bits;
  int offset;                      // value = byte - offset
  int file_d, file_m;              // halves in the file's block
  int unit_planes, planes_stride;  // the unit's first plane, and the distance to the next block's
  bool two_level;                  // Q4_K Q5_K
};

inline Layout layout(DType t) {
  switch (t) {
    case DType::Q8_0:
      return {8, 128, 0, -1, 64, 0, false};
    case DType::Q4_0:
      return {4, 8, 0, -1, 64, 0, false};
    case DType::Q4_1:
      return {4, 0, 0, 2, 128, 0, false};
    case DType::Q5_0:
      return {5, 16, 0, -1, 64, 0, false};
    case DType::Q5_1:
      return {5, 0, 0, 2, 128, 0, false};
    case DType::Q4_K:
      return {4, 0, 0, 2, 512, 512, true};
    case DType::Q5_K:
      return {5, 0, 0, 2, 512, 640, true};
    case DType::Q6_K:
      return {6, 32, offsetof(BlockQ6_K, d), -1, 128, 576, false};
    default:
      fail("not a quantised type");
  }
}

inline uint32_t load32(const void* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}
inline uint16_t load16(const void* p) {
  uint16_t x;
  std::memcpy(&x, p, 2);
  return x;
}
inline void store16(void* p, uint16_t x) { std::memcpy(p, &x, 2); }

constexpr uint32_t kOnes = 0x01010101u, kLow = 0x0f0f0f0fu, kPairs = 0x03030303u;

// Four bits to the lowest bits of four bytes.
inline uint32_t spread4(uint32_t x) { return ((x & 15) * 0x00204081u) & kOnes; }

// Four words of each of four rows: to[word][row].
template <int R>
void transpose4(const uint8_t* p, size_t stride, int row, uint32_t (*to)[R]) {
#if defined(GEMMA_SSE2)
  __m128i x[4];
  for (int r = 0; r < 4; ++r) x[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + r * stride));
  const __m128i a = _mm_unpacklo_epi32(x[0], x[1]), b = _mm_unpackhi_epi32(x[0], x[1]);
  const __m128i c = _mm_unpacklo_epi32(x[2], x[3]), d = _mm_unpackhi_epi32(x[2], x[3]);
  const __m128i y[4] = {_mm_unpacklo_epi64(a, c), _mm_unpackhi_epi64(a, c), _mm_unpacklo_epi64(b, d),
                        _mm_unpackhi_epi64(b, d)};
  for (int i = 0; i < 4; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to[i] + row), y[i]);
#else
  for (int r = 0; r < 4; ++r)
    for (int i = 0; i < 4; ++i) to[i][row + r] = load32(p + r * stride + 4 * i);
#endif
}

// The 32 values of block j (of the file block's 1 or 8) of R rows, four a word, as unsigned bytes: w[word][row], so that compilers
// make vectors of rows. Rows from `rows` on become zeros in the file's form.
template <DType T, int R>
void read_blocks(const uint8_t* p, size_t stride, int rows, int j, uint32_t (*w)[R]) {
  constexpr int block = kEncodings[static_cast<int>(T)].block_bytes;
  // As many words as `to` takes, from byte `at` of the blocks on.
  const auto read = [&](int at, auto& to) {
    constexpr int n = sizeof(to) / sizeof(to[0]);
    int r = 0;
    if constexpr (n % 4 == 0 && R >= 4)
      for (; r + 4 <= rows; r += 4)
        for (int i = 0; i < n; i += 4) transpose4(p + r * stride + at + 4 * i, stride, r, to + i);
    for (; r < R; ++r)
      for (int i = 0; i < n; ++i) to[i][r] = r < rows ? load32(p + r * stride + at + 4 * i) : 0;
  };
  const auto each = [](int words, auto f) {
    for (int i = 0; i < words; ++i)
      for (int r = 0; r < R; ++r) f(i, r);
  };
  uint32_t x[8][R], high[8][R];
  if constexpr (T == DType::Q8_0) {
    read(2, x);
    each(8, [&](int i, int r) { w[i][r] = x[i][r] ^ 0x80808080u; });
  } else if constexpr (T == DType::Q4_K || T == DType::Q5_K) {
    read(block - 128 + 32 * (j / 2), x);
    each(8, [&](int i, int r) { w[i][r] = x[i][r] >> 4 * (j % 2) & kLow; });
    if constexpr (T == DType::Q5_K) {
      read(block - 160, high);
      each(8, [&](int i, int r) { w[i][r] |= (high[i][r] >> j & kOnes) << 4; });
    }
  } else if constexpr (T == DType::Q6_K) {
    const int s = j % 4;
    read(64 * (j / 4) + 32 * (j % 2), x);
    read(offsetof(BlockQ6_K, qh) + 32 * (j / 4), high);
    each(8, [&](int i, int r) { w[i][r] = (x[i][r] >> 4 * (s / 2) & kLow) | (high[i][r] >> 2 * s & kPairs) << 4; });
  } else {
    uint32_t q[4][R], h[1][R];
    read(block - 16, q);
    each(4, [&](int i, int r) {
      w[i][r] = q[i][r] & kLow;
      w[i + 4][r] = q[i][r] >> 4 & kLow;
    });
    if constexpr (T == DType::Q5_0 || T == DType::Q5_1) {
      read(block - 20, h);
      each(8, [&](int i, int r) { w[i][r] |= spread4(h[0][r] >> 4 * i) << 4; });
    }
  }
}

// read_blocks, for with_type.
template <int R>
struct ReadValues {
  const uint8_t* p;
  size_t stride;
  int rows, j;
  uint32_t (*w)[R];
  template <DType T>
  void run() const {
    if constexpr (T != DType::BF16) read_blocks<T, R>(p, stride, rows, j, w);
  }
};

inline int blocks_of(DType t) { return encoding(t).block / kBlock; }

// Six-bit scale and offset j of a Q4_K or Q5_K block.
inline void read_scale(const uint8_t* s, int j, int* sc, int* mn) {
  if (j < 4) {
    *sc = s[j] & 63;
    *mn = s[j + 4] & 63;
  } else {
    *sc = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
    *mn = s[j + 4] >> 4 | (s[j] >> 6) << 4;
  }
}

// value = d * (byte - offset) + m, with a scale every 16 values; d2 is that of the second half.
struct Scales {
  float d, d2, m;
};

inline void decode_values(const uint32_t* w, int offset, const Scales& s, float* out) {
  for (int i = 0; i < 32; ++i) {
    const int q = static_cast<int>(w[i / 4] >> 8 * (i % 4) & 255) - offset;
    out[i] = (i < 16 ? s.d : s.d2) * static_cast<float>(q) + s.m;
  }
}

}  // namespace gemma
