// Picks the kernels of the level that runs here (or that GEMMA_NATIVE_ISA asks for).
#include "isa.h"
#include "kernels.h"

namespace gemma {

#if defined(GEMMA_NATIVE_X86)
namespace {

// A table of the AVX-512 level, changed. One process has one level, and so at most one such table.
const Kernels& with(const Kernels& k, void (*change)(Kernels&)) {
  static const Kernels changed = [&] {
    Kernels copy = k;
    change(copy);
    return copy;
  }();
  return changed;
}

// bf16 products by multiply-adds, as the avx2 level computes them: to its bits.
void use_multiply_adds(Kernels& k) {
  k.pack = kAvx2Kernels.pack;
  k.pack_bytes = kAvx2Kernels.pack_bytes;
  k.bf16 = kAvx2Kernels.bf16;
  k.peak_bf16 = kAvx2Kernels.peak_bf16;
}

const Kernels& with_what_there_is(const Kernels& k) { return has_avx512_bf16() ? k : with(k, use_multiply_adds); }

}  // namespace
#endif

const Kernels& kernels() {
  switch (chosen_isa()) {
#if defined(GEMMA_NATIVE_X86)
#if defined(GEMMA_NATIVE_AMX)
    case Isa::amx:
      return with(kAvx512Kernels, use_amx);
#endif
    case Isa::avx512:
      return with_what_there_is(kAvx512Kernels);
#if defined(GEMMA_NATIVE_EMULATOR)
    case Isa::avx512_emulated:
      return with_what_there_is(kAvx512EmulatedKernels);
    case Isa::amx_emulated:
      return with(kAvx512EmulatedKernels, use_emulated_amx);
#endif
    case Isa::avx2:
      return has_avx_vnni() ? kAvxVnniKernels : kAvx2Kernels;
#endif
    default:
      return kScalarKernels;
  }
}

}  // namespace gemma
