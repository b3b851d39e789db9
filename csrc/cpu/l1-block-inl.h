// Many rows of activations times quantised weights with AVX2 alone, where no instruction adds up four products of bytes. Part of
// products-inl.h; integer sums are exact, so the results are those of ManyRows.
//
// A block of all 32 weight rows lies in L1, from where it is an operand of the multiplications, and an activation is broadcast once
// for its four vectors. Weights of 4 to 6 bits are multiplied as bytes and added up in 16 bits: the instruction wants a side without
// a sign, which activations get by adding 128. Weights of 8 bits do not fit that and go as 16-bit values, those at even places of K
// before those at odd ones.
#pragma once

namespace gemma {
namespace GEMMA_ISA {

template <class Vec, class Q, bool FINE>
struct L1Block : SumsInTile {
  static constexpr bool kWide = Q::kBits == 8;
  static constexpr int kHalves = kWide ? 2 : 1, kParts = GEMMA_ISA::kParts<Q, FINE>, kSteps = 8 / kParts;
  // A 16-bit lane adds two products a step. Weights from -kOffset to kOffset - 1 make sums of either sign; those of others are positive,
  // and start at -32768 where they need the room.
  static constexpr int kMost = Q::kOffset ? Q::kOffset : (1 << Q::kBits) - 1;
  static constexpr int kFit = kWide ? kSteps : (Q::kOffset ? 32767 : 65535) / (2 * 255 * kMost);
  static constexpr int kChain = kFit < kSteps ? kFit : kSteps;
  static_assert(kSteps % kChain == 0, "whole chains");
  static constexpr int kStart = 2 * 255 * kMost * kChain > 32767 ? -32768 : 0;
  // From as many rows on it is quicker than ManyRows; with positive sums only where one chain covers the block.
  static constexpr int kFrom = kWide ? 24 : Q::kOffset ? 8 : kChain == 8 ? 16 : kActChunk + 1;

  B w[kHalves][8][kGroups], q[kActChunk][kHalves];
  I shift[kParts][kGroups];  // undoes the 128 and kStart
  F scale[kParts][kGroups], min[kGroups];

  template <int G>
  GEMMA_INLINE void decode(const uint8_t* unit, const uint8_t* low, int j) {
    if constexpr (G > 0) decode<G - 1>(unit, low, j);
    Block b;
    GEMMA_ISA::decode<Q, G>(unit, low, j, b);
    for (int i = 0; i < 8; ++i) {
      const B x = Vec::sub8(b.w[i], Q::kOffset);
      w[0][i][G] = kWide ? Vec::even16(x) : x;
      if (kWide) w[kHalves - 1][i][G] = Vec::odd16(x);
    }
    for (int p = 0; p < kParts; ++p) {
      scale[p][G] = b.scale[Q::kSubs == 2 ? p : 0];
      if (kWide) continue;
      B sum = b.w[p * kSteps];
      for (int i = 1; i < kSteps; ++i) sum = Vec::add8(sum, b.w[p * kSteps + i]);  // at most 255
      constexpr int kUndone = 128 * 4 * kSteps * Q::kOffset - 2 * kStart * (kSteps / kChain);
      shift[p][G] = V::add_i(Vec::template sum4<-128>(sum), V::set_i(kUndone));
    }
    if (Q::kMin) min[G] = b.min;
  }

  // sum = part p of the block times a row of activations
  GEMMA_INLINE void dot_words(int p, const int8_t* a, I* sum) const {
    GEMMA_UNROLL(2)
    for (int half = 0; half < kHalves; ++half) {
      GEMMA_UNROLL(8)
      for (int i = 0; i < kSteps; ++i) {
        const int at = p * kSteps + i;
        const B x = Vec::bytes4(a + half * kBlock + 4 * at);
        GEMMA_UNROLL(4)
        for (int g = 0; g < kGroups; ++g) {
          const I y = Vec::dot_words(x, w[half][at][g]);
          sum[g] = half == 0 && i == 0 ? y : Vec::in_order(V::add_i(sum[g], y));
        }
      }
    }
  }
  GEMMA_INLINE void dot_bytes(int p, const int8_t* a, I* sum) const {
    for (int first = 0; first < kSteps; first += kChain) {
      I h[kGroups];
      for (int i = 0; i < kChain; ++i) {
        const int at = p * kSteps + first + i;
        const B x = Vec::bytes4(a + 4 * at);
        for (int g = 0; g < kGroups; ++g) {
          const I y = Vec::dot_bytes(x, w[0][at][g]);
          if (i == 0)
            h[g] = kStart ? Vec::in_order(Vec::add16(y, Vec::set16(kStart))) : y;
          else
            h[g] = Vec::in_order(Vec::add16(h[g], y));
        }
      }
      for (int g = 0; g < kGroups; ++g) sum[g] = V::add_i(Vec::join16(h[g]), first == 0 ? shift[p][g] : sum[g]);
    }
  }

  GEMMA_INLINE void row(const B* acts, const ActScale& s, float* tile) const {
    const int8_t* a = reinterpret_cast<const int8_t*>(acts);
    F acc[kGroups];
    for (int g = 0; g < kGroups; ++g) acc[g] = V::load(tile + g * W);
    for (int p = 0; p < kParts; ++p) {
      I sum[kGroups];
      kWide ? dot_words(p, a, sum) : dot_bytes(p, a, sum);
      for (int g = 0; g < kGroups; ++g)
        acc[g] = V::fma(V::to_float(sum[g]), V::mul(scale[p][g], V::set(s.d[p])), acc[g]);
    }
    for (int g = 0; g < kGroups; ++g) {
      if (Q::kMin) acc[g] = V::fma(min[g], V::set(s.dsum), acc[g]);
      V::store(tile + g * W, acc[g]);
    }
  }

  void step(const uint8_t* unit, const uint8_t* low, int j, const int8_t* acts, const ActScale* s, int rows,
            float* tile) {
    decode<kGroups - 1>(unit, low, j);
    for (int i = 0; i < rows; ++i) {
      const B x = V::load_b(reinterpret_cast<const uint8_t*>(acts + i * kBlock));
      q[i][0] = kWide ? Vec::even16(x) : Vec::sub8(x, -128);
      if (kWide) q[i][kHalves - 1] = Vec::odd16(x);
    }
    for (int i = 0; i < rows; ++i) row(q[i], s[i], tile + i * kPanel);
  }
};

}  // namespace GEMMA_ISA
}  // namespace gemma
