// The tile instructions of cpu/amx.h made of AVX2, so that kernels written in them can be tested on CPUs without them. Denormal numbers
// count here, where the instructions take them for zero. Shapes that do not fit end the process as they would there; what tiles hold when
// they are configured is left alone, where the instruction clears them.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "../cpu/tile-config.h"

namespace gemma {
namespace GEMMA_ISA {

struct Tiles {
  TileConfig config;
  uint8_t tile[8][16][64];
};
inline thread_local Tiles tiles_of_thread;

inline void tile_configure(const TileConfig& c) { tiles_of_thread.config = c; }
inline void tile_release() { tiles_of_thread.config = {}; }
template <int T>
void tile_zero() {
  std::memset(tiles_of_thread.tile[T], 0, sizeof(tiles_of_thread.tile[T]));
}
template <int T>
void tile_load(const void* p, int64_t stride) {
  tile_zero<T>();
  const TileConfig& c = tiles_of_thread.config;
  for (int r = 0; r < c.rows[T]; ++r)
    std::memcpy(tiles_of_thread.tile[T][r], static_cast<const uint8_t*>(p) + r * stride, c.row_bytes[T]);
}
template <int T>
void tile_store(void* p, int64_t stride) {
  const TileConfig& c = tiles_of_thread.config;
  for (int r = 0; r < c.rows[T]; ++r)
    std::memcpy(static_cast<uint8_t*>(p) + r * stride, tiles_of_thread.tile[T][r], c.row_bytes[T]);
}
inline void check_shapes(const TileConfig& c, int sum, int a, int b) {
  const bool fit = c.rows[sum] > 0 && c.rows[a] == c.rows[sum] && c.row_bytes[a] == 4 * c.rows[b] &&
                   c.row_bytes[b] == c.row_bytes[sum];
  if (!fit) std::abort();
}
inline __m256i load8(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store8(uint8_t* p, __m256i x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
template <int SUM, int A, int B>
void tile_dot_bf16() {
  const TileConfig& c = tiles_of_thread.config;
  check_shapes(c, SUM, A, B);
  const auto values = [](__m256i x, int place) {  // of eight pairs
    return _mm256_castsi256_ps(place == 0 ? _mm256_slli_epi32(x, 16) : _mm256_and_si256(x, _mm256_set1_epi32(-65536)));
  };
  for (int m = 0; m < c.rows[SUM]; ++m)
    for (int half = 0; half < 2; ++half) {  // of the columns
      __m256 part[2] = {};
      for (int k = 0; k < c.rows[B]; ++k) {
        int32_t pair;
        std::memcpy(&pair, tiles_of_thread.tile[A][m] + 4 * k, sizeof(pair));
        const __m256i a = _mm256_set1_epi32(pair), b = load8(tiles_of_thread.tile[B][k] + 32 * half);
        for (int i : {0, 1})  // products of bf16 are exact in float32
          part[i] = _mm256_add_ps(part[i], _mm256_mul_ps(values(a, i), values(b, i)));
      }
      uint8_t* const sum = tiles_of_thread.tile[SUM][m] + 32 * half;
      const __m256 both = _mm256_add_ps(part[0], part[1]);
      store8(sum, _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(load8(sum)), both)));
    }
}
template <int SUM, int A, int B>
void tile_dot_int8() {
  const TileConfig& c = tiles_of_thread.config;
  check_shapes(c, SUM, A, B);
  for (int m = 0; m < c.rows[SUM]; ++m) {
    __m256i pairs[4] = {};  // sums of columns 4 i to 4 i + 3, two for each
    for (int k = 0; k < c.rows[B]; ++k) {
      int32_t four;
      std::memcpy(&four, tiles_of_thread.tile[A][m] + 4 * k, sizeof(four));
      const __m256i a = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
      const auto* b = reinterpret_cast<const __m128i*>(tiles_of_thread.tile[B][k]);
      for (int i = 0; i < 4; ++i)
        pairs[i] = _mm256_add_epi32(pairs[i], _mm256_madd_epi16(a, _mm256_cvtepi8_epi16(_mm_loadu_si128(b + i))));
    }
    int32_t sum[16], pair[16][2];
    std::memcpy(sum, tiles_of_thread.tile[SUM][m], sizeof(sum));
    std::memcpy(pair, pairs, sizeof(pair));
    for (int n = 0; n < 16; ++n) sum[n] += pair[n][0] + pair[n][1];
    std::memcpy(tiles_of_thread.tile[SUM][m], sum, sizeof(sum));
  }
}

}  // namespace GEMMA_ISA
}  // namespace gemma
