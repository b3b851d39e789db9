// The products of the amx level on CPUs that have AVX2 alone, for tests: GEMMA_NATIVE_ISA=amx-emulated.
#define GEMMA_ISA isa_amx_emulated
#define GEMMA_EMULATED_AVX512
#include "avx512.h"
namespace gemma {
namespace GEMMA_ISA {
using namespace emulated;
}
}  // namespace gemma
#include "../cpu/vec_avx512.h"
// (The bodies come after the instructions that they are written in.)
#include "amx.h"

#include "../cpu/tiles-inl.h"

namespace gemma {
void use_emulated_amx(Kernels& k) {
  GEMMA_ISA::use_tiles(k);
  k.name = "amx-emulated";
}
}  // namespace gemma
