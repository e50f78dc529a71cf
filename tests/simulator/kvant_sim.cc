// kvant-sim: runs the cache service through seeds of simulated networks, crashes and corruption.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <optional>
#include <string>

#include "tests/simulator/simulation.h"

namespace kvant::sim {
namespace {

constexpr std::chrono::seconds kProgressEvery{5};

struct Flags {
  uint64_t seeds = 200;
  uint64_t first_seed = 1;
  std::optional<uint64_t> seed;
  uint64_t most_steps = SimOptions{}.most_steps;
  bool trace = false;
  std::string fault;
};

ServerFaults FaultNamed(const std::string& name) {
  ServerFaults faults;
  faults.skip_checksum_verification = name == "skip_checksum_verification";
  faults.seal_before_landed = name == "seal_before_landed";
  faults.ignore_lease_in_eviction = name == "ignore_lease_in_eviction";
  return faults;
}

void PrintViolation(const SimResult& result, const Flags& flags) {
  const std::string fault = flags.fault.empty() ? "" : " --fault " + flags.fault;
  fmt::print("\nVIOLATION with seed {}: {}\nwhat led to it (the last entries):\n{}", result.seed,
             result.violation, result.schedule);
  fmt::print("seed {}, step {}, hash {:016x}\nrepeat it: scripts/sim --seed {}{} --trace\n",
             result.seed, result.steps, result.hash, result.seed, fault);
}

int Run(const Flags& flags) {
  SimOptions options;
  options.server_faults = FaultNamed(flags.fault);
  options.trace = flags.trace;
  options.most_steps = flags.most_steps;
  const uint64_t first = flags.seed.value_or(flags.first_seed);
  const uint64_t count = flags.seed.has_value() ? 1 : flags.seeds;
  Outcomes outcomes;
  FaultTally faults;
  uint64_t steps = 0;
  uint64_t hash = 0;
  double simulated = 0;
  const auto started = std::chrono::steady_clock::now();
  auto last_word = started;
  for (uint64_t i = 0; i < count; ++i) {
    options.seed = first + i;
    const SimResult result = RunSimulation(options);
    if (!result.violation.empty()) {
      PrintViolation(result, flags);
      return 1;
    }
    steps += result.steps;
    hash ^= result.hash;
    simulated += result.simulated_seconds;
    outcomes += result.outcomes;
    faults += result.faults;
    const auto now = std::chrono::steady_clock::now();
    if (now - last_word < kProgressEvery) continue;
    last_word = now;
    const std::chrono::duration<double> so_far = now - started;
    fmt::print("{} of {} seeds, {:.1f} seeds/s\n", i + 1, count,
               static_cast<double>(i + 1) / so_far.count());
    std::fflush(stdout);
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
  fmt::print(
      "operations {}: layers verified {}, puts stored {}, refused {}, data loss seen {}, "
      "failed otherwise {}\n",
      outcomes.operations, outcomes.layers, outcomes.stored, outcomes.refused, outcomes.data_loss,
      outcomes.failed);
  fmt::print(
      "faults: {} messages, {} payloads, {} transfers, {} connections, {} refusals, {} "
      "bytes rotten, {} crashes\n",
      faults.messages, faults.payload, faults.transfers, faults.breaks, faults.refusals,
      outcomes.rotten, outcomes.crashes);
  fmt::print(
      "{} seeds from {}: no violation, {} steps, {:.0f} simulated s in {:.1f} s, {:.1f} "
      "seeds/s, hash {:016x}\n",
      count, first, steps, simulated, took.count(), static_cast<double>(count) / took.count(),
      hash);
  return 0;
}

}  // namespace
}  // namespace kvant::sim

int main(int argc, char** argv) {
  kvant::sim::Flags flags;
  CLI::App app("Simulates shards and clients of the cache on one thread, with faults from a seed.");
  app.add_option("--seeds", flags.seeds, "how many seeds to run")->capture_default_str();
  app.add_option("--first-seed", flags.first_seed, "the first of them")->capture_default_str();
  app.add_option("--seed", flags.seed, "run this one only");
  app.add_option("--steps", flags.most_steps, "end each run after so many steps");
  app.add_flag("--trace", flags.trace, "print everything that happens");
  app.add_option("--fault", flags.fault, "a deliberate bug that must be found")
      ->check(CLI::IsMember(
          {"skip_checksum_verification", "seal_before_landed", "ignore_lease_in_eviction"}));
  CLI11_PARSE(app, argc, argv);
  return kvant::sim::Run(flags);
}
