// What the kernels of products of few rows, matvec.cu and matmany.cu, have in common: groups of rows of W, and what becomes of results.
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
template <DType T>
GEMMA_DEVICE void locate(const MatvecArgs& a, int total, int group, RowAt* at) {
  GEMMA_UNROLL
  for (int i = 0; i < 2; ++i) at[i] = locate_row<T>(a, total, group, i, lane() % 4);
}

// A result, and what becomes of it; `row` counts over the parts.
GEMMA_DEVICE void put(const MatvecArgs& a, int row, int n, float v) {
  const int part = a.after == After::geglu ? 0 : part_of(a, row);
  float* out = a.parts[part].out + n * a.parts[part].stride + row;
  *out = a.after == After::add ? *out + v : v;
}

// Of more weights than this, blocks that begin together read faster: then they pass through the same stretch of W, and few addresses want
// translating at a time. On an H200, gate and up of the 2B shape in bf16 (134 MB) took 38 us so, and 57 to 62 where blocks began as those
// of the kernel before ended.
constexpr int64_t kApart = 48 << 20;
inline int64_t weight_bytes(const MatvecArgs& a) {
  int64_t bytes = 0;
  for (int p = 0; p < a.count; ++p) bytes += a.parts[p].w.rows * a.parts[p].w.pieces * (a.parts[p].w.more ? 32 : 16);
  return bytes;
}

// ---- matmany.cu ------------------------------------------------------------------------------------------------------------

// More rows of x than a block of `matvec` takes, up to 64, whose parts are in x: columns a multiple of 4, garbage behind the last. `sums`:
// `room` bytes, of which matmany_scratch_bytes(rows) are enough to share out the work on so many rows of W best.
size_t matmany_scratch_bytes(int64_t rows);
void matmany(Device& d, DType type, const MatvecArgs& a, const Split& x, uint8_t* sums, size_t room);

}  // namespace gemma::gpu
