// The threads a kernel may use. XLA's own pool in the product (ffi_pool.h), so that there is one pool a process and its
// size, which follows the process's CPU affinity, is XLA's; others in the sanitizer tests.
#pragma once

#include <cstdint>
#include <functional>

namespace tidemill {

class Pool {
 public:
  virtual ~Pool() = default;
  virtual int64_t num_threads() const = 0;
  virtual void schedule(std::function<void()> work) = 0;
};

// Calls `body(item)` for each item in [0, num_items), each once, on the calling thread and the pool's. Items are handed
// out in order, one at a time. Returns when all are done. The caller never depends on the pool making
// progress: a helper that starts late finds nothing left to do.
void parallel_for(Pool& pool, int64_t num_items, const std::function<void(int64_t)>& body);

// Bytes of one core's second-level cache; 0 where the system does not tell.
int64_t second_level_cache_bytes();

}  // namespace tidemill
