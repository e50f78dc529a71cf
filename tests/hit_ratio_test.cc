// The hit-ratio tool: its policies on small traces whose answers are known.
#include "cache_service/hit_ratio.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "base/random.h"

namespace kvant {
namespace {

// Conversations that grow by a block or two a turn, behind a few shared heads.
RequestTrace MakeTrace(uint64_t seed, int requests) {
  Random random(seed);
  RequestTrace trace;
  std::vector<std::vector<uint32_t>> talks;
  for (int i = 0; i < requests; ++i) {
    if (talks.empty() || random.Chance(0.3)) {
      const auto head = static_cast<uint32_t>(random.Below(3));
      trace.distinct_blocks = std::max(trace.distinct_blocks, 3U);
      talks.push_back({head});
    }
    const size_t recent = std::min<size_t>(talks.size(), 12);
    std::vector<uint32_t>& talk = talks[talks.size() - 1 - random.Below(recent)];
    for (uint64_t grow = 1 + random.Below(2); grow > 0; --grow) {
      talk.push_back(trace.distinct_blocks++);
    }
    trace.requests.push_back(talk);
    trace.total_blocks += talk.size();
  }
  return trace;
}

TEST(HitRatio, NobodyBeatsTheOptimumAndEverybodyReachesItWithRoomForAll) {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    const RequestTrace trace = MakeTrace(seed, 400);
    for (const uint32_t blocks : {5U, 20U, 60U, trace.distinct_blocks}) {
      const uint64_t best = OptimalHits(trace, blocks);
      const uint64_t ours = StoreHits(trace, blocks, {});
      EXPECT_LE(ours, best);
      EXPECT_LE(LruHits(trace, blocks), best);
      EXPECT_LE(FifoHits(trace, blocks), best);
      if (blocks == trace.distinct_blocks) {
        EXPECT_EQ(ours, best);
        EXPECT_EQ(LruHits(trace, blocks), best);
      }
    }
  }
}

TEST(HitRatio, CountsByHand) {
  RequestTrace trace;
  trace.requests = {{0, 1}, {0, 2}, {0, 1}, {3}, {0, 1}};
  trace.distinct_blocks = 4;
  // With two blocks: the optimum keeps 0 and 1 throughout: 0; 0, 1; 0, 1.
  EXPECT_EQ(OptimalHits(trace, 2), 5U);
  // LRU: {1, 0}; hit 0, then {2, 0}; hit 0, then {1, 0}; 3 drives out 1: {0, 3}; hit 0.
  EXPECT_EQ(LruHits(trace, 2), 3U);
}

TEST(HitRatio, ReadsATrace) {
  const std::string path =
      testing::TempDir() + "/kvant_trace_" + std::to_string(getpid()) + ".jsonl";
  std::ofstream(path)
      << "{\"timestamp\": 0, \"hash_ids\": [10, 20]}\n{\"hash_ids\": [10, 30, 40]}\n";
  const Result<RequestTrace> trace = ReadTrace(path);
  ASSERT_TRUE(trace.ok()) << trace.status().ToString();
  EXPECT_EQ(trace->distinct_blocks, 4U);
  EXPECT_EQ(trace->total_blocks, 5U);
  EXPECT_EQ(trace->requests[1][0], trace->requests[0][0]);
  std::ofstream(path) << "{\"hash_ids\": [10]}\n{\"hash_ids\": \"x\"}\n";
  EXPECT_NE(ReadTrace(path).status().message().find("line 2"), std::string::npos);
  std::filesystem::remove(path);
  EXPECT_FALSE(ReadTrace(path).ok());
}

}  // namespace
}  // namespace kvant
