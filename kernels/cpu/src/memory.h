// Large pieces of memory in huge pages, where the system has them.
#pragma once

#include <cstdint>

#include <sys/mman.h>

namespace tidemill {

// For memory that nobody has touched yet. It is advice: that it is not taken is no error.
inline void use_huge_pages(void* data, int64_t num_bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + num_bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace tidemill
