// Sampling and stop strings.
#include "node/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

#include "base/random.h"

namespace kvant::node {
namespace {

TEST(Sample, GreedyTakesTheSmallestIdOfEqualLogits) {
  const std::vector<float> logits = {1.0F, 3.0F, 3.0F, 2.0F};
  EXPECT_EQ(Sample(logits, {}, 0), 1);
}

TEST(Sample, NanNeverWins) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> logits = {nan, 1.0F, nan, 2.0F};
  EXPECT_EQ(Sample(logits, {}, 0), 3);
  for (uint64_t step = 0; step < 200; ++step) {
    EXPECT_EQ(Sample(logits, {.temperature = 1.0, .top_p = 0.99, .seed = 5}, step) % 2, 1);
  }
}

TEST(Sample, FrequenciesFollowTheTemperature) {
  const std::vector<float> logits = {0.0F, std::log(2.0F), std::log(5.0F)};
  for (const double temperature : {1.0, 0.5}) {
    std::map<int32_t, int> seen;
    constexpr int kDraws = 20000;
    for (uint64_t step = 0; step < kDraws; ++step) {
      ++seen[Sample(logits, {.temperature = temperature, .top_p = 1.0, .seed = 7}, step)];
    }
    const double weights[] = {1.0, std::pow(2.0, 1 / temperature), std::pow(5.0, 1 / temperature)};
    const double total = weights[0] + weights[1] + weights[2];
    for (int id = 0; id < 3; ++id) {
      EXPECT_NEAR(seen[id] / static_cast<double>(kDraws), weights[id] / total, 0.015);
    }
  }
}

TEST(Sample, TopPKeepsTheSmallestSet) {
  // Probabilities 0.125, 0.25, 0.5, 0.125: 0.7 needs ids 2 and 1, 0.8 also the first of the ties.
  const std::vector<float> logits = {0.0F, std::log(2.0F), std::log(4.0F), 0.0F};
  for (const auto& [top_p, expected] :
       {std::pair(0.4, std::vector<int32_t>{2}), std::pair(0.7, std::vector<int32_t>{1, 2}),
        std::pair(0.8, std::vector<int32_t>{0, 1, 2}),
        std::pair(1.0, std::vector<int32_t>{0, 1, 2, 3})}) {
    std::map<int32_t, int> seen;
    for (uint64_t step = 0; step < 2000; ++step) {
      ++seen[Sample(logits, {.temperature = 1.0, .top_p = top_p, .seed = 3}, step)];
    }
    std::vector<int32_t> ids;
    for (const auto& [id, count] : seen) ids.push_back(id);
    EXPECT_EQ(ids, expected) << "top_p " << top_p;
  }
}

TEST(Sample, IsAFunctionOfSeedAndStep) {
  std::vector<float> logits(100, 0.0F);
  const SamplingOptions options = {.temperature = 1.0, .top_p = 1.0, .seed = 11};
  int different_step = 0;
  int different_seed = 0;
  for (uint64_t step = 0; step < 100; ++step) {
    const int32_t drawn = Sample(logits, options, step);
    EXPECT_EQ(drawn, Sample(logits, options, step));
    different_step += drawn != Sample(logits, options, step + 1) ? 1 : 0;
    different_seed +=
        drawn != Sample(logits, {.temperature = 1.0, .top_p = 1.0, .seed = 12}, step) ? 1 : 0;
  }
  EXPECT_GT(different_step, 90);
  EXPECT_GT(different_seed, 90);
}

TEST(CheckSampling, NamesTheField) {
  EXPECT_TRUE(CheckSampling({}).ok());
  EXPECT_THAT(CheckSampling({.temperature = -1.0}).message(), testing::HasSubstr("temperature"));
  EXPECT_THAT(CheckSampling({.temperature = std::nan("")}).message(),
              testing::HasSubstr("temperature"));
  EXPECT_THAT(CheckSampling({.temperature = 1.0, .top_p = 0.0}).message(),
              testing::HasSubstr("top_p"));
  EXPECT_THAT(CheckSampling({.temperature = 1.0, .top_p = 1.5}).message(),
              testing::HasSubstr("top_p"));
}

TEST(StopMatcher, HoldsBackWhatMayBeAStopString) {
  StopMatcher matcher({"\n\n", "END"});
  EXPECT_EQ(matcher.Push("one\n"), "one");
  EXPECT_EQ(matcher.Push("two E"), "\ntwo ");
  EXPECT_EQ(matcher.Push("N"), "");
  EXPECT_EQ(matcher.Push("Ough"), "ENOugh");
  EXPECT_FALSE(matcher.stopped());
  EXPECT_EQ(matcher.Push(" END and more"), " ");
  EXPECT_TRUE(matcher.stopped());
  EXPECT_EQ(matcher.Push("more"), "");
  EXPECT_EQ(matcher.Finish(), "");
}

TEST(StopMatcher, GivesOutWhatIsHeldAtTheEnd) {
  StopMatcher matcher({"STOP", ""});
  EXPECT_EQ(matcher.Push("a ST"), "a ");
  EXPECT_EQ(matcher.Finish(), "ST");
}

// However a text is cut into pieces, what comes out is the text before the stop string that is
// complete first.
TEST(StopMatcher, CutsChangeNothing) {
  Random random(1);
  for (int round = 0; round < 5000; ++round) {
    const auto word = [&](size_t most) {
      std::string text(random.Below(most + 1), 'a');
      for (char& letter : text) letter = static_cast<char>('a' + random.Below(2));
      return text;
    };
    const std::vector<std::string> stops = {word(4), word(4), word(6)};
    const std::string text = word(24);
    size_t end = std::string::npos;
    size_t begin = text.size();
    for (const std::string& stop : stops) {
      const size_t at = stop.empty() ? std::string::npos : text.find(stop);
      if (at == std::string::npos) continue;
      if (at + stop.size() < end || (at + stop.size() == end && at < begin)) {
        end = at + stop.size();
        begin = at;
      }
    }
    StopMatcher matcher(stops);
    std::string out;
    for (size_t at = 0; at < text.size();) {
      const size_t length = 1 + random.Below(text.size() - at);
      out += matcher.Push(std::string_view(text).substr(at, length));
      at += length;
    }
    out += matcher.Finish();
    ASSERT_EQ(out, text.substr(0, begin)) << "text " << text;
    ASSERT_EQ(matcher.stopped(), end != std::string::npos);
  }
}

}  // namespace
}  // namespace kvant::node
