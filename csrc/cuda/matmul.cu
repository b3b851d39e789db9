// Products of many rows on the tensor cores: prefill and scoring.
#include "kernels.h"

namespace gemma::gpu {

namespace {

constexpr int kM = 128, kN = 128, kK = 32;  // a block's tile
constexpr int kPitch = kK + 8;              // values between rows of a tile: eight rows meet all banks once

// A row's half of a piece, 16 values, as bf16.
template <DType T>
GEMMA_DEVICE void store_half(const Piece<T>& p, int half, uint16_t* to) {
  float v[16];
  if (half == 0) {
    eight_scaled<T>(p, 0, v);
    eight_scaled<T>(p, 1, v + 8);
  } else {
    eight_scaled<T>(p, 2, v);
    eight_scaled<T>(p, 3, v + 8);
  }
  GEMMA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const float* u = v + 8 * i;
    *reinterpret_cast<Word4*>(to + 8 * i) = {bf16_pair(u[0], u[1]), bf16_pair(u[2], u[3]), bf16_pair(u[4], u[5]),
                                             bf16_pair(u[6], u[7])};
  }
}

// out[m, rows] (+)= x W^T, bf16 by bf16 with float32 sums. Bytes: W once for every 128 rows of x, x once for every 128 of W (from L2).
// Layout: a block owns 128 x 128 results and walks K 32 values at a time through two stages of shared memory; x and bf16 weights
// come by cp.async, other weights through registers as bf16 values, one stage ahead. Its 8 warps are 2 x 4, each with 64 x 32 results:
// 4 x 4 fragments of m16n8k16. A result's order of additions depends on K alone.
template <DType T>
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 2) matmul_kernel(MatmulArgs a) {
  start();
  GEMMA_SHARED(uint16_t, xs, 2 * kM * kPitch);
  GEMMA_SHARED(uint16_t, ws, 2 * kN * kPitch);
  const int t = thread_x();
  const int64_t m0 = static_cast<int64_t>(block_y()) * kM, n0 = static_cast<int64_t>(block_x()) * kN;
  const int wm = warp() / 4 * 64, wn = warp() % 4 * 32;

  auto load_x = [&](int stage, int k) {
    GEMMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int row = (t + i * kBlockThreads) / 4, column = t % 4 * 8;
      const bool in = m0 + row < a.m;
      copy16(xs + (stage * kM + row) * kPitch + column, a.x + (in ? m0 + row : 0) * a.k + k + column, in ? 16 : 0);
    }
    if constexpr (T == DType::BF16) {
      GEMMA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = (t + i * kBlockThreads) / 4, piece = t % 4;
        const bool in = n0 + row < a.w.rows && k / 8 + piece < a.w.pieces;
        copy16(ws + (stage * kN + row) * kPitch + piece * 8,
               a.w.low + (in ? (n0 + row) * a.w.pieces + k / 8 + piece : 0) * 16, in ? 16 : 0);
      }
    }
    copy_commit();
  };
  const int wrow = t / 2, whalf = t % 2;
  const int64_t source = n0 + wrow < a.w.rows ? n0 + wrow : a.w.rows - 1;  // rows past the end are dropped below
  auto store_w = [&](int stage, const Piece<T>& p) {
    store_half<T>(p, whalf, ws + (stage * kN + wrow) * kPitch + 16 * whalf);
  };

  float acc[4][4][4];
  GEMMA_UNROLL
  for (int i = 0; i < 4; ++i) {
    GEMMA_UNROLL
    for (int j = 0; j < 4; ++j) {
      GEMMA_UNROLL
      for (int c = 0; c < 4; ++c) acc[i][j][c] = 0;
    }
  }

  load_x(0, 0);
  if constexpr (T != DType::BF16) store_w(0, load_piece<T>(a.w, source, 0));
  for (int k = 0, stage = 0; k < a.k; k += kK, stage ^= 1) {
    const bool more = k + kK < a.k;
    Piece<T> next{};
    if (more) {
      load_x(stage ^ 1, k + kK);
      if constexpr (T != DType::BF16) next = load_piece<T>(a.w, source, (k + kK) / 32);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    sync_block();
    GEMMA_UNROLL
    for (int kk = 0; kk < kK; kk += 16) {
      uint32_t fx[4][4], fw[2][4];
      GEMMA_UNROLL
      for (int i = 0; i < 4; ++i)
        load_matrices(fx[i], xs + (stage * kM + wm + 16 * i + lane() % 16) * kPitch + kk + lane() / 16 * 8);
      GEMMA_UNROLL
      for (int j = 0; j < 2; ++j)
        load_matrices(
            fw[j], ws + (stage * kN + wn + 16 * j + lane() % 8 + lane() / 16 * 8) * kPitch + kk + lane() / 8 % 2 * 8);
      GEMMA_UNROLL
      for (int i = 0; i < 4; ++i) {
        GEMMA_UNROLL
        for (int j = 0; j < 4; ++j) mma(acc[i][j], fx[i], fw[j / 2] + 2 * (j % 2));
      }
    }
    if constexpr (T != DType::BF16)
      if (more) store_w(stage ^ 1, next);
    sync_block();
  }

  GEMMA_UNROLL
  for (int i = 0; i < 4; ++i) {
    GEMMA_UNROLL
    for (int j = 0; j < 4; ++j) {
      GEMMA_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int64_t row = m0 + wm + 16 * i + lane() / 4 + 8 * (c / 2);
        const int64_t column = n0 + wn + 8 * j + lane() % 4 * 2 + c % 2;
        if (row >= a.m || column >= a.w.rows) continue;
        const int64_t at = row * a.stride + column;
        if (a.out16)
          a.out16[at] = bf16_of(acc[i][j][c]);
        else
          a.out[at] = a.add ? a.out[at] + acc[i][j][c] : acc[i][j][c];
      }
    }
  }
}

struct Matmul {
  Device& d;
  const MatmulArgs& a;
  template <DType T>
  void run() const {
    d.launch("matmul", matmul_kernel<T>, {static_cast<int>((a.w.rows + kN - 1) / kN), (a.m + kM - 1) / kM},
             kBlockThreads, 0, a);
  }
};

}  // namespace

void matmul(Device& d, DType type, const MatmulArgs& a) { with_type(type, Matmul{d, a}); }

}  // namespace gemma::gpu
