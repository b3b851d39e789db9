// The instructions of Intel's AMX that tiles-inl.h uses, for GCC and clang. Numbers of tiles are constants. (GCC 12's own intrinsics do not
// say which memory they read: it may leave out stores to a configuration.)
#pragma once

#include <cstdint>

#include "kernels.h"
#include "tile-config.h"

namespace gemma {
namespace GEMMA_ISA {

inline void tile_configure(const TileConfig& c) { __asm__ volatile("ldtilecfg %0" : : "m"(c)); }
inline void tile_release() { __asm__ volatile("tilerelease"); }
template <int T>
GEMMA_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
// Rows are `stride` bytes apart.
template <int T>
GEMMA_INLINE void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
GEMMA_INLINE void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
// sum[m][n] += (a[m][0] b[0][n] + a[m][2] b[2][n] + ...) + (a[m][1] b[1][n] + ...): 32 bf16 values of each row of a, and of b as pairs
// [16][n][2]. Each product is added to one of the two inner sums in the order of K, rounded to float32 each time.
template <int SUM, int A, int B>
GEMMA_INLINE void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
}
// sum[m][n] += the dot product of row m of a and column n of b, bytes with a sign; b as groups of four along K, [group][n][4]
template <int SUM, int A, int B>
GEMMA_INLINE void tile_dot_int8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
}

}  // namespace GEMMA_ISA
}  // namespace gemma
