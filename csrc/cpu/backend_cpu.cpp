// The CPU backend: the operations of backend.h out of the kernels of kernels.h, shared out among threads.
// It checks nothing: shapes were checked when the model was built, tokens and positions when a call came in.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

#include "../backend.h"
#include "../quant.h"
#include "../select.h"
#include "head.h"
#include "kernels.h"
#include "kv.h"
#include "matmul.h"
#include "threads.h"

namespace gemma {

namespace {

static_assert(kKeys == kKeyBlock, "kernels and caches agree on the attention block");

struct CpuBuffer final : Buffer {
  Memory memory;
};

const CpuMatrix& cpu(const Matrix& m) { return static_cast<const CpuMatrix&>(m); }

// cos and sin of every row's rotation: [rows][E / 2]
struct RopeTable {
  float base, scale;
  std::vector<float> cos, sin;
};

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(int threads) : kernels_(kernels()), pool_(threads) {}

  const char* device() const override { return "cpu"; }
  int threads() const override { return pool_.size(); }

  std::unique_ptr<Matrix> load_matrix(const HostTensor& source, DType target, bool fine,
                                      const Consumed& consumed) override {
    auto m = load_cpu_matrix(pool_, source, target, consumed);
    m->fine = fine;
    return m;
  }

  std::unique_ptr<Buffer> load_vector(const HostTensor& source, float offset) override {
    auto b = std::make_unique<CpuBuffer>();
    resize(*b, source.cols);
    decode_row(source.type, source.data, source.cols, b->data);
    for (int64_t i = 0; i < source.cols; ++i) b->data[i] += offset;
    return b;
  }

  std::unique_ptr<Buffer> new_buffer() override { return std::make_unique<CpuBuffer>(); }

  void resize(Buffer& buffer, int64_t floats) override {
    auto& b = static_cast<CpuBuffer&>(buffer);
    b.memory.grow(floats * sizeof(float));
    b.data = reinterpret_cast<float*>(b.memory.data());
  }

  std::unique_ptr<KvStore> new_kv(const Config& config, const KvShape& shape) override {
    return std::make_unique<CpuKv>(config, shape);
  }

  void embed(const Matrix& table, const Rows& rows, float scale, Buffer& x) override {
    ropes_.clear();
    positions_.clear();
    post_norm_ = nullptr;  // whatever a cancelled pass has left
    unrotated_ = {};
    for (const Span& s : rows.spans)
      for (int64_t i = 0; i < s.count; ++i) positions_.push_back(s.position + i);
    const int64_t d = table.cols;
    pool_.parallel_for(rows.n, 2, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = rows.tokens[i];
        float* out = x.data + i * d;
        if (encoding(table.type).quantized)
          decode_tiled_row(table.type, cpu(table).data, table.rows, d, t, out);
        else
          decode_row(table.type, cpu(table).bf16_row(t), d, out);
        for (int64_t j = 0; j < d; ++j) out[j] *= scale;
      }
    });
  }

  void qkv(const Config& c, const LayerWeights& w, const Rows& rows, const Buffer& x, Buffer& q) override {
    const int64_t n = rows.n, E = c.head_dim;
    grow(k_, n * c.num_kv_heads * E);
    grow(v_, n * c.num_kv_heads * E);
    normed(c, *w.attn_norm, {w.q.get(), w.k.get(), w.v.get()}, n, x);
    matmul(kernels_, pool_, acts_,
           {{&cpu(*w.q), q.data, c.num_heads * E},
            {&cpu(*w.k), k_.data(), c.num_kv_heads * E},
            {&cpu(*w.v), v_.data(), c.num_kv_heads * E}});
    unrotated_ = {&w, &rows};
    if (!one_each(rows)) rotate_and_store(c, q.data);
  }

  bool keep_rows(const Config& c, const std::vector<int64_t>& pick, Buffer& x, Buffer& q) override {
    const int64_t d = c.hidden_size, h = c.num_heads * c.head_dim;
    rotate_and_store(c, q.data);
    for (int64_t i = 0; i < static_cast<int64_t>(pick.size()); ++i) {
      std::memmove(x.data + i * d, x.data + pick[i] * d, d * sizeof(float));
      std::memmove(q.data + i * h, q.data + pick[i] * h, h * sizeof(float));
    }
    return true;
  }

  // Leaves what it finds as activations too, for project_add.
  void attention(const Config& c, const LayerWeights& w, const Rows& rows, const Buffer& q, Buffer& out) override {
    const std::vector<Tile> tiles = tiles_of(c, w, rows);
    const int64_t width = c.num_heads * c.head_dim, e = (c.head_dim + 31) / 32 * 32;
    int64_t most_blocks = 0;
    for (const Tile& t : tiles) most_blocks = std::max(most_blocks, t.end_block - t.first_block);
    const int64_t room = tile_floats(tiles, e);
    const int64_t count = static_cast<int64_t>(tiles.size());
    const auto attend = [&](int64_t i, bool more, float* block) {
      const Tile& t = tiles[i];
      TileState state(t.rows * e);
      float* const rows_q = block + room;
      load_queries(c, t, q.data, e, rows_q);
      const void* after = more && i + 1 < count ? first_keys(w, tiles[i + 1]) : nullptr;
      for (int64_t b = t.first_block; b < t.end_block; ++b) {
        Part part = attend_block(c, w, t, rows_q, e, b, after, block);
        state.fold(kernels_, part, t.rows, block, e);
      }
      finish(c, t, state, e, out.data);
    };
    const auto fill_threads = [&](int64_t items) {
      return items >= 2 * pool_.size() || pool_.size() == 1 || most_blocks < 4;
    };
    if (one_each(rows) && fill_threads(rows.n)) {
      // A thread takes a row from its projections to the next product's activations, and nobody waits in between.
      const Unrotated left = std::exchange(unrotated_, {});
      if (left.w) rope_table(w.rope_base, w.rope_scale, c.head_dim);
      acts_.reserve(kernels_, {w.o.get()}, rows.n, width);
      const int64_t each = count / rows.n;  // tiles of a row
      pool_.parallel_for(rows.n, 1, [&](int64_t begin, int64_t end, int thread) {
        const Memory memory((room + query_floats(room)) * sizeof(float));
        auto* const block = reinterpret_cast<float*>(memory.data());
        for (int64_t r = begin; r < end; ++r) {
          if (left.w) rotate_and_store(c, w, rows.spans[r], r, q.data);
          const bool more = r + 1 < end || pool_.has_more(thread);
          for (int64_t i = r * each; i < (r + 1) * each; ++i) attend(i, more || i + 1 < (r + 1) * each, block);
          acts_.put(kernels_, 0, width, r, 1, out.data + r * width, width);
        }
      });
      return;
    }
    rotate_and_store(c, q.data);
    if (fill_threads(count)) {
      pool_.parallel_for(count, 1, [&](int64_t begin, int64_t end, int) {
        const Memory memory((room + query_floats(room)) * sizeof(float));
        auto* const block = reinterpret_cast<float*>(memory.data());
        for (int64_t i = begin; i < end; ++i) attend(i, i + 1 < end, block);
      });
    } else {
      attend_in_parts(c, w, tiles, most_blocks, room, q, out);
    }
    acts_.prepare(kernels_, pool_, {w.o.get()}, rows.n, width, [&](int64_t i, float*) { return out.data + i * width; });
  }

  void project_add(const Config&, const LayerWeights& w, const Rows&, const Buffer&, Buffer& x) override {
    product_add(*w.o, acts_, w.post_attn_norm.get(), x);
  }

  void feed_forward(const Config& c, const LayerWeights& w, const Rows& rows, Buffer& x) override {
    normed(c, *w.ffn_norm, {w.gate.get(), w.up.get()}, rows.n, x);
    matmul_geglu(kernels_, pool_, acts_, cpu(*w.gate), cpu(*w.up), cpu(*w.down), hidden_);
    product_add(*w.down, hidden_, w.post_ffn_norm.get(), x);
  }

  void logits(const Config& c, const Buffer& norm, const Matrix& head, const Buffer& x,
              const std::vector<int64_t>& pick, float* out) override {
    normed(c, norm, {&head}, static_cast<int64_t>(pick.size()), x, &pick);
    matmul(kernels_, pool_, acts_, {{&cpu(head), out, c.vocab_size}});
    if (c.final_softcap > 0) {
      const int64_t slice = 4096, slices = (c.vocab_size + slice - 1) / slice;
      pool_.parallel_for(static_cast<int64_t>(pick.size()) * slices, 4, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t at = i % slices * slice;
          kernels_.softcap(out + i / slices * c.vocab_size + at, std::min(slice, c.vocab_size - at), c.final_softcap);
        }
      });
    }
  }

  void logprobs(const Config& c, const Buffer& norm, const Matrix& head, const Buffer& x,
                const std::vector<int64_t>& pick, const std::vector<int32_t>& target, float* out) override {
    // The vocabulary in slabs of fixed size, folded in order: an online log-sum-exp.
    const int64_t m = static_cast<int64_t>(pick.size()), slab = 8192;
    std::vector<float> y(m * slab), max(m), sum(m), chosen(m, 0.0f);
    std::vector<double> total(m, 0.0), top(m, -std::numeric_limits<double>::infinity());
    normed(c, norm, {&head}, static_cast<int64_t>(pick.size()), x, &pick);
    for (int64_t first = 0; first < head.rows; first += slab) {
      const int64_t rows = std::min(slab, head.rows - first);
      std::vector<int64_t> panels((rows + kPanel - 1) / kPanel);
      std::iota(panels.begin(), panels.end(), first / kPanel);
      matmul_panels(kernels_, pool_, acts_, cpu(head), panels, y.data());
      pool_.parallel_for(m, 4, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) {
          float* row = y.data() + i * static_cast<int64_t>(panels.size()) * kPanel;
          if (c.final_softcap > 0) kernels_.softcap(row, rows, c.final_softcap);
          kernels_.log_sum(row, rows, &max[i], &sum[i]);
          if (target[i] >= first && target[i] < first + rows) chosen[i] = row[target[i] - first];
          const double t = std::max<double>(top[i], max[i]);
          total[i] = total[i] * std::exp(top[i] - t) + sum[i] * std::exp(max[i] - t);
          top[i] = t;
        }
      });
    }
    for (int64_t i = 0; i < m; ++i) out[i] = static_cast<float>(chosen[i] - top[i] - std::log(total[i]));
  }

  void top_k(const Config& c, const Buffer& norm, const Matrix& head, const Buffer& x, const std::vector<int64_t>& pick,
             const Best& b) override {
    const int64_t m = static_cast<int64_t>(pick.size()), k = b.k, listed = static_cast<int64_t>(b.also.size());
    normed(c, norm, {&head}, m, x, &pick);
    const std::vector<int64_t> panels = scan_.reachable(kernels_, pool_, acts_, cpu(head), k, b.also, c.final_softcap);
    const int64_t n = static_cast<int64_t>(panels.size()) * kPanel;
    grow(y_, m * n);
    matmul_panels(kernels_, pool_, acts_, cpu(head), panels, y_.data());
    scan_.check(pool_, cpu(head), panels, m, y_.data());
    pool_.parallel_for(m, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        float* row = y_.data() + i * n;
        const int64_t real = n - kPanel + cpu(head).panel_rows(panels.back());  // the last panel may be padded
        if (c.final_softcap > 0) kernels_.softcap(row, real, c.final_softcap);
        auto panel = panels.begin();
        for (int64_t j = 0; j < listed; ++j) {
          const int32_t id = b.also[j];
          panel = std::lower_bound(panel, panels.end(), id / kPanel);
          float& logit = row[(panel - panels.begin()) * kPanel + id % kPanel];
          b.also_values[i * listed + j] = logit;
          logit = -std::numeric_limits<float>::infinity();
        }
        best(row, real, k, b.ids + i * k, b.values + i * k);
        for (int64_t j = 0; j < k; ++j) {
          int32_t& id = b.ids[i * k + j];
          id = static_cast<int32_t>(panels[id / kPanel] * kPanel + id % kPanel);
        }
      }
    });
  }

 private:
  // Query rows of one span that share a key/value head. Row i is token i / per_group, head i % per_group.
  struct Tile {
    const Span* span;
    int64_t group, first;
    int rows;
    int64_t first_block, end_block;
  };
  std::vector<Tile> tiles_of(const Config& c, const LayerWeights& w, const Rows& rows) const {
    std::vector<Tile> tiles;
    const int64_t per_group = c.num_heads / c.num_kv_heads;
    for (const Span& s : rows.spans)
      for (int64_t g = 0; g < c.num_kv_heads; ++g)
        for (int64_t i = 0, n; i < s.count * per_group; i += n) {
          n = std::min<int64_t>(takes_parts(s) ? kQueryRows : kQueryRows / 2, s.count * per_group - i);
          const int64_t low = s.position + i / per_group, high = s.position + (i + n - 1) / per_group;
          const int64_t first_block = w.window ? std::max<int64_t>(0, low - w.window + 1) / kKeyBlock : 0;
          tiles.push_back({&s, g, i, static_cast<int>(n), first_block, high / kKeyBlock + 1});
        }
    return tiles;
  }
  struct Part {
    float max[kQueryRows], sum[kQueryRows];
    bool seen[kQueryRows];
  };
  struct TileState {
    explicit TileState(int64_t floats) : acc(floats) {
      std::fill(max, max + kQueryRows, -std::numeric_limits<float>::infinity());
    }
    void fold(const Kernels& kernels, const Part& p, int rows, const float* block, int64_t e) {
      for (int r = 0; r < rows; ++r)
        if (p.seen[r]) kernels.fold(&max[r], &sum[r], acc.data() + r * e, p.max[r], p.sum[r], block + r * e, e);
    }
    float max[kQueryRows];
    float sum[kQueryRows] = {};
    std::vector<float> acc;
  };

  template <class T>
  static void grow(std::vector<T>& v, int64_t n) {
    if (static_cast<int64_t>(v.size()) < n) v = std::vector<T>(n);  // the old memory goes last, see Memory::release
  }

  // Activations from the normed rows of x: the first n, or those that `pick` lists.
  void normed(const Config& c, const Buffer& norm, const std::vector<const Matrix*>& weights, int64_t n,
              const Buffer& x, const std::vector<int64_t>* pick = nullptr) {
    const int64_t d = c.hidden_size;
    if (pick) add_normed(c, x);
    const Buffer* post_norm = std::exchange(post_norm_, nullptr);
    acts_.prepare(kernels_, pool_, weights, n, d, [&](int64_t i, float* scratch) {
      if (post_norm) add_normed(c, *post_norm, i, x);
      kernels_.rms_norm(x.data + (pick ? (*pick)[i] : i) * d, norm.data, d, c.rms_norm_eps, scratch);
      return scratch;
    });
  }

  // x += post_norm(W in), which is left to the next `normed`: each row is added to just before it is normed, while it is in the cache.
  void product_add(const Matrix& w, const Activations& in, const Buffer* post_norm, Buffer& x) {
    if (!post_norm) return matmul(kernels_, pool_, in, {{&cpu(w), x.data, w.rows, true}});
    added_ = in.n;
    grow(y_, in.n * w.rows);
    matmul(kernels_, pool_, in, {{&cpu(w), y_.data(), w.rows}});
    post_norm_ = post_norm;
  }
  void add_normed(const Config& c, const Buffer& post_norm, int64_t i, const Buffer& x) {
    float* y = y_.data() + i * c.hidden_size;
    kernels_.rms_norm(y, post_norm.data, c.hidden_size, c.rms_norm_eps, y);
    kernels_.add(x.data + i * c.hidden_size, y, c.hidden_size);
  }
  void add_normed(const Config& c, const Buffer& x) {
    if (const Buffer* post_norm = std::exchange(post_norm_, nullptr))
      pool_.parallel_for(added_, 2, [&](int64_t begin, int64_t end, int) {
        for (int64_t i = begin; i < end; ++i) add_normed(c, *post_norm, i, x);
      });
  }

  // Angles in float32 as transformers has them: position * base^(-2i/E) / scale.
  const RopeTable& rope_table(float base, float scale, int64_t E) {
    for (const RopeTable& t : ropes_)
      if (t.base == base && t.scale == scale) return t;
    const int64_t half = E / 2, n = static_cast<int64_t>(positions_.size());
    ropes_.push_back({base, scale, std::vector<float>(n * half), std::vector<float>(n * half)});
    RopeTable& t = ropes_.back();
    const std::vector<float> frequency = rope_frequencies(base, scale, E);
    pool_.parallel_for(n, 2, [&](int64_t begin, int64_t end, int) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t i = 0; i < half; ++i) {
          const float angle = static_cast<float>(positions_[r]) * frequency[i];
          t.cos[r * half + i] = std::cos(angle);
          t.sin[r * half + i] = std::sin(angle);
        }
    });
    return t;
  }

  // Whether every row is a sequence of its own.
  static bool one_each(const Rows& rows) { return static_cast<int64_t>(rows.spans.size()) == rows.n; }

  // What qkv has left to do, all rows of it.
  void rotate_and_store(const Config& c, float* q) {
    const Unrotated left = std::exchange(unrotated_, {});
    if (!left.w) return;
    rope_table(left.w->rope_base, left.w->rope_scale, c.head_dim);
    pool_.parallel_for(left.rows->n, 2, [&](int64_t begin, int64_t end, int) {
      auto span = left.rows->spans.begin();
      for (int64_t r = begin; r < end; ++r) {
        while (r >= span->row + span->count) ++span;
        rotate_and_store(c, *left.w, *span, r, q);
      }
    });
  }

  // One row's queries and keys, with the table that rope_table has made.
  void rotate_and_store(const Config& c, const LayerWeights& w, const Span& s, int64_t r, float* q) {
    const int64_t E = c.head_dim, half = E / 2;
    const RopeTable& rope = rope_table(w.rope_base, w.rope_scale, E);
    const float *cos = &rope.cos[r * half], *sin = &rope.sin[r * half];
    for (int64_t h = 0; h < c.num_heads; ++h) {
      float* x = q + (r * c.num_heads + h) * E;
      if (w.q_norm) kernels_.rms_norm(x, w.q_norm->data, E, c.rms_norm_eps, x);
      kernels_.rope(x, cos, sin, half, c.query_scale);
    }
    for (int64_t g = 0; g < c.num_kv_heads; ++g) {
      float* x = k_.data() + (r * c.num_kv_heads + g) * E;
      if (w.k_norm) kernels_.rms_norm(x, w.k_norm->data, E, c.rms_norm_eps, x);
      kernels_.rope(x, cos, sin, half, 1.0f);
      static_cast<CpuKv&>(*s.kv).write(w.index, g, s.position + r - s.row, x, v_.data() + (r * c.num_kv_heads + g) * E);
    }
  }

  // Few rows over many keys: blocks are computed by any thread and joined in order afterwards, with the same bits. `room`: tile_floats.
  void attend_in_parts(const Config& c, const LayerWeights& w, const std::vector<Tile>& tiles, int64_t most_blocks,
                       int64_t room, const Buffer& q, Buffer& out) {
    const int64_t count = static_cast<int64_t>(tiles.size()), e = (c.head_dim + 31) / 32 * 32;
    partial_.grow(count * most_blocks * room * sizeof(float));
    queries_.grow(count * query_floats(room) * sizeof(float));
    const auto partial = [&](int64_t j) { return reinterpret_cast<float*>(partial_.data()) + j * room; };
    const auto queries = [&](int64_t i) { return reinterpret_cast<float*>(queries_.data()) + i * query_floats(room); };
    std::vector<Part> parts(count * most_blocks);
    for (int64_t i = 0; i < count; ++i) load_queries(c, tiles[i], q.data, e, queries(i));
    // Runs of blocks, since each call fetches the next block's keys.
    const int64_t run = std::clamp<int64_t>(count * most_blocks / (4 * pool_.size()), 1, 8);
    pool_.parallel_for(count * most_blocks, run, [&](int64_t begin, int64_t end, int) {
      for (int64_t j = begin; j < end; ++j) {
        const Tile& t = tiles[j / most_blocks];
        const int64_t b = t.first_block + j % most_blocks;
        if (b < t.end_block) parts[j] = attend_block(c, w, t, queries(j / most_blocks), e, b, nullptr, partial(j));
      }
    });
    for (int64_t i = 0; i < count; ++i) {
      TileState state(tiles[i].rows * e);
      for (int64_t b = 0; b < tiles[i].end_block - tiles[i].first_block; ++b) {
        const int64_t j = i * most_blocks + b;
        state.fold(kernels_, parts[j], tiles[i].rows, partial(j), e);
      }
      finish(c, tiles[i], state, e, out.data);
    }
  }

  // Whether a kernel takes other queries than the rows as they are (kernels.h).
  bool takes_parts(const Span& s) const { return kernels_.queries && !static_cast<const CpuKv&>(*s.kv).f32(); }
  // Of the rows of any of the tiles.
  static int64_t tile_floats(const std::vector<Tile>& tiles, int64_t e) {
    int most = 0;
    for (const Tile& t : tiles) most = std::max(most, t.rows);
    return most * e;
  }
  // Room for queries of so many floats in the form that `attend` takes and, where that is another, behind it for the rows as they are.
  int64_t query_floats(int64_t floats) const { return kernels_.queries ? floats * 3 / 2 + floats : floats; }

  void load_queries(const Config& c, const Tile& t, const float* q, int64_t e, float* out) const {
    const int64_t E = c.head_dim, per_group = c.num_heads / c.num_kv_heads;
    const bool parts = takes_parts(*t.span);
    float* const to = parts ? out + t.rows * e * 3 / 2 : out;
    for (int r = 0; r < t.rows; ++r) {
      const int64_t i = t.first + r, row = t.span->row + i / per_group, head = t.group * per_group + i % per_group;
      std::memcpy(to + r * e, q + (row * c.num_heads + head) * E, E * sizeof(float));
      std::fill(to + r * e + E, to + (r + 1) * e, 0.0f);
    }
    if (parts) kernels_.queries(to, t.rows, e, out);
  }

  static const void* first_keys(const LayerWeights& w, const Tile& t) {
    return static_cast<const CpuKv&>(*t.span->kv).keys(w.index, t.group, t.first_block);
  }

  // `after`: keys that are wanted after the tile's last block, or null.
  Part attend_block(const Config& c, const LayerWeights& w, const Tile& t, const float* q, int64_t e, int64_t b,
                    const void* after, float* out) {
    const auto& kv = static_cast<const CpuKv&>(*t.span->kv);
    const int64_t per_group = c.num_heads / c.num_kv_heads;
    Part part;
    int lo[kQueryRows], hi[kQueryRows];
    for (int r = 0; r < t.rows; ++r) {
      const int64_t position = t.span->position + (t.first + r) / per_group;
      const int64_t from = w.window ? position - w.window + 1 - b * kKeyBlock : 0;
      lo[r] = static_cast<int>(std::clamp<int64_t>(from, 0, kKeyBlock));
      hi[r] = static_cast<int>(std::clamp<int64_t>(position + 1 - b * kKeyBlock, 0, kKeyBlock));
      part.seen[r] = lo[r] < hi[r];
    }
    const void* next = b + 1 < t.end_block ? kv.keys(w.index, t.group, b + 1) : after;
    kernels_.attend(kv.f32(), q, t.rows, e, kv.keys(w.index, t.group, b), kv.values(w.index, t.group, b), next, lo, hi,
                    c.attn_softcap, part.max, part.sum, out);
    return part;
  }

  void finish(const Config& c, const Tile& t, const TileState& state, int64_t e, float* out) const {
    const int64_t E = c.head_dim, per_group = c.num_heads / c.num_kv_heads;
    for (int r = 0; r < t.rows; ++r) {
      const int64_t i = t.first + r, row = t.span->row + i / per_group, head = t.group * per_group + i % per_group;
      kernels_.divide(state.acc.data() + r * e, state.sum[r], E, out + (row * c.num_heads + head) * E);
    }
  }

  const Kernels& kernels_;
  ThreadPool pool_;
  Activations acts_, hidden_;
  HeadScan scan_;
  std::vector<int64_t> positions_;  // of the pass's rows
  std::vector<RopeTable> ropes_;
  std::vector<float> k_, v_, y_;
  Memory partial_, queries_;
  // Work that waits for the next operation on the same rows, see product_add and qkv.
  const Buffer* post_norm_ = nullptr;  // to be applied to `added_` rows of y_ and added to x
  int64_t added_ = 0;
  struct Unrotated {
    const LayerWeights* w = nullptr;
    const Rows* rows = nullptr;
  } unrotated_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(int threads) { return std::make_unique<CpuBackend>(threads); }

}  // namespace gemma
