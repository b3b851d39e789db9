// Products of many rows on the tensor cores: prefill and scoring.
#include "kernels.h"

namespace gemma::gpu {

namespace {

constexpr int kM = 128, kN = 128, kK = 32;  // a block's tile
constexpr int kPitch = kK + 8;              // values between rows of a tile: eight rows meet all banks once

// Values 8 part to 8 part + 7 of a piece as bf16.
template <DType T>
GEMMA_DEVICE Word4 eight_bf16(const Piece<T>& p, int part) {
  float v[8];
  eight_scaled<T>(p, part, v);
  return eight_to_bf16(v);
}

// A row's half of a piece, 16 values, as bf16.
template <DType T>
GEMMA_DEVICE void store_half(const Piece<T>& p, int half, uint16_t* to) {
  auto* words = reinterpret_cast<Word4*>(to);
  if (half == 0) {
    words[0] = eight_bf16<T>(p, 0);
    words[1] = eight_bf16<T>(p, 1);
  } else {
    words[0] = eight_bf16<T>(p, 2);
    words[1] = eight_bf16<T>(p, 3);
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

// out[rows, 32 `pieces`] = W as bf16, without the padding of its rows to whole fours of pieces. Bytes: W once in, two bytes a value out.
// Layout: a warp has 32 pieces of a row, a lane loads one; by shared memory, so that lanes next to each other store 16 bytes side by side,
// eight values each. There the parts of a piece stand in an order that differs from piece to piece, so that eight lanes meet all banks
// once, in and out.
template <DType T>
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4) dequantise_kernel(Planes w, int pieces, uint16_t* out) {
  allow_next();
  GEMMA_SHARED(Word4, parts, kBlockThreads * 4);
  const int64_t row = static_cast<int64_t>(block_x()) * kBlockThreads / 32 + warp(), first = block_y() * 32;
  const bool in = row < w.rows;
  const int64_t piece = first + lane() < pieces ? first + lane() : pieces - 1;
  Word4* mine = parts + warp() * 128;
  auto place = [](int piece, int part) { return piece * 4 + (part ^ piece / 2 % 4); };
  // Weights do not depend on the kernel before; `out` does, which that may still read.
  const Piece<T> p = load_piece<T>(w, in ? row : 0, piece);
  wait_for_previous();
  if (!in) return;
  GEMMA_UNROLL
  for (int part = 0; part < 4; ++part) mine[place(lane(), part)] = eight_bf16<T>(p, part);
  sync_warp();
  auto* to = reinterpret_cast<Word4*>(out) + (row * pieces + first) * 4;
  GEMMA_UNROLL
  for (int i = lane(); i < 128; i += 32)
    if (first + i / 4 < pieces) to[i] = mine[place(i / 4, i % 4)];
}

struct Dequantise {
  Device& d;
  const Planes& w;
  int pieces;
  uint16_t* out;
  template <DType T>
  void run() const {
    constexpr int kWarps = kBlockThreads / 32;
    if constexpr (T != DType::BF16)
      d.launch("dequantise", dequantise_kernel<T>,
               {static_cast<int>((w.rows + kWarps - 1) / kWarps), (pieces + 31) / 32}, kBlockThreads, 0, w, pieces,
               out);
  }
};

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

void dequantise(Device& d, DType type, const Planes& w, int k, uint16_t* out) {
  with_type(type, Dequantise{d, w, k / 32, out});
}

}  // namespace gemma::gpu
