// The scalar specification of quant.h. Files and hosts are little-endian.
#include "quant.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace gemma {

namespace {

// The files' blocks, as ggml defines them; q, ql, qh, qs hold packed values, d and m half-precision scales and offsets.
struct BlockQ8_0 {
  uint16_t d;
  int8_t q[32];
};
struct BlockQ4_0 {
  uint16_t d;
  uint8_t q[16];
};
struct BlockQ4_1 {
  uint16_t d, m;
  uint8_t q[16];
};
struct BlockQ5_0 {
  uint16_t d;
  uint8_t qh[4], q[16];
};
struct BlockQ5_1 {
  uint16_t d, m;
  uint8_t qh[4], q[16];
};
struct BlockQ4_K {
  uint16_t d, dmin;
  uint8_t scales[12], q[128];
};
struct BlockQ5_K {
  uint16_t d, dmin;
  uint8_t scales[12], qh[32], q[128];
};
struct BlockQ6_K {
  uint8_t ql[128], qh[64];
  int8_t scales[16];
  uint16_t d;
};
static_assert(sizeof(BlockQ8_0) == 34 && sizeof(BlockQ4_0) == 18 && sizeof(BlockQ4_1) == 20, "as in files");
static_assert(sizeof(BlockQ5_0) == 22 && sizeof(BlockQ5_1) == 24, "as in files");
static_assert(sizeof(BlockQ4_K) == 144 && sizeof(BlockQ5_K) == 176 && sizeof(BlockQ6_K) == 210, "as in files");

constexpr Encoding kEncodings[] = {
    {"F32", 1, 4, 0, 0, false},        {"F16", 1, 2, 0, 0, false},           {"BF16", 1, 2, 0, 0, false},
    {"Q8_0", 32, 34, 1088, 512, true}, {"Q4_0", 32, 18, 576, 0, true},       {"Q4_1", 32, 20, 640, 0, true},
    {"Q5_0", 32, 22, 704, 0, true},    {"Q5_1", 32, 24, 768, 0, true},       {"Q4_K", 256, 144, 4608, 0, true},
    {"Q5_K", 256, 176, 5632, 0, true}, {"Q6_K", 256, 210, 6720, 2048, true},
};

// Where a block of 32 along K has its parts, in a file's block and in a panel's unit. -1: it has none.
struct Layout {
  int bits;
  int offset;                      // value = byte - offset
  int file_d, file_m;              // halves in the file's block
  int unit_planes, planes_stride;  // the unit's first plane, and the distance to the next block's
  bool two_level;                  // Q4_K Q5_K
};

Layout layout(DType t) {
  switch (t) {
    case DType::Q8_0:
      return {8, 128, 0, -1, 64, 0, false};
    case DType::Q4_0:
      return {4, 8, 0, -1, 64, 0, false};
    case DType::Q4_1:
      return {4, 0, 0, 2, 128, 0, false};
    case DType::Q5_0:
      return {5, 16, 0, -1, 64, 0, false};
    case DType::Q5_1:
      return {5, 0, 0, 2, 128, 0, false};
    case DType::Q4_K:
      return {4, 0, 0, 2, 512, 512, true};
    case DType::Q5_K:
      return {5, 0, 0, 2, 512, 640, true};
    case DType::Q6_K:
      return {6, 32, offsetof(BlockQ6_K, d), -1, 128, 576, false};
    default:
      fail("not a quantised type");
  }
}

uint32_t load32(const void* p) {
  uint32_t x;
  std::memcpy(&x, p, 4);
  return x;
}
void store32(void* p, uint32_t x) { std::memcpy(p, &x, 4); }
uint16_t load16(const void* p) {
  uint16_t x;
  std::memcpy(&x, p, 2);
  return x;
}
void store16(void* p, uint16_t x) { std::memcpy(p, &x, 2); }

// Into the second-level cache, for later.
void ask_for(const uint8_t* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

constexpr uint32_t kOnes = 0x01010101u, kLow = 0x0f0f0f0fu, kPairs = 0x03030303u;

// Four bits to the lowest bits of four bytes.
uint32_t spread4(uint32_t x) { return ((x & 15) * 0x00204081u) & kOnes; }
uint32_t gather4(uint32_t x) { return ((x & kOnes) * 0x10204080u) >> 28; }

// The 32 values of block j (of the file block's 1 or 8), four a word, as unsigned bytes.
template <DType T>
void read_block(const uint8_t* p, int j, uint32_t* out) {
  uint32_t w[8];  // what is read from bytes could be `out` for all that the compiler knows
  if constexpr (T == DType::Q8_0) {
    for (int i = 0; i < 8; ++i) w[i] = load32(p + 2 + 4 * i) ^ 0x80808080u;
  } else if constexpr (T == DType::Q4_K || T == DType::Q5_K) {
    const uint8_t* q = p + (T == DType::Q4_K ? offsetof(BlockQ4_K, q) : offsetof(BlockQ5_K, q)) + 32 * (j / 2);
    for (int i = 0; i < 8; ++i) w[i] = load32(q + 4 * i) >> 4 * (j % 2) & kLow;
    if constexpr (T == DType::Q5_K)
      for (int i = 0; i < 8; ++i) w[i] |= (load32(p + offsetof(BlockQ5_K, qh) + 4 * i) >> j & kOnes) << 4;
  } else if constexpr (T == DType::Q6_K) {
    const uint8_t* ql = p + 64 * (j / 4) + 32 * (j % 2);
    const uint8_t* qh = p + offsetof(BlockQ6_K, qh) + 32 * (j / 4);
    const int s = j % 4;
    for (int i = 0; i < 8; ++i)
      w[i] = (load32(ql + 4 * i) >> 4 * (s / 2) & kLow) | (load32(qh + 4 * i) >> 2 * s & kPairs) << 4;
  } else {
    const uint8_t* q = p + kEncodings[static_cast<int>(T)].block_bytes - 16;
    for (int i = 0; i < 4; ++i) w[i] = load32(q + 4 * i) & kLow;
    for (int i = 0; i < 4; ++i) w[i + 4] = load32(q + 4 * i) >> 4 & kLow;
    if constexpr (T == DType::Q5_0 || T == DType::Q5_1) {
      const uint32_t h = load32(q - 4);
      for (int i = 0; i < 8; ++i) w[i] |= spread4(h >> 4 * i) << 4;
    }
  }
  std::memcpy(out, w, sizeof w);
}

// The same of `rows` rows, `stride` bytes apart; of quantised types.
struct ReadValues {
  const uint8_t* p;
  size_t stride;
  int rows, j;
  uint32_t (*w)[8];
  template <DType T>
  void run() const {
    if constexpr (T != DType::BF16)
      for (int r = 0; r < rows; ++r) read_block<T>(p + r * stride, j, w[r]);
  }
};

// The inverse, into a file block that starts as zeros.
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
void write_planes(int bits, uint8_t* planes, const uint32_t (*w)[8]) {
  if (bits == 2) {
    for (int g = 0; g < 2; ++g)
      for (int r = 0; r < kPanel; ++r) {
        uint32_t x = 0;
        for (int i = 0; i < 4; ++i) x |= (w[r][4 * g + i] & kPairs) << 2 * i;
        store32(planes + g * 128 + r * 4, x);
      }
    return;
  }
  if (bits == 5) {
    for (int r = 0; r < kPanel; ++r) {
      uint32_t x = 0;
      for (int i = 0; i < 8; ++i) x |= (w[r][i] >> 4 & kOnes) << i;
      store32(planes + r * 4, x);
    }
    planes += 128;
  }
  for (int i = 0; i < 8; ++i)
    for (int r = 0; r < 16; ++r) store32(planes + i * 64 + r * 4, (w[r][i] & kLow) | (w[r + 16][i] & kLow) << 4);
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

  void write(uint8_t* matrix, int64_t u, int j, const uint32_t (*w)[8]) const {
    if (!e.low_bytes) return write_planes(l.bits, matrix + planes(u, j), w);
    uint32_t high[kPanel][8];
    for (int r = 0; r < kPanel; ++r)
      for (int i = 0; i < 8; ++i) high[r][i] = w[r][i] >> (l.bits - 4) & kLow;
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

// Six-bit scale and offset j of a Q4_K or Q5_K block.
void read_scale(const uint8_t* s, int j, int* sc, int* mn) {
  if (j < 4) {
    *sc = s[j] & 63;
    *mn = s[j + 4] & 63;
  } else {
    *sc = (s[j + 4] & 15) | (s[j - 4] >> 6) << 4;
    *mn = s[j + 4] >> 4 | (s[j] >> 6) << 4;
  }
}

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

// value = d * (byte - offset) + m, with a scale every 16 values; d2 is that of the second half.
struct Scales {
  float d, d2, m;
};

void decode_values(const uint32_t* w, int offset, const Scales& s, float* out) {
  for (int i = 0; i < 32; ++i) {
    const int q = static_cast<int>(w[i / 4] >> 8 * (i % 4) & 255) - offset;
    out[i] = (i < 16 ? s.d : s.d2) * static_cast<float>(q) + s.m;
  }
}

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

// Nearest of 0..15 to x - 0.5, halves up. Truncation is the floor, since x is clamped to positive first: no library
// calls, so that the search over scales is quick on every CPU.
int nibble(float x) {
  x = x > 0.0f ? x : 0.0f;
  return static_cast<int>(x < 15.0f ? x : 15.0f);
}

int blocks_of(DType t) { return encoding(t).block / kBlock; }

// Row r's scales of block j of a unit, in the file's form, into a file block that starts as zeros.
void untile_scales(DType t, const Layout& l, const uint8_t* unit, int r, uint8_t* p) {
  store16(p + l.file_d, load16(unit + 2 * r));
  if (l.file_m >= 0) store16(p + l.file_m, load16(unit + 64 + 2 * r));
  for (int j = 0; j < 8; ++j) {
    if (l.two_level) {
      const uint32_t hi = load32(unit + 128 + 4 * r) >> 4 * j;
      const uint8_t lo = unit[256 + 32 * j + r];
      write_scale(p + 4, j, static_cast<int>((lo & 15) | (hi & 3) << 4),
                  static_cast<int>(lo >> 4 | (hi >> 2 & 3) << 4));
    }
    if (t == DType::Q6_K)
      for (int h = 0; h < 2; ++h)
        p[offsetof(BlockQ6_K, scales) + 2 * j + h] = unit[64 + j * l.planes_stride + 32 * h + r];
  }
}

}  // namespace

const Encoding& encoding(DType type) { return kEncodings[static_cast<int>(type)]; }

size_t row_bytes(DType type, int64_t k) {
  const Encoding& e = encoding(type);
  return static_cast<size_t>((k + e.block - 1) / e.block) * static_cast<size_t>(e.block_bytes);
}

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

float bf16_to_float(uint16_t b) {
  const uint32_t x = static_cast<uint32_t>(b) << 16;
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}

float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
  uint32_t x;
  if (e == 0) {
    const float f = static_cast<float>(m) * 5.9604644775390625e-8f;  // 2^-24
    x = load32(&f) | sign;
  } else {
    x = sign | (e == 31 ? 0x7f800000u | m << 13 : (e + 112) << 23 | m << 13);
  }
  float f;
  std::memcpy(&f, &x, 4);
  return f;
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
    uint32_t w[1][8];
    with_type(type, ReadValues{p, 0, 1, static_cast<int>(b % per), w});
    decode_values(w[0], l.offset, file_scales(type, l, p, static_cast<int>(b % per)), out + b * kBlock);
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
      const uint32_t hi = load32(unit + 128 + 4 * r) >> 4 * j;
      const uint8_t lo = unit[256 + 32 * j + r];
      s.d = s.d2 = d * static_cast<float>((lo & 15) | (hi & 3) << 4);
      s.m = -(m * static_cast<float>(lo >> 4 | (hi >> 2 & 3) << 4));
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

void tile_panel(DType type, const uint8_t* src, size_t row_stride, int64_t all_rows, int64_t k, int64_t panel,
                uint8_t* matrix) {
  const Encoding& e = encoding(type);
  const Units units(type, all_rows, k, panel);
  const Layout& l = units.l;
  const int rows = static_cast<int>(std::min<int64_t>(kPanel, all_rows - panel * kPanel));
  const int per = blocks_of(type);
  // Rows past the end: scale 0, values at the zero point.
  alignas(64) uint32_t w[kPanel][8];
  for (int r = rows; r < kPanel; ++r)
    for (uint32_t& x : w[r]) x = static_cast<uint32_t>(l.offset) * kOnes;
  for (int64_t u = 0; u < units.count; ++u) {
    const uint8_t* p = src + u * e.block_bytes;
    uint8_t* unit = matrix + units.at(u);
    // The next panel's rows, in the order of memory: a block of each at a time is no order that hardware would foresee.
    const int64_t step = int64_t{kPanel} * e.block_bytes;
    for (int64_t at = u * step; at < (u + 1) * step; at += 64) ask_for(src + kPanel * row_stride + at);
    if (rows < kPanel || l.two_level) std::memset(unit, 0, static_cast<size_t>(l.unit_planes));
    for (int r = 0; r < rows; ++r) store16(unit + 2 * r, load16(p + r * row_stride + l.file_d));
    for (int r = 0; l.file_m >= 0 && r < rows; ++r) store16(unit + 64 + 2 * r, load16(p + r * row_stride + l.file_m));
    for (int r = 0; l.two_level && r < rows; ++r) {
      const uint8_t* block = p + r * row_stride;
      uint32_t hi = 0;
      for (int j = 0; j < 8; ++j) {
        int sc, mn;
        read_scale(block + 4, j, &sc, &mn);
        unit[256 + 32 * j + r] = static_cast<uint8_t>((sc & 15) | (mn & 15) << 4);
        hi |= static_cast<uint32_t>(sc >> 4 | (mn >> 4) << 2) << 4 * j;
      }
      store32(unit + 128 + 4 * r, hi);
    }
    for (int j = 0; j < per; ++j) {
      uint8_t* planes = matrix + units.planes(u, j);
      if (type == DType::Q6_K) {
        if (rows < kPanel) std::memset(planes - 64, 0, 64);
        for (int r = 0; r < rows; ++r)
          for (int h = 0; h < 2; ++h)
            planes[32 * h + r - 64] = p[r * row_stride + offsetof(BlockQ6_K, scales) + 2 * j + h];
      }
      with_type(type, ReadValues{p, row_stride, rows, j, w});
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

// std::lround of |x| < 2^31, in a form that compilers vectorise.
static inline int round_half_away(float x) {
  const int whole = static_cast<int>(x);
  const float rest = x - static_cast<float>(whole);
  return whole + (rest >= 0.5f) - (rest <= -0.5f);
}

void q4_errors(const float* v, const float* d, const float* inverse, float* error) {
  for (int s = 0; s < kQ4Scales; ++s) {
    error[s] = 0;
    for (int i = 0; i < kBlock; ++i) {
      const float e = v[i] - d[s] * static_cast<float>(nibble(v[i] * inverse[s] + 8.5f) - 8);
      error[s] += e * e;
    }
  }
}

// Q4_0's scale of least squared error among a few around the one that makes `top`, the value farthest from zero, -8.
static float least_error_scale(const float* v, float top, Q4Errors errors) {
  float d[kQ4Room] = {}, inverse[kQ4Room] = {}, error[kQ4Room];
  for (int s = 0; s < kQ4Scales; ++s) {
    d[s] = half_to_float(float_to_half(top / (-8 + 0.1f * static_cast<float>(s - kQ4Scales / 2))));
    inverse[s] = d[s] != 0 ? 1 / d[s] : 0;
  }
  errors(v, d, inverse, error);
  return d[std::min_element(error, error + kQ4Scales) - error];
}

void encode_row(DType type, const float* x, int64_t k, uint8_t* row, Q4Errors errors) {
  GEMMA_CHECK(type == DType::Q8_0 || type == DType::Q4_0, "only Q8_0 and Q4_0 can be encoded");
  for (int64_t b = 0; b * kBlock < k; ++b, row += encoding(type).block_bytes) {
    float v[kBlock] = {};
    const int n = static_cast<int>(k - b * kBlock < kBlock ? k - b * kBlock : kBlock);
    std::memcpy(v, x + b * kBlock, static_cast<size_t>(n) * sizeof(float));
    float top = 0;  // the value farthest from zero
    for (float f : v) {
      GEMMA_CHECK(std::isfinite(f), "a weight is ", f, ": only finite values can be quantised");
      if (std::fabs(f) > std::fabs(top)) top = f;
    }
    uint32_t w[8] = {};
    // Beyond these, no scale in half precision reaches the value.
    const float limit = 65504.0f * (type == DType::Q8_0 ? 127 : 8);
    GEMMA_CHECK(std::fabs(top) <= limit, "a weight is ", top, ": ", encoding(type).name, " reaches ", limit,
                " at most");
    if (type == DType::Q8_0) {
      const float d = std::fabs(top) / 127;
      // A scale so small that its inverse overflows is 0 in half precision, and so are the values.
      const float inverse = d >= std::numeric_limits<float>::min() ? 1 / d : 0;
      store16(row, float_to_half(d));
      for (int i = 0; i < kBlock; ++i)
        w[i / 4] |= static_cast<uint32_t>(round_half_away(v[i] * inverse) + 128) << 8 * (i % 4);
    } else {
      const float best_d = least_error_scale(v, top, errors);
      const float inverse = best_d != 0 ? 1 / best_d : 0;
      store16(row, float_to_half(best_d));
      for (int i = 0; i < kBlock; ++i) w[i / 4] |= static_cast<uint32_t>(nibble(v[i] * inverse + 8.5f)) << 8 * (i % 4);
    }
    write_values(type, row, 0, w);
  }
}

}  // namespace gemma
