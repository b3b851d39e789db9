// The kernels of the AVX-512 level on CPUs that have AVX2 alone, for tests: GEMMA_NATIVE_ISA=avx512-emulated.
#define GEMMA_ISA isa_avx512_emulated
#include "vec_avx512.h"
// (The bodies come after the vector type that they are written over.)
#include "../cpu/kernels-inl.h"

namespace gemma {
extern const Kernels kAvx512EmulatedKernels = GEMMA_ISA::make_table("avx512-emulated");
}
