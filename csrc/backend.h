// The seam between the model and the machine: the operations of one Gemma layer, coarse enough that a GPU can make each
// of them one kernel. model.cpp calls these and nothing else; csrc/cpu and csrc/cuda implement them.
//
// Letters: N rows (tokens) of this pass, D hidden, H query heads, G key/value heads, E head size, F FFN width, V vocabulary.
// All activations are float32, row-major, in memory of the backend (`Buffer`).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "config.h"
#include "tensor.h"

namespace gemma {

// Thrown out of a pass when `Poll` says so.
struct CancelledError : std::runtime_error {
  CancelledError() : std::runtime_error("cancelled") {}
};

using Poll = std::function<void()>;  // called between layers; throws to stop
// Source bytes [begin, end) of a tensor are no longer needed.
using Consumed = std::function<void(const std::string& name, size_t begin, size_t end)>;

// A weight matrix [rows, cols] in the backend's memory, in one of the encodings of quant.h.
struct Matrix {
  virtual ~Matrix() = default;
  DType type = DType::BF16;
  int64_t rows = 0, cols = 0;
  size_t bytes = 0;
  bool in_place = false;  // the caller's buffer is used where it lies and must stay
  // Panels (quantised) or rows (BF16), for saving; null if not on the host.
  virtual const uint8_t* host_data() const = 0;
};

// Memory of a backend, by role; grown as needed and kept.
struct Buffer {
  virtual ~Buffer() = default;
  float* data = nullptr;
};

// Keys and values of one sequence. Which positions are valid is the model's business (Cache in model.h).
struct KvStore {
  virtual ~KvStore() = default;
  virtual void reserve(int64_t length) = 0;  // commits memory for positions [0, length)
  virtual size_t bytes() const = 0;
  // A copy of positions [0, length), or of all. `high`: how far rings have been written.
  virtual std::unique_ptr<KvStore> clone(int64_t length, int64_t high) const = 0;
};

struct KvShape {
  bool f32 = false;           // else bf16
  std::vector<int64_t> ring;  // positions a layer holds: slot = position % ring; 0: every position has its own
  int64_t capacity = 0;       // positions that the sequence may have
};

// A run of rows of a pass that belong to one sequence: rows [row, row + count) stand at [position, position + count).
struct Span {
  KvStore* kv;
  int64_t row, count, position;
};

struct Rows {
  int64_t n = 0;
  std::vector<int32_t> tokens;  // [N]
  std::vector<Span> spans;      // cover [0, N) in order
};

// Rows a pass, as a rule, and how far a sliding layer's ring reaches behind its window.
constexpr int64_t kMaxRows = 512;
constexpr int64_t kKeyBlock = 64;  // keys an attention block: starts at absolute multiples of this

struct LayerWeights {
  // Null where the model has none.
  std::unique_ptr<Buffer> attn_norm, post_attn_norm, ffn_norm, post_ffn_norm, q_norm, k_norm;
  std::unique_ptr<Matrix> q, k, v, o, gate, up, down;
  int64_t index = 0;
  int64_t window = 0;  // 0: full attention
  float rope_base = 0, rope_scale = 1;
};

// What a device reaches at best.
struct Ceilings {
  double bytes_per_s = 0, ops_per_s = 0;
  std::string product;  // what did the operations
};

// What `top_k` is asked, and where its results go.
struct Best {
  int64_t k = 0;
  std::vector<int32_t> also;
  int32_t* ids = nullptr;
  float *values = nullptr, *also_values = nullptr;

  Best from(int64_t row) const {
    Best b = *this;
    b.ids += row * k;
    b.values += row * k;
    if (b.also_values) b.also_values += row * static_cast<int64_t>(also.size());
    return b;
  }
};

// What is asked of rows of x behind the last layer: their logits, or the best of them.
struct Wanted {
  std::vector<int64_t> pick;  // none: nothing is asked
  float* logits = nullptr;    // [pick.size(), V]; null: best
  Best best;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const char* device() const = 0;
  virtual int threads() const = 0;

  // Encodes `source` as `target` (tiled unless BF16), or takes it where it lies. `consumed` may be empty. `fine`: where activations
  // are quantised, with smaller blocks.
  virtual std::unique_ptr<Matrix> load_matrix(const HostTensor& source, DType target, bool fine,
                                              const Consumed& consumed) = 0;
  virtual std::unique_ptr<Buffer> load_vector(const HostTensor& source, float offset) = 0;
  virtual std::unique_ptr<Buffer> new_buffer() = 0;
  virtual void resize(Buffer& buffer, int64_t floats) = 0;
  virtual std::unique_ptr<KvStore> new_kv(const Config& config, const KvShape& shape) = 0;

  // After the last matrix is loaded: memory for passes may be allocated now. Returns how many rows a pass has at most,
  // which the caller's buffers are to hold from the start; 0: kMaxRows, and buffers may grow.
  virtual int64_t prepare(const Config&) { return 0; }
  // Runs `body`, the operations from `embed` to the `logits` or `top_k` that is `wanted` of these rows, or a recording of an earlier one
  // alike. Results are there when it returns.
  virtual void pass(const Rows&, const Wanted&, const std::function<void()>& body) { body(); }

  // Measures: reads `bytes` of the device's memory, multiplies bf16 matrices [size, size] (a multiply-add is two operations). Zeros
  // from the CPU, whose ceilings are in cpu/probes.h.
  virtual Ceilings ceilings(size_t, int64_t) { return {}; }

  // The operations of a pass, in the order of model.cpp. A backend may leave x, q and the stores unfinished until the next operation on
  // them.

  // x[N, D] = table[token] * scale
  virtual void embed(const Matrix& table, const Rows& rows, float scale, Buffer& x) = 0;
  // q[N, H, E] = rope(norm(W_q rmsnorm(x))) * query_scale; k and v go to the spans' stores.
  virtual void qkv(const Config& c, const LayerWeights& w, const Rows& rows, const Buffer& x, Buffer& q) = 0;
  // Rows `pick` (ascending) of x and q become rows 0, 1, ... Returns whether it did: a backend may prefer that all rows go on.
  virtual bool keep_rows(const Config&, const std::vector<int64_t>&, Buffer&, Buffer&) { return false; }
  // out[N, H, E] = softmax(mask(softcap(q k))) v over each row's own sequence
  virtual void attention(const Config& c, const LayerWeights& w, const Rows& rows, const Buffer& q, Buffer& out) = 0;
  // x[N, D] += post_norm(W_o attended), attended [N, H, E]; without post_norm x += W_o attended
  virtual void project_add(const Config& c, const LayerWeights& w, const Rows& rows, const Buffer& attended,
                           Buffer& x) = 0;
  // x[N, D] += post_norm(W_down (gelu(W_gate y) * (W_up y))), y = rmsnorm(x)
  virtual void feed_forward(const Config& c, const LayerWeights& w, const Rows& rows, Buffer& x) = 0;

  // Host results. `pick` lists rows of x.
  // logits[i, V] = softcap(W rmsnorm(x[pick[i]]))
  virtual void logits(const Config& c, const Buffer& norm, const Matrix& head, const Buffer& x,
                      const std::vector<int64_t>& pick, float* out) = 0;
  // out[i] = log softmax(logits(x[pick[i]]))[target[i]], without an array of logits a row
  virtual void logprobs(const Config& c, const Buffer& norm, const Matrix& head, const Buffer& x,
                        const std::vector<int64_t>& pick, const std::vector<int32_t>& target, float* out) = 0;
  // Of logits(x[pick[i]]): the k best of the tokens that `also` (sorted, each once) does not list, best first, ties to the lower id; and
  // those of `also`. best.ids, values: [pick.size(), k]; also_values [pick.size(), also.size()]
  virtual void top_k(const Config& c, const Buffer& norm, const Matrix& head, const Buffer& x,
                     const std::vector<int64_t>& pick, const Best& best) = 0;
};

std::unique_ptr<Backend> make_cpu_backend(int threads);
// Throws std::runtime_error where there is no usable device, or when built without CUDA.
// `deterministic`: the same bits for any chunks of a prompt, and for decode.
std::unique_ptr<Backend> make_cuda_backend(int device, bool deterministic);
// The same kernels on the CPU, for tests; very slow.
std::unique_ptr<Backend> make_emulated_cuda_backend(bool deterministic);
std::string cuda_status();  // "" when a device is usable, else why not

}  // namespace gemma
