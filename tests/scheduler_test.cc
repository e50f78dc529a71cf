// The promise of the main path: with the whole of what is stored read (`--wire full`), an answer
// does not depend on the cache, on who else is answered, on threads, or on what fails on the way.
#include "node/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/support/node_world.h"
#include "tests/support/random_requests.h"

namespace kvant::node {
namespace {

using support::AnswerText;
using support::NodeWorld;
using support::NodeWorldOptions;
using support::RandomRequests;
using support::TextsOf;

constexpr uint64_t kPlenty = uint64_t{64} << 20;

std::vector<AnswerText> Reference(const std::string& codec, const std::vector<Request>& requests) {
  NodeWorldOptions options;
  options.node.codec = codec;
  options.node.max_batch = 1;
  return TextsOf(NodeWorld(options).Answer(requests));
}

class Equality : public testing::TestWithParam<std::string> {
 protected:
  NodeWorldOptions Options(uint64_t shard_bytes) const {
    NodeWorldOptions options;
    options.node.codec = GetParam();
    options.shard_bytes = shard_bytes;
    return options;
  }
};

INSTANTIATE_TEST_SUITE_P(Codecs, Equality, testing::Values("raw", "tile8", "tile4"),
                         [](const auto& codec) { return codec.param; });

TEST_P(Equality, OfBatchesThreadsAndCaches) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const std::vector<Request> requests = RandomRequests({.seed = seed});
    const std::vector<AnswerText> expected = Reference(GetParam(), requests);
    ASSERT_EQ(expected.size(), requests.size());

    NodeWorldOptions batched = Options(0);
    batched.node.max_batch = 8;
    batched.node.threads = 2;
    EXPECT_EQ(TextsOf(NodeWorld(batched).Answer(requests)), expected) << "no cache, batch of 8";

    NodeWorld cached(Options(kPlenty));
    EXPECT_EQ(TextsOf(cached.Answer(requests)), expected) << "a shard";
    EXPECT_GT(cached.stats().cached_tokens, 0u);
    const std::vector<Answer> again = cached.Answer(requests);
    EXPECT_EQ(TextsOf(again), expected) << "everything is in memory";
    EXPECT_GT(cached.stats().local_hit_tokens, cached.stats().prompt_tokens / 2);
    for (const Answer& answer : again) {
      if (!answer.error.ok()) continue;
      EXPECT_EQ(answer.cached_tokens, (answer.prompt_tokens - 1) / 64 * 64) << answer.custom_id;
    }

    // Without memory of its own the node takes everything from the shard.
    NodeWorldOptions remote = Options(kPlenty);
    remote.node.local_cache_bytes = 0;
    remote.always_fetch = true;
    NodeWorld from_tier(remote);
    EXPECT_EQ(TextsOf(from_tier.Answer(requests)), expected) << "no memory in the node";
    EXPECT_EQ(TextsOf(from_tier.Answer(requests)), expected) << "all from the shard";
    EXPECT_GT(from_tier.node().tier()->stats().fetched_blocks, 0u);
  }
}

TEST_P(Equality, UnderConstantEviction) {
  const std::vector<Request> requests = RandomRequests({.seed = 7, .count = 64});
  const std::vector<AnswerText> expected = Reference(GetParam(), requests);
  NodeWorldOptions options = Options(1 << 20);  // has room for 64 blocks
  options.node.local_cache_bytes = 64 << 10;
  options.always_fetch = true;
  options.node.tier_arena_bytes = 1;  // two blocks, as little as there can be
  NodeWorld world(options);
  for (int pass = 0; pass < 2; ++pass) {
    EXPECT_EQ(TextsOf(world.Answer(requests)), expected) << "pass " << pass;
  }
  EXPECT_GT(world.node().cache().evicted(), 0u);
  EXPECT_GT(world.shard().stats().store.evicted, 0u) << world.shard().stats().ToJson();
}

TEST_P(Equality, OverWiresThatFail) {
  for (uint64_t seed = 1; seed <= 2; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const std::vector<Request> requests = RandomRequests({.seed = 40 + seed});
    const std::vector<AnswerText> expected = Reference(GetParam(), requests);
    NodeWorldOptions options = Options(kPlenty);
    options.node.local_cache_bytes = 0;
    options.node.tier_timeout_s = 0.05;
    options.always_fetch = true;
    FaultOptions faults;
    faults.seed = seed;
    faults.drop_message = 0.01;
    faults.delay_message = 0.05;
    faults.duplicate_message = 0.05;
    faults.corrupt_message = 0.01;
    faults.delay_written = 0.05;
    faults.drop_written = 0.01;
    faults.corrupt_payload = 0.1;
    faults.cut = 0.002;
    faults.refuse_send = 0.05;
    faults.refuse_submit = 0.05;
    faults.fail_transfer = 0.02;
    options.faults = faults;
    NodeWorld world(options);
    for (int pass = 0; pass < 2; ++pass) {
      EXPECT_EQ(TextsOf(world.Answer(requests)), expected) << "pass " << pass;
    }
    EXPECT_GT(world.fault_counts().corrupted, 0u);
    // Seen by the node in what it fetched, or by the shard in what it was given.
    EXPECT_GT(world.node().tier()->stats().data_loss + world.shard().stats().data_loss, 0u);
  }
}

}  // namespace
}  // namespace kvant::node
