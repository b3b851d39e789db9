// Products of bf16 weights by AMX, whose instruction multiplies 16 rows of activations by 16 rows of weights over 32 values along K. Its
// order of sums (amx.h) is that of a row whatever else lies in the tile, so one row of activations gets the bits of many. Part of tiles-inl.h.
//
// Weights have to be in pairs along K of 16 rows, which files do not have: each block is transposed on its way, at a speed that memory does
// not reach. Nothing is asked for ahead: on Emerald Rapids every such request was slower than what hardware does by itself.
#pragma once

#include <cstring>

#include "common-inl.h"
#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

constexpr int64_t kTileBytes = 1024;                      // of weights: [pair along K][row][2]
constexpr int64_t kPanelBytes = 2 * kTileBytes;           // of a panel over kBlock values
constexpr int kPlaces = 4;                                // that blocks of kTile rows of weights take in turn
constexpr int64_t kRowBytes = kBlock * sizeof(uint16_t);  // of activations over as many
constexpr int64_t kSumStride = kPanel * sizeof(float);
static_assert(kBf16Rows == kPanel && kPanel == 2 * kTile, "two tiles of weights");

int64_t tile_bytes(int64_t k) { return (k + kBlock - 1) / kBlock * kRowBytes; }
int64_t tile_room(int64_t count) { return max_of<int64_t>(kPlaces, (count + kBlock - 1) / kBlock) * kPanelBytes; }

// Activations lie as [kTile rows][block along K][row][kBlock].
void tile_pack(const float* x, int64_t ldx, int n, int64_t at, int64_t count, int64_t k, void* out, int64_t row,
               int64_t rows) {
  for (const int64_t end = row + n; row < end; ++row, x += ldx) {
    const int64_t first = row / kTile * kTile, width = min_of<int64_t>(rows - first, kTile);
    uint8_t* o = static_cast<uint8_t*>(out) + first * tile_bytes(k) + (at / kBlock * width + row - first) * kRowBytes;
    for (int64_t i = 0; i < count; i += kBlock, o += width * kRowBytes) {
      float rest[kBlock] = {};  // the last block, padded with zeros
      for (int64_t j = 0; i + kBlock > count && i + j < count; ++j) rest[j] = x[i + j];
      V::pack32(i + kBlock > count ? rest : x + i, o);
    }
  }
}

// A block of kTile rows of weights, `ld` values apart, pair by pair. Four loads of four rows each make four pairs of sixteen rows.
GEMMA_INLINE void unpack_rows(const uint16_t* w, int64_t ld, uint8_t* out) {
  for (int i = 0; i < 4; ++i, w += 8, out += 4 * 64) {
    F x[4];
    for (int q = 0; q < 4; ++q) {
      const uint16_t* r = w + q * ld;
      x[q] = V::as_float(V::quarters(r, r + 4 * ld, r + 8 * ld, r + 12 * ld));
    }
    V::transpose4(x);
    for (int q = 0; q < 4; ++q) V::store(reinterpret_cast<float*>(out + 64 * q), x[q]);
  }
}

// Up to kPanel weight rows as they lie in a file.
struct FileRows {
  const uint16_t* w;
  int64_t ldw, k;
  int rows;

  // The block that begins at value `at`, or one half of it. What the rows do not have is zeros.
  GEMMA_INLINE void unpack_half(int half, int64_t at, uint8_t* out) const {
    if (at + kBlock <= k && rows == kPanel) return unpack_rows(w + half * kTile * ldw + at, ldw, out);
    uint16_t block[kTile][kBlock] = {};
    for (int r = 0; r < kTile && half * kTile + r < rows; ++r)
      std::memcpy(block[r], w + (half * kTile + r) * ldw + at, min_of<int64_t>(kBlock, k - at) * sizeof(uint16_t));
    unpack_rows(block[0], kBlock, out);
  }
  void unpack(int64_t at, uint8_t* out) const {
    unpack_half(0, at, out);
    unpack_half(1, at, out + kTileBytes);
  }
};

// Tiles 0 and 1 have the sums of one tile of activations times either half of a panel, 2 and 3 those of another; 4 and 5 take
// activations, 6 and 7 weights.
inline void configure(int rows) {
  TileConfig c;
  for (int t : {0, 1, 4}) c.shape(t, min_of(rows, kTile), 64);
  for (int t : {2, 3, 5}) c.shape(t, rows > kTile ? rows - kTile : kTile, 64);
  for (int t : {6, 7}) c.shape(t, kTile, 64);
  tile_configure(c);
}

template <int T>
GEMMA_INLINE void load_sum(bool add, const float* sum) {
  add ? tile_load<T>(sum, kSumStride) : tile_zero<T>();
}

// Rows of activations from one block along K on: up to two tiles.
struct TileActs {
  const uint8_t* tile[2];
  int rows;
  int64_t step(int i) const { return min_of(rows - i * kTile, kTile) * kRowBytes; }
};

// sums[row][kPanel] (+)= up to two tiles of activations times `count` blocks, each unpacked while the one before is multiplied. One half
// of the panel after the other, since hardware prefetch follows 16 rows at a time better than 32.
inline void few_products(const FileRows& w, int64_t at, int64_t count, const TileActs& x, uint8_t* scratch,
                         float* sums) {
  const auto place = [&](int64_t i) { return scratch + i % kPlaces * kTileBytes; };
  const bool both = x.rows > kTile;
  for (int half = 0; half < 2; ++half, sums += kTile) {
    load_sum<0>(at > 0, sums);
    if (both) load_sum<2>(at > 0, sums + kTile * kPanel);
    w.unpack_half(half, at, place(0));
    for (int64_t i = 0; i < count; ++i) {
      if (i + 1 < count) w.unpack_half(half, at + (i + 1) * kBlock, place(i + 1));
      tile_load<6>(place(i), 64);
      tile_load<4>(x.tile[0] + i * x.step(0), kRowBytes);
      tile_dot_bf16<0, 4, 6>();
      if (!both) continue;
      tile_load<5>(x.tile[1] + i * x.step(1), kRowBytes);
      tile_dot_bf16<2, 5, 6>();
    }
    tile_store<0>(sums, kSumStride);
    if (both) tile_store<2>(sums + kTile * kPanel, kSumStride);
  }
}

// The same with blocks that are unpacked already.
template <bool BOTH>
inline void many_products(const uint8_t* w, int64_t count, const TileActs& x, bool add, float* sums) {
  float* const lower = sums + kTile * kPanel;
  load_sum<0>(add, sums);
  load_sum<1>(add, sums + kTile);
  if (BOTH) load_sum<2>(add, lower);
  if (BOTH) load_sum<3>(add, lower + kTile);
  for (int64_t i = 0; i < count; ++i, w += kPanelBytes) {
    tile_load<4>(x.tile[0] + i * x.step(0), kRowBytes);
    tile_load<6>(w, 64);
    tile_dot_bf16<0, 4, 6>();
    tile_load<7>(w + kTileBytes, 64);
    tile_dot_bf16<1, 4, 7>();
    if (!BOTH) continue;
    tile_load<5>(x.tile[1] + i * x.step(1), kRowBytes);
    tile_dot_bf16<2, 5, 6>();
    tile_dot_bf16<3, 5, 7>();
  }
  tile_store<0>(sums, kSumStride);
  tile_store<1>(sums + kTile, kSumStride);
  if (BOTH) tile_store<2>(lower, kSumStride);
  if (BOTH) tile_store<3>(lower + kTile, kSumStride);
}

// See kernels.h.
void tiles(const uint16_t* weights, int64_t ldw, int rows, int64_t k, int64_t at, int64_t values, const void* acts,
           int64_t first, int m, bool unpacked, uint8_t* scratch, float* sums) {
  const FileRows w{weights, ldw, k, rows};
  const int64_t count = (values + kBlock - 1) / kBlock;
  const auto part = [&](int row) {
    TileActs x{{}, min_of(m - row, 2 * kTile)};
    for (int i = 0; i * kTile < x.rows; ++i)
      x.tile[i] =
          static_cast<const uint8_t*>(acts) + (first + row + i * kTile) * tile_bytes(k) + at / kBlock * x.step(i);
    return x;
  };
  if (m <= 2 * kTile && !unpacked) {
    configure(m);
    few_products(w, at, count, part(0), scratch, sums);
  } else {
    for (int64_t i = 0; i < count && !unpacked; ++i) w.unpack(at + i * kBlock, scratch + i * kPanelBytes);
    for (int row = 0; row < m; row += 2 * kTile, sums += 2 * kTile * kPanel) {
      const TileActs x = part(row);
      if (row == 0 || x.rows < 2 * kTile) configure(x.rows);
      x.rows > kTile ? many_products<true>(scratch, count, x, at > 0, sums)
                     : many_products<false>(scratch, count, x, at > 0, sums);
    }
  }
  tile_release();
}

double tile_peak(int64_t rounds) {
  configure(2 * kTile);
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  alignas(64) const uint8_t zeros[kTileBytes] = {};
  tile_load<4>(zeros, 64);
  tile_load<5>(zeros, 64);
  tile_load<6>(zeros, 64);
  tile_load<7>(zeros, 64);
  for (int64_t i = 0; i < rounds; ++i) {
    tile_dot_bf16<0, 4, 6>();
    tile_dot_bf16<1, 4, 7>();
    tile_dot_bf16<2, 5, 6>();
    tile_dot_bf16<3, 5, 7>();
  }
  tile_release();
  return 4.0 * 2 * kTile * kTile * kBlock * static_cast<double>(rounds);
}

}  // namespace GEMMA_ISA
}  // namespace gemma
