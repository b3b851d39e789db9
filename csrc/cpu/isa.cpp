#include "isa.h"

#include <cstdint>
#include <cstdlib>
#include <string>

#include "../tensor.h"
#if defined(GEMMA_NATIVE_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

namespace gemma {

namespace {

struct Cpu {
  bool avx2 = false, avx_vnni = false, avx512 = false, avx512_bf16 = false;
};

#if defined(GEMMA_NATIVE_X86)
void cpuid(uint32_t leaf, uint32_t sub, uint32_t r[4]) {
#if defined(_MSC_VER)
  int x[4];
  __cpuidex(x, static_cast<int>(leaf), static_cast<int>(sub));
  for (int i = 0; i < 4; ++i) r[i] = static_cast<uint32_t>(x[i]);
#else
  r[0] = r[1] = r[2] = r[3] = 0;
  __get_cpuid_count(leaf, sub, &r[0], &r[1], &r[2], &r[3]);
#endif
}

uint64_t xcr0() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t a, d;
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return static_cast<uint64_t>(d) << 32 | a;
#endif
}

Cpu detect() {
  Cpu cpu;
  uint32_t one[4], seven[4], seven1[4];
  cpuid(1, 0, one);
  auto bit = [](uint32_t word, int b) { return (word >> b & 1) != 0; };
  if (!bit(one[2], 27)) return cpu;  // OSXSAVE
  const uint64_t state = xcr0();
  if ((state & 6) != 6) return cpu;  // the system saves ymm
  cpuid(7, 0, seven);
  cpuid(7, 1, seven1);
  cpu.avx2 = bit(one[2], 12) && bit(one[2], 29) && bit(seven[1], 5);  // FMA, F16C, AVX2
  cpu.avx_vnni = cpu.avx2 && bit(seven1[0], 4);
  const bool f_dq_bw_vl = bit(seven[1], 16) && bit(seven[1], 17) && bit(seven[1], 30) && bit(seven[1], 31);
  cpu.avx512 = cpu.avx2 && (state & 0xe6) == 0xe6 && f_dq_bw_vl && bit(seven[2], 11);  // VNNI
  cpu.avx512_bf16 = cpu.avx512 && bit(seven1[0], 5);
  return cpu;
}
#else
Cpu detect() { return {}; }
#endif

const Cpu& cpu() {
  static const Cpu c = detect();
  return c;
}

// For tests: a variable that is "0" makes a level what it is on CPUs without an instruction.
bool allowed(const char* variable) {
  const char* value = std::getenv(variable);
  return !value || value != std::string("0");
}

Isa choose() {
  const char* asked = std::getenv("GEMMA_NATIVE_ISA");
  if (!asked || !*asked)
    return isa_supported(Isa::avx512) ? Isa::avx512 : isa_supported(Isa::avx2) ? Isa::avx2 : Isa::scalar;
#if defined(GEMMA_NATIVE_EMULATOR)
  if (isa_name(Isa::avx512_emulated) == std::string(asked) && isa_supported(Isa::avx2)) return Isa::avx512_emulated;
#endif
  std::string supported;
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512}) {
    if (!isa_supported(isa)) continue;
    if (isa_name(isa) == std::string(asked)) return isa;
    supported += std::string(supported.empty() ? "" : ", ") + isa_name(isa);
  }
  const std::string name(asked);
  fail("GEMMA_NATIVE_ISA=", name,
       name == "avx2" || name == "avx512" ? " is not supported by this CPU" : " is not a level", "; here it can be ",
       supported);
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512-emulated"};
  return kNames[static_cast<int>(isa)];
}

bool isa_supported(Isa isa) { return isa == Isa::scalar || (isa == Isa::avx512 ? cpu().avx512 : cpu().avx2); }

bool has_avx_vnni() {
  static const bool has = cpu().avx_vnni && allowed("GEMMA_NATIVE_AVX_VNNI");
  return has;
}

bool has_avx512_bf16() {
  const Isa isa = chosen_isa();
  static const bool has =
      (isa == Isa::avx512_emulated || (isa == Isa::avx512 && cpu().avx512_bf16)) && allowed("GEMMA_NATIVE_AVX512_BF16");
  return has;
}

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace gemma
