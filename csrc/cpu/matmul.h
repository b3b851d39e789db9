// Matrices in the CPU's memory and the products with them: activations are prepared once, rows are shared out among threads.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <vector>

#include "../backend.h"
#include "../quant.h"
#include "kernels.h"
#include "memory.h"
#include "threads.h"

namespace gemma {

struct CpuMatrix final : Matrix {
  const uint8_t* data = nullptr;  // panels, or bf16 rows in file order
  bool fine = false;              // its activations get a scale every 16 values instead of 32
  Memory owned;
  const uint8_t* host_data() const override { return data; }
  const uint8_t* bf16_row(int64_t r) const { return data + r * row_bytes(type, cols); }
  int panel_rows(int64_t i) const { return static_cast<int>(std::min<int64_t>(kPanel, rows - i * kPanel)); }
  TiledPanel tiled_panel(int64_t i) const {
    const PanelAt at = panel_at(type, rows, cols, i);
    return {data + at.units, data + at.low};
  }
};

// Reads, converts and tiles on all threads. See Backend::load_matrix.
std::unique_ptr<CpuMatrix> load_cpu_matrix(ThreadPool& pool, const HostTensor& source, DType target,
                                           const Consumed& consumed);

// Activations [n, k] in the forms that the weights at hand need.
class Activations {
 public:
  // Room for n rows of k values.
  void reserve(const Kernels& kernels, const std::vector<const Matrix*>& weights, int64_t n, int64_t k);
  // Row i of the input is get(i); `get` may compute it into scratch[k].
  using Row = std::function<const float*(int64_t i, float* scratch)>;
  void prepare(const Kernels& kernels, ThreadPool& pool, const std::vector<const Matrix*>& weights, int64_t n,
               int64_t k, const Row& get);
  // Values [at, at + count) of rows [first, first + m), from x[m][ldx]: rows of one chunk, `at` a multiple of 32 and `count` 32 or what
  // is left of k.
  void put(const Kernels& kernels, int64_t at, int64_t count, int64_t first, int m, const float* x, int64_t ldx);

  int64_t n = 0;
  // Rows [first_row, first_row + kActChunk), from a block along K on.
  QuantActs chunk(int64_t first_row, int64_t block = 0) const;
  int64_t blocks() const { return blocks_; }
  const void* packed() const { return packed_.data(); }
  bool bf16() const { return bf16_; }
  bool quant() const { return quant_; }
  size_t row_bytes() const { return row_bytes_; }  // of both forms

 private:
  int64_t k_ = 0, blocks_ = 0;
  size_t row_bytes_ = 0;
  bool quant_ = false, bf16_ = false, fine_ = false;
  Memory q_, scale_, packed_;
  std::vector<std::vector<float>> scratch_;
};

// One product y[n, w.rows] = x W^T. `y` has n rows of `ldy` floats; `add`: y += x W^T.
struct Product {
  const CpuMatrix* w;
  float* y;
  int64_t ldy;
  bool add = false;
};
void matmul(const Kernels& kernels, ThreadPool& pool, const Activations& x, const std::vector<Product>& products);
// y[n, 32 panels.size()] = the rows of some panels of a matrix, side by side; a last panel's rows past the matrix's end are not written
void matmul_panels(const Kernels& kernels, ThreadPool& pool, const Activations& x, const CpuMatrix& w,
                   const std::vector<int64_t>& panels, float* y);
// h[n, rows] = gelu(gate x) * (up x), ready for the product with `down`.
void matmul_geglu(const Kernels& kernels, ThreadPool& pool, const Activations& x, const CpuMatrix& gate,
                  const CpuMatrix& up, const CpuMatrix& down, Activations& h);

}  // namespace gemma
