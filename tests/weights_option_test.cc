// --weights: what a model keeps in each form, which keys its blocks get, and that answers do not
// show whether there is a cache, how many sequences are under way, or whose blocks a shard holds.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kernels/codec.h"
#include "tests/support/node_world.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

using kernels::WeightForm;
using support::NodeWorld;
using support::NodeWorldOptions;
using support::TextsOf;
using testing::HasSubstr;

class WeightsOption : public testing::Test {
 protected:
  // A model of random weights in a checkpoint of this type.
  std::filesystem::path Write(const std::string& name, DataType type,
                              const ModelConfig& config = support::TinyConfig()) {
    support::RandomModelOptions options;
    options.config = config;
    options.type = type;
    EXPECT_TRUE(support::WriteRandomModel(directory_.path() / name, options).ok());
    return directory_.path() / name;
  }
  static std::unique_ptr<Model> Load(const std::filesystem::path& path, WeightForm form) {
    Result<std::unique_ptr<Model>> model = Model::Load(path, form);
    EXPECT_TRUE(model.ok()) << model.status().ToString();
    return *std::move(model);
  }
  static BlockKey KeyOf(const Model& model) {
    const std::vector<int32_t> tokens(kBlockTokens, 1);
    return BlockClass(&model, *kernels::FindCodec("raw"), {}).Keys(tokens, "").front();
  }
  support::TemporaryDirectory directory_;
};

TEST_F(WeightsOption, NamesAreReadBack) {
  for (const WeightForm form : {WeightForm::kExact, WeightForm::kBf16, WeightForm::kInt8})
    EXPECT_EQ(*ParseWeightForm(WeightFormName(form)), form);
  EXPECT_THAT(ParseWeightForm("q4_0").status().message(), HasSubstr("exact, bf16, int8"));
}

TEST_F(WeightsOption, MatricesTakeTheBytesOfTheirForm) {
  ModelConfig tied = support::TinyConfig();
  tied.tied_output = true;
  const auto path = Write("fp32", DataType::kFp32, tied);
  const auto exact = Load(path, WeightForm::kExact);
  const auto bf16 = Load(path, WeightForm::kBf16);
  const auto int8 = Load(path, WeightForm::kInt8);
  EXPECT_EQ(exact->weight_bytes(), 2 * bf16->weight_bytes());
  EXPECT_GT(int8->weight_bytes(), bf16->weight_bytes() / 2) << "codes and scales";
  EXPECT_LT(int8->weight_bytes(), bf16->weight_bytes() * 3 / 5);
  EXPECT_NE(int8->layer(0).query.codes(), nullptr);
  EXPECT_NE(int8->output().codes(), nullptr);
  EXPECT_EQ(int8->digest(), exact->digest()) << "it is of the checkpoint";
}

TEST_F(WeightsOption, WhatLittleIsReadOfStaysExact) {
  ModelConfig untied = support::TinyConfig();
  untied.tied_output = false;
  const auto apart = Load(Write("untied", DataType::kBf16, untied), WeightForm::kInt8);
  EXPECT_TRUE(apart->embedding().exact());
  EXPECT_NE(apart->output().codes(), nullptr);

  ModelConfig tied = support::TinyConfig();
  tied.tied_output = true;
  const auto one = Load(Write("tied", DataType::kBf16, tied), WeightForm::kInt8);
  EXPECT_EQ(one->embedding().codes(), one->output().codes());

  const auto mixture =
      Load(Write("mixture", DataType::kBf16, support::TinyLatentConfig()), WeightForm::kInt8);
  EXPECT_TRUE(mixture->layer(1).router.exact());
  EXPECT_NE(mixture->layer(1).experts[0].down.codes(), nullptr);
  EXPECT_NE(mixture->layer(1).latent.key_up[0].codes(), nullptr);
}

TEST_F(WeightsOption, KeysDifferWhereNumbersDo) {
  const auto narrow = Write("narrow", DataType::kBf16);
  const BlockKey exact = KeyOf(*Load(narrow, WeightForm::kExact));
  EXPECT_EQ(KeyOf(*Load(narrow, WeightForm::kBf16)), exact) << "no bit was lost";
  EXPECT_NE(KeyOf(*Load(narrow, WeightForm::kInt8)), exact);

  const auto wide = Write("wide", DataType::kFp32);
  const BlockKey keys[] = {KeyOf(*Load(wide, WeightForm::kExact)),
                           KeyOf(*Load(wide, WeightForm::kBf16)),
                           KeyOf(*Load(wide, WeightForm::kInt8))};
  EXPECT_NE(keys[0], keys[1]);
  EXPECT_NE(keys[0], keys[2]);
  EXPECT_NE(keys[1], keys[2]);
}

// Requests that share the beginning of a text, then go on differently.
std::vector<Request> SharedPrefix(const std::string& text, int count) {
  std::vector<Request> requests;
  for (int i = 0; i < count; ++i) {
    Request& request = requests.emplace_back();
    request.custom_id = "r" + std::to_string(i);
    request.prompt = text.substr(0, 900 + 40 * static_cast<size_t>(i));
    request.max_tokens = 12;
    request.temperature = 0.7;
    request.seed = static_cast<uint64_t>(i);
  }
  return requests;
}

class ShippedModelWeights
    : public testing::TestWithParam<std::tuple<const char*, const char*, const char*>> {};

TEST_P(ShippedModelWeights, AHitEqualsAMiss) {
  const auto& [model, weights, codec] = GetParam();
  NodeWorldOptions options;
  options.node.model = (std::filesystem::path(KVANT_SOURCE_DIR) / "models" / model).string();
  options.node.weights = weights;
  options.node.codec = codec;
  const Result<std::string> text = ReadFile(options.node.model + "/heldout.txt");
  ASSERT_TRUE(text.ok());
  const std::vector<Request> requests = SharedPrefix(*text, 5);

  options.node.max_batch = 1;
  const auto alone = TextsOf(NodeWorld(options).Answer(requests));
  for (const support::AnswerText& answer : alone) EXPECT_EQ(answer.error, "OK");

  options.node.max_batch = 8;
  options.node.threads = 2;
  options.shard_bytes = uint64_t{64} << 20;
  options.always_fetch = true;
  options.node.local_cache_bytes = 0;
  NodeWorld world(options);
  EXPECT_EQ(TextsOf(world.Answer(requests)), alone);
  EXPECT_EQ(TextsOf(world.Answer(requests)), alone);
  EXPECT_GT(world.stats().tier_hit_tokens, 0U);
}

INSTANTIATE_TEST_SUITE_P(All, ShippedModelWeights,
                         testing::Combine(testing::Values("gqa-5m", "mla-5m"),
                                          testing::Values("bf16", "int8"),
                                          testing::Values("raw", "tile8")));

}  // namespace
}  // namespace kvant::node
