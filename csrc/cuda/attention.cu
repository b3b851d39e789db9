// Attention for few rows: keys in splits of 64 from absolute multiples, then an ordered combine. A row's result depends on its own
// keys alone: not on other rows, nor on how many blocks the launch has.
#include "kernels.h"

namespace gemma::gpu {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kKeys = 8, kSlices = 32 / kKeys;  // scores: keys a warp, parts of a key's dimensions
constexpr int kStep = 8;                        // values: keys at a time
static_assert(kSplit == kKeys * kWarps);
constexpr int kFewBlocks = 128;   // about the multiprocessors of a GPU
constexpr int kFewPartials = 32;  // splits times heads that one block combines sooner than another kernel begins

// The splits [first, last] that a row sees.
struct Range {
  int low, high, first, last;  // keys low..high
};
GEMMA_DEVICE Range range_of(int position, int window) {
  Range r;
  r.low = window && position - window + 1 > 0 ? position - window + 1 : 0;
  r.high = position;
  r.first = r.low / kSplit;
  r.last = r.high / kSplit;
  return r;
}

// kCount neighbours of a row of keys or values as floats, by one load.
template <int kCount>
GEMMA_DEVICE void load_floats(const uint16_t* from, float* v) {
  uint32_t w[kCount / 2];
  if constexpr (kCount == 8) {
    const Word4 four = *reinterpret_cast<const Word4*>(from);
    w[0] = four.x, w[1] = four.y, w[2] = four.z, w[3] = four.w;
  } else {
    w[0] = *reinterpret_cast<const uint32_t*>(from);
  }
  GEMMA_UNROLL
  for (int i = 0; i < kCount / 2; ++i) {
    v[2 * i] = bits_float(w[i] << 16);
    v[2 * i + 1] = bits_float(w[i] & 0xffff0000u);
  }
}
template <int kCount>
GEMMA_DEVICE void load_floats(const float* from, float* v) {
  if constexpr (kCount == 4) {
    const Float4 four = *reinterpret_cast<const Float4*>(from);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  } else {
    const Float2 two = *reinterpret_cast<const Float2*>(from);
    v[0] = two.x, v[1] = two.y;
  }
}
template <class T>
GEMMA_DEVICE T from_float(float v) {
  if constexpr (sizeof(T) == 2)
    return bf16_of(v);
  else
    return v;
}

// out[n, h] = sum of the splits' values, weighted, in their order, by a block. Bytes: the partials once. Layout: a thread every 256th dimension;
// weights of 256 splits at a time through shared memory, `shared`: kCombineShared floats.
constexpr int kCombineShared = kThreads + kWarps;
GEMMA_DEVICE void combine_head(const AttentionArgs& a, const Range& r, int h, int64_t n, float* weight) {
  float* warps = weight + kThreads;
  const int e = a.kv.e;
  const int count = r.last - r.first + 1;
  const float* partial = a.partial + (n * a.H + h) * a.splits * (e + 2);
  float top = -INFINITY;
  for (int s = thread_x(); s < count; s += kThreads) top = fmaxf(top, partial[s * static_cast<int64_t>(e + 2) + e]);
  top = warp_max(top);
  if (lane() == 0) warps[warp()] = top;
  sync_block();
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, warps[w]);

  constexpr int kMost = (kMaxHeadDim + kThreads - 1) / kThreads;
  float acc[kMost], total = 0;
  GEMMA_UNROLL
  for (int i = 0; i < kMost; ++i) acc[i] = 0;
  for (int begin = 0; begin < count; begin += kThreads) {
    const int many = count - begin < kThreads ? count - begin : kThreads;
    sync_block();
    if (thread_x() < many)
      weight[thread_x()] = expf(partial[(begin + thread_x()) * static_cast<int64_t>(e + 2) + e] - top);
    sync_block();
    for (int s = 0; s < many; ++s) {
      const float* from = partial + (begin + s) * static_cast<int64_t>(e + 2);
      total = multiply_add(weight[s], from[e + 1], total);
      GEMMA_UNROLL
      for (int i = 0; i < kMost; ++i)
        if (thread_x() + i * kThreads < a.E) acc[i] = multiply_add(weight[s], from[thread_x() + i * kThreads], acc[i]);
    }
  }
  GEMMA_UNROLL
  for (int i = 0; i < kMost; ++i)
    if (thread_x() + i * kThreads < a.E) a.out[(n * a.H + h) * a.E + thread_x() + i * kThreads] = acc[i] / total;
}

// Partial softmax of query heads of a row and group over 64 keys. Bytes: the split's keys and values once for all heads of the block;
// writes e + 2 floats a head, or the finished head where no row has a second split. Where q is not given, the kernel norms and rotates it
// itself (each block again), and so does each block that has the row's own position with its key; the group's first puts key and value
// into the cache. With `ended`, zeros, the last block combines the splits.
// Layout: block (split, heads of a group, row); K and V come to shared memory by cp.async (float32: V takes K's place). Scores: a lane has
// a quarter of a key's 16-byte runs, a warp 8 keys, so that 8 lanes' runs meet all banks once. Softmax: a warp a head. Values: a thread
// has two dimensions of all keys. Both take kTile heads at a time, so that a key is read and made float32 once for them.
template <class T, int kTile>
GEMMA_KERNEL GEMMA_BOUNDS(kThreads, 2) attend_kernel(AttentionArgs a) {
  constexpr int kVec = 16 / sizeof(T);
  constexpr bool kTwo = sizeof(T) == 2;
  static_assert(kTile <= kSlices);
  allow_next();
  if (a.q) wait_for_previous();
  // A decode step's kernels write neither its rows nor, before this one, the layer's cache: reading both need not wait for them.
  const int64_t n = block_z();
  const int heads = a.heads, first_head = block_y() * heads, group_heads = a.H / a.kv.groups, e = a.kv.e, E = a.E;
  const int group = first_head / group_heads;
  const Row row = a.rows[n];
  const Range r = range_of(row.position, a.window);
  const int split = r.first + block_x();
  if (split > r.last) {
    if (!a.q) wait_for_previous();
    return;
  }
  const int begin = split * kSplit;
  const int low = r.low > begin ? r.low - begin : 0, high = r.high - begin < kSplit - 1 ? r.high - begin : kSplit - 1;
  const int start_key = low / kStep * kStep;

  GEMMA_DYNAMIC_SHARED(dynamic);
  const int pitch = e + kVec;  // an odd number of 16-byte runs: the same run of 8 neighbouring rows meets all banks
  T* keys = reinterpret_cast<T*>(dynamic);
  T* values = kTwo ? keys + kSplit * pitch : keys;
  auto* q = reinterpret_cast<float*>(values + kSplit * pitch);  // [heads][e]
  float* p = q + heads * e;                                     // [heads][64]: scores, then weights
  float* turns = p + heads * kSplit;                            // cosines, then sines, of the row's angles
  float* sums = turns + e;                                      // [heads]

  const RopeArgs& rope = a.rope;
  const bool own = !a.q && split == r.last;  // the row's own key and value, number `high`, are not in the cache yet
  T* cached_keys = reinterpret_cast<T*>(kv_at(a.kv, row, false, group, begin));
  T* cached_values = reinterpret_cast<T*>(kv_at(a.kv, row, true, group, begin));
  // Rows of a step that are not seen become zeros: whole steps are taken, and what was never written may be NaN.
  auto fetch = [&](const T* from, T* to) {
    const int old = own ? high : high + 1, end = high / kStep * kStep + kStep;
    for (int key = start_key + warp(); key < end; key += kWarps) {
      if (own && key == high) continue;
      for (int d = lane() * kVec; d < e; d += 32 * kVec)
        copy16(to + key * pitch + d, from + key * e + d, key >= low && key < old ? 16 : 0);
    }
    copy_commit();
  };
  auto own_to = [&](T* to, T* cache) {
    const bool store = first_head % group_heads == 0;
    return [=](int i, float v) {
      to[high * pitch + i] = from_float<T>(v);
      if (store) cache[high * e + i] = from_float<T>(v);
    };
  };
  auto own_value = [&] {
    if (!own) return;
    const float* value = rope.qkv + (n * (a.H + 2 * a.kv.groups) + a.H + a.kv.groups + group) * E;
    const auto put = own_to(values, cached_values);
    for (int i = thread_x(); i < e; i += kThreads) put(i, i < E ? value[i] : 0.0f);
  };
  fetch(cached_keys, keys);
  if (kTwo) fetch(cached_values, values);
  if (a.q) {
    for (int h = 0; h < heads; ++h)
      for (int d = thread_x(); d < e; d += kThreads)
        q[h * e + d] = d < E ? a.q[(n * a.H + first_head + h) * E + d] : 0.0f;
  } else {
    for (int i = thread_x(); i < E; i += kThreads) {
      const float angle = angle_of(row.position, rope.frequency[i < E / 2 ? i : i - E / 2]);
      turns[i] = i < E / 2 ? cosf(angle) : sinf(angle);
    }
    sync_block();
    wait_for_previous();
    if (kTwo) own_value();
    const auto turn = [&](int i) { return Turn{turns[i], turns[i + E / 2]}; };
    const float* qkv = rope.qkv + n * (a.H + 2 * a.kv.groups) * E;
    for (int h = warp(); h < heads + own; h += kWarps) {
      if (h == heads) {
        const auto put = own_to(keys, cached_keys);
        rotate_head(qkv + (a.H + group) * E, rope.k_norm, E, rope.eps, turn, put);
        for (int d = E + lane(); d < e; d += 32) put(d, 0);
        continue;
      }
      rotate_head(qkv + (first_head + h) * E, rope.q_norm, E, rope.eps, turn,
                  [&](int i, float v) { q[h * e + i] = v * rope.query_scale; });
      for (int d = E + lane(); d < e; d += 32) q[h * e + d] = 0;
    }
  }
  copy_wait<kTwo ? 1 : 0>();
  sync_block();

  // A tile's heads; those behind the last are the last again.
  const auto head_of = [&](int h) { return h < heads ? h : heads - 1; };
  const int key = warp() * kKeys + lane() % kKeys, slice = lane() / kKeys;
  const bool any = warp() * kKeys <= high && warp() * kKeys + kKeys > low;
  for (int first = 0; first < heads; first += kTile) {
    float even[kTile], odd[kTile], score = 0;
    GEMMA_UNROLL
    for (int j = 0; j < kTile; ++j) even[j] = odd[j] = 0;
    if (any) {
      for (int d = slice * kVec; d < e; d += kSlices * kVec) {
        float k[kVec];
        load_floats<kVec>(keys + key * pitch + d, k);
        GEMMA_UNROLL
        for (int j = 0; j < kTile; ++j) {
          GEMMA_UNROLL
          for (int i = 0; i < kVec; i += 4) {
            const Float4 x = *reinterpret_cast<const Float4*>(q + head_of(first + j) * e + d + i);
            even[j] = multiply_add(x.x, k[i], even[j]);
            odd[j] = multiply_add(x.y, k[i + 1], odd[j]);
            even[j] = multiply_add(x.z, k[i + 2], even[j]);
            odd[j] = multiply_add(x.w, k[i + 3], odd[j]);
          }
        }
      }
      GEMMA_UNROLL
      for (int j = 0; j < kTile; ++j) {
        float s = even[j] + odd[j];
        s += shuffle_xor(s, kKeys);
        s += shuffle_xor(s, 2 * kKeys);
        if (slice == j) score = s;
      }
    }
    if (slice < kTile && first + slice < heads)
      p[(first + slice) * kSplit + key] = key >= low && key <= high ? capped(score, a.cap) : -INFINITY;
  }
  sync_block();
  if (!kTwo) {
    fetch(cached_values, values);
    own_value();
  }

  for (int h = warp(); h < heads; h += kWarps) {
    float* weight = p + h * kSplit + lane();
    const float top = warp_max(fmaxf(weight[0], weight[32]));
    const float first = expf(weight[0] - top), second = expf(weight[32] - top);
    weight[0] = first;
    weight[32] = second;
    const float sum = warp_sum(first + second);
    if (lane() == 0) {
      sums[h] = sum;
      if (a.splits > 1) {
        float* out = a.partial + ((n * a.H + first_head + h) * a.splits + block_x()) * (e + 2) + e;
        out[0] = top;
        out[1] = sum;
      }
    }
  }
  copy_wait<0>();
  sync_block();

  const int pairs = e / 2, tiles = (heads + kTile - 1) / kTile;
  for (int item = thread_x(); item < pairs * tiles; item += kThreads) {
    const int first = item / pairs * kTile, d = item % pairs * 2;
    float acc[kTile][2];
    GEMMA_UNROLL
    for (int j = 0; j < kTile; ++j) acc[j][0] = acc[j][1] = 0;
    for (int k = start_key; k <= high; k += kStep) {
      float v[kStep][2];
      GEMMA_UNROLL
      for (int i = 0; i < kStep; ++i) load_floats<2>(values + (k + i) * pitch + d, v[i]);
      GEMMA_UNROLL
      for (int j = 0; j < kTile; ++j) {
        GEMMA_UNROLL
        for (int i = 0; i < kStep; i += 4) {
          const Float4 w = *reinterpret_cast<const Float4*>(p + head_of(first + j) * kSplit + k + i);
          GEMMA_UNROLL
          for (int c = 0; c < 2; ++c) {
            acc[j][c] = multiply_add(w.x, v[i][c], acc[j][c]);
            acc[j][c] = multiply_add(w.y, v[i + 1][c], acc[j][c]);
            acc[j][c] = multiply_add(w.z, v[i + 2][c], acc[j][c]);
            acc[j][c] = multiply_add(w.w, v[i + 3][c], acc[j][c]);
          }
        }
      }
    }
    GEMMA_UNROLL
    for (int j = 0; j < kTile; ++j) {
      if (first + j >= heads) break;
      const int64_t head = n * a.H + first_head + first + j;
      if (a.splits > 1) {
        *reinterpret_cast<Float2*>(a.partial + (head * a.splits + block_x()) * (e + 2) + d) = {acc[j][0], acc[j][1]};
      } else if (d < E) {
        // As `combine` would: 0 + 1 * acc, which makes 0 of -0.
        *reinterpret_cast<Float2*>(a.out + head * E + d) = {(0.0f + acc[j][0]) / sums[first + j],
                                                            (0.0f + acc[j][1]) / sums[first + j]};
      }
    }
  }
  if (!a.ended) return;
  // The last of the row's blocks with these heads has all their splits to combine.
  fence();
  sync_block();
  auto* last = reinterpret_cast<uint32_t*>(dynamic);
  if (thread_x() == 0) {
    uint32_t* ended = a.ended + (n * a.H + first_head);
    *last = count_up(ended) == static_cast<uint32_t>(r.last - r.first);
    if (*last) *ended = 0;  // for the next layer
  }
  sync_block();
  if (!*last) return;
  fence();
  for (int h = first_head; h < first_head + heads; ++h) combine_head(a, r, h, n, reinterpret_cast<float*>(dynamic) + 4);
}

// Layout: block (head, row).
GEMMA_KERNEL GEMMA_BOUNDS(kThreads, 4) combine_kernel(AttentionArgs a) {
  allow_next();
  const int64_t n = block_y();
  const Range r = range_of(a.rows[n].position, a.window);  // no kernel writes rows
  wait_for_previous();
  GEMMA_SHARED(float, shared, kCombineShared);
  combine_head(a, r, block_x(), n, shared);
}

template <class T>
auto kernel_for(int heads) {
  return heads == 1 ? attend_kernel<T, 1> : heads == 2 ? attend_kernel<T, 2> : attend_kernel<T, 4>;
}

}  // namespace

size_t attend_shared_bytes(int heads, int e) {
  return static_cast<size_t>(kSplit) * (e + 8) * 4 + (static_cast<size_t>(heads) * (e + kSplit + 1) + e) * 4;
}

void attend(Device& d, const AttentionArgs& args) {
  AttentionArgs a = args;
  // Where splits, groups and rows do not fill the GPU, a group's heads go to several blocks: each reads K and V again, but they run
  // side by side. A head's result is the same in any block.
  a.heads = a.H / a.kv.groups;
  while (a.heads % 2 == 0 && int64_t{2} * a.splits * (a.H / a.heads) * a.n <= kFewBlocks) a.heads /= 2;
  if (a.splits == 1 || a.splits * a.heads > kFewPartials) a.ended = nullptr;
  const auto kernel = a.kv.f32 ? kernel_for<float>(a.heads) : kernel_for<uint16_t>(a.heads);
  d.launch("attend", kernel, {a.splits, a.H / a.heads, a.n}, kThreads, attend_shared_bytes(a.heads, a.kv.e), a);
  if (a.splits > 1 && !a.ended) d.launch("combine", combine_kernel, {a.H, a.n}, kThreads, 0, a);
}

}  // namespace gemma::gpu
