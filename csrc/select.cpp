#include "select.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

namespace gemma {

void best(const float* x, int64_t n, int64_t k, int32_t* ids, float* values) {
  using Entry = std::pair<float, int32_t>;
  auto better = [](const Entry& a, const Entry& b) {
    return a.first > b.first || (a.first == b.first && a.second < b.second);
  };
  std::vector<Entry> heap;  // the worst of the k best on top
  heap.reserve(k);
  constexpr int64_t kBunch = 64;
  for (int64_t i = 0; i < n; i += kBunch) {
    const int64_t end = std::min(n, i + kBunch);
    if (static_cast<int64_t>(heap.size()) == k) {
      bool any = false;
      const float bar = heap.front().first;
      for (int64_t j = i; j < end; ++j) any |= x[j] > bar;  // an equal later id never enters
      if (!any) continue;
    }
    for (int64_t j = i; j < end; ++j) {
      // NaN orders below everything, so that the result always has k entries.
      const Entry entry{std::isnan(x[j]) ? -std::numeric_limits<float>::infinity() : x[j], static_cast<int32_t>(j)};
      if (static_cast<int64_t>(heap.size()) < k) {
        heap.push_back(entry);
        std::push_heap(heap.begin(), heap.end(), better);
      } else if (better(entry, heap.front())) {
        std::pop_heap(heap.begin(), heap.end(), better);
        heap.back() = entry;
        std::push_heap(heap.begin(), heap.end(), better);
      }
    }
  }
  std::sort_heap(heap.begin(), heap.end(), better);
  for (int64_t i = 0; i < k; ++i) {
    ids[i] = heap[i].second;
    values[i] = x[heap[i].second];
  }
}

}  // namespace gemma
