// Names and macros that the bodies of kernels share. Part of kernels-inl.h and tiles-inl.h, after the vector type.
#pragma once

#include "kernels.h"

namespace gemma {
namespace GEMMA_ISA {

using F = V::F;
using I = V::I;
using B = V::B;
constexpr int W = V::W;
constexpr int kGroups = kPanel / W;  // vectors that cover a panel's 32 rows

// Of a level's own, since levels may share no function of <algorithm>.
template <class T>
GEMMA_INLINE T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
GEMMA_INLINE T max_of(T a, T b) {
  return a < b ? b : a;
}

#if defined(__GNUC__)
#define GEMMA_PREFETCH(p) __builtin_prefetch(p)
#define GEMMA_PREFETCH_ONCE(p) __builtin_prefetch(p, 0, 0)  // what is used once and need not stay in caches
#else
#define GEMMA_PREFETCH(p) (void)(p)
#define GEMMA_PREFETCH_ONCE(p) (void)(p)
#endif
#define GEMMA_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define GEMMA_UNROLL(n) GEMMA_PRAGMA(clang loop unroll_count(n))
#elif defined(__GNUC__)
#define GEMMA_UNROLL(n) GEMMA_PRAGMA(GCC unroll n)
#else
#define GEMMA_UNROLL(n)
#endif

}  // namespace GEMMA_ISA
}  // namespace gemma
