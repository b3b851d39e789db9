// What AMX's tiles are: registers of up to 16 rows of 64 bytes.
#pragma once

#include <cstdint>

namespace gemma {
namespace GEMMA_ISA {

constexpr int kTile = 16;  // rows

struct TileConfig {  // as ldtilecfg reads it
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void shape(int tile, int n, int bytes) {
    rows[tile] = static_cast<uint8_t>(n);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace GEMMA_ISA
}  // namespace gemma
