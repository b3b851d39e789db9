// What the backend asks of the kernels: arguments, and the functions that launch them. Letters as in backend.h; lower-case e is a head's
// size in the cache, E rounded up to 16.
#pragma once

#include "../backend.h"
#include "runtime.h"
#include "weights.h"

namespace gemma::gpu {

constexpr int kSplit = 64;      // keys a block of decode attention: from absolute multiples of this
constexpr int kRowsABlock = 8;  // activation rows a block of `matvec`
// Fewer rows than this are cheaper by `matvec` than by `matmul`, and than by cuBLASLt.
constexpr int kExactRows = 64, kFewRows = 16;
constexpr int kHeadRows = 64;  // rows of logits at a time
constexpr int kBlockThreads = 256;
static_assert(kSplit == kKeyBlock, "rings hold whole blocks");

// What kernels know of a row of the pass; in device memory, so that a graph can be replayed at other positions.
struct Row {
  uint8_t* kv;       // the sequence's keys and values
  int32_t capacity;  // positions, a multiple of kKeyBlock
  int32_t token, position, pad;
};

// Where a layer's keys and values lie in a sequence's memory: layers in turn, each K [G][slots][e] and V [G][slots][e].
struct KvLayer {
  int32_t full_before = 0, rings_before = 0;  // layers before this one with a slot for every position, and with a ring
  int32_t ring = 0;                           // positions of a ring; all rings are alike. 0: the model has none
  bool is_ring = false;
  bool f32 = false;
  int32_t groups = 0, e = 0;
};

GEMMA_HOST_DEVICE int64_t slots_of(const KvLayer& l, bool ring, int64_t capacity) {
  return ring && l.ring < capacity ? l.ring : capacity;
}
GEMMA_HOST_DEVICE uint8_t* kv_at(const KvLayer& l, const Row& r, bool values, int group, int64_t position) {
  const int64_t slots = slots_of(l, l.is_ring, r.capacity);
  const int64_t before =
      2 * l.groups *
      (l.full_before * static_cast<int64_t>(r.capacity) + l.rings_before * slots_of(l, true, r.capacity));
  const int64_t at =
      before + (values * l.groups + group) * slots + static_cast<uint32_t>(position) % static_cast<uint32_t>(slots);
  return r.kv + at * l.e * (l.f32 ? 4 : 2);
}

// ---- matvec.cu ----

struct Part {
  Planes w;
  float* out = nullptr;
  int64_t stride = 0;  // floats between rows of out
};

enum class After { store, add, geglu };

struct MatvecArgs {
  Part parts[3];  // of one type; their rows follow each other. geglu: gate and up, to parts[0].out
  int count = 1;
  After after = After::store;
  const float* x = nullptr;  // [.., cols], stride x_stride
  int64_t x_stride = 0;
  const int32_t* pick = nullptr;  // rows of x; null: the first n
  int n = 0, cols = 0;
  const float* norm = nullptr;  // x is normed by it first; null: taken as it is
  float eps = 0;
  uint8_t* scratch = nullptr;  // matvec_scratch_bytes(cols, ..): for more rows than one, or a long one
  size_t scratch_bytes = 0;
};
// `rows`: of matrices, some of which want more scratch in a batch.
size_t matvec_scratch_bytes(int64_t cols, std::initializer_list<int64_t> rows);
void matvec(Device& d, DType type, const MatvecArgs& a);

// ---- matmul.cu ----

struct MatmulArgs {
  Planes w;
  const uint16_t* x = nullptr;  // bf16 [m][k], k a multiple of 32, zeros behind `cols`
  int m = 0, k = 0;
  float* out = nullptr;
  uint16_t* out16 = nullptr;  // instead of `out`: results as bf16
  int64_t stride = 0;         // values between rows of either
  bool add = false;           // to `out`
};
void matmul(Device& d, DType type, const MatmulArgs& a);
// out[rows][32 pieces] = a quantised matrix, each value rounded to bf16 as `matmul` does
void dequantise(Device& d, DType type, const Planes& w, int k, uint16_t* out);

// ---- pointwise.cu ----

void embed(Device& d, DType type, const Planes& table, const Row* rows, int n, int cols, float scale, float* x);
struct RopeArgs {
  const Row* rows = nullptr;
  const float* qkv = nullptr;  // [n][H + 2 G][E]
  float* q = nullptr;          // [n][H][E]
  const float *q_norm = nullptr, *k_norm = nullptr, *frequency = nullptr;
  KvLayer kv;
  int n = 0, H = 0, G = 0, E = 0;
  float eps = 0, query_scale = 1;
};
void rope_and_store(Device& d, const RopeArgs& a);
// x[n][cols] += y scaled to a root mean square of 1, times weight
void norm_and_add(Device& d, const float* y, const float* weight, float eps, int n, int cols, float* x);
// out[n][k] = bf16 of rows of x, normed where norm is given; zeros from cols to k
void to_bf16(Device& d, const float* x, const int32_t* pick, const float* norm, float eps, int n, int cols, int k,
             uint16_t* out);
// gate = gelu(gate) * up: n values of float32, or bf16 [n][k], k a multiple of 8; zeros from cols to k
void geglu(Device& d, float* gate, const float* up, int64_t n);
void geglu(Device& d, uint16_t* gate, const uint16_t* up, int n, int cols, int k);
void softcap(Device& d, float* x, int64_t n, float cap);

// ---- attention.cu ----

struct AttentionArgs {
  const Row* rows = nullptr;
  const float* q = nullptr;  // [n][H][E]; null: the kernel does the work of `rope`, for rows of different sequences
  RopeArgs rope;
  float* out = nullptr;      // [n][H][E]
  float* partial = nullptr;  // [n][H][splits][e + 2]
  // [n][H] zeros, and again afterwards: how many blocks have ended. null: another kernel combines the splits.
  uint32_t* ended = nullptr;
  KvLayer kv;
  int n = 0, H = 0, E = 0;
  int window = 0;
  int splits = 0;  // blocks a row: at least as many as any row needs
  int heads = 0;   // query heads a block, of one group; `attend` chooses
  float cap = 0;
};
void attend(Device& d, const AttentionArgs& a);
size_t attend_shared_bytes(int heads, int e);  // heads a block: a whole group at most

// ---- flash.cu ----

struct Tile {
  int32_t row, count;  // rows of the pass, of one sequence
};
struct FlashArgs {
  AttentionArgs a;
  uint16_t* out = nullptr;  // [n][H][E] as bf16, what the output projection takes
  const Tile* tiles = nullptr;
  int tile_count = 0;
};
bool flash_supports(const KvLayer& kv, int E, int heads_a_group);
int flash_tile_rows(int heads_a_group);  // tokens a tile
void flash(Device& d, const FlashArgs& f);

// ---- sampling.cu ----

struct Candidate {
  float key;
  int32_t id;
};
// Logits a block: at most kBlockThreads slabs a row.
inline int slab_size(int vocab) {
  int size = 4096;
  while (static_cast<int64_t>(size) * kBlockThreads < vocab) size *= 2;
  return size;
}
// The values of listed ids of each row of logits[n][vocab], which become -infinity there. listed: how many, then the ids; at most `room`.
void set_aside(Device& d, float* logits, int n, int vocab, const int32_t* listed, int room, float* out);
// The k best of each row of logits[n][vocab]. scratch: `room` candidates, vocab + slab_size(vocab) at least.
void top_k(Device& d, const float* logits, int n, int vocab, int k, Candidate* scratch, int64_t room, int32_t* ids,
           float* values);
// out[i] = log softmax(logits[i])[target[i]]; scratch: n * slabs * 2 floats
void log_softmax_at(Device& d, const float* logits, int n, int vocab, const int32_t* target, float* scratch,
                    float* out);

// ---- shared by kernels ----

// The sum over a block, in one order; `scratch`: a float of shared memory a warp. Starts and ends with a barrier.
template <int kThreads = kBlockThreads>
GEMMA_DEVICE float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  sync_block();
  if (lane() == 0) scratch[warp()] = x;
  sync_block();
  float sum = 0;
  for (int i = 0; i < kThreads / 32; ++i) sum += scratch[i];
  sync_block();
  return sum;
}
// The rotation of a pair of dimensions: by position * frequency.
struct Turn {
  float cos, sin;
};
GEMMA_DEVICE float angle_of(int position, float frequency) { return static_cast<float>(position) * frequency; }
// One head x[E] of a row by a warp: scaled to a root mean square of 1 times `norm` (null: as it is), dimensions i and i + E/2 rotated by
// turn(i). put(i, value) takes the results; it may write anywhere, so loads that follow it wait for it: four pairs are loaded before.
template <class TurnOf, class Put>
GEMMA_DEVICE void rotate_head(const float* x, const float* norm, int E, float eps, TurnOf turn, Put put) {
  constexpr int kPairs = 4;
  const int half = E / 2;
  float scale = 1;
  if (norm) {
    float s = 0;
    for (int i = lane(); i < E; i += 32) s = multiply_add(x[i], x[i], s);
    scale = 1.0f / sqrtf(warp_sum(s) / static_cast<float>(E) + eps);
  }
  for (int begin = lane(); begin < half; begin += 32 * kPairs) {
    float u[kPairs], v[kPairs];
    GEMMA_UNROLL
    for (int j = 0; j < kPairs; ++j) {
      const int i = begin + 32 * j;
      if (i >= half) break;
      u[j] = x[i];
      v[j] = x[i + half];
      if (norm) {
        u[j] = u[j] * scale * norm[i];
        v[j] = v[j] * scale * norm[i + half];
      }
    }
    GEMMA_UNROLL
    for (int j = 0; j < kPairs; ++j) {
      const int i = begin + 32 * j;
      if (i >= half) break;
      const Turn t = turn(i);
      put(i, u[j] * t.cos - v[j] * t.sin);
      put(i + half, v[j] * t.cos + u[j] * t.sin);
    }
  }
}
// Four values of x[cols] from i on, a multiple of 4; zeros past its end. Rows of a multiple of 4 values are read 16 bytes at a time.
GEMMA_DEVICE Float4 load_four(const float* x, int i, int cols) {
  if (cols % 4 == 0) return i < cols ? *reinterpret_cast<const Float4*>(x + i) : Float4{0, 0, 0, 0};
  auto at = [&](int j) { return j < cols ? x[j] : 0.0f; };
  return {at(i), at(i + 1), at(i + 2), at(i + 3)};
}
GEMMA_DEVICE Word4 eight_to_bf16(const float* v) {
  return {bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7])};
}
// 1 / root mean square of x[n], by a block.
GEMMA_DEVICE float inverse_rms(const float* x, int n, float eps, float* scratch) {
  float s = 0;
  for (int i = thread_x(); i < n; i += kBlockThreads) s = multiply_add(x[i], x[i], s);
  return 1.0f / sqrtf(block_sum(s, scratch) / static_cast<float>(n) + eps);
}
// x (1 + tanh u) / 2 = x / (1 + exp(-2 u)): without a branch, and exact to the last bits for negative x too.
GEMMA_DEVICE float gelu(float x) { return x / (1.0f + expf(-1.5957691216057308f * (x + 0.044715f * x * x * x))); }
GEMMA_DEVICE float capped(float x, float cap) { return cap > 0 ? cap * tanhf(x / cap) : x; }

}  // namespace gemma::gpu
