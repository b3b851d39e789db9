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
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace gemma {

namespace {

struct Cpu {
  bool avx2 = false, avx_vnni = false, avx512 = false, avx512_bf16 = false, amx = false, intel = false;
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

// Linux keeps the state of tiles for processes that have asked for it.
bool may_use_tiles() {
#if defined(__linux__) && defined(GEMMA_NATIVE_AMX)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

Cpu detect() {
  Cpu cpu;
  uint32_t zero[4], one[4], seven[4], seven1[4];
  cpuid(0, 0, zero);
  cpu.intel = zero[1] == 0x756e6547 && zero[3] == 0x49656e69 && zero[2] == 0x6c65746e;  // "GenuineIntel"
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
  const bool tiles = bit(seven[3], 24) && bit(seven[3], 25) && bit(seven[3], 22);  // TILE, INT8, BF16
  cpu.amx = cpu.avx512_bf16 && tiles && (state & 0x60000) == 0x60000 && may_use_tiles();
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
    for (Isa isa : {Isa::amx, Isa::avx512, Isa::avx2, Isa::scalar})
      if (isa_supported(isa)) return isa;
#if defined(GEMMA_NATIVE_EMULATOR)
  for (Isa isa : {Isa::avx512_emulated, Isa::amx_emulated})
    if (isa_name(isa) == std::string(asked) && isa_supported(Isa::avx2)) return isa;
#endif
  std::string supported;
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (!isa_supported(isa)) continue;
    if (isa_name(isa) == std::string(asked)) return isa;
    supported += std::string(supported.empty() ? "" : ", ") + isa_name(isa);
  }
  const std::string name(asked);
  fail("GEMMA_NATIVE_ISA=", name,
       name == "avx2" || name == "avx512" || name == "amx" ? " is not supported here" : " is not a level",
       "; it can be ", supported);
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "amx", "avx512-emulated", "amx-emulated"};
  return kNames[static_cast<int>(isa)];
}

bool isa_supported(Isa isa) {
  return isa == Isa::scalar || (isa == Isa::amx ? cpu().amx : isa == Isa::avx512 ? cpu().avx512 : cpu().avx2);
}

bool is_intel() { return cpu().intel; }

bool has_avx_vnni() {
  static const bool has = cpu().avx_vnni && allowed("GEMMA_NATIVE_AVX_VNNI");
  return has;
}

bool has_avx512_bf16() {
  const Isa isa = chosen_isa();
  if (isa == Isa::amx || isa == Isa::amx_emulated) return true;
  static const bool has =
      (isa == Isa::avx512_emulated || (isa == Isa::avx512 && cpu().avx512_bf16)) && allowed("GEMMA_NATIVE_AVX512_BF16");
  return has;
}

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace gemma
