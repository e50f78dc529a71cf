// Configurations, model directories and what their errors teach.
#include "node/model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "base/bytes.h"
#include "kernels/float_formats.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

const json kLlama = {{"architectures", {"LlamaForCausalLM"}},
                     {"num_hidden_layers", 2},
                     {"hidden_size", 64},
                     {"intermediate_size", 96},
                     {"num_attention_heads", 4},
                     {"vocab_size", 300}};

json With(const char* key, const json& value) {
  json config = kLlama;
  config[key] = value;
  return config;
}
Result<ModelConfig> Parse(const json& config, std::string_view generation = "") {
  return ParseConfig(config.dump(), generation, "m");
}
Status ErrorOf(const json& config) { return Parse(config).status(); }

TEST(ParseConfig, FillsInWhatTransformersDoes) {
  const auto config = Parse(kLlama);
  ASSERT_TRUE(config.ok()) << config.status().ToString();
  EXPECT_EQ(config->kv_heads, 4);
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->max_positions, 2048);
  EXPECT_EQ(config->rms_norm_eps, 1e-6F);
  EXPECT_EQ(config->rope_theta, 10000.0);
  EXPECT_EQ(config->rope_scaling.kind, kernels::RopeScaling::Kind::kNone);
  EXPECT_FALSE(config->tied_output);
  EXPECT_EQ(config->bos, std::nullopt);
  EXPECT_TRUE(config->eos.empty());
}

TEST(ParseConfig, ReadsRopeOfOldAndNewFiles) {
  const json scaling = {{"rope_type", "llama3"},
                        {"factor", 32.0},
                        {"low_freq_factor", 1.0},
                        {"high_freq_factor", 4.0},
                        {"original_max_position_embeddings", 8192}};
  json old_style = With("rope_scaling", scaling);
  old_style["rope_theta"] = 500000;
  json parameters = scaling;
  parameters["rope_theta"] = 500000.0;
  for (const json& file : {old_style, With("rope_parameters", parameters)}) {
    const auto config = Parse(file);
    ASSERT_TRUE(config.ok()) << config.status().ToString();
    EXPECT_EQ(config->rope_scaling.kind, kernels::RopeScaling::Kind::kLlama3);
    EXPECT_EQ(config->rope_theta, 500000.0);
    EXPECT_EQ(config->rope_scaling.factor, 32.0);
  }
  for (const char* field :
       {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}) {
    json lacking = scaling;
    lacking.erase(field);
    EXPECT_THAT(ErrorOf(With("rope_scaling", lacking)).message(), HasSubstr(field));
  }
  const auto linear = Parse(With("rope_scaling", {{"type", "linear"}, {"factor", 4}}));
  ASSERT_TRUE(linear.ok());
  EXPECT_EQ(linear->rope_scaling.kind, kernels::RopeScaling::Kind::kLinear);
  const auto yarn = Parse(With("rope_scaling", {{"type", "yarn"}, {"factor", 4}}));
  ASSERT_TRUE(yarn.ok());
  EXPECT_EQ(yarn->rope_scaling.kind, kernels::RopeScaling::Kind::kYarn);
  EXPECT_NEAR(yarn->rope_scaling.attention_factor, 0.1 * std::log(4.0) + 1.0, 1e-12);
  EXPECT_EQ(ErrorOf(With("rope_scaling", {{"type", "longrope"}, {"factor", 4}})).code(),
            StatusCode::kUnsupported);
}

TEST(ParseConfig, GenerationConfigWins) {
  json file = With("eos_token_id", 7);
  file["bos_token_id"] = 5;
  const auto plain = Parse(file);
  ASSERT_TRUE(plain.ok());
  EXPECT_EQ(plain->eos, std::vector<int32_t>{7});
  EXPECT_EQ(plain->bos, 5);
  const auto both = Parse(file, R"({"eos_token_id":[8,9]})");
  ASSERT_TRUE(both.ok());
  EXPECT_EQ(both->eos, (std::vector<int32_t>{8, 9}));
  EXPECT_EQ(both->bos, 5);
  EXPECT_TRUE(both->IsEos(9));
  EXPECT_FALSE(both->IsEos(7));
}

TEST(ParseConfig, SaysWhatIsNotSupported) {
  json long_rope = With("max_position_embeddings", 1 << 24);
  long_rope["head_dim"] = 128;
  for (const json& file :
       {With("architectures", {"MixtralForCausalLM"}), With("hidden_act", "gelu"),
        With("mlp_bias", true), With("quantization_config", json::object()), With("head_dim", 12),
        long_rope}) {
    const Status status = ErrorOf(file);
    EXPECT_EQ(status.code(), StatusCode::kUnsupported) << file;
    EXPECT_THAT(status.message(), AllOf(HasSubstr("m/config.json"), HasSubstr("support")));
  }
  EXPECT_THAT(ErrorOf(With("architectures", {"MixtralForCausalLM"})).message(),
              AllOf(HasSubstr("MixtralForCausalLM"), HasSubstr("LlamaForCausalLM")));
}

TEST(ParseConfig, NamesTheFieldThatIsWrong) {
  for (const char* field : {"num_hidden_layers", "hidden_size", "intermediate_size",
                            "num_attention_heads", "vocab_size"}) {
    json missing = kLlama;
    missing.erase(field);
    EXPECT_THAT(ErrorOf(missing).message(), AllOf(HasSubstr(field), HasSubstr("missing")));
    for (const json& value : {json(0), json(-1), json(1.5), json("x"), json(uint64_t{1} << 63)}) {
      const Status status = ErrorOf(With(field, value));
      EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
      EXPECT_THAT(status.message(), HasSubstr(field));
    }
  }
  EXPECT_THAT(ErrorOf(With("num_key_value_heads", 3)).message(),
              HasSubstr("num_attention_heads 4 is not a multiple of num_key_value_heads 3"));
  EXPECT_THAT(ErrorOf(With("hidden_size", 65)).message(), HasSubstr("is not a multiple"));
  EXPECT_THAT(ErrorOf(With("eos_token_id", 300)).message(), HasSubstr("eos_token_id"));
  EXPECT_THAT(ParseConfig("{", "", "m").status().message(), HasSubstr("malformed JSON"));
}

class ModelTest : public testing::Test {
 protected:
  void Write(DataType type = DataType::kBf16) {
    support::RandomModelOptions options;
    options.config = support::TinyConfig();
    options.type = type;
    ASSERT_TRUE(support::WriteRandomModel(directory_.path(), options).ok());
  }
  Result<std::unique_ptr<Model>> Load() { return Model::Load(directory_.path()); }
  std::string LoadError() { return Load().status().message(); }
  Digest LoadedDigest() {
    const auto model = Load();
    EXPECT_TRUE(model.ok()) << model.status().ToString();
    return model.ok() ? (*model)->digest() : Digest{};
  }
  json ReadConfig() {
    std::ifstream file(directory_.path() / "config.json");
    return json::parse(file);
  }
  std::string ReadWeights() {
    std::ifstream file(directory_.path() / "model.safetensors", std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  void WriteText(const char* name, const std::string& text) {
    std::ofstream(directory_.path() / name, std::ios::binary) << text;
  }
  support::TemporaryDirectory directory_;
};

TEST_F(ModelTest, WeightsAreExactInEveryType) {
  for (const DataType type : {DataType::kBf16, DataType::kFp16, DataType::kFp32}) {
    Write(type);
    const auto model = Load();
    ASSERT_TRUE(model.ok()) << model.status().ToString();
    const kernels::OrderedWeights& down = (*model)->layer(1).mlp.down;
    EXPECT_EQ(down.outputs(), 64);
    EXPECT_EQ(down.inputs(), 96);
    EXPECT_EQ(down.bf16() != nullptr, type == DataType::kBf16);
    const std::vector<float> values = down.RowMajor();
    const auto checkpoint = Checkpoint::Open(directory_.path());
    ASSERT_TRUE(checkpoint.ok());
    const auto& bytes = (*checkpoint)->tensors().at("model.layers.1.mlp.down_proj.weight").bytes;
    for (size_t i = 0; i < 96U * 64U; i += 97) {
      float expected = 0.0F;
      if (type == DataType::kFp32) {
        std::memcpy(&expected, bytes.data() + i * 4, 4);
      } else {
        const auto half = LoadLittle<uint16_t>(bytes.data() + i * 2);
        expected = type == DataType::kBf16 ? kernels::FromBf16(half) : kernels::FromFp16(half);
      }
      EXPECT_EQ(values[i], expected);
    }
    std::vector<float> row(64);
    (*model)->Embed(299, row.data());
    EXPECT_NE(row[0], row[1]);
  }
}

TEST_F(ModelTest, DigestIsOfTheModelNotOfItsFiles) {
  Write();
  const Digest digest = LoadedDigest();
  support::TemporaryDirectory other;
  support::RandomModelOptions options;
  options.config = support::TinyConfig();
  options.shards = 4;
  ASSERT_TRUE(support::WriteRandomModel(other.path(), options).ok());
  const auto cut = Model::Load(other.path());
  ASSERT_TRUE(cut.ok()) << cut.status().ToString();
  EXPECT_EQ((*cut)->digest(), digest);

  // Where a generation ends changes no block; a weight, its type or the rope does.
  json config = ReadConfig();
  config["eos_token_id"] = 3;
  WriteText("config.json", config.dump());
  EXPECT_EQ(LoadedDigest(), digest);
  config["rope_parameters"]["rope_theta"] = 10001.0;
  WriteText("config.json", config.dump());
  EXPECT_NE(LoadedDigest(), digest);
  Write();
  std::string weights = ReadWeights();
  weights.back() = static_cast<char>(weights.back() ^ 1);
  WriteText("model.safetensors", weights);
  EXPECT_NE(LoadedDigest(), digest);
  Write(DataType::kFp32);
  EXPECT_NE(LoadedDigest(), digest);
}

TEST_F(ModelTest, ReadsWeightsAtOddAddresses) {
  for (const DataType type : {DataType::kBf16, DataType::kFp16, DataType::kFp32}) {
    Write(type);
    const auto aligned = Load();
    ASSERT_TRUE(aligned.ok());
    support::TemporaryDirectory other;
    std::filesystem::copy(directory_.path(), other.path());
    std::string weights = ReadWeights();
    const auto header = LoadLittle<uint64_t>(AsBytes(weights).data());
    weights.insert(8 + header, " ");
    StoreLittle(reinterpret_cast<std::byte*>(weights.data()), header + 1);
    std::ofstream(other.path() / "model.safetensors", std::ios::binary) << weights;
    const auto odd = Model::Load(other.path());
    ASSERT_TRUE(odd.ok()) << odd.status().ToString();
    EXPECT_EQ((*aligned)->digest(), (*odd)->digest());
    EXPECT_EQ((*aligned)->layer(0).mlp.gate.RowMajor(), (*odd)->layer(0).mlp.gate.RowMajor());
  }
}

TEST_F(ModelTest, ErrorsTeach) {
  EXPECT_THAT(Model::Load("/nonexistent/model").status().message(),
              AllOf(HasSubstr("/nonexistent/model"), HasSubstr("config.json"),
                    HasSubstr("tokenizer.json"), HasSubstr("model.safetensors")));
  EXPECT_THAT(LoadError(), HasSubstr("config.json is missing"));
  Write();
  json config = ReadConfig();
  config["num_hidden_layers"] = 3;
  WriteText("config.json", config.dump());
  EXPECT_THAT(LoadError(), HasSubstr("lacks tensor model.layers.2.input_layernorm.weight"));
  config["num_hidden_layers"] = 2;
  config["intermediate_size"] = 100;
  WriteText("config.json", config.dump());
  EXPECT_THAT(LoadError(), AllOf(HasSubstr("mlp.gate_proj.weight has shape [96, 64]"),
                                 HasSubstr("expected [100, 64]")));
  config["intermediate_size"] = 96;
  config["vocab_size"] = 299;
  WriteText("config.json", config.dump());
  EXPECT_THAT(LoadError(), HasSubstr("token ids up to 299"));
  Write();
  std::filesystem::remove(directory_.path() / "tokenizer.json");
  EXPECT_THAT(LoadError(), AllOf(HasSubstr("tokenizer.json"), HasSubstr("no such file")));
  Write();
  std::filesystem::resize_file(directory_.path() / "model.safetensors", 5000);
  EXPECT_THAT(LoadError(), HasSubstr("complete"));
}

TEST_F(ModelTest, BringsItsChatTemplate) {
  Write();
  const auto without = Load();
  ASSERT_TRUE(without.ok()) << without.status().ToString();
  EXPECT_TRUE((*without)->chat_template().text.empty());
  WriteText("tokenizer_config.json", R"({"chat_template":"{{ messages }}"})");
  const auto with = Load();
  ASSERT_TRUE(with.ok()) << with.status().ToString();
  EXPECT_EQ((*with)->chat_template().text, "{{ messages }}");
}

// What `models/` ships: the second stores a quarter of the first one's bytes a token.
TEST(ShippedModels, Load) {
  const std::filesystem::path models = std::filesystem::path(KVANT_SOURCE_DIR) / "models";
  std::vector<int> elements;
  for (const char* name : {"gqa-5m", "mla-5m"}) {
    const auto model = Model::Load(models / name);
    ASSERT_TRUE(model.ok()) << model.status().ToString();
    const kernels::LayerShape state = (*model)->config().StateShape(1);
    elements.push_back(state.keys.kv_heads * state.keys.head_dim +
                       state.values.kv_heads * state.values.head_dim);
    EXPECT_EQ((*model)->config().max_positions, 2048);
  }
  EXPECT_EQ(elements[0], 4 * elements[1]);
}

}  // namespace
}  // namespace kvant::node
