// Which instruction-set level the kernels run at.
#pragma once

namespace gemma {

enum class Isa { scalar, avx2, avx512, avx512_emulated };  // the last for tests: emulator/avx512.h

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);
// Read once, like the level.
bool has_avx_vnni();     // vpdpbusd on 256 bits, used inside the avx2 level
bool has_avx512_bf16();  // vdpbf16ps, used inside the avx512 level where that is the chosen one

// The best supported level, or the one that GEMMA_NATIVE_ISA names; read once. Throws InputError for an unknown or
// unsupported name.
Isa chosen_isa();

}  // namespace gemma
