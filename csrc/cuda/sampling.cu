// What is asked of logits on the device: the k best, and the log-probability of given tokens.
#include "kernels.h"

namespace gemma::gpu {

namespace {

constexpr int kNobody = 0x7fffffff;

// The order of results: larger first, then the lower id.
GEMMA_DEVICE bool better(Candidate a, Candidate b) { return a.key > b.key || (a.key == b.key && a.id < b.id); }

GEMMA_DEVICE Candidate block_best(Candidate c, Candidate* scratch) {
  GEMMA_UNROLL
  for (int m = 16; m; m >>= 1) {
    const Candidate o{shuffle_xor(c.key, m), shuffle_xor(c.id, m)};
    if (better(o, c)) c = o;
  }
  sync_block();
  if (lane() == 0) scratch[warp()] = c;
  sync_block();
  c = scratch[0];
  for (int i = 1; i < kBlockThreads / 32; ++i)
    if (better(scratch[i], c)) c = scratch[i];
  return c;
}

// A NaN orders below everything.
GEMMA_DEVICE float key_of(float x) { return x != x ? -INFINITY : x; }

// The k best of `count` candidates, `get(i)` the i-th: k rounds, each for the best of those behind the last one's place.
template <class Get, class Put>
GEMMA_DEVICE void select(int count, int k, Candidate* scratch, Get get, Put put) {
  Candidate last{INFINITY, -1};
  for (int i = 0; i < k; ++i) {
    Candidate best{-INFINITY, kNobody};
    for (int j = thread_x(); j < count; j += kBlockThreads) {
      const Candidate c = get(j);
      if (better(last, c) && better(c, best)) best = c;
    }
    last = block_best(best, scratch);
    if (thread_x() == 0) put(i, last);
  }
}

// The k best of a slab of 4096 logits. Bytes: the logits once from memory, k times from L1. Layout: block (slab, row).
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4) slab_best_kernel(const float* logits, int vocab, int k, Candidate* out) {
  start();
  GEMMA_SHARED(Candidate, scratch, kBlockThreads / 32);
  const int64_t row = block_y();
  const int first = block_x() * kSlab, count = vocab - first < kSlab ? vocab - first : kSlab;
  const float* x = logits + row * vocab + first;
  Candidate* to = out + (row * blocks_x() + block_x()) * k;
  select(
      count, k, scratch, [&](int i) { return Candidate{key_of(x[i]), first + i}; },
      [&](int i, Candidate c) { to[i] = c; });
}

// The k best of the slabs' candidates. Layout: a block a row.
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4) merge_best_kernel(const Candidate* in, const float* logits, int vocab,
                                                              int count, int k, int32_t* ids, float* values) {
  start();
  GEMMA_SHARED(Candidate, scratch, kBlockThreads / 32);
  const int64_t row = block_x();
  const Candidate* from = in + row * count;
  select(
      count, k, scratch, [&](int i) { return from[i]; },
      [&](int i, Candidate c) {
        ids[row * k + i] = c.id;
        values[row * k + i] = logits[row * vocab + c.id];
      });
}

// Maximum and sum of exponentials of a slab. Bytes: the logits twice (once from memory). Layout: block (slab, row).
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4) slab_sum_kernel(const float* logits, int vocab, float* out) {
  start();
  GEMMA_SHARED(float, scratch, 9);
  const int64_t row = block_y();
  const int first = block_x() * kSlab, count = vocab - first < kSlab ? vocab - first : kSlab;
  const float* x = logits + row * vocab + first;
  float top = -INFINITY;
  for (int i = thread_x(); i < count; i += kBlockThreads) top = fmaxf(top, x[i]);
  top = warp_max(top);
  if (lane() == 0) scratch[warp()] = top;
  sync_block();
  for (int i = 0; i < kBlockThreads / 32; ++i) top = fmaxf(top, scratch[i]);
  float sum = 0;
  for (int i = thread_x(); i < count; i += kBlockThreads) sum += expf(x[i] - top);
  sum = block_sum(sum, scratch);
  if (thread_x() == 0) {
    out[(row * blocks_x() + block_x()) * 2] = top;
    out[(row * blocks_x() + block_x()) * 2 + 1] = sum;
  }
}

// Folds the slabs in order. Layout: a thread a row; there are few slabs.
GEMMA_KERNEL GEMMA_BOUNDS(32, 1) log_softmax_kernel(const float* slabs, const float* logits, int vocab, int count,
                                                    int n, const int32_t* target, float* out) {
  start();
  const int64_t row = block_x() * 32 + thread_x();
  if (row >= n) return;
  const float* s = slabs + row * count * 2;
  float top = -INFINITY;
  for (int i = 0; i < count; ++i) top = fmaxf(top, s[2 * i]);
  double total = 0;
  for (int i = 0; i < count; ++i) total += static_cast<double>(s[2 * i + 1]) * exp(static_cast<double>(s[2 * i] - top));
  out[row] = static_cast<float>(static_cast<double>(logits[row * vocab + target[row]]) - top - log(total));
}

int slabs_of(int vocab) { return (vocab + kSlab - 1) / kSlab; }

}  // namespace

void top_k(Device& d, const float* logits, int n, int vocab, int k, Candidate* scratch, int32_t* ids, float* values) {
  const int slabs = slabs_of(vocab);
  d.launch("slab_best", slab_best_kernel, {slabs, n}, kBlockThreads, 0, logits, vocab, k, scratch);
  d.launch("merge_best", merge_best_kernel, {n}, kBlockThreads, 0, scratch, logits, vocab, slabs * k, k, ids, values);
}

void log_softmax_at(Device& d, const float* logits, int n, int vocab, const int32_t* target, float* scratch,
                    float* out) {
  const int slabs = slabs_of(vocab);
  d.launch("slab_sum", slab_sum_kernel, {slabs, n}, kBlockThreads, 0, logits, vocab, scratch);
  d.launch("log_softmax", log_softmax_kernel, {(n + 31) / 32}, 32, 0, scratch, logits, vocab, slabs, n, target, out);
}

}  // namespace gemma::gpu
