// Pieces of few symbols are merged in another way than long ones, with the same result.
#include "node/bpe.h"

#include <gtest/gtest.h>

#include "base/random.h"

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

}  // namespace
}  // namespace kvant::node
