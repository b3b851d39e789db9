// The only description of Gemma's forward pass, for every generation, prefill and decode, CPU and GPU.
// docs/MODEL.md walks through it; tests/reference.py is the same in NumPy.
#include "model.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>

#include "quant.h"

namespace gemma {

void Cache::truncate(int64_t n) {
  GEMMA_CHECK(n >= 0 && n <= length_, "truncate(", n, "): the cache holds ", length_.load(), " positions");
  if (ring_ && n > 0) {
    // Position n sees keys from n - window + 1; slots hold the positions from high - ring on.
    const int64_t oldest = std::max<int64_t>(0, high_ - ring_);
    GEMMA_CHECK(oldest == 0 || n - window_ + 1 >= oldest, "truncate(", n,
                "): sliding-window layers hold positions from ", oldest, " on, so this cache can go back to ",
                oldest + window_ - 1, " at most, or to 0");
  }
  length_ = n;
  if (n == 0) high_ = 0;
}

std::unique_ptr<Cache> Cache::clone() const {
  auto copy = std::make_unique<Cache>(owner_, store_->clone(length_, high_), capacity_, ring_, window_);
  copy->length_ = length_.load();
  copy->high_ = high_;
  return copy;
}

namespace {

std::string shape_text(int64_t rows, int64_t cols, bool vector) {
  std::ostringstream s;
  if (vector)
    s << "[" << cols << "]";
  else
    s << "[" << rows << ", " << cols << "]";
  return s.str();
}

// Small models suffer most from rounded activations and spend least of their time in products: below this hidden size
// activation blocks are 16 long instead of 32 (docs/MODEL.md has the measurements).
constexpr int64_t kFineBelow = 2048;

// Nothing yet; where it will go is the caller's arrays from this row on.
Wanted wanted_at(const Output& out, int64_t row, int64_t vocab) {
  Wanted w;
  if (out.kind == Output::top_k || out.kind == Output::all_top_k)
    w.best = out.best.from(row);
  else
    w.logits = out.values + row * vocab;
  return w;
}

DType matrix_target(const HostTensor& t, DType wanted, bool embedding) {
  if (wanted == DType::F32) return encoding(t.type).quantized ? t.type : DType::BF16;
  if (wanted == DType::Q4_0 && embedding) return DType::Q8_0;
  return wanted;
}

// A model's tensors on their way to a backend, each by its name in Hugging Face's checkpoints.
struct Loader {
  const Config& c;
  const std::map<std::string, HostTensor>& tensors;
  Backend& backend;
  const LoadOptions& options;
  std::vector<Model::Weight>& listing;
  std::set<std::string> used = {};

  const HostTensor& find(const std::string& name, int64_t rows, int64_t cols, bool vector) {
    auto it = tensors.find(name);
    GEMMA_CHECK(it != tensors.end(), "tensor \"", name, "\" is missing; the config needs it with shape ",
                shape_text(rows, cols, vector));
    const HostTensor& t = it->second;
    GEMMA_CHECK(t.rows == rows && t.cols == cols, "tensor \"", name, "\" has shape ",
                shape_text(t.rows, t.cols, vector), ", the config needs ", shape_text(rows, cols, vector));
    used.insert(name);
    return t;
  }

  std::unique_ptr<Matrix> matrix(const std::string& name, int64_t rows, int64_t cols) {
    const HostTensor& t = find(name, rows, cols, false);
    const DType target = matrix_target(t, options.target, name == "model.embed_tokens.weight");
    auto m = backend.load_matrix(t, target, c.hidden_size < kFineBelow, options.consumed);
    listing.push_back({name, m.get(), nullptr, 0});
    return m;
  }

  std::unique_ptr<Buffer> vector(const std::string& name, int64_t n) {
    const HostTensor& t = find(name, 1, n, true);
    GEMMA_CHECK(!encoding(t.type).quantized, "tensor \"", name, "\" is a vector and cannot be quantised (",
                encoding(t.type).name, ")");
    auto v = backend.load_vector(t, c.norm_offset);
    listing.push_back({name, nullptr, v.get(), n});
    return v;
  }

  LayerWeights layer(int64_t i) {
    const int64_t D = c.hidden_size, F = c.intermediate_size, E = c.head_dim;
    const std::string p = "model.layers." + std::to_string(i) + ".";
    const bool slides =
        i < static_cast<int64_t>(c.sliding_layers.size()) && c.sliding_layers[i] && c.sliding_window > 0;
    LayerWeights w;
    w.index = i;
    w.window = slides ? c.sliding_window : 0;
    w.rope_base = slides ? c.rope_base_local : c.rope_base;
    w.rope_scale = slides ? 1.0f : c.rope_scale;

    w.attn_norm = vector(p + "input_layernorm.weight", D);
    w.q = matrix(p + "self_attn.q_proj.weight", c.num_heads * E, D);
    w.k = matrix(p + "self_attn.k_proj.weight", c.num_kv_heads * E, D);
    w.v = matrix(p + "self_attn.v_proj.weight", c.num_kv_heads * E, D);
    w.o = matrix(p + "self_attn.o_proj.weight", D, c.num_heads * E);
    if (c.qk_norm) {
      w.q_norm = vector(p + "self_attn.q_norm.weight", E);
      w.k_norm = vector(p + "self_attn.k_norm.weight", E);
    }
    if (c.post_norms) {
      w.post_attn_norm = vector(p + "post_attention_layernorm.weight", D);
      w.ffn_norm = vector(p + "pre_feedforward_layernorm.weight", D);
      w.post_ffn_norm = vector(p + "post_feedforward_layernorm.weight", D);
    } else {
      w.ffn_norm = vector(p + "post_attention_layernorm.weight", D);  // the norm before the FFN, despite its name
    }
    w.gate = matrix(p + "mlp.gate_proj.weight", F, D);
    w.up = matrix(p + "mlp.up_proj.weight", F, D);
    w.down = matrix(p + "mlp.down_proj.weight", D, F);
    return w;
  }
};

}  // namespace

Model::Model(const Config& config, const std::map<std::string, HostTensor>& tensors, std::unique_ptr<Backend> backend,
             const LoadOptions& options)
    : config_(config), backend_(std::move(backend)), kv_f32_(options.kv_f32) {
  const Config& c = config_;
  Loader loader{c, tensors, *backend_, options, listing_};
  layers_.reserve(c.num_layers);
  embedding_ = loader.matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    layers_.push_back(loader.layer(i));
    const int64_t window = layers_.back().window;
    rings_.push_back(window ? (window + kMaxRows + kKeyBlock - 1) / kKeyBlock * kKeyBlock : 0);
    ring_ = std::max(ring_, rings_.back());
  }
  final_norm_ = loader.vector("model.norm.weight", c.hidden_size);
  for (const auto& [name, t] : tensors)
    GEMMA_CHECK(loader.used.count(name), "tensor \"", name, "\" is not part of a model with this config");

  x_ = backend_->new_buffer();
  q_ = backend_->new_buffer();
  attended_ = backend_->new_buffer();
  const int64_t most = backend_->prepare(c);
  if (most) most_rows_ = most;
  resize_buffers(most);
}

size_t Model::weight_bytes() const {
  size_t total = 0;
  for (const Weight& w : listing_) total += w.matrix ? w.matrix->bytes : w.length * sizeof(float);
  return total;
}

int64_t Model::kv_bytes_per_token() const {
  return 2 * config_.num_layers * config_.num_kv_heads * config_.head_dim * (kv_f32_ ? 4 : 2);
}

std::unique_ptr<Cache> Model::new_cache(int64_t capacity) const {
  KvShape shape;
  shape.f32 = kv_f32_;
  shape.ring = rings_;
  shape.capacity = capacity;
  return std::make_unique<Cache>(this, backend_->new_kv(config_, shape), capacity, ring_, config_.sliding_window);
}

void Model::resize_buffers(int64_t rows) {
  const Config& c = config_;
  backend_->resize(*x_, rows * c.hidden_size);
  backend_->resize(*q_, rows * c.num_heads * c.head_dim);
  backend_->resize(*attended_, rows * c.num_heads * c.head_dim);
}

// Rows `pick` of others, each a span of its own.
static Rows picked_of(const Rows& rows, const std::vector<int64_t>& pick) {
  Rows some;
  auto span = rows.spans.begin();
  for (int64_t row : pick) {
    while (row >= span->row + span->count) ++span;
    some.spans.push_back({span->kv, some.n++, 1, span->position + row - span->row});
    some.tokens.push_back(rows.tokens[row]);
  }
  return some;
}

// Embedding, every layer, and the head for what is wanted. `every_row`: x is wanted of all rows afterwards.
void Model::pass(const Rows& rows, const Wanted& wanted, bool every_row, const Poll& poll) {
  const Config& c = config_;
  Backend& b = *backend_;
  resize_buffers(rows.n);
  b.pass(rows, wanted, [&] {
    b.embed(*embedding_, rows, std::sqrt(static_cast<float>(c.hidden_size)), *x_);
    const Rows* left = &rows;
    const Wanted* asked = &wanted;
    Rows some;
    Wanted asked_of_some;
    for (const LayerWeights& w : layers_) {
      poll();
      b.qkv(c, w, rows, *x_, *q_);
      // The last layer's keys and values are in the cache: of the rest only what is wanted need be computed.
      if (&w == &layers_.back() && !every_row && static_cast<int64_t>(wanted.pick.size()) < rows.n &&
          b.keep_rows(c, wanted.pick, *x_, *q_)) {
        if (wanted.pick.empty()) return;
        some = picked_of(rows, wanted.pick);
        asked_of_some = wanted;
        std::iota(asked_of_some.pick.begin(), asked_of_some.pick.end(), 0);
        left = &some;
        asked = &asked_of_some;
      }
      b.attention(c, w, *left, *q_, *attended_);
      b.project_add(c, w, *left, *attended_, *x_);
      b.feed_forward(c, w, *left, *x_);
    }
    head(*asked);
  });
}

void Model::head(const Wanted& w) {
  if (w.pick.empty()) return;
  if (w.logits)
    backend_->logits(config_, *final_norm_, *embedding_, *x_, w.pick, w.logits);
  else
    backend_->top_k(config_, *final_norm_, *embedding_, *x_, w.pick, w.best);
}

void Model::check(const std::vector<std::vector<int32_t>>& tokens, const std::vector<Cache*>& caches) const {
  const size_t batch = tokens.size();
  GEMMA_CHECK(batch > 0, "no sequence given");
  GEMMA_CHECK(batch == caches.size(), batch, " token arrays but ", caches.size(), " caches");
  for (size_t i = 0; i < batch; ++i) {
    const Cache& cache = *caches[i];
    const int64_t n = static_cast<int64_t>(tokens[i].size());
    GEMMA_CHECK(cache.owner_ == this, "cache ", i, " belongs to another model");
    for (size_t j = 0; j < i; ++j) GEMMA_CHECK(caches[j] != caches[i], "sequences ", j, " and ", i, " share one cache");
    GEMMA_CHECK(n > 0, "sequence ", i, " has no tokens; at least one is needed");
    GEMMA_CHECK(n <= cache.capacity_ - cache.length_, "the cache holds ", cache.length(), " of ", cache.capacity_,
                " positions; ", n, " more tokens do not fit");
    for (int32_t t : tokens[i])
      GEMMA_CHECK(t >= 0 && t < config_.vocab_size, "token id ", t, " is outside the embedding's rows [0, ",
                  config_.vocab_size, ")");
  }
}

// In slices, so that a cancelled call stops soon.
void Model::results_of_every_row(const std::vector<int32_t>& tokens, int64_t done, int64_t rows, const Output& out,
                                 const Poll& poll) {
  if (out.kind == Output::all_logits || out.kind == Output::all_top_k) {
    for (int64_t r = 0; r < rows; r += 64) {
      poll();
      Wanted slice = wanted_at(out, done + r, config_.vocab_size);
      for (int64_t j = r; j < std::min(rows, r + 64); ++j) slice.pick.push_back(j);
      head(slice);
    }
  } else if (out.kind == Output::score) {
    const int64_t scored = std::min(rows, static_cast<int64_t>(tokens.size()) - 1 - done);
    for (int64_t r = 0; r < scored; r += 128) {
      poll();
      std::vector<int64_t> pick(std::min<int64_t>(scored - r, 128));
      std::iota(pick.begin(), pick.end(), r);
      const auto next = tokens.begin() + done + r + 1;
      backend_->logprobs(config_, *final_norm_, *embedding_, *x_, pick, {next, next + pick.size()},
                         out.values + done + r);
    }
  }
}

void Model::forward(const std::vector<std::vector<int32_t>>& tokens, const std::vector<Cache*>& caches,
                    const Output& out, const Poll& poll) {
  check(tokens, caches);
  const size_t batch = tokens.size();
  std::vector<int64_t> done(batch, 0);
  for (bool more = true; more;) {
    poll();
    // The next chunk: up to most_rows_ rows, filled sequence by sequence.
    Rows rows;
    std::vector<size_t> owner;
    for (size_t i = 0; i < batch && rows.n < most_rows_; ++i) {
      const int64_t left = static_cast<int64_t>(tokens[i].size()) - done[i];
      const int64_t count = std::min(left, most_rows_ - rows.n);
      if (count == 0) continue;
      rows.spans.push_back({caches[i]->store_.get(), rows.n, count, caches[i]->length_});
      rows.tokens.insert(rows.tokens.end(), tokens[i].begin() + done[i], tokens[i].begin() + done[i] + count);
      rows.n += count;
      owner.push_back(i);
    }
    for (size_t s = 0; s < owner.size(); ++s) {
      Cache& cache = *caches[owner[s]];
      const int64_t end = rows.spans[s].position + rows.spans[s].count;
      cache.store_->reserve(end);
      cache.bytes_ = cache.store_->bytes();
      cache.high_ = std::max(cache.high_, end);  // slots are overwritten even if this chunk is cancelled
    }
    Wanted last;  // results of sequences that end in this chunk
    const bool last_rows = out.kind == Output::last_logits || out.kind == Output::top_k;
    if (last_rows) {
      // Chunks fill up in the order of the sequences, so those that end in one stand side by side, from owner[0] on: the head's
      // weights are read once for all of them.
      last = wanted_at(out, static_cast<int64_t>(owner[0]), config_.vocab_size);
      for (size_t s = 0; s < owner.size(); ++s) {
        const Span& span = rows.spans[s];
        if (done[owner[s]] + span.count == static_cast<int64_t>(tokens[owner[s]].size()))
          last.pick.push_back(span.row + span.count - 1);
      }
    }
    pass(rows, last, !last_rows, poll);

    if (!last_rows) results_of_every_row(tokens[0], done[0], rows.n, out, poll);  // before tokens count as appended
    for (size_t s = 0; s < owner.size(); ++s) {
      caches[owner[s]]->length_ += rows.spans[s].count;
      done[owner[s]] += rows.spans[s].count;
    }
    more = false;
    for (size_t i = 0; i < batch; ++i) more |= done[i] < static_cast<int64_t>(tokens[i].size());
  }
}

}  // namespace gemma
