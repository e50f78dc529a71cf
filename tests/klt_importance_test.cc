// Which tokens matter more: what a fit finds of samples whose law is known.
#include "node/klt_importance.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "base/random.h"
#include "kernels/blas.h"
#include "node/klt_groups.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

using testing::HasSubstr;

class ImportanceTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { ASSERT_TRUE(kernels::LoadBlas().ok()); }
  // Of tokens that cost 8 * 2^(a - 2 b) on the average.
  ImportanceSamples Samples(size_t count) {
    ImportanceSamples samples;
    samples.features = 2;
    for (size_t i = 0; i < count; ++i) {
      const double a = 1 + random_.Normal();
      const double b = -5 + 0.5 * random_.Normal();
      samples.x.push_back(static_cast<float>(a));
      samples.x.push_back(static_cast<float>(b));
      const double spread = 2 * random_.Unit();
      samples.y.push_back(static_cast<float>(8 * std::exp2(a - 2 * b) * spread + 1e-6));
    }
    return samples;
  }
  Random random_{3};
};

TEST_F(ImportanceTest, FindsTheLaw) {
  const auto predictor = FitImportance(Samples(20000));
  ASSERT_TRUE(predictor.ok()) << predictor.status().ToString();
  ASSERT_EQ(predictor->size(), 3U);
  EXPECT_NEAR((*predictor)[1], 1, 0.05);
  EXPECT_NEAR((*predictor)[2], -2, 0.1);
  // 0 in the middle of the tokens.
  EXPECT_NEAR((*predictor)[0] + (*predictor)[1] * 1 + (*predictor)[2] * -5, 0, 0.1);
}

TEST_F(ImportanceTest, NothingToTellIsSaid) {
  EXPECT_THAT(FitImportance(Samples(3)).status().message(), HasSubstr("too few"));
  ImportanceSamples zeros = Samples(100);
  for (float& y : zeros.y) y = 0;
  EXPECT_EQ(FitImportance(zeros).status().code(), StatusCode::kInvalidArgument);
  ImportanceSamples broken = Samples(100);
  broken.y[7] = std::numeric_limits<float>::infinity();
  EXPECT_EQ(FitImportance(broken).status().code(), StatusCode::kInvalidArgument);
}

TEST_F(ImportanceTest, FeaturesAreMeanSquaresOfEachLayersParts) {
  const ModelConfig config = support::TinyConfig();
  const kernels::LayerShape state = config.StateShape(1);
  const auto width = static_cast<size_t>(StateWidth(config));
  const auto keys = static_cast<size_t>(state.keys.kv_heads * state.keys.head_dim);
  std::vector<float> rows(2 * width, 2);
  for (size_t i = 0; i < keys; ++i) rows[width + i] = 0.25F;
  EXPECT_THAT(ImportanceFeatures(config, rows),
              testing::ElementsAre(testing::FloatEq(2), testing::FloatEq(2), testing::FloatEq(-4),
                                   testing::FloatEq(2)));
  // What is all 0 has a feature, too.
  for (const float feature : ImportanceFeatures(config, std::vector<float>(width)))
    EXPECT_LT(feature, -60);
}

TEST_F(ImportanceTest, StepsAreFinerByHalfOctavesWithinLimits) {
  const std::vector<float> predictor = {1, -1, 0.5F};
  EXPECT_EQ(FinerOf(predictor, std::vector<float>{0, 0}), 1);
  EXPECT_EQ(FinerOf(predictor, std::vector<float>{-3, 0}), 4);
  EXPECT_EQ(FinerOf(predictor, std::vector<float>{-300, 0}), kKltMostFiner);
  EXPECT_EQ(FinerOf(predictor, std::vector<float>{300, 0}), kKltLeastFiner);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(FinerOf(predictor, std::vector<float>{nan, 0}), 0);
}

}  // namespace
}  // namespace kvant::node
