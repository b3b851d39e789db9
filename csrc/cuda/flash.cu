// Attention of many rows of one sequence on the tensor cores: prefill and scoring.
#include "kernels.h"

namespace gemma::gpu {

namespace {

constexpr int kFlashThreads = 128, kQueries = 64;  // a warp has 16 queries

constexpr int kScores = kSplit / 8;  // fragments of 8 keys a warp's 16 queries have
template <int E>
constexpr int kFlashPitch = E + 8;  // eight rows of a matrix fragment then meet all banks once

// A lane's two queries of its warp's fragments: maximum and sum of the softmax so far.
struct Queries {
  int position[2];  // -1: there is none
  float top[2], sum[2];
};

// s = the products of the warp's queries, 16 rows at q, with 64 keys.
template <int E>
GEMMA_DEVICE void make_scores(const uint16_t* q, const uint16_t* keys, float (*s)[4]) {
  GEMMA_UNROLL
  for (int j = 0; j < kScores; ++j) {
    GEMMA_UNROLL
    for (int c = 0; c < 4; ++c) s[j][c] = 0;
  }
  GEMMA_UNROLL
  for (int d = 0; d < E; d += 16) {
    uint32_t fq[4], fk[4];
    load_matrices(fq, q + lane() % 16 * kFlashPitch<E> + d + lane() / 16 * 8);
    GEMMA_UNROLL
    for (int j = 0; j < kScores / 2; ++j) {
      load_matrices(fk, keys + (16 * j + lane() % 8 + lane() / 16 * 8) * kFlashPitch<E> + d + lane() / 8 % 2 * 8);
      mma(s[2 * j], fq, fk);
      mma(s[2 * j + 1], fq, fk + 2);
    }
  }
}

// Scores of the keys from `block` on become weights, exponentials above the running maximum; what `out` and the sums have so far is
// scaled to a new maximum.
template <int E>
GEMMA_DEVICE void weigh(const AttentionArgs& a, int block, Queries& r, float (*s)[4], float (*out)[4]) {
  GEMMA_UNROLL
  for (int h = 0; h < 2; ++h) {
    float most = r.top[h];
    GEMMA_UNROLL
    for (int j = 0; j < kScores; ++j) {
      GEMMA_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int key = block + 8 * j + lane() % 4 * 2 + c;
        float& x = s[j][2 * h + c];
        const bool seen = key <= r.position[h] && (!a.window || key > r.position[h] - a.window);
        x = seen ? capped(x, a.cap) : -INFINITY;
        most = fmaxf(most, x);
      }
    }
    most = fmaxf(most, shuffle_xor(most, 1));
    most = fmaxf(most, shuffle_xor(most, 2));
    const float base = most == -INFINITY ? 0.0f : most;  // nothing seen yet: every weight is 0
    const float keep = expf(r.top[h] - base);
    float part = 0;
    GEMMA_UNROLL
    for (int j = 0; j < kScores; ++j) {
      GEMMA_UNROLL
      for (int c = 0; c < 2; ++c) {
        float& x = s[j][2 * h + c];
        x = expf(x - base);
        part += x;
      }
    }
    part += shuffle_xor(part, 1);
    part += shuffle_xor(part, 2);
    r.sum[h] = r.sum[h] * keep + part;
    r.top[h] = most;
    GEMMA_UNROLL
    for (int j = 0; j < E / 8; ++j) {
      out[j][2 * h] *= keep;
      out[j][2 * h + 1] *= keep;
    }
  }
}

// out += weights times 64 values
template <int E>
GEMMA_DEVICE void add_values(const float (*s)[4], const uint16_t* values, float (*out)[4]) {
  GEMMA_UNROLL
  for (int k = 0; k < kScores / 2; ++k) {
    const uint32_t fp[4] = {bf16_pair(s[2 * k][0], s[2 * k][1]), bf16_pair(s[2 * k][2], s[2 * k][3]),
                            bf16_pair(s[2 * k + 1][0], s[2 * k + 1][1]), bf16_pair(s[2 * k + 1][2], s[2 * k + 1][3])};
    GEMMA_UNROLL
    for (int j = 0; j < E / 16; ++j) {
      uint32_t fv[4];
      load_matrices_transposed(fv, values + (16 * k + lane() % 16) * kFlashPitch<E> + 16 * j + lane() / 16 * 8);
      mma(out[2 * j], fp, fv);
      mma(out[2 * j + 1], fp, fv + 2);
    }
  }
}

// Softmax(mask(cap(Q K^T))) V for 64 queries of a group: tokens of a tile times the group's heads. Bytes: Q and the results once; K and V
// once a tile for all heads of the group. Layout: block (tile, group), 4 warps of 16 queries. Keys come in blocks of 64 from absolute
// multiples, by cp.async: the next keys while values are multiplied, the next values while scores are made. A lane holds its part of 16 x 64
// scores and of 16 x E results in fragments of m16n8k16; maximum and sum of a query are those of a softmax that runs along the keys.
// A block of keys that a query does not see changes nothing of its results, so these do not depend on the other queries of the tile.
template <int E>
GEMMA_KERNEL GEMMA_BOUNDS(kFlashThreads, 1) flash_kernel(FlashArgs f) {
  start();
  const AttentionArgs& a = f.a;
  GEMMA_DYNAMIC_SHARED(dynamic);
  auto* q = reinterpret_cast<uint16_t*>(dynamic);
  uint16_t* keys = q + kQueries * kFlashPitch<E>;
  uint16_t* values = keys + kSplit * kFlashPitch<E>;
  const Tile tile = f.tiles[block_x()];
  const int group = block_y(), heads = a.H / a.kv.groups;
  const Row first = a.rows[tile.row];
  const int last = first.position + tile.count - 1;  // the last key that any query sees
  const int low = a.window && first.position - a.window + 1 > 0 ? first.position - a.window + 1 : 0;

  auto fetch = [&](bool is_value, int begin, uint16_t* to) {
    if (begin <= last) {
      const auto* from = reinterpret_cast<const uint16_t*>(kv_at(a.kv, first, is_value, group, begin));
      for (int i = thread_x(); i < kSplit * (E / 8); i += kFlashThreads) {
        const int row = i / (E / 8), run = i % (E / 8) * 8;
        copy16(to + row * kFlashPitch<E> + run, from + static_cast<int64_t>(begin + row <= last ? row : 0) * E + run,
               begin + row <= last ? 16 : 0);
      }
    }
    copy_commit();
  };
  const int begin = low / kSplit * kSplit;
  fetch(false, begin, keys);
  fetch(true, begin, values);
  for (int i = thread_x(); i < kQueries * E; i += kFlashThreads) {
    const int query = i / E, d = i % E, token = query / heads, head = group * heads + query % heads;
    q[query * kFlashPitch<E> + d] =
        token < tile.count ? bf16_of(a.q[(static_cast<int64_t>(tile.row + token) * a.H + head) * E + d]) : 0;
  }

  Queries r;
  GEMMA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int token = (warp() * 16 + lane() / 4 + 8 * h) / heads;
    r.position[h] = token < tile.count ? first.position + token : -1;
    r.top[h] = -INFINITY;
    r.sum[h] = 0;
  }
  float out[E / 8][4];
  GEMMA_UNROLL
  for (int j = 0; j < E / 8; ++j) {
    GEMMA_UNROLL
    for (int c = 0; c < 4; ++c) out[j][c] = 0;
  }

  for (int block = begin; block <= last; block += kSplit) {
    copy_wait<1>();
    sync_block();
    float s[kScores][4];
    make_scores<E>(q + warp() * 16 * kFlashPitch<E>, keys, s);
    sync_block();
    fetch(false, block + kSplit, keys);

    weigh<E>(a, block, r, s, out);
    copy_wait<1>();
    sync_block();
    add_values<E>(s, values, out);
    sync_block();
    fetch(true, block + kSplit, values);
  }
  copy_wait<0>();

  GEMMA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int query = warp() * 16 + lane() / 4 + 8 * h, token = query / heads, head = group * heads + query % heads;
    if (token >= tile.count) continue;
    uint16_t* to = f.out + (static_cast<int64_t>(tile.row + token) * a.H + head) * E + lane() % 4 * 2;
    GEMMA_UNROLL
    for (int j = 0; j < E / 8; ++j)
      *reinterpret_cast<uint32_t*>(to + 8 * j) = bf16_pair(out[j][2 * h] / r.sum[h], out[j][2 * h + 1] / r.sum[h]);
  }
}

template <int E>
void launch_flash(Device& d, const FlashArgs& f) {
  d.launch("flash", flash_kernel<E>, {f.tile_count, f.a.kv.groups}, kFlashThreads, size_t{3} * 64 * (E + 8) * 2, f);
}

}  // namespace

bool flash_supports(const KvLayer& kv, int E, int heads_a_group) {
  return !kv.f32 && (E == 32 || E == 64 || E == 128 || E == 256) && heads_a_group <= kQueries;
}
int flash_tile_rows(int heads_a_group) { return kQueries / heads_a_group; }

void flash(Device& d, const FlashArgs& f) {
  switch (f.a.E) {
    case 32:
      return launch_flash<32>(d, f);
    case 64:
      return launch_flash<64>(d, f);
    case 128:
      return launch_flash<128>(d, f);
    default:
      return launch_flash<256>(d, f);
  }
}

}  // namespace gemma::gpu
