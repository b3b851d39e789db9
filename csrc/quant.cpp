// The encodings of quant.h. Files and hosts are little-endian.
#include <algorithm>
#include <cmath>
#include <limits>

#include "quant_blocks.h"

namespace gemma {

namespace {

Scales file_scales(DType t, const Layout& l, const uint8_t* p, int j) {
  const float d = half_to_float(load16(p + l.file_d)), m = l.file_m < 0 ? 0 : half_to_float(load16(p + l.file_m));
  if (l.two_level) {
    int sc, mn;
    read_scale(p + 4, j, &sc, &mn);
    return {d * static_cast<float>(sc), d * static_cast<float>(sc), -(m * static_cast<float>(mn))};
  }
  if (t == DType::Q6_K) {
    const auto* s = reinterpret_cast<const int8_t*>(p + offsetof(BlockQ6_K, scales)) + 2 * j;
    return {d * static_cast<float>(s[0]), d * static_cast<float>(s[1]), 0};
  }
  return {d, d, m};
}

float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// The bits of |x|, which have the order of numbers.
int32_t magnitude(float x) { return static_cast<int32_t>(load32(&x) & 0x7fffffffu); }

// std::lround of |x| < 2^31, in a form that compilers vectorise.
int round_half_away(float x) {
  const int whole = static_cast<int>(x);
  const float rest = x - static_cast<float>(whole);
  return whole + (rest >= 0.5f) - (rest <= -0.5f);
}

// Nearest of 0..15 to x - 0.5, halves up; of NaN 0. Truncation is the floor, since x is clamped to positive first: no library
// calls, so that the search over scales is quick on every CPU.
int nibble(float x) {
  x = x > 0.0f ? x : 0.0f;
  return static_cast<int>(x < 15.0f ? x : 15.0f);
}

}  // namespace

const Encoding& encoding(DType type) { return kEncodings[static_cast<int>(type)]; }

size_t row_bytes(DType type, int64_t k) {
  const Encoding& e = encoding(type);
  return static_cast<size_t>((k + e.block - 1) / e.block) * static_cast<size_t>(e.block_bytes);
}

float bf16_to_float(uint16_t b) { return float_of(static_cast<uint32_t>(b) << 16); }

float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
  if (e == 0) {
    const float f = static_cast<float>(m) * 5.9604644775390625e-8f;  // 2^-24
    return float_of(load32(&f) | sign);
  }
  return float_of(sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13);
}

uint16_t float_to_half(float f) {
  const uint32_t x = load32(&f), sign = x >> 16 & 0x8000, a = x & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (a < 0x38800000u) {                                              // subnormal: a multiple of 2^-24
    const float v = std::fabs(f) * 16777216.0f;
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(v)));
  }
  const uint32_t r = a + 0xfff + (a >> 13 & 1);
  return static_cast<uint16_t>(sign | ((r - 0x38000000u) >> 13));
}

void decode_row(DType type, const uint8_t* row, int64_t k, float* out) {
  switch (type) {
    case DType::F32:
      std::memcpy(out, row, static_cast<size_t>(k) * 4);
      return;
    case DType::F16:
      for (int64_t i = 0; i < k; ++i) out[i] = half_to_float(load16(row + 2 * i));
      return;
    case DType::BF16:
      for (int64_t i = 0; i < k; ++i) out[i] = bf16_to_float(load16(row + 2 * i));
      return;
    default:
      break;
  }
  const Layout l = layout(type);
  const int per = blocks_of(type);
  for (int64_t b = 0; b < k / kBlock; ++b) {
    const uint8_t* p = row + b / per * encoding(type).block_bytes;
    uint32_t w[8][1];
    with_type(type, ReadValues<1>{p, 0, 1, static_cast<int>(b % per), w});
    decode_values(w[0], l.offset, file_scales(type, l, p, static_cast<int>(b % per)), out + b * kBlock);
  }
}

void check_convertible(const HostTensor& s, DType target) {
  if (s.tiled)
    GEMMA_CHECK(s.type == target, "tensor \"", s.name, "\" is packed as ", encoding(s.type).name,
                " and cannot be converted to ", encoding(target).name, "; convert from the original checkpoint");
  // What is packed from a converted checkpoint may have rows that end within a block of 32.
  if (encoding(s.type).quantized && !(s.tiled && encoding(s.type).block == kBlock))
    GEMMA_CHECK(s.cols % encoding(s.type).block == 0, "tensor \"", s.name, "\" has rows of ", s.cols,
                " values, not a multiple of ", encoding(s.type).name, "'s block of ", encoding(s.type).block);
}

void convert_row(const HostTensor& s, int64_t r, DType target, float* values, uint8_t* out, Q4Errors errors) {
  decode_row(s.type, s.data + r * row_bytes(s.type, s.cols), s.cols, values);
  if (target == DType::BF16) {
    for (int64_t i = 0; i < s.cols; ++i) {
      const uint16_t b = float_to_bf16(values[i]);
      std::memcpy(out + 2 * i, &b, 2);
    }
    return;
  }
  try {
    encode_row(target, values, s.cols, out, errors);
  } catch (const InputError& e) {
    fail("tensor \"", s.name, "\", row ", r, ": ", e.what());
  }
}

void q4_errors(const float* v, float top, float* d, float* error) {
  for (int s = 0; s < kQ4Scales; ++s) {
    d[s] = half_to_float(float_to_half(top / kQ4Steps.at[s]));
    const float inverse = 1 / d[s];  // where d is 0, errors are the values whatever q is
    error[s] = 0;
    for (int i = 0; i < kBlock; ++i) {
      const float e = v[i] - d[s] * static_cast<float>(nibble(v[i] * inverse + 8.5f) - 8);
      error[s] += e * e;
    }
  }
}

void encode_row(DType type, const float* x, int64_t k, uint8_t* row, Q4Errors errors) {
  GEMMA_CHECK(type == DType::Q8_0 || type == DType::Q4_0, "only Q8_0 and Q4_0 can be encoded");
  for (int64_t b = 0; b * kBlock < k; ++b, row += encoding(type).block_bytes) {
    const float* v = x + b * kBlock;
    float last[kBlock] = {};  // padded with zeros
    if (k - b * kBlock < kBlock) {
      std::copy(v, x + k, last);
      v = last;
    }
    int32_t most = 0;
    for (int i = 0; i < kBlock; ++i) most = std::max(most, magnitude(v[i]));
    // The value farthest from zero.
    const auto top = [&] { return *std::find_if(v, v + kBlock, [&](float f) { return magnitude(f) == most; }); };
    GEMMA_CHECK(most < 0x7f800000, "a weight is ", top(), ": only finite values can be quantised");
    // Beyond these, no scale in half precision reaches the value.
    const float limit = 65504.0f * (type == DType::Q8_0 ? 127 : 8);
    GEMMA_CHECK(most <= magnitude(limit), "a weight is ", top(), ": ", encoding(type).name, " reaches ", limit,
                " at most");
    if (type == DType::Q8_0) {
      const float d = float_of(static_cast<uint32_t>(most)) / 127;
      // A scale so small that its inverse overflows is 0 in half precision, and so are the values.
      const float inverse = d >= std::numeric_limits<float>::min() ? 1 / d : 0;
      store16(row, float_to_half(d));
      int8_t q[kBlock];
      for (int i = 0; i < kBlock; ++i) q[i] = static_cast<int8_t>(round_half_away(v[i] * inverse));
      std::memcpy(row + 2, q, kBlock);
    } else {
      float d[kQ4Scales], error[kQ4Scales];
      errors(v, top(), d, error);
      const float best_d = d[std::min_element(error, error + kQ4Scales) - error];
      const float inverse = best_d != 0 ? 1 / best_d : 0;
      store16(row, float_to_half(best_d));
      for (int i = 0; i < kBlock / 2; ++i)
        row[2 + i] = static_cast<uint8_t>(nibble(v[i] * inverse + 8.5f) | nibble(v[i + 16] * inverse + 8.5f) << 4);
    }
  }
}

}  // namespace gemma
