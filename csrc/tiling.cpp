// Weights as panels and back, see quant.h; the blocks' meaning is quant_blocks.h's. Files and hosts are little-endian.
#include <algorithm>

#include "quant_blocks.h"

namespace gemma {

namespace {

// Into the second-level cache, for later.
void ask_for(const uint8_t* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

void store32(void* p, uint32_t x) { std::memcpy(p, &x, 4); }

constexpr uint32_t kSix = 0x3f3f3f3fu;

// The low halves of four bytes side by side.
uint32_t join_nibbles(uint32_t x) {
  x = (x | x >> 4) & 0x00ff00ffu;
  return (x | x >> 8) & 0xffffu;
}

// The inverse of spread4.
uint32_t gather4(uint32_t x) { return ((x & kOnes) * 0x10204080u) >> 28; }

// The inverse of read_blocks, of one row, into a file block that starts as zeros.
void write_values(DType t, uint8_t* p, int j, const uint32_t* w) {
  auto merge = [](uint8_t* at, uint32_t bits) { store32(at, load32(at) | bits); };
  switch (t) {
    case DType::Q8_0:
      for (int i = 0; i < 8; ++i) store32(p + 2 + 4 * i, w[i] ^ 0x80808080u);
      return;
    case DType::Q4_0:
    case DType::Q4_1:
    case DType::Q5_0:
    case DType::Q5_1: {
      uint8_t* q = p + kEncodings[static_cast<int>(t)].block_bytes - 16;
      for (int i = 0; i < 4; ++i) store32(q + 4 * i, (w[i] & kLow) | (w[i + 4] & kLow) << 4);
      if (t == DType::Q5_0 || t == DType::Q5_1)
        for (int i = 0; i < 8; ++i) merge(q - 4, gather4(w[i] >> 4) << 4 * i);
      return;
    }
    case DType::Q4_K:
    case DType::Q5_K: {
      uint8_t* q = p + (t == DType::Q4_K ? offsetof(BlockQ4_K, q) : offsetof(BlockQ5_K, q)) + 32 * (j / 2);
      for (int i = 0; i < 8; ++i) merge(q + 4 * i, (w[i] & kLow) << 4 * (j % 2));
      if (t == DType::Q5_K)
        for (int i = 0; i < 8; ++i) merge(p + offsetof(BlockQ5_K, qh) + 4 * i, (w[i] >> 4 & kOnes) << j);
      return;
    }
    case DType::Q6_K: {
      uint8_t* ql = p + 64 * (j / 4) + 32 * (j % 2);
      uint8_t* qh = p + offsetof(BlockQ6_K, qh) + 32 * (j / 4);
      const int s = j % 4;
      for (int i = 0; i < 8; ++i) {
        merge(ql + 4 * i, (w[i] & kLow) << 4 * (s / 2));
        merge(qh + 4 * i, (w[i] >> 4 & kPairs) << 2 * s);
      }
      return;
    }
    default:
      return;
  }
}

// The lowest `bits` (2, 4 or 5) of a block's values as planes, see quant.h.
void write_planes(int bits, uint8_t* planes, const uint32_t (*w)[kPanel]) {
  if (bits == 2) {
    for (int g = 0; g < 2; ++g)
      for (int r = 0; r < kPanel; ++r) {
        uint32_t x = 0;
        for (int i = 0; i < 4; ++i) x |= (w[4 * g + i][r] & kPairs) << 2 * i;
        store32(planes + g * 128 + r * 4, x);
      }
    return;
  }
  if (bits == 5) {
    for (int r = 0; r < kPanel; ++r) {
      uint32_t x = 0;
      for (int i = 0; i < 8; ++i) x |= (w[i][r] >> 4 & kOnes) << i;
      store32(planes + r * 4, x);
    }
    planes += 128;
  }
  for (int i = 0; i < 8; ++i)
    for (int r = 0; r < 16; ++r) store32(planes + i * 64 + r * 4, (w[i][r] & kLow) | (w[i][r + 16] & kLow) << 4);
}

void read_planes(int bits, const uint8_t* planes, int r, uint32_t* w) {
  if (bits == 2) {
    for (int i = 0; i < 8; ++i) w[i] = load32(planes + i / 4 * 128 + r * 4) >> 2 * (i % 4) & kPairs;
    return;
  }
  const uint8_t* high = planes;
  planes += bits == 5 ? 128 : 0;
  for (int i = 0; i < 8; ++i) w[i] = load32(planes + i * 64 + r % 16 * 4) >> 4 * (r / 16) & kLow;
  if (bits == 5)
    for (int i = 0; i < 8; ++i) w[i] |= (load32(high + r * 4) >> i & kOnes) << 4;
}

// A panel's units: where each begins in the matrix, and its planes, whatever lies between.
struct Units {
  Units(DType t, int64_t rows, int64_t k, int64_t panel)
      : e(encoding(t)), l(layout(t)), first(panel_at(t, rows, k, panel)), count((k + e.block - 1) / e.block) {}
  size_t at(int64_t u) const { return first.units + static_cast<size_t>(u * (e.unit_bytes - e.low_bytes)); }
  size_t planes(int64_t u, int j) const { return at(u) + static_cast<size_t>(l.unit_planes + j * l.planes_stride); }
  size_t low(int64_t u, int j) const {
    return first.low + static_cast<size_t>(u * e.low_bytes + j * (l.bits - 4) * 128);
  }

  void write(uint8_t* matrix, int64_t u, int j, const uint32_t (*w)[kPanel]) const {
    if (!e.low_bytes) return write_planes(l.bits, matrix + planes(u, j), w);
    uint32_t high[8][kPanel];
    for (int i = 0; i < 8; ++i)
      for (int r = 0; r < kPanel; ++r) high[i][r] = w[i][r] >> (l.bits - 4) & kLow;
    write_planes(4, matrix + planes(u, j), high);
    write_planes(l.bits - 4, matrix + low(u, j), w);
  }

  void read(const uint8_t* matrix, int64_t u, int j, int r, uint32_t* w) const {
    if (!e.low_bytes) return read_planes(l.bits, matrix + planes(u, j), r, w);
    uint32_t below[8];
    read_planes(4, matrix + planes(u, j), r, w);
    read_planes(l.bits - 4, matrix + low(u, j), r, below);
    for (int i = 0; i < 8; ++i) w[i] = w[i] << (l.bits - 4) | below[i];
  }

  const Encoding& e;
  Layout l;
  PanelAt first;
  int64_t count;
};

void write_scale(uint8_t* s, int j, int sc, int mn) {  // over zeros
  if (j < 4) {
    s[j] |= static_cast<uint8_t>(sc);
    s[j + 4] |= static_cast<uint8_t>(mn);
  } else {
    s[j + 4] |= static_cast<uint8_t>((sc & 15) | (mn & 15) << 4);
    s[j - 4] |= static_cast<uint8_t>((sc >> 4) << 6);
    s[j] |= static_cast<uint8_t>((mn >> 4) << 6);
  }
}

// Scale and offset of block j of a unit of Q4_K or Q5_K, of row r.
struct SixBits {
  int scale, min;
};
SixBits read_six_bits(const uint8_t* unit, int j, int r) {
  const uint32_t hi = load32(unit + 128 + 4 * r) >> 4 * j;
  const uint8_t lo = unit[256 + 32 * j + r];
  return {static_cast<int>((lo & 15) | (hi & 3) << 4), static_cast<int>(lo >> 4 | (hi >> 2 & 3) << 4)};
}

// The same of a file's block into row r of a unit.
void tile_six_bits(const uint8_t* scales, uint8_t* unit, int r) {
  const uint32_t x = load32(scales), y = load32(scales + 4), z = load32(scales + 8);
  // Four at a time, a byte each; see read_scale.
  const uint32_t sc[2] = {x & kSix, (z & kLow) | (x >> 6 & kPairs) << 4};
  const uint32_t mn[2] = {y & kSix, (z >> 4 & kLow) | (y >> 6 & kPairs) << 4};
  uint32_t hi = 0;
  for (int h = 0; h < 2; ++h) {
    const uint32_t lo = (sc[h] & kLow) | (mn[h] & kLow) << 4;
    for (int j = 0; j < 4; ++j) unit[256 + 32 * (4 * h + j) + r] = static_cast<uint8_t>(lo >> 8 * j);
    hi |= join_nibbles((sc[h] >> 4 & kPairs) | (mn[h] >> 4 & kPairs) << 2) << 16 * h;
  }
  store32(unit + 128 + 4 * r, hi);
}

// Row r's scales of a unit, in the file's form, into a file block that starts as zeros.
void untile_scales(DType t, const Layout& l, const uint8_t* unit, int r, uint8_t* p) {
  store16(p + l.file_d, load16(unit + 2 * r));
  if (l.file_m >= 0) store16(p + l.file_m, load16(unit + 64 + 2 * r));
  for (int j = 0; j < 8; ++j) {
    if (l.two_level) {
      const SixBits s = read_six_bits(unit, j, r);
      write_scale(p + 4, j, s.scale, s.min);
    }
    if (t == DType::Q6_K)
      for (int h = 0; h < 2; ++h)
        p[offsetof(BlockQ6_K, scales) + 2 * j + h] = unit[64 + j * l.planes_stride + 32 * h + r];
  }
}

}  // namespace

size_t tiled_bytes(DType type, int64_t rows, int64_t k) {
  const Encoding& e = encoding(type);
  return static_cast<size_t>((rows + kPanel - 1) / kPanel) * static_cast<size_t>((k + e.block - 1) / e.block) *
         static_cast<size_t>(e.unit_bytes);
}

PanelAt panel_at(DType type, int64_t rows, int64_t k, int64_t panel) {
  const Encoding& e = encoding(type);
  const size_t units = static_cast<size_t>((k + e.block - 1) / e.block),
               high = static_cast<size_t>(e.unit_bytes - e.low_bytes);
  const size_t panels = static_cast<size_t>((rows + kPanel - 1) / kPanel), i = static_cast<size_t>(panel);
  return {i * units * high, units * (panels * high + i * static_cast<size_t>(e.low_bytes))};
}

void tile_panel(DType type, const uint8_t* src, size_t row_stride, int64_t all_rows, int64_t k, int64_t panel,
                uint8_t* matrix) {
  const Encoding& e = encoding(type);
  const Units units(type, all_rows, k, panel);
  const Layout& l = units.l;
  const int rows = static_cast<int>(std::min<int64_t>(kPanel, all_rows - panel * kPanel));
  const int per = blocks_of(type);
  alignas(64) uint32_t w[8][kPanel];
  for (int64_t u = 0; u < units.count; ++u) {
    const uint8_t* p = src + u * e.block_bytes;
    uint8_t* unit = matrix + units.at(u);
    // The next panel's rows, in the order of memory: a block of each at a time is no order that hardware would foresee.
    const int64_t step = int64_t{kPanel} * e.block_bytes;
    for (int64_t at = u * step; at < (u + 1) * step; at += 64) ask_for(src + kPanel * row_stride + at);
    if (rows < kPanel) std::memset(unit, 0, static_cast<size_t>(l.unit_planes));
    for (int r = 0; r < rows; ++r) store16(unit + 2 * r, load16(p + r * row_stride + l.file_d));
    for (int r = 0; l.file_m >= 0 && r < rows; ++r) store16(unit + 64 + 2 * r, load16(p + r * row_stride + l.file_m));
    for (int r = 0; l.two_level && r < rows; ++r) tile_six_bits(p + r * row_stride + 4, unit, r);
    for (int j = 0; j < per; ++j) {
      uint8_t* planes = matrix + units.planes(u, j);
      if (type == DType::Q6_K) {
        if (rows < kPanel) std::memset(planes - 64, 0, 64);
        for (int r = 0; r < rows; ++r)
          for (int h = 0; h < 2; ++h)
            planes[32 * h + r - 64] = p[r * row_stride + offsetof(BlockQ6_K, scales) + 2 * j + h];
      }
      with_type(type, ReadValues<kPanel>{p, row_stride, rows, j, w});
      // Rows past the end: scale 0, values at the zero point.
      for (int r = rows; r < kPanel; ++r)
        for (auto& word : w) word[r] = static_cast<uint32_t>(l.offset) * kOnes;
      units.write(matrix, u, j, w);
    }
  }
}

void untile_row(DType type, const uint8_t* matrix, int64_t rows, int64_t k, int64_t r, uint8_t* row) {
  const Encoding& e = encoding(type);
  const Units units(type, rows, k, r / kPanel);
  const int lane = static_cast<int>(r % kPanel);
  for (int64_t u = 0; u < units.count; ++u, row += e.block_bytes) {
    std::memset(row, 0, static_cast<size_t>(e.block_bytes));
    untile_scales(type, units.l, matrix + units.at(u), lane, row);
    for (int j = 0; j < blocks_of(type); ++j) {
      uint32_t w[8];
      units.read(matrix, u, j, lane, w);
      write_values(type, row, j, w);
    }
  }
}

void decode_tiled_row(DType type, const uint8_t* matrix, int64_t rows, int64_t k, int64_t row, float* out) {
  const Units units(type, rows, k, row / kPanel);
  const int r = static_cast<int>(row % kPanel);
  const Layout& l = units.l;
  const int per = blocks_of(type);
  for (int64_t b = 0; b * kBlock < k; ++b) {
    const uint8_t* unit = matrix + units.at(b / per);
    const int j = static_cast<int>(b % per);
    const float d = half_to_float(load16(unit + 2 * r)),
                m = l.file_m < 0 ? 0 : half_to_float(load16(unit + 64 + 2 * r));
    Scales s{d, d, m};
    if (l.two_level) {
      const SixBits six = read_six_bits(unit, j, r);
      s.d = s.d2 = d * static_cast<float>(six.scale);
      s.m = -(m * static_cast<float>(six.min));
    } else if (type == DType::Q6_K) {
      const auto* sc = reinterpret_cast<const int8_t*>(unit + 64 + j * l.planes_stride) + r;
      s.d = d * static_cast<float>(sc[0]);
      s.d2 = d * static_cast<float>(sc[32]);
    }
    uint32_t w[8];
    units.read(matrix, b / per, j, r, w);
    float last[kBlock];
    const bool whole = (b + 1) * kBlock <= k;
    decode_values(w, l.offset, s, whole ? out + b * kBlock : last);
    if (!whole) std::memcpy(out + b * kBlock, last, static_cast<size_t>(k - b * kBlock) * sizeof(float));
  }
}

}  // namespace gemma
