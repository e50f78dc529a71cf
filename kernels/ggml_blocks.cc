#include "kernels/ggml_blocks.h"

#include <algorithm>
#include <iterator>

#include "base/bytes.h"
#include "base/check.h"
#include "kernels/float_formats.h"

namespace kvant::kernels {
namespace {

constexpr size_t kBlock = 32;   // values in a block of the Qn_0 and Qn_1 types
constexpr size_t kSuper = 256;  // values in a block of the Qn_K types

float Half(const std::byte* at) { return FromFp16(LoadLittle<uint16_t>(at)); }
uint32_t Byte(const std::byte* at) { return std::to_integer<uint32_t>(*at); }
float Signed(uint32_t value, int bias) {
  return static_cast<float>(static_cast<int32_t>(value) - bias);
}

// fp16 scale d, 32 signed bytes: d * q.
constexpr size_t kQ8Bytes = 2 + kBlock;
void DequantizeQ8_0(const std::byte* block, size_t count, float* out) {
  for (; count != 0; --count, block += kQ8Bytes, out += kBlock) {
    const float d = Half(block);
    const std::byte* q = block + 2;
    for (size_t i = 0; i < kBlock; ++i) {
      out[i] = static_cast<float>(static_cast<int8_t>(Byte(q + i))) * d;
    }
  }
}

// fp16 scale d, 16 bytes of two 4-bit numbers; the low halves are values 0..15, the high ones
// 16..31: d * (q - 8).
constexpr size_t kQ4_0Bytes = 2 + kBlock / 2;
void DequantizeQ4_0(const std::byte* block, size_t count, float* out) {
  for (; count != 0; --count, block += kQ4_0Bytes, out += kBlock) {
    const float d = Half(block);
    const std::byte* q = block + 2;
    for (size_t i = 0; i < kBlock / 2; ++i) {
      out[i] = d * Signed(Byte(q + i) & 0xFU, 8);
      out[i + kBlock / 2] = d * Signed(Byte(q + i) >> 4, 8);
    }
  }
}

// fp16 scale d, fp16 minimum m, 4-bit numbers as in Q4_0: d * q + m.
constexpr size_t kQ4_1Bytes = 4 + kBlock / 2;
void DequantizeQ4_1(const std::byte* block, size_t count, float* out) {
  for (; count != 0; --count, block += kQ4_1Bytes, out += kBlock) {
    const float d = Half(block);
    const float m = Half(block + 2);
    const std::byte* q = block + 4;
    for (size_t i = 0; i < kBlock / 2; ++i) {
      out[i] = d * Signed(Byte(q + i) & 0xFU, 0) + m;
      out[i + kBlock / 2] = d * Signed(Byte(q + i) >> 4, 0) + m;
    }
  }
}

// fp16 scale d, 32 bits that are the fifth bits of the values, 4-bit numbers as in Q4_0:
// d * (q - 16).
constexpr size_t kQ5_0Bytes = 2 + 4 + kBlock / 2;
void DequantizeQ5_0(const std::byte* block, size_t count, float* out) {
  for (; count != 0; --count, block += kQ5_0Bytes, out += kBlock) {
    const float d = Half(block);
    const auto high = LoadLittle<uint32_t>(block + 2);
    const std::byte* q = block + 6;
    for (size_t i = 0; i < kBlock / 2; ++i) {
      const uint32_t first = (Byte(q + i) & 0xFU) | ((high >> i & 1U) << 4);
      const uint32_t second = (Byte(q + i) >> 4) | ((high >> (i + kBlock / 2) & 1U) << 4);
      out[i] = d * Signed(first, 16);
      out[i + kBlock / 2] = d * Signed(second, 16);
    }
  }
}

// fp16 scale d, fp16 minimum m, 5-bit numbers as in Q5_0: d * q + m.
constexpr size_t kQ5_1Bytes = 4 + 4 + kBlock / 2;
void DequantizeQ5_1(const std::byte* block, size_t count, float* out) {
  for (; count != 0; --count, block += kQ5_1Bytes, out += kBlock) {
    const float d = Half(block);
    const float m = Half(block + 2);
    const auto high = LoadLittle<uint32_t>(block + 4);
    const std::byte* q = block + 8;
    for (size_t i = 0; i < kBlock / 2; ++i) {
      const uint32_t first = (Byte(q + i) & 0xFU) | ((high >> i & 1U) << 4);
      const uint32_t second = (Byte(q + i) >> 4) | ((high >> (i + kBlock / 2) & 1U) << 4);
      out[i] = d * Signed(first, 0) + m;
      out[i + kBlock / 2] = d * Signed(second, 0) + m;
    }
  }
}

// The 6-bit scale and minimum of the eight groups of 32 values of Q4_K and Q5_K, packed into 12
// bytes: groups 0..3 have theirs in the low six bits of bytes 0..3 and 4..7; groups 4..7 have the
// low four bits in bytes 8..11 and the two others on top of bytes 0..7.
struct Group {
  float scale;
  float minimum;
};
Group GroupOf(const std::byte* packed, size_t group, float d, float d_minimum) {
  uint32_t scale = 0;
  uint32_t minimum = 0;
  if (group < 4) {
    scale = Byte(packed + group) & 0x3FU;
    minimum = Byte(packed + group + 4) & 0x3FU;
  } else {
    scale = (Byte(packed + group + 4) & 0xFU) | (Byte(packed + group - 4) >> 6 << 4);
    minimum = (Byte(packed + group + 4) >> 4) | (Byte(packed + group) >> 6 << 4);
  }
  return {d * static_cast<float>(scale), d_minimum * static_cast<float>(minimum)};
}

// fp16 scale of the scales, fp16 scale of the minima, 12 bytes of groups, 128 bytes of 4-bit
// numbers: 32 bytes hold one group in their low and the next in their high halves:
// scale * q - minimum.
constexpr size_t kQ4KBytes = 4 + 12 + kSuper / 2;
void DequantizeQ4K(const std::byte* block, size_t count, float* out) {
  for (; count != 0; --count, block += kQ4KBytes, out += kSuper) {
    const float d = Half(block);
    const float d_minimum = Half(block + 2);
    const std::byte* q = block + 16;
    for (size_t group = 0; group < 8; ++group) {
      const Group g = GroupOf(block + 4, group, d, d_minimum);
      const std::byte* from = q + group / 2 * 32;
      const uint32_t shift = group % 2 * 4;
      for (size_t i = 0; i < 32; ++i) {
        out[group * 32 + i] = g.scale * Signed(Byte(from + i) >> shift & 0xFU, 0) - g.minimum;
      }
    }
  }
}

// As Q4_K, with 32 bytes before the 4-bit numbers: bit g of byte i is the fifth bit of value i of
// group g.
constexpr size_t kQ5KBytes = 4 + 12 + kSuper / 8 + kSuper / 2;
void DequantizeQ5K(const std::byte* block, size_t count, float* out) {
  for (; count != 0; --count, block += kQ5KBytes, out += kSuper) {
    const float d = Half(block);
    const float d_minimum = Half(block + 2);
    const std::byte* high = block + 16;
    const std::byte* q = high + kSuper / 8;
    for (size_t group = 0; group < 8; ++group) {
      const Group g = GroupOf(block + 4, group, d, d_minimum);
      const std::byte* from = q + group / 2 * 32;
      const uint32_t shift = group % 2 * 4;
      for (size_t i = 0; i < 32; ++i) {
        const uint32_t fifth = Byte(high + i) >> group & 1U;
        const uint32_t value = (Byte(from + i) >> shift & 0xFU) | (fifth << 4);
        out[group * 32 + i] = g.scale * Signed(value, 0) - g.minimum;
      }
    }
  }
}

// 128 bytes of low halves, 64 bytes of the two upper bits, 16 signed scales of 16 values each, fp16
// scale d of the scales: (d * scale) * (q - 32). Each half of the block (128 values, four groups of
// 32) takes 64 bytes of low and 32 of upper bits: groups 0 and 1 the low halves of bytes 0..31
// and 32..63, groups 2 and 3 the high ones; group g has bits 2g and 2g+1 of the upper bytes.
constexpr size_t kQ6KBytes = kSuper / 2 + kSuper / 4 + kSuper / 16 + 2;
void DequantizeQ6K(const std::byte* block, size_t count, float* out) {
  for (; count != 0; --count, block += kQ6KBytes, out += kSuper) {
    const std::byte* scales = block + kSuper / 2 + kSuper / 4;
    const float d = Half(scales + kSuper / 16);
    for (size_t group = 0; group < 8; ++group) {
      const size_t half = group / 4;
      const std::byte* low = block + half * 64 + group % 2 * 32;
      const std::byte* upper = block + kSuper / 2 + half * 32;
      const uint32_t low_shift = group % 4 / 2 * 4;
      const uint32_t upper_shift = group % 4 * 2;
      for (size_t part = 0; part < 2; ++part) {
        const auto scale = static_cast<int8_t>(Byte(scales + group * 2 + part));
        const float factor = d * static_cast<float>(scale);
        for (size_t i = part * 16; i < part * 16 + 16; ++i) {
          const uint32_t value =
              (Byte(low + i) >> low_shift & 0xFU) | ((Byte(upper + i) >> upper_shift & 3U) << 4);
          out[group * 32 + i] = factor * Signed(value, 32);
        }
      }
    }
  }
}

// Sizes of what is not decoded are known all the same: such tensors may lie in a file, and what
// overlaps them is found.
constexpr GgmlType kTypes[] = {
    {kGgmlF32, "F32", 1, 4},
    {kGgmlF16, "F16", 1, 2},
    {2, "Q4_0", kBlock, kQ4_0Bytes, DequantizeQ4_0},
    {3, "Q4_1", kBlock, kQ4_1Bytes, DequantizeQ4_1},
    {6, "Q5_0", kBlock, kQ5_0Bytes, DequantizeQ5_0},
    {7, "Q5_1", kBlock, kQ5_1Bytes, DequantizeQ5_1},
    {8, "Q8_0", kBlock, kQ8Bytes, DequantizeQ8_0},
    {9, "Q8_1", kBlock, 40},
    {10, "Q2_K", kSuper, 84},
    {11, "Q3_K", kSuper, 110},
    {12, "Q4_K", kSuper, kQ4KBytes, DequantizeQ4K},
    {13, "Q5_K", kSuper, kQ5KBytes, DequantizeQ5K},
    {14, "Q6_K", kSuper, kQ6KBytes, DequantizeQ6K},
    {15, "Q8_K", kSuper, 292},
    {16, "IQ2_XXS", kSuper, 66},
    {17, "IQ2_XS", kSuper, 74},
    {18, "IQ3_XXS", kSuper, 98},
    {19, "IQ1_S", kSuper, 50},
    {20, "IQ4_NL", kBlock, 18},
    {21, "IQ3_S", kSuper, 110},
    {22, "IQ2_S", kSuper, 82},
    {23, "IQ4_XS", kSuper, 136},
    {24, "I8", 1, 1},
    {25, "I16", 1, 2},
    {26, "I32", 1, 4},
    {27, "I64", 1, 8},
    {28, "F64", 1, 8},
    {29, "IQ1_M", kSuper, 56},
    {kGgmlBf16, "BF16", 1, 2},
    {34, "TQ1_0", kSuper, 54},
    {35, "TQ2_0", kSuper, 66},
    {39, "MXFP4", kBlock, 17},
    {40, "NVFP4", 64, 36},
    {41, "Q1_0", 128, 18},
};

}  // namespace

const GgmlType* FindGgmlType(uint32_t id) {
  const auto* found = std::find_if(std::begin(kTypes), std::end(kTypes),
                                   [&](const GgmlType& type) { return type.id == id; });
  return found == std::end(kTypes) ? nullptr : found;
}

void DequantizeBlocks(const GgmlType& type, std::span<const std::byte> blocks,
                      std::span<float> out) {
  KV_CHECK(type.dequantize != nullptr);
  KV_CHECK(blocks.size() % type.block_bytes == 0);
  const size_t count = blocks.size() / type.block_bytes;
  KV_CHECK(out.size() == count * type.block_values);
  type.dequantize(blocks.data(), count, out.data());
}

}  // namespace kvant::kernels
