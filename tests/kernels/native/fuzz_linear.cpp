// Products of every format, with what may go before and after them.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "fuzz.h"

namespace {

constexpr int64_t kPanel = 16, kGroup = 64, kPaired = 32;

uint16_t rounded(float x) {  // to bfloat16, the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Where row `row` of the matrix lies: of gated ones panels of the gate and of the up alternate.
struct Place {
  int64_t panel, lane;
};
Place place_of(const Linear& args, int64_t row) {
  if (args.activation == Linear::Activation::kNone) return {row / kPanel, row % kPanel};
  const bool is_up = row >= args.out_dim;
  row -= is_up ? args.out_dim : 0;
  return {row / kPanel * 2 + is_up, row % kPanel};
}

}  // namespace

void fuzz_linear(int64_t number, Pool& pool) {
  Linear args{};
  args.max_rows = pick(1, 40);
  args.num_rows = pick(0, args.max_rows);
  args.in_dim = pick(0, 9) == 0 ? pick(200, 1500) : pick(1, 200);  // some longer than any slice
  args.out_dim = pick(1, 90);
  args.type = args.out_type = Linear::Type::kFloat32;
  args.format = static_cast<Linear::Format>(pick(0, 3));
  const bool is_narrow = args.format == Linear::Format::kBfloat16;
  const bool is_narrow_row = is_narrow && pick(0, 1) == 0;
  if (is_narrow_row) args.type = Linear::Type::kBfloat16;
  if (is_narrow_row && pick(0, 1) == 0) args.out_type = Linear::Type::kBfloat16;
  args.activation = static_cast<Linear::Activation>(pick(0, 2));
  const bool is_gated = args.activation != Linear::Activation::kNone;
  const bool is_int = args.format == Linear::Format::kInt8 || args.format == Linear::Format::kInt4;
  const int64_t num_outputs = is_gated ? 2 * args.out_dim : args.out_dim;
  args.num_panels = 2 * ((args.out_dim + (is_gated ? 1 : 2) * kPanel - 1) / ((is_gated ? 1 : 2) * kPanel));
  const int64_t num_groups = (args.in_dim + kGroup - 1) / kGroup;
  const int64_t paired_dim = (args.in_dim + kPaired - 1) / kPaired * kPaired;
  const int64_t stored_dim = is_int ? num_groups * kGroup : is_narrow ? paired_dim : args.in_dim;

  // The matrix that is multiplied with, and the same packed.
  std::vector<double> matrix(num_outputs * args.in_dim);
  std::vector<float> floats;
  std::vector<uint16_t> halves;
  std::vector<int8_t> bytes;
  std::vector<float> scales;
  if (is_int) {
    bytes.assign(args.num_panels * stored_dim * kPanel / (args.format == Linear::Format::kInt4 ? 2 : 1), 0);
    scales.assign(args.num_panels * num_groups * kPanel, 0.0f);
  } else if (args.format == Linear::Format::kFloat32) {
    floats.assign(args.num_panels * stored_dim * kPanel, 0.0f);
  } else {
    halves.assign(args.num_panels * stored_dim * kPanel, 0);
  }
  for (int64_t row = 0; row < num_outputs; ++row) {
    const Place place = place_of(args, row);
    for (int64_t group = 0; is_int && group < num_groups; ++group)
      scales[(place.panel * num_groups + group) * kPanel + place.lane] = 0.01f * static_cast<float>(pick(1, 9));
    for (int64_t k = 0; k < args.in_dim; ++k) {
      double& value = matrix[row * args.in_dim + k];
      if (!is_int) {
        const float drawn = 0.3f * normal();
        if (args.format == Linear::Format::kFloat32) {
          value = floats[(place.panel * stored_dim + k) * kPanel + place.lane] = drawn;
        } else {  // two inputs of an output side by side
          const int64_t at = place.panel * stored_dim * kPanel + k / 2 * 2 * kPanel + place.lane * 2 + k % 2;
          value = widened(halves[at] = rounded(drawn));
        }
        continue;
      }
      const int64_t largest = args.format == Linear::Format::kInt8 ? 127 : 7;
      const int64_t whole = pick(-largest, largest);
      value = whole * scales[(place.panel * num_groups + k / kGroup) * kPanel + place.lane];
      const int64_t in_quad = place.lane * 4 + k % 4;
      if (args.format == Linear::Format::kInt8) {
        bytes[place.panel * stored_dim * kPanel + k / 4 * 4 * kPanel + in_quad] = static_cast<int8_t>(whole);
      } else {  // two quads in one's bytes, the first in the low halves
        int8_t& both = bytes[place.panel * stored_dim * kPanel / 2 + k / 8 * 4 * kPanel + in_quad];
        const int low = both & 15, high = (both >> 4) & 15, nibble = static_cast<int>(whole) & 15;
        both = static_cast<int8_t>(k / 4 % 2 == 0 ? (high << 4) | nibble : (nibble << 4) | low);
      }
    }
  }
  std::vector<float> x = normals(args.max_rows * args.in_dim), residual = normals(args.max_rows * args.out_dim);
  const std::vector<float> bias = normals(num_outputs), norm = normals(args.in_dim);
  std::vector<uint16_t> x_halves(is_narrow_row ? x.size() : 0), residual_halves(is_narrow_row ? residual.size() : 0);
  for (size_t i = 0; i < x_halves.size(); ++i) x[i] = widened(x_halves[i] = rounded(x[i]));
  for (size_t i = 0; i < residual_halves.size(); ++i) residual[i] = widened(residual_halves[i] = rounded(residual[i]));
  const bool is_narrow_out = args.out_type == Linear::Type::kBfloat16;
  std::vector<float> out(is_narrow_out ? 0 : args.max_rows * args.out_dim, std::nanf(""));
  std::vector<uint16_t> out_halves(is_narrow_out ? args.max_rows * args.out_dim : 0, 0x7fc0);
  const bool has_norm = pick(0, 1) == 0;
  std::vector<char> scratch(is_int ? (args.max_rows + 11) * num_groups * 132 : 4 * args.max_rows * paired_dim);
  args.x = is_narrow_row ? static_cast<const void*>(x_halves.data()) : x.data();
  args.weights = is_int ? static_cast<const void*>(bytes.data())
                        : floats.empty() ? static_cast<const void*>(halves.data()) : floats.data();
  args.scales = is_int ? scales.data() : nullptr;
  args.bias = pick(0, 1) == 0 ? bias.data() : nullptr;
  if (!is_gated && pick(0, 1) == 0)
    args.residual = is_narrow_row ? static_cast<const void*>(residual_halves.data()) : residual.data();
  args.norm_weight = has_norm ? norm.data() : nullptr;
  args.norm_eps = 1e-5f;
  args.out = is_narrow_out ? static_cast<void*>(out_halves.data()) : out.data();
  args.scratch = scratch.data();
  kernels().linear(args, pool);

  for (int64_t row = 0; row < args.max_rows; ++row) {
    std::vector<double> input(x.begin() + row * args.in_dim, x.begin() + (row + 1) * args.in_dim);
    if (has_norm) {
      double squares = 0;
      for (double value : input) squares += value * value;
      for (int64_t k = 0; k < args.in_dim; ++k) {
        input[k] *= norm[k] / std::sqrt(squares / args.in_dim + 1e-5);
        if (is_narrow_row) input[k] = widened(rounded(static_cast<float>(input[k])));
      }
    }
    // How far a product may be off: what is lost of activations in 8 bits, each group by half a step; and of normalised
    // ones in bfloat16, which may be rounded to either side.
    std::vector<double> step(num_groups, 0.0);
    for (int64_t k = 0; is_int && k < args.in_dim; ++k)
      step[k / kGroup] = std::max(step[k / kGroup], std::fabs(input[k]) / 127);
    auto product = [&](int64_t output, double& slack) {
      double total = args.bias != nullptr ? bias[output] : 0.0, size = 1;
      for (int64_t k = 0; k < args.in_dim; ++k) {
        const double weight = matrix[output * args.in_dim + k];
        total += input[k] * weight;
        size += std::fabs(input[k] * weight);
        slack += 0.51 * step[k / kGroup] * std::fabs(weight);
        if (is_narrow_row && has_norm) slack += std::fabs(input[k] * weight) / 256;
      }
      slack += 1e-5 * size;
      return total;
    };
    for (int64_t column = 0; column < args.out_dim; ++column) {
      const int64_t at = row * args.out_dim + column;
      const double got = is_narrow_out ? widened(out_halves[at]) : out[at];
      if (row >= args.num_rows) {
        if (got != 0) fail("linear, padding", number, got, 0);
        continue;
      }
      double slack = 0;
      double want = product(column, slack);
      if (is_gated) {
        double up_slack = 0;
        const double up = product(args.out_dim + column, up_slack), gate = want;
        const bool is_silu = args.activation == Linear::Activation::kSilu;
        const double active =
            is_silu ? gate / (1 + std::exp(-gate))
                    : 0.5 * gate * (1 + std::tanh(0.7978845608 * (gate + 0.044715 * gate * gate * gate)));
        want = active * up;
        // Neither activation is steeper than 1.2.
        slack = 1.2 * slack * (std::fabs(up) + up_slack) + up_slack * std::fabs(active) + 1e-5;
      }
      if (args.residual != nullptr) want += residual[at];
      if (is_narrow_out) slack += std::fabs(want) / 256;
      if (!(std::fabs(got - want) <= slack + 1e-6)) fail("linear", number, got, want);
    }
  }
}
