// Fetch or compute, by what was measured.
#include "node/planner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <functional>
#include <string>
#include <vector>

#include "base/random.h"
#include "node/link_meter.h"
#include "tests/support/node_world.h"

namespace kvant::node {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

FetchWork Bytes(uint64_t bytes) {
  FetchWork work;
  work.bytes = bytes;
  return work;
}

// Three cuts that refine each other, the finest first.
std::vector<ReadChoice> Refining() {
  return {{"finest", {3, 3}, 1e-4F}, {"fine", {2, 2}, 1e-3F}, {"coarse", {1, 1}, 1e-2F}};
}
PlannerOptions Budget(double max_kl) {
  PlannerOptions options;
  options.max_kl = max_kl;
  return options;
}

TEST(Planner, TheFirstObservationReplacesTheGuessAndLaterOnesAreAveraged) {
  Planner planner({});
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
  Planner planner({});
  planner.SawRoundTrip(milliseconds(10));
  planner.SawFetch(1000, milliseconds(1));
  EXPECT_NEAR(planner.rates().link_bytes_per_s, 1e7, 1);
  planner.SawFetch(1000, Duration{});
  planner.SawPrefill(10, Duration{});
  EXPECT_NEAR(planner.rates().link_bytes_per_s, 1e7, 1);
}

TEST(Planner, DecidesBySpeed) {
  Planner planner({});
  planner.SawRoundTrip(milliseconds(1));
  planner.SawFetch(1'000'000, milliseconds(101));  // 10 MB/s
  planner.SawPrefill(1000, seconds(1));            // 1,000 tokens/s
  planner.SawEncode(1000, milliseconds(1));
  // 64 tokens: 64 ms to compute.
  const auto decide = [&](uint64_t fetch_bytes, uint64_t also_bytes) {
    PlanQuestion question;
    question.fetch = Bytes(fetch_bytes);
    question.choice = 1;
    question.compute_tokens = 64;
    question.compute_work = 64;
    question.also_fetch = Bytes(also_bytes);
    return planner.Decide(question);
  };
  const Plan fetch = decide(500'000, 0);
  EXPECT_TRUE(fetch.fetch);
  EXPECT_NEAR(Milliseconds(fetch.fetch_forecast), 51, 0.1);
  EXPECT_NEAR(Milliseconds(fetch.compute_forecast), 64, 0.1);
  EXPECT_EQ(fetch.forecast(), fetch.fetch_forecast);
  const Plan compute = decide(700'000, 0);
  EXPECT_FALSE(compute.fetch);
  EXPECT_EQ(compute.forecast(), compute.compute_forecast);
  // To compute, more would have to be fetched first.
  const Plan more = decide(700'000, 500'000);
  EXPECT_TRUE(more.fetch);
  EXPECT_NEAR(Milliseconds(more.compute_forecast), 64 + 51, 0.1);
  // What is stored has to be made, too.
  for (int i = 0; i < 200; ++i) planner.SawEncode(64, milliseconds(20));
  EXPECT_NEAR(Milliseconds(decide(700'000, 0).compute_forecast), 64 + 20, 0.1);
  EXPECT_EQ(planner.stats().fetch_plans, 3u);
  EXPECT_EQ(planner.stats().fetch_plans_at, (std::array<uint64_t, kMaxChoices>{0, 3}));
  EXPECT_EQ(planner.stats().compute_plans, 1u);
}

TEST(Planner, AStandstillIsForecastWithoutOverflow) {
  Planner planner({});
  planner.SawFetch(1, seconds(1000));
  PlanQuestion question;
  question.fetch = Bytes(uint64_t{1} << 62);
  question.compute_tokens = 64;
  question.compute_work = 64;
  const Plan plan = planner.Decide(question);
  EXPECT_FALSE(plan.fetch);
  EXPECT_GT(plan.fetch_forecast, seconds(1000));
}

TEST(Planner, CountsHowFarForecastsWereOff) {
  Planner planner({});
  Plan plan;
  plan.fetch_forecast = milliseconds(10);
  planner.SawOutcome(plan, milliseconds(20));  // half
  planner.SawOutcome(plan, milliseconds(5));   // twice as much
  planner.SawOutcome(plan, Duration{});        // says nothing
  EXPECT_EQ(planner.stats().outcomes, 2u);
  EXPECT_DOUBLE_EQ(planner.stats().mean_forecast_error(), 0.75);
  EXPECT_EQ(PlannerStats{}.mean_forecast_error(), 0);
}

TEST(Planner, LearnsHowFarItsForecastsAreOff) {
  Planner planner({});
  planner.SawRoundTrip(milliseconds(1));
  planner.SawFetch(1'000'000, milliseconds(101));
  planner.SawPrefill(1, seconds(10));
  PlanQuestion question;
  question.fetch = Bytes(1'000'000);
  question.compute_tokens = 64;
  question.compute_work = 64;
  const Duration compute = planner.Decide(question).compute_forecast;
  for (int i = 0; i < 60; ++i) planner.SawOutcome(planner.Decide(question), milliseconds(202));
  EXPECT_NEAR(Milliseconds(planner.Decide(question).fetch_forecast), 202, 1);
  EXPECT_EQ(planner.Decide(question).compute_forecast, compute) << "that one was never tried";
  EXPECT_LT(planner.stats().mean_forecast_error(), 0.1);
  // An accident is not taken at its word.
  planner.SawOutcome(planner.Decide(question), seconds(1000));
  EXPECT_LT(Milliseconds(planner.Decide(question).fetch_forecast), 300);
}

TEST(Planner, EncodingThatWasNeverSeenIsNoFasterThanHalfOfDecoding) {
  Planner planner({});
  planner.SawPrefill(1000, seconds(1));
  PlanQuestion question;
  question.fetch = Bytes(1);
  question.compute_tokens = 1000;
  question.compute_work = 1000;
  EXPECT_NEAR(Seconds(planner.Decide(question).compute_forecast), 1 + 0.1, 1e-6);
  planner.SawDecode(2, 1000, seconds(1));
  EXPECT_NEAR(Seconds(planner.Decide(question).compute_forecast), 1 + 2, 1e-6);
  planner.SawEncode(1000, seconds(1));
  EXPECT_NEAR(Seconds(planner.Decide(question).compute_forecast), 1 + 1, 1e-6);
}

TEST(Planner, WorkOfPrefillGrowsWithWhatIsAttended) {
  support::NodeWorld world({});
  const BlockClass& blocks = world.node().block_class();
  EXPECT_EQ(blocks.PrefillWork(0, kBlockTokens), kBlockTokens);
  EXPECT_EQ(blocks.PrefillWork(0, 1), kBlockTokens) << "products have as many rows";
  const double behind = blocks.PrefillWork(128, kBlockTokens) - kBlockTokens;
  EXPECT_GT(behind, 0);
  EXPECT_NEAR(blocks.PrefillWork(256, kBlockTokens) - kBlockTokens, 2 * behind, 1e-9);
  EXPECT_NEAR(blocks.PrefillWork(256, kBlockTokens / 2) - kBlockTokens, behind, 1e-9);
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

  Planner planner({});
  planner.SawRoundTrip(microseconds(100));
  const auto bytes = [&](const Cuts& cuts) {
    return 10.0 * static_cast<double>(blocks.BytesOf(cuts));
  };
  const auto link = [&](double bytes_in_budget) {
    Planner fresh = planner;
    fresh.SawFetch(
        1'000'000,
        microseconds(100) + std::chrono::duration_cast<Duration>(
                                std::chrono::duration<double>(1e6 * 0.0499 / bytes_in_budget)));
    std::vector<FetchWork> work;
    for (const ReadChoice& choice : blocks.choices()) {
      work.push_back(Bytes(static_cast<uint64_t>(bytes(choice.cuts))));
    }
    return blocks.choices()[fresh.Choose(blocks.choices(), work)].cuts;
  };
  EXPECT_EQ(link(bytes(full) * 1.01), full);
  EXPECT_EQ(link(bytes(full) * 0.99), mixed);
  EXPECT_EQ(link(bytes(mixed) * 1.01), mixed);
  EXPECT_EQ(link(bytes(mixed) * 0.99), least);
  EXPECT_EQ(link(1.0), least) << "nothing comes in time: as little as there is";
}

TEST(Planner, DecodingAndTravellingOverlap) {
  Planner planner({});
  planner.SawRoundTrip(milliseconds(1));
  planner.SawFetch(1'000'000, milliseconds(101));  // 10 MB/s
  const auto forecast = [&](uint64_t bytes, double tokens, size_t depth, size_t pieces) {
    FetchWork work;
    work.bytes = bytes;
    work.decode_tokens[depth] = tokens;
    work.pieces = pieces;
    PlanQuestion question;
    question.fetch = work;
    return Milliseconds(planner.Decide(question).fetch_forecast);
  };
  planner.SawDecode(1, 640, milliseconds(64));
  EXPECT_NEAR(forecast(1'000'000, 100, 1, 10), 1 + 100 + 1, 0.01) << "the link is slower";
  EXPECT_NEAR(forecast(100'000, 1000, 1, 10), 1 + 100 + 1, 0.01) << "the decoder is slower";
  EXPECT_NEAR(forecast(1'000'000, 1000, 1, 1), 201, 0.01) << "in one piece nothing overlaps";
  EXPECT_NEAR(forecast(0, 1000, 1, 10), 100, 0.01) << "all of it is here";
  // What was never seen is as fast as what is next to it.
  EXPECT_NEAR(forecast(0, 1000, 0, 1), 100, 0.01);
  EXPECT_NEAR(forecast(0, 1000, 3, 1), 100, 0.01);
  planner.SawDecode(3, 640, milliseconds(128));
  EXPECT_NEAR(forecast(0, 1000, 3, 1), 200, 0.01);
  EXPECT_NEAR(forecast(0, 1000, 2, 1), 200, 0.01);
  EXPECT_NEAR(forecast(0, 1000, 0, 1), 100, 0.01);
}

TEST(Planner, OfTheCutsThatKeepTheBudgetTheSoonestIsRead) {
  const std::vector<ReadChoice> choices = Refining();
  std::vector<FetchWork> work = {Bytes(300'000), Bytes(200'000), Bytes(100'000)};
  const auto chosen = [&](double max_kl) {
    return choices[Planner(Budget(max_kl)).Choose(choices, work)].name;
  };
  EXPECT_EQ(chosen(1e-2), "coarse") << "the budget is kept where it is reached";
  EXPECT_EQ(chosen(5e-3), "fine");
  EXPECT_EQ(chosen(1e-4), "finest");
  // Where a finer one takes no longer, it costs nothing.
  work[2] = work[1];
  EXPECT_EQ(chosen(1), "fine");
  // By what decoding takes, where the link is fast.
  Planner planner(Budget(1));
  planner.SawFetch(1'000'000'000, milliseconds(1));
  planner.SawDecode(0, 64, milliseconds(20));
  planner.SawDecode(1, 64, milliseconds(10));
  work = {Bytes(300'000), Bytes(200'000), Bytes(100'000)};
  for (size_t i = 0; i < 3; ++i) work[i].decode_tokens[2 - i] = 64;
  EXPECT_EQ(choices[planner.Choose(choices, work)].name, "fine");
}

TEST(Planner, NeverBreaksTheBudget) {
  Random random(17);
  size_t kept = 0;
  size_t refused = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::vector<ReadChoice> choices;
    std::vector<FetchWork> work;
    const size_t count = 1 + random.Below(kMaxCuts);
    for (size_t i = 0; i < count; ++i) {
      const int cuts = static_cast<int>(count - i);
      ReadChoice choice{std::to_string(cuts), {cuts, cuts}, std::nullopt};
      // Not always in order: what was measured need not be.
      if (!random.Chance(0.1)) choice.error = static_cast<float>(random.Below(100)) * 1e-4F;
      choices.push_back(choice);
      FetchWork fetch = Bytes(random.Below(1'000'000));
      fetch.decode_tokens[random.Below(kMaxCuts)] = static_cast<double>(random.Below(1000));
      fetch.pieces = random.Below(20);
      work.push_back(fetch);
    }
    const double max_kl = static_cast<double>(random.Below(120)) * 1e-4;
    Planner planner(Budget(max_kl));
    for (uint64_t i = random.Below(5); i > 0; --i) {
      const auto took = microseconds(1 + random.Below(1'000'000));
      planner.SawRoundTrip(took / 100);
      planner.SawFetch(random.Below(1'000'000), took);
      planner.SawDecode(random.Below(kMaxCuts), static_cast<double>(random.Below(1000)), took);
    }
    const Status status = planner.CheckBudget(choices);
    const auto keeps = [&](const ReadChoice& choice) {
      return choice.error.has_value() && static_cast<double>(*choice.error) <= max_kl;
    };
    ASSERT_EQ(status.ok(), keeps(choices.front()));
    if (!status.ok()) {
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
      ++refused;
      continue;
    }
    ++kept;
    const size_t chosen = planner.Choose(choices, work);
    ASSERT_TRUE(keeps(choices[chosen]));
    ASSERT_TRUE(keeps(choices[planner.Coarsest(choices)]));
    for (size_t i = 0; i < count; ++i) {
      if (!keeps(choices[i])) continue;
      PlanQuestion one;
      PlanQuestion other;
      one.fetch = work[chosen];
      other.fetch = work[i];
      ASSERT_LE(planner.Decide(one).fetch_forecast, planner.Decide(other).fetch_forecast);
    }
  }
  EXPECT_GT(kept, 1000u);
  EXPECT_GT(refused, 1000u);
}

TEST(Planner, ABudgetThatNothingKeepsIsExplained) {
  const std::vector<ReadChoice> choices = Refining();
  EXPECT_TRUE(Planner({}).CheckBudget(choices).ok());
  EXPECT_TRUE(Planner(Budget(1e-3)).CheckBudget(choices).ok());
  const Status none = Planner(Budget(5e-5)).CheckBudget(choices);
  EXPECT_EQ(none.code(), StatusCode::kInvalidArgument);
  for (const char* part : {"5e-05", "finest 0.0001", "fine 0.001", "coarse 0.01"}) {
    EXPECT_THAT(none.message(), HasSubstr(part));
  }
  support::NodeWorldOptions options;
  const auto said = [&](const char* codec, const std::string& wire) {
    options.node.codec = codec;
    options.node.wire = wire;
    options.node.model = support::TinyModel();
    options.node.max_kl = 1e-3;
    const auto made = NodeRuntime::Create(options.node);
    return made.ok() ? std::string((*made)->wire() == Wire::kAuto ? "auto" : "fixed")
                     : made.status().message();
  };
  EXPECT_EQ(said("raw", ""), "auto") << "raw is what errors are measured against";
  EXPECT_EQ(said("raw", "auto"), "auto");
  EXPECT_THAT(said("tile8", ""), HasSubstr("--store klt"));
  EXPECT_THAT(said("tile8", "k8v4"), HasSubstr("--wire k8v4"));
}

TEST(LinkMeter, DecodingIsNotTheLinksDoing) {
  const TimePoint start{};
  const auto measured = [&](const std::function<void(LinkMeter&)>& fetch) {
    Planner planner({});
    planner.SawRoundTrip(Duration{});
    planner.SawFetch(1000, seconds(1));  // 1 kB/s, so that anything is faster
    LinkMeter meter(&planner, start);
    meter.FetchBegan(start);
    fetch(meter);
    meter.FetchEnded();
    // Its weight is an eighth.
    return (planner.rates().link_bytes_per_s - 1000) * 8 + 1000;
  };
  // 1 MB/s, looked for all the time; then 1 s of decoding.
  const double waited_for = measured([&](LinkMeter& meter) {
    for (int ms = 1; ms <= 100; ++ms) {
      meter.Looked(start + milliseconds(ms));
      if (ms % 10 == 0) meter.Arrived(10'000);
    }
    meter.Looked(start + milliseconds(1100));
  });
  EXPECT_NEAR(waited_for, 1e6, 1);
  // Decoding held all up but the first: it took no longer than that.
  const double at_least = measured([&](LinkMeter& meter) {
    for (int ms = 1; ms <= 10; ++ms) meter.Looked(start + milliseconds(ms));
    meter.Arrived(10'000);
    meter.Looked(start + milliseconds(200));
    meter.Arrived(90'000);
  });
  EXPECT_NEAR(at_least, 5e5, 1);
  // Two that share the link are measured together.
  const double together = measured([&](LinkMeter& meter) {
    meter.FetchBegan(start);
    for (int ms = 1; ms <= 100; ++ms) meter.Looked(start + milliseconds(ms));
    meter.Arrived(50'000);
    meter.Arrived(50'000);
    meter.FetchEnded();
  });
  EXPECT_GT(together, 1e6) << "both told of it";
}

}  // namespace
}  // namespace kvant::node
