// What the kernels of products of few rows, onerow.cu, matvec.cu and matmany.cu, have in common: groups of rows of W, the chunks of a group, and
// what becomes of results.
#pragma once

#include "fragments.h"
#include "kernels.h"

namespace gemma::gpu {

// A group is 16 rows of W; geglu: 8 of gate and the same 8 of up. Lanes have fragment rows lane / 4 and lane / 4 + 8. Past the end the last row
// is computed again, and dropped.
GEMMA_HOST_DEVICE int rows_a_group(const MatvecArgs& a) { return a.after == After::geglu ? 8 : 16; }
GEMMA_HOST_DEVICE int total_rows(const MatvecArgs& a) {
  int64_t total = 0;
  for (int p = 0; p < (a.after == After::geglu ? 1 : a.count); ++p) total += a.parts[p].w.rows;
  return static_cast<int>(total);
}
GEMMA_HOST_DEVICE int groups_of(const MatvecArgs& a) { return (total_rows(a) + rows_a_group(a) - 1) / rows_a_group(a); }
// Every group lies in the same matrices.
GEMMA_HOST_DEVICE bool plain(const MatvecArgs& a) { return a.count == 1 || a.after == After::geglu; }
GEMMA_HOST_DEVICE constexpr int chunks_of(DType t, int cols) { return (cols + chunk_values(t) - 1) / chunk_values(t); }
// Four chunks of two rows fit in a lane's registers; of other types three.
GEMMA_HOST_DEVICE constexpr bool small_chunk(DType t) {
  return t == DType::BF16 || t == DType::Q4_0 || t == DType::Q5_0;
}
GEMMA_DEVICE int part_of(const MatvecArgs& a, int& row) {
  int part = 0;
  while (part + 1 < a.count && row >= a.parts[part].w.rows) row -= static_cast<int>(a.parts[part++].w.rows);
  return part;
}
// The place of lane q of a four in fragment row lane / 4 + 8 i of a group.
template <DType T>
GEMMA_DEVICE RowAt locate_row(const MatvecArgs& a, int total, int group, int i, int q) {
  const bool geglu = a.after == After::geglu;
  int row = group * rows_a_group(a) + lane() / 4 + (geglu ? 0 : 8 * i);
  row = row < total ? row : total - 1;
  const int part = geglu ? i : part_of(a, row);
  return row_at<T>(a.parts[part].w, row, q);
}
// The place `rows` rows of the same matrix further on.
template <DType T>
GEMMA_DEVICE RowAt further(RowAt r, int rows, int pieces) {
  const int64_t by = static_cast<int64_t>(rows) * pieces;
  r.low += by * 16;
  if constexpr (T == DType::Q8_0) r.more += by * 16;
  if constexpr (high_bytes(T) > 0) r.high += by * high_bytes(T);
  if constexpr (T != DType::BF16) r.scales += by * (T == DType::Q4_1 || T == DType::Q5_1 ? 4 : 2);
  if constexpr (T == DType::Q6_K) r.super += by / 4;
  return r;
}
template <DType T>
GEMMA_DEVICE void locate(const MatvecArgs& a, int total, int group, RowAt* at) {
  GEMMA_UNROLL
  for (int i = 0; i < 2; ++i) at[i] = locate_row<T>(a, total, group, i, lane() % 4);
}

GEMMA_HOST_DEVICE constexpr int pieces_of_32(DType t) { return t == DType::BF16 ? 2 : 4; }  // a chunk

// acc[j] += chunk c of 16 rows of W times columns 8 j to 8 j + 7 of x. units(b, half, j): the lane's values of x beside 16 of a chunk,
// sums(b, j, i): the sum of 32 of them in column 8 j + 2 q + i.
template <DType T, int G, class Units, class Sums>
GEMMA_DEVICE void multiply_chunk(const Chunk<T>* w, int c, Units units, Sums sums, float (*acc)[4]) {
  GEMMA_UNROLL
  for (int b = 0; b < pieces_of_32(T); ++b) {
    float sum[G][4];  // of quantised weights, before their scales
    Scales s[2];
    if constexpr (T != DType::BF16) {
      s[0] = chunk_scales<T>(w[0], c, b);
      s[1] = chunk_scales<T>(w[1], c, b);
    }
    auto close = [&](float upper, float lower) {
      GEMMA_UNROLL
      for (int j = 0; j < G; ++j) {
        GEMMA_UNROLL
        for (int i = 0; i < 4; ++i) {
          acc[j][i] = multiply_add(i < 2 ? upper : lower, sum[j][i], acc[j][i]);
        }
      }
    };
    GEMMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint32_t upper[2], lower[2];
      fragment<T>(w[0], b, half, upper);
      fragment<T>(w[1], b, half, lower);
      const uint32_t fw[4] = {upper[0], lower[0], upper[1], lower[1]};
      GEMMA_UNROLL
      for (int j = 0; j < G; ++j) {
        const Word2 fx = units(b, half, j);
        const uint32_t pair[2] = {fx.x, fx.y};
        if constexpr (T == DType::BF16)
          mma(acc[j], fw, pair);
        else if (half == 0 || T == DType::Q6_K)
          mma_new(sum[j], fw, pair);
        else
          mma(sum[j], fw, pair);
      }
      if constexpr (T == DType::Q6_K) close(half ? s[0].second : s[0].scale, half ? s[1].second : s[1].scale);
    }
    if constexpr (T != DType::BF16 && T != DType::Q6_K) close(s[0].scale, s[1].scale);
    if constexpr (has_minimum(T)) {
      GEMMA_UNROLL
      for (int j = 0; j < G; ++j) {
        GEMMA_UNROLL
        for (int i = 0; i < 2; ++i) {
          const float of_x = sums(b, j, i);
          acc[j][i] = multiply_add(s[0].minimum, of_x, acc[j][i]);
          acc[j][i + 2] = multiply_add(s[1].minimum, of_x, acc[j][i + 2]);
        }
      }
    }
  }
}

// A result, and what becomes of it; `row` counts over the parts.
GEMMA_DEVICE void put(const MatvecArgs& a, int row, int n, float v) {
  const int part = a.after == After::geglu ? 0 : part_of(a, row);
  float* out = a.parts[part].out + n * a.parts[part].stride + row;
  *out = a.after == After::add ? *out + v : v;
}

// What the warps have of a row of W and a column of x, in shared memory [warps][rows][columns]: the warps in order.
GEMMA_DEVICE float warps_sum(const float* sums, int rows, int columns, int row, int column) {
  float s = 0;
  GEMMA_UNROLL
  for (int w = 0; w < kMatvecWarps; ++w) s += sums[(w * rows + row) * columns + column];
  return s;
}

static_assert(kParts == 3, "the sum of the parts of a row of x");
GEMMA_DEVICE float parts_sum(float first, float second, float third) { return first + second + (third + 0.0f); }

// Of more weights than this, blocks that begin together read faster: then they pass through the same stretch of W, and few addresses want
// translating at a time. On an H200, gate and up of the 2B shape in bf16 (134 MB) took 38 us so, and 57 to 62 where blocks began as those
// of the kernel before ended.
constexpr int64_t kApart = 48 << 20;
inline int64_t weight_bytes(const MatvecArgs& a) {
  int64_t bytes = 0;
  for (int p = 0; p < a.count; ++p) bytes += a.parts[p].w.rows * a.parts[p].w.pieces * (a.parts[p].w.more ? 32 : 16);
  return bytes;
}

// ---- onerow.cu -------------------------------------------------------------------------------------------------------------

// One row of x. False: it does not fit into a block's shared memory.
bool one_row(Device& d, DType type, const MatvecArgs& a);

// ---- matmany.cu ------------------------------------------------------------------------------------------------------------

// More rows of x than a block of `matvec` takes, up to 64, whose parts are in x: columns a multiple of 4, garbage behind the last. `sums`:
// `room` bytes, of which matmany_scratch_bytes(rows) are enough to share out the work on so many rows of W best.
size_t matmany_scratch_bytes(int64_t rows);
void matmany(Device& d, DType type, const MatvecArgs& a, const Split& x, uint8_t* sums, size_t room);

}  // namespace gemma::gpu
