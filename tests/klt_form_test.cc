// Blocks of a codec pack that are refined to exact bf16: with all cuts they are the class of codec
// `raw`, with fewer a less exact payload, and a wrong byte is never attended.
#include "node/klt_form.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "base/random.h"
#include "kernels/blas.h"
#include "kernels/raw_codec.h"
#include "node/block_arrival.h"
#include "tests/support/random_klt_pack.h"
#include "tests/support/random_model.h"
#include "tests/support/watched_shard.h"

namespace kvant::node {
namespace {

using support::kWatchedBlocks;
using support::Supply;
using support::WatchedShard;
using testing::HasSubstr;

constexpr uint64_t kRoom = uint64_t{8} << 20;
constexpr const char* kCuts = "coarse,fine,finest,exact";
constexpr int kAllCuts = 4;

// A class of a model, and a block of it.
class KltExactForm : public testing::TestWithParam<const char*> {
 protected:
  KltExactForm() {
    EXPECT_TRUE(kernels::LoadBlas().ok());
    const std::string kind = GetParam();
    support::RandomModelOptions options;
    options.config = kind == "heads"     ? support::TinyConfig()
                     : kind == "sliding" ? support::TinySlidingConfig()
                                         : support::TinyLatentConfig();
    EXPECT_TRUE(support::WriteRandomModel(directory_.path(), options).ok());
    model_ = *Model::Load(directory_.path());
    pack_ = std::make_shared<const KltPack>(support::RandomKltPack(*model_, &random_));
    const AttendedPayload attended(kernels::kRawBf16Codec, model_->config());
    blocks_ = std::make_unique<BlockClass>(model_.get(), &kernels::kRawBf16Codec,
                                           std::span<const std::byte>(),
                                           *MakeKltForm(model_.get(), pack_, kCuts, {}, attended));
    Make(0);
  }
  // Sets payload_ and stored_ to a block of random numbers.
  void Make(int position) {
    position_ = position;
    const support::KltBlock block = support::RandomKltBlock(*model_, 1, &random_);
    tokens_ = block.tokens;
    const kernels::PayloadLayout& layout = blocks_->layout();
    payload_.assign(layout.total_bytes(), {});
    std::vector<std::vector<float>> keys;
    std::vector<std::vector<float>> values;
    const auto floats = [](const kernels::SegmentShape& shape) {
      return std::vector<float>(
          static_cast<size_t>(shape.tokens * shape.kv_heads * shape.head_dim));
    };
    for (int layer = 0; layer < layout.layers(); ++layer) {
      keys.push_back(floats(layout.shape().keys));
      values.push_back(floats(layout.shape().values));
      ScatterState(*model_, layer, position, kBlockTokens,
                   block.rows[static_cast<size_t>(layer)].data(), keys.back().data(),
                   values.back().data());
      blocks_->EncodeLayer(layer, keys.back().data(), values.back().data(), payload_.data(),
                           nullptr);
    }
    BlockToStore whole;
    whole.key = blocks_->Keys(tokens_, "tenant/").front();
    whole.tokens = tokens_;
    whole.position = position;
    whole.keys = keys;
    whole.values = values;
    const UninitializedBytes before = payload_;
    blocks_->form().Encode(whole, payload_, &stored_);
    EXPECT_EQ(payload_, before) << "what is attended was there before";
  }
  // Reads a portion of a stored block as a fetch brings it.
  Status Read(const StoredBlock& block, const Portion& portion, CachedBlockPtr* out) const {
    *out = std::make_shared<CachedBlock>(*blocks_, block.manifest.key, portion);
    BlockArrival arrival(blocks_.get(), *out, tokens_, position_);
    KV_RETURN_IF_ERROR(arrival.Accept(std::make_shared<const BlockManifest>(block.manifest)));
    for (const Selection& selection : blocks_->Missing(nullptr, portion)) {
      const std::vector<SelectedRow> rows = SelectRows(block.manifest, selection);
      std::vector<std::byte> packed(SelectedBytes(block.manifest, selection));
      for (const SelectedRow& row : rows) {
        const ManifestRow& from = block.manifest.rows[row.row];
        std::copy_n(block.bytes.begin() + static_cast<ptrdiff_t>(from.offset), from.length,
                    packed.begin() + static_cast<ptrdiff_t>(row.packed_offset));
      }
      for (uint16_t group = block.manifest.LayerEnd(); group-- > 0;) {
        if (portion.scope == Scope::kGlobal && !pack_->transforms[0].groups[group].global) continue;
        uint64_t taken = 0;
        KV_RETURN_IF_ERROR(arrival.TakeLayer(group, rows, packed.data(), &taken));
        KV_RETURN_IF_ERROR(arrival.DecodeWhole());
      }
    }
    return OkStatus();
  }

  support::TemporaryDirectory directory_;
  Random random_{31};
  std::unique_ptr<Model> model_;
  std::shared_ptr<const KltPack> pack_;
  std::unique_ptr<BlockClass> blocks_;
  int position_ = 0;
  std::vector<int32_t> tokens_;
  UninitializedBytes payload_;
  StoredBlock stored_;
};
INSTANTIATE_TEST_SUITE_P(Models, KltExactForm, testing::Values("heads", "sliding", "latent"),
                         [](const auto& model) { return std::string(model.param); });

TEST_P(KltExactForm, AllCutsAreThePayloadOfRaw) {
  const BlockClass plain(model_.get(), &kernels::kRawBf16Codec, {});
  EXPECT_EQ(plain.Keys(tokens_, "tenant/"), blocks_->Keys(tokens_, "tenant/"));
  for (const int position : {0, kBlockTokens}) {
    Make(position);
    ASSERT_TRUE(stored_.manifest.Validate().ok());
    ASSERT_TRUE(blocks_->CheckManifest(stored_.manifest.key, stored_.manifest).ok());
    EXPECT_EQ(plain.CheckManifest(stored_.manifest.key, stored_.manifest).code(),
              StatusCode::kUnsupported)
        << "as if it were not there";
    std::vector<UninitializedBytes> of_cuts;
    for (int cuts = 1; cuts <= kAllCuts; ++cuts) {
      CachedBlockPtr block;
      ASSERT_TRUE(Read(stored_, Cuts{cuts, cuts}, &block).ok());
      EXPECT_TRUE(block->complete());
      EXPECT_EQ(block->bytes.size(), payload_.size());
      EXPECT_EQ(block->bytes == payload_, cuts == kAllCuts) << cuts;
      of_cuts.push_back(block->bytes);
    }
    // Less of what is here is what would have been fetched.
    CachedBlockPtr whole;
    ASSERT_TRUE(Read(stored_, blocks_->FullCuts(), &whole).ok());
    for (int cuts = 1; cuts < kAllCuts; ++cuts) {
      const CachedBlockPtr less = ReadLess(*blocks_, *whole, Cuts{cuts, cuts}, tokens_, position);
      ASSERT_NE(less, nullptr);
      EXPECT_EQ(less->bytes, of_cuts[static_cast<size_t>(cuts) - 1]);
    }
    const Portion global(blocks_->FullCuts(), Scope::kGlobal);
    CachedBlockPtr of_global;
    ASSERT_TRUE(Read(stored_, global, &of_global).ok());
    EXPECT_TRUE(of_global->complete());
    const kernels::PayloadLayout& layout = blocks_->layout(Scope::kGlobal);
    for (const kernels::PayloadRow& row : layout.rows()) {
      const auto from =
          payload_.begin() +
          static_cast<ptrdiff_t>(blocks_->layout().Row(row.kind, row.cut, row.layer).offset);
      EXPECT_TRUE(std::equal(from, from + static_cast<ptrdiff_t>(row.length),
                             of_global->bytes.begin() + static_cast<ptrdiff_t>(row.offset)));
    }
  }
}

// Bytes whose checksums are right and that nobody wrote honestly.
TEST_P(KltExactForm, HostileBytesAreRefusedOrThePayload) {
  size_t refused = 0;
  for (int round = 0; round < 300; ++round) {
    StoredBlock bad;
    bad.manifest = stored_.manifest;
    bad.manifest.rows.clear();
    const size_t victim = random_.Below(stored_.manifest.rows.size());
    for (size_t i = 0; i < stored_.manifest.rows.size(); ++i) {
      const ManifestRow& row = stored_.manifest.rows[i];
      const auto from = stored_.bytes.begin() + static_cast<ptrdiff_t>(row.offset);
      std::vector<std::byte> bytes(from, from + row.length);
      if (i == victim)
        bytes[random_.Below(bytes.size())] ^= static_cast<std::byte>(1 + random_.Below(255));
      bad.manifest.Append(row.part, row.cut, row.layer, row.kind, bytes, row.declared_error);
      bad.bytes.insert(bad.bytes.end(), bytes.begin(), bytes.end());
    }
    CachedBlockPtr block;
    const Status status = Read(bad, blocks_->FullCuts(), &block);
    EXPECT_EQ(status.ok(), block->complete());
    if (status.ok()) {
      // A channel's scale that is not read, or what is rounded away.
      EXPECT_EQ(block->bytes, payload_);
      continue;
    }
    ++refused;
    ASSERT_EQ(status.code(), StatusCode::kDataLoss) << status.ToString();
  }
  EXPECT_GT(refused, 290u);
}

TEST_P(KltExactForm, IsAskedForWhereItCanBeHad) {
  const AttendedPayload raw(kernels::kRawBf16Codec, model_->config());
  const auto said = [&](const char* cuts, const AttendedPayload& attended) {
    return MakeKltForm(model_.get(), pack_, cuts, {}, attended).status().message();
  };
  EXPECT_EQ(said("medium,exact", raw), "") << "any cut alone can be refined";
  EXPECT_THAT(said("exact", raw), HasSubstr("coarse,fine,finest"));
  EXPECT_THAT(said("exact,coarse", raw), HasSubstr("exact"));
  EXPECT_THAT(said("fine,coarse,exact", raw), HasSubstr("coarse,fine,finest"));
  EXPECT_THAT(said("fine,exact", AttendedPayload(**kernels::FindCodec("tile8"), model_->config())),
              HasSubstr("--codec raw"));
}

std::vector<UninitializedBytes> BytesOf(const SupplyJob& job) {
  std::vector<UninitializedBytes> bytes;
  for (const CachedBlockPtr& block : job.blocks) bytes.push_back(block->bytes);
  return bytes;
}

class KltExactTier : public testing::TestWithParam<bool> {
 protected:
  // Whether the model has sliding layers.
  static const std::filesystem::path& Model() {
    return GetParam() ? support::SlidingModel() : support::TinyModel();
  }
  static NodeOptions Options(const char* cuts) {
    NodeOptions options = support::NodeWorldOptions().node;
    options.model = Model();
    options.codec = "raw";
    options.store = "klt";
    options.pack = support::KltPackOf(Model());
    options.cuts = cuts;
    options.local_cache_bytes = kRoom;
    return options;
  }
  static WatchedShard::Node Node(WatchedShard* shard, const char* cuts = kCuts) {
    return shard->Connect(Options(cuts));
  }
  // What `raw` stored plain computes.
  static std::vector<UninitializedBytes> Computed() {
    WatchedShard shard;
    const WatchedShard::Node node = shard.Connect("raw", kRoom, Model());
    return BytesOf(*Supply(*node.node, Wire::kFull));
  }
  WatchedShard shard_;
};
INSTANTIATE_TEST_SUITE_P(Models, KltExactTier, testing::Bool(),
                         [](const auto& sliding) { return sliding.param ? "Sliding" : "Global"; });

TEST_P(KltExactTier, IsRawStoredAnotherWay) {
  const std::vector<UninitializedBytes> computed = Computed();
  const WatchedShard::Node writer = Node(&shard_);
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  EXPECT_EQ(BytesOf(*written), computed);
  const WatchedShard::Node reader = Node(&shard_);
  for (size_t blocks = 1; blocks <= kWatchedBlocks; ++blocks) {
    EXPECT_EQ(Supply(*reader.node, Wire::kFull, blocks)->blocks.back()->bytes,
              computed[blocks - 1]);
  }
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 0u);
  // Who has no pack computes the same under the same keys.
  const WatchedShard::Node plain = shard_.Connect("raw", kRoom, Model());
  const SupplyJobPtr without = Supply(*plain.node, Wire::kFull);
  EXPECT_EQ(without->keys, written->keys);
  EXPECT_EQ(BytesOf(*without), computed);
  EXPECT_EQ(plain.node->tier()->stats().data_loss, 0u);
}

TEST_P(KltExactTier, FewerCutsAreReadAndRefined) {
  const WatchedShard::Node writer = Node(&shard_);
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  const WatchedShard::Node reader = Node(&shard_);
  const SupplyJobPtr coarse = Supply(*reader.node, Wire::kCut1);
  EXPECT_EQ(coarse->blocks[4]->portion.cuts, (Cuts{1, 1}));
  EXPECT_NE(coarse->blocks[4]->bytes, written->blocks[4]->bytes);
  EXPECT_LT(reader.node->tier()->stats().fetched_bytes,
            kWatchedBlocks * written->blocks[4]->manifest->EndsOfCuts()[0] * 3 / 2);
  // Who computed it attends the same at this cut, and so does who has no tier.
  const SupplyJobPtr own = Supply(*writer.node, Wire::kCut1);
  EXPECT_EQ(own->blocks[4]->bytes, coarse->blocks[4]->bytes);
  EXPECT_EQ(writer.node->supply().stats().computed_blocks, kWatchedBlocks);
  const std::unique_ptr<NodeRuntime> alone = *NodeRuntime::Create(Options(kCuts));
  alone->Start(nullptr);
  const SupplyJobPtr computed = Supply(*alone, Wire::kCut1);
  EXPECT_EQ(alone->supply().Advance(computed), BlockSupply::Progress::kReady);
  EXPECT_EQ(computed->blocks[4]->bytes, coarse->blocks[4]->bytes);

  uint64_t stored = 0;
  for (size_t blocks = 1; blocks <= kWatchedBlocks; ++blocks) {
    const SupplyJobPtr more = Supply(*reader.node, Wire::kFull, blocks);
    EXPECT_EQ(more->blocks.back()->bytes, written->blocks[blocks - 1]->bytes);
    stored += more->blocks.back()->manifest->payload_bytes();
  }
  EXPECT_EQ(reader.node->tier()->stats().fetched_bytes, stored) << "no byte moves twice";
}

TEST_P(KltExactTier, PrefillAttendsAllCuts) {
  const std::vector<UninitializedBytes> computed = Computed();
  const WatchedShard::Node writer = Node(&shard_);
  static_cast<void>(Supply(*writer.node, Wire::kFull, 3));
  // The others are computed by who wants the first cut of all in the end.
  const WatchedShard::Node reader = Node(&shard_);
  static_cast<void>(Supply(*reader.node, Wire::kCut1));
  EXPECT_NE(Supply(*reader.node, Wire::kCut1)->blocks[4]->bytes, computed[4]);
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 2u);
  const WatchedShard::Node last = Node(&shard_);
  for (size_t blocks = 4; blocks <= kWatchedBlocks; ++blocks) {
    EXPECT_EQ(Supply(*last.node, Wire::kFull, blocks)->blocks.back()->bytes, computed[blocks - 1]);
  }
  EXPECT_EQ(last.node->supply().stats().computed_blocks, 0u);
}

TEST_P(KltExactTier, ABadByteIsRefusedAndRecomputed) {
  const WatchedShard::Node writer = Node(&shard_);
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  const std::span<const std::byte> stored = written->blocks[4]->stored.bytes();
  std::byte* const place = shard_.Find(stored);
  ASSERT_NE(place, nullptr);
  place[stored.size() - 9] ^= std::byte{4};
  const WatchedShard::Node reader = Node(&shard_);
  EXPECT_EQ(Supply(*reader.node, Wire::kFull)->blocks[4]->bytes, written->blocks[4]->bytes);
  EXPECT_EQ(reader.node->tier()->stats().data_loss, 1u);
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, 1u);
}

TEST_P(KltExactTier, BlocksOfOtherCutsAreNotThere) {
  const WatchedShard::Node writer = Node(&shard_, "coarse,exact");
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  const WatchedShard::Node reader = Node(&shard_, "fine,exact");
  EXPECT_EQ(BytesOf(*Supply(*reader.node, Wire::kFull)), BytesOf(*written));
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, kWatchedBlocks);
  EXPECT_EQ(reader.node->tier()->stats().data_loss, 0u);
  EXPECT_EQ(reader.node->tier()->stats().unread_blocks, kWatchedBlocks);
}

TEST_P(KltExactTier, NorAreThoseStoredPlain) {
  const WatchedShard::Node writer = shard_.Connect("raw", kRoom, Model());
  const SupplyJobPtr written = Supply(*writer.node, Wire::kFull);
  const WatchedShard::Node reader = Node(&shard_, "coarse,exact");
  EXPECT_EQ(BytesOf(*Supply(*reader.node, Wire::kFull)), BytesOf(*written));
  EXPECT_EQ(reader.node->supply().stats().computed_blocks, kWatchedBlocks);
  EXPECT_EQ(reader.node->tier()->stats().unread_blocks, kWatchedBlocks);
  EXPECT_EQ(reader.node->tier()->stats().failed_blocks, 0u) << "nothing was fetched";
}

}  // namespace
}  // namespace kvant::node
