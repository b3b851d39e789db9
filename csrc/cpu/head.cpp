#include "head.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "../quant.h"
#include "../select.h"

namespace gemma {

namespace {

constexpr float kSigmas = 8;
constexpr float kMeanSquare = 128 * 128 / 3.0f;  // of values of Q8_0, all equally likely
constexpr int64_t kMostBest = 40;                // beyond, survivors stand in most panels
constexpr float kUnsaturated = 4;                // softcaps up to which different products stay different logits

// What the high bits leave open: `steps` equally likely values, `middle` being theirs with a weight's offset taken off.
struct LowBits {
  float steps, middle;
  bool halves;  // of a block have scales of their own
  // Up to so many rows of activations, and so large a share of the panels left, reading less is worth computing more.
  int64_t most_rows;
  float most_left;
  float variance() const { return (steps * steps - 1) / 12; }
};
LowBits low_bits(DType type) {  // Q8_0 or Q6_K
  return type == DType::Q6_K ? LowBits{4, 1.5f - 32, true, 2, 0.25f} : LowBits{16, 7.5f - 128, false, 8, 0.33f};
}

// Activations as the scan takes them: one scale a block for weights that have one, which saves a quarter of what follows the products of
// bytes. For that the half with the smaller values is rounded once more.
struct ScanActs {
  std::vector<int8_t> q;  // as in QuantActs
  std::vector<ScanScale> scales;
};

ScanActs scan_acts(const LowBits& low, const QuantActs& a, int64_t blocks) {
  const int64_t count = blocks * a.rows;
  ScanActs out{std::vector<int8_t>(a.q, a.q + count * kBlock), std::vector<ScanScale>(count)};
  for (int64_t i = 0; i < count; ++i) {
    float d[2] = {a.scale[i].d[0], a.scale[i].d[1]}, rounding = 0;
    int8_t* q = out.q.data() + i * kBlock;
    if (!low.halves && (d[0] < d[1] || d[1] < d[0])) {
      const int smaller = d[0] < d[1] ? 0 : 1;
      const float ratio = d[smaller] / d[1 - smaller];
      for (int j = 16 * smaller; j < 16 * smaller + 16; ++j)
        q[j] = static_cast<int8_t>(std::lrint(static_cast<float>(q[j]) * ratio));
      d[smaller] = d[1 - smaller];
      rounding = 16 * kMeanSquare / 12;
    }
    ScanScale& s = out.scales[i];
    s = {};
    for (int h = 0; h < 2; ++h) {
      int32_t sum = 0, square = 0;
      for (int j = 16 * h; j < 16 * h + 16; ++j) {
        sum += q[j];
        square += q[j] * q[j];
      }
      const int to = low.halves ? h : 0;
      s.d[h] = low.steps * d[h];
      s.offset[to] += low.middle * d[h] * static_cast<float>(sum);
      s.energy[to] +=
          kSigmas * kSigmas * d[h] * d[h] * (low.variance() * static_cast<float>(square) + (h ? 0 : rounding));
    }
  }
  return out;
}

}  // namespace

HeadBounds head_bounds(const Kernels& kernels, ThreadPool& pool, const Activations& x, const CpuMatrix& head,
                       const std::vector<uint32_t>& apart) {
  const int64_t total = static_cast<int64_t>(apart.size());
  const QuantActs acts = x.chunk(0);
  const ScanActs scan = scan_acts(low_bits(head.type), acts, x.blocks());
  HeadBounds bounds{std::vector<float>(x.n * total), std::vector<float>(x.n * total)};
  const int64_t grain = std::max<int64_t>(1, (128 << 10) * total / static_cast<int64_t>(head.bytes));
  pool.parallel_for(total, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const int64_t rows = head.rows - p * kPanel;
      const uint32_t padding = rows < kPanel ? ~0u << rows : 0;
      kernels.scan(head.type, head.tiled_panel(p).units, x.blocks(), scan.q.data(), scan.scales.data(), acts.rows,
                   apart[p] | padding, &bounds.low[p], &bounds.high[p], total);
    }
  });
  return bounds;
}

std::vector<float> HeadScan::bars(const Kernels& kernels, ThreadPool& pool, const Activations& x, const CpuMatrix& head,
                                  int64_t k) const {
  const int64_t total = static_cast<int64_t>(apart_.size());
  std::vector<int32_t> best_panels(x.n * k);
  pool.parallel_for(x.n, 1, [&](int64_t begin, int64_t end, int) {
    float low[kMostBest];
    for (int64_t i = begin; i < end; ++i)
      best(bounds_.low.data() + i * total, total, k, best_panels.data() + i * k, low);
  });
  std::vector<int64_t> panels(best_panels.begin(), best_panels.end());
  std::sort(panels.begin(), panels.end());
  panels.erase(std::unique(panels.begin(), panels.end()), panels.end());
  std::vector<float> y(x.n * panels.size() * kPanel), bars;
  matmul_panels(kernels, pool, x, head, panels, y.data());
  const float* products = y.data();
  for (int64_t i = 0; i < x.n; ++i) {
    std::vector<float> most;
    for (int64_t p : panels) {
      most.push_back(-std::numeric_limits<float>::infinity());
      for (int64_t r = 0; r < std::min<int64_t>(kPanel, head.rows - p * kPanel); ++r)
        if (!(apart_[p] >> r & 1)) most.back() = std::max(most.back(), products[r]);
      products += kPanel;
    }
    int32_t which[kMostBest];
    float values[kMostBest];
    best(most.data(), static_cast<int64_t>(most.size()), k, which, values);
    bars.push_back(values[k - 1]);
  }
  return bars;
}

std::vector<int64_t> HeadScan::reachable(const Kernels& kernels, ThreadPool& pool, const Activations& x,
                                         const CpuMatrix& head, int64_t k, const std::vector<int32_t>& also,
                                         float softcap) {
  const int64_t total = (head.rows + kPanel - 1) / kPanel;
  std::vector<int64_t> all(total);
  std::iota(all.begin(), all.end(), 0);
  const int64_t listed = static_cast<int64_t>(also.size());
  const LowBits low = low_bits(head.type);
  bounds_ = {};
  if (encoding(head.type).low_bytes == 0 || k > kMostBest || x.n > low.most_rows || total < 8 * (k + listed) || broken_)
    return all;
  if (pause_ > 0) {
    --pause_;
    return all;
  }

  apart_.assign(total, 0);  // what `also` lists is no measure for the other rows
  for (int32_t id : also) apart_[id / kPanel] |= 1u << id % kPanel;
  bounds_ = head_bounds(kernels, pool, x, head, apart_);
  if (!checked_) return all;

  const std::vector<float> bar = bars(kernels, pool, x, head, k);
  for (float b : bar)
    if (!std::isfinite(b) || (softcap > 0 && b > kUnsaturated * softcap)) return all;
  std::vector<int64_t> reachable;
  for (int64_t p = 0; p < total; ++p) {
    bool in = apart_[p] != 0;
    for (int64_t i = 0; i < x.n; ++i) in |= bounds_.high[i * total + p] >= bar[i];
    if (in) reachable.push_back(p);
  }
  const bool paid = static_cast<float>(reachable.size()) < low.most_left * static_cast<float>(total);
  if (!paid) pause_ = next_pause_;
  next_pause_ = paid ? 1 : std::min(64, 2 * next_pause_);
  return reachable;
}

void HeadScan::check(const std::vector<int64_t>& panels, int64_t n, int64_t vocab, const float* y) {
  if (bounds_.low.empty()) return;
  const int64_t total = static_cast<int64_t>(apart_.size());
  for (int64_t i = 0; i < n; ++i)
    for (int64_t p : panels) {
      const float best = *std::max_element(y, y + std::min<int64_t>(kPanel, vocab - p * kPanel));
      y += kPanel;
      if (!apart_[p] && (best < bounds_.low[i * total + p] || best > bounds_.high[i * total + p])) broken_ = true;
    }
  checked_ = true;
}

}  // namespace gemma
