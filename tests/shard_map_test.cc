// Placement: shares by weight, few moves when a shard joins, runs that stay together.
#include "cluster/shard_map.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>
#include <string>

#include "base/random.h"

namespace kvant {
namespace {

std::vector<Shard> NumberedShards(int count) {
  std::vector<Shard> shards;
  for (int i = 0; i < count; ++i) shards.push_back({"tcp://10.0.0." + std::to_string(i) + ":7070"});
  return shards;
}

ShardMap Make(std::vector<Shard> shards) {
  Result<ShardMap> map = ShardMap::Make(kStaticEpoch, std::move(shards));
  EXPECT_TRUE(map.ok()) << map.status().ToString();
  return *std::move(map);
}

TEST(ShardMap, RefusesWhatCannotBePlaced) {
  EXPECT_EQ(ShardMap::Make(1, {}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(ShardMap::Make(1, {{"a"}, {"b"}, {"a"}}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(ShardMap::Make(1, {{""}}).status().code(), StatusCode::kInvalidArgument);
  for (const double weight : {0.0, -1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    EXPECT_EQ(ShardMap::Make(1, {{"a", weight}}).status().code(), StatusCode::kInvalidArgument);
  }
}

TEST(ShardMap, OrderOfNamingDoesNotMatter) {
  const ShardMap forward = Make({{"mpi:0"}, {"mpi:1"}, {"mpi:2"}});
  const ShardMap backward = Make({{"mpi:2"}, {"mpi:1"}, {"mpi:0"}});
  Random random(1);
  for (int i = 0; i < 1000; ++i) {
    const uint64_t run = random.Next();
    EXPECT_EQ(forward.shards()[forward.Owner(run)].address,
              backward.shards()[backward.Owner(run)].address);
  }
}

// Placement must never change, or a cluster upgraded shard by shard loses its blocks.
TEST(ShardMap, PlacementIsFrozen) {
  const ShardMap map = Make({{"tcp://127.0.0.1:7070"}, {"tcp://127.0.0.1:7071"}, {"mpi:2"}});
  std::string owners;
  for (uint64_t run = 0; run < 24; ++run)
    owners += std::to_string(map.Owner(run * 0x9e3779b97f4a7c15U));
  EXPECT_EQ(owners, "020102000201021120211200");
}

TEST(ShardMap, SharesFollowWeights) {
  std::vector<Shard> shards = NumberedShards(6);
  const double weights[] = {1, 1, 2, 3, 0.5, 2.5};
  for (size_t i = 0; i < 6; ++i) shards[i].weight = weights[i];
  const ShardMap map = Make(shards);
  constexpr int kRuns = 400000;
  std::vector<int> count(6, 0);
  Random random(2);
  for (int i = 0; i < kRuns; ++i) ++count[map.Owner(random.Next())];
  for (size_t i = 0; i < 6; ++i) {
    const double share = static_cast<double>(count[i]) / kRuns;
    // 2 % of the share: five standard deviations of the smallest at this many runs.
    EXPECT_NEAR(share, weights[i] / 10, 0.02 * weights[i] / 10) << "shard " << i;
  }
}

TEST(ShardMap, AJoiningShardTakesOnlyItsShare) {
  const ShardMap before = Make(NumberedShards(9));
  const ShardMap after = Make(NumberedShards(10));
  const std::string joined = NumberedShards(10)[9].address;
  constexpr int kRuns = 100000;
  int moved = 0;
  Random random(3);
  for (int i = 0; i < kRuns; ++i) {
    const uint64_t run = random.Next();
    const std::string& old_owner = before.shards()[before.Owner(run)].address;
    const std::string& new_owner = after.shards()[after.Owner(run)].address;
    if (old_owner == new_owner) continue;
    ++moved;
    // Read the other way round: when it leaves, only its own runs move.
    EXPECT_EQ(new_owner, joined);
  }
  EXPECT_NEAR(static_cast<double>(moved) / kRuns, 0.1, 0.004);
}

TEST(ShardMap, OwnersAreDistinctAndLedByTheOwner) {
  const ShardMap map = Make(NumberedShards(5));
  Random random(4);
  for (int i = 0; i < 200; ++i) {
    const uint64_t run = random.Next();
    const std::vector<size_t> owners = map.Owners(run, 3);
    ASSERT_EQ(owners.size(), 3U);
    EXPECT_EQ(owners[0], map.Owner(run));
    EXPECT_NE(owners[0], owners[1]);
    EXPECT_NE(owners[1], owners[2]);
    EXPECT_NE(owners[0], owners[2]);
    EXPECT_EQ(map.Owners(run, 99).size(), 5U);
  }
}

}  // namespace
}  // namespace kvant
