// Attention of many rows of one sequence on the tensor cores: prefill and scoring.
#include "kernels.h"

namespace gemma::gpu {

namespace {

constexpr int kQueries = 64;       // a tile; a warp has 16 of them
constexpr int kPart = kSplit / 2;  // keys of a block that a warp has
constexpr int kFlashWarps = kQueries / 16 * (kSplit / kPart), kFlashThreads = 32 * kFlashWarps;
constexpr int kScores = kPart / 8;  // fragments of 8 keys a warp's 16 queries have
constexpr int kBuffers = 3;         // of 64 keys or values
constexpr float kLog2E = 1.4426950408889634f;
template <int E>
constexpr int kFlashPitch = E + 8;  // eight rows of a matrix fragment then meet all banks once
template <int E>
constexpr int kBufferSize = kSplit * kFlashPitch<E>;

// A lane's two queries of its warp's fragments: maximum of the softmax so far, and the lane's part of the sum.
struct Queries {
  int position[2];  // -1: there is none
  float top[2], sum[2];
};

// s = the products of the warp's queries with its keys; `keys` is the lane's row of the first matrices.
template <int E>
GEMMA_DEVICE void make_scores(const uint32_t (*q)[4], const uint16_t* keys, float (*s)[4]) {
  GEMMA_UNROLL
  for (int j = 0; j < kScores; ++j) {
    GEMMA_UNROLL
    for (int c = 0; c < 4; ++c) s[j][c] = 0;
  }
  GEMMA_UNROLL
  for (int d = 0; d < E / 16; ++d) {
    GEMMA_UNROLL
    for (int j = 0; j < kScores / 2; ++j) {
      uint32_t fk[4];
      load_matrices(fk, keys + 16 * j * kFlashPitch<E> + 16 * d);
      mma(s[2 * j], q[d], fk);
      mma(s[2 * j + 1], q[d], fk + 2);
    }
  }
}

// cap * tanh(x / cap), right to about cap * 2^-22
GEMMA_DEVICE float cap_fast(float x, float cap, float scale) {
  return cap - 2 * cap * reciprocal_fast(1 + exp2_fast(x * scale));  // scale: 2 log2(e) / cap
}

// Scores of the keys from `first` on become weights, exponentials above the running maximum; what `out` and the sums have so far is
// scaled to a new maximum. edge: some query does not see all of the keys.
template <int E>
GEMMA_DEVICE void weigh(const AttentionArgs& a, int first, bool edge, Queries& r, float (*s)[4], float (*out)[4]) {
  if (a.cap > 0) {
    const float scale = 2 * kLog2E / a.cap;
    GEMMA_UNROLL
    for (int j = 0; j < kScores; ++j) {
      GEMMA_UNROLL
      for (int c = 0; c < 4; ++c) s[j][c] = cap_fast(s[j][c], a.cap, scale);
    }
  }
  if (edge) {
    GEMMA_UNROLL
    for (int j = 0; j < kScores; ++j) {
      GEMMA_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int key = first + 8 * j + lane() % 4 * 2 + c % 2, position = r.position[c / 2];
        if (key > position || (a.window && key <= position - a.window)) s[j][c] = -INFINITY;
      }
    }
  }
  float most[2], base[2];
  GEMMA_UNROLL
  for (int h = 0; h < 2; ++h) {
    most[h] = r.top[h];
    GEMMA_UNROLL
    for (int j = 0; j < kScores; ++j) most[h] = fmaxf(most[h], fmaxf(s[j][2 * h], s[j][2 * h + 1]));
    most[h] = fmaxf(most[h], shuffle_xor(most[h], 1));
    most[h] = fmaxf(most[h], shuffle_xor(most[h], 2));
    base[h] = most[h] == -INFINITY ? 0.0f : most[h] * kLog2E;  // nothing seen yet: every weight is 0
  }
  // Most blocks have no new maximum. Another query's makes no difference: then this one's are multiplied by 1, or are 0.
  if (any_lane(most[0] > r.top[0] || most[1] > r.top[1])) {
    GEMMA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float keep = most[h] > r.top[h] ? exp2_fast(multiply_add(r.top[h], kLog2E, -base[h])) : 1.0f;
      r.top[h] = most[h];
      r.sum[h] *= keep;
      GEMMA_UNROLL
      for (int j = 0; j < E / 8; ++j) {
        out[j][2 * h] *= keep;
        out[j][2 * h + 1] *= keep;
      }
    }
  }
  GEMMA_UNROLL
  for (int h = 0; h < 2; ++h) {
    float part = 0;
    GEMMA_UNROLL
    for (int j = 0; j < kScores; ++j) {
      GEMMA_UNROLL
      for (int c = 0; c < 2; ++c) {
        float& x = s[j][2 * h + c];
        x = exp2_fast(multiply_add(x, kLog2E, -base[h]));
        part += x;
      }
    }
    r.sum[h] += part;
  }
}

// out += weights times the warp's values; `values` is the lane's row of the first matrices.
template <int E>
GEMMA_DEVICE void add_values(const float (*s)[4], const uint16_t* values, float (*out)[4]) {
  GEMMA_UNROLL
  for (int k = 0; k < kScores / 2; ++k) {
    const uint32_t fp[4] = {bf16_pair(s[2 * k][0], s[2 * k][1]), bf16_pair(s[2 * k][2], s[2 * k][3]),
                            bf16_pair(s[2 * k + 1][0], s[2 * k + 1][1]), bf16_pair(s[2 * k + 1][2], s[2 * k + 1][3])};
    GEMMA_UNROLL
    for (int j = 0; j < E / 16; ++j) {
      uint32_t fv[4];
      load_matrices_transposed(fv, values + 16 * k * kFlashPitch<E> + 16 * j);
      mma(out[2 * j], fp, fv);
      mma(out[2 * j + 1], fp, fv + 2);
    }
  }
}

// Softmax(mask(cap(Q K^T))) V for 64 queries of a group: tokens of a tile times the group's heads. Bytes: Q and the results once; K and V
// once a tile for all heads of the group. Layout: block (tile, group; the last tiles, which see most keys, start first), 8 warps: 4 times 16
// queries, and 2 halves of each block of 64 keys, so that a scheduler has two warps to choose from. A lane holds its part of 16 x E queries,
// 16 x 32 scores and 16 x E results in fragments of m16n8k16. Keys come in blocks of 64 from absolute multiples, by cp.async into three
// buffers in turn: keys, values, the next keys, ...; two are on their way or in use while one is refilled. Maximum and sum of a query
// are those of a softmax that runs along a half's keys; the two halves meet at the end, the first before the second.
// A block of keys that a query does not see changes nothing of its results, so these do not depend on the other queries of the tile.
template <int E>
GEMMA_KERNEL GEMMA_BOUNDS(kFlashThreads, E < 128 ? 2 : 1) flash_kernel(FlashArgs f) {
  start();
  const AttentionArgs& a = f.a;
  GEMMA_DYNAMIC_SHARED(dynamic);
  auto* buffers = reinterpret_cast<uint16_t*>(dynamic);
  const Tile tile = f.tiles[f.tile_count - 1 - block_x()];
  const int group = block_y(), heads = a.H / a.kv.groups;
  const int quarter = warp() / 2, half = warp() % 2;  // of the queries, and of the keys
  const Row first = a.rows[tile.row];
  const int last = first.position + tile.count - 1;  // the last key that any query sees
  const int low = a.window && first.position - a.window + 1 > 0 ? first.position - a.window + 1 : 0;
  const int begin = low / kSplit * kSplit;

  // A thread copies 16 bytes of every kRows-th row.
  constexpr int kRows = kFlashThreads / (E / 8);
  const int copy_row = thread_x() / (E / 8), copy_run = thread_x() % (E / 8) * 8;
  const int slots = static_cast<int>(slots_of(a.kv, a.kv.is_ring, first.capacity));
  const int to_values = a.kv.groups * slots;  // rows from a group's keys to its values
  const auto* from = reinterpret_cast<const uint16_t*>(kv_at(a.kv, first, false, group, 0)) + copy_run;
  auto fetch = [&](int slot, int block, int buffer) {
    uint16_t* to = buffers + buffer + copy_row * kFlashPitch<E> + copy_run;
    if (block + kSplit - 1 <= last) {
      const uint16_t* row = from + static_cast<int64_t>(slot + copy_row) * E;
      GEMMA_UNROLL
      for (int i = 0; i < kSplit; i += kRows) copy16(to + i * kFlashPitch<E>, row + i * E, 16);
    } else if (block <= last) {  // once a tile: not worth registers
      GEMMA_ROLLED
      for (int i = 0; i < kSplit; i += kRows) {
        const bool in = block + copy_row + i <= last;
        copy16(to + i * kFlashPitch<E>, from + static_cast<int64_t>(slot + (in ? copy_row + i : 0)) * E, in ? 16 : 0);
      }
    }
    copy_commit();
  };
  int slot = static_cast<int>(static_cast<uint32_t>(begin) % static_cast<uint32_t>(slots));
  int key_buffer = 0, value_buffer = kBufferSize<E>, free_buffer = 2 * kBufferSize<E>;
  fetch(slot, begin, key_buffer);
  fetch(to_values + slot, begin, value_buffer);

  // Queries pass through the third buffer to where they stay, a warp's registers.
  {
    constexpr int kLoads = kQueries / kFlashWarps;
    int token = warp() * kLoads / heads, head = warp() * kLoads % heads;
    uint16_t* to = buffers + free_buffer + warp() * kLoads * kFlashPitch<E>;
    GEMMA_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const float* from = a.q + (static_cast<int64_t>(tile.row + token) * a.H + group * heads + head) * E;
      GEMMA_UNROLL
      for (int d = 2 * lane(); d < E; d += 64) {
        const Float2 x = token < tile.count ? *reinterpret_cast<const Float2*>(from + d) : Float2{0, 0};
        *reinterpret_cast<uint32_t*>(to + i * kFlashPitch<E> + d) = bf16_pair(x.x, x.y);
      }
      if (++head == heads) {
        head = 0;
        ++token;
      }
    }
  }
  sync_block();
  uint32_t q[E / 16][4];
  GEMMA_UNROLL
  for (int d = 0; d < E / 16; ++d) {
    load_matrices(q[d],
                  buffers + free_buffer + (quarter * 16 + lane() % 16) * kFlashPitch<E> + lane() / 16 * 8 + 16 * d);
  }

  Queries r;
  GEMMA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int token = (quarter * 16 + lane() / 4 + 8 * h) / heads;
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

  const uint16_t* keys = buffers + (half * kPart + lane() % 8 + lane() / 16 * 8) * kFlashPitch<E> + lane() / 8 % 2 * 8;
  const uint16_t* values = buffers + (half * kPart + lane() % 16) * kFlashPitch<E> + lane() / 16 * 8;
  for (int block = begin; block <= last; block += kSplit) {
    slot = slot + kSplit == slots ? 0 : slot + kSplit;
    copy_wait<1>();
    sync_block();  // keys are there, and no warp needs the third buffer any more
    fetch(slot, block + kSplit, free_buffer);
    float s[kScores][4];
    make_scores<E>(q, keys + key_buffer, s);
    const int part = block + half * kPart;
    weigh<E>(a, part, part + kPart - 1 > first.position || (a.window && part <= last - a.window), r, s, out);

    copy_wait<1>();
    sync_block();
    fetch(to_values + slot, block + kSplit, key_buffer);
    add_values<E>(s, values + value_buffer, out);
    const int freed = value_buffer;
    value_buffer = key_buffer;
    key_buffer = free_buffer;
    free_buffer = freed;
  }
  copy_wait<0>();
  sync_block();

  // The second half's results, a lane's behind each other's, then maxima and sums.
  auto* other = reinterpret_cast<Float4*>(dynamic) + quarter * (E / 8 + 1) * 32 + lane();
  GEMMA_UNROLL
  for (int h = 0; h < 2; ++h) {
    r.sum[h] += shuffle_xor(r.sum[h], 1);
    r.sum[h] += shuffle_xor(r.sum[h], 2);
  }
  if (half == 1) {
    GEMMA_UNROLL
    for (int j = 0; j < E / 8; ++j) other[j * 32] = {out[j][0], out[j][1], out[j][2], out[j][3]};
    other[E / 8 * 32] = {r.top[0], r.top[1], r.sum[0], r.sum[1]};
  }
  sync_block();
  if (half == 1) return;
  const Float4 state = other[E / 8 * 32];
  float mine[2], more[2];
  uint16_t* to[2];
  GEMMA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float top = h ? state.y : state.x, sum = h ? state.w : state.z, most = fmaxf(r.top[h], top);
    mine[h] = exp2_fast((r.top[h] - most) * kLog2E);
    more[h] = exp2_fast((top - most) * kLog2E);
    const float scale = 1.0f / (r.sum[h] * mine[h] + sum * more[h]);
    mine[h] *= scale;
    more[h] *= scale;
    const int query = quarter * 16 + lane() / 4 + 8 * h, token = query / heads, head = group * heads + query % heads;
    to[h] = token < tile.count ? f.out + (static_cast<int64_t>(tile.row + token) * a.H + head) * E : nullptr;
  }
  GEMMA_UNROLL
  for (int j = 0; j < E / 8; ++j) {
    const Float4 o = other[j * 32];
    const int d = 8 * j + lane() % 4 * 2;
    GEMMA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const Float2 theirs = h ? Float2{o.z, o.w} : Float2{o.x, o.y};
      const uint32_t sum = bf16_pair(multiply_add(out[j][2 * h], mine[h], theirs.x * more[h]),
                                     multiply_add(out[j][2 * h + 1], mine[h], theirs.y * more[h]));
      if (to[h]) *reinterpret_cast<uint32_t*>(to[h] + d) = sum;
    }
  }
}

template <int E>
void launch_flash(Device& d, const FlashArgs& f) {
  d.launch("flash", flash_kernel<E>, {f.tile_count, f.a.kv.groups}, kFlashThreads,
           size_t{kBuffers} * kBufferSize<E> * 2, f);
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
