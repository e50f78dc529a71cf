// The report of a run: what is added up, what is compared, and that a page comes of it.
#include "node/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/support/node_world.h"
#include "tests/support/random_requests.h"

namespace kvant::node {
namespace {

using nlohmann::json;
using support::NodeWorld;
using support::NodeWorldOptions;
using testing::HasSubstr;

LinkCounters Counters(uint64_t payload_out, uint64_t payload_in, uint64_t control_out,
                      uint64_t control_in) {
  LinkCounters counters;
  counters.payload_bytes_sent = payload_out;
  counters.payload_bytes_received = payload_in;
  counters.control_bytes_sent = control_out;
  counters.control_bytes_received = control_in;
  return counters;
}

class ReportTest : public testing::Test {
 protected:
  // Two decode ranks, a prefill and a cache rank; the first decode rank answered `requests`.
  ReportTest() : world_(Options()) {
    answers_ = world_.Answer(support::RandomRequests({.seed = 3, .count = 8}));
    NodeRuntime& node = world_.node();
    ranks_ = {
        CacheRankReport(0, "here", world_.shard().stats(), Counters(9, 9, 9, 9),
                        Counters(0, 0, 1, 0)),
        NodeRankReport(1, Role::kPrefill, "here", node, {}, Counters(500, 20, 7, 3),
                       Counters(0, 0, 10, 0)),
        NodeRankReport(2, Role::kDecode, "here", node, world_.stats(), Counters(40, 300, 5, 6),
                       Counters(0, 0, 100, 0)),
    };
    setup_.model = "tiny";
    setup_.codec = "tile8";
    setup_.store = "plain";
    setup_.wire = "full";
    setup_.transport = "mpi";
    setup_.roles = "cache=1,prefill=1,decode=1";
    setup_.bf16_bytes_per_token = node.block_class().Bf16BytesPerToken();
    setup_.wall_s = 1.5;
  }
  static NodeWorldOptions Options() {
    NodeWorldOptions options;
    options.shard_bytes = uint64_t{8} << 20;
    return options;
  }
  json Merge(std::optional<std::vector<Answer>> reference = {}) const {
    Comparison comparison;
    comparison.answers = answers_;
    comparison.reference = std::move(reference);
    return MergeReport(setup_, ranks_, comparison);
  }

  NodeWorld world_;
  std::vector<Answer> answers_;
  std::vector<json> ranks_;
  RunSetup setup_;
};

TEST_F(ReportTest, AddsUpWhatEachLinkMoved) {
  const json report = Merge();
  EXPECT_EQ(report.at("links").at("prefill_to_cache").at("payload_bytes"), 500);
  EXPECT_EQ(report.at("links").at("cache_to_prefill").at("payload_bytes"), 20);
  EXPECT_EQ(report.at("links").at("decode_to_cache").at("payload_bytes"), 40);
  EXPECT_EQ(report.at("links").at("cache_to_decode").at("payload_bytes"), 300);
  EXPECT_EQ(report.at("links").at("cache_to_decode").at("control_bytes"), 6);
  EXPECT_EQ(report.at("links").at("node_to_node").at("control_bytes"), 111);
  // Each byte once: what the cache's own end counted is the same bytes again.
  EXPECT_EQ(report.at("payload_bytes"), 860);
  EXPECT_EQ(report.at("control_bytes"), 7 + 3 + 5 + 6 + 111);
  const uint64_t baseline =
      report.at("prompt_tokens").get<uint64_t>() * setup_.bf16_bytes_per_token;
  EXPECT_EQ(report.at("baseline_bytes"), baseline);
  EXPECT_NEAR(report.at("traffic_ratio").get<double>(), static_cast<double>(baseline) / 992, 1e-9);
  EXPECT_EQ(report.at("ranks"), 3);
  EXPECT_EQ(report.at("requests"), answers_.size());
  EXPECT_GT(report.at("generated_tokens").get<int>(), 0);
  EXPECT_FALSE(report.contains("compared"));
}

TEST_F(ReportTest, SaysWhatPlansChose) {
  for (size_t i = 1; i < ranks_.size(); ++i) {
    json& plans = ranks_[i]["planner"];
    EXPECT_EQ(plans.at("fetch_plans_by_cut").size(), 3u) << "full, k8v4, k4v4";
    EXPECT_TRUE(plans.at("decode_tokens_per_s").contains("k8v4"));
    plans["fetch_plans"] = 2 * i;
    plans["compute_plans"] = 3;
    plans["fetch_plans_by_cut"] = {{"full", i}, {"k4v4", i}};
    plans["outcomes"] = i;
    plans["mean_forecast_error"] = 0.2 * static_cast<double>(i);
  }
  setup_.max_kl = 5e-3;
  const json report = Merge();
  EXPECT_EQ(report.at("max_kl"), 5e-3);
  const json& plans = report.at("planner");
  EXPECT_EQ(plans.at("fetch_plans"), 6);
  EXPECT_EQ(plans.at("compute_plans"), 6);
  EXPECT_EQ(plans.at("fetch_plans_by_cut"), (json{{"full", 3}, {"k4v4", 3}}));
  EXPECT_NEAR(plans.at("mean_forecast_error").get<double>(), (0.2 + 0.8) / 3, 1e-9);
  const std::string page = *FormatReport(report, nullptr);
  EXPECT_THAT(page, HasSubstr("6 fetched (full 3, k4v4 3), 6 computed; forecasts 33 % off"));
  EXPECT_THAT(page, HasSubstr("decode reads full within 0.005 nats a token"));
}

TEST_F(ReportTest, SaysHowSoonHitsBegin) {
  using std::chrono::milliseconds;
  ASSERT_GE(answers_.size(), 5u);
  for (Answer& answer : answers_) {
    answer.prompt_tokens = 200;
    answer.tier_tokens = 64;  // of the others less than half was there
    answer.fetched_tokens = 64;
  }
  for (size_t i = 0; i < 4; ++i) {
    answers_[i].tier_tokens = 128;
    answers_[i].fetched_tokens = i == 0 ? 0 : 128;
    answers_[i].ttft = milliseconds(10 * (i + 1));
  }
  answers_[3].error = Unavailable("never");
  const json report = Merge();
  const json& hits = report.at("tier_hits");
  EXPECT_EQ(hits.at("requests"), 3);
  EXPECT_EQ(hits.at("fetched_requests"), 2);
  EXPECT_EQ(hits.at("ttft_ms_p50"), 20);
  EXPECT_EQ(hits.at("ttft_ms_mean"), 20);
  EXPECT_THAT(*FormatReport(report, nullptr), HasSubstr("hits in the tier"));
  for (Answer& answer : answers_) answer.tier_tokens = 0;
  EXPECT_EQ(Merge().at("tier_hits").at("requests"), 0);
  EXPECT_THAT(*FormatReport(Merge(), nullptr), testing::Not(HasSubstr("hits in the tier")));
}

TEST_F(ReportTest, ComparesAnswersByName) {
  std::vector<Answer> reference = answers_;
  std::reverse(reference.begin(), reference.end());
  json report = Merge(reference);
  EXPECT_EQ(report.at("compared"), answers_.size());
  EXPECT_EQ(report.at("identical_to_reference"), answers_.size());

  reference[0].tokens.push_back(1);
  reference[1].text += "!";
  reference[2].custom_id = "nobody";
  report = Merge(reference);
  EXPECT_EQ(report.at("compared"), answers_.size() - 1);
  EXPECT_EQ(report.at("identical_to_reference"), answers_.size() - 3);
}

TEST_F(ReportTest, IsAPageThatAPersonReads) {
  const json report = Merge(answers_);
  const Result<std::string> page = FormatReport(report, &report);
  ASSERT_TRUE(page.ok()) << page.status().ToString();
  for (const char* part : {"tiny on 3 ranks", "tile8 over mpi", "prefill to cache", "times fewer",
                           "same as one process", "without cache", "resident memory"}) {
    EXPECT_THAT(*page, HasSubstr(part));
  }
  EXPECT_EQ(FormatBytes(1536), "1.50 KiB");
  EXPECT_EQ(FormatBytes(12), "12 B");
}

TEST_F(ReportTest, SaysWhatSlidingLayersSaved) {
  EXPECT_EQ(Merge().at("sliding_bytes_not_fetched"), 0);
  EXPECT_THAT(*FormatReport(Merge(), nullptr), testing::Not(HasSubstr("sliding layers")));
  ranks_[1]["supply"]["sliding_bytes_skipped"] = 3 << 20;
  ranks_[2]["supply"]["sliding_bytes_skipped"] = 2 << 20;
  ranks_[2]["supply"]["sliding_bytes_fetched_later"] = 1 << 20;
  const json report = Merge();
  EXPECT_EQ(report.at("sliding_bytes_not_fetched"), 4 << 20);
  EXPECT_EQ(report.at("baseline_bytes"), Merge().at("baseline_bytes")) << "of all layers, always";
  const Result<std::string> page = FormatReport(report, nullptr);
  ASSERT_TRUE(page.ok());
  EXPECT_THAT(*page, HasSubstr("sliding layers"));
  EXPECT_THAT(*page, HasSubstr("4.00 MiB not fetched because no token will attend them"));
}

TEST_F(ReportTest, AFieldThatIsMissingIsNamed) {
  const json report = Merge();
  for (const char* field : {"prompt_tokens", "codec", "links", "ttft_ms_p50"}) {
    json bad = report;
    bad.erase(field);
    const Result<std::string> page = FormatReport(bad, nullptr);
    ASSERT_FALSE(page.ok()) << field;
    EXPECT_THAT(page.status().message(), HasSubstr(field));
  }
}

}  // namespace
}  // namespace kvant::node
