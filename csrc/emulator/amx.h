// The tile instructions of cpu/amx.h made of plain C++, so that kernels written in them can be tested on CPUs without them. Denormal numbers
// count here, where the instructions take them for zero. Shapes that do not fit end the process as they would there; what tiles hold when
// they are configured is left alone, where the instruction clears them.
#pragma once

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
template <int SUM, int A, int B>
void tile_dot_bf16() {
  const TileConfig& c = tiles_of_thread.config;
  check_shapes(c, SUM, A, B);
  const auto value = [](const uint8_t* p, int i) {
    uint16_t upper;
    std::memcpy(&upper, p + 2 * i, sizeof(upper));
    const uint32_t bits = static_cast<uint32_t>(upper) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  };
  float b[2][16][16];  // by places, even and odd
  for (int k = 0; k < c.rows[B]; ++k)
    for (int i = 0; i < 32; ++i) b[i % 2][k][i / 2] = value(tiles_of_thread.tile[B][k], i);
  for (int m = 0; m < c.rows[SUM]; ++m) {
    float part[2][16] = {}, sum[16];
    for (int k = 0; k < c.rows[B]; ++k)
      for (int place = 0; place < 2; ++place) {
        const float a = value(tiles_of_thread.tile[A][m], 2 * k + place);
        for (int n = 0; n < 16; ++n) part[place][n] += a * b[place][k][n];  // products of bf16 are exact in float32
      }
    std::memcpy(sum, tiles_of_thread.tile[SUM][m], sizeof(sum));
    for (int n = 0; n < 16; ++n) sum[n] += part[0][n] + part[1][n];
    std::memcpy(tiles_of_thread.tile[SUM][m], sum, sizeof(sum));
  }
}
template <int SUM, int A, int B>
void tile_dot_int8() {
  const TileConfig& c = tiles_of_thread.config;
  check_shapes(c, SUM, A, B);
  for (int m = 0; m < c.rows[SUM]; ++m) {
    int32_t sum[16];
    std::memcpy(sum, tiles_of_thread.tile[SUM][m], sizeof(sum));
    for (int k = 0; k < c.rows[B]; ++k)
      for (int i = 0; i < 64; ++i)
        sum[i / 4] += static_cast<int8_t>(tiles_of_thread.tile[A][m][4 * k + i % 4]) *
                      static_cast<int8_t>(tiles_of_thread.tile[B][k][i]);
    std::memcpy(tiles_of_thread.tile[SUM][m], sum, sizeof(sum));
  }
}

}  // namespace GEMMA_ISA
}  // namespace gemma
