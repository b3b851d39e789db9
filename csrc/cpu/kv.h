// Keys and values of one sequence on the CPU: a page for every block of 64 positions of every layer, allocated when first used.
//
// A page holds, for each key/value head, the block's keys and then its values, in the layouts that `attend` (kernels.h) reads:
//   keys    bf16 [4][e / 2][16 keys][2]    f32 [4][e][16 keys]
//   values  bf16 [e / 32][64 keys][32], dimensions i and i + 16 side by side    f32 [e / 32][64 keys][32]
// where e is the head size rounded up to 32, the rest zeros.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../backend.h"
#include "../quant.h"

namespace gemma {

class CpuKv final : public KvStore {
 public:
  CpuKv(const Config& c, const KvShape& shape)
      : f32_(shape.f32),
        heads_(c.num_kv_heads),
        dim_(c.head_dim),
        e_((c.head_dim + 31) / 32 * 32),
        ring_(shape.ring),
        pages_(shape.ring.size()) {}

  bool f32() const { return f32_; }
  int64_t e() const { return e_; }

  void reserve(int64_t length) override {
    for (size_t l = 0; l < pages_.size(); ++l)
      while (static_cast<int64_t>(pages_[l].size()) < blocks(l, length)) pages_[l].push_back(new_page());
  }

  size_t bytes() const override {
    size_t n = 0;
    for (const auto& layer : pages_) n += layer.size() * page_bytes();
    return n;
  }

  std::unique_ptr<KvStore> clone(int64_t length, int64_t high) const override {
    auto copy = std::make_unique<CpuKv>(*this, 0);
    for (size_t l = 0; l < pages_.size(); ++l)
      for (int64_t b = 0; b < blocks(l, ring_[l] ? high : length); ++b) {
        copy->pages_[l].push_back(new_page());
        std::memcpy(aligned(copy->pages_[l].back()), aligned(pages_[l][b]), page_bytes());
      }
    return copy;
  }
  CpuKv(const CpuKv& other, int)
      : f32_(other.f32_),
        heads_(other.heads_),
        dim_(other.dim_),
        e_(other.e_),
        ring_(other.ring_),
        pages_(other.pages_.size()) {}

  // The keys of absolute block b (positions 64 b ...) for one head.
  const void* keys(int64_t layer, int64_t head, int64_t block) const {
    return page(layer, block) + head * 2 * plane_bytes();
  }
  const void* values(int64_t layer, int64_t head, int64_t block) const {
    return page(layer, block) + (head * 2 + 1) * plane_bytes();
  }

  void write(int64_t layer, int64_t head, int64_t position, const float* k, const float* v) {
    uint8_t* p = page(layer, position / kKeyBlock) + head * 2 * plane_bytes();
    uint8_t* pv = p + plane_bytes();
    const int64_t j = position % kKeyBlock;
    if (f32_) {
      float* kd = reinterpret_cast<float*>(p) + j / 16 * 16 * e_ + j % 16;
      float* vd = reinterpret_cast<float*>(pv) + j * 32;
      for (int64_t d = 0; d < dim_; ++d) kd[d * 16] = k[d];
      for (int64_t d = 0; d < dim_; ++d) vd[d / 32 * kKeyBlock * 32 + d % 32] = v[d];
    } else {
      // Two values in a word: a row is written where its pages' lines are far apart.
      uint8_t* kd = p + (j / 16 * 8 * e_ + j % 16) * 4;
      uint8_t* vd = pv + j * 64;
      const auto put = [](uint8_t* to, float low, float high) {
        const uint16_t words[2] = {float_to_bf16(low), float_to_bf16(high)};
        std::memcpy(to, words, sizeof(words));
      };
      for (int64_t d = 0; d < dim_; d += 2) put(kd + d * 32, k[d], k[d + 1]);  // head sizes are even
      for (int64_t d = 0; d < dim_; d += d % 32 == 15 ? 17 : 1)
        put(vd + (d / 32 * kKeyBlock * 16 + d % 16) * 4, v[d], d + 16 < dim_ ? v[d + 16] : 0);
    }
  }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  using Page = std::unique_ptr<uint8_t, Free>;

  // What kernels load lies in one cache line each.
  static constexpr uintptr_t kAlignment = 64;
  static uint8_t* aligned(const Page& page) {
    return page.get() + (kAlignment - reinterpret_cast<uintptr_t>(page.get()) % kAlignment) % kAlignment;
  }

  // Pages of a layer that hold positions [0, length).
  int64_t blocks(size_t layer, int64_t length) const {
    const int64_t n = (length + kKeyBlock - 1) / kKeyBlock;
    return ring_[layer] ? std::min(n, ring_[layer] / kKeyBlock) : n;
  }
  size_t plane_bytes() const { return kKeyBlock * e_ * (f32_ ? 4 : 2); }
  size_t page_bytes() const { return heads_ * 2 * plane_bytes(); }
  Page new_page() const {
    auto* p = static_cast<uint8_t*>(std::calloc(1, page_bytes() + kAlignment - 1));
    if (!p) throw std::bad_alloc();
    return Page(p);
  }
  uint8_t* page(int64_t layer, int64_t block) const {
    return aligned(pages_[layer][ring_[layer] ? block % (ring_[layer] / kKeyBlock) : block]);
  }

  bool f32_;
  int64_t heads_, dim_, e_;
  std::vector<int64_t> ring_;
  std::vector<std::vector<Page>> pages_;  // [layer][block]
};

}  // namespace gemma
