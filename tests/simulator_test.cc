// The cache service under simulated faults: many seeds without a violation, the same seed with the
// same hash, and three deliberate bugs that must be found.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "tests/simulator/simulation.h"

namespace kvant::sim {
namespace {

// A sanitized step costs about ten plain ones.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr uint64_t kSeeds = 25;
#else
constexpr uint64_t kSeeds = 200;
#endif
constexpr uint64_t kFirstSeed = 20'261'122;
constexpr uint64_t kFaultSeeds = 200;

std::string Describe(const SimResult& result, const std::string& flags = "") {
  return "seed " + std::to_string(result.seed) + ": " + result.violation +
         "\nrepeat it: scripts/sim --seed " + std::to_string(result.seed) + flags + " --trace\n" +
         result.schedule;
}

TEST(Simulator, NoSeedBreaksAPromise) {
  Outcomes outcomes;
  FaultTally faults;
  for (uint64_t i = 0; i < kSeeds; ++i) {
    const SimResult result = RunSimulation({.seed = kFirstSeed + i});
    ASSERT_TRUE(result.violation.empty()) << Describe(result);
    outcomes += result.outcomes;
    faults += result.faults;
  }
  // A simulation in which nothing is served or nothing goes wrong proves nothing.
  EXPECT_GT(outcomes.layers, kSeeds * 20);
  EXPECT_GT(outcomes.stored, kSeeds * 5);
  EXPECT_GT(outcomes.data_loss, 0u);
  EXPECT_GT(outcomes.crashes, kSeeds / 5);
  EXPECT_GT(faults.messages, kSeeds);
  EXPECT_GT(faults.payload, kSeeds);
  EXPECT_GT(faults.breaks, kSeeds / 5);
}

TEST(Simulator, TheSameSeedGivesTheSameHash) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    const SimResult first = RunSimulation({.seed = seed});
    const SimResult second = RunSimulation({.seed = seed});
    EXPECT_EQ(first.hash, second.hash) << "seed " << seed;
    EXPECT_EQ(first.steps, second.steps) << "seed " << seed;
    EXPECT_NE(first.hash, RunSimulation({.seed = seed + 1000}).hash);
  }
}

// Runs seeds until one of them reports a violation.
SimResult FindWith(const ServerFaults& faults) {
  SimResult result;
  for (uint64_t i = 0; i < kFaultSeeds && result.violation.empty(); ++i) {
    result = RunSimulation({.seed = kFirstSeed + i, .server_faults = faults});
  }
  return result;
}

TEST(Simulator, FindsThatChecksumsAreNotVerified) {
  const SimResult result = FindWith({.skip_checksum_verification = true});
  EXPECT_FALSE(result.violation.empty()) << "not found within " << kFaultSeeds << " seeds";
}

TEST(Simulator, FindsThatBlocksAreSealedBeforeTheirBytesLanded) {
  const SimResult result = FindWith({.seal_before_landed = true});
  EXPECT_FALSE(result.violation.empty()) << "not found within " << kFaultSeeds << " seeds";
}

TEST(Simulator, FindsThatEvictionIgnoresLeases) {
  const SimResult result = FindWith({.ignore_lease_in_eviction = true});
  EXPECT_FALSE(result.violation.empty()) << "not found within " << kFaultSeeds << " seeds";
}

TEST(Simulator, AViolationSaysHowToRepeatIt) {
  const SimResult found = FindWith({.skip_checksum_verification = true});
  ASSERT_FALSE(found.violation.empty());
  EXPECT_FALSE(found.schedule.empty());
  const SimResult again =
      RunSimulation({.seed = found.seed, .server_faults = {.skip_checksum_verification = true}});
  EXPECT_EQ(again.violation, found.violation);
  EXPECT_EQ(again.schedule, found.schedule);
}

}  // namespace
}  // namespace kvant::sim
