// Fetch or compute, by what was measured.
#include "node/planner.h"

#include <gtest/gtest.h>

#include <chrono>

#include "tests/support/node_world.h"

namespace kvant::node {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;

TEST(Planner, TheFirstObservationReplacesTheGuessAndLaterOnesAreAveraged) {
  Planner planner(milliseconds(50));
  planner.SawPrefill(1000, seconds(1));
  EXPECT_DOUBLE_EQ(planner.rates().prefill_tokens_per_s, 1000);
  planner.SawPrefill(9000, seconds(1));
  EXPECT_DOUBLE_EQ(planner.rates().prefill_tokens_per_s, 2000);
  planner.SawRoundTrip(milliseconds(1));
  EXPECT_DOUBLE_EQ(planner.rates().round_trip_s, 1e-3);
  // The round trip is not the link's doing.
  planner.SawFetch(1'000'000, milliseconds(11));
  EXPECT_NEAR(planner.rates().link_bytes_per_s, 1e8, 1);
}

TEST(Planner, AFetchFasterThanARoundTripStillGivesAFiniteRate) {
  Planner planner(milliseconds(50));
  planner.SawRoundTrip(milliseconds(10));
  planner.SawFetch(1000, milliseconds(1));
  EXPECT_NEAR(planner.rates().link_bytes_per_s, 1e7, 1);
  planner.SawFetch(1000, Duration{});
  planner.SawPrefill(10, Duration{});
  EXPECT_NEAR(planner.rates().link_bytes_per_s, 1e7, 1);
}

TEST(Planner, DecidesBySpeed) {
  Planner planner(milliseconds(50));
  planner.SawRoundTrip(milliseconds(1));
  planner.SawFetch(1'000'000, milliseconds(101));  // 10 MB/s
  planner.SawPrefill(1000, seconds(1));            // 1,000 tokens/s
  // 64 tokens: 64 ms to compute.
  const Plan fetch = planner.Decide({.fetch_bytes = 500'000, .compute_tokens = 64});
  EXPECT_TRUE(fetch.fetch);
  EXPECT_NEAR(Milliseconds(fetch.fetch_forecast), 51, 0.1);
  EXPECT_NEAR(Milliseconds(fetch.compute_forecast), 64, 0.1);
  EXPECT_EQ(fetch.forecast(), fetch.fetch_forecast);
  const Plan compute = planner.Decide({.fetch_bytes = 700'000, .compute_tokens = 64});
  EXPECT_FALSE(compute.fetch);
  EXPECT_EQ(compute.forecast(), compute.compute_forecast);
  // To compute, more would have to be fetched first.
  const Plan more =
      planner.Decide({.fetch_bytes = 700'000, .compute_tokens = 64, .also_fetch_bytes = 500'000});
  EXPECT_TRUE(more.fetch);
  EXPECT_NEAR(Milliseconds(more.compute_forecast), 64 + 51, 0.1);
  EXPECT_EQ(planner.stats().fetch_plans, 2u);
  EXPECT_EQ(planner.stats().compute_plans, 1u);
}

TEST(Planner, AStandstillIsForecastWithoutOverflow) {
  Planner planner(milliseconds(50));
  planner.SawFetch(1, seconds(1000));
  const Plan plan = planner.Decide({.fetch_bytes = uint64_t{1} << 62, .compute_tokens = 64});
  EXPECT_FALSE(plan.fetch);
  EXPECT_GT(plan.fetch_forecast, seconds(1000));
}

TEST(Planner, CountsHowFarForecastsWereOff) {
  Planner planner(milliseconds(50));
  Plan plan;
  plan.fetch_forecast = milliseconds(10);
  planner.SawOutcome(plan, milliseconds(20));  // half
  planner.SawOutcome(plan, milliseconds(5));   // twice as much
  planner.SawOutcome(plan, Duration{});        // says nothing
  EXPECT_EQ(planner.stats().outcomes, 2u);
  EXPECT_DOUBLE_EQ(planner.stats().mean_forecast_error(), 0.75);
  EXPECT_EQ(PlannerStats{}.mean_forecast_error(), 0);
}

TEST(Planner, AutoReadsTheMostThatComesInTime) {
  support::NodeWorldOptions options;
  options.node.codec = "tile8";
  support::NodeWorld world(options);
  const BlockClass& blocks = world.node().block_class();
  const Cuts full = blocks.CutsOf(Wire::kFull);
  const Cuts mixed = blocks.CutsOf(Wire::kK8V4);
  const Cuts least = blocks.CutsOf(Wire::kK4V4);
  ASSERT_GT(blocks.BytesOf(full), blocks.BytesOf(mixed));
  ASSERT_GT(blocks.BytesOf(mixed), blocks.BytesOf(least));

  Planner planner(milliseconds(50));
  planner.SawRoundTrip(microseconds(100));
  const auto link = [&](double bytes_in_budget) {
    Planner fresh = planner;
    fresh.SawFetch(
        1'000'000,
        microseconds(100) + std::chrono::duration_cast<Duration>(
                                std::chrono::duration<double>(1e6 * 0.0499 / bytes_in_budget)));
    return fresh.ChooseCuts(blocks, Wire::kAuto,
                            [&](const Cuts& cuts) { return 10 * blocks.BytesOf(cuts); });
  };
  const auto bytes = [&](const Cuts& cuts) {
    return 10.0 * static_cast<double>(blocks.BytesOf(cuts));
  };
  EXPECT_EQ(link(bytes(full) * 1.01), full);
  EXPECT_EQ(link(bytes(full) * 0.99), mixed);
  EXPECT_EQ(link(bytes(mixed) * 1.01), mixed);
  EXPECT_EQ(link(bytes(mixed) * 0.99), least);
  EXPECT_EQ(link(1.0), least) << "nothing comes in time: as little as there is";
  // A wire that was asked for is not a matter of speed.
  const auto endless = [](const Cuts&) { return kMaxPayloadBytes; };
  EXPECT_EQ(planner.ChooseCuts(blocks, Wire::kFull, endless), full);
}

}  // namespace
}  // namespace kvant::node
