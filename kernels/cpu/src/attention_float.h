// Attention's two products of queries with a span of keys and values in float32, for one instruction set; included
// by attention.h.

namespace tidemill {
namespace TIDEMILL_ISA {

// One span's keys as [H, kSpan] with a row stride, and its values as [kSpan, H]; in the page or in the scratch.
struct Span {
  const float* keys;
  int64_t key_stride;
  const float* values;
};

// Where a later span's rows lie, fetched into the second-level cache while a span is worked on, a row in each turn of a
// loop: all at once they would wait for each other, and the work for them.
struct Ahead {
  const char* rows = nullptr;
  int64_t stride = 0, num_bytes = 0;  // of a row

  TIDEMILL_INLINE void fetch(int64_t row) const {
    constexpr int64_t kLine = 64;
    for (int64_t at = 0; at < num_bytes; at += kLine) __builtin_prefetch(rows + row * stride + at, 0, 2);
  }
};

// Vectors of a row that a block of rows keeps in registers: 24 in all with 32 registers, 12 with 16.
constexpr int vectors_at_once(int rows) { return rows <= 3 || kLanes == 16 ? 4 : 2; }

// logits[r][t] = sum over h of q[r][h] * keys[h][t], for `Rows` queries and at least the keys [begin, end) of a span.
template <int Rows>
TIDEMILL_INLINE void span_logits(const float* q, int64_t begin, int64_t end, int64_t head_dim, const Span& span,
                                 float* logits, const Ahead& ahead) {
  constexpr int kVectors = vectors_at_once(Rows);
  constexpr int kWidth = kVectors * kLanes;
  static_assert(kSpan % kWidth == 0 || kWidth > kSpan, "whole blocks of keys");
  constexpr int kUsed = kWidth > kSpan ? static_cast<int>(kSpan) / kLanes : kVectors;
  constexpr int64_t kStep = kUsed * kLanes;
  for (int64_t token = begin / kStep * kStep; token < end; token += kStep) {
    vf acc[Rows][kUsed];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kUsed; ++c) acc[r][c] = vf{};
    const float* key = span.keys + token;
    const bool is_first = token < kStep;
    for (int64_t h = 0; h < head_dim; ++h, key += span.key_stride) {
      if (is_first) ahead.fetch(h);
      vf column[kUsed];
#pragma GCC unroll 4
      for (int c = 0; c < kUsed; ++c) column[c] = load(key + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const vf factor = splat(q[r * head_dim + h]);
#pragma GCC unroll 4
        for (int c = 0; c < kUsed; ++c) acc[r][c] = fma(factor, column[c], acc[r][c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kUsed; ++c) store(logits + r * kSpan + token + c * kLanes, acc[r][c]);
  }
}

// out[r][h] += sum over t in [begin, end) of weights[r][t] * values[t][h], one chain. With `scales` the sum is taken by
// itself, and multiplied by the row's.
template <int Rows>
TIDEMILL_INLINE void span_outputs(const float* weights, const float* scales, int64_t begin, int64_t end,
                                  int64_t head_dim, const float* values, float* out, const Ahead& ahead) {
  constexpr int kVectors = vectors_at_once(Rows);
  int64_t h = 0;
  for (; h + kVectors * kLanes <= head_dim; h += kVectors * kLanes) {
    vf acc[Rows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) acc[r][c] = scales == nullptr ? load(out + r * head_dim + h + c * kLanes) : vf{};
    const float* value = values + begin * head_dim + h;
    for (int64_t t = begin; t < end; ++t, value += head_dim) {
      if (h == 0) ahead.fetch(t);
      vf row[kVectors];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) row[c] = load(value + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const vf weight = splat(weights[r * kSpan + t]);
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) acc[r][c] = fma(weight, row[c], acc[r][c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) {
        float* at = out + r * head_dim + h + c * kLanes;
        store(at, scales == nullptr ? acc[r][c] : fma(acc[r][c], splat(scales[r]), load(at)));
      }
  }
  for (; h + kLanes <= head_dim; h += kLanes) {
    for (int r = 0; r < Rows; ++r) {
      float* at = out + r * head_dim + h;
      vf acc = scales == nullptr ? load(at) : vf{};
      for (int64_t t = begin; t < end; ++t)
        acc = fma(splat(weights[r * kSpan + t]), load(values + t * head_dim + h), acc);
      store(at, scales == nullptr ? acc : fma(acc, splat(scales[r]), load(at)));
    }
  }
  for (; h < head_dim; ++h) {
    for (int r = 0; r < Rows; ++r) {
      float* at = out + r * head_dim + h;
      float acc = scales == nullptr ? *at : 0.0f;
      for (int64_t t = begin; t < end; ++t) acc = std::fma(weights[r * kSpan + t], values[t * head_dim + h], acc);
      *at = scales == nullptr ? acc : std::fma(acc, scales[r], *at);
    }
  }
}

}  // namespace TIDEMILL_ISA
}  // namespace tidemill
