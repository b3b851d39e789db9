#include "matmul.h"

#include <algorithm>
#include <cstring>

#include "../quant.h"

namespace gemma {

std::unique_ptr<CpuMatrix> load_cpu_matrix(ThreadPool& pool, const HostTensor& s, DType target,
                                           const Consumed& consumed) {
  auto m = std::make_unique<CpuMatrix>();
  m->type = target;
  m->rows = s.rows;
  m->cols = s.cols;
  const bool tiled = encoding(target).quantized;
  m->bytes = tiled ? tiled_bytes(target, s.rows, s.cols) : row_bytes(DType::BF16, s.cols) * s.rows;
  check_convertible(s, target);
  const bool rows_as_wanted = s.type == DType::BF16 && target == DType::BF16;
  if (s.tiled || (rows_as_wanted && reinterpret_cast<uintptr_t>(s.data) % 2 == 0)) {
    m->data = s.data;
    m->in_place = true;
    return m;
  }

  m->owned.grow(m->bytes);
  uint8_t* out = m->owned.data();
  m->data = out;
  const size_t in_row = row_bytes(s.type, s.cols), out_row = row_bytes(target, s.cols);
  const int64_t panels = (s.rows + kPanel - 1) / kPanel;
  const auto byte_of = [&](int64_t panel) { return std::min(panel * kPanel, s.rows) * in_row; };  // of the source
  // In slices, so that the source's pages can be given back as they are used up.
  const int64_t slice = std::max<int64_t>(1, static_cast<int64_t>((16u << 20) / (in_row * kPanel)));
  for (int64_t first = 0; first < panels; first += slice) {
    const int64_t count = std::min(slice, panels - first);
    const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>((256u << 10) / (in_row * kPanel)));
    pool.parallel_for(count, grain, [&](int64_t begin, int64_t end, int) {
      std::vector<float> values;
      std::vector<uint8_t> rows;
      map_pages(s.data + byte_of(first + begin), byte_of(first + end) - byte_of(first + begin));
      if (s.type != target) {
        values.resize(s.cols);
        rows.resize(out_row * kPanel);
      }
      for (int64_t p = first + begin; p < first + end; ++p) {
        const int n = static_cast<int>(std::min<int64_t>(kPanel, s.rows - p * kPanel));
        const uint8_t* src = s.data + byte_of(p);
        if (s.type != target) {
          for (int r = 0; r < n; ++r)
            convert_row(s, p * kPanel + r, target, values.data(), rows.data() + r * out_row, kernels().q4_errors);
          src = rows.data();
        }
        if (tiled)
          tile_panel(target, src, out_row, s.rows, s.cols, p, out);
        else
          std::memcpy(out + p * kPanel * out_row, src, n * out_row);
      }
    });
    if (consumed) consumed(s.name, byte_of(first), byte_of(first + count));
  }
  return m;
}

void Activations::reserve(const Kernels& kernels, const std::vector<const Matrix*>& weights, int64_t rows, int64_t k) {
  n = rows;
  k_ = k;
  blocks_ = (k + kBlock - 1) / kBlock;
  quant_ = bf16_ = false;
  for (const Matrix* w : weights) (encoding(w->type).quantized ? quant_ : bf16_) = true;
  fine_ = static_cast<const CpuMatrix*>(weights[0])->fine;  // the same throughout a model
  row_bytes_ = (quant_ ? blocks_ * (kBlock + sizeof(ActScale)) : 0) + (bf16_ ? kernels.pack_bytes(k) : 0);
  if (quant_) {
    q_.grow(n * blocks_ * kBlock);
    scale_.grow(n * blocks_ * sizeof(ActScale));
  }
  if (bf16_) packed_.grow(n * kernels.pack_bytes(k));
}

void Activations::prepare(const Kernels& kernels, ThreadPool& pool, const std::vector<const Matrix*>& weights,
                          int64_t rows, int64_t k, const Row& get) {
  reserve(kernels, weights, rows, k);
  scratch_.resize(pool.size());
  for (auto& s : scratch_)
    if (static_cast<int64_t>(s.size()) < k) s.resize(k);
  const int64_t grain = std::max<int64_t>(1, 1280 / std::max<int64_t>(1, k));
  pool.parallel_for(n, grain, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) put(kernels, 0, k, i, 1, get(i, scratch_[thread].data()), k);
  });
}

void Activations::put(const Kernels& kernels, int64_t at, int64_t count, int64_t first, int m, const float* x,
                      int64_t ldx) {
  if (quant_) {
    const QuantActs c = chunk(first / kActChunk * kActChunk, at / kBlock);
    const int64_t slot = first % kActChunk;
    kernels.quantize(x, ldx, m, count, fine_, const_cast<int8_t*>(c.q) + slot * kBlock,
                     const_cast<ActScale*>(c.scale) + slot, c.rows);
  }
  if (bf16_) kernels.pack(x, ldx, m, at, count, k_, packed_.data(), first, n);
}

QuantActs Activations::chunk(int64_t first, int64_t block) const {
  const int64_t rows = std::min<int64_t>(kActChunk, n - first), at = first * blocks_ + block * rows;
  return {reinterpret_cast<int8_t*>(q_.data()) + at * kBlock, reinterpret_cast<ActScale*>(scale_.data()) + at,
          static_cast<int>(rows), fine_};
}

namespace {

int64_t panels_of(const CpuMatrix& w) { return (w.rows + kPanel - 1) / kPanel; }

// Panels of the shortest work item, for `bytes` of weights in `panels` panels: short enough that all threads end together.
int64_t grain_of(const ThreadPool& pool, size_t bytes, int64_t panels) {
  const size_t share = bytes / (32 * static_cast<size_t>(pool.size()));
  const size_t item = std::clamp<size_t>(share, 16u << 10, 256u << 10);
  return std::max<int64_t>(1, static_cast<int64_t>(item * static_cast<size_t>(panels) / bytes));
}

// Weight rows [32 index, 32 index + 32) of a matrix.
struct Panel {
  const CpuMatrix* w = nullptr;
  int64_t index = 0;
  int rows() const { return w->panel_rows(index); }
  bool quantised() const { return w && encoding(w->type).quantized; }
  TiledPanel tiled() const { return quantised() ? w->tiled_panel(index) : TiledPanel{}; }
  const uint16_t* bf16() const {  // null where there are none
    if (!w || quantised()) return nullptr;
    return reinterpret_cast<const uint16_t*>(w->bf16_row(index * kPanel));
  }
};

constexpr int kGroup = 4;              // panels that meet a chunk of activations together
constexpr int64_t kGroupBlocks = 128;  // blocks along K at a time, so that both stay in L2
constexpr int kTile = kActChunk * kPanel;
constexpr int64_t kManyRows = 16;  // fewer rows wait for memory, and each panel is better read in one go

// tiles[p][m][32] = panels[p] times rows [m0, m0 + m) of the activations, in one of the calls for these panels, `first` or `last` or
// both. panels[count] and so on are those that come after them, their matrices null if none do; begun[p]: whether the last call for such
// panels has begun with panels[p].
void bf16_product(const Kernels& kernels, const Activations& x, const Panel* panels, int count, int64_t m0, int m,
                  bool first, bool last, bool* begun, float* tiles) {
  static thread_local Memory scratch;
  // A single chunk leaves only what comes next in the scratch, so its panels share one that stays in the cache.
  const bool shared = x.n <= kActChunk;
  const size_t room = kernels.bf16_scratch(x.blocks() * kBlock);
  if (x.n > 1) {
    scratch.grow(1u << 20);  // enough for a huge page
    scratch.grow(shared ? room : count * room);
  }
  for (int p = 0; p < count; ++p) {
    const CpuMatrix& w = *panels[p].w;
    const uint16_t* rows = panels[p].bf16();
    if (!rows) continue;
    const int own = shared ? 0 : p;
    const Panel& after = panels[shared ? p + 1 : count + p];
    const uint16_t* next = last && after.w && after.rows() == kBf16Rows ? after.bf16() : nullptr;
    const Packed packed = !first ? Packed::kAll : begun[own] ? Packed::kFirst : Packed::kNothing;
    begun[own] = kernels.bf16(rows, w.cols, panels[p].rows(), w.cols, x.packed(), m0, m, x.n, packed, next,
                              scratch.data() + own * room, tiles + p * kTile, kPanel);
  }
}

// Room for the tiles of kGroup panels times kMaxRows rows.
float* tile_sums() {
  static thread_local Memory room;
  room.grow(kMaxRows / kActChunk * kGroup * kTile * sizeof(float));
  return reinterpret_cast<float*>(room.data());
}

// The same on the amx level, for rows [from, to) at once: tiles[chunk][kGroup panels]. A span of the weights meets all of them before the
// next one, since it is unpacked for that and should stay in the second-level cache.
void tile_product(const Kernels& kernels, const Activations& x, const Panel* panels, int count, int64_t from,
                  int64_t to, float* tiles) {
  static thread_local Memory scratch;
  constexpr int64_t kSpan = 2048;
  const size_t room = kernels.bf16_scratch(kSpan);
  scratch.grow(1u << 20);  // enough for a huge page
  scratch.grow(kGroup * room);
  const int64_t k = panels[0].w->cols;
  for (int64_t at = 0; at < k; at += kSpan)
    for (int64_t m0 = from; m0 < to; m0 += kActChunk)
      for (int p = 0; p < count; ++p) {
        const uint16_t* rows = panels[p].bf16();
        if (!rows) continue;
        kernels.tiles(rows, k, panels[p].rows(), k, at, std::min(kSpan, k - at), x.packed(), m0,
                      static_cast<int>(std::min<int64_t>(kActChunk, x.n - m0)), m0 > from, scratch.data() + p * room,
                      tiles + ((m0 - from) / kActChunk * kGroup + p) * kTile);
      }
}

// The same of quantised weights, of which nothing is kept between calls. Few rows wait for memory, so that they ask for what comes after
// each panel.
void quant_product(const Kernels& kernels, const Activations& x, const Panel* panels, int count, int64_t m0,
                   float* tiles) {
  const int64_t step = count > 1 ? kGroupBlocks : x.blocks();
  for (int64_t from = 0; from < x.blocks(); from += step)
    for (int p = 0; p < count; ++p) {
      if (!panels[p].quantised()) continue;
      const CpuMatrix& w = *panels[p].w;
      const Encoding& e = encoding(w.type);
      const int64_t unit = e.block / kBlock, blocks = (w.cols + e.block - 1) / e.block * unit;
      const TiledPanel next = x.n < kManyRows ? panels[p + 1].tiled() : TiledPanel{};
      kernels.panel(w.type, panels[p].tiled(), from, std::min(step, blocks - from), x.chunk(m0, from), from > 0, next,
                    tiles + p * kTile);
    }
}

// Every panel of a list, `each` of them side by side, times every row: done(i, panels, m0, m, tiles) for the i-th of them.
template <class At, class Done>
void each_product(const Kernels& kernels, ThreadPool& pool, const Activations& x, int64_t total, int each, size_t bytes,
                  At at, Done done) {
  const bool tiled = kernels.tiles && x.bf16();
  const int group = x.n < kManyRows || (x.bf16() && !tiled) ? each : kGroup;
  // Rows of activations that a sweep over the weights takes: as many as stay in a share of the last cache.
  constexpr size_t kCache = 8u << 20;
  const int64_t cached = std::max<int64_t>(1, static_cast<int64_t>(kCache / x.row_bytes()) / kActChunk) * kActChunk;
  const int64_t sweep = tiled ? kMaxRows : cached;
  const int64_t grain =
      std::max(grain_of(pool, bytes, total), std::min<int64_t>(group / each, total / (4 * pool.size())));
  for (int64_t from = 0; from < x.n; from += sweep)
    pool.parallel_for(total, grain, [&](int64_t begin, int64_t end, int thread) {
      alignas(64) float few[kGroup * kTile];
      float* const tiles = tiled ? tile_sums() : few;
      Panel panels[kGroup + 2];  // and those after the group
      bool begun[kGroup] = {};
      const int64_t to = std::min(x.n, from + sweep);
      for (int64_t i = begin; i < end; i += group / each) {
        const int count = static_cast<int>(std::min<int64_t>(group / each, end - i));
        for (int j = 0; j < count; ++j) at(i + j, panels + j * each);
        // What a kernel has begun with is lost between pieces, what has been asked of memory is not.
        if (i + count < end || (pool.has_more(thread) && !(x.bf16() && x.n > 1)))
          at(i + count, panels + count * each);
        else
          std::fill_n(panels + count * each, each, Panel{});
        if (tiled) tile_product(kernels, x, panels, count * each, from, to, tiles);
        float* chunk = tiles;
        for (int64_t m0 = from; m0 < to; m0 += kActChunk, chunk += tiled ? kGroup * kTile : 0) {
          const int m = static_cast<int>(std::min<int64_t>(kActChunk, x.n - m0));
          if (x.bf16() && !tiled)
            bf16_product(kernels, x, panels, count * each, m0, m, m0 == from, m0 + m == to, begun, chunk);
          if (x.quant()) quant_product(kernels, x, panels, count * each, m0, chunk);
          for (int j = 0; j < count; ++j) done(i + j, panels + j * each, m0, m, chunk + j * each * kTile);
        }
      }
    });
}

}  // namespace

void matmul(const Kernels& kernels, ThreadPool& pool, const Activations& x, const std::vector<Product>& products) {
  int64_t total = 0;
  size_t bytes = 0;
  for (const Product& p : products) {
    total += panels_of(*p.w);
    bytes += p.w->bytes;
  }
  each_product(
      kernels, pool, x, total, 1, bytes,
      [&](int64_t i, Panel* panel) {
        size_t which = 0;
        while (i >= panels_of(*products[which].w)) i -= panels_of(*products[which++].w);
        *panel = {products[which].w, i};
      },
      [&](int64_t, const Panel* panel, int64_t m0, int m, const float* tile) {
        const Product* p = products.data();
        while (p->w != panel->w) ++p;
        const int64_t first = panel->index * kPanel, rows = panel->rows();
        for (int j = 0; j < m; ++j) {
          float* y = p->y + (m0 + j) * p->ldy + first;
          if (p->add)
            kernels.add(y, tile + j * kPanel, rows);
          else
            std::memcpy(y, tile + j * kPanel, rows * sizeof(float));
        }
      });
}

void matmul_panels(const Kernels& kernels, ThreadPool& pool, const Activations& x, const CpuMatrix& w,
                   const std::vector<int64_t>& panels, float* y) {
  const int64_t count = static_cast<int64_t>(panels.size());
  each_product(
      kernels, pool, x, count, 1, count * (w.bytes / static_cast<size_t>(panels_of(w))),
      [&](int64_t i, Panel* panel) { *panel = {&w, panels[i]}; },
      [&](int64_t i, const Panel* panel, int64_t m0, int m, const float* tile) {
        for (int j = 0; j < m; ++j)
          std::memcpy(y + ((m0 + j) * count + i) * kPanel, tile + j * kPanel, panel->rows() * sizeof(float));
      });
}

void matmul_geglu(const Kernels& kernels, ThreadPool& pool, const Activations& x, const CpuMatrix& gate,
                  const CpuMatrix& up, const CpuMatrix& down, Activations& h) {
  static_assert(kPanel == kBlock, "a panel of the results is a block of the next product's activations");
  h.reserve(kernels, {&down}, x.n, gate.rows);
  each_product(
      kernels, pool, x, panels_of(gate), 2, gate.bytes + up.bytes,
      [&](int64_t i, Panel* panels) {
        panels[0] = {&gate, i};
        panels[1] = {&up, i};
      },
      [&](int64_t, const Panel* panels, int64_t m0, int m, float* tiles) {
        const int64_t first = panels->index * kPanel, rows = panels->rows();
        kernels.geglu(tiles, tiles + kTile, m * kPanel, tiles);
        h.put(kernels, first, rows, m0, m, tiles, kPanel);
      });
}

}  // namespace gemma
