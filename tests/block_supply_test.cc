// What a block's class says of its bytes, and what of them is moved: a cut is a range of what is
// stored, never something computed.
#include "node/block_supply.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "node/block_class.h"
#include "node/scheduler.h"
#include "tests/support/node_world.h"
#include "tests/support/planes_form.h"
#include "tests/support/random_requests.h"
#include "tests/support/watched_shard.h"

namespace kvant::node {
namespace {

using support::FormNode;
using support::kTinyContext;
using support::NodeWorld;
using support::NodeWorldOptions;
using support::Supply;
using support::WatchedShard;
using testing::HasSubstr;

constexpr size_t kBlocks = support::kWatchedBlocks;

std::vector<int32_t> Tokens() { return support::WatchedTokens(); }

class Cut : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Codecs, Cut, testing::Values("raw", "tile8", "tile4"),
                         [](const auto& codec) { return std::string(codec.param); });

TEST_P(Cut, IsAByteRangeOfWhatIsStored) {
  WatchedShard shard;
  WatchedShard::Node writer = shard.Connect(GetParam(), uint64_t{8} << 20);
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  EXPECT_EQ(writer.node->supply().stats().computed_blocks, kBlocks);
  std::vector<const std::byte*> places;
  for (const CachedBlockPtr& block : written->blocks) {
    places.push_back(shard.Find(block->bytes));
    ASSERT_NE(places.back(), nullptr) << "stored as it was computed, in one piece";
  }

  for (const Wire wire : {Wire::kK4V4, Wire::kK8V4, Wire::kFull}) {
    SCOPED_TRACE(WireName(wire));
    WatchedShard::Node reader = shard.Connect(GetParam(), 0);
    const BlockClass& blocks = reader.node->block_class();
    const Cuts cuts = blocks.CutsOf(wire);
    const uint64_t served = shard.stats().payload_bytes_served;
    const SupplyJobPtr read = Supply(*reader.node, wire);
    EXPECT_EQ(reader.node->supply().stats().computed_blocks, 0u);
    uint64_t all = 0;
    for (size_t i = 0; i < kBlocks; ++i) {
      const UninitializedBytes& whole = written->blocks[i]->bytes;
      // Of the first block, which holds the attention sinks, everything.
      const uint64_t bytes = blocks.BytesOf(i == 0 ? blocks.FullCuts() : cuts);
      all += bytes;
      ASSERT_EQ(read->blocks[i]->bytes.size(), bytes);
      EXPECT_TRUE(
          std::equal(read->blocks[i]->bytes.begin(), read->blocks[i]->bytes.end(), whole.begin()))
          << "block " << i << " is not a prefix of what is stored";
    }
    // Not a byte more than the cut, on either side of the wire.
    EXPECT_EQ(reader.node->tier()->stats().fetched_bytes, all);
    EXPECT_EQ(reader.transport->counters().payload_bytes_received, all);
    EXPECT_EQ(shard.stats().payload_bytes_served - served, all);
  }
  for (size_t i = 0; i < kBlocks; ++i) {
    EXPECT_EQ(shard.Find(written->blocks[i]->bytes), places[i]) << "serving changed nothing";
  }
}

TEST(Wires, MoveFewerBytesTheFewerBitsTheyRead) {
  NodeWorldOptions options;
  options.node.codec = "tile8";
  NodeWorld world(options);
  const BlockClass& blocks = world.node().block_class();
  EXPECT_EQ(blocks.CutsOf(Wire::kFull), blocks.FullCuts());
  EXPECT_EQ(blocks.BytesOf(blocks.FullCuts()), blocks.payload_bytes());
  EXPECT_LT(blocks.BytesOf(blocks.CutsOf(Wire::kK8V4)), blocks.payload_bytes());
  EXPECT_LT(blocks.BytesOf(blocks.CutsOf(Wire::kK4V4)), blocks.BytesOf(blocks.CutsOf(Wire::kK8V4)));
  for (const Wire wire : {Wire::kFull, Wire::kK8V4, Wire::kK4V4, Wire::kAuto}) {
    EXPECT_EQ(*ParseWire(WireName(wire)), wire);
  }
  const auto unknown = ParseWire("k2v2");
  ASSERT_FALSE(unknown.ok());
  EXPECT_THAT(unknown.status().message(), testing::AllOf(HasSubstr("k2v2"), HasSubstr("k8v4")));
}

// A node that chose few bits for a fetch, then more: the rest of what it holds is fetched, and what
// it attends never depends on where a block came from.
TEST(Wires, AutoRaisesWhatIsInMemory) {
  WatchedShard shard;
  WatchedShard::Node writer = shard.Connect("tile8", uint64_t{8} << 20);
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  WatchedShard::Node reader = shard.Connect("tile8", uint64_t{8} << 20);
  const SupplyJobPtr low = Supply(*reader.node, Wire::kK4V4, 2);
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 0u);
  // Two blocks are in memory at few bits; the link is fast enough for all.
  const SupplyJobPtr high = Supply(*reader.node, Wire::kAuto);
  EXPECT_EQ(high->local_hits, 2u);
  EXPECT_EQ(high->read_cuts, reader.node->block_class().FullCuts());
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 0u);
  for (size_t i = 0; i < kBlocks; ++i) {
    EXPECT_EQ(high->blocks[i]->bytes, written->blocks[i]->bytes);
  }
  EXPECT_EQ(reader.node->tier()->stats().fetched_bytes,
            kBlocks * reader.node->block_class().payload_bytes())
      << "no byte was moved twice";
}

// A form whose cuts declare 0.001, 0.01 and 0.1 nats a token.
TEST(Budget, ASlowLinkReadsTheCoarsestCutThatKeepsIt) {
  WatchedShard shard;
  FormNode writer(support::TinyModel(), "tile8", &shard, uint64_t{8} << 20);
  const SupplyJobPtr written = writer.Supply(Wire::kFull);
  const auto stored = [&](int cuts) {
    uint64_t bytes = 0;
    for (const CachedBlockPtr& block : written->blocks) {
      bytes += block->manifest->EndsOfCuts()[static_cast<size_t>(cuts) - 1];
    }
    return bytes;
  };
  const std::pair<double, int> budgets[] = {{0.5, 1}, {0.1F, 1}, {0.05, 2}, {0.01F, 2}, {0.005, 3}};
  for (const auto& [max_kl, cuts] : budgets) {
    SCOPED_TRACE(max_kl);
    PlannerOptions planning;
    planning.max_kl = max_kl;
    FormNode reader(support::TinyModel(), "tile8", &shard, uint64_t{8} << 20, planning);
    for (int i = 0; i < 100; ++i) reader.planner().SawFetch(1000, std::chrono::milliseconds(10));
    const SupplyJobPtr read = reader.Supply(Wire::kAuto);
    EXPECT_EQ(read->read_cuts, (Cuts{cuts, cuts}));
    EXPECT_EQ(read->tier_found, kBlocks);
    EXPECT_EQ(reader.supply().stats().computed_blocks, 0u);
    EXPECT_EQ(reader.tier()->stats().fetched_bytes, stored(cuts));
    const size_t choice = static_cast<size_t>(3 - cuts);
    EXPECT_EQ(reader.planner().stats().fetch_plans_at[choice], 1u);
    EXPECT_GT(reader.planner().rates().decode_tokens_per_s[static_cast<size_t>(cuts) - 1], 0);
    EXPECT_EQ(reader.planner().stats().outcomes, 1u);
  }
}

// What is in memory at a finer cut is attended as it is, and what is coarser is not raised.
TEST(Budget, WhatIsHereIsReadAsItIs) {
  WatchedShard shard;
  FormNode writer(support::TinyModel(), "tile8", &shard, uint64_t{8} << 20);
  const SupplyJobPtr written = writer.Supply(Wire::kFull);
  PlannerOptions planning;
  planning.max_kl = 0.05;
  FormNode reader(support::TinyModel(), "tile8", &shard, uint64_t{8} << 20, planning);
  // The first block at all cuts, the second at one, which the budget forbids.
  static_cast<void>(reader.Supply(Wire::kFull, 1));
  static_cast<void>(reader.Supply(Wire::kK4V4, 2));
  const SupplyJobPtr read = reader.Supply(Wire::kAuto, 3);
  EXPECT_EQ(read->local_hits, 1u);
  EXPECT_EQ(read->tier_hits, 2u);
  EXPECT_EQ(read->blocks[0]->portion.cuts, (Cuts{3, 3}));
  EXPECT_EQ(read->blocks[0]->bytes, written->blocks[0]->bytes);
  EXPECT_EQ(read->blocks[1]->portion.cuts, (Cuts{2, 2}));
  EXPECT_EQ(read->blocks[2]->portion.cuts, (Cuts{2, 2}));
  EXPECT_EQ(reader.supply().stats().computed_blocks, 0u);
  // What is computed has all cuts, and is attended so.
  FormNode alone(support::TinyModel(), "tile8", nullptr, uint64_t{8} << 20, planning);
  const SupplyJobPtr computed = alone.Supply(Wire::kAuto);
  for (size_t i = 0; i < kBlocks; ++i) {
    EXPECT_EQ(computed->blocks[i]->bytes, written->blocks[i]->bytes);
  }
}

// The sliding model has four layers of one size, of which all but layer 2 see 100 tokens: from a
// position 64 n, of blocks n - 1 and n - 2 something.
class Sliding : public testing::TestWithParam<const char*> {
 protected:
  Sliding() : writer_(Connect(uint64_t{8} << 20)) {}

  WatchedShard::Node Connect(uint64_t local_cache_bytes) {
    return shard_.Connect(GetParam(), local_cache_bytes, support::SlidingModel());
  }
  // Bytes of one layer of one block.
  uint64_t LayerBytes(const Cuts& cuts) const {
    return writer_.node->block_class().BytesOf(cuts) / 4;
  }
  // That a block holds exactly these rows of the whole one.
  void ExpectRows(const CachedBlock& block, const Portion& portion, const CachedBlock& whole) {
    const BlockClass& blocks = writer_.node->block_class();
    ASSERT_EQ(block.portion, portion);
    ASSERT_TRUE(block.complete());
    ASSERT_EQ(block.bytes.size(), blocks.BytesOf(portion));
    size_t at = 0;
    for (const kernels::PayloadRow& row : blocks.layout().rows()) {
      if (portion.scope == Scope::kGlobal && row.layer != 2) continue;
      if (row.cut >= portion.cuts.Of(row.kind)) continue;
      const auto from = whole.bytes.begin() + static_cast<ptrdiff_t>(row.offset);
      EXPECT_TRUE(std::equal(from, from + static_cast<ptrdiff_t>(row.length),
                             block.bytes.begin() + static_cast<ptrdiff_t>(at)));
      at += row.length;
    }
    EXPECT_EQ(at, block.bytes.size());
  }

  WatchedShard shard_;
  WatchedShard::Node writer_;
};
INSTANTIATE_TEST_SUITE_P(Codecs, Sliding, testing::Values("raw", "tile8", "tile4"),
                         [](const auto& codec) { return std::string(codec.param); });

TEST_P(Sliding, OnlyWhatWillBeAttendedIsFetched) {
  const SupplyJobPtr written = Supply(*writer_.node, Wire::kFull);
  for (const Wire wire : {Wire::kK4V4, Wire::kK8V4, Wire::kFull}) {
    SCOPED_TRACE(WireName(wire));
    WatchedShard::Node reader = Connect(0);
    const Cuts cuts = reader.node->block_class().CutsOf(wire);
    const Cuts full = reader.node->block_class().FullCuts();
    const uint64_t served = shard_.stats().payload_bytes_served;
    const SupplyJobPtr read = Supply(*reader.node, wire);
    EXPECT_EQ(reader.node->supply().stats().computed_blocks, 0u);
    for (size_t i = 0; i < kBlocks; ++i) {
      ExpectRows(*read->blocks[i], {i == 0 ? full : cuts, i < 3 ? Scope::kGlobal : Scope::kAll},
                 *written->blocks[i]);
    }
    // One layer of three blocks, the first in full, and all four of two.
    const uint64_t bytes = LayerBytes(full) + 10 * LayerBytes(cuts);
    EXPECT_EQ(reader.node->tier()->stats().fetched_bytes, bytes);
    EXPECT_EQ(reader.node->tier()->stats().fetched_blocks, kBlocks);
    EXPECT_EQ(reader.transport->counters().payload_bytes_received, bytes);
    EXPECT_EQ(shard_.stats().payload_bytes_served - served, bytes);
    EXPECT_EQ(reader.node->supply().stats().sliding_bytes_skipped,
              3 * LayerBytes(full) + 6 * LayerBytes(cuts));
    EXPECT_EQ(reader.node->supply().stats().sliding_bytes_fetched_later, 0u);
  }
}

TEST_P(Sliding, AShorterPrefixFetchesTheLayersThatItAttends) {
  const SupplyJobPtr written = Supply(*writer_.node, Wire::kFull);
  WatchedShard::Node reader = Connect(uint64_t{8} << 20);
  const Cuts cuts = reader.node->block_class().FullCuts();
  static_cast<void>(Supply(*reader.node, Wire::kFull));
  const TierStats& stats = reader.node->tier()->stats();
  EXPECT_EQ(stats.fetched_bytes, 11 * LayerBytes(cuts));
  // Blocks 1 and 2 lie in the window now, and only their sliding layers are not here.
  const SupplyJobPtr shorter = Supply(*reader.node, Wire::kFull, 3);
  EXPECT_EQ(shorter->local_hits, 1u);
  EXPECT_EQ(shorter->tier_hits, 2u);
  EXPECT_EQ(stats.fetched_bytes, (11 + 6) * LayerBytes(cuts));
  for (size_t i = 0; i < 3; ++i) {
    ExpectRows(*shorter->blocks[i], {cuts, i < 1 ? Scope::kGlobal : Scope::kAll},
               *written->blocks[i]);
  }
  // And now every window up to the end is here.
  for (size_t blocks = 3; blocks <= kBlocks; ++blocks) {
    EXPECT_EQ(Supply(*reader.node, Wire::kFull, blocks)->local_hits, blocks);
  }
  EXPECT_EQ(stats.fetched_bytes, (11 + 6) * LayerBytes(cuts));
  EXPECT_EQ(reader.node->supply().stats().sliding_bytes_skipped, 9 * LayerBytes(cuts));
  EXPECT_EQ(reader.node->supply().stats().sliding_bytes_fetched_later, 6 * LayerBytes(cuts));
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 0u);
  EXPECT_EQ(reader.node->cache().bytes(), (11 + 6) * LayerBytes(cuts));
}

TEST_P(Sliding, MoreLayersAndMoreCutsTogetherMoveWhatIsMissing) {
  const SupplyJobPtr written = Supply(*writer_.node, Wire::kFull);
  WatchedShard::Node reader = Connect(uint64_t{8} << 20);
  const BlockClass& blocks = reader.node->block_class();
  const Cuts low = blocks.CutsOf(Wire::kK4V4);
  const Cuts full = blocks.FullCuts();
  static_cast<void>(Supply(*reader.node, Wire::kK4V4));
  const SupplyJobPtr shorter = Supply(*reader.node, Wire::kFull, 3);
  for (size_t i = 0; i < 3; ++i) {
    ExpectRows(*shorter->blocks[i], {full, i < 1 ? Scope::kGlobal : Scope::kAll},
               *written->blocks[i]);
  }
  // Of three blocks one layer was here, of two of them at low bits.
  EXPECT_EQ(reader.node->tier()->stats().fetched_bytes,
            LayerBytes(full) + 10 * LayerBytes(low) + 8 * LayerBytes(full) - 2 * LayerBytes(low));
}

TEST_P(Sliding, WhatIsComputedSeesWhatItAttends) {
  const SupplyJobPtr written = Supply(*writer_.node, Wire::kFull, 3);
  WatchedShard::Node reader = Connect(0);
  const Cuts full = reader.node->block_class().FullCuts();
  const SupplyJobPtr read = Supply(*reader.node, Wire::kK4V4);
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 2u);
  // Block 3 is computed over all of blocks 1 and 2, and over the global layer of block 0.
  for (size_t i = 0; i < 3; ++i) {
    ExpectRows(*read->blocks[i], {full, i < 1 ? Scope::kGlobal : Scope::kAll}, *written->blocks[i]);
  }
  EXPECT_EQ(reader.node->tier()->stats().fetched_bytes, 9 * LayerBytes(full));
  NodeWorldOptions options;
  options.node.model = support::SlidingModel();
  options.node.codec = GetParam();
  options.shard_bytes = 4 << 20;
  NodeWorld alone(options);
  const SupplyJobPtr computed = Supply(alone.node(), Wire::kFull);
  for (size_t i = 3; i < kBlocks; ++i) {
    EXPECT_EQ(read->blocks[i]->bytes, computed->blocks[i]->bytes) << "what is put is whole";
  }
}

// A block that was evicted from the tier and put again by a node whose kernels give other bits: the
// two are never mixed.
TEST_P(Sliding, APartOfAnotherWritingIsNotBuiltUpon) {
  const SupplyJobPtr written = Supply(*writer_.node, Wire::kFull);
  WatchedShard::Node reader = Connect(uint64_t{8} << 20);
  const SupplyJobPtr first = Supply(*reader.node, Wire::kFull);
  auto other = std::make_shared<BlockManifest>(*first->blocks[1]->manifest);
  other->rows.front().checksum ^= 1;
  first->blocks[1]->manifest = other;
  const SupplyJobPtr shorter = Supply(*reader.node, Wire::kFull, 3);
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 1u);
  EXPECT_EQ(shorter->blocks[1]->bytes, written->blocks[1]->bytes);
  EXPECT_EQ(reader.node->tier()->stats().data_loss, 0u) << "the tier's bytes are right";
}

// The resume point moves down, and up again: answers are those of a node that computes everything.
TEST_P(Sliding, AnswersDoNotDependOnWhatWasLeftInTheTier) {
  static_cast<void>(Supply(*writer_.node, Wire::kFull));
  std::vector<Request> requests;
  const std::vector<int32_t> tokens = Tokens();
  for (const size_t length : {329, 200, 260, 140, 329}) {
    Request request;
    request.custom_id = std::to_string(requests.size());
    request.prompt_tokens.assign(tokens.begin(), tokens.begin() + static_cast<ptrdiff_t>(length));
    request.max_tokens = 70;
    requests.push_back(std::move(request));
  }
  NodeWorldOptions alone;
  alone.node.model = support::SlidingModel();
  alone.node.codec = GetParam();
  const std::vector<Answer> expected = NodeWorld(alone).Answer(requests);

  WatchedShard::Node reader = Connect(uint64_t{8} << 20);
  NodeRuntime& node = *reader.node;
  SchedulerOptions scheduling = node.MakeSchedulerOptions();
  scheduling.max_batch = 1;
  Scheduler scheduler(&node.block_class(), &node.supply(), node.tier(), nullptr, &node.decoder(),
                      &node.clock(), &node.domains(), scheduling);
  for (const Request& request : requests) scheduler.Submit(request);
  const TimePoint deadline = SteadyClock().Now() + std::chrono::seconds(60);
  while (!scheduler.idle() && SteadyClock().Now() < deadline) scheduler.Step();
  const std::vector<Answer> answers = scheduler.TakeAnswers();
  node.Drain();
  EXPECT_EQ(support::TextsOf(answers), support::TextsOf(expected));
  EXPECT_EQ(node.supply().stats().computed_blocks, 0u);
  // In the end every block was near an end: nothing was saved, and nothing was moved twice.
  EXPECT_GT(node.supply().stats().sliding_bytes_fetched_later, 0u);
  EXPECT_EQ(node.supply().stats().sliding_bytes_fetched_later,
            node.supply().stats().sliding_bytes_skipped);
  EXPECT_EQ(node.tier()->stats().fetched_bytes, kBlocks * node.block_class().payload_bytes());
}

TEST(AllSliding, OfBlocksBeforeTheWindowNothingIsMoved) {
  WatchedShard shard;
  WatchedShard::Node writer = shard.Connect("tile8", uint64_t{8} << 20, support::AllSlidingModel());
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  WatchedShard::Node reader = shard.Connect("tile8", uint64_t{8} << 20, support::AllSlidingModel());
  const SupplyJobPtr read = Supply(*reader.node, Wire::kFull);
  const uint64_t payload = reader.node->block_class().payload_bytes();
  for (size_t i = 0; i < kBlocks; ++i) {
    if (i < 3) {
      EXPECT_TRUE(read->blocks[i]->bytes.empty());
    } else {
      EXPECT_EQ(read->blocks[i]->bytes, written->blocks[i]->bytes);
    }
  }
  EXPECT_EQ(reader.node->tier()->stats().fetched_bytes, 2 * payload);
  EXPECT_EQ(reader.node->supply().stats().sliding_bytes_skipped, 3 * payload);
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 0u);
}

// Against the model's own word for each layer and position.
TEST(Scopes, AreWhatTheLayersSee) {
  for (const auto& path : {support::TinyModel(), support::SlidingModel()}) {
    NodeWorldOptions options;
    options.node.model = path;
    NodeWorld world(options);
    const BlockClass& blocks = world.node().block_class();
    const ModelConfig& config = blocks.model().config();
    for (size_t block = 0; block < 6; ++block) {
      for (size_t position = (block + 1) * 64; position < kTinyContext; ++position) {
        bool all = true;
        bool windowless = true;
        for (int layer = 0; layer < config.layers; ++layer) {
          const int last = static_cast<int>(block) * 64 + 63;
          const bool sees = last >= config.FirstVisible(layer, static_cast<int>(position));
          all = all && sees;
          windowless = windowless && (config.Window(layer) != 0 || sees);
        }
        EXPECT_TRUE(windowless);
        ASSERT_EQ(blocks.ScopeAttended(block, position), all ? Scope::kAll : Scope::kGlobal)
            << block << " from " << position;
      }
    }
  }
}

// Every portion out of every other: the rows of what is held and of what is missing, once each.
TEST(Portions, WhatIsHeldAndWhatIsMissingAreWhatIsWanted) {
  for (const char* codec : {"raw", "tile8", "tile4"}) {
    NodeWorldOptions options;
    options.node.model = support::SlidingModel();
    options.node.codec = codec;
    NodeWorld world(options);
    const BlockClass& blocks = world.node().block_class();
    const BlockManifest manifest =
        PlainManifest(blocks.attended(), {}, std::vector<std::byte>(blocks.payload_bytes()),
                      std::vector<float>(blocks.layout().rows().size()));
    std::vector<Portion> portions;
    for (int keys = 1; keys <= blocks.FullCuts().keys; ++keys) {
      for (int values = 1; values <= blocks.FullCuts().values; ++values) {
        for (const Scope scope : {Scope::kGlobal, Scope::kAll}) {
          portions.push_back({{keys, values}, scope});
        }
      }
    }
    for (const Portion& wanted : portions) {
      for (size_t i = 0; i <= portions.size(); ++i) {
        const Portion* held = i < portions.size() ? &portions[i] : nullptr;
        const std::vector<Selection> missing = blocks.Missing(held, wanted);
        uint64_t bytes = 0;
        for (const Selection& selection : missing) {
          ASSERT_TRUE(selection.Validate().ok());
          bytes += SelectedBytes(manifest, selection);
        }
        const uint64_t have = held == nullptr ? 0 : blocks.BytesOf(held->Meet(wanted));
        EXPECT_EQ(bytes, blocks.BytesOf(wanted) - have);
        EXPECT_EQ(missing.empty(), held != nullptr && held->Covers(wanted));
        for (const kernels::PayloadRow& row : blocks.layout().rows()) {
          const auto has = [&](const Portion& portion) {
            return row.cut < portion.cuts.Of(row.kind) &&
                   blocks.layout(portion.scope).Holds(row.layer);
          };
          const bool lacks = has(wanted) && !(held != nullptr && has(*held));
          const auto part = static_cast<uint8_t>(
              row.kind == kernels::SegmentKind::kKey ? Part::kKeys : Part::kValues);
          const auto takes =
              std::count_if(missing.begin(), missing.end(), [&](const Selection& selection) {
                return selection.Takes(part, static_cast<uint8_t>(row.cut),
                                       static_cast<uint16_t>(row.layer));
              });
          EXPECT_EQ(takes, lacks ? 1 : 0);
        }
      }
    }
  }
}

TEST(Domains, TenantsAreAloneUnlessPutTogether) {
  const std::vector<std::string> entries = {"shared=acme,zeta", "other=omega"};
  const auto domains = Domains::Parse(entries);
  ASSERT_TRUE(domains.ok());
  EXPECT_EQ(domains->DomainOf("acme"), domains->DomainOf("zeta"));
  EXPECT_NE(domains->DomainOf("acme"), domains->DomainOf("omega"));
  EXPECT_NE(domains->DomainOf("acme"), domains->DomainOf("shared")) << "a tenant of that name";
  EXPECT_NE(domains->DomainOf(""), domains->DomainOf("beta"));
  for (const std::string bad : {"acme", "=acme", "shared="}) {
    const auto parsed = Domains::Parse(std::vector<std::string>{bad});
    ASSERT_FALSE(parsed.ok());
    EXPECT_THAT(parsed.status().message(), HasSubstr(bad));
  }
}

TEST(Keys, DependOnDomainCodecSecretAndTokens) {
  NodeWorldOptions options;
  NodeWorld world(options);
  const BlockClass& blocks = world.node().block_class();
  const Model& model = world.node().model();
  std::vector<int32_t> tokens = Tokens();
  const std::vector<BlockKey> keys = blocks.Keys(tokens, "tenant/a");
  ASSERT_EQ(keys.size(), kBlocks) << "whole blocks only";
  EXPECT_EQ(keys, blocks.Keys(tokens, "tenant/a"));
  EXPECT_NE(keys[0], blocks.Keys(tokens, "tenant/b")[0]);
  EXPECT_NE(keys[0],
            BlockClass(&model, *kernels::FindCodec("tile4"), {}).Keys(tokens, "tenant/a")[0]);
  const std::vector<std::byte> secret(16, std::byte{1});
  EXPECT_NE(keys[0], BlockClass(&model, &blocks.codec(), secret).Keys(tokens, "tenant/a")[0]);
  tokens[kBlockTokens] += 1;
  const std::vector<BlockKey> others = blocks.Keys(tokens, "tenant/a");
  EXPECT_EQ(keys[0], others[0]);
  for (size_t i = 1; i < kBlocks; ++i) EXPECT_NE(keys[i], others[i]) << "chained";
}

TEST(Manifests, OfAnotherShapeAreRefused) {
  NodeWorld world{NodeWorldOptions()};
  const BlockClass& blocks = world.node().block_class();
  const std::vector<BlockKey> keys = blocks.Keys(Tokens(), "tenant/");
  const std::vector<std::byte> payload(blocks.payload_bytes());
  const std::vector<float> errors(blocks.layout().rows().size());
  const BlockManifest good = PlainManifest(blocks.attended(), keys[0], payload, errors);
  ASSERT_TRUE(good.Validate().ok());
  EXPECT_TRUE(blocks.CheckManifest(keys[0], good).ok());
  EXPECT_EQ(blocks.CheckManifest(keys[1], good).code(), StatusCode::kDataLoss);
  const auto refuses = [&](const std::function<void(BlockManifest*)>& spoil) {
    BlockManifest bad = good;
    spoil(&bad);
    return blocks.CheckManifest(keys[0], bad).code() == StatusCode::kDataLoss;
  };
  BlockManifest unread = good;
  unread.codec = 77;
  EXPECT_EQ(blocks.CheckManifest(keys[0], unread).code(), StatusCode::kUnsupported);
  EXPECT_TRUE(refuses([](BlockManifest* bad) { --bad->token_count; }));
  EXPECT_TRUE(refuses([](BlockManifest* bad) { bad->rows.pop_back(); }));
  EXPECT_TRUE(refuses([](BlockManifest* bad) { bad->rows.push_back(bad->rows[0]); }));
  for (size_t row = 0; row < good.rows.size(); ++row) {
    EXPECT_TRUE(refuses([&](BlockManifest* bad) { bad->rows[row].kind ^= 1; }));
    EXPECT_TRUE(refuses([&](BlockManifest* bad) { bad->rows[row].kind = 15; }));
    EXPECT_TRUE(refuses([&](BlockManifest* bad) { bad->rows[row].part ^= 1; }));
    EXPECT_TRUE(refuses([&](BlockManifest* bad) { bad->rows[row].cut ^= 1; }));
    EXPECT_TRUE(refuses([&](BlockManifest* bad) { bad->rows[row].layer ^= 1; }));
    EXPECT_TRUE(refuses([&](BlockManifest* bad) { ++bad->rows[row].length; }));
    EXPECT_TRUE(refuses([&](BlockManifest* bad) { ++bad->rows[row].offset; }));
  }
}

}  // namespace
}  // namespace kvant::node
