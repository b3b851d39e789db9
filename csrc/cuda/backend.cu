// The CUDA backend: the operations of backend.h as launches on one stream of one device, and decode steps as graphs.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>

#include "../quant.h"
#include "cublas.h"
#include "kernels.h"
#include "layout.h"
#include "probes.h"

namespace gemma::gpu {

namespace {

struct GpuBuffer final : Buffer {
  Memory memory;
};

class GpuKv final : public KvStore {
 public:
  GpuKv(std::shared_ptr<Device> device, size_t bytes, int64_t capacity)
      : capacity(capacity),
        device_(std::move(device)),
        memory_(device_, bytes, ("a KV cache of " + std::to_string(capacity) + " positions").c_str()) {}
  void reserve(int64_t) override {}  // all of it is there
  size_t bytes() const override { return memory_.bytes(); }
  std::unique_ptr<KvStore> clone(int64_t, int64_t) const override {
    device_->use();
    auto copy = std::make_unique<GpuKv>(device_, memory_.bytes(), capacity);
    device_->copy(copy->memory_.data(), memory_.data(), memory_.bytes());
    device_->wait("copy of a KV cache");
    return copy;
  }
  uint8_t* data() const { return memory_.data(); }
  const int64_t capacity;

 private:
  std::shared_ptr<Device> device_;
  Memory memory_;
};

const GpuMatrix& gpu_matrix(const Matrix& m) { return static_cast<const GpuMatrix&>(m); }

constexpr int64_t kListed = 64;  // places for listed ids, at least
constexpr size_t kGraphs = 64;
constexpr int64_t kManyRows = 2048;                 // rows a pass on a device with
constexpr int64_t kMuchMemory = int64_t{20} << 30;  // bytes

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A matrix of a product, and where its results go.
struct Target {
  const GpuMatrix* w;
  float* out;
  int64_t stride;
  uint16_t* out16 = nullptr;  // instead of `out`, on the tensor cores
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(int index, bool deterministic)
      : device_(std::make_shared<Device>(index)), deterministic_(deterministic) {}

  const char* device() const override { return device_->name().c_str(); }
  int threads() const override { return 1; }

  // ---- memory --------------------------------------------------------------------------------------------------------

  std::unique_ptr<Matrix> load_matrix(const HostTensor& source, DType target, bool, const Consumed& consumed) override {
    device_->use();
    if (target != DType::BF16) {
      int64_t& largest = quantised_[source.rows];
      largest = std::max(largest, source.rows * round_up(source.cols, 32) * 2);
    }
    return load_gpu_matrix(device_, source, target, consumed);
  }

  std::unique_ptr<Buffer> load_vector(const HostTensor& source, float offset) override {
    std::vector<float> values(source.cols);
    decode_row(source.type, source.data, source.cols, values.data());
    for (float& v : values) v += offset;
    auto b = std::make_unique<GpuBuffer>();
    device_->use();
    resize(*b, source.cols);
    device_->upload(b->data, values.data(), values.size() * sizeof(float));
    device_->wait("upload of weights");
    return b;
  }

  std::unique_ptr<Buffer> new_buffer() override { return std::make_unique<GpuBuffer>(); }

  void resize(Buffer& buffer, int64_t floats) override {
    auto& b = static_cast<GpuBuffer&>(buffer);
    const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
    if (b.memory.bytes() >= bytes) return;
    graphs_.clear();  // they know the old address
    b.memory = Memory();
    b.memory = Memory(device_, bytes, "a vector or activations");
    b.data = b.memory.floats();
  }

  int64_t prepare(const Config& c) override {
    device_->use();
    vocab_ = c.vocab_size;
    // More rows a pass fill the GPU better, and want memory. Rings of sliding layers are made for kMaxRows.
    const int64_t rows = c.sliding_window || device_->memory() < kMuchMemory ? kMaxRows : kManyRows;
    head_dim_ = count(c.head_dim);
    heads_a_group_ = count(c.num_heads / c.num_kv_heads);
    const int64_t E = c.head_dim, e = round_up(E, 16), heads = c.num_heads + 2 * c.num_kv_heads;
    const int64_t widest = round_up(std::max(c.hidden_size, c.num_heads * E), 32);
    matvec_scratch_ = reserve(static_cast<int64_t>(
        matvec_scratch_bytes(std::max({c.hidden_size, c.intermediate_size, c.num_heads * E}),
                             {heads * E, c.hidden_size, 2 * round_up(c.intermediate_size, 8), c.vocab_size})));
    const size_t block = attend_shared_bytes(heads_a_group_, count(e));
    if (block > device_->shared_limit())
      throw std::runtime_error(device_->name() + ": attention with head_dim " + std::to_string(E) + " and " +
                               std::to_string(heads_a_group_) + " heads a group needs " + std::to_string(block) +
                               " bytes of shared memory a block; this GPU has " +
                               std::to_string(device_->shared_limit()) + "; use device=\"cpu\"");
    inputs_ = reserve(rows * static_cast<int64_t>(sizeof(Row) + 4) + 4 + c.vocab_size * 4);
    tiles_ = reserve(rows * static_cast<int64_t>(sizeof(Tile)));
    qkv_ = reserve(rows * heads * E * 4);
    y_ = reserve(rows * c.hidden_size * 4);
    gate_ = reserve(rows * round_up(c.intermediate_size, 32) * 4);
    up_ = reserve(rows * round_up(c.intermediate_size, 32) * 4);
    packed_ = reserve(rows * widest * 2);
    logits_ = reserve(kHeadRows * c.vocab_size * 4);
    // Every k for a row, a k of 64 for all rows of logits at once.
    const int64_t slab = slab_size(count(c.vocab_size)), slabs = (c.vocab_size + slab - 1) / slab;
    candidates_ =
        reserve(std::max(c.vocab_size + slab, kHeadRows * slabs * 64) * static_cast<int64_t>(sizeof(Candidate)));
    results_ = reserve(std::max(2 * c.vocab_size + kListed, rows * 256) * 4);
    const int64_t row = c.num_heads * most_splits(c) * (e + 2) * 4;
    partial_ = reserve(std::max(row, std::min<int64_t>(64 << 20, row * rows)));
    ended_ = reserve(rows * c.num_heads * 4);
    device_->zero(ended_.data(), ended_.bytes());
    for (const auto& [base, scale] : {std::pair(c.rope_base, c.rope_scale), std::pair(c.rope_base_local, 1.0f)}) {
      const std::vector<float> f = rope_frequencies(base, scale, E);
      Memory& m = frequencies_[{base, scale}] = reserve(E * 2);
      device_->upload(m.data(), f.data(), f.size() * sizeof(float));
    }
    device_->wait("upload of weights");
    if (!deterministic_) prepare_cublas(c.vocab_size);
    return rows;
  }

  std::unique_ptr<KvStore> new_kv(const Config& c, const KvShape& shape) override {
    std::call_once(shaped_, [&] {
      KvLayer l;
      l.f32 = shape.f32;
      l.groups = static_cast<int32_t>(c.num_kv_heads);
      l.e = static_cast<int32_t>(round_up(c.head_dim, 16));
      for (int64_t ring : shape.ring) l.ring = std::max(l.ring, static_cast<int32_t>(ring));
      for (int64_t ring : shape.ring) {
        l.is_ring = ring > 0;
        kv_.push_back(l);
        ++(ring > 0 ? l.rings_before : l.full_before);
      }
    });
    device_->use();
    const int64_t capacity = round_up(shape.capacity, kKeyBlock);
    int64_t slots = 0;
    for (const KvLayer& l : kv_) slots += slots_of(l, l.is_ring, capacity);
    const int64_t bytes = 2 * slots * kv_[0].groups * kv_[0].e * (shape.f32 ? 4 : 2);
    return std::make_unique<GpuKv>(device_, static_cast<size_t>(bytes), capacity);
  }

  // ---- a pass --------------------------------------------------------------------------------------------------------

  Ceilings ceilings(size_t bytes, int64_t size) override { return measure(device_, bytes, count(size)); }

  void pass(const Rows& rows, const Wanted& wanted, const std::function<void()>& body) override {
    device_->use();
    std::vector<Row> r(rows.n);
    int64_t last = 0;
    bool decode = true;
    for (const Span& s : rows.spans) {
      const auto& kv = static_cast<const GpuKv&>(*s.kv);
      decode &= s.count == 1;
      last = std::max(last, s.position + s.count - 1);
      for (int64_t i = 0; i < s.count; ++i)
        r[s.row + i] = {kv.data(), static_cast<int32_t>(kv.capacity), rows.tokens[s.row + i],
                        static_cast<int32_t>(s.position + i), 0};
    }
    const int64_t picked = static_cast<int64_t>(wanted.pick.size());
    const int64_t listed = static_cast<int64_t>(wanted.best.also.size());
    whole_ = picked > 0 && picked <= most_rows(wanted);
    bring(r, wanted.pick.data(), whole_ ? picked : 0, wanted.best.also.data(), whole_ ? listed : 0);
    decode_ = decode;
    exact_ = deterministic_ || decode || rows.n < exact_rows();
    tile_count_ = 0;
    if (!exact_ && flash_supports(kv_[0], head_dim_, heads_a_group_)) {
      std::vector<Tile> tiles;
      for (const Span& s : rows.spans)
        for (int64_t i = 0; i < s.count; i += flash_tile_rows(heads_a_group_))
          tiles.push_back({count(s.row + i), count(std::min<int64_t>(s.count - i, flash_tile_rows(heads_a_group_)))});
      device_->upload(tiles_.data(), tiles.data(), tiles.size() * sizeof(Tile));
      tile_count_ = count(tiles.size());
    }
    splits_ = 1;
    while (splits_ < last / kSplit + 1) splits_ *= 2;
    if (decode && (whole_ || !picked))
      run_graph({rows.n, splits_, picked, wanted.logits ? -1 : wanted.best.k, room_for(wanted.best)}, body);
    else
      body();
    if (whole_) fetch(wanted, 0, picked);
  }

  void embed(const Matrix& table, const Rows& rows, float scale, Buffer& x) override {
    const GpuMatrix& m = gpu_matrix(table);
    gpu::embed(*device_, m.type, m.planes, row_data(), count(rows.n), count(m.cols), scale, x.data);
  }

  void qkv(const Config& c, const LayerWeights& w, const Rows& rows, const Buffer& x, Buffer& q) override {
    const int64_t E = c.head_dim, stride = (c.num_heads + 2 * c.num_kv_heads) * E;
    float* out = qkv_.floats();
    product({{&gpu_matrix(*w.q), out, stride},
             {&gpu_matrix(*w.k), out + c.num_heads * E, stride},
             {&gpu_matrix(*w.v), out + (c.num_heads + c.num_kv_heads) * E, stride}},
            x.data, nullptr, w.attn_norm->data, c.rms_norm_eps, rows.n, After::store, exact_);
    RopeArgs a;
    a.rows = row_data();
    a.qkv = out;
    a.q = q.data;
    a.q_norm = w.q_norm ? w.q_norm->data : nullptr;
    a.k_norm = w.k_norm ? w.k_norm->data : nullptr;
    a.frequency = frequencies_.at({w.rope_base, w.rope_scale}).floats();
    a.kv = kv_[w.index];
    a.n = count(rows.n);
    a.H = count(c.num_heads);
    a.G = count(c.num_kv_heads);
    a.E = count(E);
    a.eps = c.rms_norm_eps;
    a.query_scale = c.query_scale;
    rope_ = a;
    if (!decode_) rope_and_store(*device_, a);  // else attention does it
  }

  void attention(const Config& c, const LayerWeights& w, const Rows& rows, const Buffer& q, Buffer& out) override {
    AttentionArgs a;
    a.kv = kv_[w.index];
    a.H = count(c.num_heads);
    a.E = count(c.head_dim);
    a.window = count(std::min<int64_t>(w.window, std::numeric_limits<int32_t>::max()));
    a.cap = c.attn_softcap;
    if (tile_count_) {
      a.rows = row_data();
      a.q = q.data;
      flash(*device_, {a, bf16_in(out.data), reinterpret_cast<const Tile*>(tiles_.data()), tile_count_});
      return;
    }
    a.splits = count(w.window ? std::min<int64_t>(splits_, w.window / kSplit + 2) : splits_);
    a.partial = partial_.floats();
    const int64_t a_row = a.H * static_cast<int64_t>(a.splits) * (a.kv.e + 2) * 4;
    const int64_t many = std::max<int64_t>(1, static_cast<int64_t>(partial_.bytes()) / a_row);
    for (int64_t r = 0; r < rows.n; r += many) {
      a.rows = row_data() + r;
      a.q = decode_ ? nullptr : q.data + r * a.H * a.E;
      a.rope = rope_;
      a.rope.qkv += r * (a.H + 2 * a.rope.G) * a.E;
      a.out = out.data + r * a.H * a.E;
      a.ended = decode_ ? reinterpret_cast<uint32_t*>(ended_.data()) : nullptr;
      a.n = count(std::min(many, rows.n - r));
      attend(*device_, a);
    }
  }

  void project_add(const Config& c, const LayerWeights& w, const Rows& rows, const Buffer& attended,
                   Buffer& x) override {
    add_product(c, gpu_matrix(*w.o), w.post_attn_norm.get(), rows.n, attended.data, x,
                tile_count_ ? bf16_in(attended.data) : nullptr);
  }

  void feed_forward(const Config& c, const LayerWeights& w, const Rows& rows, Buffer& x) override {
    const GpuMatrix &gate = gpu_matrix(*w.gate), &up = gpu_matrix(*w.up), &down = gpu_matrix(*w.down);
    const int64_t F = c.intermediate_size, n = rows.n, k = round_up(F, 32);
    uint16_t *gate16 = bf16_in(gate_.floats()), *up16 = bf16_in(up_.floats());
    if (!exact_) {
      product({{&gate, nullptr, k, gate16}, {&up, nullptr, k, up16}}, x.data, nullptr, w.ffn_norm->data, c.rms_norm_eps,
              n, After::store, false);
      geglu(*device_, gate16, up16, count(n), count(F), count(k));
    } else if (gate.type == up.type) {
      product({{&gate, gate_.floats(), F}, {&up, nullptr, F}}, x.data, nullptr, w.ffn_norm->data, c.rms_norm_eps, n,
              After::geglu, true);
    } else {
      product({{&gate, gate_.floats(), F}, {&up, up_.floats(), F}}, x.data, nullptr, w.ffn_norm->data, c.rms_norm_eps,
              n, After::store, true);
      geglu(*device_, gate_.floats(), up_.floats(), n * F);
    }
    add_product(c, down, w.post_ffn_norm.get(), n, gate_.floats(), x, exact_ ? nullptr : gate16);
  }

  // ---- results -------------------------------------------------------------------------------------------------------

  void logits(const Config& c, const Buffer& norm, const Matrix& head, const Buffer& x,
              const std::vector<int64_t>& pick, float* out) override {
    give({c, norm, head, x}, {pick, out, {}});
  }

  void top_k(const Config& c, const Buffer& norm, const Matrix& head, const Buffer& x, const std::vector<int64_t>& pick,
             const Best& best) override {
    give({c, norm, head, x}, {pick, nullptr, best});
  }

  void logprobs(const Config& c, const Buffer& norm, const Matrix& head, const Buffer& x,
                const std::vector<int64_t>& pick, const std::vector<int32_t>& target, float* out) override {
    device_->use();
    const int64_t m = static_cast<int64_t>(pick.size());
    for (int64_t first = 0; first < m; first += kHeadRows) {
      const int64_t n = std::min<int64_t>(kHeadRows, m - first);
      bring({}, &pick[first], n, &target[first], n);
      head_rows({c, norm, head, x}, m, 0, n);
      log_softmax_at(*device_, logits_.floats(), count(n), count(vocab_), ids_ + 1, candidates_.floats(),
                     results_.floats());
      device_->download(out + first, results_.data(), static_cast<size_t>(n) * 4);
    }
  }

 private:
  static int count(int64_t n) { return static_cast<int>(n); }
  static int64_t most_splits(const Config& c) {
    int64_t s = 1;
    while (s * kSplit < c.context_length) s *= 2;
    return s;
  }
  Memory reserve(int64_t bytes) { return Memory(device_, static_cast<size_t>(bytes), "activations"); }
  const Row* row_data() const { return reinterpret_cast<const Row*>(inputs_.data()); }
  // Where activations in a place for floats are bf16.
  static uint16_t* bf16_in(float* place) { return reinterpret_cast<uint16_t*>(place); }

  // W norm(x) for matrices that share x[n, cols]. `exact`: by the decode kernels; else on the tensor cores, where `packed` may be x
  // as bf16 already. geglu: targets are gate and up, results go to the first.
  void product(const std::vector<Target>& targets, const float* x, const int32_t* pick, const float* norm, float eps,
               int64_t n, After after, bool exact, const uint16_t* packed_x = nullptr) {
    const int64_t cols = targets[0].w->cols;
    if (!exact) {
      const int64_t k = round_up(cols, 32);
      if (!packed_x) {
        to_bf16(*device_, x, pick, norm, eps, count(n), count(cols), count(k), bf16_in(packed_.floats()));
        packed_x = bf16_in(packed_.floats());
      }
      for (const Target& t : targets) {
        MatmulArgs a;
        a.w = t.w->planes;
        a.x = packed_x;
        a.m = count(n);
        a.k = count(k);
        a.out = t.out;
        a.out16 = t.out16;
        a.stride = t.stride;
        a.add = after == After::add;
        if (!by_cublas(t.w->type, a)) matmul(*device_, t.w->type, a);
      }
      return;
    }
    for (size_t i = 0; i < targets.size();) {
      MatvecArgs a;
      a.count = 0;
      a.after = after;
      a.x = x;
      a.x_stride = cols;
      a.pick = pick;
      a.n = count(n);
      a.cols = count(cols);
      a.norm = norm;
      a.eps = eps;
      a.scratch = matvec_scratch_.data();
      a.scratch_bytes = matvec_scratch_.bytes();
      const DType type = targets[i].w->type;
      for (; i < targets.size() && targets[i].w->type == type; ++i)
        a.parts[a.count++] = {targets[i].w->planes, targets[i].out, targets[i].stride};
      matvec(*device_, type, a);
    }
  }

  // Quantised matrices without room for a copy stay with the own kernels.
  int64_t exact_rows() const { return cublas_ && (quantised_.empty() || as_bf16_.bytes()) ? kFewRows : kExactRows; }

  // cuBLASLt, and room for a layer's largest quantised matrix as bf16. The head's would be several times as large, and has few rows as a
  // rule. The own kernel needs neither: where memory does not suffice, it goes on.
  void prepare_cublas(int64_t vocab) {
    int64_t bytes = 0;
    for (const auto& [rows, largest] : quantised_)
      if (rows != vocab) bytes = std::max(bytes, largest);
    try {
      cublas_ = Cublas::load(device_);
      if (cublas_ && bytes) as_bf16_ = reserve(bytes);
    } catch (const OutOfMemory&) {
    }
  }

  // Does a product of enough rows by cuBLASLt, where there is one: bf16 weights as they lie, others after one pass that makes them bf16.
  bool by_cublas(DType type, MatmulArgs a) {
    if (!cublas_ || a.m < kFewRows) return false;
    if (type != DType::BF16) {
      if (a.w.rows * a.k * 2 > static_cast<int64_t>(as_bf16_.bytes())) return false;
      dequantise(*device_, type, a.w, a.k, bf16_in(as_bf16_.floats()));
      Planes bf16;
      bf16.low = as_bf16_.data();
      bf16.rows = a.w.rows;
      bf16.pieces = a.k / piece_values(DType::BF16);
      a.w = bf16;
    }
    return cublas_->matmul(*device_, a);
  }

  // x += post_norm(W in)
  void add_product(const Config& c, const GpuMatrix& w, const Buffer* post_norm, int64_t n, const float* in, Buffer& x,
                   const uint16_t* packed_in = nullptr) {
    const int64_t d = c.hidden_size;
    product({{&w, post_norm ? y_.floats() : x.data, d}}, in, nullptr, nullptr, 0, n,
            post_norm ? After::store : After::add, exact_, packed_in);
    if (post_norm) norm_and_add(*device_, y_.floats(), post_norm->data, c.rms_norm_eps, count(n), count(d), x.data);
  }

  // A graph for passes of one kind; what differs between them is read from inputs_. The first of a kind runs without, since kernels cannot
  // be loaded while a graph is recorded.
  using Kind = std::array<int64_t, 5>;  // rows, splits, rows picked, k (-1: logits), room for listed ids
  void run_graph(const Kind& kind, const std::function<void()>& body) {
    const auto at = graphs_.find(kind);
    if (at == graphs_.end()) {
      body();
      if (graphs_.size() >= kGraphs) graphs_.clear();
      graphs_[kind] = nullptr;
      return;
    }
    if (!at->second) at->second = device_->record(body);
    device_->replay(*at->second);
  }

  // Puts side by side into inputs_, in one copy: the rows of a pass, rows picked, and how many ids there are and the ids.
  void bring(const std::vector<Row>& rows, const int64_t* pick, int64_t picked, const int32_t* ids, int64_t many) {
    const size_t at = rows.size() * sizeof(Row);
    std::vector<int32_t> words(pick, pick + picked);
    words.push_back(count(many));
    words.insert(words.end(), ids, ids + many);
    host_.resize(at + words.size() * 4);
    if (at) std::memcpy(host_.data(), rows.data(), at);
    std::memcpy(host_.data() + at, words.data(), words.size() * 4);
    device_->upload(inputs_.data(), host_.data(), host_.size());
    picked_ = reinterpret_cast<const int32_t*>(inputs_.data() + at);
    ids_ = picked_ + picked;
  }

  struct Head {
    const Config& c;
    const Buffer& norm;
    const Matrix& w;
    const Buffer& x;
  };

  // Places of listed ids in a result: a power of two, so that a list that grows from step to step keeps its graph.
  static int64_t room_for(const Best& b) {
    int64_t room = kListed;
    while (room < static_cast<int64_t>(b.also.size())) room *= 2;
    return b.also.empty() ? 0 : room;
  }
  static int64_t words_a_row(const Best& b) { return 2 * b.k + room_for(b); }
  // Rows whose results there is room for.
  int64_t most_rows(const Wanted& w) const {
    return w.logits ? kHeadRows : static_cast<int64_t>(results_.bytes() / 4) / words_a_row(w.best);
  }

  // In a whole pass this launches and no more: the pass has brought what is asked, and fetches the results.
  void give(const Head& h, const Wanted& w) {
    const int64_t m = static_cast<int64_t>(w.pick.size()), many = most_rows(w);
    if (whole_) return find(h, w, m);
    device_->use();
    for (int64_t first = 0; first < m; first += many) {
      const int64_t n = std::min(many, m - first);
      bring({}, &w.pick[first], n, w.best.also.data(), static_cast<int64_t>(w.best.also.size()));
      find(h, w, n);
      fetch(w, first, n);
    }
  }

  // Of n picked rows: logits to logits_, or to results_ ids [n][k], values [n][k], values of the listed [n][room].
  void find(const Head& h, const Wanted& w, int64_t n) {
    const int64_t m = static_cast<int64_t>(w.pick.size()), k = w.best.k, room = room_for(w.best);
    const int V = count(vocab_);
    for (int64_t first = 0; first < n; first += kHeadRows) {
      const int some = count(std::min<int64_t>(kHeadRows, n - first));
      head_rows(h, m, first, some);
      if (w.logits) continue;
      float* values = results_.floats() + n * k;
      if (room) set_aside(*device_, logits_.floats(), some, V, ids_, count(room), values + n * k + first * room);
      gpu::top_k(*device_, logits_.floats(), some, V, count(k), reinterpret_cast<Candidate*>(candidates_.data()),
                 static_cast<int64_t>(candidates_.bytes() / sizeof(Candidate)),
                 reinterpret_cast<int32_t*>(results_.data()) + first * k, values + first * k);
    }
  }

  // logits_ of picked rows [first, first + n), of m that are asked for together.
  void head_rows(const Head& h, int64_t m, int64_t first, int64_t n) {
    product({{&gpu_matrix(h.w), logits_.floats(), vocab_}}, h.x.data, picked_ + first, h.norm.data, h.c.rms_norm_eps, n,
            After::store,
            deterministic_ || decode_ || m < (gpu_matrix(h.w).type == DType::BF16 ? exact_rows() : kExactRows));
    if (h.c.final_softcap > 0) softcap(*device_, logits_.floats(), n * vocab_, h.c.final_softcap);
  }

  // What `find` found, for rows [first, first + n) of what is wanted.
  void fetch(const Wanted& w, int64_t first, int64_t n) {
    if (w.logits) {
      device_->download(w.logits + first * vocab_, logits_.data(), static_cast<size_t>(n * vocab_) * 4);
      return;
    }
    const Best b = w.best.from(first);
    const size_t best = static_cast<size_t>(n * b.k) * 4, listed = b.also.size() * 4;
    host_.resize(static_cast<size_t>(n * words_a_row(b)) * 4);
    device_->download(host_.data(), results_.data(), host_.size());
    std::memcpy(b.ids, host_.data(), best);
    std::memcpy(b.values, host_.data() + best, best);
    for (int64_t i = 0; listed && i < n; ++i)
      std::memcpy(b.also_values + i * b.also.size(), host_.data() + 2 * best + i * room_for(b) * 4, listed);
  }

  std::shared_ptr<Device> device_;
  const bool deterministic_;
  std::map<int64_t, int64_t> quantised_;  // by rows: bytes of the largest quantised matrix as bf16
  std::unique_ptr<Cublas> cublas_;        // null: the own kernel does all products
  int64_t vocab_ = 0;
  int head_dim_ = 0, heads_a_group_ = 1;
  std::once_flag shaped_;
  std::vector<KvLayer> kv_;  // a layer each
  Memory inputs_, tiles_, qkv_, y_, gate_, up_, packed_, logits_, candidates_, results_, partial_, ended_,
      matvec_scratch_;
  Memory as_bf16_;                                         // a quantised matrix, for cuBLASLt
  std::vector<uint8_t> host_;                              // what goes to inputs_ or comes from results_
  std::map<std::pair<float, float>, Memory> frequencies_;  // by base and scale
  // Of the pass that runs.
  bool decode_ = false, exact_ = true;
  bool whole_ = false;                                // its results come with it
  const int32_t *picked_ = nullptr, *ids_ = nullptr;  // in inputs_
  int64_t splits_ = 1;
  RopeArgs rope_;                                  // of the layer, from `qkv` to `attention`
  int tile_count_ = 0;                             // of flash attention; 0: the pass does without
  std::map<Kind, std::unique_ptr<Graph>> graphs_;  // null: not yet
};

}  // namespace

std::unique_ptr<Backend> make_backend(int index, bool deterministic) {
  return std::make_unique<CudaBackend>(index, deterministic);
}

}  // namespace gemma::gpu

namespace gemma {

#if defined(__CUDACC__)
std::string cuda_status() { return gpu::status(); }
std::unique_ptr<Backend> make_cuda_backend(int device, bool deterministic) {
  return gpu::make_backend(device, deterministic);
}
#else
std::unique_ptr<Backend> make_emulated_cuda_backend(bool deterministic) { return gpu::make_backend(0, deterministic); }
#endif

}  // namespace gemma
