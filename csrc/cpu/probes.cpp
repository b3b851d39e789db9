#include "probes.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "memory.h"

namespace gemma {

namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double peak(ThreadPool& pool, double (*run)(int64_t rounds)) {
  double best = 0;
  for (int64_t rounds = 1 << 12, pass = 0; pass < 8;) {
    std::atomic<int64_t> ops{0};
    const double start = seconds();
    pool.parallel_for(pool.size(), 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) ops += static_cast<int64_t>(run(rounds));
    });
    const double time = seconds() - start;
    if (time < 0.01 && rounds < (int64_t{1} << 30)) {
      rounds *= 2;
      continue;
    }
    best = std::max(best, static_cast<double>(ops.load()) / time);
    ++pass;
  }
  return best;
}

}  // namespace

double read_bandwidth(const Kernels& kernels, ThreadPool& pool, size_t bytes) {
  Memory memory(bytes);  // in the pages that weights get
  std::memset(memory.data(), 1, bytes);
  const int64_t piece = 1 << 18, pieces = static_cast<int64_t>(bytes) / piece;
  double best = 0;
  std::atomic<uint32_t> sink{0};
  for (int pass = 0; pass < 4; ++pass) {
    const double start = seconds();
    pool.parallel_for(pieces, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) sink += kernels.read(memory.data() + i * piece, piece);
    });
    best = std::max(best, static_cast<double>(pieces * piece) / (seconds() - start));
  }
  return best;
}

std::map<std::string, double> peaks(const Kernels& kernels, ThreadPool& pool) {
  return {{"int8", peak(pool, kernels.peak_int8)},
          {"bf16", peak(pool, kernels.peak_bf16)},
          {"f32", peak(pool, kernels.peak_f32)}};
}

}  // namespace gemma
