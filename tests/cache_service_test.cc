// Server and client end to end over the loopback transport.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "tests/loopback_cluster.h"

namespace kvant {
namespace {

using Kind = ClientEvent::Kind;

std::vector<TestBlock> MakeChainBlocks(uint64_t n, size_t count) {
  const std::vector<BlockKey> chain = TestChain(n, count);
  std::vector<TestBlock> blocks;
  for (size_t i = 0; i < count; ++i) {
    blocks.push_back(MakeBlock(chain[i], i == 0 ? BlockKey{} : chain[i - 1], n * 77 + i));
  }
  return blocks;
}
std::vector<BlockKey> KeysOf(const std::vector<TestBlock>& blocks) {
  std::vector<BlockKey> keys;
  for (const TestBlock& block : blocks) keys.push_back(block.key);
  return keys;
}
// The bytes that a selection of a block is packed to.
std::vector<std::byte> Packed(const TestBlock& block, const Selection& selection) {
  std::vector<std::byte> packed;
  for (const SelectedRow& selected : SelectRows(block.manifest, selection)) {
    const ManifestRow& row = block.manifest.rows[selected.row];
    packed.insert(packed.end(), block.payload.begin() + static_cast<ptrdiff_t>(row.offset),
                  block.payload.begin() + static_cast<ptrdiff_t>(row.offset + row.length));
  }
  return packed;
}

TEST(CacheService, PutLookupFetchAcrossShards) {
  LoopbackCluster cluster(3);
  const std::vector<TestBlock> blocks = MakeChainBlocks(1, 40);
  const std::vector<BlockKey> chain = KeysOf(blocks);
  for (size_t i = 0; i < blocks.size(); ++i) {
    const ClientEvent put = cluster.Put(blocks[i], RunOf(chain, i));
    ASSERT_TRUE(put.status.ok()) << put.status.ToString();
    EXPECT_FALSE(put.already_there);
  }
  const ClientEvent again = cluster.Put(blocks[7], RunOf(chain, 7));
  EXPECT_TRUE(again.status.ok());
  EXPECT_TRUE(again.already_there);

  std::vector<BlockKey> longer = chain;
  longer.push_back(TestKey(99));
  const ClientEvent looked =
      cluster.Await(cluster.client().Lookup(longer, {}, cluster.Soon(), cluster.now()));
  EXPECT_EQ(looked.prefix_blocks, 40U);
  EXPECT_EQ(looked.blocks[40].state, LookupState::kAbsent);
  EXPECT_EQ(looked.blocks[3].payload_bytes, blocks[3].payload.size());
  EXPECT_EQ(looked.blocks[3].cuts, (std::array<uint8_t, kMaxParts>{2, 1, 0, 0}));

  Selection half;
  half.cuts = {1, 1, 0, 0};
  half.layer_begin = 1;
  FetchRequest fetch;
  uint64_t at = 0;
  for (size_t i = 0; i < longer.size(); ++i) {
    const Selection selection = i % 2 == 0 ? SelectAll() : half;
    fetch.items.push_back({longer[i], RunOf(longer, i), selection, at, 900});
    at += 900;
  }
  fetch.buffer = *cluster.node().Lend(at);
  fetch.deadline = cluster.Soon();
  const std::shared_ptr<Lease> buffer = fetch.buffer;
  const std::vector<FetchItem> items = fetch.items;
  const ClientEvent fetched =
      cluster.Await(cluster.client().Fetch(std::move(fetch), cluster.now()));
  EXPECT_TRUE(fetched.status.ok()) << fetched.status.ToString();
  std::map<size_t, std::vector<uint16_t>> layers;
  size_t done = 0;
  for (const ClientEvent& event : cluster.events()) {
    if (event.kind == Kind::kLayerArrived) layers[event.item].push_back(event.layer);
    if (event.kind != Kind::kItemDone) continue;
    ++done;
    EXPECT_TRUE(event.status.ok());
    EXPECT_EQ(event.present, event.item < 40) << event.item;
    if (!event.present) continue;
    EXPECT_EQ(*event.manifest, blocks[event.item].manifest);
    const auto expected = Packed(blocks[event.item], items[event.item].selection);
    const auto got = buffer->bytes().subspan(items[event.item].offset, expected.size());
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(), got.begin())) << event.item;
  }
  EXPECT_EQ(done, longer.size());
  EXPECT_EQ(layers[0], (std::vector<uint16_t>{0, 1, 2}));
  EXPECT_EQ(layers[1], (std::vector<uint16_t>{1, 2}));
  EXPECT_EQ(cluster.client().open_operations(), 0U);
  EXPECT_EQ(cluster.client().stats().data_loss, 0U);
}

}  // namespace
}  // namespace kvant
