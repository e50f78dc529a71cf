// Codec packs as files: what was written is read, and what is malformed is said.
#include "node/klt_pack.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "base/bytes.h"
#include "base/random.h"
#include "kernels/blas.h"
#include "node/klt.h"
#include "tests/support/random_klt_pack.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

// A safetensors file taken apart.
struct Parts {
  struct Tensor {
    std::string dtype;
    std::vector<int64_t> shape;
    std::string bytes;
  };
  std::map<std::string, Tensor> tensors;
  json metadata;

  static Parts Read(const std::filesystem::path& path) {
    std::ifstream in(path, std::ios::binary);
    const std::string file{std::istreambuf_iterator<char>(in), {}};
    const auto header_bytes = LoadLittle<uint64_t>(reinterpret_cast<const std::byte*>(file.data()));
    const json header = json::parse(file.substr(8, header_bytes));
    Parts parts;
    for (const auto& [name, entry] : header.items()) {
      if (name == "__metadata__") {
        parts.metadata = entry;
        continue;
      }
      const auto offsets = entry["data_offsets"].get<std::array<size_t, 2>>();
      parts.tensors[name] = {entry["dtype"], entry["shape"],
                             file.substr(8 + header_bytes + offsets[0], offsets[1] - offsets[0])};
    }
    return parts;
  }
  void Write(const std::filesystem::path& path) const {
    json header = json::object();
    std::string data;
    for (const auto& [name, tensor] : tensors) {
      header[name] = {{"dtype", tensor.dtype},
                      {"shape", tensor.shape},
                      {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
      data += tensor.bytes;
    }
    header["__metadata__"] = metadata;
    const std::string text = header.dump();
    std::string length(8, '\0');
    StoreLittle(reinterpret_cast<std::byte*>(length.data()), static_cast<uint64_t>(text.size()));
    std::ofstream(path, std::ios::binary) << length << text << data;
  }
  // Of a tensor of fp32 or bf16.
  void Set(const std::string& tensor, size_t index, float value) {
    Tensor& of = tensors.at(tensor);
    const auto bits = std::bit_cast<uint32_t>(value);
    auto* to = reinterpret_cast<std::byte*>(of.bytes.data());
    if (of.dtype == "F32") {
      StoreLittle(to + 4 * index, bits);
    } else {
      StoreLittle(to + 2 * index, static_cast<uint16_t>(bits >> 16));
    }
  }
};

std::unique_ptr<Model> MakeModel(const ModelConfig& config, uint64_t seed) {
  const support::TemporaryDirectory directory;
  support::RandomModelOptions options;
  options.config = config;
  options.seed = seed;
  EXPECT_TRUE(support::WriteRandomModel(directory.path(), options).ok());
  Result<std::unique_ptr<Model>> model = Model::Load(directory.path());
  EXPECT_TRUE(model.ok()) << model.status().ToString();
  return *std::move(model);
}

class KltPackTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    ASSERT_TRUE(kernels::LoadBlas().ok());
    model_ = MakeModel(support::TinySlidingConfig(), 1).release();
  }
  static void TearDownTestSuite() { delete model_; }
  KltPackTest() {
    KltPack saved = pack_;
    EXPECT_TRUE(SaveKltPack(file_, *model_, &saved).ok());
    parts_ = Parts::Read(file_);
  }
  // What loading says of the file after a change of its parts.
  std::string ErrorAfter(const std::function<void(Parts*)>& change) {
    Parts changed = parts_;
    change(&changed);
    changed.Write(file_);
    const Result<KltPack> pack = LoadKltPack(file_, *model_);
    if (pack.ok()) return "it was loaded";
    EXPECT_EQ(pack.status().code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(pack.status().message(), HasSubstr(file_.string()));
    return std::string(pack.status().message());
  }
  std::string ErrorOfMetadata(const char* key, const std::string& text) {
    return ErrorAfter([&](Parts* parts) { parts->metadata[key] = text; });
  }

  static Model* model_;
  Random random_{31};
  KltPack pack_ = support::RandomKltPack(*model_, &random_);
  support::TemporaryDirectory directory_;
  std::filesystem::path file_ = directory_.path() / "pack.safetensors";
  Parts parts_;
};
Model* KltPackTest::model_ = nullptr;

void ExpectSameBasis(const KltBasis& one, const KltBasis& other) {
  EXPECT_EQ(one.width, other.width);
  EXPECT_EQ(one.coefficients, other.coefficients);
  EXPECT_EQ(one.inputs, other.inputs);
  EXPECT_EQ(one.bias, other.bias);
  EXPECT_EQ(one.sink_bias, other.sink_bias);
  EXPECT_EQ(one.importance, other.importance);
  EXPECT_EQ(one.deviation, other.deviation);
  EXPECT_EQ(one.sink_deviation, other.sink_deviation);
  EXPECT_EQ(one.predictor.RowMajor(), other.predictor.RowMajor());
  EXPECT_EQ(one.synthesis.RowMajor(), other.synthesis.RowMajor());
  EXPECT_EQ(one.analysis.RowMajor(), other.analysis.RowMajor());
}

void ExpectSamePack(const KltPack& a, const KltPack& b) {
  EXPECT_EQ(a.width, b.width);
  EXPECT_EQ(a.hidden, b.hidden);
  EXPECT_EQ(a.layers, b.layers);
  EXPECT_EQ(a.group_width, b.group_width);
  EXPECT_EQ(a.weights, b.weights);
  EXPECT_EQ(a.refining, b.refining);
  EXPECT_EQ(a.sink_step, b.sink_step);
  EXPECT_EQ(a.model, b.model);
  EXPECT_EQ(a.calibrated_on, b.calibrated_on);
  EXPECT_EQ(a.statistics.mean, b.statistics.mean);
  for (size_t table = 0; table < kKltTables; ++table) {
    for (int s = 0; s < kKltSymbols; ++s) {
      ASSERT_EQ(a.statistics.tables[table].frequency(s), b.statistics.tables[table].frequency(s));
    }
  }
  ASSERT_EQ(a.transforms.size(), b.transforms.size());
  for (size_t t = 0; t < a.transforms.size(); ++t) {
    const KltTransform& one = a.transforms[t];
    const KltTransform& other = b.transforms[t];
    EXPECT_EQ(one.recomputed, other.recomputed);
    EXPECT_EQ(one.groups.size(), other.groups.size());
    ASSERT_EQ(one.cuts.size(), other.cuts.size());
    for (size_t cut = 0; cut < one.cuts.size(); ++cut) {
      EXPECT_EQ(one.cuts[cut].name, other.cuts[cut].name);
      EXPECT_EQ(one.cuts[cut].step, other.cuts[cut].step);
      EXPECT_EQ(one.cuts[cut].mean_kl, other.cuts[cut].mean_kl);
    }
    ASSERT_EQ(one.bases.size(), other.bases.size());
    for (size_t group = 0; group < one.bases.size(); ++group)
      ExpectSameBasis(one.bases[group], other.bases[group]);
  }
}

TEST_F(KltPackTest, IsReadAsItWasWritten) {
  for (const ModelConfig& config :
       {support::TinyConfig(), support::TinySlidingConfig(), support::TinyLatentConfig()}) {
    const std::unique_ptr<Model> model = MakeModel(config, 1);
    const int group_width = random_.Chance(0.5) ? StateWidth(config) : kKltGroupWidth;
    const KltPack made = support::RandomKltPack(*model, &random_, {.group_width = group_width});
    KltPack saved = made;
    ASSERT_TRUE(SaveKltPack(file_, *model, &saved).ok());
    const Result<KltPack> loaded = LoadKltPack(file_, *model);
    ASSERT_TRUE(loaded.ok()) << loaded.status().ToString();
    ExpectSamePack(made, *loaded);
    ExpectSamePack(saved, *loaded);
    EXPECT_EQ(loaded->file_bytes, std::filesystem::file_size(file_));
    EXPECT_EQ(loaded->digest, saved.digest);
    EXPECT_TRUE(loaded->CheckFits(*model).ok());

    const support::KltBlock block = support::RandomKltBlock(*model, 3, &random_);
    KltCoder::Extents extents;
    const KltCoder before(model.get(), &made, made.refining);
    before.Encode(KltSide::OfTokens(&before, block.tokens, nullptr), 64, block.rows, &extents);
    const KltCoder after(model.get(), &*loaded, loaded->refining);
    KltCoder::Extents again;
    after.Encode(KltSide::OfTokens(&after, block.tokens, nullptr), 64, block.rows, &again);
    EXPECT_EQ(again, extents);
  }
}

TEST_F(KltPackTest, MatricesAreRoundedAsTheyAreSaved) {
  KltPack saved = pack_;
  saved.weights[0][0] = 1.001F;
  ASSERT_TRUE(SaveKltPack(file_, *model_, &saved).ok());
  EXPECT_EQ(saved.weights[0][0], 1.0F);
}

TEST_F(KltPackTest, CutsAreFoundByTheirNames) {
  const Result<size_t> coarse = pack_.FindCut("coarse");
  ASSERT_TRUE(coarse.ok());
  EXPECT_EQ(*coarse, 3U);
  const Result<size_t> none = pack_.FindCut("rough");
  EXPECT_EQ(none.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(none.status().message(),
              AllOf(HasSubstr("'rough'"), HasSubstr("finest, fine, medium, coarse")));
}

TEST_F(KltPackTest, TransformsAreFoundByTheLayersTheyRecompute) {
  ASSERT_EQ(pack_.transforms.size(), 2U);
  const Result<size_t> one = pack_.FindTransform(1);
  ASSERT_TRUE(one.ok());
  EXPECT_EQ(*one, 1U);
  EXPECT_EQ(pack_.transforms[1].first_layer(), 2);
  EXPECT_EQ(pack_.transforms[0].first_layer(), 0);
  EXPECT_THAT(pack_.FindTransform(3).status().message(),
              AllOf(HasSubstr("0, 1"), HasSubstr("--recompute 3")));
}

TEST_F(KltPackTest, MalformedTransformsAreRefused) {
  const std::string cuts = parts_.metadata["cuts"].get<std::string>();
  EXPECT_EQ(ErrorOfMetadata("recomputed", "[[1," + cuts + "]]"), "it was loaded");
  for (const std::string& text : std::vector<std::string>{
           "7", "[7]", "[[0," + cuts + "]]", "[[3," + cuts + "]]",
           "[[1," + cuts + "],[1," + cuts + "]]", "[[1.5," + cuts + "]]", "[[1]]",
           "[[1,[[\"other\",1,1]]]]", "[[1000000000000," + cuts + "]]"}) {
    EXPECT_THAT(ErrorOfMetadata("recomputed", text), HasSubstr("recomputed in its metadata"))
        << text;
  }
}

TEST_F(KltPackTest, GroupsAreAsWideAsItsMetadataSay) {
  for (const std::string text : {"0", "-1", "65537", "12 ", "1.5", "many", "99999999999"})
    EXPECT_THAT(ErrorOfMetadata("group_width", text), HasSubstr("group_width")) << text;
  // Narrower groups have other tensors.
  EXPECT_THAT(ErrorOfMetadata("group_width", "1"), HasSubstr("should have a tensor"));
  // Packs of before had none.
  EXPECT_EQ(ErrorAfter([](Parts* parts) { parts->metadata.erase("group_width"); }),
            "it was loaded");
}

TEST_F(KltPackTest, AnotherModelsPackIsRefused) {
  const std::unique_ptr<Model> other = MakeModel(support::TinySlidingConfig(), 2);
  const Status status = LoadKltPack(file_, *other).status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), AllOf(HasSubstr(pack_.model.substr(0, 16)),
                                      HasSubstr(ToHex(other->digest()).substr(0, 16)),
                                      HasSubstr("kvant calibrate"), HasSubstr(file_.string())));
  EXPECT_EQ(pack_.CheckFits(*other).code(), StatusCode::kInvalidArgument);
}

TEST_F(KltPackTest, WhatIsNoPackIsSaid) {
  EXPECT_THAT(LoadKltPack(directory_.path() / "none", *model_).status().message(),
              HasSubstr("none"));
  EXPECT_THAT(ErrorOfMetadata("format", "kvant-klt-1"),
              AllOf(HasSubstr("no codec pack"), HasSubstr("calibrate")));
  EXPECT_THAT(ErrorAfter([](Parts* parts) { parts->metadata = json::object(); }),
              HasSubstr("no codec pack"));
  EXPECT_THAT(ErrorAfter([](Parts* parts) { parts->metadata.erase("model"); }),
              HasSubstr("made for the model"));
  std::ofstream(file_, std::ios::binary) << "not so long";
  EXPECT_THAT(LoadKltPack(file_, *model_).status().message(), HasSubstr(file_.string()));
  parts_.Write(file_);
  ASSERT_TRUE(LoadKltPack(file_, *model_).ok());
  std::filesystem::resize_file(file_, std::filesystem::file_size(file_) - 1);
  EXPECT_THAT(LoadKltPack(file_, *model_).status().message(), HasSubstr(file_.string()));
}

TEST_F(KltPackTest, EveryTensorIsNeeded) {
  EXPECT_EQ(parts_.tensors.size(),
            4U + (2U + 2U) * 8U + 3U);  // of layers, groups of both transforms, and all
  for (const auto& [name, tensor] : parts_.tensors) {
    EXPECT_THAT(ErrorAfter([&](Parts* parts) { parts->tensors.erase(name); }),
                AllOf(HasSubstr("should have a tensor"), HasSubstr(name)));
  }
}

TEST_F(KltPackTest, EveryTensorsShapeAndTypeAreChecked) {
  for (const auto& [name, tensor] : parts_.tensors) {
    EXPECT_THAT(ErrorAfter([&](Parts* parts) {
                  Parts::Tensor& of = parts->tensors[name];
                  of.shape.front() += 1;
                  int64_t row = of.dtype == "F32" ? 4 : 2;
                  for (size_t i = 1; i < of.shape.size(); ++i) row *= of.shape[i];
                  of.bytes.resize(of.bytes.size() + static_cast<size_t>(row));
                }),
                HasSubstr("should have a tensor"))
        << name;
    EXPECT_THAT(ErrorAfter([&](Parts* parts) {
                  Parts::Tensor& of = parts->tensors[name];
                  of.shape.push_back(1);
                }),
                AllOf(HasSubstr("should have a tensor"), HasSubstr(name)));
    EXPECT_THAT(ErrorAfter([&](Parts* parts) {
                  Parts::Tensor& of = parts->tensors[name];
                  of.dtype = of.dtype == "F32" ? "I32" : "F16";
                }),
                HasSubstr(name));
  }
}

TEST_F(KltPackTest, NumbersThatAreNotFiniteAreRefused) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const auto& [name, tensor] : parts_.tensors) {
    for (const float value : {std::numeric_limits<float>::quiet_NaN(), kInfinity, -kInfinity}) {
      const size_t last = tensor.bytes.size() / (tensor.dtype == "F32" ? 4 : 2) - 1;
      for (const size_t index : {size_t{0}, last}) {
        EXPECT_THAT(ErrorAfter([&](Parts* parts) { parts->Set(name, index, value); }),
                    AllOf(HasSubstr(name), HasSubstr("not finite")));
      }
    }
  }
}

TEST_F(KltPackTest, NumbersOutOfRangeAreRefused) {
  EXPECT_THAT(ErrorAfter([](Parts* parts) { parts->Set("groups.1.deviation", 0, 1e-6F); }),
              AllOf(HasSubstr("groups.1.deviation"), HasSubstr("does not descend")));
  for (const float step : {0.0F, -1.0F}) {
    EXPECT_THAT(ErrorAfter([&](Parts* parts) { parts->Set("sink_step", 0, step); }),
                HasSubstr("sink_step"));
  }
  for (const float frequency : {-1.0F, 4097.0F, 1e30F}) {
    EXPECT_THAT(ErrorAfter([&](Parts* parts) { parts->Set("frequencies", 0, frequency); }),
                HasSubstr("frequencies"));
  }
  // Whatever comes, it can be coded.
  EXPECT_THAT(ErrorAfter([](Parts* parts) { parts->Set("frequencies", kKltSymbols - 1, 0); }),
              HasSubstr("frequencies"));
}

TEST_F(KltPackTest, CoefficientsMayBeLeftOutDownToOne) {
  const auto to_one = [](Parts* parts) {
    for (const char* part : {"deviation", "first_deviation", "sink_deviation"}) {
      Parts::Tensor& of = parts->tensors[std::string("groups.1.") + part];
      of.shape = {1};
      of.bytes.resize(4);
    }
    Parts::Tensor& synthesis = parts->tensors["groups.1.synthesis"];
    synthesis.shape[1] = 1;
    synthesis.bytes.resize(2 * static_cast<size_t>(synthesis.shape[0]));
  };
  EXPECT_EQ(ErrorAfter(to_one), "it was loaded");
  EXPECT_THAT(ErrorAfter([&](Parts* parts) {
                to_one(parts);
                Parts::Tensor& of = parts->tensors["groups.1.deviation"];
                of.shape = {0};
                of.bytes.clear();
              }),
              HasSubstr("groups.1.deviation"));
}

TEST_F(KltPackTest, MalformedCutsAreRefused) {
  for (const char* cuts : {"",
                           "7",
                           "{}",
                           "[]",
                           "[",
                           "[7]",
                           R"([["fine", 1]])",
                           R"([["fine", 1, 0.1, 0]])",
                           R"([[1, 1, 0.1]])",
                           R"([["fine", "1", 0.1]])",
                           R"([["fine", 0, 0.1]])",
                           R"([["fine", -1, 0.1]])",
                           R"([["fine", 1e300, 0.1]])",
                           R"([["fine", 1, -0.1]])",
                           R"([["fine", 1, 1e300]])",
                           R"([["fine", 1, null]])",
                           R"([["fine", 1, 0.1], ["coarse", 1, 0.2]])",
                           R"([["fine", 2, 0.1], ["coarse", 1, 0.2]])",
                           R"([["fine", 1, 0.1], ["fine", 2, 0.2]])",
                           R"([["", 1, 0.1]])",
                           R"([["so, so", 1, 0.1]])"}) {
    EXPECT_THAT(ErrorAfter([&](Parts* parts) {
                  parts->metadata["cuts"] = cuts;
                  parts->metadata["refining"] = "[]";
                }),
                testing::Not("it was loaded"))
        << cuts;
  }
  EXPECT_THAT(ErrorOfMetadata("cuts", "[]"), HasSubstr("list of cuts"));
  std::string many;
  for (int i = 0; i < 17; ++i) many += fmt::format(R"({}["c{}", {}, 0.1])", i ? "," : "", i, i + 1);
  EXPECT_THAT(ErrorOfMetadata("cuts", "[" + many + "]"), HasSubstr("list of cuts"));
}

TEST_F(KltPackTest, RefiningNamesCutsThatGetFiner) {
  for (const char* refining :
       {R"(["coarse", "rough"])", R"(["fine", "coarse"])", R"(["fine", "fine"])", "[3]", "7", "{}",
        R"({"a": "fine"})", R"(["coarse", "medium", "fine", "finest"])"}) {
    EXPECT_THAT(ErrorOfMetadata("refining", refining), HasSubstr("refining")) << refining;
  }
  for (const char* refining : {"", "["})
    EXPECT_THAT(ErrorOfMetadata("refining", refining), testing::Not("it was loaded"));
  EXPECT_THAT(ErrorAfter([](Parts* parts) { parts->metadata.erase("refining"); }),
              testing::Not("it was loaded"));
  for (const char* refining : {"[]", R"(["medium"])", R"(["medium", "fine"])"})
    EXPECT_EQ(ErrorOfMetadata("refining", refining), "it was loaded") << refining;
}

}  // namespace
}  // namespace kvant::node
