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
  EXPECT_EQ(looked.blocks[3].cut_ends, (CutEnds{600, 900, 900, 900}));

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

// What a reader lacks, not what it has: refinements, and layers apart from one another.
TEST(CacheService, FetchesOnlyTheMissingRows) {
  LoopbackCluster cluster(1);
  const TestBlock block = MakeBlock(TestKey(1), {}, 1, 11, 100, 3);
  const uint64_t run = block.key.Prefix64();
  ASSERT_TRUE(cluster.Put(block, run).status.ok());
  std::vector<Selection> selections(4, SelectAll());
  selections[0].first_cuts = {1, 0, 0, 0};
  selections[0].cuts = {3, 0, 0, 0};
  selections[1].SetLayers({false, true, false, false, true, false, false, false, false, true});
  selections[2].SetLayers({true, false, true, true});
  selections[2].first_cuts = {2, 0, 0, 0};
  selections[3].first_cuts = {3, 1, 0, 0};  // there is no such cut, so nothing is moved
  const std::vector<uint64_t> rows = {11 * 2, 3 * 4, 3 * 2, 0};
  const std::vector<std::vector<uint16_t>> layers = {
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, {1, 4, 9}, {0, 2, 3}, {}};
  FetchRequest fetch;
  uint64_t at = 0;
  for (size_t i = 0; i < selections.size(); ++i) {
    EXPECT_EQ(SelectedBytes(block.manifest, selections[i]), rows[i] * 100);
    fetch.items.push_back({block.key, run, selections[i], at, rows[i] * 100});
    at += rows[i] * 100;
  }
  fetch.buffer = *cluster.node().Lend(at);
  fetch.deadline = cluster.Soon();
  const std::shared_ptr<Lease> buffer = fetch.buffer;
  const ClientEvent fetched =
      cluster.Await(cluster.client().Fetch(std::move(fetch), cluster.now()));
  EXPECT_TRUE(fetched.status.ok()) << fetched.status.ToString();
  EXPECT_EQ(cluster.client().stats().payload_bytes_fetched, at);
  std::vector<std::vector<uint16_t>> arrived(selections.size());
  for (const ClientEvent& event : cluster.events()) {
    if (event.kind == Kind::kLayerArrived) arrived[event.item].push_back(event.layer);
  }
  EXPECT_EQ(arrived, layers);
  std::vector<std::byte> expected;
  for (const Selection& selection : selections) {
    const std::vector<std::byte> packed = Packed(block, selection);
    expected.insert(expected.end(), packed.begin(), packed.end());
  }
  ASSERT_EQ(expected.size(), at);
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), buffer->bytes().begin()));
}

TEST(CacheService, ASelectionThatCannotBeEndsItsItemOnly) {
  LoopbackCluster cluster(1);
  const TestBlock block = MakeBlock(TestKey(1), {}, 1);
  const uint64_t run = block.key.Prefix64();
  ASSERT_TRUE(cluster.Put(block, run).status.ok());
  Selection bad = SelectAll();
  bad.cuts = {1, 1, 0, 0};
  bad.first_cuts = {1, 0, 0, 0};
  FetchRequest fetch;
  fetch.items.push_back({block.key, run, bad, 0, 900});
  fetch.items.push_back({block.key, run, SelectAll(), 900, 900});
  fetch.buffer = *cluster.node().Lend(1800);
  fetch.deadline = cluster.Soon();
  const ClientEvent fetched =
      cluster.Await(cluster.client().Fetch(std::move(fetch), cluster.now()));
  EXPECT_EQ(fetched.status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(fetched.status.message().find("part 0"), std::string::npos);
  EXPECT_EQ(cluster.client().stats().items_fetched, 1U);
}

// A buffer with the payload of a block, and the put that goes with it.
PutRequest MakePut(LoopbackCluster* cluster, const TestBlock& block) {
  PutRequest put;
  put.key = block.key;
  put.parent = block.parent;
  put.run = block.key.Prefix64();
  put.payload_bytes = block.payload.size();
  put.manifest_rows = block.manifest.rows.size();
  put.buffer = *cluster->node().Lend(block.payload.size());
  std::copy(block.payload.begin(), block.payload.end(), put.buffer->bytes().begin());
  put.deadline = cluster->Soon();
  return put;
}
FetchRequest MakeFetch(LoopbackCluster* cluster, const std::vector<TestBlock>& blocks) {
  FetchRequest fetch;
  uint64_t at = 0;
  for (const TestBlock& block : blocks) {
    fetch.items.push_back({block.key, block.key.Prefix64(), SelectAll(), at, block.payload.size()});
    at += block.payload.size();
  }
  fetch.buffer = *cluster->node().Lend(at);
  fetch.deadline = cluster->Soon();
  return fetch;
}

TEST(CacheService, LayersComeLayerMajorAcrossTheItems) {
  LoopbackCluster cluster(1);
  std::vector<TestBlock> blocks;
  for (uint64_t n = 1; n <= 20; ++n) {
    blocks.push_back(MakeBlock(TestKey(n), {}, n));
    ASSERT_TRUE(cluster.Put(blocks.back(), TestKey(n).Prefix64()).status.ok());
  }
  cluster.Await(cluster.client().Fetch(MakeFetch(&cluster, blocks), cluster.now()));
  uint16_t layer = 0;
  size_t arrived = 0;
  for (const ClientEvent& event : cluster.events()) {
    if (event.kind != Kind::kLayerArrived) continue;
    EXPECT_GE(event.layer, layer);
    layer = event.layer;
    ++arrived;
  }
  EXPECT_EQ(arrived, 60U);
}

TEST(CacheService, StreamsAPutAsItIsComputed) {
  LoopbackCluster cluster(1);
  const TestBlock block = MakeBlock(TestKey(1), {}, 1);
  PutRequest put = MakePut(&cluster, block);
  std::fill(put.buffer->bytes().begin(), put.buffer->bytes().end(), std::byte{});
  const std::shared_ptr<Lease> buffer = put.buffer;
  const OpId op = cluster.client().BeginPut(put, cluster.now());
  for (const ManifestRow& row : block.manifest.rows) {
    if (row.layer == 2) continue;
    std::copy_n(block.payload.begin() + static_cast<ptrdiff_t>(row.offset), row.length,
                buffer->bytes().begin() + static_cast<ptrdiff_t>(row.offset));
    cluster.client().PutReady(op, row.offset, row.length, cluster.now());
    cluster.Step();
  }
  for (int i = 0; i < 20; ++i) cluster.Step();
  // What was announced has been read before the seal.
  EXPECT_EQ(cluster.server().stats().payload_bytes_stored, 600U);
  EXPECT_EQ(cluster.server().store().Find(block.key), BlockState::kReserved);
  std::copy(block.payload.begin(), block.payload.end(), buffer->bytes().begin());
  cluster.client().SealPut(op, block.manifest, cluster.now());
  EXPECT_TRUE(cluster.Await(op).status.ok());
  EXPECT_EQ(cluster.server().stats().payload_bytes_stored, 900U);
  EXPECT_EQ(cluster.client().stats().payload_bytes_put, 900U);
}

TEST(CacheService, ADeadShardFailsItsItemsAtOnceAndOnlyThose) {
  LoopbackCluster cluster(2);
  std::vector<TestBlock> blocks;
  for (uint64_t n = 1; n <= 30; ++n) {
    blocks.push_back(MakeBlock(TestKey(n), {}, n));
    ASSERT_TRUE(cluster.Put(blocks.back(), TestKey(n).Prefix64()).status.ok());
  }
  cluster.Kill(0);
  for (int i = 0; i < 50; ++i) cluster.Step();
  EXPECT_FALSE(cluster.client().Reachable(0));
  const TimePoint before = cluster.now();
  const ClientEvent fetched =
      cluster.Await(cluster.client().Fetch(MakeFetch(&cluster, blocks), cluster.now()));
  EXPECT_EQ(fetched.status.code(), StatusCode::kUnavailable);
  EXPECT_LT(cluster.now() - before, std::chrono::milliseconds(100));
  for (const ClientEvent& event : cluster.events()) {
    if (event.kind != Kind::kItemDone) continue;
    const bool alive = cluster.client().map().Owner(blocks[event.item].key.Prefix64()) == 1;
    EXPECT_EQ(event.status.ok(), alive);
    EXPECT_EQ(event.present, alive);
  }
  std::vector<BlockKey> chain;
  for (const TestBlock& block : blocks) chain.push_back(block.key);
  const ClientEvent looked =
      cluster.Await(cluster.client().Lookup(chain, {}, cluster.Soon(), cluster.now()));
  EXPECT_TRUE(looked.status.ok());
  EXPECT_TRUE(std::any_of(looked.blocks.begin(), looked.blocks.end(), [](const LookupBlock& b) {
    return b.state == LookupState::kUnreachable;
  }));
  EXPECT_EQ(cluster.client().open_operations(), 0U);
}

TEST(CacheService, DeadlinesEndEverything) {
  LoopbackCluster cluster(1);
  const TestBlock block = MakeBlock(TestKey(1), {}, 1);
  const TimePoint soon = cluster.Soon(std::chrono::milliseconds(5));
  PutRequest put = MakePut(&cluster, block);
  put.deadline = soon;
  const OpId begun = cluster.client().BeginPut(put, cluster.now());  // never sealed
  EXPECT_EQ(cluster.Await(begun).status.code(), StatusCode::kDeadlineExceeded);
  cluster.client().PutReady(begun, 0, 10, cluster.now());
  cluster.client().SealPut(begun, block.manifest, cluster.now());
  for (int i = 0; i < 20; ++i) cluster.Step();
  EXPECT_EQ(cluster.server().store().Find(block.key), BlockState::kAbsent);
  EXPECT_EQ(cluster.server().store().CheckInvariants(), "");
}

TEST(CacheService, CancelEndsAnOperationOnce) {
  LoopbackCluster cluster(1);
  const TestBlock block = MakeBlock(TestKey(1), {}, 1);
  ASSERT_TRUE(cluster.Put(block, block.key.Prefix64()).status.ok());
  const OpId op = cluster.client().Fetch(MakeFetch(&cluster, {block}), cluster.now());
  cluster.client().Cancel(op, cluster.now());
  EXPECT_EQ(cluster.Await(op).status.code(), StatusCode::kCancelled);
  for (int i = 0; i < 20; ++i) cluster.Step();
  size_t done = 0;
  for (const ClientEvent& event : cluster.events()) done += event.kind == Kind::kFetchDone;
  EXPECT_EQ(done, 0U);
  EXPECT_EQ(cluster.server().store().stats().pins, 0U);
}

TEST(CacheService, LeasesPinsAndStats) {
  LoopbackCluster cluster(1);
  const TestBlock block = MakeBlock(TestKey(1), {}, 1);
  ASSERT_TRUE(cluster.Put(block, block.key.Prefix64()).status.ok());
  const std::vector<BlockKey> chain = {block.key};
  cluster.Await(
      cluster.client().Lookup(chain, std::chrono::milliseconds(20), cluster.Soon(), cluster.now()));
  EXPECT_EQ(cluster.server().store().stats().pins, 1U);
  // The fetch takes the lease over.
  cluster.Await(cluster.client().Fetch(MakeFetch(&cluster, {block}), cluster.now()));
  for (int i = 0; i < 5; ++i) cluster.Step();
  EXPECT_EQ(cluster.server().store().stats().pins, 0U);
  cluster.Await(
      cluster.client().Lookup(chain, std::chrono::milliseconds(20), cluster.Soon(), cluster.now()));
  for (int i = 0; i < 1000; ++i) cluster.Step();
  EXPECT_EQ(cluster.server().store().stats().pins, 0U);

  const uint64_t run = block.key.Prefix64();
  const ClientEvent pinned = cluster.Await(
      cluster.client().Pin(block.key, run, std::chrono::seconds(1), cluster.Soon(), cluster.now()));
  EXPECT_TRUE(pinned.status.ok());
  EXPECT_EQ(cluster.server().store().stats().user_pinned_bytes, 900U);
  cluster.Await(cluster.client().Pin(block.key, run, {}, cluster.Soon(), cluster.now()));
  EXPECT_EQ(cluster.server().store().stats().user_pinned_bytes, 0U);
  const ClientEvent stats = cluster.Await(cluster.client().Stats(0, cluster.Soon(), cluster.now()));
  EXPECT_NE(stats.text.find("\"puts_sealed\": 1"), std::string::npos) << stats.text;
}

TEST(CacheService, APutThatSomebodyElseMakesEndsAtOnce) {
  LoopbackCluster cluster(1);
  const TestBlock block = MakeBlock(TestKey(1), {}, 1);
  const OpId first = cluster.client().BeginPut(MakePut(&cluster, block), cluster.now());
  for (int i = 0; i < 5; ++i) cluster.Step();
  const ClientEvent second = cluster.Put(block, block.key.Prefix64());
  EXPECT_TRUE(second.status.ok());
  EXPECT_TRUE(second.already_there);
  cluster.client().SealPut(first, block.manifest, cluster.now());
  EXPECT_TRUE(cluster.Await(first).status.ok());
  cluster.Put(block, block.key.Prefix64());
  EXPECT_EQ(cluster.server().stats().dedup_bytes, 900U);
}

}  // namespace
}  // namespace kvant
