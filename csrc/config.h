// The numbers that make a Gemma. Generations differ in these values and in nothing else.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace gemma {

constexpr int64_t kMaxHeadDim = 1024;

struct Config {
  int64_t vocab_size = 0;         // rows of the embedding, which is also the head
  int64_t hidden_size = 0;        // D: width of the residual stream
  int64_t intermediate_size = 0;  // F: width of one branch of the GeGLU
  int64_t num_layers = 0;
  int64_t num_heads = 0;     // H: query heads
  int64_t num_kv_heads = 0;  // 1: multi-query, H: multi-head, between: grouped
  int64_t head_dim = 0;      // not always D / H
  int64_t context_length = 0;
  float rms_norm_eps = 1e-6f;
  float norm_offset = 1.0f;    // added to stored norm weights: 1 for Hugging Face files, 0 for GGUF (already added)
  float query_scale = 0.0f;    // q is multiplied by this
  float attn_softcap = 0.0f;   // cap * tanh(score / cap); 0: none
  float final_softcap = 0.0f;  // the same on the logits
  int64_t sliding_window = 0;  // keys that a sliding layer sees, the query's own included
  std::vector<bool> sliding_layers;  // one a layer
  float rope_base = 10000.0f;        // full-attention layers
  float rope_base_local = 10000.0f;  // sliding layers
  float rope_scale = 1.0f;           // full-attention layers divide the position by this
  bool qk_norm = false;              // RMSNorm on q and k heads before RoPE (Gemma 3)
  bool post_norms = false;           // RMSNorm on each half's output before it is added (Gemma 2, 3)
};

// A head's E/2 angles a position: base^(-2i/E) / scale, rounded to float32 as transformers does.
inline std::vector<float> rope_frequencies(float base, float scale, int64_t head_dim) {
  std::vector<float> f(static_cast<size_t>(head_dim / 2));
  for (size_t i = 0; i < f.size(); ++i)
    f[i] = static_cast<float>(
               std::pow(static_cast<double>(base), -2.0 * static_cast<double>(i) / static_cast<double>(head_dim))) /
           scale;
  return f;
}

}  // namespace gemma
