#include "matmul.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "../quant.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gemma {

namespace {

constexpr size_t kHuge = 2u << 20;

uint8_t* allocate(size_t bytes) {
#if defined(_MSC_VER)
  void* p = _aligned_malloc(bytes, 64);
#else
  const size_t align = bytes >= kHuge ? kHuge : 64;
  void* p = std::aligned_alloc(align, (bytes + align - 1) / align * align);
#endif
  if (!p) throw std::bad_alloc();
#if defined(__linux__)
  if (bytes >= kHuge) madvise(p, (bytes + kHuge - 1) / kHuge * kHuge, MADV_HUGEPAGE);
#endif
  return static_cast<uint8_t*>(p);
}

void release(uint8_t* p) {
#if defined(_MSC_VER)
  _aligned_free(p);
#else
  std::free(p);
#endif
}

// Row r, whatever its type, through float32 (values[cols]) into `target`.
void convert_row(const HostTensor& s, int64_t r, DType target, float* values, uint8_t* out) {
  decode_row(s.type, s.data + r * row_bytes(s.type, s.cols), s.cols, values);
  if (target == DType::BF16) {
    for (int64_t i = 0; i < s.cols; ++i) {
      const uint16_t b = float_to_bf16(values[i]);
      std::memcpy(out + 2 * i, &b, 2);
    }
  } else {
    encode_row(target, values, s.cols, out);
  }
}

}  // namespace

std::unique_ptr<CpuMatrix> load_cpu_matrix(ThreadPool& pool, const HostTensor& s, DType target,
                                           const Consumed& consumed) {
  auto m = std::make_unique<CpuMatrix>();
  m->type = target;
  m->rows = s.rows;
  m->cols = s.cols;
  const bool tiled = encoding(target).quantized;
  m->bytes = tiled ? tiled_bytes(target, s.rows, s.cols) : row_bytes(DType::BF16, s.cols) * s.rows;
  if (s.tiled || (s.type == DType::BF16 && target == DType::BF16)) {
    GEMMA_CHECK(s.type == target, "tensor \"", s.name, "\" is packed as ", encoding(s.type).name,
                " and cannot be converted to ", encoding(target).name, "; convert from the original checkpoint");
    if (s.tiled || reinterpret_cast<uintptr_t>(s.data) % 2 == 0) {
      m->data = s.data;
      m->in_place = true;
      return m;
    }
  }
  if (encoding(s.type).quantized)
    GEMMA_CHECK(s.cols % encoding(s.type).block == 0, "tensor \"", s.name, "\" has rows of ", s.cols,
                " values, not a multiple of ", encoding(s.type).name, "'s block of ", encoding(s.type).block);

  m->owned = {allocate(m->bytes), release};
  uint8_t* out = m->owned.get();
  m->data = out;
  const size_t in_row = row_bytes(s.type, s.cols), out_row = row_bytes(target, s.cols);
  const size_t out_panel = tiled ? panel_bytes(target, s.cols) : out_row * kPanel;
  const int64_t panels = (s.rows + kPanel - 1) / kPanel;
  // In slices, so that the source's pages can be given back as they are used up.
  const int64_t slice = std::max<int64_t>(1, static_cast<int64_t>((16u << 20) / (in_row * kPanel)));
  for (int64_t first = 0; first < panels; first += slice) {
    const int64_t count = std::min(slice, panels - first);
    const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>((256u << 10) / (in_row * kPanel)));
    pool.parallel_for(count, grain, [&](int64_t begin, int64_t end, int) {
      std::vector<float> values;
      std::vector<uint8_t> rows;
      if (s.type != target) {
        values.resize(s.cols + 256);
        rows.resize(out_row * kPanel);
      }
      for (int64_t p = first + begin; p < first + end; ++p) {
        const int n = static_cast<int>(std::min<int64_t>(kPanel, s.rows - p * kPanel));
        const uint8_t* src = s.data + p * kPanel * in_row;
        if (s.type != target) {
          for (int r = 0; r < n; ++r) convert_row(s, p * kPanel + r, target, values.data(), rows.data() + r * out_row);
          src = rows.data();
        }
        if (tiled)
          tile_panel(target, src, out_row, n, s.cols, out + p * out_panel);
        else
          std::memcpy(out + p * out_panel, src, n * out_row);
      }
    });
    if (consumed) consumed(s.name, first * kPanel * in_row, std::min((first + count) * kPanel, s.rows) * in_row);
  }
  return m;
}

void Activations::prepare(const Kernels& kernels, ThreadPool& pool, const std::vector<const Matrix*>& weights,
                          int64_t rows, int64_t k, const Row& get) {
  n = rows;
  blocks_ = (k + kBlock - 1) / kBlock;
  bool quant = false, bf16 = false;
  for (const Matrix* w : weights) (encoding(w->type).quantized ? quant : bf16) = true;
  fine_ = static_cast<const CpuMatrix*>(weights[0])->fine;  // the same throughout a model
  const int64_t packed_row = kernels.pack_bytes(k);
  auto grow = [](auto& v, size_t size) {
    if (v.size() < size) v.resize(size);
  };
  if (quant) {
    grow(q_, n * blocks_ * kBlock);
    grow(scale_, n * blocks_);
  }
  if (bf16) grow(packed_, n * packed_row);
  grow(scratch_, pool.size());
  for (auto& s : scratch_) grow(s, k);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, k));
  pool.parallel_for(n, grain, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      const float* x = get(i, scratch_[thread].data());
      if (quant) {
        const QuantActs c = chunk(i / kActChunk * kActChunk);
        kernels.quantize(x, k, fine_, const_cast<int8_t*>(c.q), const_cast<ActScale*>(c.scale),
                         static_cast<int>(i % kActChunk), c.rows);
      }
      if (bf16) kernels.pack(x, k, packed_.data() + i * packed_row);
    }
  });
}

QuantActs Activations::chunk(int64_t first) const {
  return {q_.data() + first * blocks_ * kBlock, scale_.data() + first * blocks_,
          static_cast<int>(std::min<int64_t>(kActChunk, n - first)), fine_};
}

namespace {

// Weight rows [32 p, 32 p + 32) against rows [m0, m0 + m) of the activations: tile[m][32].
void product_tile(const Kernels& kernels, const Activations& x, const CpuMatrix& w, int64_t p, int64_t m0, int m,
                  float* tile) {
  const uint8_t* data = w.at_row(p * kPanel);
  const Encoding& e = encoding(w.type);
  if (e.quantized) {
    const int64_t blocks = (w.cols + e.block - 1) / e.block * (e.block / kBlock);
    kernels.panel(w.type, data, blocks, x.chunk(m0), tile);
  } else {
    const int rows = static_cast<int>(std::min<int64_t>(kPanel, w.rows - p * kPanel));
    const auto* acts = static_cast<const uint8_t*>(x.packed()) + m0 * kernels.pack_bytes(w.cols);
    kernels.bf16(reinterpret_cast<const uint16_t*>(data), w.cols, rows, w.cols, acts, m, tile, kPanel);
  }
}

int64_t panels_of(const CpuMatrix& w) { return (w.rows + kPanel - 1) / kPanel; }

// Panels a work item, for `bytes` of weights in `panels` panels: long runs keep the memory streaming, but every thread should
// get several.
int64_t grain_of(const ThreadPool& pool, size_t bytes, int64_t panels) {
  const size_t share = bytes / (8 * static_cast<size_t>(pool.size()));
  const size_t item = std::clamp<size_t>(share, 16u << 10, 256u << 10);
  return std::max<int64_t>(1, static_cast<int64_t>(item * static_cast<size_t>(panels) / bytes));
}

}  // namespace

void matmul(const Kernels& kernels, ThreadPool& pool, const Activations& x, const std::vector<Product>& products) {
  int64_t total = 0;
  size_t bytes = 0;
  for (const Product& p : products) {
    total += panels_of(*p.w);
    bytes += p.w->bytes;
  }
  pool.parallel_for(total, grain_of(pool, bytes, total), [&](int64_t begin, int64_t end, int) {
    alignas(64) float tile[kActChunk * kPanel];
    size_t which = 0;
    int64_t base = 0;
    for (int64_t i = begin; i < end; ++i) {
      while (i - base >= panels_of(*products[which].w)) base += panels_of(*products[which++].w);
      const Product& p = products[which];
      const int64_t first = (i - base) * kPanel;
      const int64_t rows = std::min<int64_t>(kPanel, p.w->rows - first);
      for (int64_t m0 = 0; m0 < x.n; m0 += kActChunk) {
        const int m = static_cast<int>(std::min<int64_t>(kActChunk, x.n - m0));
        product_tile(kernels, x, *p.w, i - base, m0, m, tile);
        for (int j = 0; j < m; ++j)
          std::memcpy(p.y + (m0 + j) * p.ldy + first, tile + j * kPanel, rows * sizeof(float));
      }
    }
  });
}

void matmul_geglu(const Kernels& kernels, ThreadPool& pool, const Activations& x, const CpuMatrix& gate,
                  const CpuMatrix& up, float* h) {
  pool.parallel_for(panels_of(gate), grain_of(pool, gate.bytes + up.bytes, panels_of(gate)),
                    [&](int64_t begin, int64_t end, int) {
                      alignas(64) float g[kActChunk * kPanel], u[kActChunk * kPanel];
                      for (int64_t i = begin; i < end; ++i) {
                        const int64_t rows = std::min<int64_t>(kPanel, gate.rows - i * kPanel);
                        for (int64_t m0 = 0; m0 < x.n; m0 += kActChunk) {
                          const int m = static_cast<int>(std::min<int64_t>(kActChunk, x.n - m0));
                          product_tile(kernels, x, gate, i, m0, m, g);
                          product_tile(kernels, x, up, i, m0, m, u);
                          for (int j = 0; j < m; ++j)
                            kernels.geglu(g + j * kPanel, u + j * kPanel, rows, h + (m0 + j) * gate.rows + i * kPanel);
                        }
                      }
                    });
}

}  // namespace gemma
