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

GEMMA_DEVICE Candidate nobody() { return {-INFINITY, kNobody}; }

// k rounds: every thread offers its best candidate, and after a round that it won its next. next(last): the best of the thread's own
// that stand behind `last`.
template <class Next, class Put>
GEMMA_DEVICE void select(int k, Candidate* scratch, Next next, Put put) {
  Candidate mine = next(Candidate{INFINITY, -1});
  for (int i = 0; i < k; ++i) {
    const Candidate best = block_best(mine, scratch);
    if (thread_x() == 0) put(i, best);
    if (mine.id == best.id) mine = next(best);
  }
}

// Bytes: three words an id. Layout: a thread an id, blocks along the list, rows.
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4)
    set_aside_kernel(float* logits, int vocab, const int32_t* listed, int room, float* out) {
  start();
  const int64_t row = block_y();
  const int i = block_x() * kBlockThreads + thread_x();
  if (i >= listed[0]) return;
  float& x = logits[row * vocab + listed[1 + i]];
  out[row * room + i] = x;
  x = -INFINITY;
}

// The best `length` of a slab of logits, in order. Bytes: the logits once from memory; the winner's 16 again, from L1, every round.
// Layout: block (slab, row), a thread every 256th logit.
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4)
    slab_best_kernel(const float* logits, int vocab, int slab, int length, Candidate* out) {
  start();
  GEMMA_SHARED(Candidate, scratch, kBlockThreads / 32);
  const int64_t row = block_y();
  const int first = block_x() * slab, count = vocab - first < slab ? vocab - first : slab;
  const float* x = logits + row * vocab + first;
  Candidate* to = out + (row * blocks_x() + block_x()) * length;
  auto next = [&](Candidate last) {
    Candidate best = nobody();
    for (int i = thread_x(); i < count; i += kBlockThreads) {
      const Candidate c{key_of(x[i]), first + i};
      if (better(last, c) && better(c, best)) best = c;
    }
    return best;
  };
  select(length, scratch, next, [&](int i, Candidate c) { to[i] = c; });
}

// The k best of the slabs' lists. Bytes: k candidates, and the heads of the lists. Layout: a block a row, a thread a slab.
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4)
    merge_best_kernel(const Candidate* in, const float* logits, int vocab, int slabs, int length, int k, int32_t* ids,
                      float* values) {
  start();
  GEMMA_SHARED(Candidate, scratch, kBlockThreads / 32);
  const int64_t row = block_x();
  const Candidate* list = in + (row * slabs + thread_x()) * length;
  int at = thread_x() < slabs ? 0 : length;
  auto next = [&](Candidate) { return at < length ? list[at++] : nobody(); };
  select(k, scratch, next, [&](int i, Candidate c) {
    ids[row * k + i] = c.id;
    values[row * k + i] = logits[row * vocab + c.id];
  });
}

// Maximum and sum of exponentials of a slab. Bytes: the logits twice (once from memory). Layout: block (slab, row).
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4) slab_sum_kernel(const float* logits, int vocab, int slab, float* out) {
  start();
  GEMMA_SHARED(float, scratch, 9);
  const int64_t row = block_y();
  const int first = block_x() * slab, count = vocab - first < slab ? vocab - first : slab;
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

int slabs_of(int vocab) { return (vocab + slab_size(vocab) - 1) / slab_size(vocab); }

}  // namespace

void set_aside(Device& d, float* logits, int n, int vocab, const int32_t* listed, int room, float* out) {
  d.launch("set_aside", set_aside_kernel, {(room + kBlockThreads - 1) / kBlockThreads, n}, kBlockThreads, 0, logits,
           vocab, listed, room, out);
}

void top_k(Device& d, const float* logits, int n, int vocab, int k, Candidate* scratch, int64_t room, int32_t* ids,
           float* values) {
  const int slab = slab_size(vocab), slabs = slabs_of(vocab), length = k < slab ? k : slab;
  const int64_t at_once = room / (static_cast<int64_t>(slabs) * length);
  for (int64_t row = 0; row < n; row += at_once) {
    const int rows = static_cast<int>(n - row < at_once ? n - row : at_once);
    const float* x = logits + row * vocab;
    d.launch("slab_best", slab_best_kernel, {slabs, rows}, kBlockThreads, 0, x, vocab, slab, length, scratch);
    d.launch("merge_best", merge_best_kernel, {rows}, kBlockThreads, 0, scratch, x, vocab, slabs, length, k,
             ids + row * k, values + row * k);
  }
}

void log_softmax_at(Device& d, const float* logits, int n, int vocab, const int32_t* target, float* scratch,
                    float* out) {
  const int slabs = slabs_of(vocab);
  d.launch("slab_sum", slab_sum_kernel, {slabs, n}, kBlockThreads, 0, logits, vocab, slab_size(vocab), scratch);
  d.launch("log_softmax", log_softmax_kernel, {(n + 31) / 32}, 32, 0, scratch, logits, vocab, slabs, n, target, out);
}

}  // namespace gemma::gpu
