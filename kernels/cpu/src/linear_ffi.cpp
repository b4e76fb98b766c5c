// XLA's view of the matrix product: shapes are checked here, once, and never again inside.
#include <algorithm>
#include <string>
#include <utility>

#include <sys/mman.h>

#include "ffi_pool.h"
#include "kernels.h"

namespace ffi = xla::ffi;

namespace tidemill {
namespace {

constexpr int64_t kPanelOutputs = 16;
constexpr int64_t kTileRowsMax = 12;  // quantised rows lie in whole tiles
constexpr int64_t kGroupInputs = 64;   // that share a scale, in int8 and int4 panels
constexpr int64_t kPairedInputs = 32;  // bfloat16 panels are filled up to a multiple of it

ffi::Error invalid(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, "linear: " + what); }

bool is_float(ffi::DataType type) { return type == ffi::DataType::F32 || type == ffi::DataType::BF16; }

Linear::Type float_type(ffi::DataType type) {
  return type == ffi::DataType::F32 ? Linear::Type::kFloat32 : Linear::Type::kBfloat16;
}

// A result as large as a batch's logits is memory that the system has just given and takes back after the step: in
// huge pages, where it has them, that is some faults a step and not ten thousand.
void use_huge_pages(void* data, int64_t num_bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kLarge = 32 << 20;  // what an allocator keeps for itself is smaller
  constexpr uintptr_t kPage = 4096;
  if (num_bytes < kLarge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + num_bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: that it is not taken is no error
#endif
}

ffi::Error multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer panels, ffi::Buffer<ffi::F32> scales,
                    ffi::Buffer<ffi::F32> bias, ffi::AnyBuffer residual,
                    ffi::Buffer<ffi::F32> norm_weight, ffi::Buffer<ffi::S32> layer, ffi::Buffer<ffi::S32> num_rows,
                    ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::Buffer<ffi::U8>> scratch, float norm_eps, int64_t activation, int64_t bits) {
  const auto rows = x.dimensions(), results = out->dimensions(), packed = panels.dimensions();
  if (rows.size() != 2 || results.size() != 2 || packed.size() != 4) return invalid("x and out have 2 axes, panels 4");
  if (layer.element_count() != 1 || num_rows.element_count() != 1) return invalid("layer and num_rows are one number");
  Linear args{};
  args.max_rows = rows[0];
  args.in_dim = rows[1];
  args.out_dim = results[1];
  args.num_panels = packed[1];
  args.activation = static_cast<Linear::Activation>(activation);
  const bool is_gated = args.activation != Linear::Activation::kNone;
  if (activation < 0 || activation > 2) return invalid("unknown activation");
  if (!is_float(x.element_type()) || !is_float(out->element_type())) return invalid("x and out are float32 or bfloat16");
  args.type = float_type(x.element_type());
  args.out_type = float_type(out->element_type());
  int64_t group = 1, values_a_byte = 1, weight_bytes = 1;
  switch (panels.element_type()) {
    case ffi::DataType::F32:
      args.format = Linear::Format::kFloat32;
      weight_bytes = 4;
      break;
    case ffi::DataType::BF16:
      args.format = Linear::Format::kBfloat16;
      weight_bytes = 2;
      group = kPairedInputs;
      break;
    case ffi::DataType::S8:
      args.format = bits == 4 ? Linear::Format::kInt4 : Linear::Format::kInt8;
      values_a_byte = bits == 4 ? 2 : 1;
      group = kGroupInputs;
      break;
    default: return invalid("panels are float32, bfloat16 or int8");
  }
  const bool is_int = group == kGroupInputs;
  const int64_t in_padded = (args.in_dim + group - 1) / group * group;
  const int64_t outputs_of_panels = args.num_panels * kPanelOutputs / (is_gated ? 2 : 1);
  if (results[0] != args.max_rows || packed[2] * values_a_byte != in_padded || packed[3] != kPanelOutputs ||
      args.num_panels % 2 != 0 || args.out_dim > outputs_of_panels || args.in_dim < 1 || packed[0] < 1)
    return invalid("the shapes of x, panels and out do not agree");
  const int64_t layer_scales = is_int ? args.num_panels * in_padded / group * kPanelOutputs : 0;
  if (static_cast<int64_t>(scales.element_count()) != packed[0] * layer_scales)
    return invalid("the shapes of panels and scales do not agree");
  const auto fits = [](int64_t found, int64_t expected) { return found == 0 || found == expected; };
  const int64_t num_biases = bias.element_count(), num_residuals = residual.element_count();
  const int64_t num_norms = norm_weight.element_count();
  if (!fits(num_biases, is_gated ? 2 * args.out_dim : args.out_dim) || !fits(num_norms, args.in_dim) ||
      !fits(num_residuals, args.max_rows * args.out_dim) || residual.element_type() != x.element_type())
    return invalid("the shapes of bias, residual and norm do not agree with those of x and out");
  int64_t row_bytes = 0;
  if (is_int)
    row_bytes = in_padded / group * (2 * group + 4);
  else if (num_norms != 0 || args.type != Linear::Type::kFloat32)
    row_bytes = (args.in_dim + kPairedInputs - 1) / kPairedInputs * kPairedInputs * 4;
  const int64_t scratch_rows = args.max_rows + (is_int ? kTileRowsMax - 1 : 0);
  if (static_cast<int64_t>(scratch->element_count()) < scratch_rows * row_bytes) return invalid("scratch is too small");
  const int64_t index = std::clamp<int64_t>(layer.typed_data()[0], 0, packed[0] - 1);
  args.num_rows = std::clamp<int64_t>(num_rows.typed_data()[0], 0, args.max_rows);
  args.x = x.untyped_data();
  args.weights = static_cast<const char*>(panels.untyped_data()) +
                 index * args.num_panels * packed[2] * kPanelOutputs * weight_bytes;
  if (is_int) args.scales = scales.typed_data() + index * layer_scales;
  args.bias = num_biases != 0 ? bias.typed_data() : nullptr;
  args.residual = num_residuals != 0 ? residual.untyped_data() : nullptr;
  args.norm_weight = num_norms != 0 ? norm_weight.typed_data() : nullptr;
  args.norm_eps = norm_eps;
  args.out = out->untyped_data();
  args.scratch = scratch->untyped_data();
  use_huge_pages(args.out, out->size_bytes());
  XlaPool threads(std::move(pool));
  kernels().linear(args, threads);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tidemill

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(tidemill_linear, tidemill::multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()           // x
                                  .Arg<ffi::AnyBuffer>()           // panels of all layers
                                  .Arg<ffi::Buffer<ffi::F32>>()    // scales of all layers, or empty
                                  .Arg<ffi::Buffer<ffi::F32>>()    // bias, or empty
                                  .Arg<ffi::AnyBuffer>()           // residual, or empty
                                  .Arg<ffi::Buffer<ffi::F32>>()    // norm weight, or empty
                                  .Arg<ffi::Buffer<ffi::S32>>()    // layer
                                  .Arg<ffi::Buffer<ffi::S32>>()    // num_rows
                                  .Ret<ffi::AnyBuffer>()           // out
                                  .Ret<ffi::Buffer<ffi::U8>>()     // scratch
                                  .Attr<float>("norm_eps")
                                  .Attr<int64_t>("activation")
                                  .Attr<int64_t>("bits"));
#pragma GCC visibility pop
