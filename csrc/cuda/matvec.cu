// Products of few rows with a weight matrix: decode, where all that counts is how fast weights stream in. They run on the tensor cores
// without rounding anything: a float32 activation is the sum of three bf16 values, and a bf16 or quantised weight less its scale is one.
#include "kernels.h"

namespace gemma::gpu {

namespace {

constexpr int kMatvecWarps = kBlockThreads / 32;
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
GEMMA_DEVICE RowAt row_at(const Planes& w, int64_t row, int q) {
  const int64_t first = row * w.pieces;
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
      const uint32_t e = v.high.x >> (8 * b + 4 * half);
      even |= (e & 1) << 4 | (e & 4) << 18;
      odd |= (e & 2) << 3 | (e & 8) << 17;
    }
    if constexpr (high_bytes(T) == 8) {
      const uint32_t e = (b < 2 ? v.high.x : v.high.y) >> (16 * (b % 2) + 8 * half);
      even |= (e & 0x03) << 4 | (e & 0x30) << 16;
      odd |= (e & 0x0c) << 2 | (e & 0xc0) << 14;
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

// Four values of x[cols] from 4 u on, zeros past its end.
GEMMA_DEVICE Float4 load_unit(const float* x, int u, int cols) {
  if (cols % 4 == 0) return 4 * u < cols ? *reinterpret_cast<const Float4*>(x + 4 * u) : Float4{0, 0, 0, 0};
  auto at = [&](int i) { return i < cols ? x[i] : 0.0f; };
  return {at(4 * u), at(4 * u + 1), at(4 * u + 2), at(4 * u + 3)};
}

// Row n of x to its columns, by a block; normed first where a.norm is there. Every launch does it alike, so that a row's bits are the same
// in any company. Eight loads are in flight a thread; stores come after them, since the compiler cannot know that they hit other memory.
GEMMA_DEVICE void split_row(const MatvecArgs& a, int n, bool bf16, bool minimum, float* scratch, const Split& to) {
  constexpr int kUnits = 8, kStep = kUnits * kBlockThreads;
  const float* x = a.x + (a.pick ? a.pick[n] : n) * a.x_stride;
  const int units = static_cast<int>(padded(a.cols)) / 4;
  Float4 v[kUnits];
  auto load = [&](int from) {
    GEMMA_UNROLL
    for (int i = 0; i < kUnits; ++i) v[i] = load_unit(x, from + i * kBlockThreads, a.cols);
  };
  load(thread_x());
  float scale = 1;
  if (a.norm) {
    float s = 0;
    for (int from = thread_x();; load(from)) {
      GEMMA_UNROLL
      for (int i = 0; i < kUnits; ++i)
        s = multiply_add(v[i].x, v[i].x,
                         multiply_add(v[i].y, v[i].y, multiply_add(v[i].z, v[i].z, multiply_add(v[i].w, v[i].w, s))));
      from += kStep;
      if (from >= units) break;
    }
    scale = 1.0f / sqrtf(block_sum(s, scratch) / static_cast<float>(a.cols) + a.eps);
    if (units > kStep) load(thread_x());
  }
  for (int from = thread_x(); from < units;) {
    if (a.norm) {
      GEMMA_UNROLL
      for (int i = 0; i < kUnits; ++i) {
        const Float4 w = load_unit(a.norm, from + i * kBlockThreads, a.cols);
        v[i] = {v[i].x * scale * w.x, v[i].y * scale * w.y, v[i].z * scale * w.z, v[i].w * scale * w.w};
      }
    }
    GEMMA_UNROLL
    for (int i = 0; i < kUnits; ++i)
      if (from + i * kBlockThreads < units) split_unit(v[i], from + i * kBlockThreads, n, bf16, minimum, to);
    from += kStep;
    if (from < units) load(from);
  }
}

// Bytes: x once, its parts once. Layout: a block a row.
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4) split_kernel(MatvecArgs a, bool bf16, bool minimum, Split to) {
  start();
  GEMMA_SHARED(float, scratch, 9);
  split_row(a, block_x(), bf16, minimum, scratch, to);
}

// ---- the product -----------------------------------------------------------------------------------------------------------

// Rows of W of a group that a lane has: fragment rows lane / 4 and lane / 4 + 8. geglu: a row of gate and the same row of up. Past the end the
// last row is computed again, and dropped.
struct TwoRows {
  int part[2];
  int64_t row[2];
};
GEMMA_DEVICE TwoRows rows_of(const MatvecArgs& a, int64_t total, int64_t group) {
  TwoRows t;
  GEMMA_UNROLL
  for (int i = 0; i < 2; ++i) {
    int64_t r = a.after == After::geglu ? group * 8 + lane() / 4 : group * 16 + lane() / 4 + 8 * i;
    r = r < total ? r : total - 1;
    int part = a.after == After::geglu ? i : 0;
    if (a.after != After::geglu)
      while (part + 1 < a.count && r >= a.parts[part].w.rows) r -= a.parts[part++].w.rows;
    t.part[i] = part;
    t.row[i] = r;
  }
  return t;
}

// acc[j] += chunk c of 16 rows of W times columns 8 j to 8 j + 7 of x.
template <DType T, int G>
GEMMA_DEVICE void multiply_chunk(const Chunk<T>* w, int c, const Split& x, int first, int columns, float (*acc)[4]) {
  constexpr int kPieces = T == DType::BF16 ? 2 : 4;  // of 32 values
  const int column = lane() / 4, q = lane() % 4;
  GEMMA_UNROLL
  for (int b = 0; b < kPieces; ++b) {
    float sum[G][4];
    GEMMA_UNROLL
    for (int j = 0; j < G; ++j) {
      GEMMA_UNROLL
      for (int i = 0; i < 4; ++i) sum[j][i] = 0;
    }
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
          sum[j][i] = 0;
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
        mma(T == DType::BF16 ? acc[j] : sum[j], fw, pair);
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

// What becomes of a group's sums, in shared memory [warps][16][8 G]: a thread a result, warps and parts in order.
template <int G>
GEMMA_DEVICE void finish(const MatvecArgs& a, int64_t total, int64_t group, int first, int rows, const float* sums) {
  const int per = a.after == After::geglu ? 8 : 16;
  for (int o = thread_x(); o < per * rows; o += kBlockThreads) {
    const int i = o % per, n = o / per;
    auto sum_of = [&](int row) {
      float s = 0;
      GEMMA_UNROLL
      for (int w = 0; w < kMatvecWarps; ++w) {
        GEMMA_UNROLL
        for (int p = 0; p < kParts; ++p) s += sums[(w * 16 + row) * 8 * G + n * kParts + p];
      }
      return s;
    };
    int64_t r = group * per + i;
    if (r >= total) continue;
    if (a.after == After::geglu) {
      a.parts[0].out[(first + n) * a.parts[0].stride + r] = gelu(sum_of(i)) * sum_of(i + 8);
      continue;
    }
    int part = 0;
    while (part + 1 < a.count && r >= a.parts[part].w.rows) r -= a.parts[part++].w.rows;
    float* out = a.parts[part].out + (first + n) * a.parts[part].stride + r;
    *out = a.after == After::add ? *out + sum_of(i) : sum_of(i);
  }
}

// y[n, rows] = W norm(x[n, cols]), with an epilogue. Bytes: W once from memory; the parts of x once a group of 16 rows of W, from shared
// memory (kOne: a single row, which each block splits itself) or through L1.
// Layout: as many blocks as run at once, each with every blocks_x()-th group. A group's 16 rows of W and 8 columns of x are fragments of
// m16n8k16: three columns a row of x. Warp w takes chunks w, w + 8, ... along K, all its loads of 16 bytes at once and the next group's
// before this one's sums are made; the warps' sums then meet in shared memory. A result's order of additions depends on cols alone.
// Blocks (i, 0), (i, 1), ... have the same rows of W and the next 8 rows of x each: one of them brings a piece of W from memory and the others
// find it in L2.
template <DType T, int G, bool kOne>
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 2) matvec_kernel(MatvecArgs a, Split x) {
  constexpr int kAtOnce = T == DType::BF16 ? 4 : 2;  // chunks in registers
  GEMMA_DYNAMIC_SHARED(dynamic);
  auto* sums = reinterpret_cast<float*>(dynamic);  // [2][warps][16][8 G]
  const int first = kOne ? 0 : block_y() * kRowsABlock, rows = a.n - first < kRowsABlock ? a.n - first : kRowsABlock;
  const int pieces = static_cast<int>(a.parts[0].w.pieces), q = lane() % 4;
  const int chunks = (a.cols + chunk_values(T) - 1) / chunk_values(T);
  int64_t total = 0;
  for (int p = 0; p < (a.after == After::geglu ? 1 : a.count); ++p) total += a.parts[p].w.rows;
  const int64_t per = a.after == After::geglu ? 8 : 16;

  RowAt at[2];
  Chunk<T> w[kAtOnce][2];
  auto locate = [&](int64_t group) {
    const TwoRows t = rows_of(a, total, group);
    at[0] = row_at<T>(a.parts[t.part[0]].w, t.row[0], q);
    at[1] = row_at<T>(a.parts[t.part[1]].w, t.row[1], q);
  };
  auto load = [&](int from) {
    GEMMA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int c = from + i * kMatvecWarps;
      if (c >= chunks) break;
      w[i][0] = load_chunk<T>(at[0], c, pieces, q);
      w[i][1] = load_chunk<T>(at[1], c, pieces, q);
    }
  };

  allow_next();
  int64_t group = block_x();
  locate(group);
  load(warp());  // weights do not depend on the kernel before
  if (kOne && a.norm && thread_x() * 32 < a.cols) prefetch(a.norm + thread_x() * 32);
  wait_for_previous();
  if constexpr (kOne) {
    GEMMA_SHARED(float, scratch, 9);
    x.units = reinterpret_cast<uint16_t*>(dynamic + 2 * kMatvecWarps * 16 * 8 * sizeof(float));
    x.sums = reinterpret_cast<float*>(x.units + split_bytes(a.cols, 1) / 2);
    x.columns = kParts;
    split_row(a, 0, T == DType::BF16, has_minimum(T), scratch, x);
    sync_block();
  }
  for (int turn = 0;; turn ^= 1) {
    float acc[G][4];
    GEMMA_UNROLL
    for (int j = 0; j < G; ++j) {
      GEMMA_UNROLL
      for (int i = 0; i < 4; ++i) acc[j][i] = 0;
    }
    for (int from = warp();;) {
      GEMMA_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int c = from + i * kMatvecWarps;
        if (c < chunks) multiply_chunk<T, G>(w[i], c, x, first * kParts, rows * kParts, acc);
      }
      from += kAtOnce * kMatvecWarps;
      if (from >= chunks) break;
      load(from);
    }
    const int64_t next = group + blocks_x();
    const bool more = next * per < total;
    if (more) {
      locate(next);
      load(warp());
    }
    float* mine = sums + (turn * kMatvecWarps + warp()) * 16 * 8 * G;
    GEMMA_UNROLL
    for (int j = 0; j < G; ++j) {
      GEMMA_UNROLL
      for (int i = 0; i < 4; ++i) mine[(lane() / 4 + i / 2 * 8) * 8 * G + 8 * j + q * 2 + i % 2] = acc[j][i];
    }
    sync_block();  // the other half of `sums` is written next: one barrier a group is enough
    finish<G>(a, total, group, first, rows, sums + turn * kMatvecWarps * 16 * 8 * G);
    if (!more) return;
    group = next;
  }
}

template <DType T, int G, bool kOne>
void launch_product(Device& d, const MatvecArgs& a, const Split& x) {
  int64_t total = 0;
  for (int p = 0; p < (a.after == After::geglu ? 1 : a.count); ++p) total += a.parts[p].w.rows;
  size_t shared = 2 * kMatvecWarps * 16 * 8 * G * sizeof(float);
  if (kOne) shared += static_cast<size_t>(split_bytes(a.cols, 1) + (has_minimum(T) ? sums_bytes(a.cols, 1) : 0));
  const int of_x = kOne ? 1 : (a.n + kRowsABlock - 1) / kRowsABlock;
  const int fit = 2 * (shared + 2048) <= d.shared_limit() ? 2 : 1;
  const int64_t per = a.after == After::geglu ? 8 : 16, groups = (total + per - 1) / per;
  const int64_t at_once = fit * d.processors() / of_x, of_w = groups < at_once ? groups : at_once < 1 ? 1 : at_once;
  d.launch("matvec", matvec_kernel<T, G, kOne>, {static_cast<int>(of_w), of_x}, kBlockThreads, shared, a, x);
}

struct Matvec {
  Device& d;
  MatvecArgs a;
  template <DType T>
  void run() const {
    constexpr bool minimum = has_minimum(T);
    const size_t alone = static_cast<size_t>(split_bytes(a.cols, 1) + (minimum ? sums_bytes(a.cols, 1) : 0));
    if (a.n == 1 && alone + (10 << 10) <= d.shared_limit()) return launch_product<T, 1, true>(d, a, {});
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
      d.launch("split", split_kernel, {s.n}, kBlockThreads, 0, s, T == DType::BF16, minimum, x);
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
