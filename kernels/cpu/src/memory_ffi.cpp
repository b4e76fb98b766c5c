// Memory that nobody has touched: the operating system gives its pages one by one, when they are first written.
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace tidemill {
namespace {

ffi::Error uninitialized(ffi::Result<ffi::AnyBuffer>) { return ffi::Error::Success(); }

}  // namespace
}  // namespace tidemill

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(tidemill_uninitialized, tidemill::uninitialized,
                              ffi::Ffi::Bind().Ret<ffi::AnyBuffer>());
#pragma GCC visibility pop
