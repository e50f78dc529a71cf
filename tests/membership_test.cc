// Static membership: lists of shards and plans of roles, right and wrong ones.
#include "cluster/membership.h"

#include <gtest/gtest.h>

namespace kvant {
namespace {

TEST(StaticShardMap, ReadsAListOfAddresses) {
  const Result<ShardMap> map = StaticShardMap("tcp://h:7071,tcp://h:7070");
  ASSERT_TRUE(map.ok());
  ASSERT_EQ(map->size(), 2U);
  EXPECT_EQ(map->shards()[0].address, "tcp://h:7070");
  EXPECT_EQ(map->epoch(), kStaticEpoch);
}

TEST(StaticShardMap, NamesTheEntryThatIsWrong) {
  for (const char* list : {"", ",", "tcp://a:1,", "tcp://a:1,,tcp://b:1", "nonsense", "shm:7070",
                           "tcp://a:1, tcp://b:1", "tcp://a:1,tcp://a:1"}) {
    const Result<ShardMap> map = StaticShardMap(list);
    ASSERT_FALSE(map.ok()) << list;
    EXPECT_EQ(map.status().code(), StatusCode::kInvalidArgument);
    EXPECT_FALSE(map.status().message().empty());
  }
  EXPECT_NE(StaticShardMap("tcp://a:1,oops").status().message().find("oops"), std::string::npos);
}

TEST(RolePlan, GivesRanksTheirRolesInOrder) {
  const Result<RolePlan> plan = RolePlan::Parse("decode=1,cache=2,prefill=1", 4);
  ASSERT_TRUE(plan.ok()) << plan.status().ToString();
  EXPECT_EQ(plan->RoleOf(0), Role::kCache);
  EXPECT_EQ(plan->RoleOf(1), Role::kCache);
  EXPECT_EQ(plan->RoleOf(2), Role::kPrefill);
  EXPECT_EQ(plan->RoleOf(3), Role::kDecode);
  EXPECT_EQ(plan->RanksOf(Role::kCache), (std::vector<int>{0, 1}));
}

TEST(RolePlan, CacheRanksAreOptional) {
  const Result<RolePlan> plan = RolePlan::Parse("decode=3", 3);
  ASSERT_TRUE(plan.ok());
  EXPECT_EQ(plan->count(Role::kCache), 0);
}

TEST(RolePlan, TeachesWhatIsWrong) {
  const struct {
    const char* text;
    int ranks;
    const char* said;
  } cases[] = {
      {"cache=2,prefill=1,decode=1", 3, "mpirun -np 4"},
      {"cache=2,prefill=1", 3, "decode"},
      {"prefill=1,decode=1", 2, "cache=1"},
      {"", 1, "ROLE=COUNT"},
      {"cook=1,prefill=1,decode=1", 3, "cook=1"},
      {"cache=two,prefill=1,decode=1", 3, "two"},
      {"cache=-1,prefill=1,decode=1", 1, "-1"},
      {"prefill=1,prefill=1,decode=1", 3, "twice"},
      {"cache=1x,prefill=1,decode=1", 3, "1x"},
      {"prefill=99999999999,decode=1", 3, "9999"},
  };
  for (const auto& c : cases) {
    const Result<RolePlan> plan = RolePlan::Parse(c.text, c.ranks);
    ASSERT_FALSE(plan.ok()) << c.text;
    EXPECT_EQ(plan.status().code(), StatusCode::kInvalidArgument);
    EXPECT_NE(plan.status().message().find(c.said), std::string::npos) << plan.status().message();
  }
}

}  // namespace
}  // namespace kvant
