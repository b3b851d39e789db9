#include "probes.h"

#include <algorithm>
#include <chrono>

#include "cublas.h"

namespace gemma::gpu {

namespace {

// A word of what was read, so that the reads are not left out. Bytes: `words` 16-byte words once. Layout: as many blocks as run at once,
// neighbouring threads at neighbouring words, four loads in flight.
GEMMA_KERNEL GEMMA_BOUNDS(kBlockThreads, 4) read_kernel(const uint8_t* data, int64_t words, uint32_t* sink) {
  start();
  uint32_t sum = 0;
  const int64_t step = static_cast<int64_t>(blocks_x()) * kBlockThreads * 4;
  for (int64_t i = static_cast<int64_t>(block_x()) * kBlockThreads * 4 + thread_x(); i < words; i += step) {
    GEMMA_UNROLL
    for (int j = 0; j < 4; ++j) {
      if (i + j * kBlockThreads < words) {
        const Word4 w = load_stream(data + (i + j * kBlockThreads) * 16);
        sum ^= w.x ^ w.y ^ w.z ^ w.w;
      }
    }
  }
  if (sum == 0x12345678u) *sink = sum;
}

double best_seconds(Device& d, const std::function<void()>& work) {
  double best = 1e30;
  for (int pass = 0; pass < 6; ++pass) {
    d.wait("a probe");
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < 4; ++i) work();
    d.wait("a probe");
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / 4);
  }
  return best;
}

}  // namespace

Ceilings measure(const std::shared_ptr<Device>& device, size_t bytes, int size) {
#if !defined(__CUDACC__)
  bytes = std::min<size_t>(bytes, 1 << 18);  // the emulation has no speed worth measuring
  size = std::min(size, 128);
#endif
  Device& d = *device;
  d.use();
  Ceilings c;
  {
    const Memory data(device, bytes, "a probe"), sink(device, 4, "a probe");
    d.zero(data.data(), bytes);
    auto* to = reinterpret_cast<uint32_t*>(sink.data());
    c.bytes_per_s = static_cast<double>(bytes) / best_seconds(d, [&] {
                      d.launch("read", read_kernel, {8 * d.processors()}, kBlockThreads, 0, data.data(),
                               static_cast<int64_t>(bytes / 16), to);
                    });
  }
  const size_t n = static_cast<size_t>(size);
  const Memory w(device, n * n * 2, "a probe"), x(device, n * n * 2, "a probe"), out(device, n * n * 4, "a probe");
  // Values like those of a model: zeros would need less power, and run at a higher clock.
  std::vector<uint16_t> values(n * n);
  uint32_t random = 1;
  for (uint16_t& v : values) {
    random = random * 1664525u + 1013904223u;
    v = bf16_of(static_cast<float>(random >> 8) * 0x1p-23f - 1.0f);
  }
  d.upload(w.data(), values.data(), n * n * 2);
  d.upload(x.data(), values.data(), n * n * 2);
  MatmulArgs a;
  a.w.low = w.data();
  a.w.rows = size;
  a.w.pieces = size / 8;
  a.x = reinterpret_cast<const uint16_t*>(x.data());
  a.m = a.k = size;
  a.out = out.floats();
  a.stride = size;
  const auto cublas = Cublas::load(device);
  const bool fast = cublas && cublas->matmul(d, a);
  c.product = fast ? cublas->path() : "own kernel";
  c.ops_per_s = 2.0 * size * size * size / best_seconds(d, [&] {
                  if (fast)
                    cublas->matmul(d, a);
                  else
                    matmul(d, DType::BF16, a);
                });
  return c;
}

}  // namespace gemma::gpu
