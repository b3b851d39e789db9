// Many rows of activations times quantised weights by AMX, where a block has one scale on either side: its instruction multiplies a block of
// 16 rows by one of 16 rows in a quarter of the time that dot products of vectors take. Integer sums are exact and all else is as elsewhere, so
// the results are those of ManyRows. Part of tiles-inl.h.
//
// What is left to vectors, a conversion, a product of scales and a multiply-add for 16 sums, is most of the time: while tiles are in use
// they have one port instead of two (measured on Emerald Rapids). So a block in two parts, with twice as much of that, gains nothing.
#pragma once

#include "common-inl.h"
#include "encodings-inl.h"

namespace gemma {
namespace GEMMA_ISA {

template <class Q>
struct TileRows : SumsInTile {
  static_assert(kParts<Q, false> == 1 && W == kTile && kGroups == 2);
  alignas(64) uint8_t w[2][8][64];               // a block's halves as signed bytes, [k / 4][row][4]
  alignas(64) int32_t dots[2][2][kTile][kTile];  // of the tile at hand and of the next one, by halves

  // Tiles 0 and 1 take the products of tile 2, of activations, with 4 and 5, of weights.
  GEMMA_INLINE void start(bool add, int rows, float* tile) {
    TileConfig c;
    for (int t : {0, 1}) c.shape(t, kTile, 64);
    c.shape(2, kTile, kBlock);
    for (int t : {4, 5}) c.shape(t, 8, 64);
    tile_configure(c);
    SumsInTile::start(add, rows, tile);
  }
  GEMMA_INLINE void finish(float*) const { tile_release(); }

  template <int G>
  GEMMA_INLINE void unpack(const uint8_t* unit, const uint8_t* low, int j, Block& b) {
    decode<Q, G>(unit, low, j, b);
    for (int i = 0; i < 8; ++i) V::store_i(w[G][i], V::sub8(b.w[i], Q::kOffset));
  }
  GEMMA_INLINE void multiply(const int8_t* q, int to) {
    tile_load<2>(q, kBlock);
    tile_zero<0>();
    tile_dot_int8<0, 2, 4>();
    tile_store<0>(dots[to][0], 64);
    tile_zero<1>();
    tile_dot_int8<1, 2, 5>();
    tile_store<1>(dots[to][1], 64);
  }
  GEMMA_INLINE void step(const uint8_t* unit, const uint8_t* low, int j, const int8_t* q, const ActScale* s, int rows,
                         float* tile) {
    Block b[2];
    unpack<0>(unit, low, j, b[0]);
    unpack<1>(unit, low, j, b[1]);
    tile_load<4>(w[0], 64);
    tile_load<5>(w[1], 64);
    // The last tile ends with the rows, some of which the one before may have done.
    const auto first = [&](int i) { return min_of(i, rows - kTile); };
    multiply(q, 0);
    for (int i = 0, at = 0; i < rows; i += kTile, at ^= 1) {
      const int from = first(i), later = first(i + kTile);
      if (later > from) multiply(q + later * kBlock, at ^ 1);
      for (int r = i - from; r < kTile; ++r) {
        float* t = tile + (from + r) * kPanel;
        const F x = part_add<Q, false>(b[0], 0, V::load_i(dots[at][0][r]), s[from + r], V::load(t));
        const F y = part_add<Q, false>(b[1], 0, V::load_i(dots[at][1][r]), s[from + r], V::load(t + W));
        V::store(t, x);
        V::store(t + W, y);
      }
    }
  }
};

// The kernel for what tiles do not do.
inline decltype(Kernels::panel) other_panel = nullptr;

// See kernels.h.
void panel(DType type, const TiledPanel& data, int64_t first, int64_t count, const QuantActs& a, bool add,
           const TiledPanel& next, float* tile) {
  if (a.rows < kTile || a.fine || type == DType::Q6_K) return other_panel(type, data, first, count, a, add, next, tile);
  const Run run{data, first, count, add, next};
  with_decoder(type, [&](auto decoder) {
    if constexpr (decltype(decoder)::kSubs == 1) walk<decltype(decoder), TileRows<decltype(decoder)>>(run, a, tile);
  });
}

}  // namespace GEMMA_ISA
}  // namespace gemma
