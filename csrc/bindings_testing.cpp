// Entry points for tests: single kernels of the level in use, the encoders, and the emulated device.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <tuple>

#include "bindings.h"
#include "cpu/head.h"
#include "cpu/kernels.h"
#include "cpu/kv.h"
#include "cpu/matmul.h"
#include "cpu/threads.h"
#if defined(GEMMA_NATIVE_EMULATOR)
#include "emulator/emulator.h"
#endif
#include "quant.h"

using namespace gemma;

namespace {

// use(pool, activations, matrix) for a matrix of encoded rows, loaded as a Model would, and x[m, cols]
template <class Use>
auto with_matrix(const std::string& type, const py::buffer& data, int64_t rows, int64_t cols, const FloatArray& x,
                 int threads, bool fine, Use use) {
  py::buffer_info view = data.request();
  const HostTensor t = tensor_of("matrix", py::make_tuple(type, py::make_tuple(rows, cols), data), view);
  GEMMA_CHECK(x.ndim() == 2 && x.shape(1) == cols, "x must be [m, ", cols, "]");
  ThreadPool pool(threads);
  const auto w = load_cpu_matrix(pool, t, encoding(t.type).quantized ? t.type : DType::BF16, {});
  w->fine = fine;
  Activations acts;
  acts.prepare(kernels(), pool, {w.get()}, x.shape(0), cols, [&](int64_t i, float*) { return x.data() + i * cols; });
  return use(pool, acts, *w);
}

// y[m, rows] = x W^T. The output starts as NaN.
py::array_t<float> test_product(const std::string& type, const py::buffer& data, int64_t rows, int64_t cols,
                                const FloatArray& x, int threads, bool fine) {
  return with_matrix(type, data, rows, cols, x, threads, fine,
                     [&](ThreadPool& pool, const Activations& acts, const CpuMatrix& w) {
                       py::array_t<float> y({acts.n, w.rows});
                       std::fill(y.mutable_data(), y.mutable_data() + acts.n * w.rows, NAN);
                       matmul(kernels(), pool, acts, {{&w, y.mutable_data(), w.rows}});
                       return y;
                     });
}

// max[rows], sum[rows] and out[rows, dim] of one block of keys k[64, dim] and values v[64, dim], of which row i of q sees those from
// lo[i] to hi[i] - 1.
py::tuple test_attend(const FloatArray& q, const FloatArray& k, const FloatArray& v, const std::vector<int>& lo,
                      const std::vector<int>& hi, float softcap, bool f32) {
  const int64_t n = static_cast<int64_t>(lo.size()), dim = q.size() / std::max<int64_t>(1, n), e = (dim + 31) / 32 * 32;
  GEMMA_CHECK(n >= 1 && n <= kQueryRows && hi.size() == lo.size() && q.size() == n * dim && dim % 2 == 0 &&
                  k.size() == kKeys * dim && v.size() == kKeys * dim,
              "q must be [n, dim], k and v [64, dim], lo and hi [n]");
  Config c;
  c.num_kv_heads = 1;
  c.head_dim = dim;
  CpuKv kv(c, {f32, {0}, kKeys});
  kv.reserve(kKeys);
  for (int64_t i = 0; i < kKeys; ++i) kv.write(0, 0, i, k.data() + i * dim, v.data() + i * dim);
  std::vector<float> rows(n * e), queries(n * e * 3 / 2), result(n * e, NAN);
  for (int64_t i = 0; i < n * dim; ++i) rows[i / dim * e + i % dim] = q.data()[i];
  const bool other = kernels().queries && !f32;
  if (other) kernels().queries(rows.data(), static_cast<int>(n), e, queries.data());
  py::array_t<float> max(n), sum(n), out({n, dim});
  kernels().attend(f32, other ? queries.data() : rows.data(), static_cast<int>(n), e, kv.keys(0, 0, 0),
                   kv.values(0, 0, 0), nullptr, lo.data(), hi.data(), softcap, max.mutable_data(), sum.mutable_data(),
                   result.data());
  for (int64_t i = 0; i < n * dim; ++i) out.mutable_data()[i] = result[i / dim * e + i % dim];
  return py::make_tuple(max, sum, out);
}

// The same for a head of a type that can be scanned, and the rows of one chunk.
template <class Use>
auto with_head(const std::string& type, const py::buffer& data, int64_t rows, int64_t cols, const FloatArray& x,
               bool fine, Use use) {
  GEMMA_CHECK(x.ndim() == 2 && x.shape(0) >= 1 && x.shape(0) <= kActChunk, "x must have from 1 to ", kActChunk,
              " rows");
  GEMMA_CHECK(encoding(dtype_of("head", type)).low_bytes > 0, "a head of type ", type, " is not scanned");
  return with_matrix(type, data, rows, cols, x, 2, fine, use);
}

// The panels that HeadScan leaves for the k best products in the last of some calls.
std::vector<int64_t> test_reachable(const std::string& type, const py::buffer& data, int64_t rows, int64_t cols,
                                    const FloatArray& x, int64_t k, float softcap, bool fine,
                                    const std::vector<int32_t>& also, int calls) {
  return with_head(type, data, rows, cols, x, fine, [&](ThreadPool& pool, const Activations& acts, const CpuMatrix& w) {
    HeadScan scan;
    std::vector<int64_t> panels;
    for (int i = 0; i < calls; ++i) {
      panels = scan.reachable(kernels(), pool, acts, w, k, also, softcap);
      std::vector<float> y(panels.size() * acts.n * kPanel);
      matmul_panels(kernels(), pool, acts, w, panels, y.data());
      scan.check(pool, w, panels, acts.n, y.data());
    }
    return panels;
  });
}

// Lower and upper bounds, [m][panels]; apart: bits of each panel's rows that do not count.
std::pair<std::vector<float>, std::vector<float>> test_bounds(const std::string& type, const py::buffer& data,
                                                              int64_t rows, int64_t cols, const FloatArray& x,
                                                              bool fine, const std::vector<uint32_t>& apart) {
  return with_head(type, data, rows, cols, x, fine, [&](ThreadPool& pool, const Activations& acts, const CpuMatrix& w) {
    GEMMA_CHECK(static_cast<int64_t>(apart.size()) == (w.rows + kPanel - 1) / kPanel,
                "apart must have an entry a panel");
    HeadBounds bounds;
    head_bounds(kernels(), pool, acts, w, apart, bounds);
    return std::make_pair(std::move(bounds.low), std::move(bounds.high));
  });
}

// The pieces of a loop, (begin, end, whether its thread has more), after one with a grain of 1 in which the piece with item `fail` throws.
// The piece with item 0 takes its time, so that others take from its thread's share.
std::vector<std::tuple<int64_t, int64_t, bool>> test_pieces(int threads, int64_t count, int64_t grain, int64_t fail) {
  ThreadPool pool(threads);
  std::vector<std::tuple<int64_t, int64_t, bool>> pieces;
  std::mutex mutex;
  const auto loop = [&](int64_t least) {
    pieces.clear();
    pool.parallel_for(count, least, [&](int64_t begin, int64_t end, int thread) {
      if (begin <= fail && fail < end) throw std::range_error("a piece");
      const bool more = pool.has_more(thread);
      if (begin == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      std::lock_guard<std::mutex> lock(mutex);
      pieces.emplace_back(begin, end, more);
    });
  };
  bool thrown = false;
  try {
    loop(1);
  } catch (const std::range_error&) {
    thrown = true;
  }
  GEMMA_CHECK(thrown == (fail >= 0), "an exception was lost, or came from nowhere");
  fail = -1;
  loop(grain);
  return pieces;
}

py::bytes test_tile(const std::string& type, const py::bytes& data, int64_t rows, int64_t cols, bool back) {
  const DType t = dtype_of("tile", type);
  const std::string in = data;
  const size_t row = row_bytes(t, cols);
  GEMMA_CHECK(in.size() == (back ? tiled_bytes(t, rows, cols) : row * rows), "wrong number of bytes");
  std::string out(back ? row * rows : tiled_bytes(t, rows, cols), '\0');
  const auto* src = reinterpret_cast<const uint8_t*>(in.data());
  auto* dst = reinterpret_cast<uint8_t*>(&out[0]);
  for (int64_t r = 0; r < rows; r += back ? 1 : kPanel) {
    if (back)
      untile_row(t, src, rows, cols, r, dst + r * row);
    else
      tile_panel(t, src + r * row, row, rows, cols, r / kPanel, dst);
  }
  return out;
}

py::bytes quantize_reference(const std::string& type, const FloatArray& x, bool by_kernels) {
  const DType t = dtype_of("quantize", type);
  GEMMA_CHECK(t == DType::Q8_0 || t == DType::Q4_0, "only Q8_0 and Q4_0 can be encoded");
  GEMMA_CHECK(x.ndim() == 2, "x must be [rows, k]");
  std::string out(row_bytes(t, x.shape(1)) * static_cast<size_t>(x.shape(0)), '\0');
  for (py::ssize_t r = 0; r < x.shape(0); ++r)
    encode_row(t, x.data() + r * x.shape(1), x.shape(1),
               reinterpret_cast<uint8_t*>(&out[0]) + row_bytes(t, x.shape(1)) * r,
               by_kernels ? kernels().q4_errors : q4_errors);
  return out;
}

py::array_t<float> dequantize_reference(const std::string& type, const py::buffer& data, int64_t rows, int64_t cols) {
  py::buffer_info view = data.request();
  const HostTensor t = tensor_of("dequantize", py::make_tuple(type, py::make_tuple(rows, cols), data), view);
  GEMMA_CHECK(cols % encoding(t.type).block == 0, "cols must be a multiple of ", encoding(t.type).block);
  py::array_t<float> out({rows, cols});
  for (int64_t r = 0; r < rows; ++r) {
    if (t.tiled)
      decode_tiled_row(t.type, t.data, rows, cols, r, out.mutable_data() + r * cols);
    else
      decode_row(t.type, t.data + r * row_bytes(t.type, cols), cols, out.mutable_data() + r * cols);
  }
  return out;
}

#if defined(GEMMA_NATIVE_EMULATOR)
void add_emulator(py::module_& t) {
  namespace e = emulator;
  t.def(
      "emulator",
      [](const std::string& order, uint32_t seed, size_t memory_limit, int64_t fail_after, size_t shared_limit,
         int processors) {
        GEMMA_CHECK(order == "forward" || order == "reverse" || order == "random", "order is \"", order, "\"");
        e::settings() = {order == "forward"   ? e::Order::forward
                         : order == "reverse" ? e::Order::reverse
                                              : e::Order::random,
                         seed,
                         memory_limit,
                         fail_after ? e::launches() + fail_after : 0,
                         shared_limit,
                         processors};
      },
      py::arg("order") = "forward", py::arg("seed") = 1, py::arg("memory_limit") = 0, py::arg("fail_after") = 0,
      py::arg("shared_limit") = size_t{227 << 10}, py::arg("processors") = 3);
  t.def("emulator_state", [] {
    py::dict d;
    d["allocated"] = e::allocated();
    d["launches"] = e::counted(e::Asked::launch);
    d["replays"] = e::counted(e::Asked::replay);
    d["uploads"] = e::counted(e::Asked::upload);
    d["downloads"] = e::counted(e::Asked::download);
    d["broken_guards"] = e::broken_guards();
    return d;
  });
  t.def("faulty_kernel", [](const std::string& fault, py::array_t<float>& out) {
    GEMMA_CHECK(out.size() >= 64, "out must have 64 values");
    e::run_faulty_kernel(fault, out.mutable_data());
  });
}
#endif

}  // namespace

void add_testing(py::module_& m) {
  py::module_ t = m.def_submodule("testing", "Single kernels of the level in use, for the test suite.");
  t.def("product", test_product, py::arg("dtype"), py::arg("data"), py::arg("rows"), py::arg("cols"), py::arg("x"),
        py::arg("threads") = 1, py::arg("fine") = false);
  t.def("reachable", test_reachable, py::arg("dtype"), py::arg("data"), py::arg("rows"), py::arg("cols"), py::arg("x"),
        py::arg("k"), py::arg("softcap") = 0.0f, py::arg("fine") = false, py::arg("also") = std::vector<int32_t>(),
        py::arg("calls") = 2);
  t.def("head_bounds", test_bounds, py::arg("dtype"), py::arg("data"), py::arg("rows"), py::arg("cols"), py::arg("x"),
        py::arg("fine"), py::arg("apart"));
  t.def("attend", test_attend, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("lo"), py::arg("hi"),
        py::arg("softcap") = 0.0f, py::arg("f32") = false);
  t.def("pieces", test_pieces, py::arg("threads"), py::arg("count"), py::arg("grain"), py::arg("fail") = -1);
  t.def("tile",
        [](const std::string& n, const py::bytes& d, int64_t r, int64_t c) { return test_tile(n, d, r, c, false); });
  t.def("untile",
        [](const std::string& n, const py::bytes& d, int64_t r, int64_t c) { return test_tile(n, d, r, c, true); });
  t.def("quantize", quantize_reference, py::arg("dtype"), py::arg("x"), py::arg("by_kernels") = false);
  t.def("dequantize", dequantize_reference, py::arg("dtype"), py::arg("data"), py::arg("rows"), py::arg("cols"));
  t.def("rms_norm", [](const FloatArray& x, const FloatArray& w, float eps) {
    GEMMA_CHECK(x.size() == w.size(), "x and w differ in size");
    py::array_t<float> out(x.size());
    kernels().rms_norm(x.data(), w.data(), x.size(), eps, out.mutable_data());
    return out;
  });
  t.def("geglu", [](const FloatArray& g, const FloatArray& u) {
    GEMMA_CHECK(g.size() == u.size(), "gate and up differ in size");
    py::array_t<float> out(g.size());
    kernels().geglu(g.data(), u.data(), g.size(), out.mutable_data());
    return out;
  });
  t.def("softcap", [](const FloatArray& x, float cap) {
    py::array_t<float> out(x.size());
    std::copy(x.data(), x.data() + x.size(), out.mutable_data());
    kernels().softcap(out.mutable_data(), out.size(), cap);
    return out;
  });
#if defined(GEMMA_NATIVE_EMULATOR)
  add_emulator(t);
#endif
  t.def("log_sum", [](const FloatArray& x) {
    float max, sum;
    kernels().log_sum(x.data(), x.size(), &max, &sum);
    return py::make_tuple(max, sum);
  });
}
