// Memory that nobody has touched: the operating system gives its pages one by one, when they are first written. And
// copies within an array, in place.
#include <algorithm>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace tidemill {
namespace {

ffi::Error uninitialized(ffi::Result<ffi::AnyBuffer>) { return ffi::Error::Success(); }

// Of `num_layers` runs of items that lie behind one another in `data`, copies item copies[0, i] to copies[1, i] in each,
// for the first `num_copies`, one after the other. `out` is `data`.
ffi::Error copy_items(ffi::AnyBuffer data, ffi::Buffer<ffi::S32> copies, ffi::Buffer<ffi::S32> num_copies,
                      ffi::Result<ffi::AnyBuffer> out, int64_t num_layers) {
  const auto refused = [](const char* what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, what); };
  const auto shape = data.dimensions(), pairs = copies.dimensions();
  if (out->untyped_data() != data.untyped_data()) return refused("copy_items: the result is not in the operand's place");
  if (shape.size() < 1 || pairs.size() != 2 || pairs[0] < 2 || num_copies.element_count() != 1 || num_layers < 1 ||
      shape[0] % num_layers != 0)
    return refused("copy_items: the shapes do not agree");
  const int64_t num_items = shape[0] / num_layers;
  const size_t size = shape[0] == 0 ? 0 : data.size_bytes() / shape[0];
  const int64_t count = std::clamp<int64_t>(num_copies.typed_data()[0], 0, pairs[1]);
  char* const bytes = static_cast<char*>(out->untyped_data());
  for (int64_t i = 0; i < count; ++i) {
    const int64_t source = copies.typed_data()[i], target = copies.typed_data()[pairs[1] + i];
    if (source < 0 || source >= num_items || target < 0 || target >= num_items)
      return refused("copy_items: an item is out of bounds");
    for (int64_t first = 0; source != target && first < shape[0]; first += num_items)
      std::memcpy(bytes + (first + target) * size, bytes + (first + source) * size, size);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tidemill

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(tidemill_uninitialized, tidemill::uninitialized,
                              ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(tidemill_copy_items, tidemill::copy_items,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()         // data
                                  .Arg<ffi::Buffer<ffi::S32>>()  // copies
                                  .Arg<ffi::Buffer<ffi::S32>>()  // num_copies
                                  .Ret<ffi::AnyBuffer>()         // data
                                  .Attr<int64_t>("num_layers"));
#pragma GCC visibility pop
