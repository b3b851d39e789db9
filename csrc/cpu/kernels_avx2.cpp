// The kernels for AVX2 + FMA + F16C; compiled a second time with -mavxvnni and GEMMA_AVX_VNNI (kernels_avxvnni.cpp).
#if defined(GEMMA_AVX_VNNI)
#define GEMMA_ISA isa_avxvnni
#define GEMMA_TABLE kAvxVnniKernels
#else
#define GEMMA_ISA isa_avx2
#define GEMMA_TABLE kAvx2Kernels
#endif
#include "vec_avx2.h"
// (The bodies come after the vector type that they are written over.)
#include "kernels-inl.h"

namespace gemma {
extern const Kernels GEMMA_TABLE = GEMMA_ISA::make_table("avx2");
}
