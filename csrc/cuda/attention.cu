// Attention for few rows: keys in splits of 64 from absolute multiples, then an ordered combine. A row's result depends on its own
// keys alone: not on other rows, nor on how many blocks the launch has.
#include "kernels.h"

namespace gemma::gpu {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

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

template <class T>
GEMMA_DEVICE float to_float(T v) {
  if constexpr (sizeof(T) == 2)
    return float_of_bf16(v);
  else
    return v;
}
template <class T>
GEMMA_DEVICE T from_float(float v) {
  if constexpr (sizeof(T) == 2)
    return bf16_of(v);
  else
    return v;
}

// Partial softmax of one row's query heads of a group over 64 keys. Bytes: the split's keys and values once for all heads of the
// group; writes e + 2 floats a head. Where q is not given, the kernel norms and rotates it itself (each block again), and the block
// that has the row's own position does so with its key and puts key and value into the cache.
// Layout: block (split, group, row); K and V come to shared memory by cp.async (float32: V takes K's place); a warp takes every 4th
// head: a lane scores keys l and l + 32, then owns every 32nd run of 16 bytes of the values.
template <class T>
GEMMA_KERNEL GEMMA_BOUNDS(kThreads, 3) attend_kernel(AttentionArgs a) {
  start();
  constexpr int kVec = 16 / sizeof(T);
  constexpr bool kTwo = sizeof(T) == 2;
  const int64_t n = block_z();
  const int group = block_y(), heads = a.H / a.kv.groups, e = a.kv.e;
  const Row row = a.rows[n];
  const Range r = range_of(row.position, a.window);
  const int split = r.first + block_x();
  if (split > r.last) return;
  const int begin = split * kSplit;
  const int low = r.low > begin ? r.low - begin : 0, high = r.high - begin < kSplit - 1 ? r.high - begin : kSplit - 1;

  GEMMA_DYNAMIC_SHARED(dynamic);
  const int pitch = e + kVec;  // rows of 16-byte runs, shifted by one: a run of neighbouring rows meets all banks
  T* keys = reinterpret_cast<T*>(dynamic);
  T* values = kTwo ? keys + kSplit * pitch : keys;
  auto* q = reinterpret_cast<float*>(values + kSplit * pitch);  // [heads][e]
  float* p = q + heads * e;                                     // [heads][64]

  const RopeArgs& rope = a.rope;
  const bool own = !a.q && split == r.last;  // the row's own key and value, number `high`, are not in the cache yet
  const float* qkv = rope.qkv + n * (a.H + 2 * a.kv.groups) * a.E;
  auto fetch = [&](bool is_value, T* to) {
    T* cache = reinterpret_cast<T*>(kv_at(a.kv, row, is_value, group, begin));
    const int runs = e / kVec, old = own ? high : high + 1;
    for (int i = thread_x(); i < old * runs; i += kThreads)
      copy16(to + i / runs * pitch + i % runs * kVec, cache + static_cast<int64_t>(i / runs) * e + i % runs * kVec, 16);
    copy_commit();
    if (own && warp() == (is_value ? 1 : 0)) {
      auto put = [&](int i, float v) {
        to[high * pitch + i] = cache[static_cast<int64_t>(high) * e + i] = from_float<T>(v);
      };
      rotate_head(qkv + (a.H + (is_value ? a.kv.groups : 0) + group) * a.E, is_value ? nullptr : rope.k_norm,
                  is_value ? nullptr : rope.frequency, row.position, a.E, rope.eps, put);
      for (int i = a.E + lane(); i < e; i += 32) put(i, 0);
    }
  };
  fetch(false, keys);
  if (kTwo) fetch(true, values);
  for (int h = warp(); h < heads; h += kWarps) {
    const int head = group * heads + h;
    if (a.q)
      for (int d = lane(); d < a.E; d += 32) q[h * e + d] = a.q[(n * a.H + head) * a.E + d];
    else
      rotate_head(qkv + head * a.E, rope.q_norm, rope.frequency, row.position, a.E, rope.eps,
                  [&](int i, float v) { q[h * e + i] = v * rope.query_scale; });
    for (int d = a.E + lane(); d < e; d += 32) q[h * e + d] = 0;
  }
  copy_wait<kTwo ? 1 : 0>();
  sync_block();

  float top[2], score[2];
  for (int h = warp(); h < heads; h += kWarps) {
    const float* qh = q + h * e;
    GEMMA_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int key = lane() + 32 * j;
      score[j] = -INFINITY;
      if (key < low || key > high) continue;
      const T* k = keys + key * pitch;
      float s = 0;
      for (int d = 0; d < e; d += kVec) {
        alignas(16) T v[kVec];
        *reinterpret_cast<Word4*>(v) = *reinterpret_cast<const Word4*>(k + d);
        GEMMA_UNROLL
        for (int i = 0; i < kVec; ++i) s = multiply_add(qh[d + i], to_float(v[i]), s);
      }
      score[j] = capped(s, a.cap);
    }
    top[0] = warp_max(fmaxf(score[0], score[1]));
    float sum = 0;
    GEMMA_UNROLL
    for (int j = 0; j < 2; ++j) {
      const float w = score[j] == -INFINITY ? 0.0f : expf(score[j] - top[0]);
      p[h * kSplit + lane() + 32 * j] = w;
      sum += w;
    }
    sum = warp_sum(sum);
    if (lane() == 0) {
      float* out = a.partial + ((n * a.H + group * heads + h) * a.splits + block_x()) * (e + 2) + e;
      out[0] = top[0];
      out[1] = sum;
    }
  }
  if (!kTwo) {
    sync_block();
    fetch(true, values);
  }
  copy_wait<0>();
  sync_block();

  for (int h = warp(); h < heads; h += kWarps) {
    float* out = a.partial + ((n * a.H + group * heads + h) * a.splits + block_x()) * (e + 2);
    for (int d = lane() * kVec; d < e; d += 32 * kVec) {
      float acc[kVec];
      GEMMA_UNROLL
      for (int i = 0; i < kVec; ++i) acc[i] = 0;
      for (int key = low; key <= high; ++key) {
        const float w = p[h * kSplit + key];
        alignas(16) T v[kVec];
        *reinterpret_cast<Word4*>(v) = *reinterpret_cast<const Word4*>(values + key * pitch + d);
        GEMMA_UNROLL
        for (int i = 0; i < kVec; ++i) acc[i] = multiply_add(w, to_float(v[i]), acc[i]);
      }
      GEMMA_UNROLL
      for (int i = 0; i < kVec; ++i) out[d + i] = acc[i];
    }
  }
}

// out[n, h] = sum of the splits' values, weighted, in their order. Bytes: the partials once. Layout: block (head, row), a thread every
// 128th dimension; weights of 128 splits at a time through shared memory.
GEMMA_KERNEL GEMMA_BOUNDS(kThreads, 8) combine_kernel(AttentionArgs a) {
  start();
  GEMMA_SHARED(float, weight, kThreads);
  GEMMA_SHARED(float, warps, kWarps);
  const int64_t n = block_y();
  const int h = block_x(), e = a.kv.e;
  const Range r = range_of(a.rows[n].position, a.window);
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

}  // namespace

size_t attend_shared_bytes(int heads_a_group, int e) {
  return static_cast<size_t>(kSplit) * (e + 8) * 4 + static_cast<size_t>(heads_a_group) * (e + kSplit) * 4;
}

void attend(Device& d, const AttentionArgs& a) {
  const size_t shared = attend_shared_bytes(a.H / a.kv.groups, a.kv.e);
  d.launch("attend", a.kv.f32 ? attend_kernel<float> : attend_kernel<uint16_t>, {a.splits, a.kv.groups, a.n}, kThreads,
           shared, a);
  d.launch("combine", combine_kernel, {a.H, a.n}, kThreads, 0, a);
}

}  // namespace gemma::gpu
