// Fetched blocks that other threads decode than the one which polls the network.
#include "node/block_decoding.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "base/random.h"
#include "tests/support/planes_form.h"
#include "tests/support/watched_shard.h"

namespace kvant::node {
namespace {

using support::FormNode;
using support::FormNodeFetching;
using support::kWatchedBlocks;
using support::WatchedShard;
using testing::ElementsAre;

constexpr uint64_t kRoom = uint64_t{8} << 20;
constexpr Duration kPatience = std::chrono::seconds(20);

// Where decoding threads wait until a test lets them go on.
class Gate {
 public:
  ~Gate() { Open(); }
  Status Pass(const BlockKey& key, size_t group) {
    std::unique_lock lock(mutex_);
    came_.emplace_back(key, group);
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
    return OkStatus();
  }
  void Open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  size_t came() const {
    const std::lock_guard lock(mutex_);
    return came_.size();
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
  std::vector<std::pair<BlockKey, size_t>> came_;
};

class Decoding : public testing::TestWithParam<bool> {
 protected:
  static std::filesystem::path Model() {
    return GetParam() ? support::SlidingModel() : support::TinyModel();
  }
  FormNode Node(FormNodeFetching fetching = {}, uint64_t cache_bytes = kRoom) {
    return FormNode(Model(), "tile8", &shard_, cache_bytes, {}, fetching);
  }
  FormNode GatedNode(Gate* gate, FormNodeFetching fetching = {}, uint64_t cache_bytes = kRoom) {
    fetching.on_decode = [gate](const BlockKey& key, size_t group) {
      return gate->Pass(key, group);
    };
    return Node(fetching, cache_bytes);
  }
  // What is in the shard, once it is there.
  SupplyJobPtr Written() {
    FormNode writer = Node();
    return writer.Supply(Wire::kFull);
  }
  // Goes on until `until`, computing nothing.
  template <typename Until>
  static void Turn(FormNode* node, const SupplyJobPtr& job, const Until& until) {
    const TimePoint deadline = SteadyClock().Now() + kPatience;
    while (!until()) {
      ASSERT_LT(SteadyClock().Now(), deadline);
      node->tier()->Poll();
      if (job == nullptr) continue;
      ASSERT_NE(node->supply().Advance(job), BlockSupply::Progress::kCompute);
    }
  }
  static size_t ReadyLayers(const SupplyJob& job) {
    size_t ready = 0;
    for (const CachedBlockPtr& block : job.blocks) {
      if (block == nullptr) continue;
      for (const uint8_t flag : block->ready) ready += flag;
    }
    return ready;
  }
  static std::vector<UninitializedBytes> BytesOf(const SupplyJob& job) {
    std::vector<UninitializedBytes> bytes;
    for (const CachedBlockPtr& block : job.blocks) bytes.push_back(block->bytes);
    return bytes;
  }

  WatchedShard shard_;
};
INSTANTIATE_TEST_SUITE_P(Models, Decoding, testing::Bool(),
                         [](const auto& sliding) { return sliding.param ? "Sliding" : "Global"; });

TEST_P(Decoding, LeavesThePollingThreadFree) {
  const SupplyJobPtr written = Written();
  Gate gate;
  FormNode reader = GatedNode(&gate);
  const SupplyJobPtr job = reader.supply().Start(support::WatchedNeed(Wire::kFull));
  // Two threads beside this one.
  Turn(&reader, job, [&] { return gate.came() == 2; });
  bool found = false;
  reader.tier()->Lookup(job->keys, [&](const std::vector<LookupBlock>&) { found = true; });
  Turn(&reader, job, [&] { return found; });
  EXPECT_EQ(ReadyLayers(*job), 0U);
  EXPECT_FALSE(reader.tier()->idle());
  gate.Open();
  support::Complete(&reader.supply(), reader.tier(), job);
  // Of the sliding model less is fetched than was written; attended is the same.
  EXPECT_EQ(job->blocks.back()->bytes, written->blocks.back()->bytes);
  EXPECT_EQ(reader.supply().stats().computed_blocks, 0U);
  Turn(&reader, nullptr, [&] { return reader.tier()->idle(); });
  EXPECT_EQ(reader.tier()->stats().fetched_blocks, kWatchedBlocks);
}

// Blocks are decoded beside each other, groups of one block never.
TEST_P(Decoding, GoesThroughEachBlockInOrder) {
  static_cast<void>(Written());
  std::mutex mutex;
  std::condition_variable changed;
  std::map<BlockKey, std::vector<size_t>> groups;
  std::set<BlockKey> inside;
  size_t most_inside = 0;
  FormNodeFetching fetching;
  fetching.on_decode = [&](const BlockKey& key, size_t group) {
    std::unique_lock lock(mutex);
    EXPECT_TRUE(inside.insert(key).second);
    groups[key].push_back(group);
    most_inside = std::max(most_inside, inside.size());
    changed.notify_all();
    // The first waits for company.
    changed.wait_for(lock, kPatience, [&] { return most_inside >= 2; });
    inside.erase(key);
    return OkStatus();
  };
  FormNode reader = Node(fetching);
  const SupplyJobPtr job = reader.Supply(Wire::kFull);
  EXPECT_GE(most_inside, 2U);
  EXPECT_EQ(groups.size(), kWatchedBlocks);
  if (GetParam()) {
    EXPECT_THAT(groups[job->keys.back()], ElementsAre(0, 1));
    EXPECT_THAT(groups[job->keys.front()], ElementsAre(0)) << "it is out of every window";
  }
}

TEST_P(Decoding, WhatIsMalformedIsRecomputed) {
  const SupplyJobPtr written = Written();
  FormNodeFetching fetching;
  const BlockKey bad = written->keys[2];
  fetching.on_decode = [&](const BlockKey& key, size_t) {
    return key == bad ? DataLoss("it is not well-formed") : OkStatus();
  };
  FormNode reader = Node(fetching);
  const SupplyJobPtr job = reader.Supply(Wire::kFull);
  EXPECT_EQ(reader.tier()->stats().data_loss, 1U);
  EXPECT_EQ(reader.supply().stats().computed_blocks, 1U);
  EXPECT_EQ(job->recomputed, 1U);
  EXPECT_TRUE(job->blocks[2]->computed);
  EXPECT_EQ(job->blocks[2]->bytes, written->blocks[2]->bytes);
}

TEST_P(Decoding, WhatIsLateIsRecomputedAndStaysUnready) {
  const SupplyJobPtr written = Written();
  Gate gate;
  FormNodeFetching fetching;
  fetching.timeout = std::chrono::seconds(1);
  FormNode reader = GatedNode(&gate, fetching);
  const SupplyJobPtr job = reader.supply().Start(support::WatchedNeed(Wire::kFull));
  Turn(&reader, job, [&] { return gate.came() == 2; });
  const std::vector<CachedBlockPtr> late = job->blocks;
  support::Complete(&reader.supply(), reader.tier(), job);
  EXPECT_EQ(BytesOf(*job), BytesOf(*written));
  EXPECT_EQ(reader.supply().stats().computed_blocks, kWatchedBlocks);
  EXPECT_FALSE(reader.tier()->idle()) << "others still decode";
  gate.Open();
  Turn(&reader, nullptr, [&] { return reader.tier()->idle(); });
  EXPECT_EQ(gate.came(), 2U) << "what had not begun is not decoded";
  EXPECT_EQ(reader.tier()->stats().failed_blocks, kWatchedBlocks);
  EXPECT_EQ(reader.tier()->stats().fetched_blocks, 0U);
  for (const CachedBlockPtr& block : late) {
    EXPECT_EQ(block->failed.code(), StatusCode::kDeadlineExceeded);
    EXPECT_THAT(block->ready, testing::Each(0));
  }
}

TEST_P(Decoding, WhatNobodyHasAnyMoreIsLeft) {
  static_cast<void>(Written());
  Gate gate;
  FormNode reader = GatedNode(&gate, {}, 0);
  SupplyJobPtr job = reader.supply().Start(support::WatchedNeed(Wire::kFull));
  Turn(&reader, job, [&] { return gate.came() == 2; });
  job = nullptr;
  // It is found out in a Poll, before those at work go on.
  reader.tier()->Poll();
  gate.Open();
  Turn(&reader, nullptr, [&] { return reader.tier()->idle(); });
  EXPECT_EQ(gate.came(), 2U);
  EXPECT_EQ(reader.tier()->stats().fetched_blocks, 0U);
  EXPECT_EQ(reader.tier()->stats().data_loss, 0U);
}

TEST_P(Decoding, EndsWithItsLink) {
  static_cast<void>(Written());
  Gate gate;
  std::thread opener;
  {
    FormNode reader = GatedNode(&gate);
    const SupplyJobPtr job = reader.supply().Start(support::WatchedNeed(Wire::kFull));
    Turn(&reader, job, [&] { return gate.came() == 2; });
    opener = std::thread([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      gate.Open();
    });
  }
  EXPECT_EQ(gate.came(), 2U) << "nothing begins any more";
  opener.join();
}

// Many sequences at once, on threads that take their time.
TEST_P(Decoding, GivesTheSameBytesInAnyOrder) {
  const SupplyJobPtr written = Written();
  FormNode plain = Node({.threads = 1});
  const std::vector<UninitializedBytes> expected[] = {
      BytesOf(*plain.Supply(Wire::kFull)),
      BytesOf(*Node({.threads = 1}, 0).Supply(Wire::kK4V4)),
  };
  std::mutex mutex;
  Random random(5);
  FormNodeFetching fetching;
  fetching.on_decode = [&](const BlockKey&, size_t) {
    mutex.lock();
    const auto pause = std::chrono::microseconds(random.Below(300));
    mutex.unlock();
    std::this_thread::sleep_for(pause);
    return OkStatus();
  };
  for (int round = 0; round < 12; ++round) {
    fetching.threads = 2 + round % 3;
    FormNode reader = Node(fetching, round % 2 == 0 ? 0 : kRoom);
    std::vector<std::pair<SupplyJobPtr, bool>> jobs;
    for (int i = 0; i < 4; ++i) {
      const bool less = (i + round) % 3 == 0;
      jobs.emplace_back(
          reader.supply().Start(support::WatchedNeed(less ? Wire::kK4V4 : Wire::kFull)), less);
    }
    for (const auto& [job, less] : jobs) static_cast<void>(reader.supply().Advance(job));
    for (const auto& [job, less] : jobs) {
      support::Complete(&reader.supply(), reader.tier(), job);
      EXPECT_EQ(job->blocks.back()->bytes, expected[less ? 1 : 0].back());
      EXPECT_EQ(job->blocks.front()->bytes, expected[less ? 1 : 0].front());
    }
    EXPECT_EQ(reader.supply().stats().computed_blocks, 0U);
  }
}

}  // namespace
}  // namespace kvant::node
