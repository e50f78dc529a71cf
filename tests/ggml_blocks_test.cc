// Quantized blocks decoded to the same bits as by ggml's Python package.
#include "kernels/ggml_blocks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <string>

#include "base/bytes.h"
#include "node/safetensors.h"

namespace kvant::kernels {
namespace {

std::string ReadAll(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

class GoldenBlocks : public testing::TestWithParam<uint32_t> {};

TEST_P(GoldenBlocks, AreDecodedToTheSameBits) {
  const GgmlType* type = FindGgmlType(GetParam());
  ASSERT_NE(type, nullptr);
  ASSERT_NE(type->dequantize, nullptr);
  const std::string file = ReadAll(KVANT_SOURCE_DIR "/tests/golden/gguf/blocks.safetensors");
  const auto tensors = node::ParseSafetensors(AsBytes(file), "blocks.safetensors");
  ASSERT_TRUE(tensors.ok()) << tensors.status().ToString();
  const node::Tensor& blocks = tensors->at(std::string(type->name) + ".blocks");
  const node::Tensor& values = tensors->at(std::string(type->name) + ".values");
  ASSERT_EQ(blocks.shape[1], type->block_bytes);
  ASSERT_EQ(values.shape[1], type->block_values);

  std::vector<float> decoded(values.bytes.size() / sizeof(float));
  DequantizeBlocks(*type, blocks.bytes, decoded);
  for (size_t i = 0; i < decoded.size(); ++i) {
    float wanted = 0;
    std::memcpy(&wanted, values.bytes.data() + i * sizeof(float), sizeof(float));
    ASSERT_EQ(std::bit_cast<uint32_t>(decoded[i]), std::bit_cast<uint32_t>(wanted))
        << "value " << i << " of " << type->name << ": " << decoded[i] << ", expected " << wanted;
  }
}

TEST_P(GoldenBlocks, AreDecodedOneByOneAsTogether) {
  const GgmlType& type = *FindGgmlType(GetParam());
  std::vector<std::byte> blocks(3 * type.block_bytes);
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<std::byte>(i * 37 % 101);
  std::vector<float> together(3 * type.block_values);
  DequantizeBlocks(type, blocks, together);
  for (size_t block = 0; block < 3; ++block) {
    std::vector<float> alone(type.block_values);
    DequantizeBlocks(type, std::span(blocks).subspan(block * type.block_bytes, type.block_bytes),
                     alone);
    EXPECT_EQ(std::memcmp(alone.data(), together.data() + block * type.block_values,
                          alone.size() * sizeof(float)),
              0);
  }
}

INSTANTIATE_TEST_SUITE_P(Types, GoldenBlocks, testing::Values(2, 3, 6, 7, 8, 12, 13, 14),
                         [](const auto& about) {
                           return std::string(FindGgmlType(about.param)->name);
                         });

TEST(GgmlTypes, AreKnownByTheirIds) {
  EXPECT_EQ(FindGgmlType(4), nullptr);  // Q4_2, which ggml took back
  EXPECT_EQ(FindGgmlType(1000), nullptr);
  EXPECT_EQ(FindGgmlType(kGgmlBf16)->name, "BF16");
  EXPECT_EQ(FindGgmlType(10)->name, "Q2_K");
  EXPECT_EQ(FindGgmlType(10)->dequantize, nullptr);
  EXPECT_EQ(FindGgmlType(14)->block_bytes, 210U);
}

}  // namespace
}  // namespace kvant::kernels
