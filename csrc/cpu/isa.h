// Which instruction-set level the kernels run at.
#pragma once

namespace gemma {

// amx: avx512 with AMX. The emulated ones are for tests: emulator/avx512.h, emulator/amx.h.
enum class Isa { scalar, avx2, avx512, amx, avx512_emulated, amx_emulated };

const char* isa_name(Isa isa);
bool isa_supported(Isa isa);
// Read once, like the level.
bool has_avx_vnni();     // vpdpbusd on 256 bits, used inside the avx2 level
bool is_intel();         // by name, for what is a matter of speed alone
bool has_avx512_bf16();  // bf16 instructions at the chosen level, which is avx512 or better

// The best supported level, or the one that GEMMA_NATIVE_ISA names; read once. Throws InputError for an unknown or
// unsupported name.
Isa chosen_isa();

}  // namespace gemma
