#include "head.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "../quant.h"

namespace gemma {

namespace {

constexpr float kSigmas = 8;
// Of the low halves: 16 equally likely values, with a weight's 128 taken off.
constexpr float kMiddle = 7.5f - 128, kVariance = (16 * 16 - 1) / 12.0f;
constexpr int64_t kMostBest = 40;  // beyond, survivors stand in most panels
constexpr int64_t kMostRows = 8;
constexpr float kUnsaturated = 4;  // softcaps up to which different products stay different logits

std::vector<ScanScale> scan_scales(const QuantActs& a, int64_t blocks) {
  std::vector<ScanScale> scales(blocks * a.rows);
  for (int64_t i = 0; i < blocks * a.rows; ++i) {
    int32_t square[2] = {0, 0};
    for (int j = 0; j < kBlock; ++j) square[j / 16] += a.q[i * kBlock + j] * a.q[i * kBlock + j];
    const ActScale& s = a.scale[i];
    const float energy =
        s.d[0] * s.d[0] * static_cast<float>(square[0]) + s.d[1] * s.d[1] * static_cast<float>(square[1]);
    scales[i] = {{16 * s.d[0], 16 * s.d[1]}, kMiddle * s.dsum, kSigmas * kSigmas * kVariance * energy};
  }
  return scales;
}

}  // namespace

HeadBounds head_bounds(const Kernels& kernels, ThreadPool& pool, const Activations& x, const CpuMatrix& head,
                       const std::vector<uint32_t>& apart) {
  const int64_t total = static_cast<int64_t>(apart.size());
  const QuantActs acts = x.chunk(0);
  const std::vector<ScanScale> scales = scan_scales(acts, x.blocks());
  HeadBounds bounds{std::vector<float>(x.n * total), std::vector<float>(x.n * total)};
  const int64_t grain = std::max<int64_t>(1, (128 << 10) * total / static_cast<int64_t>(head.bytes));
  pool.parallel_for(total, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t rows = head.rows - p * kPanel;
      const uint32_t padding = rows < kPanel ? ~0u << rows : 0;
      kernels.scan(head.tiled_panel(p).units, x.blocks(), acts, scales.data(), apart[p] | padding, &bounds.low[p],
                   &bounds.high[p], total);
    }
  });
  return bounds;
}

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

  std::vector<uint32_t> apart(total);  // what `also` lists is no measure for the other rows
  for (int32_t id : also) apart[id / kPanel] |= 1u << id % kPanel;
  const HeadBounds bounds = head_bounds(kernels, pool, x, head, apart);

  // k panels hold a row each that is no worse than this.
  std::vector<float> bar(x.n), sorted(total);
  for (int64_t i = 0; i < x.n; ++i) {
    std::copy_n(bounds.low.begin() + i * total, total, sorted.begin());
    std::nth_element(sorted.begin(), sorted.begin() + (k - 1), sorted.end(), std::greater<float>());
    bar[i] = sorted[k - 1];
    if (!std::isfinite(bar[i]) || (softcap > 0 && bar[i] > kUnsaturated * softcap)) return all;
  }
  std::vector<int64_t> reachable;
  for (int64_t p = 0; p < total; ++p) {
    bool in = apart[p] != 0;
    for (int64_t i = 0; i < x.n; ++i) in |= bounds.high[i * total + p] >= bar[i];
    if (in) reachable.push_back(p);
  }
  const bool paid = 3 * static_cast<int64_t>(reachable.size()) < total;
  if (!paid) pause_ = next_pause_;
  next_pause_ = paid ? 1 : std::min(64, 2 * next_pause_);
  return reachable;
}

}  // namespace gemma
