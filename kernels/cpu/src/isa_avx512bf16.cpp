#include "kernels.h"

#if defined(TIDEMILL_KNOWS_BF16)
#include <immintrin.h>

#include "pool.h"
// After these headers, so that none of their functions is compiled for a CPU that this machine may not be.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define TIDEMILL_ISA avx512bf16
#define TIDEMILL_LANES 16
#define TIDEMILL_VNNI 1
#define TIDEMILL_BF16 1
#include "simd.h"
#include "attention.h"
#include "linear.h"
#include "sampling.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace tidemill {
extern const Kernels kAvx512Bf16;
const Kernels kAvx512Bf16 = {"avx512bf16", avx512bf16::attention, avx512bf16::linear, avx512bf16::sampling};
}  // namespace tidemill
#endif
