// Picks the kernels of the level that runs here (or that GEMMA_NATIVE_ISA asks for).
#include "isa.h"
#include "kernels.h"

namespace gemma {

#if defined(GEMMA_NATIVE_X86)
namespace {

// The AVX-512 level with bf16 products by multiply-adds, as the avx2 level computes them: to its bits.
Kernels without_bf16(Kernels k) {
  k.pack = kAvx2Kernels.pack;
  k.pack_bytes = kAvx2Kernels.pack_bytes;
  k.bf16 = kAvx2Kernels.bf16;
  k.peak_bf16 = kAvx2Kernels.peak_bf16;
  return k;
}

const Kernels& with_what_there_is(const Kernels& k) {
  static const Kernels without = without_bf16(k);
  return has_avx512_bf16() ? k : without;
}

const Kernels& with(const Kernels& k, void (*use)(Kernels&)) {
  static const Kernels changed = [&] {
    Kernels copy = k;
    use(copy);
    return copy;
  }();
  return changed;
}

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
