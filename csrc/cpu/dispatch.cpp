// Picks the kernels of the level that runs here (or that GEMMA_NATIVE_ISA asks for).
#include "isa.h"
#include "kernels.h"

namespace gemma {

const Kernels& kernels() {
  switch (chosen_isa()) {
#if defined(GEMMA_NATIVE_X86)
    case Isa::avx512:
      return kAvx512Kernels;
#if defined(GEMMA_NATIVE_EMULATOR)
    case Isa::avx512_emulated:
      return kAvx512EmulatedKernels;
#endif
    case Isa::avx2:
      return has_avx_vnni() ? kAvxVnniKernels : kAvx2Kernels;
#endif
    default:
      return kScalarKernels;
  }
}

}  // namespace gemma
