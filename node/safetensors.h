// Checkpoints in the safetensors format, mapped read-only:
// https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the data).
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "node/mapped_file.h"
#include "node/weight_source.h"

namespace kvant::node {

// The only entry for bytes that nobody vouches for. Tensors must lie in `file` without overlap or
// gap, as the format demands. kInvalidArgument says what is wrong with which tensor; `name` is the
// file named in errors.
Result<TensorMap> ParseSafetensors(std::span<const std::byte> file, const std::string& name);

// All tensors of a model directory: model.safetensors, or the shards that
// model.safetensors.index.json lists. Immutable. The files must not be truncated while it lives.
class Checkpoint final : public WeightSource {
 public:
  // kInvalidArgument: a file is missing or malformed, or a tensor is not where the index says.
  static Result<std::unique_ptr<Checkpoint>> Open(const std::filesystem::path& directory);
  ~Checkpoint() override;
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;

  bool Has(std::string_view name) const override { return tensors_.contains(name); }
  Result<Tensor> Find(std::string_view name, std::span<const int64_t> shape) override;
  void Release(std::string_view name) override;
  const TensorMap& tensors() const { return tensors_; }
  uint64_t total_bytes() const { return total_bytes_; }

 private:
  Checkpoint();

  std::string name_;  // the directory, for errors
  std::vector<std::unique_ptr<MappedFile>> files_;
  TensorMap tensors_;
  uint64_t total_bytes_ = 0;
};

}  // namespace kvant::node
