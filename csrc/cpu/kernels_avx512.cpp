// The kernels for AVX-512 F, BW, DQ, VL and VNNI; those for bf16 weights need BF16 as well (dispatch.cpp).
#define GEMMA_ISA isa_avx512
#include "vec_avx512.h"
// (The bodies come after the vector type that they are written over.)
#include "kernels-inl.h"

namespace gemma {
extern const Kernels kAvx512Kernels = GEMMA_ISA::make_table("avx512");
}
