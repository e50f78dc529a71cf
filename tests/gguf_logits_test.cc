// Models out of GGUF files against transformers reading the same files
// (scripts/golden/gguf_models.py), through what `kvant logits` does.
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "node/logits_command.h"
#include "node/safetensors.h"

namespace kvant::node {
namespace {

// Relative to the row's largest logit.
constexpr double kTolerance = 1e-4;

std::string ReadAll(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

template <typename T>
std::vector<T> Values(std::span<const std::byte> bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

class GgufLogits : public testing::TestWithParam<const char*> {};

TEST_P(GgufLogits, AreThoseOfTransformers) {
  const std::string base = std::string(KVANT_SOURCE_DIR "/tests/golden/gguf/") + GetParam();
  const std::string file = ReadAll(base + ".safetensors");
  const auto golden = ParseSafetensors(AsBytes(file), "golden");
  ASSERT_TRUE(golden.ok()) << golden.status().ToString();
  const auto tokens = Values<int32_t>(golden->at("tokens").bytes);
  const auto wanted = Values<float>(golden->at("logits").bytes);

  const auto out = std::filesystem::temp_directory_path() /
                   (std::string("kvant_gguf_logits_") + GetParam() + ".npy");
  LogitsOptions options;
  options.model = base + ".gguf";
  options.tokens = fmt::format("{}", fmt::join(tokens, ","));
  options.out = out.string();
  options.threads = 1;
  const auto status = WriteLogits(options);
  ASSERT_TRUE(status.ok()) << status.status().ToString();
  EXPECT_EQ(*status, 0);
  const std::string npy = ReadAll(out);
  std::filesystem::remove(out);
  // The numbers are the end of the file, behind a header of variable length.
  ASSERT_GT(npy.size(), wanted.size() * sizeof(float));
  const auto found =
      Values<float>(AsBytes(npy).subspan(npy.size() - wanted.size() * sizeof(float)));

  const size_t vocab = wanted.size() / tokens.size();
  for (size_t row = 0; row < tokens.size(); ++row) {
    double largest = 0;
    double error = 0;
    for (size_t i = row * vocab; i < (row + 1) * vocab; ++i) {
      largest = std::max(largest, std::abs(static_cast<double>(wanted[i])));
      error = std::max(error, std::abs(static_cast<double>(wanted[i]) - found[i]));
    }
    ASSERT_LE(error, kTolerance * largest) << "row " << row;
  }
}

INSTANTIATE_TEST_SUITE_P(Files, GgufLogits, testing::Values("llama", "qwen2", "qwen3", "gemma3"));

}  // namespace
}  // namespace kvant::node
