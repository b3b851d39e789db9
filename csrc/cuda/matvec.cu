// Products of few rows with a weight matrix: decode, where all that counts is how fast weights stream in. They run on the tensor cores
// without rounding anything: a float32 activation is the sum of three bf16 values, and a bf16 or quantised weight less its scale is one.
#include "product.h"

namespace gemma::gpu {

namespace {

constexpr int kSliceRows = 64;  // rows of x a launch, which bounds the scratch

// Bytes: x once, its parts once. Layout: a block a row, or without a norm, for which nobody needs the whole row, 2048 values of it.
GEMMA_KERNEL GEMMA_BOUNDS(kMatvecThreads, 2) split_kernel(MatvecArgs a, bool bf16, bool minimum, Split to) {
  GEMMA_SHARED(float, scratch, kMatvecWarps);
  Float4 norm[kUnits];
  allow_next();
  if (a.norm) load_units(a.norm, thread_x(), a.cols, norm);
  wait_for_previous();
  if (a.norm) return split_row(a, block_x(), bf16, minimum, norm, scratch, to);
  const int n = block_x(), u = block_y() * kMatvecThreads + thread_x();
  const float* x = a.x + (a.pick ? a.pick[n] : n) * a.x_stride;
  if (u < padded(a.cols) / 4) split_unit(load_four(x, 4 * u, a.cols), u, n, bf16, minimum, to);
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
GEMMA_DEVICE void multiply_chunk(const Chunk<T>* w, int c, const Split& x, int columns, float (*acc)[4]) {
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
          fx = *reinterpret_cast<const Word2*>(x.units + ((at * x.columns + column + 8 * j) * 4 + q) * 4);
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
          const float sums = at < columns ? x.sums[(c * kPieces + b) * x.columns + at] : 0.0f;
          acc[j][i] = multiply_add(s[0].minimum, sums, acc[j][i]);
          acc[j][i + 2] = multiply_add(s[1].minimum, sums, acc[j][i + 2]);
        }
      }
    }
  }
}

// What the warps have of a group's sums, in shared memory [warps][16][8 G], becomes results: for each row of W and row of x the warps in order,
// then the parts. kOne: a thread a part, which is why there are four lanes a row.
template <int G, bool kOne>
GEMMA_DEVICE void finish(const MatvecArgs& a, int total, int group, const float* sums) {
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
    for (int o = thread_x(); o < per * a.n; o += kMatvecThreads) {
      const int i = o % per, n = o / per, row = group * per + i;
      auto sum = [&](int of) {
        return part_sum(of, n * kParts) + part_sum(of, n * kParts + 1) + (part_sum(of, n * kParts + 2) + 0.0f);
      };
      if (row < total) put(a, row, n, geglu ? gelu(sum(i)) * sum(i + 8) : sum(i));
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
// warps' sums meet in shared memory. A result's order of additions depends on cols alone.
template <DType T, int G, bool kOne>
GEMMA_KERNEL GEMMA_BOUNDS(kMatvecThreads, 1) matvec_kernel(MatvecArgs a, Split x) {
  constexpr int kDepth = depth<T, G>();
  GEMMA_DYNAMIC_SHARED(dynamic);
  auto* sums = reinterpret_cast<float*>(dynamic);  // [2][warps][16][8 G]
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
      if (c < chunks) multiply_chunk<T, G>(w[i], c, x, a.n * kParts, acc);
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
        finish<G, kOne>(a, total, group, sums + half * kMatvecWarps * 16 * 8 * G);
        group += blocks_x();
        turn = 0;
        half ^= 1;
        clear();
      }
      if (group >= groups) return;
    }
  }
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
  const int per = rows_a_group(a), groups = (total_rows(a) + per - 1) / per;
  d.launch_one("matvec", matvec_kernel<T, G, kOne>, {std::min(groups, d.processors())}, kMatvecThreads, shared,
               weight_bytes(a) > kApart, a, x);
}

size_t scratch_of_x(int64_t cols) {
  return static_cast<size_t>(split_bytes(cols, kSliceRows) + sums_bytes(cols, kSliceRows));
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
                    reinterpret_cast<float*>(a.scratch + split_bytes(a.cols, kSliceRows)),
                    s.n > kRowsABlock ? (s.n * kParts + 3) / 4 * 4 : s.n * kParts};
      const int of_row = a.norm ? 1 : static_cast<int>((padded(a.cols) / 4 + kMatvecThreads - 1) / kMatvecThreads);
      d.launch("split", split_kernel, {s.n, of_row}, kMatvecThreads, 0, s, T == DType::BF16, minimum, x);
      const size_t used = scratch_of_x(a.cols);
      if (s.n > kRowsABlock)
        matmany(d, T, s, x, a.scratch + used, a.scratch_bytes - used);
      else if (s.n <= 2)
        launch_product<T, 1, false>(d, s, x);
      else if (s.n <= 5)
        launch_product<T, 2, false>(d, s, x);
      else
        launch_product<T, 3, false>(d, s, x);
    }
  }
};

}  // namespace

size_t matvec_scratch_bytes(int64_t cols, std::initializer_list<int64_t> rows) {
  size_t most = 0;
  for (int64_t r : rows) most = std::max(most, matmany_scratch_bytes(r));
  return scratch_of_x(cols) + most;
}

void matvec(Device& d, DType type, const MatvecArgs& a) { with_type(type, Matvec{d, a}); }

}  // namespace gemma::gpu
