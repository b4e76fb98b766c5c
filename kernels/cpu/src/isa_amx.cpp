// Products of bfloat16 and of 8-bit rows by tiles; all else is AVX-512's.
#include "kernels.h"

#if defined(TIDEMILL_KNOWS_AMX)
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

#define TIDEMILL_ISA amx
#define TIDEMILL_LANES 16
#define TIDEMILL_VNNI 1
#define TIDEMILL_BF16 1
#define TIDEMILL_TILES 1
#define TIDEMILL_AMX 1
#include "simd.h"
#include "linear.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace tidemill {
namespace avx512bf16 {
void attention(const Attention&, Pool&);
void sampling(const Sampling&, Pool&);
}  // namespace avx512bf16

extern const Kernels kAmx;
const Kernels kAmx = {"amx", avx512bf16::attention, amx::linear, avx512bf16::sampling};
}  // namespace tidemill
#endif
