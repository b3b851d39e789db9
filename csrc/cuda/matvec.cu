// Products of few rows with a weight matrix: decode, where all that counts is how fast weights stream in. They run on the tensor cores
// without rounding anything: a float32 activation is the sum of three bf16 values, and a bf16 or quantised weight less its scale is one.
#include "kernels.h"

namespace gemma::gpu {

namespace {

constexpr int kMatvecThreads = 512, kMatvecWarps = kMatvecThreads / 32;
constexpr int kParts = 3;         // bf16 values that an activation is the sum of
constexpr int kSliceRows = 64;    // rows of x a launch, which bounds the scratch
constexpr int kMostValues = 128;  // rows of x are padded with zeros to a multiple of this

// ---- weights ---------------------------------------------------------------------------------------------------------------

// A chunk is what a lane reads of a row at once: a quarter of the values of BF16's 8 pieces, of others' 4.
GEMMA_HOST_DEVICE constexpr int chunk_values(DType t) { return t == DType::BF16 ? 64 : 128; }

// The place of lane q of a four in a row's planes.
struct RowAt {
  const uint8_t *low, *more, *high, *scales, *super;
};
template <DType T>
GEMMA_DEVICE RowAt row_at(const Planes& w, int row, int q) {
  const int64_t first = row * static_cast<int64_t>(static_cast<int>(w.pieces));
  RowAt r{};
  r.low = w.low + (first * 16 + q * 16);
  if constexpr (T == DType::BF16) return r;
  if constexpr (T == DType::Q8_0) r.more = w.more + (first * 16 + q * 16);
  if constexpr (high_bytes(T) > 0) r.high = w.high + (first * high_bytes(T) + q * high_bytes(T));
  r.scales = w.scales + first * (T == DType::Q4_1 || T == DType::Q5_1 ? 4 : 2);
  if constexpr (T == DType::Q6_K) r.super = w.super + first / 4;
  return r;
}

template <DType T>
struct Chunk {
  Word4 low, more;
  Word2 high;
  Word4 scales;
  uint32_t super;
};

// Chunk `c` of a row; BF16: zeros for pieces past the row's `pieces`.
template <DType T>
GEMMA_DEVICE Chunk<T> load_chunk(const RowAt& r, int c, int pieces, int q) {
  Chunk<T> v{};
  if constexpr (T == DType::BF16) {
    if (c * 8 + q < pieces) v.low = load_stream(r.low + c * 128);
    if (c * 8 + 4 + q < pieces) v.more = load_stream(r.low + c * 128 + 64);
    return v;
  }
  v.low = load_stream(r.low + c * 64);
  if constexpr (T == DType::Q8_0) v.more = load_stream(r.more + c * 64);
  if constexpr (high_bytes(T) == 4) v.high.x = *reinterpret_cast<const uint32_t*>(r.high + c * 16);
  if constexpr (high_bytes(T) == 8) v.high = *reinterpret_cast<const Word2*>(r.high + c * 32);
  if constexpr (T == DType::Q4_1 || T == DType::Q5_1) {
    v.scales = *reinterpret_cast<const Word4*>(r.scales + c * 16);
  } else if constexpr (T == DType::Q4_K || T == DType::Q5_K) {
    v.scales = *reinterpret_cast<const Word4*>(r.scales + c / 2 * 16);
  } else {
    const Word2 s = *reinterpret_cast<const Word2*>(r.scales + c * 8);
    v.scales.x = s.x;
    v.scales.y = s.y;
  }
  if constexpr (T == DType::Q6_K) v.super = *reinterpret_cast<const uint16_t*>(r.super + c / 2 * 2);
  return v;
}

GEMMA_DEVICE uint32_t word_of(const Word4& w, int i) { return i == 0 ? w.x : i == 1 ? w.y : i == 2 ? w.z : w.w; }

template <DType T>
GEMMA_DEVICE Scales chunk_scales(const Chunk<T>& v, int c, int b) {
  Scales s;
  if constexpr (T == DType::Q4_1 || T == DType::Q5_1) {
    const uint32_t dm = word_of(v.scales, b);
    s.scale = float_of_half(static_cast<uint16_t>(dm));
    s.minimum = float_of_half(static_cast<uint16_t>(dm >> 16));
  } else if constexpr (T == DType::Q4_K || T == DType::Q5_K) {
    s = k_scales(v.scales, c % 2 * 4 + b);
  } else {
    const uint32_t two = (b < 2 ? v.scales.x : v.scales.y) >> 16 * (b % 2) & 0xffff;
    if constexpr (T == DType::Q6_K)
      s = q6_scales(two, float_of_half(static_cast<uint16_t>(v.super)));
    else
      s.scale = float_of_half(static_cast<uint16_t>(two));
  }
  return s;
}

// Bit `from` of w becomes bit `to`.
GEMMA_DEVICE uint32_t shifted(uint32_t w, int from, int to) { return from < to ? w << (to - from) : w >> (from - to); }

// A lane's four values of 16 of piece b, first or second half, as two pairs of bf16: values 0 and 2 of the four, then 1 and 3. BF16: values
// 0 and 1, then 2 and 3, of four that stand together.
template <DType T>
GEMMA_DEVICE void fragment(const Chunk<T>& v, int b, int half, uint32_t* pairs) {
  if constexpr (T == DType::BF16) {
    const Word4& w = b ? v.more : v.low;
    pairs[0] = half ? w.z : w.x;
    pairs[1] = half ? w.w : w.y;
  } else if constexpr (T == DType::Q8_0) {
    float f[4];
    bytes_to_floats<T>(word_of(half ? v.more : v.low, b), f);
    // Integers below 256 lose nothing with the lower half of their float.
    pairs[0] = byte_permute(float_bits(f[0]), float_bits(f[2]), 0x7632);
    pairs[1] = byte_permute(float_bits(f[1]), float_bits(f[3]), 0x7632);
  } else {
    const uint32_t w = word_of(v.low, b) >> 4 * half;
    uint32_t even = w & 0x000f000fu, odd = w >> 8 & 0x000f000fu;
    if constexpr (high_bytes(T) == 4) {
      const int bit = 4 * b + 2 * half;
      even |= shifted(v.high.x, bit, 4) & 0x00100010u;
      odd |= shifted(v.high.x, bit + 1, 4) & 0x00100010u;
    }
    if constexpr (high_bytes(T) == 8) {
      const uint32_t h = b < 2 ? v.high.x : v.high.y;
      const int bit = b % 2 * 8 + 4 * half;
      even |= shifted(h, bit, 4) & 0x00300030u;
      odd |= shifted(h, bit + 2, 4) & 0x00300030u;
    }
    // 0x4300 is 128 in bf16, and its lowest bit 1.
    constexpr uint32_t less = bf16_bits_of_integer(-128 - value_offset(T)) * 0x10001u;
    pairs[0] = add_pairs(even | 0x43004300u, less);
    pairs[1] = add_pairs(odd | 0x43004300u, less);
  }
}

// ---- activations -----------------------------------------------------------------------------------------------------------

// Rows of x as the tensor cores take them: [K / 16][columns][4] units of four bf16 values, a column for each part of a row, and, where weights
// have a minimum, sums [K / 32][columns] of the values, in the column of a row's first part.
struct Split {
  uint16_t* units;
  float* sums;
  int columns;
};
GEMMA_HOST_DEVICE int64_t padded(int64_t cols) { return (cols + kMostValues - 1) / kMostValues * kMostValues; }
GEMMA_HOST_DEVICE int64_t split_bytes(int64_t cols, int rows) { return padded(cols) * rows * kParts * 2; }
GEMMA_HOST_DEVICE int64_t sums_bytes(int64_t cols, int rows) { return padded(cols) / 32 * rows * kParts * 4; }

// Unit u of row n, four values that stand together, to its place. With `minimum` a warp's lanes have neighbouring units.
GEMMA_DEVICE void split_unit(Float4 v, int u, int n, bool bf16, bool minimum, const Split& to) {
  if (minimum) {
    float s = v.x + v.y + (v.z + v.w);
    for (int m = 1; m < 8; m *= 2) s += shuffle_xor(s, m);
    if (u % 8 < kParts) to.sums[u / 8 * to.columns + n * kParts + u % 8] = u % 8 ? 0.0f : s;
  }
  // Where `fragment` has these four: 16 values by 16, lane, and order within the lane.
  const int at = bf16 ? u / 8 * 2 + u % 2 : u / 4, q = bf16 ? u % 8 / 2 : u % 4;
  float w[4] = {v.x, bf16 ? v.y : v.z, bf16 ? v.z : v.y, v.w};
  uint16_t* unit = to.units + ((at * to.columns + n * kParts) * 4 + q) * 4;
  GEMMA_UNROLL
  for (int p = 0; p < kParts; ++p) {
    const Word2 part = {bf16_pair(w[0], w[1]), bf16_pair(w[2], w[3])};
    *reinterpret_cast<Word2*>(unit + p * 16) = part;
    w[0] -= bits_float(part.x << 16);
    w[1] -= bits_float(part.x & 0xffff0000u);
    w[2] -= bits_float(part.y << 16);
    w[3] -= bits_float(part.y & 0xffff0000u);
  }
}

// The units of x[cols] that a thread has of a batch, from unit `from` on.
constexpr int kUnits = 4, kBatch = kUnits * kMatvecThreads;
GEMMA_DEVICE void load_units(const float* x, int from, int cols, Float4* v) {
  GEMMA_UNROLL
  for (int i = 0; i < kUnits; ++i) v[i] = load_four(x, 4 * (from + i * kMatvecThreads), cols);
}

// Row n of x to its columns, by a block; normed first where a.norm is there, of which `norm` has the first batch. Every launch does it alike,
// so that a row's bits are the same in any company. Loads come before stores, since the compiler cannot know that these hit other memory.
GEMMA_DEVICE void split_row(const MatvecArgs& a, int n, bool bf16, bool minimum, Float4* norm, float* scratch,
                            const Split& to) {
  const float* x = a.x + (a.pick ? a.pick[n] : n) * a.x_stride;
  const int units = static_cast<int>(padded(a.cols)) / 4;
  Float4 v[kUnits];
  load_units(x, thread_x(), a.cols, v);
  float scale = 1;
  if (a.norm) {
    float s = 0;
    for (int from = thread_x();; load_units(x, from, a.cols, v)) {
      GEMMA_UNROLL
      for (int i = 0; i < kUnits; ++i) {
        s = multiply_add(v[i].x, v[i].x, s);
        s = multiply_add(v[i].y, v[i].y, s);
        s = multiply_add(v[i].z, v[i].z, s);
        s = multiply_add(v[i].w, v[i].w, s);
      }
      from += kBatch;
      if (from >= units) break;
    }
    scale = 1.0f / sqrtf(block_sum<kMatvecThreads>(s, scratch) / static_cast<float>(a.cols) + a.eps);
    if (units > kBatch) load_units(x, thread_x(), a.cols, v);
  }
  for (int from = thread_x(); from < units;) {
    if (a.norm) {
      GEMMA_UNROLL
      for (int i = 0; i < kUnits; ++i)
        v[i] = {v[i].x * scale * norm[i].x, v[i].y * scale * norm[i].y, v[i].z * scale * norm[i].z,
                v[i].w * scale * norm[i].w};
    }
    GEMMA_UNROLL
    for (int i = 0; i < kUnits; ++i)
      if (from + i * kMatvecThreads < units) split_unit(v[i], from + i * kMatvecThreads, n, bf16, minimum, to);
    from += kBatch;
    if (from >= units) break;
    load_units(x, from, a.cols, v);
    if (a.norm) load_units(a.norm, from, a.cols, norm);
  }
}

// Bytes: x once, its parts once. Layout: a block a row.
GEMMA_KERNEL GEMMA_BOUNDS(kMatvecThreads, 2) split_kernel(MatvecArgs a, bool bf16, bool minimum, Split to) {
  GEMMA_SHARED(float, scratch, kMatvecWarps);
  Float4 norm[kUnits];
  allow_next();
  if (a.norm) load_units(a.norm, thread_x(), a.cols, norm);
  wait_for_previous();
  split_row(a, block_x(), bf16, minimum, norm, scratch, to);
}

// ---- the product -----------------------------------------------------------------------------------------------------------

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
template <DType T>
GEMMA_DEVICE void locate(const MatvecArgs& a, int total, int group, RowAt* at) {
  GEMMA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const bool geglu = a.after == After::geglu;
    int row = group * rows_a_group(a) + lane() / 4 + (geglu ? 0 : 8 * i);
    row = row < total ? row : total - 1;
    const int part = geglu ? i : part_of(a, row);
    at[i] = row_at<T>(a.parts[part].w, row, lane() % 4);
  }
}
// The same for a group that is `rows` rows of one matrix further on.
template <DType T>
GEMMA_DEVICE void advance(int pieces, int rows, RowAt* at) {
  const int64_t by = static_cast<int64_t>(rows) * pieces;
  GEMMA_UNROLL
  for (int i = 0; i < 2; ++i) {
    at[i].low += by * 16;
    if constexpr (T == DType::Q8_0) at[i].more += by * 16;
    if constexpr (high_bytes(T) > 0) at[i].high += by * high_bytes(T);
    if constexpr (T != DType::BF16) at[i].scales += by * (T == DType::Q4_1 || T == DType::Q5_1 ? 4 : 2);
    if constexpr (T == DType::Q6_K) at[i].super += by / 4;
  }
}

// acc[j] += chunk c of 16 rows of W times columns 8 j to 8 j + 7 of x.
template <DType T, int G>
GEMMA_DEVICE void multiply_chunk(const Chunk<T>* w, int c, const Split& x, int first, int columns, float (*acc)[4]) {
  constexpr int kPieces = T == DType::BF16 ? 2 : 4;  // of 32 values
  const int column = lane() / 4, q = lane() % 4;
  GEMMA_UNROLL
  for (int b = 0; b < kPieces; ++b) {
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
      const int at = (c * kPieces + b) * 2 + half;
      GEMMA_UNROLL
      for (int j = 0; j < G; ++j) {
        Word2 fx = {0, 0};
        if (column + 8 * j < columns)
          fx = *reinterpret_cast<const Word2*>(x.units + ((at * x.columns + first + column + 8 * j) * 4 + q) * 4);
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
          const int at = 2 * q + i + 8 * j;
          const float sums = at < columns ? x.sums[(c * kPieces + b) * x.columns + first + at] : 0.0f;
          acc[j][i] = multiply_add(s[0].minimum, sums, acc[j][i]);
          acc[j][i + 2] = multiply_add(s[1].minimum, sums, acc[j][i + 2]);
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

// What the warps have of a group's sums, in shared memory [warps][16][8 G], becomes results: for each row of W and row of x the warps in order,
// then the parts. kOne: a thread a part, which is why there are four lanes a row.
template <int G, bool kOne>
GEMMA_DEVICE void finish(const MatvecArgs& a, int total, int group, int first, int rows, const float* sums) {
  const bool geglu = a.after == After::geglu;
  auto part_sum = [&](int row, int column) {
    float s = 0;
    GEMMA_UNROLL
    for (int w = 0; w < kMatvecWarps; ++w) s += sums[(w * 16 + row) * 8 * G + column];
    return s;
  };
  static_assert(kParts == 3, "the sums below");
  if constexpr (kOne) {
    if (thread_x() >= 64) return;
    const int i = thread_x() / 4, part = thread_x() % 4;
    float s = part < kParts ? part_sum(geglu ? i / 2 + i % 2 * 8 : i, part) : 0.0f;
    s += shuffle_xor(s, 1);
    s += shuffle_xor(s, 2);
    const float up = shuffle_xor(s, 4);
    const int row = geglu ? group * 8 + i / 2 : group * 16 + i;
    if (part == 0 && row < total && !(geglu && i % 2)) put(a, row, 0, geglu ? gelu(s) * up : s);
  } else {
    const int per = geglu ? 8 : 16;
    for (int o = thread_x(); o < per * rows; o += kMatvecThreads) {
      const int i = o % per, n = o / per, row = group * per + i;
      auto sum = [&](int of) {
        return part_sum(of, n * kParts) + part_sum(of, n * kParts + 1) + (part_sum(of, n * kParts + 2) + 0.0f);
      };
      if (row < total) put(a, row, first + n, geglu ? gelu(sum(i)) * sum(i + 8) : sum(i));
    }
  }
}

// Chunks of two rows of W that a lane has asked for: as many as fit in registers.
template <DType T, int G>
GEMMA_HOST_DEVICE constexpr int depth() {
  const bool small = T == DType::BF16 || T == DType::Q4_0 || T == DType::Q5_0;
  return (small ? 4 : 3) - (G > 1 && T != DType::BF16 && T != DType::Q4_0);
}

// y[n, rows] = W norm(x[n, cols]), with an epilogue. Bytes: W once from memory; the parts of x once a group of 16 rows of W, from shared
// memory (kOne: a single row, which each block splits itself) or through L1.
// Layout: a block a multiprocessor, each with every blocks_x()-th group. A group's 16 rows of W and 8 columns of x are fragments of m16n8k16:
// three columns a row of x. Warp w takes chunks w, w + 16, ... along K and asks for `depth` of them ahead, those of the next groups too; the
// warps' sums meet in shared memory. A result's order of additions depends on cols alone. Blocks (i, 0), (i, 1), ... have the same rows of W and
// the next 8 rows of x each: one of them brings a piece of W from memory and the others find it in L2.
template <DType T, int G, bool kOne>
GEMMA_KERNEL GEMMA_BOUNDS(kMatvecThreads, 1) matvec_kernel(MatvecArgs a, Split x) {
  constexpr int kDepth = depth<T, G>();
  GEMMA_DYNAMIC_SHARED(dynamic);
  auto* sums = reinterpret_cast<float*>(dynamic);  // [2][warps][16][8 G]
  const int first = kOne ? 0 : block_y() * kRowsABlock, rows = a.n - first < kRowsABlock ? a.n - first : kRowsABlock;
  const int pieces = static_cast<int>(a.parts[0].w.pieces), total = total_rows(a);
  const int chunks = (a.cols + chunk_values(T) - 1) / chunk_values(T),
            turns = (chunks + kMatvecWarps - 1) / kMatvecWarps;
  const int per = rows_a_group(a), groups = (total + per - 1) / per;
  const bool plain = a.count == 1 || a.after == After::geglu;  // every group in the same matrices

  RowAt at[2];
  Chunk<T> w[kDepth][2];
  int asked_group = block_x(), asked_turn = 0;
  locate<T>(a, total, asked_group, at);
  auto ask = [&](Chunk<T>* to) {
    const int c = asked_turn * kMatvecWarps + warp();
    if (asked_group < groups && c < chunks) {
      to[0] = load_chunk<T>(at[0], c, pieces, lane() % 4);
      to[1] = load_chunk<T>(at[1], c, pieces, lane() % 4);
    }
    if (++asked_turn < turns) return;
    asked_turn = 0;
    asked_group += blocks_x();
    if (plain && (asked_group + 1) * per <= total)
      advance<T>(pieces, per * blocks_x(), at);
    else if (asked_group < groups)
      locate<T>(a, total, asked_group, at);
  };

  allow_next();
  GEMMA_UNROLL
  for (int i = 0; i < kDepth; ++i) ask(w[i]);  // weights do not depend on the kernel before
  if constexpr (kOne) {
    GEMMA_SHARED(float, scratch, kMatvecWarps);
    Float4 norm[kUnits];
    if (a.norm) load_units(a.norm, thread_x(), a.cols, norm);
    wait_for_previous();
    x.units = reinterpret_cast<uint16_t*>(dynamic + 2 * kMatvecWarps * 16 * 8 * sizeof(float));
    x.sums = reinterpret_cast<float*>(x.units + split_bytes(a.cols, 1) / 2);
    x.columns = kParts;
    split_row(a, 0, T == DType::BF16, has_minimum(T), norm, scratch, x);
    sync_block();
  } else {
    wait_for_previous();
  }
  float acc[G][4];
  auto clear = [&] {
    GEMMA_UNROLL
    for (int j = 0; j < G; ++j) {
      GEMMA_UNROLL
      for (int i = 0; i < 4; ++i) acc[j][i] = 0;
    }
  };
  clear();
  for (int group = block_x(), turn = 0, half = 0;;) {
    GEMMA_UNROLL
    for (int i = 0; i < kDepth; ++i) {
      const int c = turn * kMatvecWarps + warp();
      if (c < chunks) multiply_chunk<T, G>(w[i], c, x, first * kParts, rows * kParts, acc);
      ask(w[i]);
      if (++turn == turns) {
        float* mine = sums + (half * kMatvecWarps + warp()) * 16 * 8 * G;
        GEMMA_UNROLL
        for (int j = 0; j < G; ++j) {
          GEMMA_UNROLL
          for (int k = 0; k < 4; ++k)
            mine[(lane() / 4 + k / 2 * 8) * 8 * G + 8 * j + lane() % 4 * 2 + k % 2] = acc[j][k];
        }
        sync_block();  // the other half of `sums` is written next: one barrier a group is enough
        finish<G, kOne>(a, total, group, first, rows, sums + half * kMatvecWarps * 16 * 8 * G);
        group += blocks_x();
        turn = 0;
        half ^= 1;
        clear();
      }
      if (group >= groups) return;
    }
  }
}

// Of more weights than this, blocks that begin together read faster: then they pass through the same stretch of W, and few addresses want
// translating at a time. On an H200, gate and up of the 2B shape in bf16 (134 MB) took 38 us so, and 57 to 62 where blocks began as those
// of the kernel before ended.
constexpr int64_t kApart = 48 << 20;
int64_t weight_bytes(const MatvecArgs& a) {
  int64_t bytes = 0;
  for (int p = 0; p < a.count; ++p) bytes += a.parts[p].w.rows * a.parts[p].w.pieces * (a.parts[p].w.more ? 32 : 16);
  return bytes;
}

// Shared memory that a row of x takes in each block.
template <DType T>
size_t one_row_bytes(int64_t cols) {
  return static_cast<size_t>(split_bytes(cols, 1) + (has_minimum(T) ? sums_bytes(cols, 1) : 0));
}

template <DType T, int G, bool kOne>
void launch_product(Device& d, const MatvecArgs& a, const Split& x) {
  size_t shared = 2 * kMatvecWarps * 16 * 8 * G * sizeof(float);
  if (kOne) shared += one_row_bytes<T>(a.cols);
  const int of_x = kOne ? 1 : (a.n + kRowsABlock - 1) / kRowsABlock;
  const int per = rows_a_group(a), groups = (total_rows(a) + per - 1) / per;
  const int at_once = d.processors() / of_x, of_w = groups < at_once ? groups : at_once < 1 ? 1 : at_once;
  d.launch_one("matvec", matvec_kernel<T, G, kOne>, {of_w, of_x}, kMatvecThreads, shared, weight_bytes(a) > kApart, a,
               x);
}

struct Matvec {
  Device& d;
  MatvecArgs a;
  template <DType T>
  void run() const {
    constexpr bool minimum = has_minimum(T);
    if (a.n == 1 && one_row_bytes<T>(a.cols) + (18 << 10) <= d.shared_limit())
      return launch_product<T, 1, true>(d, a, {});
    MatvecArgs s = a;
    for (int first = 0; first < a.n; first += kSliceRows) {
      s.n = a.n - first < kSliceRows ? a.n - first : kSliceRows;
      if (a.pick)
        s.pick = a.pick + first;
      else
        s.x = a.x + first * a.x_stride;
      for (int p = 0; p < a.count; ++p)
        if (a.parts[p].out) s.parts[p].out = a.parts[p].out + first * a.parts[p].stride;
      const Split x{reinterpret_cast<uint16_t*>(a.scratch),
                    reinterpret_cast<float*>(a.scratch + split_bytes(a.cols, kSliceRows)), s.n * kParts};
      d.launch("split", split_kernel, {s.n}, kMatvecThreads, 0, s, T == DType::BF16, minimum, x);
      if (s.n <= 2)
        launch_product<T, 1, false>(d, s, x);
      else if (s.n <= 5)
        launch_product<T, 2, false>(d, s, x);
      else
        launch_product<T, 3, false>(d, s, x);
    }
  }
};

}  // namespace

size_t matvec_scratch_bytes(int64_t cols) {
  return static_cast<size_t>(split_bytes(cols, kSliceRows) + sums_bytes(cols, kSliceRows));
}

void matvec(Device& d, DType type, const MatvecArgs& a) { with_type(type, Matvec{d, a}); }

}  // namespace gemma::gpu
