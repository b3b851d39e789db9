// Weight matrices as the GPU reads them, and what their bits mean. Values are those of the file, never quantised again.
//
// A matrix is a few planes, each [rows][pieces]. BF16: a piece is 8 values, 16 bytes; the last one of a row is padded with zeros.
// Others: a piece is 32 values, and four pieces stand together (rows are padded to whole fours with zeros), so that four neighbouring lanes,
// q = 0 to 3, have in 16 bytes each what a fragment of m16n8k16 wants of them. Of a four, with b its pieces:
//   low       [q][b] words: byte i holds the low nibbles of values 4q + i and 4q + i + 16; Q8_0: value 4q + i, + 128
//   more      [q][b] words of Q8_0: byte i is value 4q + i + 16, + 128
//   high      Q5: [q] words: bit 4b + i is bit 4 of value 4q + i, bit 4b + 2 + i of value 4q + i + 16, i = 0, 1; i = 2, 3 16 bits higher
//             Q6_K: [q][b / 2] words: the same with two bits, bits 4 and 5, for each, and b % 2
//   scales    of each piece in turn. Q8_0 Q4_0 Q5_0: half d; Q4_1 Q5_1: halves d, m; Q6_K: int8 of each half of the piece
//             Q4_K Q5_K, for every 8 pieces: the file's 16 bytes: halves d, dmin, eight 6-bit scales and offsets
//   super     Q6_K, for every 8 pieces: half d
// The planes of a tensor together are as large as in its file where rows are multiples of 128 values, as those of all Gemmas are, up to 256
// bytes of alignment a plane.
#pragma once

#include "../quant.h"
#include "device.h"

namespace gemma::gpu {

struct Planes {
  const uint8_t *low = nullptr, *more = nullptr, *high = nullptr, *scales = nullptr, *super = nullptr;
  int64_t rows = 0, pieces = 0;  // pieces a row
};

GEMMA_HOST_DEVICE constexpr int piece_values(DType t) { return t == DType::BF16 ? 8 : 32; }
GEMMA_HOST_DEVICE constexpr int value_offset(DType t) {
  return t == DType::Q8_0 ? 128 : t == DType::Q4_0 ? 8 : t == DType::Q5_0 ? 16 : t == DType::Q6_K ? 32 : 0;
}
GEMMA_HOST_DEVICE constexpr bool has_minimum(DType t) {
  return t == DType::Q4_1 || t == DType::Q5_1 || t == DType::Q4_K || t == DType::Q5_K;
}
GEMMA_HOST_DEVICE constexpr int high_bytes(DType t) {
  return t == DType::Q5_0 || t == DType::Q5_1 || t == DType::Q5_K ? 4 : t == DType::Q6_K ? 8 : 0;
}

// What values are made of: value i = scale * (bits - offset) + minimum, with `second` the scale of values 16 to 31 of a piece.
struct Scales {
  float scale = 1, second = 1, minimum = 0;
};

// Conversions are slow: 2^23 + i has the bits of i, and the difference is exact.
GEMMA_DEVICE float small_float(uint32_t i) { return bits_float(0x4b000000u | i) - 8388608.0f; }

// Of piece j % 8 of the 16 bytes that eight pieces of Q4_K and Q5_K share.
GEMMA_DEVICE Scales k_scales(const Word4& h, int j) {
  const int b = j % 4 * 8;
  const uint32_t first = h.y >> b, second = h.z >> b, third = h.w >> b;
  const uint32_t sc = j < 4 ? first & 63 : (third & 15) | (first >> 6 & 3) << 4;
  const uint32_t mn = j < 4 ? second & 63 : (third >> 4 & 15) | (second >> 6 & 3) << 4;
  Scales s;
  s.scale = s.second = float_of_half(static_cast<uint16_t>(h.x)) * small_float(sc);
  s.minimum = -(float_of_half(static_cast<uint16_t>(h.x >> 16)) * small_float(mn));
  return s;
}
// Of a piece of Q6_K: two int8, and the half that eight pieces share.
GEMMA_DEVICE Scales q6_scales(uint32_t two, float d) {
  Scales s;
  s.scale = d * (small_float((two & 255) ^ 128) - 128);
  s.second = d * (small_float((two >> 8 & 255) ^ 128) - 128);
  return s;
}

// One piece in registers, its values in the order of the file: byte i of `low` holds the low nibbles of values i and i + 16 (Q8_0: value i,
// `more` value i + 16), bit i of `high` bit 4 of value i (Q6_K: bits 2i, 2i + 1).
template <DType T>
struct Piece {
  Word4 low, more;
  Word2 high;
  float scale, second, minimum;
};

// Word b of each of the four lanes of a four.
GEMMA_DEVICE Word4 gather_words(const uint8_t* four, int b) {
  const auto* w = reinterpret_cast<const uint32_t*>(four);
  return {w[b], w[4 + b], w[8 + b], w[12 + b]};
}

template <DType T>
GEMMA_DEVICE Piece<T> load_piece(const Planes& p, int64_t row, int64_t piece) {
  Piece<T> r;
  const int64_t at = row * p.pieces + piece;
  r.scale = r.second = 1;
  r.minimum = 0;
  if constexpr (T == DType::BF16) {
    r.low = load_stream(p.low + at * 16);
    return r;
  }
  const int b = static_cast<int>(piece % 4);
  const int64_t four = at - b;
  r.low = gather_words(p.low + four * 16, b);
  if constexpr (T == DType::Q8_0) r.more = gather_words(p.more + four * 16, b);
  r.high = {0, 0};
  GEMMA_UNROLL
  for (int q = 0; q < 4; ++q) {
    if constexpr (high_bytes(T) == 4) {
      const uint32_t h = *reinterpret_cast<const uint32_t*>(p.high + four * 4 + q * 4) >> 4 * b;
      r.high.x |= (h & 3) << 4 * q | (h >> 16 & 3) << (4 * q + 2);
      r.high.x |= (h >> 2 & 3) << (4 * q + 16) | (h >> 18 & 3) << (4 * q + 18);
    }
    if constexpr (high_bytes(T) == 8) {
      const uint32_t h = *reinterpret_cast<const uint32_t*>(p.high + four * 8 + q * 8 + b / 2 * 4) >> b % 2 * 8;
      r.high.x |= (h & 15) << 8 * q | (h >> 16 & 15) << (8 * q + 4);
      r.high.y |= (h >> 4 & 15) << 8 * q | (h >> 20 & 15) << (8 * q + 4);
    }
  }
  Scales s;
  if constexpr (T == DType::Q8_0 || T == DType::Q4_0 || T == DType::Q5_0)
    s.scale = s.second = float_of_half(*reinterpret_cast<const uint16_t*>(p.scales + at * 2));
  if constexpr (T == DType::Q4_1 || T == DType::Q5_1) {
    const uint32_t dm = *reinterpret_cast<const uint32_t*>(p.scales + at * 4);
    s.scale = s.second = float_of_half(static_cast<uint16_t>(dm));
    s.minimum = float_of_half(static_cast<uint16_t>(dm >> 16));
  }
  const int64_t eight = row * (p.pieces / 8) + piece / 8;
  if constexpr (T == DType::Q4_K || T == DType::Q5_K)
    s = k_scales(*reinterpret_cast<const Word4*>(p.scales + eight * 16), static_cast<int>(piece % 8));
  if constexpr (T == DType::Q6_K)
    s = q6_scales(*reinterpret_cast<const uint16_t*>(p.scales + at * 2),
                  float_of_half(*reinterpret_cast<const uint16_t*>(p.super + eight * 2)));
  r.scale = s.scale;
  r.second = s.second;
  r.minimum = s.minimum;
  return r;
}

// Four bytes to floats, less the offset: 2^23 + byte needs no conversion, and the difference is exact.
template <DType T>
GEMMA_DEVICE void bytes_to_floats(uint32_t w, float* out) {
  constexpr float bias = 8388608.0f + value_offset(T);
  GEMMA_UNROLL
  for (int i = 0; i < 4; ++i) out[i] = bits_float(byte_permute(w, 0x4b000000u, 0x7540u + i)) - bias;
}

// Values 8 part to 8 part + 7 of a piece before scale and minimum; BF16: the values.
template <DType T>
GEMMA_DEVICE void eight_values(const Piece<T>& p, int part, float* out) {
  if constexpr (T == DType::BF16) {
    const uint32_t w[4] = {p.low.x, p.low.y, p.low.z, p.low.w};
    GEMMA_UNROLL
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = bits_float(w[i] << 16);
      out[2 * i + 1] = bits_float(w[i] & 0xffff0000u);
    }
  } else if constexpr (T == DType::Q8_0) {
    const Word4& h = part < 2 ? p.low : p.more;
    bytes_to_floats<T>(part % 2 ? h.z : h.x, out);
    bytes_to_floats<T>(part % 2 ? h.w : h.y, out + 4);
  } else {
    uint32_t a = part % 2 ? p.low.z : p.low.x, b = part % 2 ? p.low.w : p.low.y;
    if (part >= 2) {
      a >>= 4;
      b >>= 4;
    }
    a &= 0x0f0f0f0fu;
    b &= 0x0f0f0f0fu;
    if constexpr (high_bytes(T) == 4) {
      const uint32_t bits = p.high.x >> 8 * part;
      a |= ((bits & 15) * 0x00204081u & 0x01010101u) << 4;
      b |= ((bits >> 4 & 15) * 0x00204081u & 0x01010101u) << 4;
    }
    if constexpr (high_bytes(T) == 8) {
      const uint32_t bits = (part < 2 ? p.high.x : p.high.y) >> 16 * (part % 2);
      uint32_t u = bits & 255, v = bits >> 8 & 255;
      u = (u | u << 12) & 0x000f000fu;
      v = (v | v << 12) & 0x000f000fu;
      a |= ((u | u << 6) & 0x03030303u) << 4;
      b |= ((v | v << 6) & 0x03030303u) << 4;
    }
    bytes_to_floats<T>(a, out);
    bytes_to_floats<T>(b, out + 4);
  }
}

// The same, as values of the file.
template <DType T>
GEMMA_DEVICE void eight_scaled(const Piece<T>& p, int part, float* out) {
  eight_values<T>(p, part, out);
  if constexpr (T != DType::BF16) {
    const float s = part < 2 ? p.scale : p.second;
    GEMMA_UNROLL
    for (int i = 0; i < 8; ++i) {
      out[i] = s * out[i];
      if constexpr (has_minimum(T)) out[i] = out[i] + p.minimum;
    }
  }
}

}  // namespace gemma::gpu
