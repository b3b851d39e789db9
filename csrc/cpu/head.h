// The best of a vocabulary: which logits are largest, without computing all of them where a bound can rule most out.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "matmul.h"
#include "threads.h"

namespace gemma {

// The largest lower and upper bound of the products of a head's panels (Q8_0 or Q6_K), from the high bits of its values: [row of x][panel].
struct HeadBounds {
  std::vector<float> low, high;
};
// apart[panel]: a bit for each of its rows that does not count. x: one chunk of rows at most.
static_assert(kPanel == 32, "a bit a row");
void head_bounds(const Kernels& kernels, ThreadPool& pool, const Activations& x, const CpuMatrix& head,
                 const std::vector<uint32_t>& apart, HeadBounds& bounds);

// Rules out what it can of a vocabulary. The high bits of a panel of Q8_0 or Q6_K give every product to within a residual whose standard
// deviation sigma follows from the scales and the activations; a row more than 8 sigma below the k-th best product of the panels that
// promise most cannot be among the k best. That bound is observed, not proved: docs/MODEL.md has the figures.
//
// So it is checked all along: the first call names every panel, and once the best product of a panel that was named lies outside its bounds,
// as it may if a head was quantised before to fewer bits and its low bits are anything but random, there is no scan any more.
class HeadScan {
 public:
  // Panels of `head` in which one of `also` (sorted), or one of the k largest products of other rows with some row of x may lie, in
  // order; all of them where the high bits would not tell, or have not told for some calls.
  std::vector<int64_t> reachable(const Kernels& kernels, ThreadPool& pool, const Activations& x, const CpuMatrix& head,
                                 int64_t k, const std::vector<int32_t>& also, float softcap);
  // What matmul_panels made of the last call's panels, for n rows of x.
  void check(ThreadPool& pool, const CpuMatrix& head, const std::vector<int64_t>& panels, int64_t n, const float* y);

 private:
  // For each row of x a product that k rows of the head reach, in panels of their own.
  std::vector<float> bars(const Kernels& kernels, ThreadPool& pool, const Activations& x, const CpuMatrix& head,
                          int64_t k) const;

  HeadBounds bounds_;  // of the last call, if `bounded_`
  std::vector<uint32_t> apart_;
  bool bounded_ = false, checked_ = false, broken_ = false;
  int pause_ = 0, next_pause_ = 1;  // calls to leave out: a text whose next token is open stays so for a while
};

}  // namespace gemma
