// What a process took of the machine's memory.
#pragma once

#include <cstdint>

namespace kvant::node {

// The most memory that this process had resident at once, in bytes. Pages of mapped files count
// once they were read, although the system may take them back at any time.
uint64_t PeakResidentBytes();

}  // namespace kvant::node
