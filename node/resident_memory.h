// What a process took of the machine's memory.
#pragma once

#include <cstdint>

namespace kvant::node {

// The most memory that this process had resident at once, in bytes. Pages of mapped files count
// once they were read, although the system may take them back at any time.
uint64_t PeakResidentBytes();

// Buffers of some megabytes are taken and given back for every block that is coded. From here on
// those come from memory that was given back before, not as fresh pages of the system's, which it
// fills with zeros: half the time of calibration went there. For the beginning of a program.
void KeepFreedMemory();

}  // namespace kvant::node
