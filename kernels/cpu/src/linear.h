// The matrix product of the model, y = x @ w.T, for one instruction set: see kernels/linear/api.py for what it computes.
//
// Weights lie in panels of 16 outputs, [in, 16] each, read in order, once for a block of rows. A block's rows stay in
// the second-level cache while all panels go by; a slice of a panel (some of its inputs) stays in the first while all
// the block's tiles of rows go by. A tile's results are in registers within a slice, and in a small array of the thread
// between slices. What follows a product (bias, residual, gate) is done on that array, so its cost is small.

#include "linear_float.h"

namespace tidemill {
namespace TIDEMILL_ISA {

constexpr int64_t kBlockBytes = 320 * 1024;   // of a block's rows, in the second-level cache
constexpr int64_t kSerialElements = 16384;    // fewer than these are prepared sooner than a thread is woken
constexpr int64_t kRowsAtOnce = 8;            // rows that one item of the preparation takes

TIDEMILL_INLINE float read_activation(const Linear& args, const void* data, int64_t index) {
  return args.type == Linear::Type::kFloat32 ? static_cast<const float*>(data)[index]
                                             : from_bf16(static_cast<const uint16_t*>(data)[index]);
}

// 1 / sqrt(mean of squares + eps), added in 16 parts whatever the vectors' width.
TIDEMILL_INLINE float inverse_root_mean_square(const float* x, int64_t count, float eps) {
  vf parts[kVectors];
  for (int c = 0; c < kVectors; ++c) parts[c] = vf{};
  int64_t k = 0;
  for (; k + kPanel <= count; k += kPanel)
    for (int c = 0; c < kVectors; ++c) {
      const vf value = load(x + k + c * kLanes);
      parts[c] = fma(value, value, parts[c]);
    }
  float part[kPanel];
  for (int c = 0; c < kVectors; ++c) store(part + c * kLanes, parts[c]);
  for (int i = 0; k < count; ++k, ++i) part[i] += x[k] * x[k];
  for (int half = kPanel / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return 1.0f / std::sqrt(part[0] / static_cast<float>(count) + eps);
}

// Row `row` of x in float32, normalised if asked, at `target` [in].
TIDEMILL_INLINE void prepare_row(const Linear& args, int64_t row, float* target) {
  const int64_t at = row * args.in_dim;
  if (args.type == Linear::Type::kFloat32)
    std::memcpy(target, static_cast<const float*>(args.x) + at, args.in_dim * sizeof(float));
  else
    for (int64_t k = 0; k < args.in_dim; ++k) target[k] = from_bf16(static_cast<const uint16_t*>(args.x)[at + k]);
  if (args.norm_weight == nullptr) return;
  const float inverse = inverse_root_mean_square(target, args.in_dim, args.norm_eps);
  for (int64_t k = 0; k < args.in_dim; ++k) target[k] = target[k] * inverse * args.norm_weight[k];
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
  float bias[kPanel] = {}, up_bias[kPanel] = {}, residual[kPanel] = {}, value[kPanel];
  if (args.bias != nullptr) {
    std::memcpy(bias, args.bias + column, width * sizeof(float));
    if (up != nullptr) std::memcpy(up_bias, args.bias + args.out_dim + column, width * sizeof(float));
  }
  const int64_t at = row * args.out_dim + column;
  if (args.residual != nullptr)
    for (int64_t i = 0; i < width; ++i) residual[i] = read_activation(args, args.residual, at + i);
  for (int i = 0; i < kPanel; i += kLanes) {
    vf y = load(result + i) + load(bias + i);
    if (up != nullptr) y = activated(args.activation, y) * (load(up + i) + load(up_bias + i));
    store(value + i, y + load(residual + i));
  }
  if (args.type == Linear::Type::kFloat32)
    std::memcpy(static_cast<float*>(args.out) + at, value, width * sizeof(float));
  else
    for (int64_t i = 0; i < width; ++i) static_cast<uint16_t*>(args.out)[at + i] = to_bf16(value[i]);
}

// How the work is cut: items are (block of rows, pair of panels), panels innermost; a thread takes runs of items,
// long ones first, short ones last, so that all end together.
struct LinearWork {
  int64_t block_rows, num_blocks, num_pairs;
  std::vector<int64_t> runs;  // bounds of the runs, over all items

  LinearWork(const Linear& args, int64_t num_threads) {
    const int64_t fitting = std::min(kMaxBlockRows, kBlockBytes / (args.in_dim * 4) / kTileRows * kTileRows);
    const int64_t max_rows = std::max<int64_t>(fitting, 4 * kTileRows);
    const int64_t count = (args.num_rows + max_rows - 1) / max_rows;
    const int64_t even = (args.num_rows + count - 1) / count;
    block_rows = (even + kTileRows - 1) / kTileRows * kTileRows;
    num_blocks = (args.num_rows + block_rows - 1) / block_rows;
    num_pairs = args.num_panels / 2;
    const int64_t num_items = num_blocks * num_pairs;
    runs.push_back(0);
    while (runs.back() < num_items) {
      const int64_t left = num_items - runs.back();
      runs.push_back(runs.back() + (num_threads > 1 ? std::max<int64_t>(1, left / (2 * num_threads)) : left));
    }
  }
};

void linear(const Linear& args, Pool& pool) {
  const int64_t size = args.type == Linear::Type::kFloat32 ? 4 : 2;
  std::memset(static_cast<char*>(args.out) + args.num_rows * args.out_dim * size, 0,
              (args.max_rows - args.num_rows) * args.out_dim * size);
  if (args.num_rows == 0) return;
  const float* x = static_cast<const float*>(args.x);
  if (args.type != Linear::Type::kFloat32 || args.norm_weight != nullptr) {
    float* prepared = static_cast<float*>(args.scratch);
    const bool is_small = args.num_rows * args.in_dim <= kSerialElements;
    const int64_t at_once = is_small ? args.num_rows : kRowsAtOnce;
    parallel_for(pool, (args.num_rows + at_once - 1) / at_once, [&](int64_t item) {
      const int64_t end = std::min(args.num_rows, (item + 1) * at_once);
      for (int64_t row = item * at_once; row < end; ++row) prepare_row(args, row, prepared + row * args.in_dim);
    });
    x = prepared;
  }
  const LinearWork work(args, pool.num_threads());
  parallel_for(pool, static_cast<int64_t>(work.runs.size()) - 1, [&](int64_t run) {
    PairMemory memory;
    for (int64_t item = work.runs[run]; item < work.runs[run + 1]; ++item) {
      const int64_t pair = item % work.num_pairs, first_row = item / work.num_pairs * work.block_rows;
      const int64_t num_rows = std::min(work.block_rows, args.num_rows - first_row);
      float_pair(args, x + first_row * args.in_dim, args.in_dim, num_rows, pair, memory);
      for (int64_t r = 0; r < num_rows; ++r) {
        const float *left = memory.results[0] + r * kPanel, *right = memory.results[1] + r * kPanel;
        if (args.activation != Linear::Activation::kNone) {
          finish_outputs(args, first_row + r, pair * kPanel, left, right);
        } else {
          finish_outputs(args, first_row + r, pair * 2 * kPanel, left, nullptr);
          finish_outputs(args, first_row + r, (pair * 2 + 1) * kPanel, right, nullptr);
        }
      }
    }
  });
}

}  // namespace TIDEMILL_ISA
}  // namespace tidemill
