// Products by tiles on any CPU, with the tiles in memory: slow, and there for the tests of what runs on AMX. Never chosen,
// only asked for by name.
#include "kernels.h"
#include "pool.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#define TIDEMILL_ISA amx_emulated
#define TIDEMILL_LANES 4
#define TIDEMILL_TILES 1
#include "simd.h"
#include "linear.h"

namespace tidemill {
namespace baseline {
void attention(const Attention&, Pool&);
void sampling(const Sampling&, Pool&);
}  // namespace baseline

extern const Kernels kAmxEmulated;
const Kernels kAmxEmulated = {"amx-emulated", baseline::attention, amx_emulated::linear, baseline::sampling};
}  // namespace tidemill
