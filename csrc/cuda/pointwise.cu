// What stands between products: look-ups, norms, rotations, activations.
#include "kernels.h"

namespace gemma::gpu {

namespace {

// x[n, cols] = table[token] * scale. Bytes: n rows of the table, n rows of x. Layout: a block a row, a thread a piece.
template <DType T>
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4)
    embed_kernel(Planes table, const Row* rows, int cols, float scale, float* x) {
  start();
  constexpr int kValues = piece_values(T);
  const int64_t token = rows[block_x()].token;
  float* out = x + static_cast<int64_t>(block_x()) * cols;
  for (int p = thread_x(); p < table.pieces; p += kBlockThreads) {
    const Piece<T> piece = load_piece<T>(table, token, p);
    GEMMA_UNROLL
    for (int part = 0; part < kValues / 8; ++part) {
      float v[8];
      eight_scaled<T>(piece, part, v);
      GEMMA_UNROLL
      for (int i = 0; i < 8; ++i) {
        const int at = p * kValues + part * 8 + i;
        if (at < cols) out[at] = v[i] * scale;
      }
    }
  }
}

// One head of one row: norm, rotation and scale of q to a.q; norm and rotation of k, and v as it is, to the cache.
// Bytes: each value once. Layout: a warp a head (block), a lane every 32nd pair of dimensions i, i + E/2.
GEMMA_KERNEL GEMMA_BOUNDS(32, 16) rope_kernel(RopeArgs a) {
  start();
  const int head = block_x();
  const int64_t n = block_y();
  const Row row = a.rows[n];
  const float* x = a.qkv + (n * (a.H + 2 * a.G) + head) * a.E;
  const auto turn = [&](int i) {
    const float angle = angle_of(row.position, a.frequency[i]);
    return Turn{cosf(angle), sinf(angle)};
  };
  if (head < a.H) {
    float* q = a.q + (n * a.H + head) * a.E;
    rotate_head(x, a.q_norm, a.E, a.eps, turn, [&](int i, float v) { q[i] = v * a.query_scale; });
    return;
  }
  const bool is_v = head >= a.H + a.G;
  uint8_t* cache = kv_at(a.kv, row, is_v, is_v ? head - a.H - a.G : head - a.H, row.position);
  auto put = [&](int i, float v) {
    if (a.kv.f32)
      reinterpret_cast<float*>(cache)[i] = v;
    else
      reinterpret_cast<uint16_t*>(cache)[i] = bf16_of(v);
  };
  if (is_v)
    for (int i = lane(); i < a.E; i += 32) put(i, x[i]);
  else
    rotate_head(x, a.k_norm, a.E, a.eps, turn, put);
  for (int i = a.E + lane(); i < a.kv.e; i += 32) put(i, 0);
}

// x[n, cols] += norm(y). Bytes: x twice, y twice. Layout: a block a row.
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4)
    norm_add_kernel(const float* y, const float* weight, float eps, int cols, float* x) {
  start();
  GEMMA_SHARED(float, scratch, 9);
  y += static_cast<int64_t>(block_x()) * cols;
  x += static_cast<int64_t>(block_x()) * cols;
  const float s = inverse_rms(y, cols, eps, scratch);
  for (int i = thread_x(); i < cols; i += kBlockThreads) x[i] += y[i] * s * weight[i];
}

GEMMA_DEVICE void load_eight(const float* row, int i, int cols, float* v) {
  GEMMA_UNROLL
  for (int h = 0; h < 8; h += 4) {
    const Float4 f = load_four(row, i + h, cols);
    v[h] = f.x;
    v[h + 1] = f.y;
    v[h + 2] = f.z;
    v[h + 3] = f.w;
  }
}

// out[n, k] = bf16(norm(x)). Bytes: x once (with a norm a second time, from L1), out once. Layout: a block a row, a thread eight values
// of every 2048.
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4)
    to_bf16_kernel(const float* x, const int32_t* pick, const float* norm, float eps, int cols, int k, uint16_t* out) {
  start();
  GEMMA_SHARED(float, scratch, 9);
  const int64_t row = block_x();
  x += (pick ? pick[row] : row) * cols;
  float s = 1;
  if (norm) {
    float squares = 0;
    for (int i = thread_x() * 8; i < cols; i += kBlockThreads * 8) {
      float v[8];
      load_eight(x, i, cols, v);
      GEMMA_UNROLL
      for (int h = 0; h < 8; ++h) squares = multiply_add(v[h], v[h], squares);
    }
    s = 1.0f / sqrtf(block_sum(squares, scratch) / static_cast<float>(cols) + eps);
  }
  for (int i = thread_x() * 8; i < k; i += kBlockThreads * 8) {
    float v[8];
    load_eight(x, i, cols, v);
    if (norm) {
      float w[8];
      load_eight(norm, i, cols, w);
      GEMMA_UNROLL
      for (int h = 0; h < 8; ++h) v[h] = v[h] * s * w[h];
    }
    *reinterpret_cast<Word4*>(out + row * k + i) = eight_to_bf16(v);
  }
}

// gate = gelu(gate) * up. Bytes: each once in, gate once out. Layout: a thread a value.
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4) geglu_kernel(float* gate, const float* up, int64_t n) {
  start();
  const int64_t i = static_cast<int64_t>(block_x()) * kBlockThreads + thread_x();
  if (i < n) gate[i] = gelu(gate[i]) * up[i];
}

// The same of bf16 [n, k], with zeros from cols on. Bytes: each once in, gate once out. Layout: blocks along a row, a thread eight values.
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4) geglu16_kernel(uint16_t* gate, const uint16_t* up, int cols, int k) {
  start();
  const int i = (block_x() * kBlockThreads + thread_x()) * 8;
  if (i >= k) return;
  const int64_t at = static_cast<int64_t>(block_y()) * k + i;
  const Word4 g = *reinterpret_cast<const Word4*>(gate + at), u = *reinterpret_cast<const Word4*>(up + at);
  const uint32_t gs[4] = {g.x, g.y, g.z, g.w}, us[4] = {u.x, u.y, u.z, u.w};
  float v[8];
  GEMMA_UNROLL
  for (int h = 0; h < 8; ++h) {
    const uint16_t a = static_cast<uint16_t>(gs[h / 2] >> 16 * (h % 2));
    const uint16_t b = static_cast<uint16_t>(us[h / 2] >> 16 * (h % 2));
    v[h] = i + h < cols ? gelu(float_of_bf16(a)) * float_of_bf16(b) : 0;
  }
  *reinterpret_cast<Word4*>(gate + at) = eight_to_bf16(v);
}

// x = cap tanh(x / cap). Bytes: x in and out. Layout: a thread a value.
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4) softcap_kernel(float* x, int64_t n, float cap) {
  start();
  const int64_t i = static_cast<int64_t>(block_x()) * kBlockThreads + thread_x();
  if (i < n) x[i] = capped(x[i], cap);
}

struct Embed {
  Device& d;
  const Planes& table;
  const Row* rows;
  int n, cols;
  float scale;
  float* x;
  template <DType T>
  void run() const {
    d.launch("embed", embed_kernel<T>, {n}, kBlockThreads, 0, table, rows, cols, scale, x);
  }
};

int blocks_for(int64_t n) { return static_cast<int>((n + kBlockThreads - 1) / kBlockThreads); }

}  // namespace

void embed(Device& d, DType type, const Planes& table, const Row* rows, int n, int cols, float scale, float* x) {
  with_type(type, Embed{d, table, rows, n, cols, scale, x});
}

void rope_and_store(Device& d, const RopeArgs& a) { d.launch("rope", rope_kernel, {a.H + 2 * a.G, a.n}, 32, 0, a); }

void norm_and_add(Device& d, const float* y, const float* weight, float eps, int n, int cols, float* x) {
  d.launch("norm_add", norm_add_kernel, {n}, kBlockThreads, 0, y, weight, eps, cols, x);
}

void to_bf16(Device& d, const float* x, const int32_t* pick, const float* norm, float eps, int n, int cols, int k,
             uint16_t* out) {
  d.launch("to_bf16", to_bf16_kernel, {n}, kBlockThreads, 0, x, pick, norm, eps, cols, k, out);
}

void geglu(Device& d, float* gate, const float* up, int64_t n) {
  d.launch("geglu", geglu_kernel, {blocks_for(n)}, kBlockThreads, 0, gate, up, n);
}
void geglu(Device& d, uint16_t* gate, const uint16_t* up, int n, int cols, int k) {
  d.launch("geglu", geglu16_kernel, {blocks_for(k / 8), n}, kBlockThreads, 0, gate, up, cols, k);
}

void softcap(Device& d, float* x, int64_t n, float cap) {
  d.launch("softcap", softcap_kernel, {blocks_for(n)}, kBlockThreads, 0, x, n, cap);
}

}  // namespace gemma::gpu
