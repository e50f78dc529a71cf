// The tensor types of GGUF files, and the values that blocks of the quantized ones stand for.
// Layouts and arithmetic are those of ggml (ggml-common.h and ggml-quants.c, dequantize_row_*;
// github.com/ggml-org/ggml), whose Python package `gguf` (quants.py) is the golden decoder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace kvant::kernels {

// Facts of a type: its id in files, and how many bytes hold how many values. A row of a tensor is
// whole blocks.
struct GgmlType {
  uint32_t id = 0;
  std::string_view name;      // as ggml writes it: "Q4_K"
  uint32_t block_values = 1;  // values in a block
  uint32_t block_bytes = 1;
  // Writes block_values floats for each of `count` blocks; null for plain numbers and for types
  // that are not decoded. Use DequantizeBlocks.
  void (*dequantize)(const std::byte* blocks, size_t count, float* out) = nullptr;
};

constexpr uint32_t kGgmlF32 = 0;
constexpr uint32_t kGgmlF16 = 1;
constexpr uint32_t kGgmlBf16 = 30;

// Every type that ggml has given an id, decoded or not; nullptr for other ids.
const GgmlType* FindGgmlType(uint32_t id);

// Pure. The same bits as the Python package `gguf` gives in fp32, on every machine.
// REQUIRES: type.dequantize is not null; blocks.size() is a multiple of type.block_bytes, out has
// type.block_values floats for each block.
void DequantizeBlocks(const GgmlType& type, std::span<const std::byte> blocks,
                      std::span<float> out);

}  // namespace kvant::kernels
