#include "head.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

#include "../quant.h"

namespace gemma {

namespace {

constexpr float kSigmas = 8;
constexpr float kVariance = (16 * 16 - 1) / 12.0f;  // of the low halves: 16 equally likely values
constexpr int64_t kMostBest = 40;                   // beyond, survivors stand in most panels
constexpr int64_t kMostRows = 8;
constexpr float kUnsaturated = 4;  // softcaps up to which different products stay different logits

// energy[block][row]: what a weight row's d^2 is multiplied with for the variance of its residual over that block
std::vector<float> energies(const QuantActs& a, int64_t blocks) {
  std::vector<float> energy(blocks * a.rows);
  for (int64_t i = 0; i < blocks * a.rows; ++i) {
    int32_t square[2] = {0, 0};
    for (int j = 0; j < kBlock; ++j) square[j / 16] += a.q[i * kBlock + j] * a.q[i * kBlock + j];
    const float* d = a.scale[i].d;
    energy[i] = kVariance * (d[0] * d[0] * static_cast<float>(square[0]) + d[1] * d[1] * static_cast<float>(square[1]));
  }
  return energy;
}

}  // namespace

std::vector<int64_t> HeadScan::reachable(const Kernels& kernels, ThreadPool& pool, const Activations& x,
                                         const CpuMatrix& head, int64_t k, const std::vector<int32_t>& also,
                                         float softcap) {
  const int64_t total = (head.rows + kPanel - 1) / kPanel;
  std::vector<int64_t> all(total);
  std::iota(all.begin(), all.end(), 0);
  const int64_t listed = static_cast<int64_t>(also.size());
  if (head.type != DType::Q8_0 || k > kMostBest || x.n > kMostRows || total < 8 * (k + listed)) return all;
  if (pause_ > 0) {
    --pause_;
    return all;
  }

  static_assert(kPanel == 32, "a bit a row");
  std::vector<uint32_t> apart(total);  // rows of a panel that `also` lists: they are no measure for the others
  for (int32_t id : also) apart[id / kPanel] |= 1u << id % kPanel;

  const int m = static_cast<int>(x.n);
  const QuantActs acts = x.chunk(0);
  const std::vector<float> energy = energies(acts, x.blocks());
  std::vector<float> low(m * total), high(m * total);  // the largest bounds of a panel's rows
  const int64_t grain = std::max<int64_t>(1, (128 << 10) / static_cast<int64_t>(panel_bytes(head.type, head.cols)));
  pool.parallel_for(total, grain, [&](int64_t begin, int64_t end, int) {
    alignas(64) float tile[kMostRows * kPanel], variance[kMostRows * kPanel];
    for (int64_t p = begin; p < end; ++p) {
      kernels.scan(head.at_row(p * kPanel), x.blocks(), acts, energy.data(), tile, variance);
      const int rows = static_cast<int>(std::min<int64_t>(kPanel, head.rows - p * kPanel));
      for (int i = 0; i < m; ++i) {
        float lo = -std::numeric_limits<float>::infinity(), hi = lo;
        for (int r = 0; r < rows; ++r) {
          if (apart[p] >> r & 1) continue;
          const float sigma = kSigmas * std::sqrt(variance[i * kPanel + r]);
          lo = std::max(lo, tile[i * kPanel + r] - sigma);
          hi = std::max(hi, tile[i * kPanel + r] + sigma);
        }
        low[i * total + p] = lo;
        high[i * total + p] = hi;
      }
    }
  });

  // k panels hold a row each that is no worse than this.
  std::vector<float> bar(m), sorted(total);
  for (int i = 0; i < m; ++i) {
    std::copy_n(low.begin() + i * total, total, sorted.begin());
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
    bar[i] = sorted[k - 1];
    if (!std::isfinite(bar[i]) || (softcap > 0 && bar[i] > kUnsaturated * softcap)) return all;
  }
  std::vector<int64_t> reachable;
  for (int64_t p = 0; p < total; ++p) {
    bool in = apart[p] != 0;
    for (int i = 0; i < m; ++i) in |= high[i * total + p] >= bar[i];
    if (in) reachable.push_back(p);
  }
  const bool paid = 3 * static_cast<int64_t>(reachable.size()) < total;
  if (!paid) pause_ = next_pause_;
  next_pause_ = paid ? 1 : std::min(64, 2 * next_pause_);
  return reachable;
}

}  // namespace gemma
