// How fast a shard says which blocks of a chain it has. Called by `kvant bench lookups`.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/status.h"

namespace kvant {

struct LookupBenchOptions {
  std::vector<size_t> stored = {1000, 10000, 100000};  // blocks in the shard
  size_t chain = 256;                                  // keys of a lookup, all of which are there
  size_t outstanding = 4;                              // lookups under way
  Duration time_per_row = std::chrono::milliseconds(800);
};

// transport: "loopback", server and client in turns on one thread; "shm", each on a thread of its
// own.
struct LookupBenchRow {
  std::string_view transport;
  size_t stored = 0;
  double keys_per_s = 0;
  double lookup_us_p50 = 0;  // at so many under way
};

Result<std::vector<LookupBenchRow>> RunLookupBench(const LookupBenchOptions& options);

}  // namespace kvant
