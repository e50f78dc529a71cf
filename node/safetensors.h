// Checkpoints in the safetensors format, mapped read-only:
// https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
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

// A tensor of a mapped file. Borrowed from its Checkpoint; not necessarily aligned.
struct Tensor {
  DataType type = DataType::kOther;
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;  // row-major, little-endian; size fits type and shape
};

using TensorMap = std::map<std::string, Tensor, std::less<>>;

// The only entry for bytes that nobody vouches for. Tensors must lie in `file` without overlap or
// gap, as the format demands. kInvalidArgument says what is wrong with which tensor; `name` is the
// file named in errors.
Result<TensorMap> ParseSafetensors(std::span<const std::byte> file, const std::string& name);

// All tensors of a model directory: model.safetensors, or the shards that
// model.safetensors.index.json lists. Immutable. The files must not be truncated while it lives.
class Checkpoint {
 public:
  // kInvalidArgument: a file is missing or malformed, or a tensor is not where the index says.
  static Result<std::unique_ptr<Checkpoint>> Open(const std::filesystem::path& directory);
  ~Checkpoint();
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;

  bool Has(std::string_view name) const { return tensors_.contains(name); }
  // kInvalidArgument: no such tensor (named), or another shape (expected and found).
  // kUnsupported: its type is none of bf16, fp16, fp32.
  Result<Tensor> Find(std::string_view name, std::span<const int64_t> shape) const;
  const TensorMap& tensors() const { return tensors_; }
  uint64_t total_bytes() const { return total_bytes_; }

 private:
  class MappedFile;
  Checkpoint();

  std::string name_;  // the directory, for errors
  std::vector<std::unique_ptr<MappedFile>> files_;
  TensorMap tensors_;
  uint64_t total_bytes_ = 0;
};

}  // namespace kvant::node
