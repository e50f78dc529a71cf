#include "node/resident_memory.h"

#include <malloc.h>
#include <sys/resource.h>

#include "base/check.h"

namespace kvant::node {

uint64_t PeakResidentBytes() {
  rusage usage{};
  KV_CHECK(::getrusage(RUSAGE_SELF, &usage) == 0);
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;  // Linux counts it in KiB
}

void KeepFreedMemory() {
  constexpr int kMost = 32 << 20;  // that mallopt takes
  // Where another allocator stands in for the C library's (a sanitizer's, or one that is preloaded)
  // both may be refused: then it keeps what it likes.
  (void)::mallopt(M_MMAP_THRESHOLD, kMost);
  (void)::mallopt(M_TRIM_THRESHOLD, 4 * kMost);
}

}  // namespace kvant::node
