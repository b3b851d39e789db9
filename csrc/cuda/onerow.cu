// Products of one row with a weight matrix: decode, where all that counts is how fast weights stream in. They run on the tensor cores
// without rounding anything: a float32 activation is the sum of three bf16 values, and a bf16 or quantised weight less its scale is one.
#include "product.h"

namespace gemma::gpu {

namespace {

// Groups between two barriers, where there are many: they share what is read of x, and the wait for the slowest warp.
constexpr int kManyGroups = 4;

// Shared memory of a block, in turn: sums [2][warps][16 R][4], a float a warp, the row.
GEMMA_HOST_DEVICE constexpr int sums_of_groups(int R) { return 2 * kMatvecWarps * 16 * R * 4 * 4; }
int64_t shared_bytes(DType t, int R, int64_t cols) {
  return sums_of_groups(R) + kMatvecWarps * 4 + split_bytes(cols, 1) + (has_minimum(t) ? sums_bytes(cols, 1) : 0);
}

// Chunks of two rows of W that a lane has asked for: as many as fit in registers; where R > 1, a divisor of R.
GEMMA_HOST_DEVICE constexpr int chunks_ahead(DType t, int R) { return small_chunk(t) ? 4 : R == 1 ? 3 : 2; }

// What the warps have of R groups' sums, in shared memory [warps][16 R][4], becomes results: four threads a row, a part each.
template <int R>
GEMMA_DEVICE void finish_units(const MatvecArgs& a, int total, int unit, const float* sums) {
  if (thread_x() >= 64 * R) return;
  const int r = thread_x() / 64, i = thread_x() % 64 / 4, part = thread_x() % 4, group = unit * R + r;
  const bool geglu = a.after == After::geglu;
  float s = part < kParts ? warps_sum(sums, 16 * R, 4, 16 * r + (geglu ? i / 2 + i % 2 * 8 : i), part) : 0.0f;
  s += shuffle_xor(s, 1);
  s += shuffle_xor(s, 2);
  const float up = shuffle_xor(s, 4);
  const int row = geglu ? group * 8 + i / 2 : group * 16 + i;
  if (part == 0 && row < total && !(geglu && i % 2)) put(a, row, 0, geglu ? gelu(s) * up : s);
}

// y[rows] = W norm(x[cols]), with an epilogue. Bytes: W once from memory; x once a block, its parts from shared memory.
// Layout: a block a multiprocessor, each with every blocks_x()-th unit of R groups. A group's 16 rows of W and the three parts of x are
// fragments of m16n8k16, of which columns 3 to 7 are nobody's. Warp w takes chunks w, w + 16, ... along K of each of the R groups, and asks
// for some of them before their turn, those of later units too. The warps' sums meet in shared memory. A result's order of additions
// depends on cols alone.
template <DType T, int R>
GEMMA_KERNEL GEMMA_BOUNDS(kMatvecThreads, 1) one_row_kernel(MatvecArgs a) {
  constexpr int kAhead = chunks_ahead(T, R), kSteps = R > kAhead ? R : kAhead, kPieces = pieces_of_32(T);
  static_assert(kSteps % R == 0 && kSteps % kAhead == 0);
  GEMMA_DYNAMIC_SHARED(dynamic);
  auto* sums = reinterpret_cast<float*>(dynamic);
  auto* scratch = reinterpret_cast<float*>(dynamic + sums_of_groups(R));
  Split x;
  x.units = reinterpret_cast<uint16_t*>(scratch + kMatvecWarps);
  x.sums = reinterpret_cast<float*>(x.units + split_bytes(a.cols, 1) / 2);
  x.columns = kParts;
  const int pieces = static_cast<int>(a.parts[0].w.pieces), total = total_rows(a);
  const int chunks = chunks_of(T, a.cols), turns = (chunks + kMatvecWarps - 1) / kMatvecWarps;
  const int per = rows_a_group(a), units = (groups_of(a) + R - 1) / R;
  const int q = lane() % 4, column = lane() / 4 < kParts ? lane() / 4 : kParts - 1;

  RowAt at[2];  // of the first group of the unit
  Chunk<T> w[kAhead][2];
  int asked_unit = block_x(), asked_turn = 0;
  locate<T>(a, total, asked_unit * R, at);
  // Chunks of the unit's groups r = 0, 1, ... in turn.
  auto ask = [&](Chunk<T>* to, int r) {
    const int c = asked_turn * kMatvecWarps + warp();
    if (asked_unit < units && c < chunks) {
      const bool whole = R == 1 || (asked_unit + 1) * R * per <= total;
      GEMMA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const RowAt row =
            whole ? further<T>(at[i], r * per, pieces) : locate_row<T>(a, total, asked_unit * R + r, i, q);
        to[i] = load_chunk<T>(row, c, pieces, q);
      }
    }
    if (r < R - 1 || ++asked_turn < turns) return;
    asked_turn = 0;
    asked_unit += blocks_x();
    if (plain(a) && (asked_unit + 1) * R * per <= total)
      for (RowAt& row : at) row = further<T>(row, per * R * blocks_x(), pieces);
    else if (asked_unit < units)
      locate<T>(a, total, asked_unit * R, at);
  };

  allow_next();
  GEMMA_UNROLL
  for (int i = 0; i < kAhead; ++i) ask(w[i], i % R);  // weights do not depend on the kernel before
  Float4 norm[kUnits];
  if (a.norm) load_units(a.norm, thread_x(), a.cols, norm);
  wait_for_previous();
  split_row(a, 0, T == DType::BF16, has_minimum(T), norm, scratch, x);
  sync_block();

  float acc[R][1][4];
  auto clear = [&] {
    GEMMA_UNROLL
    for (int r = 0; r < R; ++r) acc[r][0][0] = acc[r][0][1] = acc[r][0][2] = acc[r][0][3] = 0;
  };
  clear();
  Word2 fx[kPieces][2];
  float of_x[kPieces][2];
  for (int unit = block_x(), turn = 0, half = 0; unit < units;) {
    GEMMA_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const int r = step % R, c = turn * kMatvecWarps + warp();
      if (c < chunks) {
        if (r == 0) {
          GEMMA_UNROLL
          for (int b = 0; b < kPieces; ++b) {
            GEMMA_UNROLL
            for (int i = 0; i < 2; ++i) {
              const int piece = c * kPieces + b;
              fx[b][i] = *reinterpret_cast<const Word2*>(x.units + (((2 * piece + i) * kParts + column) * 4 + q) * 4);
              if constexpr (has_minimum(T)) of_x[b][i] = x.sums[piece * kParts + (q == 0 ? i : kParts - 1)];
            }
          }
        }
        multiply_chunk<T, 1>(
            w[step % kAhead], c, [&](int b, int i, int) { return fx[b][i]; },
            [&](int b, int, int i) { return of_x[b][i]; }, acc[r]);
      }
      ask(w[step % kAhead], (step + kAhead) % R);
      if (r == R - 1 && ++turn == turns) {
        float* here = sums + half * sums_of_groups(R) / 8;
        if (q < 2) {
          GEMMA_UNROLL
          for (int g = 0; g < R; ++g) {
            GEMMA_UNROLL
            for (int i = 0; i < 2; ++i)
              *reinterpret_cast<Float2*>(here + ((warp() * R + g) * 16 + lane() / 4 + 8 * i) * 4 + 2 * q) = {
                  acc[g][0][2 * i], acc[g][0][2 * i + 1]};
          }
        }
        sync_block();  // the other half of `sums` is written next: one barrier a unit is enough
        finish_units<R>(a, total, unit, here);
        unit += blocks_x();
        turn = 0;
        half ^= 1;
        clear();
      }
      if (unit >= units) break;
    }
  }
}

template <DType T, int R>
bool launch(Device& d, const MatvecArgs& a) {
  const int64_t shared = shared_bytes(T, R, a.cols);
  if (shared + 1024 > static_cast<int64_t>(d.shared_limit())) return false;
  const int units = (groups_of(a) + R - 1) / R;
  // Blocks with units of several groups gain by beginning together from fewer bytes on.
  d.launch_one("one_row", one_row_kernel<T, R>, {std::min(units, d.processors())}, kMatvecThreads,
               static_cast<size_t>(shared), weight_bytes(a) > (R > 1 ? kApart / 2 : kApart), a);
  return true;
}

struct OneRow {
  Device& d;
  const MatvecArgs& a;
  bool& fits;
  template <DType T>
  void run() const {
    const bool many = T != DType::Q8_0 && plain(a) && groups_of(a) >= kManyGroups * d.processors();
    fits = (many && launch<T, kManyGroups>(d, a)) || launch<T, 1>(d, a);
  }
};

}  // namespace

bool one_row(Device& d, DType type, const MatvecArgs& a) {
  bool fits = false;
  with_type(type, OneRow{d, a, fits});
  return fits;
}

}  // namespace gemma::gpu
