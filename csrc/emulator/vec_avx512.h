// The vectors of cpu/vec_avx512.h made of AVX2 instructions, for the level that GEMMA_ISA names.
#pragma once

#define GEMMA_EMULATED_AVX512
#include "avx512.h"
namespace gemma {
namespace GEMMA_ISA {
using namespace emulated;
}
}  // namespace gemma
#include "../cpu/vec_avx512.h"
