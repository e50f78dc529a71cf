// How fast a shard answers lookups, and serves and takes blocks. Called by `kvant bench service`.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/status.h"

namespace kvant {

struct ServiceBenchOptions {
  std::vector<size_t> stored = {1000, 10000, 100000};    // blocks in the shard while it is asked
  size_t chain = 256;                                    // keys of a lookup, all of which are there
  size_t lookups = 4;                                    // under way
  std::vector<uint64_t> sizes_bytes = {65536, 1048576};  // of blocks that are got and put
  std::vector<size_t> outstanding = {1, 16};             // gets or puts under way
  Duration time_per_row = std::chrono::milliseconds(800);
};

// transport: "loopback", server and client in turns on one thread; "shm" and "tcp", each on a
// thread of its own.
struct ServiceBenchRow {
  std::string_view transport{};
  std::string_view op{};    // "lookup", of a chain; "get" and "put", of a block, checksums verified
  size_t stored = 0;        // blocks, of lookups
  uint64_t size_bytes = 0;  // of a block
  size_t outstanding = 0;
  double per_s = 0;  // operations
  double us_p50 = 0;
  double us_p99 = 0;
};

Result<std::vector<ServiceBenchRow>> RunServiceBench(const ServiceBenchOptions& options);

}  // namespace kvant
