// Readers who compute a prefix's first layers themselves and fetch the others, coded for that:
// what they attend, who waits for whom, and that it is chosen where it gives a prefix soonest.
#include "node/first_layers.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <vector>

#include "node/klt.h"
#include "node/planner.h"
#include "tests/support/node_world.h"
#include "tests/support/watched_shard.h"

namespace kvant::node {
namespace {

using support::kWatchedBlocks;
using support::Supply;
using support::WatchedNeed;
using support::WatchedShard;

constexpr uint64_t kRoom = uint64_t{8} << 20;
// The model's layers are sliding, sliding, global, sliding; readers may compute the first, and have
// the second one's state from what enters it.
constexpr int kRecomputed = 1;

// A codec, and whether the node keeps blocks in memory of its own and decodes on threads of its
// own.
class FirstLayersTier : public testing::TestWithParam<std::tuple<const char*, bool>> {
 protected:
  // A class of raw that refines to exact, or one of tiles made of what was decoded.
  static NodeOptions Options() {
    NodeOptions options = support::NodeWorldOptions().node;
    options.model = support::SlidingModel();
    options.codec = std::get<0>(GetParam());
    options.store = "klt";
    options.pack = support::KltPackOf(options.model);
    options.cuts = options.codec == "raw" ? "coarse,fine,finest,exact" : "coarse,fine,finest";
    options.recompute = {kRecomputed};
    options.local_cache_bytes = std::get<1>(GetParam()) ? kRoom : 0;
    options.threads = std::get<1>(GetParam()) ? 3 : 1;
    options.max_kl = 0.05;  // at most fine
    return options;
  }
  WatchedShard::Node Writer() { return shard_.Connect(Options()); }
  // Over a link that is slow enough for few bytes to count, beside fast first layers and slow
  // encoding: of 1e4 tokens computed a second, of 5e4 bytes moved.
  WatchedShard::Node Reader(double link_bytes_per_s = 5e4) {
    WatchedShard::Node reader = shard_.Connect(Options());
    Planner& planner = reader.node->planner();
    for (int i = 0; i < 200; ++i) {
      planner.SawFetch(static_cast<uint64_t>(link_bytes_per_s), std::chrono::seconds(1));
      planner.SawPrefill(1e4, std::chrono::seconds(1));
      planner.SawEncode(10, std::chrono::seconds(1));
      planner.SawDecode(0, 1e5, std::chrono::seconds(1));
    }
    return reader;
  }
  static uint64_t BytesOfWay(const SupplyJob& written, const BlockClass& blocks, const Cuts& cuts) {
    uint64_t bytes = 0;
    for (size_t i = 0; i < written.blocks.size(); ++i) {
      const Portion portion(cuts, blocks.ScopeAttended(i, written.blocks.size() * kBlockTokens));
      for (const ManifestRow& row : written.blocks[i]->manifest->rows)
        bytes += blocks.form().InPortion(row, portion) ? row.length : 0;
    }
    return bytes;
  }

  WatchedShard shard_;
};
INSTANTIATE_TEST_SUITE_P(Nodes, FirstLayersTier,
                         testing::Combine(testing::Values("tile8", "raw"), testing::Bool()),
                         [](const auto& of) {
                           return fmt::format("{}{}", std::get<0>(of.param),
                                              std::get<1>(of.param) ? "Kept" : "");
                         });

TEST_P(FirstLayersTier, AreComputedWhereALinkIsSlow) {
  const WatchedShard::Node writer = Writer();
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  const WatchedShard::Node reader = Reader();
  const BlockClass& blocks = reader.node->block_class();
  const SupplyJobPtr read = Supply(*reader.node, Wire::kAuto);
  ASSERT_EQ(read->read_cuts, (Cuts{2, 2, 1}));
  EXPECT_EQ(read->tier_hits, kWatchedBlocks);
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 0u);
  EXPECT_EQ(reader.node->supply().stats().first_layers_blocks, kWatchedBlocks);
  EXPECT_EQ(reader.node->tier()->stats().fetched_bytes, BytesOfWay(*written, blocks, {2, 2, 1}));
  EXPECT_LT(BytesOfWay(*written, blocks, {2, 2, 1}), BytesOfWay(*written, blocks, {2, 2, 0}));
  EXPECT_EQ(reader.node->planner().stats().outcomes, 1u);
  EXPECT_TRUE(reader.node->tier()->idle());

  // The first layers are those of a prefix that is computed exactly.
  NodeOptions plain = Options();
  plain.store = "plain";
  plain.pack.clear();
  plain.cuts.clear();
  plain.recompute.clear();
  plain.max_kl.reset();
  const WatchedShard::Node exact = shard_.Connect(plain);
  const SupplyJobPtr computed = Supply(*exact.node, Wire::kFull);
  for (size_t i = 0; i < kWatchedBlocks; ++i) {
    const Scope scope = read->blocks[i]->portion.scope;
    const kernels::PayloadLayout& layout = blocks.layout(scope);
    bool others_differ = false;
    for (const kernels::PayloadRow& row : layout.rows()) {
      const auto mine = read->blocks[i]->bytes.begin() + static_cast<ptrdiff_t>(row.offset);
      const uint64_t offset = blocks.layout().Row(row.kind, row.cut, row.layer).offset;
      const bool same =
          std::equal(mine, mine + static_cast<ptrdiff_t>(row.length),
                     computed->blocks[i]->bytes.begin() + static_cast<ptrdiff_t>(offset));
      if (row.layer <= kRecomputed) {
        EXPECT_TRUE(same) << "block " << i << ", layer " << row.layer;
      } else {
        others_differ = others_differ || !same;
      }
    }
    EXPECT_TRUE(others_differ) << "block " << i;
  }
  // Another one reads the same.
  const WatchedShard::Node other = Reader();
  const SupplyJobPtr again = Supply(*other.node, Wire::kAuto);
  for (size_t i = 0; i < kWatchedBlocks; ++i)
    EXPECT_EQ(again->blocks[i]->bytes, read->blocks[i]->bytes);
}

TEST_P(FirstLayersTier, AreFetchedWhereALinkIsFast) {
  const WatchedShard::Node writer = Writer();
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  const WatchedShard::Node reader = Reader(1e9);
  const SupplyJobPtr read = Supply(*reader.node, Wire::kAuto);
  EXPECT_EQ(read->read_cuts.way, 0);
  EXPECT_EQ(reader.node->supply().stats().first_layers_blocks, 0u);
  // What is attended in full is no matter of the ways that blocks hold.
  const WatchedShard::Node full = Reader();
  const SupplyJobPtr whole = Supply(*full.node, Wire::kFull);
  EXPECT_EQ(whole->blocks.back()->bytes, written->blocks.back()->bytes);
}

// Layers that come before a reader has computed what enters them wait for it, and the other way
// round.
TEST_P(FirstLayersTier, WhatComesFirstWaits) {
  const WatchedShard::Node writer = Writer();
  static_cast<void>(Supply(*writer.node, Wire::kFull));
  std::vector<UninitializedBytes> expected;
  for (const bool bytes_first : {true, false}) {
    const WatchedShard::Node reader = Reader();
    BlockSupply& supply = reader.node->supply();
    const SupplyJobPtr job = supply.Start(WatchedNeed(Wire::kAuto));
    const TimePoint deadline = SteadyClock().Now() + std::chrono::seconds(20);
    const auto turn = [&] {
      reader.node->tier()->Poll();
      return supply.Advance(job);
    };
    while (turn() != BlockSupply::Progress::kCompute) ASSERT_LT(SteadyClock().Now(), deadline);
    const auto ready = [&] {
      return std::count_if(job->blocks.begin(), job->blocks.end(),
                           [](const CachedBlockPtr& block) { return block->complete(); });
    };
    if (bytes_first) {
      for (int i = 0; i < 2000; ++i) EXPECT_EQ(turn(), BlockSupply::Progress::kCompute);
      EXPECT_EQ(ready(), 0);
    }
    for (size_t i = 0; i < kWatchedBlocks; ++i) {
      ASSERT_TRUE(supply.ComputeNext(job).ok());
      if (bytes_first) {
        while (ready() < static_cast<ptrdiff_t>(i) + 1) {
          ASSERT_LT(SteadyClock().Now(), deadline);
          static_cast<void>(turn());
        }
      }
    }
    while (ready() < static_cast<ptrdiff_t>(kWatchedBlocks)) {
      ASSERT_LT(SteadyClock().Now(), deadline);
      static_cast<void>(turn());
    }
    EXPECT_EQ(turn(), BlockSupply::Progress::kReady);
    EXPECT_EQ(job->fetches, 0u);
    for (const CachedBlockPtr& block : job->blocks) expected.push_back(block->bytes);
  }
  for (size_t i = 0; i < kWatchedBlocks; ++i) EXPECT_EQ(expected[i], expected[i + kWatchedBlocks]);
}

// A sequence that ends before it has computed them leaves nobody waiting.
TEST_P(FirstLayersTier, OneThatEndsLeavesNobodyWaiting) {
  const WatchedShard::Node writer = Writer();
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  const WatchedShard::Node reader = Reader();
  BlockSupply& supply = reader.node->supply();
  SupplyJobPtr first = supply.Start(WatchedNeed(Wire::kAuto));
  const TimePoint deadline = SteadyClock().Now() + std::chrono::seconds(20);
  while (supply.Advance(first) != BlockSupply::Progress::kCompute) {
    ASSERT_LT(SteadyClock().Now(), deadline);
    reader.node->tier()->Poll();
  }
  ASSERT_TRUE(supply.ComputeNext(first).ok());
  // It takes what the first one fetches, and waits for what that computes.
  const SupplyJobPtr second = supply.Start(WatchedNeed(Wire::kAuto));
  const bool shared = std::get<1>(GetParam());
  for (int i = 0; i < 100 && shared; ++i) {
    reader.node->tier()->Poll();
    EXPECT_EQ(supply.Advance(second), BlockSupply::Progress::kWaiting);
  }
  first.reset();
  support::Complete(&supply, reader.node->tier(), second);
  EXPECT_EQ(supply.Advance(second), BlockSupply::Progress::kReady);
  reader.node->Drain();
  EXPECT_TRUE(reader.node->tier()->idle());
  EXPECT_EQ(second->blocks.size(), kWatchedBlocks);
  // Those that failed were computed; without blocks in memory each sequence has its own.
  EXPECT_EQ(supply.stats().computed_blocks > 0, shared);
}

TEST_P(FirstLayersTier, ABadByteIsRecomputed) {
  const WatchedShard::Node writer = Writer();
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  const std::span<const std::byte> stored = written->blocks[4]->stored.bytes();
  std::byte* const place = shard_.Find(stored);
  ASSERT_NE(place, nullptr);
  const BlockManifest& manifest = *written->blocks[4]->manifest;
  for (const ManifestRow& row : manifest.rows) {
    if (writer.node->block_class().form().InPortion(row, Cuts{1, 1, 1}))
      place[row.offset + row.length / 2] ^= std::byte{4};
  }
  const WatchedShard::Node reader = Reader();
  const SupplyJobPtr read = Supply(*reader.node, Wire::kAuto);
  EXPECT_EQ(reader.node->tier()->stats().data_loss, 1u);
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 1u);
  EXPECT_TRUE(read->blocks[4]->complete());
}

// The answers of a whole node that reads so: the shard's bytes fewer, nothing left under way.
TEST_P(FirstLayersTier, ANodeAnswersWithThem) {
  support::NodeWorldOptions options;
  options.node = Options();
  options.shard_bytes = uint64_t{16} << 20;
  support::NodeWorld world(options);
  Request request;
  request.custom_id = "a";
  request.prompt_tokens = support::WatchedTokens();
  request.max_tokens = 4;
  const std::vector<Answer> computed = world.Answer({request});
  ASSERT_TRUE(computed[0].error.ok()) << computed[0].error.ToString();
  EXPECT_EQ(computed[0].tokens.size(), 4u);
}

TEST(FirstLayersFlags, LayersThatThePackIsNotMadeForAreNamed) {
  NodeOptions options = support::NodeWorldOptions().node;
  options.model = support::SlidingModel();
  options.store = "klt";
  options.pack = support::KltPackOf(options.model);
  options.recompute = {2};
  const Status status = NodeRuntime::Create(options).status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("but for 0, 1"), std::string::npos) << status.message();
  options.recompute = {1, 1};
  EXPECT_EQ(NodeRuntime::Create(options).status().code(), StatusCode::kInvalidArgument);
  options.store = "plain";
  EXPECT_NE(NodeRuntime::Create(options).status().message().find("--store klt"), std::string::npos);
}

}  // namespace
}  // namespace kvant::node
