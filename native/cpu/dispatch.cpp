#include "dispatch.h"

#include <stdexcept>

#define DECLARE(isa) namespace isa { extern const KernelTable TABLE; }
DECLARE(scalar)
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
DECLARE(amx)
DECLARE(avx2)
DECLARE(avxvnni)
DECLARE(avx512)
DECLARE(avx512vnni)
DECLARE(avx512bf16)
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
DECLARE(neon)
DECLARE(neoni8mm)
#endif

#if defined(__x86_64__) && !defined(EMULATE_TILES)
// Whether the processor has tile registers for bfloat16 and int8, and the system lets this process use them: Linux reserves the memory to save
// them (8 KiB a thread) only for processes that ask (https://docs.kernel.org/arch/x86/xstate.html).
static bool tiles_permitted() {
  static const bool permitted = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;  // AMX-BF16, -TILE, -INT8
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;  // OSXSAVE
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3) != 3) return false;
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  }();
  return permitted;
}
#endif

std::vector<const KernelTable*> available_kernels() {
  std::vector<const KernelTable*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool vnni = wide && __builtin_cpu_supports("avx512vnni");
#ifdef EMULATE_TILES
  found.push_back(&amx::TABLE);
#else
  if (vnni && __builtin_cpu_supports("avx512bf16") && tiles_permitted()) found.push_back(&amx::TABLE);
#endif
  if (vnni && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512bf16::TABLE);
  if (vnni) found.push_back(&avx512vnni::TABLE);
  if (wide) found.push_back(&avx512::TABLE);
  unsigned a = 0, b, c, d;
  __cpuid_count(7, 1, a, b, c, d);
  if (fma && (a >> 4 & 1)) found.push_back(&avxvnni::TABLE);  // GCC 12's __builtin_cpu_supports does not know it
  if (fma) found.push_back(&avx2::TABLE);
#elif defined(__aarch64__)
  const bool dot = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) && (getauxval(AT_HWCAP) & HWCAP_FPHP);
  if (dot && (getauxval(AT_HWCAP2) & HWCAP2_I8MM)) found.push_back(&neoni8mm::TABLE);
  if (dot) found.push_back(&neon::TABLE);
#endif
  found.push_back(&scalar::TABLE);
  std::erase_if(found, [](const KernelTable* table) { return !table->isa; });  // omitted from this build
  return found;
}

const KernelTable& choose_kernels(const std::string& isa) {
  std::string names;
  for (const KernelTable* table : available_kernels()) {
    if (isa.empty() || isa == table->isa) return *table;
    names += (names.empty() ? "" : ", ") + std::string(table->isa);
  }
  throw std::runtime_error("MIXTAPE_ISA: this processor has no '" + isa + "'; it has " + names);
}
