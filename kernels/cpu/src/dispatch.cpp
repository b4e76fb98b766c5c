// Chooses the instruction set once a process.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace tidemill {

extern const Kernels kBaseline;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Vnni;
#endif
#if defined(TIDEMILL_KNOWS_BF16)
extern const Kernels kAvx512Bf16;
#endif

namespace {

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
  if (&candidate == &kAvx512Bf16) return has_vnni && __builtin_cpu_supports("avx512bf16");
#endif
  return &candidate == &kBaseline;
}

const Kernels* const kBestFirst[] = {
#if defined(TIDEMILL_KNOWS_BF16)
    &kAvx512Bf16,
#endif
#if defined(__x86_64__)
    &kAvx512Vnni, &kAvx512, &kAvx2,
#endif
    &kBaseline};

const Kernels& choose() {
  const char* asked = std::getenv("TIDEMILL_CPU_ISA");
  for (const Kernels* candidate : kBestFirst)
    if (is_supported(*candidate) && (asked == nullptr || std::strcmp(asked, candidate->name) == 0)) return *candidate;
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
