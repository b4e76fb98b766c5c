// The matrix product of the model, y = x @ w.T, for one instruction set: see kernels/linear/api.py for what it computes.
//
// Weights lie in panels of 16 outputs, [in, 16] each, read in order, once for a block of rows. A block's rows stay in
// the second-level cache while all panels go by; a slice of a panel (some of its inputs) stays in the first while all
// the block's tiles of rows go by. A tile's results are in registers within a slice, and in a small array of the thread
// between slices. What follows a product (bias, residual, gate) is done on that array, so its cost is small.

#include "tiles.h"
#include "linear_float.h"
#include "linear_int8.h"
#include "linear_tiles.h"

namespace tidemill {
namespace TIDEMILL_ISA {

constexpr int64_t kMinBlockBytes = 320 * 1024;  // of a block's rows, in the second-level cache
constexpr int64_t kSerialElements = 16384;   // fewer than these are prepared sooner than a thread is woken

TIDEMILL_INLINE float read_activation(const Linear& args, const void* data, int64_t index) {
  return args.type == Linear::Type::kFloat32 ? static_cast<const float*>(data)[index]
                                             : from_bf16(static_cast<const uint16_t*>(data)[index]);
}

// Values [k, k + count) of row `row` of x, at `target`.
TIDEMILL_INLINE void read_values(const Linear& args, int64_t row, int64_t k, int64_t count, float* target) {
  const int64_t at = row * args.in_dim + k;
  if (args.type == Linear::Type::kFloat32)
    std::memcpy(target, static_cast<const float*>(args.x) + at, count * sizeof(float));
  else
    for (int64_t i = 0; i < count; ++i) target[i] = from_bf16(static_cast<const uint16_t*>(args.x)[at + i]);
}

// 1 / sqrt(mean of squares + eps) of a row, added in 16 parts whatever the vectors' width.
TIDEMILL_INLINE float inverse_root_mean_square(const Linear& args, int64_t row) {
  vf parts[kVectors] = {};
  for (int64_t k = 0; k < args.in_dim; k += kPanel) {
    alignas(64) float values[kPanel] = {};
    read_values(args, row, k, std::min<int64_t>(kPanel, args.in_dim - k), values);
    for (int c = 0; c < kVectors; ++c) {
      const vf value = load(values + c * kLanes);
      parts[c] = fma(value, value, parts[c]);
    }
  }
  float part[kPanel];
  for (int c = 0; c < kVectors; ++c) store(part + c * kLanes, parts[c]);
  for (int half = kPanel / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return 1.0f / std::sqrt(part[0] / static_cast<float>(args.in_dim) + args.norm_eps);
}

// What rows of x are made into before they are multiplied.
enum class Prepared { kFloats, kPairs, kQuantised };

// Rows that are worked on together: a block has a whole number of them.
TIDEMILL_INLINE int64_t tile_rows(Prepared kind) {
  return kHasTiles && kind != Prepared::kFloats ? kTiledRows : kTileRows;
}

using QuantisedRows = std::conditional_t<kHasTiles, TiledIntRows, IntRows>;

// Makes row `row` of x ready, normalised if asked.
TIDEMILL_INLINE void prepare_row(const Linear& args, Prepared kind, const QuantisedRows& quantised, int64_t row) {
  const bool is_rounded = args.type == Linear::Type::kBfloat16 && args.format == Linear::Format::kBfloat16;
  const float inverse = args.norm_weight != nullptr ? inverse_root_mean_square(args, row) : 1.0f;
  for (int64_t k = 0; k < args.in_dim; k += kGroup) {
    alignas(64) float own[kGroup] = {};
    float* values = kind == Prepared::kFloats ? static_cast<float*>(args.scratch) + row * args.in_dim + k : own;
    const int64_t count = std::min(kGroup, args.in_dim - k);
    read_values(args, row, k, count, values);
    if (args.norm_weight != nullptr)
      for (int64_t i = 0; i < count; ++i) values[i] = values[i] * inverse * args.norm_weight[k + i];
    if (kind == Prepared::kQuantised) {
      quantised.quantise(row, k / kGroup, values);
    } else if (kind == Prepared::kPairs) {
      const int64_t dim = paired_dim(args.in_dim), stop = std::min(kGroup, dim - k);
      uint16_t* target = static_cast<uint16_t*>(args.scratch) + row * dim + k;
      for (int64_t i = 0; i < stop; i += kLanes) store_bf16(target + i, load(values + i));
    } else if (is_rounded && args.norm_weight != nullptr) {
      for (int64_t i = 0; i < count; ++i) values[i] = from_bf16(to_bf16(values[i]));
    }
  }
}

TIDEMILL_INLINE vf read_lanes(Linear::Type type, const void* data, int64_t index) {
  return type == Linear::Type::kFloat32 ? load(static_cast<const float*>(data) + index)
                                        : load_bf16(static_cast<const uint16_t*>(data) + index);
}

TIDEMILL_INLINE void write_lanes(Linear::Type type, void* data, int64_t index, vf value) {
  if (type == Linear::Type::kFloat32)
    store(static_cast<float*>(data) + index, value);
  else
    store_bf16(static_cast<uint16_t*>(data) + index, value);
}

TIDEMILL_INLINE vf activated(Linear::Activation activation, vf x) {
  const vf one = splat(1.0f);
  if (activation == Linear::Activation::kSilu) return x / (one + exponential(-x));
  // GELU by tanh: sqrt(2 / pi) (x + 0.044715 x^3).
  const vf inner = splat(0.7978845608f) * fma(splat(0.044715f) * x, x * x, x);
  return splat(0.5f) * x * (one + hyperbolic_tangent(inner));
}

// What follows the product, for one row and up to 16 outputs from `column` on.
TIDEMILL_INLINE void finish_outputs(const Linear& args, int64_t row, int64_t column, const float* result,
                                    const float* up) {
  const int64_t width = std::min<int64_t>(kPanel, args.out_dim - column);
  if (width <= 0) return;
  const int64_t at = row * args.out_dim + column;
  if (width == kPanel) {  // nearly always: no copies
    for (int i = 0; i < kPanel; i += kLanes) {
      vf y = load(result + i);
      if (args.bias != nullptr) y = y + load(args.bias + column + i);
      if (up != nullptr) {
        vf other = load(up + i);
        if (args.bias != nullptr) other = other + load(args.bias + args.out_dim + column + i);
        y = activated(args.activation, y) * other;
      }
      if (args.residual != nullptr) y = y + read_lanes(args.type, args.residual, at + i);
      write_lanes(args.out_type, args.out, at + i, y);
    }
    return;
  }
  float bias[kPanel] = {}, up_bias[kPanel] = {}, residual[kPanel] = {}, value[kPanel];
  if (args.bias != nullptr) {
    std::memcpy(bias, args.bias + column, width * sizeof(float));
    if (up != nullptr) std::memcpy(up_bias, args.bias + args.out_dim + column, width * sizeof(float));
  }
  if (args.residual != nullptr)
    for (int64_t i = 0; i < width; ++i) residual[i] = read_activation(args, args.residual, at + i);
  for (int i = 0; i < kPanel; i += kLanes) {
    vf y = load(result + i) + load(bias + i);
    if (up != nullptr) y = activated(args.activation, y) * (load(up + i) + load(up_bias + i));
    store(value + i, y + load(residual + i));
  }
  if (args.out_type == Linear::Type::kFloat32)
    std::memcpy(static_cast<float*>(args.out) + at, value, width * sizeof(float));
  else
    for (int64_t i = 0; i < width; ++i) static_cast<uint16_t*>(args.out)[at + i] = to_bf16(value[i]);
}

// What follows the product, for a block of rows and one pair of panels.
TIDEMILL_INLINE void finish_pair(const Linear& args, int64_t first_row, int64_t num_rows, int64_t pair,
                                 const float (*results)[kMaxBlockRows * kPanel]) {
  for (int64_t r = 0; r < num_rows; ++r) {
    const float *left = results[0] + r * kPanel, *right = results[1] + r * kPanel;
    if (args.activation != Linear::Activation::kNone) {
      finish_outputs(args, first_row + r, pair * kPanel, left, right);
    } else {
      finish_outputs(args, first_row + r, pair * 2 * kPanel, left, nullptr);
      finish_outputs(args, first_row + r, (pair * 2 + 1) * kPanel, right, nullptr);
    }
  }
}

// Of one pair of panels and a block of rows: the results before what follows, and what is made of a slice.
struct PairMemory {
  alignas(64) float results[2][kMaxBlockRows * kPanel];
  union {
    FloatMemory floats;
    std::conditional_t<kHasTiles, TiledIntMemory, IntMemory> ints;
  };
};

// How the work is cut: items are (block of rows, pair of panels); a thread takes runs of items, long ones first, short
// ones last, so that all end together. Where all rows fit in the second-level cache, blocks are innermost and
// the panels are read from memory once; elsewhere panels are.
struct LinearWork {
  int64_t block_rows, num_blocks, num_pairs;
  bool are_blocks_inner;
  std::vector<int64_t> runs;  // bounds of the runs, over all items

  LinearWork(const Linear& args, Prepared kind, int64_t num_threads) {
    const int64_t int_bytes = kHasTiles ? 1 : kIntRowBytes;
    const int64_t value_bytes = kind == Prepared::kQuantised ? int_bytes : kind == Prepared::kPairs ? 2 : 4;
    const int64_t row_bytes = args.in_dim * value_bytes;
    const int64_t block_bytes = std::max(kMinBlockBytes, second_level_cache_bytes() / 16 * 7);
    const int64_t together = tile_rows(kind), most = kMaxBlockRows / together * together;
    const int64_t fitting = std::min(most, block_bytes / row_bytes / together * together);
    const int64_t max_rows = std::max<int64_t>(fitting, std::min(most, 4 * together));
    const int64_t count = (args.num_rows + max_rows - 1) / max_rows;
    const int64_t even = (args.num_rows + count - 1) / count;
    block_rows = (even + together - 1) / together * together;
    num_blocks = (args.num_rows + block_rows - 1) / block_rows;
    num_pairs = args.num_panels / 2;
    are_blocks_inner = args.num_rows * row_bytes <= block_bytes;
    const int64_t num_items = num_blocks * num_pairs;
    runs.push_back(0);
    while (runs.back() < num_items) {
      const int64_t left = num_items - runs.back();
      runs.push_back(runs.back() + (num_threads > 1 ? std::max<int64_t>(1, left / (2 * num_threads)) : left));
    }
  }

  int64_t pair(int64_t item) const { return are_blocks_inner ? item / num_blocks : item % num_pairs; }
  int64_t first_row(int64_t item) const {
    return (are_blocks_inner ? item % num_blocks : item / num_pairs) * block_rows;
  }
};

void linear(const Linear& args, Pool& pool) {
  const int64_t size = args.out_type == Linear::Type::kFloat32 ? 4 : 2;
  std::memset(static_cast<char*>(args.out) + args.num_rows * args.out_dim * size, 0,
              (args.max_rows - args.num_rows) * args.out_dim * size);
  if (args.num_rows == 0) return;
  const bool is_narrow = args.type == Linear::Type::kBfloat16;
  Prepared kind = Prepared::kFloats;
  if (args.format == Linear::Format::kInt8 || args.format == Linear::Format::kInt4)
    kind = Prepared::kQuantised;
  else if ((kHasPairDot || kHasTiles) && is_narrow && args.format == Linear::Format::kBfloat16)
    kind = Prepared::kPairs;
  const QuantisedRows quantised(args);
  const float* x = static_cast<const float*>(args.x);
  const int64_t row_stride = kind == Prepared::kPairs ? paired_dim(args.in_dim) / 2 : args.in_dim;  // in 32 bits
  const bool is_float_as_it_lies = kind == Prepared::kFloats && !is_narrow;
  const bool is_paired_as_it_lies = kind == Prepared::kPairs && args.in_dim == paired_dim(args.in_dim);
  if (args.norm_weight != nullptr || !(is_float_as_it_lies || is_paired_as_it_lies)) {
    const bool is_small = args.num_rows * args.in_dim <= kSerialElements;
    // Whole tiles: quantised rows of one lie side by side, and two threads would write to the same cache lines.
    const int64_t at_once = is_small ? args.num_rows : tile_rows(kind);
    parallel_for(pool, (args.num_rows + at_once - 1) / at_once, [&](int64_t item) {
      const int64_t end = std::min(args.num_rows, (item + 1) * at_once);
      for (int64_t row = item * at_once; row < end; ++row) prepare_row(args, kind, quantised, row);
    });
    x = static_cast<const float*>(args.scratch);
  }
  const LinearWork work(args, kind, pool.num_threads());
  parallel_for(pool, static_cast<int64_t>(work.runs.size()) - 1, [&](int64_t run) {
    PairMemory memory;
    Tiles tiles;
    for (int64_t item = work.runs[run]; item < work.runs[run + 1]; ++item) {
      const int64_t pair = work.pair(item), first_row = work.first_row(item);
      const int64_t num_rows = std::min(work.block_rows, args.num_rows - first_row);
      const float* rows = x + first_row * row_stride;
      if (kind == Prepared::kQuantised)
        int_pair(args, quantised, first_row, num_rows, pair, memory.results, memory.ints, tiles);
      else if (kind == Prepared::kPairs && kHasTiles)
        pair_by_tiles(args, rows, row_stride, num_rows, pair, memory.results, tiles);
      else if (kind == Prepared::kPairs)
        float_pair<true>(args, rows, row_stride, num_rows, pair, memory.results, memory.floats);
      else
        float_pair<false>(args, rows, row_stride, num_rows, pair, memory.results, memory.floats);
      finish_pair(args, first_row, num_rows, pair, memory.results);
    }
  });
}

}  // namespace TIDEMILL_ISA
}  // namespace tidemill
