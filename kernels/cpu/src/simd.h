// Vectors of the width this translation unit is compiled for, on the compiler's own vector extensions, so that the
// same source serves AVX-512, AVX2, NEON and plain SSE. Included by each isa_*.cpp inside its target region.
//
// No sum here depends on how many rows are computed together: that is what keeps a row's bits its own.

#include <cstdint>
#include <cstring>

namespace tidemill {
namespace TIDEMILL_ISA {

constexpr int kLanes = TIDEMILL_LANES;

typedef float vf __attribute__((vector_size(4 * TIDEMILL_LANES), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * TIDEMILL_LANES), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(4 * TIDEMILL_LANES), aligned(4)));
typedef uint8_t vb __attribute__((vector_size(TIDEMILL_LANES), aligned(1)));  // a byte a lane
typedef uint16_t vh __attribute__((vector_size(2 * TIDEMILL_LANES), aligned(2)));  // a bfloat16 a lane

#define TIDEMILL_INLINE inline __attribute__((always_inline))

TIDEMILL_INLINE vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
TIDEMILL_INLINE void store(float* p, vf x) { *reinterpret_cast<vf*>(p) = x; }
TIDEMILL_INLINE vi load_int(const void* p) { return *static_cast<const vi*>(p); }
TIDEMILL_INLINE void store_int(void* p, vi x) { *static_cast<vi*>(p) = x; }
TIDEMILL_INLINE vf splat(float x) { return x - vf{}; }
TIDEMILL_INLINE vi splat_int(int32_t x) { return x - vi{}; }
// One rounding where the target has FMA: the compiler contracts this one expression (-ffp-contract=fast).
TIDEMILL_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
TIDEMILL_INLINE vf maximum(vf a, vf b) { return a > b ? a : b; }
TIDEMILL_INLINE vf as_float(vi x) { return reinterpret_cast<vf>(x); }
TIDEMILL_INLINE vi as_int(vf x) { return reinterpret_cast<vi>(x); }
TIDEMILL_INLINE vu as_bits(vf x) { return reinterpret_cast<vu>(x); }

// `kLanes` unsigned bytes, each as 32 bits.
TIDEMILL_INLINE vi load_bytes(const void* p) {
#if TIDEMILL_LANES == 16
  return reinterpret_cast<vi>(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
#elif TIDEMILL_LANES == 8
  return reinterpret_cast<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*static_cast<const vb*>(p), vi);
#endif
}

// The whole number nearest to each of x * factor, ties to even; below 2^22 in size.
TIDEMILL_INLINE vi nearest(vf x, vf factor) {
  const vf shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  return as_int(fma(x, factor, shifter)) - as_int(shifter);
}

#if defined(TIDEMILL_VNNI)
constexpr bool kHasByteDot = true;
// sum + the products of the four unsigned bytes of x and the four signed ones of w, in each lane.
TIDEMILL_INLINE vi byte_dot(vi sum, vi x, vi w) {
  return reinterpret_cast<vi>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(x),
                                                  reinterpret_cast<__m512i>(w)));
}
#else
constexpr bool kHasByteDot = false;
#endif

TIDEMILL_INLINE vi lane_numbers() {
  vi numbers = vi{};
  for (int i = 0; i < kLanes; ++i) numbers[i] = i;
  return numbers;
}

// Whether any lane of a comparison holds.
TIDEMILL_INLINE bool any(vi mask) {
#if TIDEMILL_LANES == 16
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif TIDEMILL_LANES == 8
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  int32_t folded = 0;
  for (int lane = 0; lane < kLanes; ++lane) folded |= mask[lane];
  return folded != 0;
#endif
}

TIDEMILL_INLINE float highest(vf x) {
#if TIDEMILL_LANES == 16
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(x));
#else
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

// By halves, in one order.
TIDEMILL_INLINE float sum(vf x) {
#if TIDEMILL_LANES == 16
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#else
  float part[kLanes];
  store(part, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
#endif
}

// Which lane of a vector and the next one after it is every other block's, from the first block on or from the second.
template <int kBlock, bool kSecond>
constexpr int every_other_lane(int lane) {
  const int of_second = lane / kBlock % 2 == 0 ? 0 : kLanes;
  return of_second + lane / (2 * kBlock) * 2 * kBlock + lane % kBlock + (kSecond ? kBlock : 0);
}

// Every other block of `kBlock` lanes, of a and of b in turn.
#if defined(__clang__)
template <int kBlock, bool kSecond, int... kLane>
TIDEMILL_INLINE vf every_other_of(vf a, vf b, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(a, b, every_other_lane<kBlock, kSecond>(kLane)...);
}
template <int kBlock, bool kSecond>
TIDEMILL_INLINE vf every_other(vf a, vf b) {
  return every_other_of<kBlock, kSecond>(a, b, std::make_integer_sequence<int, kLanes>());
}
#else
template <int kBlock, bool kSecond>
TIDEMILL_INLINE vf every_other(vf a, vf b) {
  vi lanes = vi{};
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = every_other_lane<kBlock, kSecond>(lane);
  return __builtin_shuffle(a, b, lanes);
}
#endif

// rows[r], reduced by `op` in halves, in lane r. The order is the same for all rows.
template <int kCount = kLanes, typename Op>
TIDEMILL_INLINE vf reduce_rows(vf* rows, const Op& op) {
  if constexpr (kCount > 1) {
    constexpr int kHalf = kCount / 2;
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i)
      rows[i] = op(every_other<kHalf, false>(rows[i], rows[i + kHalf]), every_other<kHalf, true>(rows[i], rows[i + kHalf]));
    return reduce_rows<kHalf>(rows, op);
  }
  return rows[0];
}

// exp(x) for x up to 88.3, to about one unit in the last place; 0 below -87.3, where the result would be subnormal.
// exp(0) is 1. Range reduction by ln 2 in two parts, then a polynomial (Cephes, Moshier 1989).
TIDEMILL_INLINE vf bounded_exponential(vf x) {
  const vf shifter = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const vf shifted = fma(x, splat(1.44269504f), shifter);
  const vf n = shifted - shifter;
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  // Unsigned: where x is below the bound this wraps, and is not used.
  const vu exponent = (as_bits(shifted) - as_bits(shifter)) << 23;
  return x < splat(-87.3f) ? vf{} : reinterpret_cast<vf>(as_bits(p) + exponent);
}

TIDEMILL_INLINE vf exponential(vf x) { return bounded_exponential(x > splat(88.3f) ? splat(88.3f) : x); }

TIDEMILL_INLINE vf hyperbolic_tangent(vf x) {
  const vf magnitude = as_float(as_int(x) & splat_int(0x7fffffff));
  const vf decayed = exponential(splat(-2.0f) * magnitude);
  const vf result = (splat(1.0f) - decayed) / (splat(1.0f) + decayed);
  return as_float(as_int(result) | (as_int(x) & splat_int(static_cast<int32_t>(0x80000000u))));
}

TIDEMILL_INLINE float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds to nearest, ties to even; NaN stays NaN.
TIDEMILL_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// As many as there are lanes.
TIDEMILL_INLINE vf load_bf16(const uint16_t* p) {
  return reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const vh*>(p), vu) << 16);
}

// Each to the nearest, as `to_bf16`.
TIDEMILL_INLINE void store_bf16(uint16_t* p, vf x) {
  const vu bits = as_bits(x);
  const vu rounded = bits + ((bits >> 16) & 1u) + 0x7fffu;
  const vu nearest_bits = x == x ? rounded : bits | 0x400000u;
  *reinterpret_cast<vh*>(p) = __builtin_convertvector(nearest_bits >> 16, vh);
}

#if defined(TIDEMILL_BF16)
constexpr bool kHasPairDot = true;
// sum + the products of the two bfloat16 numbers of x and w, in each lane.
TIDEMILL_INLINE vf pair_dot(vf sum, vi x, vi w) {
  return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(x),
                                               reinterpret_cast<__m512bh>(w)));
}
#else
constexpr bool kHasPairDot = false;
TIDEMILL_INLINE vf pair_dot(vf sum, vi, vi) { return sum; }
#endif

}  // namespace TIDEMILL_ISA
}  // namespace tidemill
