// The weights of a GGUF file under the names, in the order and in the types of a Hugging Face
// checkpoint.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "node/gguf.h"
#include "node/mapped_file.h"
#include "node/weight_source.h"

namespace kvant::node {

// What llama.cpp's converter (convert_hf_to_gguf.py) changed in a file's tensors, to be undone.
struct GgufConventions {
  // Not 0: the rows of each head of query and key, where Hugging Face rotates channel j with
  // j + head_dim / 2, were reordered so that the two stand side by side.
  int interleaved_q_heads = 0;
  int interleaved_kv_heads = 0;
  bool norm_plus_one = false;   // norms are stored as 1 + w
  bool sandwich_norms = false;  // four norms a layer: other names
};

// Single-owner. Tensors of F32, F16 and BF16 that need no change lie in the file; others are made
// on first use and kept until released: quantized ones in bf16, rounded to nearest even from the
// fp32 value.
class GgufWeights final : public WeightSource {
 public:
  // `mapped` holds the bytes of `file`; null when the caller keeps them for this object's life.
  GgufWeights(GgufFile file, std::unique_ptr<MappedFile> mapped, const GgufConventions& conventions)
      : mapped_(std::move(mapped)), file_(std::move(file)), conventions_(conventions) {}

  bool Has(std::string_view name) const override;
  Result<Tensor> Find(std::string_view name, std::span<const int64_t> shape) override;
  void Release(std::string_view name) override;

 private:
  // The file's name of a tensor; nothing for names that no model of this form has.
  std::optional<std::string> NameInFile(std::string_view name) const;
  // What the file holds in another form is made in *made.
  Result<Tensor> Make(const std::string& name, const GgufTensor& stored,
                      std::unique_ptr<std::byte[]>* made) const;

  std::unique_ptr<MappedFile> mapped_;
  GgufFile file_;
  GgufConventions conventions_;
  struct Made {
    Tensor tensor;
    std::unique_ptr<std::byte[]> bytes;  // null: they lie in the file
  };
  std::map<std::string, Made, std::less<>> made_;  // by the file's name
};

}  // namespace kvant::node
