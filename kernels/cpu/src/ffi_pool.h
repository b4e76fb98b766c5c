// XLA's thread pool as a Pool.
#pragma once

#include <utility>

#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace tidemill {

class XlaPool final : public Pool {
 public:
  explicit XlaPool(xla::ffi::ThreadPool pool) : pool_(std::move(pool)), num_threads_(pool_.num_threads()) {}
  int64_t num_threads() const override { return num_threads_; }
  void schedule(std::function<void()> work) override { pool_.Schedule(std::move(work)); }

 private:
  xla::ffi::ThreadPool pool_;
  int64_t num_threads_;
};

}  // namespace tidemill
