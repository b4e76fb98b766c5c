// XLA's view of drawing tokens.
#include <algorithm>
#include <utility>

#include "ffi_pool.h"
#include "kernels.h"

namespace ffi = xla::ffi;

namespace tidemill {
namespace {

ffi::Error draw(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits, ffi::Buffer<ffi::F32> temperature,
                ffi::Buffer<ffi::S32> top_k, ffi::Buffer<ffi::F32> top_p, ffi::Buffer<ffi::F32> min_p,
                ffi::Buffer<ffi::U32> keys, ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> num_rows,
                ffi::ResultBuffer<ffi::S32> token_ids) {
  const auto shape = logits.dimensions();
  if (shape.size() != 2 || shape[1] < 1)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "sampling: logits have 2 axes, rows and a vocabulary");
  const size_t rows = static_cast<size_t>(shape[0]);
  if (temperature.element_count() != rows || top_k.element_count() != rows || top_p.element_count() != rows ||
      min_p.element_count() != rows || keys.element_count() != 2 * rows || positions.element_count() != rows ||
      num_rows.element_count() != 1 || token_ids->element_count() != rows)
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "sampling: every argument has one entry a row of logits");
  Sampling args{};
  args.num_rows = std::clamp<int64_t>(num_rows.typed_data()[0], 0, shape[0]);
  args.vocab_size = shape[1];
  args.logits = logits.typed_data();
  args.temperature = temperature.typed_data();
  args.top_k = top_k.typed_data();
  args.top_p = top_p.typed_data();
  args.min_p = min_p.typed_data();
  args.keys = keys.typed_data();
  args.positions = positions.typed_data();
  args.token_ids = token_ids->typed_data();
  std::fill(args.token_ids + args.num_rows, args.token_ids + shape[0], 0);
  XlaPool threads(std::move(pool));
  kernels().sampling(args, threads);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tidemill

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(tidemill_sampling, tidemill::draw,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()   // logits [L, V]
                                  .Arg<ffi::Buffer<ffi::F32>>()   // temperature
                                  .Arg<ffi::Buffer<ffi::S32>>()   // top_k
                                  .Arg<ffi::Buffer<ffi::F32>>()   // top_p
                                  .Arg<ffi::Buffer<ffi::F32>>()   // min_p
                                  .Arg<ffi::Buffer<ffi::U32>>()   // keys [L, 2]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // positions
                                  .Arg<ffi::Buffer<ffi::S32>>()   // num_rows
                                  .Ret<ffi::Buffer<ffi::S32>>()   // token_ids
);
#pragma GCC visibility pop
