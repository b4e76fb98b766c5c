// Memory that nobody has touched: the operating system gives its pages one by one, when they are first written.
#include "memory.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace tidemill {
namespace {

// Attention goes through such memory in pieces of some KiB each, here and there: in small pages each piece costs several
// walks of the page table. Less than this is not worth what a huge page that is used in part costs.
constexpr int64_t kWorthHugePages = 4 << 20;

ffi::Error uninitialized(ffi::Result<ffi::AnyBuffer> out) {
  const int64_t num_bytes = out->size_bytes();
  if (num_bytes >= kWorthHugePages) use_huge_pages(out->untyped_data(), num_bytes);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tidemill

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(tidemill_uninitialized, tidemill::uninitialized,
                              ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());
#pragma GCC visibility pop
