// "Never a wrong byte": every single byte of a small block is flipped, in the shard's memory and on
// the wire both ways. It is never served, and always counted as data loss.
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>

#include "tests/loopback_cluster.h"

namespace kvant {
namespace {

using Kind = ClientEvent::Kind;

struct FetchOutcome {
  ClientEvent item;
  bool wrong_bytes = false;  // a layer was reported whose bytes are not those that were stored
  size_t layers = 0;
};

class CorruptionTest : public testing::Test {
 protected:
  // meddle: called with the landed bytes before the node looks at them.
  FetchOutcome Fetch(LoopbackCluster* cluster,
                     std::function<void(std::span<std::byte>)> meddle = {}) {
    FetchRequest fetch;
    fetch.buffer = *cluster->node().Lend(block_.payload.size());
    fetch.items = {{block_.key, block_.key.Prefix64(), SelectAll(), 0, block_.payload.size()}};
    fetch.deadline = cluster->Soon();
    const std::shared_ptr<Lease> buffer = fetch.buffer;
    const OpId op = cluster->client().Fetch(std::move(fetch), cluster->now());
    if (meddle) {
      cluster->Step();
      for (int i = 0; i < 5; ++i) cluster->StepShards();
      meddle(buffer->bytes());
    }
    EXPECT_EQ(cluster->Await(op).kind, Kind::kFetchDone);
    FetchOutcome outcome;
    for (const ClientEvent& event : cluster->events()) {
      if (event.kind == Kind::kItemDone) outcome.item = event;
      if (event.kind != Kind::kLayerArrived) continue;
      ++outcome.layers;
      for (const SelectedRow& selected : SelectRows(block_.manifest, SelectAll())) {
        const ManifestRow& row = block_.manifest.rows[selected.row];
        if (row.layer != event.layer) continue;
        const auto got = buffer->bytes().subspan(selected.packed_offset, row.length);
        outcome.wrong_bytes |= !std::equal(
            got.begin(), got.end(), block_.payload.begin() + static_cast<ptrdiff_t>(row.offset));
      }
    }
    cluster->events().clear();
    return outcome;
  }

  TestBlock block_ = MakeBlock(TestKey(1), {}, 1, 2, 16);
};

TEST_F(CorruptionTest, InTheShardsMemory) {
  LoopbackCluster cluster(1);
  for (size_t i = 0; i < block_.payload.size(); ++i) {
    ASSERT_TRUE(cluster.Put(block_, block_.key.Prefix64()).status.ok()) << i;
    cluster.server().store().View(block_.key)->payload[i] ^= static_cast<std::byte>(1 + i % 255);
    const FetchOutcome outcome = Fetch(&cluster);
    ASSERT_EQ(outcome.item.status.code(), StatusCode::kDataLoss) << i;
    ASSERT_FALSE(outcome.wrong_bytes) << i;
    ASSERT_LT(outcome.layers, 2U);
    ASSERT_EQ(cluster.client().stats().data_loss, i + 1);
    for (int step = 0; step < 5; ++step) cluster.Step();
    // The client reported it, the shard looked and dropped it.
    ASSERT_EQ(cluster.server().stats().data_loss, i + 1);
    ASSERT_EQ(cluster.server().store().Find(block_.key), BlockState::kAbsent);
  }
}

TEST_F(CorruptionTest, InTheShardsManifest) {
  LoopbackCluster cluster(1);
  const size_t size = EncodeManifest(block_.manifest).size();
  for (size_t i = 0; i < size; ++i) {
    ASSERT_TRUE(cluster.Put(block_, block_.key.Prefix64()).status.ok()) << i;
    const auto manifest = cluster.server().store().View(block_.key)->manifest;
    const_cast<std::byte&>(manifest[i]) ^= std::byte{1};
    const FetchOutcome outcome = Fetch(&cluster);
    ASSERT_EQ(outcome.item.status.code(), StatusCode::kDataLoss) << i;
    ASSERT_EQ(outcome.layers, 0U);
    ASSERT_EQ(cluster.server().store().Find(block_.key), BlockState::kAbsent);
  }
}

TEST_F(CorruptionTest, OnTheWireOfAFetch) {
  LoopbackCluster cluster(1);
  ASSERT_TRUE(cluster.Put(block_, block_.key.Prefix64()).status.ok());
  for (size_t i = 0; i < block_.payload.size(); ++i) {
    const FetchOutcome outcome =
        Fetch(&cluster, [&](std::span<std::byte> landed) { landed[i] ^= std::byte{0x80}; });
    ASSERT_EQ(outcome.item.status.code(), StatusCode::kDataLoss) << i;
    ASSERT_EQ(cluster.client().stats().data_loss, i + 1);
  }
  for (int step = 0; step < 5; ++step) cluster.Step();
  // The shard's copy is good, so it stays.
  EXPECT_EQ(cluster.server().stats().data_loss, 0U);
  EXPECT_TRUE(Fetch(&cluster).item.present);
}

TEST_F(CorruptionTest, OnTheWireOfAPut) {
  LoopbackCluster cluster(1);
  for (size_t i = 0; i < block_.payload.size(); ++i) {
    TestBlock sent = block_;
    sent.payload[i] ^= std::byte{2};
    ASSERT_EQ(cluster.Put(sent, block_.key.Prefix64()).status.code(), StatusCode::kDataLoss) << i;
    ASSERT_EQ(cluster.server().store().Find(block_.key), BlockState::kAbsent);
  }
  EXPECT_EQ(cluster.server().stats().data_loss, block_.payload.size());
}

TEST_F(CorruptionTest, AShardThatVerifiesNothingIsFoundOutByItsClients) {
  ServerFaults faults;
  faults.skip_checksum_verification = true;
  LoopbackCluster cluster(1, 1 << 20, {}, faults);
  TestBlock sent = block_;
  sent.payload[3] ^= std::byte{2};
  ASSERT_TRUE(cluster.Put(sent, block_.key.Prefix64()).status.ok());
  const FetchOutcome outcome = Fetch(&cluster);
  EXPECT_EQ(outcome.item.status.code(), StatusCode::kDataLoss);
  EXPECT_FALSE(outcome.wrong_bytes);
}

}  // namespace
}  // namespace kvant
