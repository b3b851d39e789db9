// The amx level's own kernels; its others are those of AVX-512 (dispatch.cpp).
#define GEMMA_ISA isa_amx
#include "vec_avx512.h"
// (The bodies come after the instructions that they are written in.)
#include "amx.h"
#include "tiles-inl.h"

namespace gemma {
void use_amx(Kernels& k) {
  GEMMA_ISA::use_tiles(k);
  k.name = "amx";
}
}  // namespace gemma
