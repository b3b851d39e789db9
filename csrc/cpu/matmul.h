// Matrices in the CPU's memory and the products with them: activations are prepared once, rows are shared out among threads.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "../backend.h"
#include "../quant.h"
#include "kernels.h"
#include "threads.h"

namespace gemma {

struct CpuMatrix final : Matrix {
  const uint8_t* data = nullptr;  // panels, or bf16 rows in file order
  bool fine = false;              // its activations get a scale every 16 values instead of 32
  std::unique_ptr<uint8_t, void (*)(uint8_t*)> owned{nullptr, nullptr};
  const uint8_t* host_data() const override { return data; }
  // Where row r (a multiple of 32 in a tiled matrix) begins.
  const uint8_t* at_row(int64_t r) const {
    return data + (encoding(type).quantized ? r / kPanel * panel_bytes(type, cols) : r * row_bytes(type, cols));
  }
};

// Reads, converts and tiles on all threads. See Backend::load_matrix.
std::unique_ptr<CpuMatrix> load_cpu_matrix(ThreadPool& pool, const HostTensor& source, DType target,
                                           const Consumed& consumed);

// Activations [n, k] in the forms that the weights at hand need.
class Activations {
 public:
  // Row i of the input is get(i); `get` may compute it into scratch[k].
  using Row = std::function<const float*(int64_t i, float* scratch)>;
  void prepare(const Kernels& kernels, ThreadPool& pool, const std::vector<const Matrix*>& weights, int64_t n,
               int64_t k, const Row& get);

  int64_t n = 0;
  // Rows [first_row, first_row + kActChunk), from a block along K on.
  QuantActs chunk(int64_t first_row, int64_t block = 0) const;
  int64_t blocks() const { return blocks_; }
  const void* packed() const { return packed_.data(); }
  size_t row_bytes() const { return row_bytes_; }  // of both forms

 private:
  int64_t blocks_ = 0;
  size_t row_bytes_ = 0;
  bool fine_ = false;
  std::vector<int8_t> q_;
  std::vector<ActScale> scale_;
  std::vector<uint8_t> packed_;
  std::vector<std::vector<float>> scratch_;
};

// One product y[n, w.rows] = x W^T. `y` has n rows of `ldy` floats.
struct Product {
  const CpuMatrix* w;
  float* y;
  int64_t ldy;
};
void matmul(const Kernels& kernels, ThreadPool& pool, const Activations& x, const std::vector<Product>& products);
// h[n, rows] = gelu(gate x) * (up x)
void matmul_geglu(const Kernels& kernels, ThreadPool& pool, const Activations& x, const CpuMatrix& gate,
                  const CpuMatrix& up, float* h);

}  // namespace gemma
