// The amx level's own kernels on CPUs that have AVX2 alone, for tests: GEMMA_NATIVE_ISA=amx-emulated.
#define GEMMA_ISA isa_amx_emulated
#include "vec_avx512.h"
// (The bodies come after the instructions that they are written in.)
#include "amx.h"

#include "../cpu/tiles-inl.h"

namespace gemma {
void use_emulated_amx(Kernels& k) {
  GEMMA_ISA::use_tiles(k);
  k.name = "amx-emulated";
}
}  // namespace gemma
