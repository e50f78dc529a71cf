#include "node/resident_memory.h"

#include <sys/resource.h>

#include "base/check.h"

namespace kvant::node {

uint64_t PeakResidentBytes() {
  rusage usage{};
  KV_CHECK(::getrusage(RUSAGE_SELF, &usage) == 0);
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;  // Linux counts it in KiB
}

}  // namespace kvant::node
