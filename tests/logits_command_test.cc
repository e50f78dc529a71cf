// `kvant logits`: the file is what numpy reads, its numbers are transformers', and what cannot be
// computed is named.
#include "node/logits_command.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <numeric>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "node/safetensors.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

const fs::path kModel = fs::path(KVANT_SOURCE_DIR) / "tests/golden/models/llama_gqa";
constexpr size_t kVocab = 258;
constexpr size_t kContext = 512;

std::string Read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

template <typename T>
std::vector<T> Values(std::string_view bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

class LogitsCommand : public testing::Test {
 protected:
  LogitsCommand() {
    options_.model = kModel;
    options_.out = directory_.path() / "logits.npy";
    options_.threads = 1;
  }

  // The array of a written file, [tokens][kVocab].
  std::vector<float> Written(size_t tokens) const {
    const std::string file = Read(options_.out);
    EXPECT_EQ(file.substr(0, 8), std::string("\x93NUMPY\x01\x00", 8));
    const size_t header = 10 + Values<uint16_t>(file.substr(8, 2)).at(0);
    EXPECT_EQ(header % 64, 0U);
    EXPECT_THAT(file.substr(10, header - 10),
                testing::AllOf(HasSubstr("'descr': '<f4'"), HasSubstr("'fortran_order': False"),
                               HasSubstr("'shape': (" + std::to_string(tokens) + ", 258)"),
                               testing::EndsWith("\n")));
    EXPECT_EQ(file.size(), header + tokens * kVocab * sizeof(float));
    return Values<float>(std::string_view(file).substr(header));
  }

  void ExpectRefused(const std::vector<std::string>& said) const {
    const Result<int> result = WriteLogits(options_);
    ASSERT_FALSE(result.ok());
    EXPECT_EQ(result.status().code(), StatusCode::kInvalidArgument) << result.status().ToString();
    for (const std::string& part : said) EXPECT_THAT(result.status().message(), HasSubstr(part));
    EXPECT_TRUE(fs::is_empty(directory_.path())) << "something was left behind";
  }

  support::TemporaryDirectory directory_;
  LogitsOptions options_;
};

TEST_F(LogitsCommand, WritesWhatTransformersComputes) {
  const std::string golden = Read(kModel / "golden.safetensors");
  const auto tensors = ParseSafetensors(AsBytes(golden), "golden");
  ASSERT_TRUE(tensors.ok());
  const auto tokens = Values<int32_t>(AsText(tensors->at("tokens").bytes));
  const auto rows = Values<int32_t>(AsText(tensors->at("rows").bytes));
  const auto expected = Values<float>(AsText(tensors->at("logits").bytes));
  options_.tokens_file = directory_.path() / "tokens";
  {
    std::ofstream file(options_.tokens_file);
    for (const int32_t token : tokens) file << token << (token % 3 == 0 ? "\n" : ", ");
  }
  ASSERT_TRUE(WriteLogits(options_).ok());
  const std::vector<float> exact = Written(tokens.size());

  options_.dtype = "bf16";
  ASSERT_TRUE(WriteLogits(options_).ok());
  const std::vector<float> rounded = Written(tokens.size());
  options_.codec = "tile4";
  ASSERT_TRUE(WriteLogits(options_).ok());
  const std::vector<float> coarse = Written(tokens.size());

  double error = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const float* row = expected.data() + i * kVocab;
    const float* found = exact.data() + static_cast<size_t>(rows[i]) * kVocab;
    const float largest = std::abs(*std::max_element(
        row, row + kVocab, [](float a, float b) { return std::abs(a) < std::abs(b); }));
    for (size_t j = 0; j < kVocab; ++j) {
      error = std::max(error, static_cast<double>(std::abs(found[j] - row[j]) / largest));
    }
  }
  EXPECT_LT(error, 1e-4);
  // The first block attends nothing that was stored; later ones attend what the codec keeps.
  const auto block = static_cast<std::ptrdiff_t>(64 * kVocab);
  EXPECT_TRUE(std::equal(exact.begin(), exact.begin() + block, rounded.begin()));
  const auto deviation = [&](const std::vector<float>& other) {
    return std::transform_reduce(exact.begin(), exact.end(), other.begin(), 0.0, std::plus<>(),
                                 [](float a, float b) { return std::abs(double{a} - b); });
  };
  EXPECT_GT(deviation(rounded), 0);
  EXPECT_GT(deviation(coarse), deviation(rounded));
}

TEST_F(LogitsCommand, TakesTheWholeContextAndNoMore) {
  for (size_t i = 0; i < kContext; ++i) options_.tokens += std::to_string(i % kVocab) + ",";
  ASSERT_TRUE(WriteLogits(options_).ok());
  Written(kContext);
  fs::remove(options_.out);
  options_.tokens += "7";
  ExpectRefused({"513 tokens", "context of 512", kModel});
}

TEST_F(LogitsCommand, NamesWhatIsWrong) {
  ExpectRefused({"--tokens"});
  options_.tokens_file = "/nowhere/tokens";
  ExpectRefused({"/nowhere/tokens"});
  options_.tokens = "1,2,x3";
  ExpectRefused({"token 2", "x3", "kvant tokenize"});
  options_.tokens = "1,-2";
  ExpectRefused({"token 1", "-2"});
  options_.tokens = "1,99999999999";
  ExpectRefused({"token 1", "99999999999"});
  options_.tokens = "1,2,258";
  ExpectRefused({"token 2", "258", "end at 257"});
  options_.tokens = "1,2,3";
  options_.codec = "zip";
  ExpectRefused({"zip", "raw-fp32"});
  options_.codec.clear();
  options_.model = "/nowhere/model";
  ExpectRefused({"/nowhere/model"});
  options_.model = kModel;
  options_.out = "/nowhere/logits.npy";
  ExpectRefused({"/nowhere/logits.npy", "folder"});
  // A directory in the way is found when the file gets its name.
  options_.out = directory_.path();
  const Result<int> result = WriteLogits(options_);
  ASSERT_FALSE(result.ok());
  EXPECT_THAT(result.status().message(), HasSubstr(options_.out));
  EXPECT_FALSE(fs::exists(options_.out + ".part"));
}

}  // namespace
}  // namespace kvant::node
