// Gemma 3 270M, the real model that scripts/get-model fetches, against what transformers says of it
// (tests/golden/gemma-3-270m, made by scripts/golden/real_model.py), and the equality that the
// cache promises. Registered where CMake is given KV_REAL_MODEL, the path of the GGUF file;
// `scripts/check --real-model` does that.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "node/requests.h"
#include "node/safetensors.h"
#include "tests/support/program.h"
#include "tests/support/random_model.h"

namespace kvant {
namespace {

using support::ProgramResult;
using support::RunProgram;

constexpr Duration kLong = std::chrono::minutes(10);
// Relative to a row's largest logit: weights are the same bf16, sums are in another order.
constexpr double kTolerance = 1e-3;
constexpr int kRequests = 5;  // one after the other, so that each finds what those before it left

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string Golden(const std::string& name) {
  return std::string(KVANT_SOURCE_DIR) + "/tests/golden/gemma-3-270m/" + name;
}

class RealModel : public testing::Test {
 protected:
  void SetUp() override {
    text_ = ReadAll(Golden("golden.safetensors"));
    auto tensors = node::ParseSafetensors(AsBytes(text_), "golden.safetensors");
    ASSERT_TRUE(tensors.ok()) << tensors.status().ToString();
    tensors_ = *std::move(tensors);
  }
  template <typename T>
  std::vector<T> Values(const std::string& name) const {
    const auto bytes = tensors_.at(name).bytes;
    std::vector<T> values(bytes.size() / sizeof(T));
    std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }
  std::string Path(const std::string& name) const { return directory_.path() / name; }
  static ProgramResult Kvant(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), KVANT_PATH);
    arguments.insert(arguments.end(), {"--model", REAL_MODEL_PATH});
    return RunProgram(arguments, kLong);
  }

  support::TemporaryDirectory directory_;
  std::string text_;
  node::TensorMap tensors_;
};

std::string Join(const std::vector<int32_t>& tokens, const char* separator) {
  std::string text;
  for (const int32_t token : tokens) {
    text += (text.empty() ? "" : separator) + std::to_string(token);
  }
  return text;
}

TEST_F(RealModel, TokensAreThoseOfTransformers) {
  const ProgramResult result = Kvant({"tokenize", "--text-file", Golden("text.txt")});
  ASSERT_EQ(result.exit, 0) << result.errors;
  std::istringstream in(result.out);
  std::vector<int32_t> found;
  for (int32_t id = 0; in >> id;) found.push_back(id);
  const auto expected = Values<int32_t>("ids");  // the text's first ones
  ASSERT_GE(found.size(), expected.size());
  found.resize(expected.size());
  EXPECT_EQ(found, expected);
}

TEST_F(RealModel, LogitsAreThoseOfTransformers) {
  const auto ids = Values<int32_t>("ids");
  const std::string file = Path("logits.npy");
  {
    std::ofstream tokens(Path("tokens"));
    tokens << Join(ids, ",");
  }
  const ProgramResult result = Kvant({"logits", "--tokens-file", Path("tokens"), "--out", file});
  ASSERT_EQ(result.exit, 0) << result.errors;
  const auto rows = Values<int32_t>("rows");
  const auto columns = Values<int32_t>("columns");
  const auto logits = Values<float>("logits");
  const auto scale = Values<float>("scale");
  const size_t per_row = columns.size() / rows.size();
  std::ifstream in(file, std::ios::binary | std::ios::ate);
  const auto size = static_cast<size_t>(in.tellg());
  char start[10] = {};
  in.seekg(0).read(start, sizeof(start));
  uint16_t header = 0;
  std::memcpy(&header, start + 8, sizeof(header));  // NPY 1.0: magic, version, header length
  const size_t vocab = (size - sizeof(start) - header) / ids.size() / sizeof(float);
  double worst = 0.0;
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t j = 0; j < per_row; ++j) {
      const size_t at =
          static_cast<size_t>(rows[i]) * vocab + static_cast<size_t>(columns[i * per_row + j]);
      float found = 0.0F;
      in.seekg(static_cast<std::streamoff>(sizeof(start) + header + at * sizeof(float)));
      in.read(reinterpret_cast<char*>(&found), sizeof(found));
      ASSERT_TRUE(in.good());
      worst = std::max(worst, std::fabs(static_cast<double>(found - logits[i * per_row + j])) /
                                  static_cast<double>(scale[i]));
    }
  }
  std::printf("%zu rows of %zu logits compared, largest relative error %.1e\n", rows.size(),
              per_row, worst);
  EXPECT_LT(worst, kTolerance);
}

TEST_F(RealModel, GreedyTextIsThatOfTransformers) {
  const auto prompt = Values<int32_t>("prompt");
  const auto expected = Values<int32_t>("greedy");
  const nlohmann::json line = {{"custom_id", "greedy"},
                               {"method", "POST"},
                               {"url", "/v1/completions"},
                               {"body",
                                {{"model", "gemma"},
                                 {"prompt", prompt},
                                 {"max_tokens", expected.size()},
                                 {"temperature", 0}}}};
  ASSERT_TRUE(node::WriteFile(Path("requests"), line.dump() + "\n").ok());
  const ProgramResult result = Kvant(
      {"run", "--requests", Path("requests"), "--codec", "raw-fp32", "--answers", Path("answers")});
  ASSERT_EQ(result.exit, 0) << result.errors;
  const auto answers = node::ParseAnswers(ReadAll(Path("answers")), "answers");
  ASSERT_TRUE(answers.ok()) << answers.status().ToString();
  EXPECT_EQ(answers->front().tokens, expected);
}

// With the cache (and too little memory in the node to do without it) and without, every codec.
TEST_F(RealModel, TheCacheChangesNoAnswer) {
  std::istringstream in(ReadAll(std::string(KVANT_SOURCE_DIR) + "/examples/requests.jsonl"));
  std::string some;
  int count = 0;
  for (std::string line; std::getline(in, line);) {
    const auto id = nlohmann::json::parse(line)["custom_id"].get<std::string>();
    const bool wanted = id.starts_with("acme-q0") || id.starts_with("birch-c1-t0");
    if (!wanted || ++count > kRequests) continue;
    some += line + "\n";
  }
  ASSERT_TRUE(node::WriteFile(Path("requests"), some).ok());
  for (const std::string codec : {"raw", "tile8", "tile4"}) {
    const auto run = [&](const std::string& name, std::vector<std::string> more) {
      std::vector<std::string> arguments = {
          "run",       "--requests", Path("requests"), "--codec",           codec, "--wire", "full",
          "--answers", Path(name),   "--report",       Path(name + ".json")};
      arguments.insert(arguments.end(), more.begin(), more.end());
      const ProgramResult result = Kvant(arguments);
      EXPECT_EQ(result.exit, 0) << codec << ": " << result.errors;
      return nlohmann::json::parse(ReadAll(Path(name + ".json")));
    };
    run("without", {"--no-cache"});
    const auto report =
        run("with", {"--reference", Path("without"), "--local-cache", "2MiB", "--max-batch", "1"});
    EXPECT_EQ(report.at("identical_to_reference"), kRequests) << codec;
    EXPECT_GT(report.at("tier_hit_tokens").get<uint64_t>(), 0U) << codec;
  }
}

}  // namespace
}  // namespace kvant
