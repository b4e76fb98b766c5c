// Attention over int8 pages, for one instruction set; included by attention.h.
//
// Its products are of whole numbers. A query is quantised over its head, as keys and values are over theirs. The weights
// of a span are multiplied by the scales of its values and quantised to unsigned bytes, with a scale for the span; the
// sum of weights that divides in the end is of the weights themselves. A product's sums stay below 2^24 and are exact in
// float32 too, so CPUs with vectors of one width give the same bits, whether they have an instruction for bytes or not.
//
// That instruction takes four bytes of each side. So keys are put together as quads of four dimensions, with 128 added
// because one side is unsigned, and values as quads of four tokens.

namespace tidemill {
namespace TIDEMILL_ISA {

// One span's keys as [H, kSpan] and values as [kSpan, H], with strides; in the page or in the scratch.
struct ByteSpan {
  const int8_t* keys;
  int64_t key_stride;
  const int8_t* values;
  int64_t value_stride;       // whole vectors of bytes can be read from a row
  const float* key_scales;    // [kSpan]
  const float* value_scales;  // [kSpan]
};

// x [size] as whole numbers from -127 to 127 at `target`; returns the scale.
TIDEMILL_INLINE float quantise_symmetric(const float* x, int64_t size, int8_t* target) {
  vf most = vf{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) most = maximum(as_float(as_int(load(x + i)) & splat_int(0x7fffffff)), most);
  float largest = highest(most);
  for (; i < size; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const auto narrow = __builtin_convertvector(nearest(load(x + i), splat(inverse)), vb);
    std::memcpy(target + i, &narrow, kLanes);
  }
  for (; i < size; ++i) target[i] = static_cast<int8_t>(nearest(splat(x[i]), splat(inverse))[0]);
  return largest / 127.0f;
}

constexpr int64_t quads_of(int64_t size) { return (size + 3) / 4; }
constexpr int64_t whole_vectors(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

// The bytes of four rows side by side, `kLanes` quads.
TIDEMILL_INLINE vi quads_of_rows(const int8_t* const* rows, int64_t at) {
  vi quads = load_bytes(rows[0] + at);
#pragma GCC unroll 3
  for (int i = 1; i < 4; ++i) quads |= load_bytes(rows[i] + at) << (8 * i);
  return quads;
}

// keys -> [quads of H, kSpan], each byte with 128 added. Rows past the last repeat it: queries are zero there.
TIDEMILL_INLINE void key_quads(const ByteSpan& span, int64_t head_dim, int32_t* quads, const Ahead& ahead) {
  for (int64_t quad = 0; quad < quads_of(head_dim); ++quad, quads += kSpan) {
    const int8_t* rows[4];
    for (int64_t i = 0; i < 4; ++i) {
      rows[i] = span.keys + std::min(4 * quad + i, head_dim - 1) * span.key_stride;
      ahead.fetch(std::min(4 * quad + i, head_dim - 1));
    }
    for (int64_t t = 0; t < kSpan; t += kLanes)
      store_int(quads + t, quads_of_rows(rows, t) ^ splat_int(static_cast<int32_t>(0x80808080u)));
  }
}

// values -> [quads of kSpan, H in whole vectors].
TIDEMILL_INLINE void value_quads(const ByteSpan& span, int64_t head_dim, int32_t* quads, const Ahead& ahead) {
  const int64_t width = whole_vectors(head_dim);
  for (int64_t t = 0; t < kSpan; t += 4, quads += width) {
    const int8_t* rows[4];
    for (int64_t i = 0; i < 4; ++i) {
      rows[i] = span.values + (t + i) * span.value_stride;
      ahead.fetch(t + i);
    }
    for (int64_t h = 0; h < width; h += kLanes) store_int(quads + h, quads_of_rows(rows, h));
  }
}

#if defined(TIDEMILL_VNNI)

// logits[r][t] = q[r] . keys[t], in whole numbers, for `Rows` queries of `num_quads` quads and all keys of a span.
template <int Rows>
TIDEMILL_INLINE void byte_logits(const int32_t* q, const int32_t* starts, int64_t num_quads, const int32_t* keys,
                                 float* logits) {
  constexpr int kUsed = kSpan / kLanes;
  vi acc[Rows][kUsed];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kUsed; ++c) acc[r][c] = splat_int(starts[r]);
  for (int64_t quad = 0; quad < num_quads; ++quad, keys += kSpan) {
    vi column[kUsed];
#pragma GCC unroll 4
    for (int c = 0; c < kUsed; ++c) column[c] = load_int(keys + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const vi factor = splat_int(q[r * num_quads + quad]);
#pragma GCC unroll 4
      for (int c = 0; c < kUsed; ++c) acc[r][c] = byte_dot(acc[r][c], column[c], factor);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < kUsed; ++c)
      store(logits + r * kSpan + c * kLanes, __builtin_convertvector(acc[r][c], vf));
}

// out[r][h] += scales[r] * (weights[r] . values[h]), for `Rows` queries and `Vectors` vectors of dimensions.
template <int Rows, int Vectors>
TIDEMILL_INLINE void byte_outputs_of(const int32_t* weights, const float* scales, const int32_t* values, int64_t width,
                                     float* out, int64_t out_stride) {
  vi acc[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < Vectors; ++c) acc[r][c] = vi{};
  for (int64_t quad = 0; quad < kSpan / 4; ++quad, values += width) {
    vi column[Vectors];
#pragma GCC unroll 4
    for (int c = 0; c < Vectors; ++c) column[c] = load_int(values + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const vi weight = splat_int(weights[r * (kSpan / 4) + quad]);
#pragma GCC unroll 4
      for (int c = 0; c < Vectors; ++c) acc[r][c] = byte_dot(acc[r][c], weight, column[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < Vectors; ++c) {
      float* at = out + r * out_stride + c * kLanes;
      store(at, fma(__builtin_convertvector(acc[r][c], vf), splat(scales[r]), load(at)));
    }
}

// All dimensions: `weights` [Rows, kSpan / 4], four bytes each; `out` [Rows, H].
template <int Rows>
TIDEMILL_INLINE void byte_outputs(const int32_t* weights, const float* scales, int64_t head_dim, const int32_t* values,
                                  float* out) {
  const int64_t width = whole_vectors(head_dim);
  int64_t h = 0;
  for (; h + 4 * kLanes <= head_dim; h += 4 * kLanes)
    byte_outputs_of<Rows, 4>(weights, scales, values + h, width, out + h, head_dim);
  for (; h + kLanes <= head_dim; h += kLanes)
    byte_outputs_of<Rows, 1>(weights, scales, values + h, width, out + h, head_dim);
  if (h < head_dim) {
    float rest[Rows * kLanes] = {};
    for (int r = 0; r < Rows; ++r) std::memcpy(rest + r * kLanes, out + r * head_dim + h, (head_dim - h) * sizeof(float));
    byte_outputs_of<Rows, 1>(weights, scales, values + h, width, rest, kLanes);
    for (int r = 0; r < Rows; ++r) std::memcpy(out + r * head_dim + h, rest + r * kLanes, (head_dim - h) * sizeof(float));
  }
}

#endif

}  // namespace TIDEMILL_ISA
}  // namespace tidemill
