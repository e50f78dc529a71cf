// `kvant calibrate` on a tiny model: a pack that fits it, and whose cuts keep what they say.
#include "node/calibrate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "base/random.h"
#include "kernels/blas.h"
#include "node/klt.h"
#include "node/klt_pack.h"
#include "node/model.h"
#include "tests/support/node_world.h"
#include "tests/support/random_klt_pack.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

using testing::HasSubstr;

// Each cut alone, and all that refine each other: more cuts, or finer ones, read closer rows.
void ExpectAllCutsCode(const Model& model, const KltPack& pack) {
  Random random(6);
  const support::KltBlock block = support::RandomKltBlock(model, 1, &random);
  const auto error_at = [&](const std::vector<size_t>& cuts) {
    const KltCoder coder(&model, &pack, cuts);
    KltCoder::Extents extents;
    const KltSide side = KltSide::OfTokens(&coder, block.tokens, nullptr);
    coder.Encode(side, kBlockTokens, block.rows, &extents);
    KltReader reader(&coder, side, kBlockTokens);
    KltCoder::Rows rows;
    double error = 0;
    for (size_t group = 0; group < coder.groups(); ++group) {
      std::vector<std::span<const std::byte>> of_group;
      for (const auto& of_cut : extents) of_group.emplace_back(of_cut[group]);
      const Status status = reader.Read(group, of_group, &rows);
      EXPECT_TRUE(status.ok()) << status.ToString();
      if (!status.ok()) return error;
    }
    for (size_t layer = 0; layer < rows.size(); ++layer) {
      for (size_t i = 0; i < rows[layer].size(); ++i)
        error += std::pow(static_cast<double>(rows[layer][i] - block.rows[layer][i]), 2);
    }
    return error;
  };
  std::vector<double> alone;
  for (size_t cut = 0; cut < pack.cuts().size(); ++cut) {
    alone.push_back(error_at({cut}));
    if (cut > 0) {
      EXPECT_LT(alone[cut - 1], alone[cut]) << pack.cuts()[cut].name;
    }
  }
  for (size_t count = 2; count <= pack.refining.size(); ++count) {
    const auto end = pack.refining.begin() + static_cast<ptrdiff_t>(count);
    EXPECT_NEAR(error_at({pack.refining.begin(), end}) / alone[*(end - 1)], 1, 0.25);
  }
}

class CalibrateTest : public testing::Test {
 protected:
  // Text that repeats itself as text does.
  std::string Text(const char* name, int words) {
    Random random(5);
    const std::string file = directory_.path() / name;
    std::ofstream out(file);
    for (int i = 0; i < words; ++i) out << "word" << random.Below(20) << (i % 9 == 8 ? ".\n" : " ");
    return file;
  }
  CalibrateOptions Options(const std::filesystem::path& model) {
    CalibrateOptions options;
    options.model = model;
    options.texts = {Text("a.txt", 3000), Text("b.txt", 3000)};
    options.out = directory_.path() / "pack.safetensors";
    options.tokens = 4096;
    options.length = 192;
    options.threads = 1;
    return options;
  }
  // A file as scripts/calibrate-fisher writes them: `weight` [width][width] for each layer.
  std::string Weights(int layers, int width, const std::vector<float>& weight,
                      const char* format = "kvant-klt-weights-1") {
    nlohmann::json header = {{"__metadata__", {{"format", format}, {"made_on", "paper"}}}};
    std::string data;
    for (int l = 0; l < layers; ++l) {
      const size_t begin = data.size();
      for (const float x : weight) {
        std::byte bytes[4];
        StoreLittle(bytes, std::bit_cast<uint32_t>(x));
        data.append(reinterpret_cast<const char*>(bytes), sizeof bytes);
      }
      header["layers." + std::to_string(l) + ".weight"] = {
          {"dtype", "F32"}, {"shape", {width, width}}, {"data_offsets", {begin, data.size()}}};
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');
    std::byte size[8];
    StoreLittle(size, static_cast<uint64_t>(text.size()));
    const std::string file = directory_.path() / "weights.safetensors";
    std::ofstream out(file, std::ios::binary);
    out << std::string(reinterpret_cast<const char*>(size), sizeof size) << text << data;
    return file;
  }
  support::TemporaryDirectory directory_;
};

TEST_F(CalibrateTest, MakesAPackOfEveryKindOfModel) {
  support::TemporaryDirectory latent;
  ASSERT_TRUE(
      support::WriteRandomModel(latent.path(), {.config = support::TinyLatentConfig()}).ok());
  for (const std::filesystem::path& directory :
       {support::TinyModel(), support::SlidingModel(), latent.path()}) {
    SCOPED_TRACE(directory);
    const CalibrateOptions options = Options(directory);
    const Result<int> made = Calibrate(options);
    ASSERT_TRUE(made.ok()) << made.status().ToString();
    const auto model = Model::Load(directory);
    ASSERT_TRUE(model.ok());
    const auto pack = LoadKltPack(options.out, **model);
    ASSERT_TRUE(pack.ok()) << pack.status().ToString();
    EXPECT_THAT(pack->calibrated_on, HasSubstr("b.txt"));
    ASSERT_FALSE(pack->cuts().empty());
    for (size_t i = 1; i < pack->cuts().size(); ++i) {
      EXPECT_LT(pack->cuts()[i - 1].step, pack->cuts()[i].step);
    }
    // Neighbours may be measured the other way round.
    EXPECT_LT(pack->cuts().front().mean_kl, pack->cuts().back().mean_kl);
    for (size_t i = 1; i < pack->refining.size(); ++i) {
      EXPECT_LT(pack->cuts()[pack->refining[i]].step, pack->cuts()[pack->refining[i - 1]].step);
    }
    ExpectAllCutsCode(**model, *pack);
  }
}

// Where a file says that one channel matters most, that one is kept best.
TEST_F(CalibrateTest, TakesWeightsOfAFile) {
  const auto model = Model::Load(support::TinyModel());
  ASSERT_TRUE(model.ok());
  const int width = StateWidth((*model)->config());
  const auto size = static_cast<size_t>(width);
  const size_t heavy = size - 2;
  std::vector<float> weight(size * size);
  for (size_t i = 0; i < size; ++i) weight[i * size + i] = i == heavy ? 1.0F : 1e-4F;
  CalibrateOptions options = Options(support::TinyModel());
  options.weights = Weights((*model)->config().layers, width, weight);
  const Result<int> made = Calibrate(options);
  ASSERT_TRUE(made.ok()) << made.status().ToString();
  const auto pack = LoadKltPack(options.out, **model);
  ASSERT_TRUE(pack.ok()) << pack.status().ToString();
  EXPECT_THAT(pack->weighed_by, HasSubstr("weights.safetensors, made on paper"));
  for (const std::vector<float>& of_layer : pack->weights) {
    // Noise says how keys compare with values; the file says it of channels of one of them.
    for (size_t c = size / 2; c < size; ++c) {
      if (c != heavy) {
        EXPECT_GT(of_layer[heavy * size + heavy], 10 * of_layer[c * size + c]) << c;
      }
    }
  }
}

TEST_F(CalibrateTest, RefusesWrongWeights) {
  const auto model = Model::Load(support::TinyModel());
  ASSERT_TRUE(model.ok());
  const int layers = (*model)->config().layers;
  const int width = StateWidth((*model)->config());
  const auto size = static_cast<size_t>(width);
  std::vector<float> weight(size * size);
  for (size_t i = 0; i < size; ++i) weight[i * size + i] = 1;
  CalibrateOptions options = Options(support::TinyModel());
  const auto message = [&](std::string file) {
    options.weights = std::move(file);
    return Calibrate(options).status().message();
  };
  EXPECT_THAT(message(directory_.path() / "none"), HasSubstr("none"));
  EXPECT_THAT(message(Text("a.txt", 100)), HasSubstr("a.txt"));
  EXPECT_THAT(message(Weights(layers, width, weight, "kvant-klt-1")),
              HasSubstr("scripts/calibrate-fisher makes them"));
  EXPECT_THAT(message(Weights(layers + 1, width, weight)), HasSubstr("the model has"));
  EXPECT_THAT(message(Weights(layers, 2, {1, 0, 0, 1})), HasSubstr("layers.0.weight of shape ["));
  const auto changed = [&](size_t at, float to) {
    std::vector<float> wrong = weight;
    wrong[at] = to;
    return message(Weights(layers, width, wrong));
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto& [at, to] : {std::pair<size_t, float>{0, -1}, {0, nan}, {1, nan}, {1, 0.5F}}) {
    EXPECT_THAT(changed(at, to), HasSubstr("no second moment"));
  }
}

TEST_F(CalibrateTest, ErrorsTeach) {
  CalibrateOptions options = Options(support::TinyModel());
  options.texts = {Text("short.txt", 100)};
  EXPECT_THAT(Calibrate(options).status().message(), HasSubstr("give more text"));
  options.texts = {directory_.path() / "none.txt"};
  EXPECT_THAT(Calibrate(options).status().message(), HasSubstr("none.txt"));
  options = Options(support::TinyModel());
  options.out = directory_.path() / "no" / "such" / "folder";
  EXPECT_THAT(Calibrate(options).status().message(), HasSubstr("folder"));
}

}  // namespace
}  // namespace kvant::node
