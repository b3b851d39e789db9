// A Gemma of any generation: its weights, its KV caches, and the one forward pass.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backend.h"
#include "config.h"
#include "tensor.h"

namespace gemma {

// One sequence's keys and values, and how many positions of them are valid.
class Cache {
 public:
  Cache(const void* owner, std::unique_ptr<KvStore> store, int64_t capacity, int64_t smallest_ring, int64_t window)
      : owner_(owner),
        store_(std::move(store)),
        capacity_(capacity),
        ring_(smallest_ring),
        window_(window),
        bytes_(store_->bytes()) {}

  int64_t length() const { return length_; }
  int64_t capacity() const { return capacity_; }
  size_t bytes() const { return bytes_; }
  // Keeps the first n positions. Throws InputError when a sliding layer no longer holds what position n would see.
  void truncate(int64_t n);
  std::unique_ptr<Cache> clone() const;

 private:
  friend class Model;
  const void* owner_;
  std::unique_ptr<KvStore> store_;
  int64_t capacity_;
  int64_t ring_;  // positions the sliding layers hold; 0: the model has none
  int64_t window_;
  // Read by other threads while a pass runs.
  std::atomic<int64_t> length_{0};
  std::atomic<size_t> bytes_;
  // One past the furthest position written since the cache was empty: slots hold [high - ring, high).
  int64_t high_ = 0;
};

struct LoadOptions {
  bool kv_f32 = false;
  DType target =
      DType::F32;  // F32: as stored; else BF16, Q8_0 or Q4_0 for every matrix (Q4_0 keeps the embedding at Q8_0)
  Consumed consumed;
};

// What a forward pass is to return for the last row of each sequence, or for every row.
struct Output {
  enum Kind { none, last_logits, all_logits, top_k, all_top_k, score } kind = none;
  float* values = nullptr;  // last_logits [B, V]; and for B = 1: all_logits [n, V]; score [n - 1]
  Best best;                // top_k: B rows; all_top_k, for B = 1: n rows
};

class Model {
 public:
  Model(const Config& config, const std::map<std::string, HostTensor>& tensors, std::unique_ptr<Backend> backend,
        const LoadOptions& options);

  const Config& config() const { return config_; }
  Backend& backend() { return *backend_; }
  size_t weight_bytes() const;
  int64_t kv_bytes_per_token() const;
  bool kv_f32() const { return kv_f32_; }
  std::unique_ptr<Cache> new_cache(int64_t capacity) const;

  // Appends tokens[i] to caches[i] for every i and fills `out`. Throws InputError before anything is computed when the input
  // is wrong. When `poll` throws, each cache's length stays at the last whole chunk.
  void forward(const std::vector<std::vector<int32_t>>& tokens, const std::vector<Cache*>& caches, const Output& out,
               const Poll& poll);

  struct Weight {
    std::string name;
    const Matrix* matrix;  // one of the two is set
    const Buffer* vector;
    int64_t length;  // of the vector (norm_offset already added)
  };
  const std::vector<Weight>& weights() const { return listing_; }

 private:
  void resize_buffers(int64_t rows);
  void check(const std::vector<std::vector<int32_t>>& tokens, const std::vector<Cache*>& caches) const;
  void pass(const Rows& rows, const Wanted& wanted, bool every_row, const Poll& poll);
  void head(const Wanted& wanted);
  // Of rows [0, rows) in x_, which are tokens [done, done + rows).
  void results_of_every_row(const std::vector<int32_t>& tokens, int64_t done, int64_t rows, const Output& out,
                            const Poll& poll);

  Config config_;
  std::unique_ptr<Backend> backend_;
  bool kv_f32_;
  std::vector<int64_t> rings_;  // a layer's ring, 0 for full attention
  int64_t ring_ = 0;
  int64_t most_rows_ = kMaxRows;  // a pass
  std::unique_ptr<Matrix> embedding_;
  std::unique_ptr<Buffer> final_norm_;
  std::vector<LayerWeights> layers_;
  std::vector<Weight> listing_;
  std::unique_ptr<Buffer> x_, q_, attended_;
};

}  // namespace gemma
