// Products of few rows with a weight matrix: decode, where all that counts is how fast weights stream in.
#include "kernels.h"

namespace gemma::gpu {

namespace {

constexpr int kMatvecWarps = kBlockThreads / 32;
constexpr int kStaged = 16384;  // activations in shared memory, over all rows of the launch

// Activations are staged in runs of 32 with 4 floats between them: lanes that read 16 bytes at the same place of neighbouring pieces
// then meet different banks.
GEMMA_HOST_DEVICE int staged_at(int i) { return i / 32 * 36 + i % 32; }

// The rows of W that a warp has of a group, each in one of the parts.
template <int R>
struct WarpRows {
  int part[R];
  int64_t row[R];
};

// Past the end the last row is computed again, and dropped.
template <int R>
GEMMA_DEVICE WarpRows<R> choose(const MatvecArgs& a, int64_t total, int64_t group) {
  WarpRows<R> chosen;
  GEMMA_UNROLL
  for (int j = 0; j < R; ++j) {
    int64_t r = (group * kMatvecWarps + warp()) * R + j;
    r = r < total ? r : total - 1;
    int part = 0;
    if (a.after == After::geglu) {  // a gate row, its up row, the next gate row, ...
      part = static_cast<int>(r & 1);
      r >>= 1;
    } else {
      while (part + 1 < a.count && r >= a.parts[part].w.rows) r -= a.parts[part++].w.rows;
    }
    chosen.part[j] = part;
    chosen.row[j] = r;
  }
  return chosen;
}

template <int R>
GEMMA_DEVICE void prefetch_rows(const MatvecArgs& a, const WarpRows<R>& c) {
  GEMMA_UNROLL
  for (int j = 0; j < R; ++j) {
    const Planes& w = a.parts[c.part[j]].w;
    for (int64_t i = lane() * 8; i < w.pieces; i += 32 * 8) {
      prefetch(w.low + (c.row[j] * w.pieces + i) * 16);
      if (w.more) prefetch(w.more + (c.row[j] * w.pieces + i) * 16);
    }
  }
}

// Rows [first, first + rows) of x, at most N, of which `tile` values at a time are in shared memory.
template <int N>
struct Activations {
  float *x, *scale;
  int first, rows, tile, pitch;

  GEMMA_DEVICE const float* row(const MatvecArgs& a, int n) const {
    return a.x + (a.pick ? a.pick[first + n] : first + n) * a.x_stride;
  }
  GEMMA_DEVICE void find_scales(const MatvecArgs& a, float* scratch) const {
    for (int n = 0; n < rows; ++n) {
      const float s = inverse_rms(row(a, n), a.cols, a.eps, scratch);
      if (thread_x() == 0) scale[n] = s;
    }
    sync_block();
  }
  // Values from `begin` on, normed; zeros for rows and columns that are not there.
  GEMMA_DEVICE void stage(const MatvecArgs& a, int begin) const {
    for (int n = 0; n < N; ++n)
      for (int i = thread_x(); i < tile; i += kBlockThreads) {
        float v = 0;
        if (n < rows && begin + i < a.cols) {
          v = row(a, n)[begin + i];
          if (a.norm) v = v * scale[n] * a.norm[begin + i];
        }
        x[n * pitch + staged_at(i)] = v;
      }
    sync_block();
  }
};

// acc[j][n] += piece j times the staged values from `at` on.
template <DType T, int N, int R>
GEMMA_DEVICE void multiply_piece(const Piece<T>* w, const float* x, int pitch, int at, float (*acc)[N]) {
  float half[R][N], sum[N];  // of quantised weights: sums that still want their scale, and of x
  GEMMA_UNROLL
  for (int n = 0; n < N; ++n) {
    sum[n] = 0;
    GEMMA_UNROLL
    for (int j = 0; j < R; ++j) half[j][n] = 0;
  }
  GEMMA_UNROLL
  for (int p = 0; p < piece_values(T) / 8; ++p) {
    float v[R][8];
    GEMMA_UNROLL
    for (int j = 0; j < R; ++j) eight_values<T>(w[j], p, v[j]);
    GEMMA_UNROLL
    for (int n = 0; n < N; ++n) {
      const float* from = x + n * pitch + staged_at(at + 8 * p);
      const Float4 low = *reinterpret_cast<const Float4*>(from), high = *reinterpret_cast<const Float4*>(from + 4);
      const float u[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      GEMMA_UNROLL
      for (int i = 0; i < 8; ++i) {
        if constexpr (has_minimum(T)) sum[n] += u[i];
        GEMMA_UNROLL
        for (int j = 0; j < R; ++j) {
          float& to = T == DType::BF16 ? acc[j][n] : half[j][n];
          to = multiply_add(v[j][i], u[i], to);
        }
      }
      if constexpr (T != DType::BF16) {
        if (p % 2 == 0) continue;
        GEMMA_UNROLL
        for (int j = 0; j < R; ++j) {
          acc[j][n] = multiply_add(p == 1 ? w[j].scale : w[j].second, half[j][n], acc[j][n]);
          half[j][n] = 0;
        }
      }
    }
  }
  if constexpr (has_minimum(T)) {
    GEMMA_UNROLL
    for (int n = 0; n < N; ++n) {
      GEMMA_UNROLL
      for (int j = 0; j < R; ++j) acc[j][n] = multiply_add(w[j].minimum, sum[n], acc[j][n]);
    }
  }
}

// What becomes of the sums of `here` rows of W and `rows` rows of x; by one lane.
template <int N, int R>
GEMMA_DEVICE void finish(const MatvecArgs& a, const WarpRows<R>& c, int64_t here, int first, int rows,
                         const float (*acc)[N]) {
  GEMMA_UNROLL
  for (int j = 0; j < R; ++j) {
    if (j >= here) break;
    GEMMA_UNROLL
    for (int n = 0; n < N; ++n) {
      if (n >= rows) break;
      const Part& p = a.parts[a.after == After::geglu ? 0 : c.part[j]];
      float* out = p.out + (first + n) * p.stride + c.row[j];
      if (a.after == After::geglu) {
        if (j % 2 == 0) *out = gelu(acc[j][n]) * acc[j + 1 < R ? j + 1 : j][n];
      } else if (a.after == After::add) {
        *out += acc[j][n];
      } else {
        *out = acc[j][n];
      }
    }
  }
}

// y[n, rows] = W norm(x[n, cols]), with an epilogue. Bytes: W once from memory; x once a block (from L2), or once for every group of
// rows where it does not fit.
// Layout: as many blocks as run at once; a block takes N rows of x and every blocks_x()-th group of 16 rows of W, a warp R rows of it;
// lane l takes pieces l, l + 32, ... of each, R loads of 16 bytes in flight at a time and more by unrolling; float32 sums a lane, then a
// tree over the lanes. A row's order of additions depends on cols alone. Blocks (i, 0), (i, 1), ... have the same rows of W and the next N
// rows of x each. They run side by side, so that one of them brings a piece of W from memory and the others find it in L2.
template <DType T, int N, int R>
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 2) matvec_kernel(MatvecArgs a) {
  constexpr int kPieceValues = piece_values(T), kTile = kStaged / N;
  GEMMA_DYNAMIC_SHARED(dynamic);
  GEMMA_SHARED(float, scratch, kMatvecWarps + 1);
  GEMMA_SHARED(float, scale, N);
  const int tile = a.cols < kTile ? (a.cols + 31) / 32 * 32 : kTile;
  const int first = N == kRowsABlock ? block_y() * N : 0, rows = a.n - first < N ? a.n - first : N;
  const Activations<N> x{reinterpret_cast<float*>(dynamic), scale, first, rows, tile, tile / 32 * 36};
  int64_t total = 0;
  for (int p = 0; p < a.count; ++p) total += a.parts[p].w.rows;

  allow_next();
  prefetch_rows(a, choose<R>(a, total, block_x()));  // weights do not depend on the kernel before
  wait_for_previous();
  if (a.norm) x.find_scales(a, scratch);
  const bool whole = a.cols <= tile;
  if (whole) x.stage(a, 0);

  constexpr int kGroup = kMatvecWarps * R;
  for (int64_t group = block_x(); group * kGroup < total; group += blocks_x()) {
    const WarpRows<R> c = choose<R>(a, total, group);
    float acc[R][N];
    GEMMA_UNROLL
    for (int j = 0; j < R; ++j) {
      GEMMA_UNROLL
      for (int n = 0; n < N; ++n) acc[j][n] = 0;
    }
    for (int begin = 0; begin < a.cols; begin += tile) {
      if (!whole) {
        sync_block();
        x.stage(a, begin);
      }
      const int64_t end = begin + tile < a.cols ? (begin + tile) / kPieceValues : a.parts[0].w.pieces;
      const int from = begin / kPieceValues;
#if defined(__CUDACC__)
#pragma unroll(N == 1 ? 4 : 1)
#endif
      for (int64_t piece = from + lane(); piece < end; piece += 32) {
        Piece<T> w[R];
        GEMMA_UNROLL
        for (int j = 0; j < R; ++j) w[j] = load_piece<T>(a.parts[c.part[j]].w, c.row[j], piece);
        multiply_piece<T, N, R>(w, x.x, x.pitch, static_cast<int>(piece - from) * kPieceValues, acc);
      }
    }
    GEMMA_UNROLL
    for (int j = 0; j < R; ++j) {
      GEMMA_UNROLL
      for (int n = 0; n < N; ++n) acc[j][n] = warp_sum(acc[j][n]);
    }
    if (lane() == 0) finish<N, R>(a, c, total - (group * kMatvecWarps + warp()) * R, first, rows, acc);
  }
}

template <DType T, int N, int R>
void launch_matvec(Device& d, const MatvecArgs& a) {
  int64_t total = 0;
  for (int p = 0; p < a.count; ++p) total += a.parts[p].w.rows;
  const int per_block = kMatvecWarps * R, tile = a.cols < kStaged / N ? (a.cols + 31) / 32 * 32 : kStaged / N;
  const int of_x = (a.n + N - 1) / N, at_once = 2 * d.processors() / of_x;
  const int64_t groups = (total + per_block - 1) / per_block, of_w = at_once < 1        ? 1
                                                                     : groups < at_once ? groups
                                                                                        : at_once;
  d.launch("matvec", matvec_kernel<T, N, R>, {static_cast<int>(of_w), of_x}, kBlockThreads,
           static_cast<size_t>(N) * (tile / 32 * 36) * sizeof(float), a);
}

struct Matvec {
  Device& d;
  const MatvecArgs& a;
  template <DType T>
  void run() const {
    if (a.n == 1)
      launch_matvec<T, 1, 2>(d, a);
    else if (a.n <= 4)
      launch_matvec<T, 4, 2>(d, a);
    else
      launch_matvec<T, 8, 2>(d, a);
  }
};

}  // namespace

void matvec(Device& d, DType type, const MatvecArgs& a) { with_type(type, Matvec{d, a}); }

}  // namespace gemma::gpu
