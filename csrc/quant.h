// Weight encodings: what a file's blocks mean, and how they are re-laid ("tiled") for the kernels.
//
// A tiled matrix is a sequence of panels of 32 weight rows (the last one padded with rows of zeros). A panel walks K
// in units of 32 (Q8_0 Q4_0 Q4_1 Q5_0 Q5_1) or 256 (Q4_K Q5_K Q6_K), so that a SIMD lane owns a weight row and one
// sequential read (two for Q8_0 and Q6_K) feeds 32 rows. Values are re-laid, never re-quantised: untiling gives the file's bytes back.
//
// Planes of one block of 32 along K, r = row within 16, h = row / 16, k = 4 * k4 + kk:
//   4-bit   [8 k4][16 r][4 kk]              low nibble: row r, high nibble: row r + 16              512 bytes
//   1-bit   [2 h][16 r][4 kk]               bit k4 = bit 4 of that value                            128 bytes
//   2-bit   [2 g][2 h][16 r][4 kk]          bits 2i, 2i+1 = the value of k4 = 4 g + i               256 bytes
// Units (fp16 arrays have one entry a row of the panel):
//   Q8_0    d[32], 4-bit of (q + 128) >> 4; the low bits, 4-bit of (q + 128) & 15, follow the last panel's units, in the same
//           order: choosing the best of a vocabulary reads little more than the high ones, and those in one go
//                                           Q4_0    d[32], 4-bit             Q4_1    d[32], m[32], 4-bit
//   Q5_0    d[32], 1-bit, 4-bit             Q5_1    d[32], m[32], 1-bit, 4-bit
//   Q4_K    d[32], dmin[32], uint32 hi[32], uint8 lo[8][32], then 8 x { 4-bit }
//   Q5_K    the same header, then 8 x { 1-bit, 4-bit }
//             sc_j = (lo[j] & 15) | (hi >> 4j & 3) << 4      min_j = lo[j] >> 4 | (hi >> (4j + 2) & 3) << 4
//   Q6_K    d[32], then 8 x { int8 sc[2 halves of 16 along K][32], 4-bit of (q + 32) >> 2 }; the low bits, 8 x { 2-bit of (q + 32) & 3 },
//           follow the last panel's units as with Q8_0
// Every plane starts at a multiple of 64 bytes from the matrix's start, and no unit is larger than the file's blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tensor.h"

namespace gemma {

constexpr int kPanel = 32;  // weight rows a panel
constexpr int kBlock = 32;  // K values that share one activation scale

struct Encoding {
  const char* name;
  int block;        // values a file block
  int block_bytes;  // bytes a file block
  int unit_bytes;   // bytes a unit of a panel: 32 rows x block values
  int low_bytes;    // of these, how many are low bits, which stand behind all units
  bool quantized;
};

const Encoding& encoding(DType type);

// Calls f.run<T>() with a quantised type, or else BF16, as T.
template <class F>
void with_type(DType t, F&& f) {
  switch (t) {
    case DType::Q8_0:
      return f.template run<DType::Q8_0>();
    case DType::Q4_0:
      return f.template run<DType::Q4_0>();
    case DType::Q4_1:
      return f.template run<DType::Q4_1>();
    case DType::Q5_0:
      return f.template run<DType::Q5_0>();
    case DType::Q5_1:
      return f.template run<DType::Q5_1>();
    case DType::Q4_K:
      return f.template run<DType::Q4_K>();
    case DType::Q5_K:
      return f.template run<DType::Q5_K>();
    case DType::Q6_K:
      return f.template run<DType::Q6_K>();
    default:
      return f.template run<DType::BF16>();
  }
}

// Bytes of one row of k values as files store it, the last block whole.
size_t row_bytes(DType type, int64_t k);
// Bytes of a tiled matrix; rows are padded to 32 and k to the block.
size_t tiled_bytes(DType type, int64_t rows, int64_t k);
// Where a panel's units and its low bits begin, in bytes from the matrix's start.
struct PanelAt {
  size_t units, low;
};
PanelAt panel_at(DType type, int64_t rows, int64_t k, int64_t panel);

float half_to_float(uint16_t h);
uint16_t float_to_half(float f);  // round to nearest even
// Round to nearest even, NaN kept. Static: files of different instruction sets share no function.
static inline uint16_t float_to_bf16(float f) {
  uint32_t x;
  std::memcpy(&x, &f, sizeof(x));
  const uint32_t nan = x >> 16 | 0x40, rounded = (x + 0x7fff + (x >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((x & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}
float bf16_to_float(uint16_t b);

// One row of a file (F32, F16, BF16 or blocks) to float32.
void decode_row(DType type, const uint8_t* row, int64_t k, float* out);
// Scales for a block of 32 values as Q4_0, around the one that makes `top`, the value farthest from zero, -8: d[s] = top / kQ4Steps.at[s] in
// half precision; and error[s], the squared error of the block with it. Most of the time of encoding goes here: kernels.h has the
// same in vectors.
constexpr int kQ4Scales = 17;
struct Q4Steps {
  float at[kQ4Scales] = {};
  constexpr Q4Steps() {
    for (int s = 0; s < kQ4Scales; ++s) at[s] = -8 + 0.1f * static_cast<float>(s - kQ4Scales / 2);
  }
};
inline constexpr Q4Steps kQ4Steps;
using Q4Errors = void (*)(const float* v, float top, float* d, float* error);
void q4_errors(const float* v, float top, float* d, float* error);
// float32 to file blocks; type is Q8_0 or Q4_0. k may be any positive number: the last block is padded with zeros.
void encode_row(DType type, const float* x, int64_t k, uint8_t* row, Q4Errors errors = q4_errors);

// A matrix as the loaders of the backends take it. Throws InputError for panels of another type than `target`, and for rows that are no
// whole number of blocks, but for panels with blocks of 32.
void check_convertible(const HostTensor& source, DType target);
// Row r of `source`, whatever its type, as a file's row of `target` (BF16, Q8_0 or Q4_0). values: cols floats of scratch. Throws
// InputError naming tensor and row.
void convert_row(const HostTensor& source, int64_t r, DType target, float* values, uint8_t* out,
                 Q4Errors errors = q4_errors);

// One panel of a tiled matrix [rows, k] from its rows as the file has them, row_stride bytes apart.
void tile_panel(DType type, const uint8_t* src, size_t row_stride, int64_t rows, int64_t k, int64_t panel,
                uint8_t* matrix);
// Row r of a tiled matrix back to the file's blocks.
void untile_row(DType type, const uint8_t* matrix, int64_t rows, int64_t k, int64_t r, uint8_t* row);
// Row r of a tiled matrix to float32 (the embedding's look-up).
void decode_tiled_row(DType type, const uint8_t* matrix, int64_t rows, int64_t k, int64_t r, float* out);

}  // namespace gemma
