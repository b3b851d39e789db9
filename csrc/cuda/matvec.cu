// Products of 2 to 8 rows with a weight matrix: decode of small batches. As in onerow.cu, but for where x comes from: its parts are there.
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

// What the warps have of a group's sums, in shared memory [warps][16][8 G], becomes results.
template <int G>
GEMMA_DEVICE void finish(const MatvecArgs& a, int total, int group, const float* sums) {
  const bool geglu = a.after == After::geglu;
  const int per = rows_a_group(a);
  for (int o = thread_x(); o < per * a.n; o += kMatvecThreads) {
    const int i = o % per, n = o / per, row = group * per + i;
    auto part = [&](int of, int p) { return warps_sum(sums, 16, 8 * G, of, n * kParts + p); };
    auto sum = [&](int of) { return parts_sum(part(of, 0), part(of, 1), part(of, 2)); };
    if (row < total) put(a, row, n, geglu ? gelu(sum(i)) * sum(i + 8) : sum(i));
  }
}

// Chunks of two rows of W that a lane has asked for: as many as fit in registers.
template <DType T, int G>
GEMMA_HOST_DEVICE constexpr int depth() {
  return (small_chunk(T) ? 4 : 3) - (G > 1 && T != DType::BF16 && T != DType::Q4_0);
}

// y[n, rows] = W x[n, cols], with an epilogue; x is there as its parts. Bytes: W once from memory; the parts of x once a group of 16 rows of W,
// through L1.
// Layout: a block a multiprocessor, each with every blocks_x()-th group. A group's 16 rows of W and 8 columns of x are fragments of m16n8k16:
// three columns a row of x. Warp w takes chunks w, w + 16, ... along K and asks for `depth` of them ahead, those of the next groups too; the
// warps' sums meet in shared memory. A result's order of additions depends on cols alone.
template <DType T, int G>
GEMMA_KERNEL GEMMA_BOUNDS(kMatvecThreads, 1) matvec_kernel(MatvecArgs a, Split x) {
  constexpr int kDepth = depth<T, G>();
  GEMMA_DYNAMIC_SHARED(dynamic);
  auto* sums = reinterpret_cast<float*>(dynamic);  // [2][warps][16][8 G]
  const int pieces = static_cast<int>(a.parts[0].w.pieces), total = total_rows(a);
  const int chunks = chunks_of(T, a.cols), turns = (chunks + kMatvecWarps - 1) / kMatvecWarps;
  const int per = rows_a_group(a), groups = groups_of(a);

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
    if (plain(a) && (asked_group + 1) * per <= total)
      for (RowAt& r : at) r = further<T>(r, per * blocks_x(), pieces);
    else if (asked_group < groups)
      locate<T>(a, total, asked_group, at);
  };

  allow_next();
  GEMMA_UNROLL
  for (int i = 0; i < kDepth; ++i) ask(w[i]);  // weights do not depend on the kernel before
  wait_for_previous();
  // Columns past the last are the last again: a column's results do not depend on other columns.
  const int q = lane() % 4, columns = a.n * kParts;
  const auto column = [&](int c) { return c < columns ? c : columns - 1; };
  const uint16_t* of_lane[G];
  GEMMA_UNROLL
  for (int j = 0; j < G; ++j) of_lane[j] = x.units + (column(lane() / 4 + 8 * j) * 4 + q) * 4;
  float acc[G][4];
  auto clear = [&] {
    GEMMA_UNROLL
    for (int j = 0; j < G; ++j) acc[j][0] = acc[j][1] = acc[j][2] = acc[j][3] = 0;
  };
  clear();
  for (int group = block_x(), turn = 0, half = 0; group < groups;) {
    GEMMA_UNROLL
    for (int i = 0; i < kDepth; ++i) {
      const int c = turn * kMatvecWarps + warp();
      const auto units = [&](int b, int of, int j) {
        return *reinterpret_cast<const Word2*>(of_lane[j] + ((c * pieces_of_32(T) + b) * 2 + of) * x.columns * 16);
      };
      const auto of_x = [&](int b, int j, int i) {
        return x.sums[(c * pieces_of_32(T) + b) * x.columns + column(8 * j + 2 * q + i)];
      };
      if (c < chunks) multiply_chunk<T, G>(w[i], c, units, of_x, acc);
      ask(w[i]);
      if (++turn == turns) {
        float* mine = sums + (half * kMatvecWarps + warp()) * 16 * 8 * G;
        GEMMA_UNROLL
        for (int j = 0; j < G; ++j) {
          GEMMA_UNROLL
          for (int k = 0; k < 4; ++k) mine[(lane() / 4 + k / 2 * 8) * 8 * G + 8 * j + 2 * q + k % 2] = acc[j][k];
        }
        sync_block();  // the other half of `sums` is written next: one barrier a group is enough
        finish<G>(a, total, group, sums + half * kMatvecWarps * 16 * 8 * G);
        group += blocks_x();
        turn = 0;
        half ^= 1;
        clear();
      }
      if (group >= groups) break;
    }
  }
}

template <DType T, int G>
void launch_rows(Device& d, const MatvecArgs& a, const Split& x) {
  d.launch_one("matvec", matvec_kernel<T, G>, {std::min(groups_of(a), d.processors())}, kMatvecThreads,
               2 * kMatvecWarps * 16 * 8 * G * sizeof(float), weight_bytes(a) > kApart, a, x);
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
    if (a.n == 1 && one_row(d, T, a)) return;
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
        launch_rows<T, 1>(d, s, x);
      else if (s.n <= 5)
        launch_rows<T, 2>(d, s, x);
      else
        launch_rows<T, 3>(d, s, x);
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
