// What every CPU of this architecture runs: SSE2 on x86-64, NEON on ARM.
#include "kernels.h"
#include "pool.h"

#define TIDEMILL_ISA baseline
#define TIDEMILL_LANES 4
#include "simd.h"
#include "attention.h"
#include "linear.h"
#include "sampling.h"

namespace tidemill {
extern const Kernels kBaseline;
const Kernels kBaseline = {"baseline", baseline::attention, baseline::linear, baseline::sampling};
}  // namespace tidemill
