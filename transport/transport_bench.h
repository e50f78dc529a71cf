// Measures the backends against a plain loop of the same medium in the same run. Called by
// `kvant bench transport`.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "transport/mpi.h"

namespace kvant {

struct TransportBenchOptions {
  std::vector<std::string> backends;  // empty: all that can be used
  std::vector<uint64_t> sizes_bytes = {4096, 65536, 1048576};
  std::vector<uint32_t> outstanding = {1, 16};
  Duration time_per_row = std::chrono::milliseconds(800);  // ours and the plain loop together
  // How long our sides poll with nothing to do before they sleep, over tcp, shm and verbs. Where
  // there are few cores, or slow ones, whoever polls takes them from who moves the bytes.
  Duration poll_before_sleep = std::chrono::microseconds(200);
  MpiSession* mpi = nullptr;  // when started by mpirun: ranks 0 and 1 take part, collectively
};

// One row of the report. GB are 10^9 bytes, GiB 2^30.
struct TransportBenchRow {
  std::string backend;
  std::string op;  // "get": a peer writes into our window, on request; "put": it reads from it
  uint64_t size_bytes = 0;
  uint32_t outstanding = 0;
  double latency_us_p50 = 0;  // from request to the bytes being there, at this outstanding
  double latency_us_p99 = 0;
  double gb_per_s = 0;
  double cpu_s_per_gib = 0;  // user and system time of both sides
  double plain_gb_per_s = 0;
  double plain_latency_us_p50 = 0;
  double plain_cpu_s_per_gib = 0;
};

// Rank 1 of an mpi run and ranks above get no rows.
Result<std::vector<TransportBenchRow>> RunTransportBench(const TransportBenchOptions& options);

}  // namespace kvant
