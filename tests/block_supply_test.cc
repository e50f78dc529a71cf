// What a block's class says of its bytes, and what of them is moved: a cut is a range of what is
// stored, never something computed.
#include "node/block_supply.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "cache_service/shard_server.h"
#include "node/block_class.h"
#include "tests/support/node_world.h"
#include "tests/support/random_requests.h"

namespace kvant::node {
namespace {

using support::NodeWorld;
using support::NodeWorldOptions;
using testing::HasSubstr;

constexpr size_t kBlocks = 5;

std::vector<int32_t> Tokens() {
  std::vector<int32_t> tokens(kBlocks * kBlockTokens + 9);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>('a' + i * i % 7);
  return tokens;
}

// A shard whose memory the test looks into, and nodes that share it.
class WatchedShard {
 public:
  WatchedShard() : memory_(4 << 20), transport_(hub_.MakeTransport()) {
    KV_CHECK(transport_->Listen("loopback:shard").ok());
    region_ = *transport_->Register(memory_);
    ShardServerOptions options;
    options.store.arena = memory_;
    server_ = std::make_unique<ShardServer>(options);
    pump_ = std::make_unique<ServerPump>(transport_.get(), server_.get());
  }
  struct Node {
    std::unique_ptr<Transport> transport;
    std::unique_ptr<NodeRuntime> node;
  };
  Node Connect(const std::string& codec, uint64_t local_cache_bytes) {
    Node made;
    made.transport = hub_.MakeTransport();
    NodeOptions options = NodeWorldOptions().node;
    options.model = support::TinyModel();
    options.codec = codec;
    options.local_cache_bytes = local_cache_bytes;
    made.node = *NodeRuntime::Create(options);
    const Status status = made.node->ConnectTier(
        made.transport.get(), *ShardMap::Make(kStaticEpoch, {Shard{"loopback:shard"}}),
        std::chrono::seconds(2), [this] { pump_->Turn(SteadyClock().Now()); });
    KV_CHECK(status.ok());
    made.node->Start(nullptr);
    // Else a tiny model is computed too fast for anything to be fetched.
    for (int i = 0; i < 100; ++i) made.node->planner().SawPrefill(1, std::chrono::hours(1));
    return made;
  }
  // Whole payloads as they lie in the shard's memory: where each begins.
  const std::byte* Find(std::span<const std::byte> payload) const {
    const auto found = std::search(memory_.begin(), memory_.end(), payload.begin(), payload.end());
    return found == memory_.end() ? nullptr : &*found;
  }
  ServerStats stats() const { return server_->stats(); }

 private:
  LoopbackHub hub_;
  std::vector<std::byte> memory_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<MemoryRegion> region_;
  std::unique_ptr<ShardServer> server_;
  std::unique_ptr<ServerPump> pump_;
};

SupplyJobPtr Supply(NodeRuntime& node, Wire wire, size_t blocks = kBlocks) {
  SupplyNeed need;
  need.tokens = Tokens();
  need.blocks = blocks;
  need.domain = "tenant/";
  need.wire = wire;
  const SupplyJobPtr job = node.supply().Start(std::move(need));
  const TimePoint deadline = SteadyClock().Now() + std::chrono::seconds(20);
  const auto all_complete = [&] {
    return std::all_of(job->blocks.begin(), job->blocks.end(),
                       [](const CachedBlockPtr& block) { return block && block->complete(); });
  };
  while (!all_complete()) {
    if (SteadyClock().Now() >= deadline) {
      ADD_FAILURE() << "the blocks do not come";
      break;
    }
    node.tier()->Poll();
    if (node.supply().Advance(job) == BlockSupply::Progress::kCompute) {
      EXPECT_TRUE(node.supply().ComputeNext(job).ok());
    }
  }
  node.Drain();
  return job;
}

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
    for (size_t i = 0; i < kBlocks; ++i) {
      const std::vector<std::byte>& whole = written->blocks[i]->bytes;
      ASSERT_EQ(read->blocks[i]->bytes.size(), blocks.BytesOf(cuts));
      EXPECT_TRUE(
          std::equal(read->blocks[i]->bytes.begin(), read->blocks[i]->bytes.end(), whole.begin()))
          << "block " << i << " is not a prefix of what is stored";
    }
    // Not a byte more than the cut, on either side of the wire.
    EXPECT_EQ(reader.node->tier()->stats().fetched_bytes, kBlocks * blocks.BytesOf(cuts));
    EXPECT_EQ(reader.transport->counters().payload_bytes_received, kBlocks * blocks.BytesOf(cuts));
    EXPECT_EQ(shard.stats().payload_bytes_served - served, kBlocks * blocks.BytesOf(cuts));
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

// A node that chose few bits for a fetch, then more: what it holds is fetched again, and what it
// attends never depends on where a block came from.
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
  const BlockManifest good = blocks.MakeManifest(keys[0], payload, errors);
  ASSERT_TRUE(good.Validate().ok());
  EXPECT_TRUE(blocks.CheckManifest(keys[0], good).ok());
  EXPECT_EQ(blocks.CheckManifest(keys[1], good).code(), StatusCode::kDataLoss);
  const auto refuses = [&](const std::function<void(BlockManifest*)>& spoil) {
    BlockManifest bad = good;
    spoil(&bad);
    return blocks.CheckManifest(keys[0], bad).code() == StatusCode::kDataLoss;
  };
  EXPECT_TRUE(refuses([](BlockManifest* bad) { ++bad->codec; }));
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
