// One simulation from one seed: topology, sizes, workload, faults and their times are all drawn
// from it, so running it again repeats everything.
#pragma once

#include <cstdint>
#include <string>

#include "cache_service/shard_server.h"
#include "tests/simulator/world.h"

namespace kvant::sim {

struct SimOptions {
  uint64_t seed = 0;
  ServerFaults server_faults{};  // deliberate bugs, to see that the checkers find them
  bool trace = false;            // print every entry
  size_t keep = 60;              // entries shown with a violation
  uint64_t most_steps = 20'000'000;
};

struct SimResult {
  uint64_t seed = 0;
  uint64_t hash = 0;  // over all that was delivered and all outcomes
  uint64_t steps = 0;
  double simulated_seconds = 0;
  Outcomes outcomes;
  FaultTally faults;
  std::string violation;  // empty: every promise was kept
  std::string schedule;   // the last entries before the violation
};

SimResult RunSimulation(const SimOptions& options);

// What the seed stands for.
Plan DrawPlan(uint64_t seed, const ServerFaults& faults);

}  // namespace kvant::sim
