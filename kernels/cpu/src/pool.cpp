#include "pool.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include <unistd.h>

namespace tidemill {

void parallel_for(Pool& pool, int64_t num_items, const std::function<void(int64_t)>& body) {
  struct State {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  const int64_t num_helpers = std::min(pool.num_threads(), num_items) - 1;
  if (num_helpers < 1) {
    for (int64_t item = 0; item < num_items; ++item) body(item);
    return;
  }
  const auto state = std::make_shared<State>();
  // `body` lives until every item is done, and is not touched after that.
  const auto work = [state, num_items, body = &body] {
    for (int64_t item; (item = state->next.fetch_add(1, std::memory_order_relaxed)) < num_items;) {
      (*body)(item);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t helper = 0; helper < num_helpers; ++helper) pool.schedule(work);
  work();
  for (int spins = 0; state->done.load(std::memory_order_acquire) < num_items; ++spins)
    if (spins > 2000) std::this_thread::yield();
}

int64_t second_level_cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t found = std::max<int64_t>(0, sysconf(_SC_LEVEL2_CACHE_SIZE));
  return found;
#else
  return 0;
#endif
}

}  // namespace tidemill
