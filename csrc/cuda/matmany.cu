// Products of 9 to 64 rows with a weight matrix: decode of batches. The same multiplications as in matvec.cu, in the same order for each
// result; here activations count as much as weights, so a block keeps many rows of W for every piece of x that it stages.
#include "product.h"

namespace gemma::gpu {

namespace {

constexpr int kManyWarps = 8, kManyThreads = 32 * kManyWarps;  // a block, at most
constexpr int kPair = 2;                                       // groups of 16 rows of W a warp
constexpr int kClasses = kMatvecWarps;  // of chunks: class c % 16 is what warp c % 16 of `matvec` adds up
constexpr int kSplitRows = 4096;        // rows of W at most whose classes are shared out: more make tiles enough
constexpr int kMostStages = 6;
constexpr int kSheet = 25;                       // floats between rows of a sheet: 16 rows, columns of 8 rows of x
constexpr int kSheetBytes = 16 * kSheet * 4;     // one a warp
constexpr int kAddThreads = 128, kAddBatch = 8;  // classes that `add_up` asks for at once

// How a product is shared out. A unit is a tile of W (two groups a warp), a block of rows of x, and a subset of the classes.
struct Plan {
  int warps = 0, tiles = 0, of_x = 0;
  int classes = 0, per = 0, subsets = 0;  // of which there are any chunks; of a unit; of a tile
  int stages = 0;
  uint32_t zero = 0;  // which the compiler does not know
};

// What a block stages at a time: a chunk of columns of W's rows and x. Bytes: x's units [chunk / 16][8 G columns][32] and, where weights have a
// minimum, sums [chunk / 32][8 G] floats; then for each warp low (Q8_0: and more; BF16: both halves of a chunk) [row 4][lane 16 bytes], where
// `row` r is fragment row lane / 4 + 8 (r % 2) of group r / 2, high and scales and super [row 4][8 lanes / 4].
template <DType T, int G>
struct Stage {
  static constexpr int kSteps = chunk_values(T) / 16, kColumns = 8 * G;
  static constexpr int kUnits = kSteps * kColumns * 32, kSums = has_minimum(T) ? kSteps / 2 * kColumns * 4 : 0;
  static constexpr int kLow = (T == DType::BF16 || T == DType::Q8_0 ? 2 : 1) * 4 * 512;
  static constexpr int kHigh = 4 * high_bytes(T), kScales = T == DType::BF16 ? 0 : has_minimum(T) ? 16 : 8;  // a row
  static constexpr int kSuper = T == DType::Q6_K ? 2 : 0;
  static constexpr int kWarp = kLow + 32 * (kHigh + kScales + kSuper);
  static GEMMA_HOST_DEVICE int bytes(int warps) { return kUnits + kSums + warps * kWarp; }
};

// Two pieces of a chunk, `two`-th of them, from a stage, as if they were its first; r as above.
template <DType T, int G>
GEMMA_DEVICE Chunk<T> staged(const uint8_t* warp, int r, int two) {
  using S = Stage<T, G>;
  const int row = r * 8 + lane() / 4, q = lane() % 4;
  Chunk<T> v{};
  if constexpr (T == DType::BF16) {
    v.low = *reinterpret_cast<const Word4*>(warp + r * 1024 + lane() * 16);
    v.more = *reinterpret_cast<const Word4*>(warp + r * 1024 + 512 + lane() * 16);
    return v;
  }
  auto words = [&](const uint8_t* from, Word4& to) {
    const Word2 w = *reinterpret_cast<const Word2*>(from + two * 8);
    to.x = w.x;
    to.y = w.y;
  };
  words(warp + r * 512 + lane() * 16, v.low);
  if constexpr (T == DType::Q8_0) words(warp + (4 + r) * 512 + lane() * 16, v.more);
  const uint8_t* high = warp + S::kLow;
  if constexpr (high_bytes(T) == 4) v.high.x = *reinterpret_cast<const uint32_t*>(high + row * 16 + q * 4) >> 8 * two;
  if constexpr (high_bytes(T) == 8) v.high.x = *reinterpret_cast<const uint32_t*>(high + row * 32 + q * 8 + two * 4);
  const uint8_t* scales = high + 32 * S::kHigh + row * S::kScales;
  if constexpr (T == DType::Q4_1 || T == DType::Q5_1)
    words(scales, v.scales);
  else if constexpr (S::kScales == 16)
    v.scales = *reinterpret_cast<const Word4*>(scales);
  else
    v.scales.x = *reinterpret_cast<const uint32_t*>(scales + two * 4);
  if constexpr (T == DType::Q6_K)
    v.super = *reinterpret_cast<const uint16_t*>(high + 32 * (S::kHigh + S::kScales) + row * 2);
  return v;
}

// acc[g][j] += two pieces of chunk c of group g times columns 8 j to 8 j + 7 of x; for each of them what multiply_chunk of matvec.cu does, in its
// order.
template <DType T, int G>
GEMMA_DEVICE void multiply_two(const uint8_t* stage, int c, int two, uint32_t zero, float (*acc)[G][4]) {
  using S = Stage<T, G>;
  const uint8_t* units = stage + two * 4 * S::kColumns * 32 + lane() * 8;
  const auto* sums = reinterpret_cast<const float*>(stage + S::kUnits) + two * 2 * S::kColumns + lane() % 4 * 2;
  Chunk<T> v[kPair][2];
  GEMMA_UNROLL
  for (int r = 0; r < 2 * kPair; ++r)
    v[r / 2][r % 2] = staged<T, G>(stage + S::kUnits + S::kSums + warp() * S::kWarp, r, two);
  GEMMA_UNROLL
  for (int b = 0; b < 2; ++b) {
    Scales s[kPair][2];
    uint32_t fw[2][kPair][4];  // of both halves of the piece
    GEMMA_UNROLL
    for (int g = 0; g < kPair; ++g) {
      GEMMA_UNROLL
      for (int i = 0; i < 2; ++i) {
        if constexpr (T == DType::Q4_K || T == DType::Q5_K)
          s[g][i] = k_scales(v[g][i].scales, c % 2 * 4 + two * 2 + b);
        else if constexpr (T != DType::BF16)
          s[g][i] = chunk_scales<T>(v[g][i], c, b);
        GEMMA_UNROLL
        for (int half = 0; half < 2; ++half) {
          uint32_t pairs[2];
          fragment<T>(v[g][i], b, half, pairs);
          // BF16: fragments are words of two loads, which only a result of arithmetic parts from them; else they are copied before each mma.
          fw[half][g][i] = T == DType::BF16 ? pairs[0] ^ zero : pairs[0];
          fw[half][g][i + 2] = T == DType::BF16 ? pairs[1] ^ zero : pairs[1];
        }
      }
    }
    auto columns = [&](int j, int half) {
      return *reinterpret_cast<const Word2*>(units + ((2 * b + half) * S::kColumns + 8 * j) * 32);
    };
    if constexpr (T == DType::BF16) {
      GEMMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        GEMMA_UNROLL
        for (int j = 0; j < G; ++j) {
          const Word2 fx = columns(j, half);
          const uint32_t pair[2] = {fx.x, fx.y};
          GEMMA_UNROLL
          for (int g = 0; g < kPair; ++g) mma(acc[g][j], fw[half][g], pair);
        }
      }
    } else {
      GEMMA_UNROLL
      for (int j = 0; j < G; ++j) {
        float sum[kPair][4];  // before scales
        auto close = [&](bool second) {
          GEMMA_UNROLL
          for (int g = 0; g < kPair; ++g) {
            GEMMA_UNROLL
            for (int i = 0; i < 4; ++i) {
              const Scales& scales = s[g][i / 2];
              acc[g][j][i] = multiply_add(second ? scales.second : scales.scale, sum[g][i], acc[g][j][i]);
            }
          }
        };
        GEMMA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Word2 fx = columns(j, half);
          const uint32_t pair[2] = {fx.x, fx.y};
          GEMMA_UNROLL
          for (int g = 0; g < kPair; ++g) {
            if (half == 0 || T == DType::Q6_K)
              mma_new(sum[g], fw[half][g], pair);
            else
              mma(sum[g], fw[half][g], pair);
          }
          if constexpr (T == DType::Q6_K) close(half == 1);
        }
        if constexpr (T != DType::Q6_K) close(false);
        if constexpr (has_minimum(T)) {
          const Float2 of = *reinterpret_cast<const Float2*>(sums + b * S::kColumns + 8 * j);
          GEMMA_UNROLL
          for (int g = 0; g < kPair; ++g) {
            GEMMA_UNROLL
            for (int i = 0; i < 4; ++i)
              acc[g][j][i] = multiply_add(s[g][i / 2].minimum, i % 2 ? of.y : of.x, acc[g][j][i]);
          }
        }
      }
    }
  }
}

// The sums of a group and 24 columns, fragments of a warp, become results of 8 rows of x from row `first` on. `sheet`: shared memory of the warp.
GEMMA_DEVICE void finish_sheet(const MatvecArgs& a, int total, int group, int first, const float (*sum)[4],
                               float* sheet) {
  GEMMA_UNROLL
  for (int j = 0; j < 3; ++j) {
    GEMMA_UNROLL
    for (int k = 0; k < 4; ++k) sheet[(lane() / 4 + k / 2 * 8) * kSheet + 8 * j + lane() % 4 * 2 + k % 2] = sum[j][k];
  }
  sync_warp();
  const bool geglu = a.after == After::geglu;
  const int per = rows_a_group(a);
  for (int o = lane(); o < per * 8; o += 32) {
    const int i = o % per, n = o / per, row = group * per + i;
    auto parts = [&](int of) {
      const float* s = sheet + of * kSheet + n * kParts;
      return parts_sum(s[0], s[1], s[2]);
    };
    if (row < total && first + n < a.n) put(a, row, first + n, geglu ? gelu(parts(i)) * parts(i + 8) : parts(i));
  }
  sync_warp();  // before the sheet is written again
}

// y[n, rows] = W norm(x[n, cols]), with an epilogue; x's parts are there. Bytes: W once from memory; the parts of x once a tile, from L2; from
// shared memory, where both pass through a ring of stages, the parts of x once for every 32 rows of W.
// Layout: a block a multiprocessor, each with every blocks_x()-th unit. A unit's steps are its chunks, class after class; a warp has two
// groups of its tile and all columns of x. `matvec` adds the chunks of a class up and then the classes: so a class has sums of its own, which
// are added to the total when it ends, and results are the same bits. Matrices of few rows make too few tiles: their classes are shared out among
// blocks, which leave the sums of each, [class][group][block of x][column / 8][lane], to `add_up`.
template <DType T, int G>
GEMMA_KERNEL GEMMA_BOUNDS(kManyThreads, 1) many_kernel(MatvecArgs a, Split x, Plan p, bool early, Float4* partial) {
  using S = Stage<T, G>;
  constexpr int kRows = 8 * G / kParts;
  GEMMA_DYNAMIC_SHARED(dynamic);
  auto* sheet = reinterpret_cast<float*>(dynamic + warp() * kSheetBytes);
  const int threads = 32 * p.warps, size = S::bytes(p.warps), q = lane() % 4;
  auto stage = [&](int slot) { return dynamic + p.warps * kSheetBytes + slot * size; };
  const int pieces = static_cast<int>(a.parts[0].w.pieces), total = total_rows(a);
  const int groups = groups_of(a), chunks = chunks_of(T, a.cols), units = p.tiles * p.subsets * p.of_x;

  struct Place {
    int unit, chunk, end, column;  // end: the class after the unit's last; column: the first of the unit's
    bool fresh;                    // the unit's first step
  };
  auto enter = [&](int unit) {
    const int begin = unit / (p.of_x * p.tiles) * p.per, end = begin + p.per;
    return Place{unit, begin, end < p.classes ? end : p.classes, unit % p.of_x * S::kColumns, true};
  };
  auto next = [&](Place& at) {
    at.fresh = false;
    at.chunk += kClasses;
    if (at.chunk < chunks) return;
    at.chunk = at.chunk % kClasses + 1;
    if (at.chunk == at.end) at = enter(at.unit + blocks_x());
  };
  auto first_group = [&](int unit) { return (unit / p.of_x % p.tiles * p.warps + warp()) * kPair; };

  RowAt at[2 * kPair], mine = {};  // a lane's own 16 bytes of four rows, and what the lanes of a four share of row q
  uint32_t super = 0;              // what has been asked for and goes to `super_to` before the next barrier
  uint8_t* super_to = nullptr;
  auto copy_weights = [&](const Place& now, int slot) {
    if (now.unit >= units) return;
    const int c = now.chunk;
    if (now.fresh) {
      const int group = first_group(now.unit);
      GEMMA_UNROLL
      for (int r = 0; r < 2 * kPair; ++r) at[r] = locate_row<T>(a, total, group + r / 2, r % 2, q);
      if constexpr (T != DType::BF16) mine = locate_row<T>(a, total, group + q / 2, q % 2, 0);
    }
    uint8_t* to = stage(slot) + S::kUnits + S::kSums + warp() * S::kWarp;
    GEMMA_UNROLL
    for (int r = 0; r < 2 * kPair; ++r) {
      if constexpr (T == DType::BF16) {
        GEMMA_UNROLL
        for (int b = 0; b < 2; ++b) {
          const bool there = c * 8 + 4 * b + q < pieces;
          copy16_stream(to + (r * 2 + b) * 512 + lane() * 16, at[r].low + (there ? c * 128 + 64 * b : 0),
                        there ? 16 : 0);
        }
      } else {
        copy16_stream(to + r * 512 + lane() * 16, at[r].low + c * 64, 16);
        if constexpr (T == DType::Q8_0) copy16_stream(to + (4 + r) * 512 + lane() * 16, at[r].more + c * 64, 16);
      }
    }
    if constexpr (T != DType::BF16) {
      const int place = q * 8 + lane() / 4;
      uint8_t* high = to + S::kLow;
      GEMMA_UNROLL
      for (int i = 0; i < S::kHigh / 16; ++i)
        copy16_stream(high + place * S::kHigh + 16 * i, mine.high + c * S::kHigh + 16 * i, 16);
      uint8_t* scales = high + 32 * S::kHigh + place * S::kScales;
      if constexpr (S::kScales == 16)
        copy16_stream(scales, mine.scales + (T == DType::Q4_K || T == DType::Q5_K ? c / 2 : c) * 16, 16);
      else
        copy8(scales, mine.scales + c * 8);
      if constexpr (T == DType::Q6_K) {
        super = *reinterpret_cast<const uint16_t*>(mine.super + c / 2 * 2);
        super_to = high + 32 * (S::kHigh + S::kScales) + place * 2;
      }
    }
  };
  auto settle = [&] {
    if constexpr (T == DType::Q6_K) {
      if (super_to) *reinterpret_cast<uint16_t*>(super_to) = static_cast<uint16_t>(super);
      super_to = nullptr;
    }
  };
  // Columns behind x's last are left as they are: nobody reads what becomes of them.
  auto copy_x = [&](const Place& now, int slot) {
    if (now.unit >= units) return;
    const int here = x.columns - now.column < S::kColumns ? x.columns - now.column : S::kColumns;
    uint8_t* to = stage(slot);
    const auto* from = reinterpret_cast<const uint8_t*>(x.units) +
                       (static_cast<int64_t>(now.chunk * S::kSteps) * x.columns + now.column) * 32;
    for (int i = thread_x(); i < S::kSteps * 2 * S::kColumns; i += threads) {
      const int step = i / (2 * S::kColumns), o = i % (2 * S::kColumns);
      if (o < 2 * here) copy16(to + i * 16, from + (step * x.columns * 32 + o * 16), 16);
    }
    if constexpr (has_minimum(T)) {
      for (int i = thread_x(); i < S::kSteps / 2 * S::kColumns / 4; i += threads) {
        const int piece = i / (S::kColumns / 4), o = i % (S::kColumns / 4) * 4;
        if (o < here)
          copy16(to + S::kUnits + i * 16, x.sums + (now.chunk * S::kSteps / 2 + piece) * x.columns + now.column + o,
                 16);
      }
    }
  };
  auto wait_for_stage = [&] {  // all but the last stages - 2 that were asked for
    switch (p.stages) {
      case 2:
        return copy_wait<0>();
      case 3:
        return copy_wait<1>();
      case 4:
        return copy_wait<2>();
      case 5:
        return copy_wait<3>();
      default:
        return copy_wait<kMostStages - 2>();
    }
  };

  allow_next();
  const int ahead = p.stages - 1;
  Place ask = enter(block_x());
  if (early) {  // weights do not depend on the kernel before
    for (int s = 0; s < ahead; ++s, next(ask)) {
      copy_weights(ask, s);
      settle();
    }
    ask = enter(block_x());
  }
  wait_for_previous();
  for (int s = 0; s < ahead; ++s, next(ask)) {
    if (!early) {
      copy_weights(ask, s);
      settle();
    }
    copy_x(ask, s);
    copy_commit();
  }

  float acc[kPair][G][4], sum[kPair][G][4];  // of the class, and of those before
  auto clear = [](float (*v)[G][4]) {
    GEMMA_UNROLL
    for (int i = 0; i < kPair * G * 4; ++i) v[i / (G * 4)][i / 4 % G][i % 4] = 0;
  };
  clear(acc);
  clear(sum);
  int slot = 0;
  for (Place now = enter(block_x()); now.unit < units;) {
    settle();
    wait_for_stage();
    sync_block();  // this stage is there, and the one before it is free
    const int freed = slot ? slot - 1 : ahead;
    copy_weights(ask, freed);
    copy_x(ask, freed);
    copy_commit();
    next(ask);
    GEMMA_ROLLED
    for (int two = 0; two < S::kSteps / 4; ++two) multiply_two<T, G>(stage(slot), now.chunk, two, p.zero, acc);
    slot = slot == ahead ? 0 : slot + 1;
    const Place done = now;
    next(now);
    if (done.chunk + kClasses < chunks) continue;
    const int group = first_group(done.unit), of_x = done.unit % p.of_x;
    if (p.subsets > 1) {
      GEMMA_UNROLL
      for (int g = 0; g < kPair; ++g) {
        Float4* to = partial + (((done.chunk % kClasses * groups + group + g) * p.of_x + of_x) * G * 32 + lane());
        GEMMA_UNROLL
        for (int j = 0; j < G; ++j)
          if (group + g < groups) to[j * 32] = {acc[g][j][0], acc[g][j][1], acc[g][j][2], acc[g][j][3]};
      }
    } else {
      GEMMA_UNROLL
      for (int g = 0; g < kPair; ++g) {
        GEMMA_UNROLL
        for (int j = 0; j < G; ++j) {
          GEMMA_UNROLL
          for (int i = 0; i < 4; ++i) sum[g][j][i] += acc[g][j][i];
        }
      }
    }
    clear(acc);
    if (!now.fresh || p.subsets > 1) continue;
    GEMMA_UNROLL
    for (int g = 0; g < kPair; ++g) {
      GEMMA_UNROLL
      for (int t = 0; t < G / 3; ++t) finish_sheet(a, total, group + g, of_x * kRows + 8 * t, &sum[g][3 * t], sheet);
    }
    clear(sum);
  }
  copy_wait<0>();
}

// What `many` has left of each class becomes results: the classes in order. Bytes: their sums once. Layout: a warp a group and 8 rows of x.
template <int G>
GEMMA_KERNEL GEMMA_BOUNDS(kAddThreads, 4) add_up_kernel(MatvecArgs a, int classes, int of_x, const Float4* partial) {
  GEMMA_SHARED(float, sheets, kAddThreads / 32 * 16 * kSheet);
  start();
  const int total = total_rows(a), groups = groups_of(a);
  const int of_warp = block_x() * (kAddThreads / 32) + warp(), column = of_warp % (of_x * G / 3) * 3,
            group = of_warp / (of_x * G / 3), first = column * 8 / kParts;
  if (group >= groups || first >= a.n) return;
  const Float4* from = partial + ((group * of_x * G + column) * 32 + lane());
  float sum[3][4] = {};
  for (int c = 0; c < classes; c += kAddBatch) {
    Float4 v[kAddBatch][3];
    GEMMA_UNROLL
    for (int i = 0; i < kAddBatch; ++i) {
      GEMMA_UNROLL
      for (int j = 0; j < 3; ++j)
        if (c + i < classes) v[i][j] = from[((c + i) * groups * of_x * G + j) * 32];
    }
    GEMMA_UNROLL
    for (int i = 0; i < kAddBatch; ++i) {
      GEMMA_UNROLL
      for (int j = 0; j < 3; ++j) {
        if (c + i >= classes) continue;
        sum[j][0] += v[i][j].x;
        sum[j][1] += v[i][j].y;
        sum[j][2] += v[i][j].z;
        sum[j][3] += v[i][j].w;
      }
    }
  }
  finish_sheet(a, total, group, first, sum, sheets + warp() * 16 * kSheet);
}

// Bytes of the sums of each class.
template <int G>
size_t sums_left(int classes, int groups, int of_x) {
  return static_cast<size_t>(classes) * groups * of_x * G * 32 * sizeof(Float4);
}

// The plan that should take the least time, in bytes from memory that a multiprocessor could have had meanwhile. None of this changes results.
template <DType T, int G>
Plan plan_of(const Device& d, const MatvecArgs& a, int of_x, size_t room) {
  using S = Stage<T, G>;
  const int groups = groups_of(a), chunks = chunks_of(T, a.cols), classes = std::min(chunks, kClasses);
  constexpr double kOfL2 = 0.8;  // a byte from L2
  constexpr double kOfFragment =
      T == DType::BF16 ? 700 : 900;  // a multiplication of fragments, of one warp after another
  constexpr double kOfBegin = 50e3, kOfKernel = 70e3;
  const size_t limit = std::max<size_t>(d.shared_limit(), 99 << 10);  // as much as every GPU from 8.0 on has
  Plan best;
  double least = 0;
  for (int warps = 1; warps <= kManyWarps; ++warps) {
    const int64_t room_left = static_cast<int64_t>(limit) - 1024 - warps * kSheetBytes;
    const int64_t fit = room_left / S::bytes(warps);
    if (fit < 2) continue;
    for (int parts = 1; parts <= kClasses; parts *= 2) {
      Plan p;
      p.warps = warps;
      p.of_x = of_x;
      p.tiles = (groups + kPair * warps - 1) / (kPair * warps);
      p.classes = classes;
      p.per = (classes + parts - 1) / parts;
      p.subsets = (classes + p.per - 1) / p.per;
      p.stages = std::min<int>(static_cast<int>(fit), kMostStages);
      if (p.subsets > 1 && (groups * 16 > kSplitRows || sums_left<G>(p.classes, groups, of_x) > room)) break;
      const int units = p.tiles * p.subsets * of_x, rounds = (units + d.processors() - 1) / d.processors();
      const double steps = p.per * ((chunks + kClasses - 1) / kClasses);
      const double bytes = steps * (warps * S::kWarp + kOfL2 * (S::kUnits + S::kSums));
      const double products = steps * S::kSteps * kPair * G * kOfFragment;
      const double sums = p.subsets > 1 ? kOfL2 * p.per * warps * kPair * G * 512 : 0;
      const double again = p.subsets > 1 ? kOfL2 * sums_left<G>(classes, groups, of_x) / d.processors() + kOfKernel : 0;
      const double cost = kOfBegin + rounds * (std::max(bytes, products) * (p.stages == 2 ? 1.5 : 1) + sums) + again;
      if (best.warps == 0 || cost < least) {
        best = p;
        least = cost;
      }
    }
  }
  return best;
}

template <DType T, int G>
void launch_many(Device& d, const MatvecArgs& a, const Split& x, int of_x, uint8_t* sums, size_t room) {
  const Plan p = plan_of<T, G>(d, a, of_x, room);
  auto* partial = reinterpret_cast<Float4*>(sums);
  const int units = p.tiles * p.subsets * of_x;
  const bool apart = weight_bytes(a) > kApart;
  d.launch_one("many", many_kernel<T, G>, {std::min(units, d.processors())}, 32 * p.warps,
               p.warps * kSheetBytes + static_cast<size_t>(p.stages) * Stage<T, G>::bytes(p.warps), apart, a, x, p,
               !apart, partial);
  if (p.subsets == 1) return;
  const int groups = groups_of(a);
  const int warps = groups * of_x * (G / 3), a_block = kAddThreads / 32;
  d.launch("add_up", add_up_kernel<G>, {(warps + a_block - 1) / a_block}, kAddThreads, 0, a, p.classes, of_x,
           static_cast<const Float4*>(partial));
}

struct Many {
  Device& d;
  const MatvecArgs& a;
  const Split& x;
  uint8_t* sums;
  size_t room;
  template <DType T>
  void run() const {
    // Quantised weights want registers of their own, and cost little to read once more.
    if (a.n <= 16 || T != DType::BF16)
      launch_many<T, 6>(d, a, x, (a.n + 15) / 16, sums, room);
    else
      launch_many<DType::BF16, 12>(d, a, x, (a.n + 31) / 32, sums, room);
  }
};

}  // namespace

size_t matmany_scratch_bytes(int64_t rows) {
  const int64_t groups = (rows + 15) / 16;
  return groups * 16 > kSplitRows ? 0 : sums_left<12>(kClasses, static_cast<int>(groups), 2);
}

void matmany(Device& d, DType type, const MatvecArgs& a, const Split& x, uint8_t* sums, size_t room) {
  with_type(type, Many{d, a, x, sums, room});
}

}  // namespace gemma::gpu
