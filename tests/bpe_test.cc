// Pieces of few symbols are merged in another way than long ones, with the same result; and what
// is remembered of pieces is what they became.
#include "node/bpe.h"

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <utility>

#include "base/random.h"
#include "node/piece_memory.h"

namespace kvant::node {
namespace {

TEST(BpeMerges, FewAndManySymbolsMergeAlike) {
  constexpr int32_t kLetters = 5;
  constexpr int32_t kApart = 1000;  // has no pair
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    Random random(seed);
    BpeMerges merges;
    int32_t next = kLetters;
    // Later merges may be of earlier ones; ranks in no order, some of them equal.
    for (int i = 0; i < 40; ++i) {
      const auto left = static_cast<int32_t>(random.Below(static_cast<uint64_t>(next)));
      const auto right = static_cast<int32_t>(random.Below(static_cast<uint64_t>(next)));
      merges.Add(left, right, next++, static_cast<int32_t>(random.Below(20)));
    }
    std::vector<int32_t> piece(1 + random.Below(24));
    for (int32_t& symbol : piece) symbol = static_cast<int32_t>(random.Below(kLetters));
    std::vector<int32_t> few;
    merges.Merge(piece, &few);
    std::vector<int32_t> with_more = piece;
    with_more.resize(piece.size() + 30, kApart);
    std::vector<int32_t> many;
    merges.Merge(with_more, &many);
    ASSERT_GE(many.size(), 30U);
    many.resize(many.size() - 30);
    EXPECT_EQ(few, many) << "seed " << seed;
  }
}

TEST(PieceMemory, WhatItFindsIsWhatTheOwnerSetLast) {
  Random random(1);
  PieceMemory memory;
  const uint64_t owners[] = {PieceMemory::NewOwner(), PieceMemory::NewOwner()};
  EXPECT_NE(owners[0], owners[1]);
  std::map<std::pair<uint64_t, std::string>, std::vector<int32_t>> set;
  size_t found = 0;
  for (int round = 0; round < 200'000; ++round) {
    // Many more than it holds, of which short ones recur; with zeros among the bytes.
    std::string piece(random.Below(random.Chance(0.9) ? 4 : 25), 'a');
    for (char& byte : piece) byte = static_cast<char>(random.Below(12));
    const uint64_t owner = owners[random.Below(2)];
    std::vector<int32_t> ids = {-1};
    const auto known = set.find({owner, piece});
    if (memory.Find(owner, piece, &ids)) {
      ++found;
      ASSERT_TRUE(known != set.end());
      std::vector<int32_t> expected = {-1};
      expected.insert(expected.end(), known->second.begin(), known->second.end());
      EXPECT_EQ(ids, expected);
      continue;
    }
    EXPECT_EQ(ids.size(), 1U);
    std::vector<int32_t> made(random.Below(11));
    for (int32_t& id : made) id = static_cast<int32_t>(random.Below(1000));
    memory.Set(owner, piece, made);
    set[{owner, piece}] = std::move(made);
  }
  EXPECT_GT(found, 50'000U);
}

}  // namespace
}  // namespace kvant::node
