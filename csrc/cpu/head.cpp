#include "head.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "../quant.h"
#include "../select.h"

namespace gemma {

namespace {

constexpr float kSigmas = 8;
constexpr int64_t kMostBest = 40;  // beyond, survivors stand in most panels
constexpr int64_t kMostRows = 8;   // of activations: beyond, computing is dearer than reading
// The scan has paid where a smaller share of the panels is left: several rows wait for arithmetic, of which it saves less than of memory.
float most_left(int64_t rows) { return rows > 4 ? 0.15f : 0.3f; }
constexpr float kUnsaturated = 4;  // softcaps up to which different products stay different logits

// What the high bits leave open: `steps` equally likely values. Weights go from -offset to offset - 1.
struct LowBits {
  float steps, offset;
  bool halves;  // of a block have scales of their own
  // Of the sum over 16 values of their products with weights: of the low bits times values whose squares add up to `square`, and of weights,
  // taken for equally likely too, times the rounding of the values.
  float variance(float square) const { return (steps * steps - 1) / 12 * square + 16 * offset * offset / 3 / 12; }
};
LowBits low_bits(DType type) {  // Q8_0 or Q6_K
  return type == DType::Q6_K ? LowBits{4, 32, true} : LowBits{16, 128, false};
}

// Activations as the scan takes them: a block's scale is the row's over a power of two, which costs kernels nothing. For that values are
// rounded once more.
struct ScanActs {
  std::vector<int8_t> q;  // as in QuantActs
  std::vector<ScanScale> blocks;
  std::vector<float> scale;  // of each row's estimates and margins
};

ScanActs scan_acts(const LowBits& low, const QuantActs& a, int64_t blocks) {
  const int64_t count = blocks * a.rows;
  ScanActs out{std::vector<int8_t>(count * kBlock), std::vector<ScanScale>(count), std::vector<float>(a.rows)};
  // A block that is not a number counts as zeros here: such a row's bar, of real products, is not finite.
  const auto largest = [&](int64_t i) { return std::max(a.scale[i].d[0], a.scale[i].d[1]); };
  for (int64_t i = 0; i < count; ++i) out.scale[i % a.rows] = std::max(out.scale[i % a.rows], largest(i));
  for (int64_t i = 0; i < count; ++i) {
    const float own = largest(i);
    float power = 1, unit = out.scale[i % a.rows];  // unit: the row's scale times power
    for (; unit > 2 * own && power > 1e-9f; unit /= 2) power /= 2;
    ScanScale& s = out.blocks[i];
    s = {};
    s.zero = 1.5f * (1 << 23) * power;
    float start[2] = {};
    for (int h = 0; h < 2; ++h) {
      const float by = own > 0 ? a.scale[i].d[h] / unit : 0;
      int32_t sum = 0, square = 0;
      for (int64_t j = i * kBlock + 16 * h; j < i * kBlock + 16 * h + 16; ++j) {
        const int32_t q = static_cast<int32_t>(static_cast<float>(a.q[j]) * by + 128.5f) - 128;  // rounded
        out.q[j] = static_cast<int8_t>(q);
        sum += q;
        square += q * q;
      }
      const int to = low.halves ? h : 0;
      start[to] += ((low.steps - 1) / 2 - low.offset) / low.steps * static_cast<float>(sum);
      s.energy[to] +=
          kSigmas * kSigmas * power * power * low.variance(static_cast<float>(square)) / (low.steps * low.steps);
    }
    std::memcpy(&s.begin[0], &s.zero, sizeof(float));
    s.begin[1] = s.begin[0] + static_cast<int32_t>(std::lrint(start[1]));
    s.begin[0] += static_cast<int32_t>(std::lrint(start[0]));
  }
  for (float& d : out.scale) d = d > 0 ? d * low.steps : 1;
  return out;
}

}  // namespace

void head_bounds(const Kernels& kernels, ThreadPool& pool, const Activations& x, const CpuMatrix& head,
                 const std::vector<uint32_t>& apart, HeadBounds& bounds) {
  const int64_t total = static_cast<int64_t>(apart.size());
  const QuantActs acts = x.chunk(0);
  const ScanActs scan = scan_acts(low_bits(head.type), acts, x.blocks());
  bounds.low.resize(x.n * total);
  bounds.high.resize(x.n * total);
  const int64_t grain = std::max<int64_t>(1, (128 << 10) * total / static_cast<int64_t>(head.bytes));
  pool.parallel_for(total, grain, [&](int64_t begin, int64_t end, int) {
    for (int64_t p = begin; p < end; ++p) {
      const uint32_t padding = head.panel_rows(p) < kPanel ? ~0u << head.panel_rows(p) : 0;
      kernels.scan(head.type, head.tiled_panel(p).units, x.blocks(), scan.q.data(), scan.blocks.data(), acts.rows,
                   apart[p] | padding, &bounds.low[p], &bounds.high[p], total);
    }
    for (int r = 0; r < acts.rows; ++r)
      for (float* bound : {bounds.low.data() + r * total, bounds.high.data() + r * total})
        for (int64_t p = begin; p < end; ++p) bound[p] *= scan.scale[r];
  });
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
      for (int r = 0; r < head.panel_rows(p); ++r)
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
  const auto all = [&] {
    std::vector<int64_t> panels(total);
    std::iota(panels.begin(), panels.end(), 0);
    return panels;
  };
  const int64_t listed = static_cast<int64_t>(also.size());
  bounded_ = false;
  if (encoding(head.type).low_bytes == 0 || k > kMostBest || x.n > kMostRows || total < 8 * (k + listed) || broken_)
    return all();
  if (pause_ > 0) {
    --pause_;
    return all();
  }

  apart_.assign(total, 0);  // what `also` lists is no measure for the other rows
  for (int32_t id : also) apart_[id / kPanel] |= 1u << id % kPanel;
  head_bounds(kernels, pool, x, head, apart_, bounds_);
  bounded_ = true;
  if (!checked_) return all();

  std::vector<uint8_t> in(total);
  for (int64_t p = 0; p < total; ++p) in[p] = apart_[p] != 0;
  const std::vector<float> bar = bars(kernels, pool, x, head, k);
  for (int64_t i = 0; i < x.n; ++i) {
    if (!std::isfinite(bar[i]) || (softcap > 0 && std::fabs(bar[i]) > kUnsaturated * softcap)) return all();
    const float* high = bounds_.high.data() + i * total;
    int64_t count = 0;
    for (int64_t p = 0; p < total; ++p) {
      const bool reaches = high[p] >= bar[i];
      in[p] |= static_cast<uint8_t>(reaches);
      count += reaches;
    }
    // The k panels of the bar do not reach it themselves: their bounds are wrong, as `check` will see from all of them.
    if (count < k) return all();
  }
  std::vector<int64_t> reachable;
  for (int64_t p = 0; p < total; ++p)
    if (in[p]) reachable.push_back(p);
  const bool paid = static_cast<float>(reachable.size()) < most_left(x.n) * static_cast<float>(total);
  if (!paid) pause_ = next_pause_;
  next_pause_ = paid ? 1 : std::min(64, 2 * next_pause_);
  return reachable;
}

void HeadScan::check(ThreadPool& pool, const CpuMatrix& head, const std::vector<int64_t>& panels, int64_t n,
                     const float* y) {
  if (!bounded_) return;
  const int64_t total = static_cast<int64_t>(apart_.size()), count = static_cast<int64_t>(panels.size());
  std::atomic<bool> broken{broken_};
  pool.parallel_for(n, 1, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < count; ++j) {
        const int64_t p = panels[j];
        const float* row = y + (i * count + j) * kPanel;
        const float best = *std::max_element(row, row + head.panel_rows(p));
        if (!apart_[p] && (best < bounds_.low[i * total + p] || best > bounds_.high[i * total + p])) broken = true;
      }
  });
  broken_ = broken;
  checked_ = true;
}

}  // namespace gemma
