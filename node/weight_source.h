// Where a model's weights come from: tensors under the names that Hugging Face gives them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace kvant::node {

// What a weight may be stored as. Other types may be in a file, as long as the model does not need
// the tensor.
enum class DataType : uint8_t { kOther, kBf16, kFp16, kFp32 };

// "BF16", "F16", "F32", "other".
std::string_view DataTypeName(DataType type);

// A tensor of a mapped file or of its source's memory. Borrowed from its WeightSource; not
// necessarily aligned.
struct Tensor {
  DataType type = DataType::kOther;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;  // row-major, little-endian; size fits type and shape
};

using TensorMap = std::map<std::string, Tensor, std::less<>>;

// Single-owner; what Find gave stays valid and unchanged until it is released or the source ends.
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  virtual bool Has(std::string_view name) const = 0;
  // kInvalidArgument: no such tensor (named), or another shape (expected and found).
  // kUnsupported: its type is none that can be read.
  virtual Result<Tensor> Find(std::string_view name, std::span<const int64_t> shape) = 0;
  // Gives the memory of a tensor back; it may be found again.
  virtual void Release(std::string_view name) = 0;
};

}  // namespace kvant::node
