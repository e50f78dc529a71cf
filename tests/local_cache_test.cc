// The node's own memory of blocks: its limit, its order, what it keeps and forgets.
#include "node/local_cache.h"

#include <gtest/gtest.h>

#include <list>
#include <map>
#include <vector>

#include "base/random.h"
#include "tests/support/node_world.h"

namespace kvant::node {
namespace {

support::NodeWorldOptions Options(const std::filesystem::path& model) {
  support::NodeWorldOptions options;
  options.node.model = model;
  return options;
}

class LocalCacheTest : public testing::Test {
 protected:
  explicit LocalCacheTest(const std::filesystem::path& model = support::TinyModel())
      : world_(Options(model)), blocks_(world_.node().block_class()) {
    std::vector<int32_t> tokens(64 * 16);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i % 200);
    keys_ = blocks_.Keys(tokens, "tenant/");
  }
  CachedBlockPtr Block(size_t index, const Portion& portion) {
    auto block = std::make_shared<CachedBlock>(blocks_, keys_[index], portion);
    Complete(block.get());
    return block;
  }
  void Complete(CachedBlock* block) const {
    const kernels::PayloadLayout& layout = blocks_.layout(block->portion.scope);
    for (int layer = 0; layer < layout.layers(); ++layer) {
      if (layout.Holds(layer)) block->MarkReady(layer);
    }
  }
  CachedBlockPtr Block(size_t index) { return Block(index, blocks_.FullCuts()); }
  bool Holds(LocalCache* cache, size_t index) {
    return cache->Find(keys_[index], blocks_.FullCuts()) != nullptr;
  }
  uint64_t size() const { return blocks_.payload_bytes(); }

  support::NodeWorld world_;
  const BlockClass& blocks_;
  std::vector<BlockKey> keys_;
};

TEST_F(LocalCacheTest, TheLeastRecentlyUsedGoFirst) {
  LocalCache cache(&blocks_, 3 * size());
  for (size_t i = 0; i < 3; ++i) cache.Insert(Block(i));
  EXPECT_TRUE(Holds(&cache, 0));  // and is the youngest now
  cache.Insert(Block(3));
  EXPECT_FALSE(Holds(&cache, 1));
  EXPECT_TRUE(Holds(&cache, 0));
  EXPECT_TRUE(Holds(&cache, 2));
  EXPECT_TRUE(Holds(&cache, 3));
  EXPECT_EQ(cache.bytes(), 3 * size());
  EXPECT_EQ(cache.evicted(), 1u);
}

TEST_F(LocalCacheTest, WhatIsInUseIsKeptAndCounts) {
  LocalCache cache(&blocks_, 2 * size());
  std::vector<CachedBlockPtr> used;
  for (size_t i = 0; i < 3; ++i) cache.Insert(used.emplace_back(Block(i)));
  EXPECT_EQ(cache.bytes(), 3 * size()) << "a sequence attends all of them";
  cache.Insert(Block(3));
  EXPECT_FALSE(Holds(&cache, 3)) << "the only one that nobody attends";
  for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(Holds(&cache, i));
  used.clear();
  cache.Trim();
  EXPECT_EQ(cache.bytes(), 2 * size());
}

TEST_F(LocalCacheTest, AFailedBlockIsForgotten) {
  LocalCache cache(&blocks_, 4 * size());
  auto failed = std::make_shared<CachedBlock>(blocks_, keys_[0], blocks_.FullCuts());
  cache.Insert(failed);
  EXPECT_TRUE(Holds(&cache, 0)) << "on its way";
  failed->failed = Unavailable("the shard is gone");
  EXPECT_FALSE(Holds(&cache, 0));
  EXPECT_EQ(cache.bytes(), 0u);
  cache.Insert(Block(0));
  EXPECT_TRUE(Holds(&cache, 0));
}

TEST_F(LocalCacheTest, ABlockOfFewerExtentsIsNotEnough) {
  LocalCache cache(&blocks_, 4 * size());
  const Cuts least = blocks_.CutsOf(Wire::kK4V4);
  cache.Insert(Block(0, least));
  EXPECT_EQ(cache.bytes(), blocks_.BytesOf(least));
  EXPECT_FALSE(Holds(&cache, 0));
  EXPECT_NE(cache.Find(keys_[0], least), nullptr);
  cache.Insert(Block(0));
  EXPECT_EQ(cache.bytes(), size()) << "the whole one took its place";
  EXPECT_NE(cache.Find(keys_[0], least), nullptr) << "and serves who wants less";
}

TEST_F(LocalCacheTest, WithoutALimitNothingIsFound) {
  LocalCache cache(&blocks_, 0);
  cache.Insert(Block(0));
  EXPECT_FALSE(Holds(&cache, 0));
  EXPECT_EQ(cache.bytes(), 0u);
}

class SlidingCacheTest : public LocalCacheTest {
 protected:
  SlidingCacheTest() : LocalCacheTest(support::SlidingModel()) {}
};

TEST_F(SlidingCacheTest, ABlockOfFewerLayersIsNotEnough) {
  LocalCache cache(&blocks_, 4 * size());
  const Portion global(blocks_.FullCuts(), Scope::kGlobal);
  cache.Insert(Block(0, global));
  EXPECT_EQ(cache.bytes() * 4, size()) << "one layer of four is kept, and nothing for the others";
  EXPECT_NE(cache.Find(keys_[0], global), nullptr);
  EXPECT_FALSE(Holds(&cache, 0));
  EXPECT_EQ(cache.Newest(keys_[0])->portion, global);
  cache.Insert(Block(0));
  EXPECT_TRUE(Holds(&cache, 0));
  EXPECT_NE(cache.Find(keys_[0], global), nullptr) << "and serves who wants less";
  EXPECT_EQ(cache.bytes(), size());
}

TEST_F(SlidingCacheTest, WhatIsHereServesUntilMoreOfItIs) {
  LocalCache cache(&blocks_, 4 * size());
  const Portion global(blocks_.FullCuts(), Scope::kGlobal);
  const CachedBlockPtr here = Block(0, global);
  cache.Insert(here);
  for (const bool fails : {true, false}) {
    auto whole = std::make_shared<CachedBlock>(blocks_, *here, blocks_.FullCuts());
    cache.Insert(whole);
    EXPECT_EQ(cache.bytes() * 4, 5 * size()) << "both count";
    EXPECT_EQ(cache.Find(keys_[0], global), here);
    EXPECT_EQ(cache.Find(keys_[0], blocks_.FullCuts()), whole) << "on its way";
    if (fails) {
      whole->failed = Unavailable("the shard is gone");
      EXPECT_FALSE(Holds(&cache, 0));
      EXPECT_EQ(cache.Find(keys_[0], global), here) << "what was here still is";
      EXPECT_EQ(cache.bytes() * 4, size());
    } else {
      Complete(whole.get());
      EXPECT_EQ(cache.Find(keys_[0], global), whole);
      EXPECT_EQ(cache.bytes(), size());
    }
  }
}

TEST_F(SlidingCacheTest, ACopyHasWhatBothHave) {
  const Cuts least = blocks_.CutsOf(Wire::kK4V4);
  const Portion global(blocks_.FullCuts(), Scope::kGlobal);
  auto whole = Block(0);
  for (size_t i = 0; i < whole->bytes.size(); ++i) whole->bytes[i] = std::byte(i * 7 % 251);
  const CachedBlock some(blocks_, *whole, global);
  EXPECT_EQ(*some.copied, global);
  EXPECT_FALSE(some.complete()) << "until the rest was verified together with it";
  const kernels::PayloadLayout& layout = blocks_.layout();
  for (const kernels::PayloadRow& row : blocks_.layout(Scope::kGlobal).rows()) {
    const auto from = whole->bytes.begin() +
                      static_cast<ptrdiff_t>(layout.Row(row.kind, row.cut, row.layer).offset);
    EXPECT_TRUE(std::equal(from, from + static_cast<ptrdiff_t>(row.length),
                           some.bytes.begin() + static_cast<ptrdiff_t>(row.offset)));
  }
  auto complete = Block(0, global);
  const CachedBlock low(blocks_, *complete, least);
  EXPECT_EQ(*low.copied, Portion(least, Scope::kGlobal));
}

TEST_F(SlidingCacheTest, ABlockWithoutBytesIsNotKept) {
  const support::NodeWorldOptions options = Options(support::AllSlidingModel());
  support::NodeWorld world(options);
  const BlockClass& blocks = world.node().block_class();
  LocalCache cache(&blocks, 1 << 20);
  const Portion nothing(blocks.FullCuts(), Scope::kGlobal);
  EXPECT_EQ(blocks.BytesOf(nothing), 0u);
  auto block = std::make_shared<CachedBlock>(blocks, keys_[0], nothing);
  EXPECT_TRUE(block->complete());
  cache.Insert(block);
  EXPECT_EQ(cache.Find(keys_[0], nothing), nullptr);
}

// Against a list: the order, the bytes and the limit after every step of a random walk.
TEST_F(LocalCacheTest, BehavesLikeAList) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    Random random(seed);
    const size_t fits = 1 + random.Below(6);
    LocalCache cache(&blocks_, fits * size());
    std::list<size_t> model;  // youngest first
    for (int step = 0; step < 300; ++step) {
      const size_t index = random.Below(keys_.size());
      const auto at = std::find(model.begin(), model.end(), index);
      if (random.Chance(0.5)) {
        ASSERT_EQ(Holds(&cache, index), at != model.end());
        if (at != model.end()) model.splice(model.begin(), model, at);
      } else {
        cache.Insert(Block(index));
        if (at != model.end()) model.erase(at);
        model.push_front(index);
        if (model.size() > fits) model.pop_back();
      }
      ASSERT_EQ(cache.bytes(), model.size() * size());
      ASSERT_LE(cache.bytes(), cache.limit_bytes());
    }
  }
}

}  // namespace
}  // namespace kvant::node
