// Blocks of a codec pack that hold what is attended besides: the same payload whichever is read,
// and the one is read whose bytes give a prefix soonest.
#include "node/beside_form.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kernels/raw_codec.h"
#include "node/planner.h"
#include "tests/support/node_world.h"
#include "tests/support/watched_shard.h"

namespace kvant::node {
namespace {

using support::kWatchedBlocks;
using support::Supply;
using support::WatchedShard;

constexpr uint64_t kRoom = uint64_t{8} << 20;

struct Kind {
  const char* codec;
  const char* also;
};

class BesideTier : public testing::TestWithParam<Kind> {
 protected:
  static NodeOptions Options() {
    NodeOptions options = support::NodeWorldOptions().node;
    options.model = support::SlidingModel();
    options.codec = GetParam().codec;
    options.store = "klt";
    options.also = GetParam().also;
    options.pack = support::KltPackOf(options.model);
    options.cuts = options.codec == "raw" ? "coarse,fine,finest,exact" : "coarse,fine,finest";
    options.recompute = {1};
    options.local_cache_bytes = kRoom;
    options.threads = 2;
    return options;
  }
  WatchedShard::Node Connect(const NodeOptions& options) { return shard_.Connect(options); }
  // Which fetches at bytes a second, and decodes what takes long at tokens a second.
  WatchedShard::Node Reader(double link_bytes_per_s, double decode_tokens_per_s) {
    NodeOptions options = Options();
    options.max_kl = 0.05;
    WatchedShard::Node reader = shard_.Connect(options);
    Planner& planner = reader.node->planner();
    for (int i = 0; i < 200; ++i) {
      planner.SawFetch(static_cast<uint64_t>(link_bytes_per_s), std::chrono::seconds(1));
      planner.SawPrefill(1, std::chrono::seconds(1));
      for (size_t cut = 0; cut < 4; ++cut)
        planner.SawDecode(cut, decode_tokens_per_s, std::chrono::seconds(1));
    }
    return reader;
  }
  WatchedShard shard_;
};
INSTANTIATE_TEST_SUITE_P(Kinds, BesideTier,
                         testing::Values(Kind{"tile8", "plain"}, Kind{"tile4", "plain"},
                                         Kind{"raw", "plain"}, Kind{"raw", "lossless"}),
                         [](const auto& kind) {
                           return std::string(kind.param.codec) + kind.param.also;
                         });

TEST_P(BesideTier, ThePayloadIsReadWhereTheLinkIsFast) {
  const WatchedShard::Node writer = Connect(Options());
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  const WatchedShard::Node reader = Reader(1e9, 1e3);
  const BlockClass& blocks = reader.node->block_class();
  const SupplyJobPtr read = Supply(*reader.node, Wire::kAuto);
  EXPECT_EQ(read->read_cuts, blocks.choices().back().cuts);
  EXPECT_EQ(blocks.choices().back().name, GetParam().also);
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 0u);
  // All that sliding layers' scopes hold of what the writer attends.
  for (size_t i = 0; i < kWatchedBlocks; ++i) {
    const kernels::PayloadLayout& layout = blocks.layout(read->blocks[i]->portion.scope);
    for (const kernels::PayloadRow& row : layout.rows()) {
      const auto mine = read->blocks[i]->bytes.begin() + static_cast<ptrdiff_t>(row.offset);
      const uint64_t offset = blocks.layout().Row(row.kind, row.cut, row.layer).offset;
      EXPECT_TRUE(std::equal(mine, mine + static_cast<ptrdiff_t>(row.length),
                             written->blocks[i]->bytes.begin() + static_cast<ptrdiff_t>(offset)))
          << "block " << i << ", layer " << row.layer;
    }
  }
  const uint64_t fetched = reader.node->tier()->stats().fetched_bytes;
  const uint64_t attended =
      3 * blocks.layout(Scope::kGlobal).total_bytes() + 2 * blocks.payload_bytes();
  if (GetParam().also == std::string("plain")) {
    EXPECT_EQ(fetched, attended);
  } else {
    EXPECT_LT(fetched, attended);
  }
}

TEST_P(BesideTier, TheFewestBytesAreReadWhereItIsSlow) {
  const WatchedShard::Node writer = Connect(Options());
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  const BlockClass& blocks = writer.node->block_class();
  const WatchedShard::Node reader = Reader(1e4, 1e6);
  static_cast<void>(Supply(*reader.node, Wire::kAuto));
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 0u);
  // A tiny model's blocks by a pack of random numbers may be larger than its tiles.
  uint64_t fewest = ~uint64_t{0};
  for (const ReadChoice& choice : blocks.choices()) {
    if (*choice.error > 0.05F || blocks.form().WayOf(choice.cuts).recomputed > 0) continue;
    uint64_t bytes = 0;
    for (size_t i = 0; i < kWatchedBlocks; ++i) {
      const Portion portion(choice.cuts, blocks.ScopeAttended(i, kWatchedBlocks * kBlockTokens));
      for (const ManifestRow& row : written->blocks[i]->manifest->rows)
        bytes += blocks.form().InPortion(row, portion) ? row.length : 0;
    }
    fewest = std::min(fewest, bytes);
  }
  // Sizes of rows whose length varies are forecast.
  EXPECT_LE(3 * reader.node->tier()->stats().fetched_bytes, 4 * fewest);
}

// What a reader of all cuts gets, and one that raises its scope later.
TEST_P(BesideTier, InFullTheCutsAreRead) {
  const WatchedShard::Node writer = Connect(Options());
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  const WatchedShard::Node reader = Connect(Options());
  for (size_t blocks = kWatchedBlocks; blocks > 0; --blocks) {
    const SupplyJobPtr read = Supply(*reader.node, Wire::kFull, blocks);
    EXPECT_EQ(read->blocks.back()->bytes, written->blocks[blocks - 1]->bytes);
  }
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 0u);
}

TEST_P(BesideTier, ABadByteIsRefused) {
  const WatchedShard::Node writer = Connect(Options());
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  const CachedBlock& last = *written->blocks.back();
  std::byte* const place = shard_.Find(last.stored.bytes());
  ASSERT_NE(place, nullptr);
  const Cuts payload = writer.node->block_class().choices().back().cuts;
  for (const ManifestRow& row : last.manifest->rows) {
    if (writer.node->block_class().form().InPortion(row, payload))
      place[row.offset + row.length / 2] ^= std::byte{1};
  }
  const WatchedShard::Node reader = Reader(1e9, 1e3);
  static_cast<void>(Supply(*reader.node, Wire::kAuto));
  EXPECT_EQ(reader.node->tier()->stats().data_loss, 1u);
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 1u);
}

TEST(BesideFlags, AreForBlocksOfACodecPack) {
  NodeOptions options = support::NodeWorldOptions().node;
  options.model = support::SlidingModel();
  options.also = "lossless";
  const auto says = [&](const char* what) {
    const Status status = NodeRuntime::Create(options).status();
    return status.code() == StatusCode::kInvalidArgument &&
           status.message().find(what) != std::string::npos;
  };
  EXPECT_TRUE(says("--codec raw"));
  options.also = "plain";
  EXPECT_TRUE(says("--store klt"));
  options.store = "klt";
  options.pack = support::KltPackOf(options.model);
  options.also = "klt";
  EXPECT_TRUE(says("use plain or lossless"));
  options.also = "zip";
  EXPECT_TRUE(says("zip"));
  options.also = "plain";
  EXPECT_TRUE(NodeRuntime::Create(options).ok());
}

}  // namespace
}  // namespace kvant::node
