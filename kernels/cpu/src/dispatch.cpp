// Chooses the instruction set once a process.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

#if defined(TIDEMILL_KNOWS_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tidemill {

extern const Kernels kBaseline, kAmxEmulated;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Vnni;
#endif
#if defined(TIDEMILL_KNOWS_BF16)
extern const Kernels kAvx512Bf16;
#endif
#if defined(TIDEMILL_KNOWS_AMX)
extern const Kernels kAmx;
#endif

namespace {

#if defined(TIDEMILL_KNOWS_AMX)
// Whether the CPU has tiles for bfloat16 and bytes, and the system lets this process use them: it keeps room for their
// contents, 8 KiB a thread, only where a process has asked (Linux, Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  if ((edx & kAll) != kAll) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool is_supported(const Kernels& candidate) {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (&candidate == &kAvx2) return has_avx2;
  if (&candidate == &kAvx512) return has_avx512;
  const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
  if (&candidate == &kAvx512Vnni) return has_vnni;
#endif
#if defined(TIDEMILL_KNOWS_BF16)
  const bool has_bf16 = has_vnni && __builtin_cpu_supports("avx512bf16");
  if (&candidate == &kAvx512Bf16) return has_bf16;
#endif
#if defined(TIDEMILL_KNOWS_AMX)
  if (&candidate == &kAmx) return has_bf16 && may_use_tiles();
#endif
  return &candidate == &kBaseline || &candidate == &kAmxEmulated;
}

const Kernels* const kBestFirst[] = {
#if defined(TIDEMILL_KNOWS_AMX)
    &kAmx,
#endif
#if defined(TIDEMILL_KNOWS_BF16)
    &kAvx512Bf16,
#endif
#if defined(__x86_64__)
    &kAvx512Vnni, &kAvx512, &kAvx2,
#endif
    &kBaseline, &kAmxEmulated};  // after one that every CPU has: only by its name

const Kernels& choose() {
  const char* asked = std::getenv("TIDEMILL_CPU_ISA");
  for (const Kernels* candidate : kBestFirst)
    if ((asked == nullptr || std::strcmp(asked, candidate->name) == 0) && is_supported(*candidate)) return *candidate;
  return kBaseline;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace tidemill

// For Python: the name of the instruction set in use.
extern "C" __attribute__((visibility("default"))) const char* tidemill_isa() { return tidemill::kernels().name; }
