// Predictions that are kept for tokens: the same to the bit as those that are made anew, however
// few are kept, and on many threads.
#include "node/klt_predictions.h"

#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "kernels/blas.h"
#include "node/klt.h"
#include "tests/support/random_klt_pack.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

class KltPredictionsTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { ASSERT_TRUE(kernels::LoadBlas().ok()); }
  void SetUp() override {
    const support::TemporaryDirectory directory;
    support::RandomModelOptions options;
    options.config = support::TinySlidingConfig();
    ASSERT_TRUE(support::WriteRandomModel(directory.path(), options).ok());
    Result<std::unique_ptr<Model>> loaded = Model::Load(directory.path());
    ASSERT_TRUE(loaded.ok()) << loaded.status().ToString();
    model_ = *std::move(loaded);
    Random random(3);
    pack_ = support::RandomKltPack(*model_, &random);
  }

  uint64_t BytesOfToken() const {
    uint64_t bytes = 0;
    for (const KltBasis& basis : pack_.transforms[0].bases)
      bytes += sizeof(float) * static_cast<uint64_t>(basis.width);
    return bytes;
  }
  // Blocks of some tokens, in all groups, kept and made anew.
  void ExpectSame(const KltCoder& coder, KltPredictions* kept, uint64_t seed) const {
    Random random(seed);
    for (int block = 0; block < 30; ++block) {
      std::vector<int32_t> tokens;
      // Few at a time, others later.
      for (int i = 0; i < kBlockTokens; ++i)
        tokens.push_back(static_cast<int32_t>(static_cast<uint64_t>(block) + random.Below(20)));
      const KltSide with = KltSide::OfTokens(&coder, tokens, kept);
      const KltSide without = KltSide::OfTokens(&coder, tokens, nullptr);
      for (size_t group = 0; group < coder.groups(); ++group) {
        KltBegun a;
        KltBegun b;
        with.Begin(group, &a);
        without.Begin(group, &b);
        ASSERT_EQ(a.at.size(), tokens.size());
        ASSERT_EQ(b.at.size(), tokens.size());
        const size_t bytes =
            sizeof(float) * static_cast<size_t>(pack_.transforms[0].bases[group].width);
        for (size_t token = 0; token < tokens.size(); ++token) {
          EXPECT_EQ(std::memcmp(a.at[token], b.at[token], bytes), 0)
              << "block " << block << ", group " << group << ", token " << token;
        }
      }
    }
  }

  std::unique_ptr<Model> model_;
  KltPack pack_;
};

TEST_F(KltPredictionsTest, AreTheSameHoweverFewAreKept) {
  const KltCoder coder(model_.get(), &pack_, {0});
  for (const uint64_t tokens : {0, 1, 2, 7, 30, 1000}) {
    KltPredictions kept(pack_.transforms[0], tokens * BytesOfToken());
    ExpectSame(coder, &kept, 5);
  }
}

TEST_F(KltPredictionsTest, AreSharedByThreads) {
  const KltCoder coder(model_.get(), &pack_, {0});
  KltPredictions kept(pack_.transforms[0], 25 * BytesOfToken());
  std::vector<std::thread> threads;
  for (uint64_t seed = 0; seed < 4; ++seed)
    threads.emplace_back([&, seed] { ExpectSame(coder, &kept, seed); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace kvant::node
