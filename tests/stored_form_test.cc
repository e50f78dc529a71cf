// Blocks that stand in the tier in another form than the attended one: what is moved is what is
// stored, what is attended does not depend on it, and bad bytes are never attended.
#include "node/stored_form.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "base/random.h"
#include "node/block_arrival.h"
#include "tests/support/planes_form.h"
#include "tests/support/watched_shard.h"

namespace kvant::node {
namespace {

using support::FormNode;
using support::kWatchedBlocks;
using support::PlanesForm;
using support::Supply;
using support::WatchedNeed;
using support::WatchedShard;
using testing::HasSubstr;

constexpr uint64_t kRoom = uint64_t{8} << 20;

std::vector<UninitializedBytes> BytesOf(const SupplyJob& job) {
  std::vector<UninitializedBytes> bytes;
  for (const CachedBlockPtr& block : job.blocks) bytes.push_back(block->bytes);
  return bytes;
}

uint64_t StoredBytes(const SupplyJob& job) {
  uint64_t bytes = 0;
  for (const CachedBlockPtr& block : job.blocks) bytes += block->manifest->payload_bytes();
  return bytes;
}

TEST(Forms, AreNamedAndFitACodec) {
  const auto said = [](const char* store, const char* codec) {
    return CheckStoredForm(store, **kernels::FindCodec(codec)).message();
  };
  EXPECT_EQ(said("plain", "tile8"), "");
  EXPECT_EQ(said("lossless", "raw"), "");
  EXPECT_THAT(said("lossless", "raw-fp16"), HasSubstr("raw-fp16"));
  EXPECT_THAT(said("zip", "raw"), testing::AllOf(HasSubstr("zip"), HasSubstr("lossless")));
}

// The raw class of the sliding model, and a block of it.
class Lossless : public testing::Test {
 protected:
  Lossless() {
    NodeOptions options = support::NodeWorldOptions().node;
    options.model = support::SlidingModel();
    options.codec = "raw";
    options.store = "lossless";
    node_ = *NodeRuntime::Create(options);
    Random random(5);
    const kernels::PayloadLayout& layout = blocks().layout();
    payload_.resize(layout.total_bytes());
    std::vector<float> errors(layout.rows().size());
    std::vector<float> state(64 * 1024);
    for (int layer = 0; layer < layout.layers(); ++layer) {
      for (float& x : state) x = static_cast<float>(random.Below(2001)) / 1000 - 1;
      blocks().EncodeLayer(layer, state.data(), state.data() + 1, payload_.data(), errors.data());
    }
    key_ = blocks().Keys(support::WatchedTokens(), "tenant/")[0];
    BlockToStore block;
    block.key = key_;
    block.max_errors = errors;
    blocks().form().Encode(block, payload_, &stored_);
    plain_ = PlainManifest(blocks().attended(), key_, payload_, errors);
  }
  const BlockClass& blocks() const { return node_->block_class(); }
  // Reads a portion of a stored block as a fetch brings it.
  Status Read(const BlockManifest& manifest, std::span<const std::byte> bytes,
              const Portion& portion, CachedBlockPtr* out) const {
    *out = std::make_shared<CachedBlock>(blocks(), key_, portion);
    BlockArrival arrival(&blocks(), *out, {}, 0);
    KV_RETURN_IF_ERROR(arrival.Accept(std::make_shared<const BlockManifest>(manifest)));
    for (const Selection& selection : blocks().Missing(nullptr, portion)) {
      const std::vector<SelectedRow> rows = SelectRows(manifest, selection);
      std::vector<std::byte> packed(SelectedBytes(manifest, selection));
      for (const SelectedRow& row : rows) {
        const ManifestRow& from = manifest.rows[row.row];
        std::copy_n(bytes.begin() + static_cast<ptrdiff_t>(from.offset), from.length,
                    packed.begin() + static_cast<ptrdiff_t>(row.packed_offset));
      }
      for (uint16_t layer = manifest.LayerEnd(); layer-- > 0;) {
        if (portion.scope == Scope::kGlobal && layer != 2) continue;
        uint64_t taken = 0;
        KV_RETURN_IF_ERROR(arrival.TakeLayer(layer, rows, packed.data(), &taken));
        EXPECT_GT(taken, 0u);
      }
    }
    return arrival.DecodeWhole();
  }

  std::unique_ptr<NodeRuntime> node_;
  BlockKey key_;
  UninitializedBytes payload_;
  StoredBlock stored_;
  BlockManifest plain_;
};

TEST_F(Lossless, IsShorterAndTheSameToTheBit) {
  ASSERT_TRUE(stored_.manifest.Validate().ok());
  ASSERT_TRUE(blocks().CheckManifest(key_, stored_.manifest).ok());
  EXPECT_EQ(stored_.manifest.payload_bytes(), stored_.bytes.size());
  EXPECT_LT(stored_.bytes.size(), payload_.size() * 9 / 10);
  for (size_t i = 0; i < plain_.rows.size(); ++i) {
    EXPECT_EQ(stored_.manifest.rows[i].declared_error, plain_.rows[i].declared_error);
  }
  CachedBlockPtr whole;
  ASSERT_TRUE(Read(stored_.manifest, stored_.bytes, blocks().FullCuts(), &whole).ok());
  EXPECT_TRUE(whole->complete());
  EXPECT_EQ(whole->bytes, payload_);
  EXPECT_EQ(whole->memory_bytes(), payload_.size()) << "what is stored is not kept";
  CachedBlockPtr global;
  const Portion of_global(blocks().FullCuts(), Scope::kGlobal);
  ASSERT_TRUE(Read(stored_.manifest, stored_.bytes, of_global, &global).ok());
  EXPECT_TRUE(global->complete());
  EXPECT_EQ(global->bytes.size() * 4, payload_.size());
  CachedBlockPtr plain;
  ASSERT_TRUE(Read(plain_, payload_, blocks().FullCuts(), &plain).ok());
  EXPECT_EQ(plain->bytes, payload_) << "a plain block is read by the same class";
}

TEST_F(Lossless, SizesAreBoundedByWhatALookupSays) {
  const CutEnds ends = stored_.manifest.EndsOfCuts();
  EXPECT_EQ(blocks().MostBytes(SelectAll(), ends), stored_.bytes.size());
  EXPECT_EQ(blocks().LikelyBytes(SelectAll(), ends), stored_.bytes.size());
  EXPECT_GE(blocks().MostBytes(SelectAll(), {}), payload_.size());
  const Portion global(blocks().FullCuts(), Scope::kGlobal);
  const Selection selection = blocks().Missing(nullptr, global).front();
  const uint64_t exact = SelectedBytes(stored_.manifest, selection);
  EXPECT_GE(blocks().MostBytes(selection, ends), exact);
  EXPECT_NEAR(static_cast<double>(blocks().LikelyBytes(selection, ends)),
              static_cast<double>(exact), static_cast<double>(exact) / 10);
  LookupBlock found;
  found.state = LookupState::kPresent;
  found.cuts = stored_.manifest.CutsAvailable();
  for (const uint64_t bytes : {stored_.bytes.size(), payload_.size()}) {
    found.payload_bytes = bytes;
    EXPECT_TRUE(blocks().MayBe(found));
  }
  found.payload_bytes = 2 * payload_.size();
  EXPECT_FALSE(blocks().MayBe(found));
}

// Bytes whose checksums are right and that nobody wrote honestly.
TEST_F(Lossless, HostileBytesAreReadOrRefusedAndNeverCrash) {
  Random random(11);
  size_t refused = 0;
  for (int round = 0; round < 2000; ++round) {
    StoredBlock bad;
    bad.manifest = stored_.manifest;
    bad.manifest.rows.clear();
    const size_t victim = random.Below(stored_.manifest.rows.size());
    for (size_t i = 0; i < stored_.manifest.rows.size(); ++i) {
      const ManifestRow& row = stored_.manifest.rows[i];
      const auto from = stored_.bytes.begin() + static_cast<ptrdiff_t>(row.offset);
      std::vector<std::byte> bytes(from, from + row.length);
      if (i == victim) {
        for (uint64_t flips = 1 + random.Below(3); flips > 0; --flips) {
          // Headers and tables are at the front.
          const size_t at = random.Below(random.Chance(0.7) ? 40 : bytes.size());
          bytes[at] = static_cast<std::byte>(random.Next());
        }
        if (random.Chance(0.3)) bytes.resize(1 + random.Below(bytes.size()));
      }
      bad.manifest.Append(row.part, row.cut, row.layer, row.kind, bytes, row.declared_error);
      bad.bytes.insert(bad.bytes.end(), bytes.begin(), bytes.end());
    }
    CachedBlockPtr block;
    const Status status = Read(bad.manifest, bad.bytes, blocks().FullCuts(), &block);
    EXPECT_EQ(status.ok(), block->complete());
    if (status.ok()) continue;
    ++refused;
    ASSERT_EQ(status.code(), StatusCode::kDataLoss) << status.ToString();
  }
  EXPECT_GT(refused, 500u);
}

TEST(LosslessTier, EitherFormIsReadByEitherReader) {
  uint64_t stored[2] = {};
  std::vector<UninitializedBytes> computed;
  for (const std::string written_as : {"plain", "lossless"}) {
    WatchedShard shard;
    WatchedShard::Node writer = shard.Connect("raw", kRoom, support::TinyModel(), written_as);
    const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
    EXPECT_EQ(writer.node->supply().stats().computed_blocks, kWatchedBlocks);
    if (computed.empty()) computed = BytesOf(*written);
    EXPECT_EQ(BytesOf(*written), computed) << "a form is no part of the class";
    const uint64_t bytes = StoredBytes(*written);
    stored[written_as == "lossless" ? 1 : 0] = bytes;
    EXPECT_EQ(shard.stats().store.payload_bytes, bytes);
    for (const std::string read_as : {"plain", "lossless"}) {
      SCOPED_TRACE(written_as + ", read by a node that writes " + read_as);
      WatchedShard::Node reader = shard.Connect("raw", kRoom, support::TinyModel(), read_as);
      const uint64_t served = shard.stats().payload_bytes_served;
      const SupplyJobPtr read = Supply(*reader.node, Wire::kFull);
      EXPECT_EQ(reader.node->supply().stats().computed_blocks, 0u);
      EXPECT_EQ(BytesOf(*read), computed);
      EXPECT_EQ(reader.node->tier()->stats().fetched_bytes, bytes);
      EXPECT_EQ(reader.transport->counters().payload_bytes_received, bytes);
      EXPECT_EQ(shard.stats().payload_bytes_served - served, bytes);
    }
  }
  EXPECT_LT(stored[1], stored[0] * 9 / 10);
}

TEST(LosslessTier, AShorterPrefixFetchesTheLayersThatItAttends) {
  WatchedShard shard;
  WatchedShard::Node writer = shard.Connect("raw", kRoom, support::SlidingModel(), "lossless");
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  WatchedShard::Node reader = shard.Connect("raw", kRoom, support::SlidingModel(), "lossless");
  const BlockClass& blocks = reader.node->block_class();
  const auto bytes_of = [&](size_t block, Scope scope) {
    uint64_t bytes = 0;
    for (const Selection& selection : blocks.Missing(nullptr, {blocks.FullCuts(), scope})) {
      bytes += SelectedBytes(*written->blocks[block]->manifest, selection);
    }
    return bytes;
  };
  static_cast<void>(Supply(*reader.node, Wire::kFull));
  uint64_t skipped = 0;
  for (size_t i = 0; i < 3; ++i) {
    skipped += bytes_of(i, Scope::kAll) - bytes_of(i, Scope::kGlobal);
  }
  const TierStats& stats = reader.node->tier()->stats();
  EXPECT_EQ(stats.fetched_bytes, StoredBytes(*written) - skipped);
  EXPECT_EQ(reader.node->supply().stats().sliding_bytes_skipped, skipped);

  const SupplyJobPtr shorter = Supply(*reader.node, Wire::kFull, 2);
  EXPECT_EQ(shorter->blocks[0]->bytes, written->blocks[0]->bytes);
  EXPECT_EQ(shorter->blocks[1]->bytes, written->blocks[1]->bytes);
  const uint64_t later = bytes_of(0, Scope::kAll) - bytes_of(0, Scope::kGlobal) +
                         bytes_of(1, Scope::kAll) - bytes_of(1, Scope::kGlobal);
  EXPECT_EQ(stats.fetched_bytes, StoredBytes(*written) - skipped + later) << "no byte moves twice";
  EXPECT_EQ(reader.node->supply().stats().sliding_bytes_fetched_later, later);
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 0u);
}

TEST(LosslessTier, ABadByteIsRefusedAndRecomputedAndPublishedAgain) {
  WatchedShard shard;
  WatchedShard::Node writer = shard.Connect("raw", kRoom, support::TinyModel(), "lossless");
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  StoredBlock stored;
  BlockToStore again;
  again.key = written->blocks[3]->key;
  const std::vector<float> errors(written->blocks[3]->manifest->rows.size());
  again.max_errors = errors;
  writer.node->block_class().form().Encode(again, written->blocks[3]->bytes, &stored);
  std::byte* const place = shard.Find(stored.bytes);
  ASSERT_NE(place, nullptr);
  place[stored.bytes.size() / 2] ^= std::byte{4};

  WatchedShard::Node reader = shard.Connect("raw", 0, support::TinyModel(), "lossless");
  const SupplyJobPtr read = Supply(*reader.node, Wire::kFull);
  EXPECT_EQ(BytesOf(*read), BytesOf(*written));
  EXPECT_EQ(reader.node->tier()->stats().data_loss, 1u);
  EXPECT_GE(reader.node->supply().stats().computed_blocks, 1u);
  shard.Turn();
  EXPECT_EQ(shard.stats().data_loss, 1u) << "it was reported, and dropped";

  // Whoever has blocks in memory can publish them, encoded once more.
  SupplyNeed need = WatchedNeed(Wire::kFull);
  size_t published = 0;
  need.publish.resize(kWatchedBlocks);
  std::iota(need.publish.begin(), need.publish.end(), size_t{0});
  need.published = [&](size_t, const Status& status) {
    EXPECT_TRUE(status.ok()) << status.ToString();
    ++published;
  };
  const SupplyJobPtr job = writer.node->supply().Start(std::move(need));
  support::Complete(&writer.node->supply(), writer.node->tier(), job);
  writer.node->Drain();
  EXPECT_EQ(published, kWatchedBlocks);
  EXPECT_EQ(shard.store().Find(written->blocks[3]->key), BlockState::kPresent);
}

// Under keys of this class stands what this node has no pack for.
TEST(Unread, FormsAreNotThere) {
  WatchedShard shard;
  WatchedShard::Node writer = shard.Connect("raw", 0, support::TinyModel(), "plain");
  const BlockClass& blocks = writer.node->block_class();
  const std::vector<BlockKey> keys = blocks.Keys(support::WatchedTokens(), "tenant/");
  const std::vector<std::byte> payload(blocks.payload_bytes());
  const std::vector<float> errors(blocks.layout().rows().size());
  for (size_t i = 0; i < kWatchedBlocks; ++i) {
    BlockManifest manifest = PlainManifest(blocks.attended(), keys[i], payload, errors);
    manifest.codec = static_cast<uint32_t>(FormTag::kKlt);
    manifest.basis = Digest{std::byte{1}};
    const TierLink::PutId put =
        writer.node->tier()->BeginPut(keys[i], {}, RunOf(keys, i), payload.size());
    ASSERT_NE(put, 0u);
    writer.node->tier()->PutAll(put, payload);
    Status sealed = Unavailable("not yet");
    writer.node->tier()->SealPut(put, manifest, [&](const Status& status) { sealed = status; });
    writer.node->Drain();
    ASSERT_TRUE(sealed.ok()) << sealed.ToString();
  }
  WatchedShard empty;
  WatchedShard::Node elsewhere = empty.Connect("raw", kRoom);
  const SupplyJobPtr read = Supply(*writer.node, Wire::kFull);
  EXPECT_EQ(BytesOf(*read), BytesOf(*Supply(*elsewhere.node, Wire::kFull)));
  EXPECT_EQ(writer.node->supply().stats().computed_blocks, kWatchedBlocks);
  EXPECT_EQ(writer.node->tier()->stats().unread_blocks, kWatchedBlocks);
  EXPECT_EQ(writer.node->tier()->stats().data_loss, 0u);
  EXPECT_EQ(shard.stats().store.blocks, kWatchedBlocks) << "others may read them";
}

// A lossy form, as a codec pack makes one: groups of layers in another order than the model's, cuts
// that give less exact payloads, side information.
class Lossy : public testing::TestWithParam<bool> {
 protected:
  // Whether the model has sliding layers.
  static std::filesystem::path Model() {
    return GetParam() ? support::SlidingModel() : support::TinyModel();
  }
  FormNode Node(uint64_t local_cache_bytes = kRoom) {
    return FormNode(Model(), "tile8", &shard_, local_cache_bytes);
  }
  // What of a stored block a portion has.
  static uint64_t Bytes(const FormNode& node, const CachedBlock& whole, const Portion& portion) {
    uint64_t bytes = 0;
    for (const Selection& selection : node.block_class().Missing(nullptr, portion)) {
      bytes += SelectedBytes(*whole.manifest, selection);
    }
    return bytes;
  }
  WatchedShard shard_;
};
INSTANTIATE_TEST_SUITE_P(Models, Lossy, testing::Bool(),
                         [](const auto& sliding) { return sliding.param ? "Sliding" : "Global"; });

TEST_P(Lossy, AHitEqualsAMiss) {
  FormNode alone(Model(), "tile8", nullptr, kRoom);
  const SupplyJobPtr computed = alone.Supply(Wire::kFull);
  FormNode writer = Node();
  EXPECT_EQ(BytesOf(*writer.Supply(Wire::kFull)), BytesOf(*computed));
  FormNode reader = Node();
  // Prefixes that grow, so that each block is read whole once.
  for (size_t blocks = 1; blocks <= kWatchedBlocks; ++blocks) {
    const SupplyJobPtr read = reader.Supply(Wire::kFull, blocks);
    EXPECT_EQ(read->blocks.back()->bytes, computed->blocks[blocks - 1]->bytes);
  }
  EXPECT_EQ(reader.supply().stats().computed_blocks, 0u);
  EXPECT_EQ(reader.tier()->stats().fetched_bytes, StoredBytes(*computed));
}

TEST_P(Lossy, MoreOfABlockBuildsUponItsStoredRows) {
  FormNode writer = Node();
  const SupplyJobPtr written = writer.Supply(Wire::kFull);
  FormNode reader = Node();
  const Cuts one = reader.block_class().CutsOf(Wire::kK4V4);
  ASSERT_EQ(one.values, 1);
  const SupplyJobPtr less = reader.Supply(Wire::kK4V4);
  uint64_t moved = 0;
  for (size_t i = 0; i < kWatchedBlocks; ++i) {
    const Scope scope = GetParam() && i < 3 ? Scope::kGlobal : Scope::kAll;
    ASSERT_EQ(less->blocks[i]->portion, Portion(one, scope));
    ASSERT_EQ(less->blocks[i]->bytes.size(),
              reader.block_class().attended().layout(scope).total_bytes())
        << "a whole payload";
    moved += Bytes(reader, *written->blocks[i], less->blocks[i]->portion);
  }
  EXPECT_EQ(reader.tier()->stats().fetched_bytes, moved);
  EXPECT_NE(less->blocks[4]->bytes, written->blocks[4]->bytes);
  // The writer has all of it in memory, and attends the same at fewer cuts.
  FormNode same(Model(), "tile8", nullptr, kRoom);
  static_cast<void>(same.Supply(Wire::kFull));
  const SupplyJobPtr from_memory = same.Supply(Wire::kK4V4);
  EXPECT_EQ(from_memory->blocks[4]->bytes, less->blocks[4]->bytes);
  EXPECT_EQ(same.supply().stats().computed_blocks, kWatchedBlocks);

  for (size_t blocks = 1; blocks <= kWatchedBlocks; ++blocks) {
    const SupplyJobPtr more = reader.Supply(Wire::kFull, blocks);
    EXPECT_EQ(more->blocks.back()->bytes, written->blocks[blocks - 1]->bytes);
  }
  EXPECT_EQ(reader.tier()->stats().fetched_bytes, StoredBytes(*written)) << "no byte moves twice";
  EXPECT_EQ(reader.supply().stats().computed_blocks, 0u);
  EXPECT_EQ(reader.Supply(Wire::kFull)->local_hits, kWatchedBlocks);
  EXPECT_EQ(reader.cache().bytes(),
            StoredBytes(*written) + kWatchedBlocks * reader.block_class().payload_bytes());
}

TEST_P(Lossy, IsAClassOfItsOwn) {
  FormNode node = Node();
  const BlockClass plain(&node.model(), &node.block_class().codec(), {});
  EXPECT_NE(plain.Keys(support::WatchedTokens(), "tenant/")[0],
            node.block_class().Keys(support::WatchedTokens(), "tenant/")[0]);
  const SupplyJobPtr written = node.Supply(Wire::kFull);
  EXPECT_EQ(plain.CheckManifest(written->keys[0], *written->blocks[0]->manifest).code(),
            StatusCode::kUnsupported);
  BlockManifest other_pack = *written->blocks[0]->manifest;
  other_pack.basis = Digest{std::byte{9}};
  const Status status = node.block_class().CheckManifest(written->keys[0], other_pack);
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_THAT(status.message(), HasSubstr("codec pack"));
}

}  // namespace
}  // namespace kvant::node
