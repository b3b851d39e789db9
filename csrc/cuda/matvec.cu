// Products of few rows with a weight matrix: decode, where all that counts is how fast weights stream in.
#include "kernels.h"

namespace gemma::gpu {

namespace {

constexpr int kMatvecWarps = kBlockThreads / 32;
constexpr int kStaged = 16384;  // activations in shared memory, over all rows of the launch

// Activations are staged in runs of 32 with 4 floats between them: lanes that read 16 bytes at the same place of neighbouring pieces
// then meet different banks.
GEMMA_HOST_DEVICE int staged_at(int i) { return i / 32 * 36 + i % 32; }

// y[n, rows] = W norm(x[n, cols]), with an epilogue. Bytes: W once from memory; x once a block (from L2), or once for every group of
// rows where it does not fit.
// Layout: as many blocks as run at once; a block takes N rows of x and every blocks_x()-th group of 16 rows of W, a warp R rows of it;
// lane l takes pieces l, l + 32, ... of each, R loads of 16 bytes in flight at a time and more by unrolling; float32 sums a lane, then a
// tree over the lanes. A row's order of additions depends on cols alone. Blocks (i, 0), (i, 1), ... have the same rows of W and the next N
// rows of x each. They run side by side, so that one of them brings a piece of W from memory and the others find it in L2.
template <DType T, int N, int R>
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 2) matvec_kernel(MatvecArgs a) {
  constexpr int kPieceValues = piece_values(T), kTile = kStaged / N, kGroup = kMatvecWarps * R;
  GEMMA_DYNAMIC_SHARED(dynamic);
  auto* x = reinterpret_cast<float*>(dynamic);
  GEMMA_SHARED(float, scratch, kMatvecWarps + 1);
  GEMMA_SHARED(float, scale, N);
  const int tile = a.cols < kTile ? (a.cols + 31) / 32 * 32 : kTile;  // values staged of a row at a time
  const int pitch = tile / 32 * 36;
  const int first = N == kRowsABlock ? block_y() * N : 0, rows = a.n - first < N ? a.n - first : N;  // of x
  int64_t total = 0;
  for (int p = 0; p < a.count; ++p) total += a.parts[p].w.rows;

  int part[R];
  int64_t row[R];
  // The warp's rows of a group. Past the end the last one is computed again, and dropped.
  auto choose = [&](int64_t group) {
    GEMMA_UNROLL
    for (int j = 0; j < R; ++j) {
      int64_t r = group * kGroup + warp() * R + j;
      r = r < total ? r : total - 1;
      part[j] = 0;
      if (a.after == After::geglu) {  // a gate row, its up row, the next gate row, ...
        part[j] = static_cast<int>(r & 1);
        r >>= 1;
      } else {
        while (part[j] + 1 < a.count && r >= a.parts[part[j]].w.rows) r -= a.parts[part[j]++].w.rows;
      }
      row[j] = r;
    }
  };

  allow_next();
  choose(block_x());
  GEMMA_UNROLL
  for (int j = 0; j < R; ++j) {  // weights do not depend on the kernel before
    const Planes& w = a.parts[part[j]].w;
    for (int64_t i = lane() * 8; i < w.pieces; i += 32 * 8) {
      prefetch(w.low + (row[j] * w.pieces + i) * 16);
      if (w.more) prefetch(w.more + (row[j] * w.pieces + i) * 16);
    }
  }
  wait_for_previous();

  if (a.norm) {
    for (int n = 0; n < rows; ++n) {
      const float s = inverse_rms(a.x + (a.pick ? a.pick[first + n] : first + n) * a.x_stride, a.cols, a.eps, scratch);
      if (thread_x() == 0) scale[n] = s;
    }
    sync_block();
  }
  auto stage = [&](int begin) {
    for (int n = 0; n < N; ++n)
      for (int i = thread_x(); i < tile; i += kBlockThreads) {
        float v = 0;
        if (n < rows && begin + i < a.cols) {
          v = a.x[(a.pick ? a.pick[first + n] : first + n) * a.x_stride + begin + i];
          if (a.norm) v = v * scale[n] * a.norm[begin + i];
        }
        x[n * pitch + staged_at(i)] = v;
      }
    sync_block();
  };
  const bool whole = a.cols <= tile;
  if (whole) stage(0);

  for (int64_t group = block_x(); group * kGroup < total; group += blocks_x()) {
    choose(group);
    float acc[R][N];
    GEMMA_UNROLL
    for (int j = 0; j < R; ++j) {
      GEMMA_UNROLL
      for (int n = 0; n < N; ++n) acc[j][n] = 0;
    }

    for (int begin = 0; begin < a.cols; begin += tile) {
      if (!whole) {
        sync_block();
        stage(begin);
      }
      const int64_t end = begin + tile < a.cols ? (begin + tile) / kPieceValues : a.parts[0].w.pieces;
      const int from = begin / kPieceValues;
#if defined(__CUDACC__)
#pragma unroll(N == 1 ? 4 : 1)
#endif
      for (int64_t piece = from + lane(); piece < end; piece += 32) {
        Piece<T> w[R];
        GEMMA_UNROLL
        for (int j = 0; j < R; ++j) w[j] = load_piece<T>(a.parts[part[j]].w, row[j], piece);
        float half[R][N], sum[N];
        GEMMA_UNROLL
        for (int n = 0; n < N; ++n) {
          sum[n] = 0;
          GEMMA_UNROLL
          for (int j = 0; j < R; ++j) half[j][n] = 0;
        }
        GEMMA_UNROLL
        for (int p = 0; p < kPieceValues / 8; ++p) {
          float v[R][8];
          GEMMA_UNROLL
          for (int j = 0; j < R; ++j) eight_values<T>(w[j], p, v[j]);
          GEMMA_UNROLL
          for (int n = 0; n < N; ++n) {
            const int at = n * pitch + staged_at(static_cast<int>(piece - from) * kPieceValues + 8 * p);
            const Float4 low = *reinterpret_cast<const Float4*>(x + at);
            const Float4 high = *reinterpret_cast<const Float4*>(x + at + 4);
            const float u[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
            GEMMA_UNROLL
            for (int i = 0; i < 8; ++i) {
              if constexpr (T == DType::BF16) {
                GEMMA_UNROLL
                for (int j = 0; j < R; ++j) acc[j][n] = multiply_add(v[j][i], u[i], acc[j][n]);
              } else {
                if constexpr (has_minimum(T)) sum[n] += u[i];
                GEMMA_UNROLL
                for (int j = 0; j < R; ++j) half[j][n] = multiply_add(v[j][i], u[i], half[j][n]);
              }
            }
            if constexpr (T != DType::BF16) {
              if (p == 1 || p == 3) {
                GEMMA_UNROLL
                for (int j = 0; j < R; ++j) {
                  acc[j][n] = multiply_add(p == 1 ? w[j].scale : w[j].second, half[j][n], acc[j][n]);
                  half[j][n] = 0;
                }
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
    }

    GEMMA_UNROLL
    for (int j = 0; j < R; ++j) {
      GEMMA_UNROLL
      for (int n = 0; n < N; ++n) acc[j][n] = warp_sum(acc[j][n]);
    }
    if (lane() != 0) continue;
    GEMMA_UNROLL
    for (int j = 0; j < R; ++j) {
      if (group * kGroup + warp() * R + j >= total) break;
      GEMMA_UNROLL
      for (int n = 0; n < N; ++n) {
        if (n >= rows) break;
        const Part& p = a.parts[a.after == After::geglu ? 0 : part[j]];
        float* out = p.out + (first + n) * p.stride + row[j];
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
