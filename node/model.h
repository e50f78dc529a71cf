// A model as it lies in a Hugging Face directory: configuration, tokenizer and weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "cache_service/block_key.h"
#include "kernels/linear.h"
#include "kernels/vector.h"
#include "node/config.h"
#include "node/safetensors.h"
#include "node/tokenizer.h"

namespace kvant::node {

// One transformer layer. Borrowed from its Model.
struct LayerWeights {
  const float* attention_norm = nullptr;  // [hidden]
  kernels::Weight query;                  // [q_heads * head_dim][hidden]
  kernels::Weight key;                    // [kv_heads * head_dim][hidden]
  kernels::Weight value;                  // [kv_heads * head_dim][hidden]
  kernels::Weight output;                 // [hidden][q_heads * head_dim]
  const float* mlp_norm = nullptr;        // [hidden]
  kernels::Weight gate;                   // [intermediate][hidden]
  kernels::Weight up;                     // [intermediate][hidden]
  kernels::Weight down;                   // [hidden][intermediate]
};

// Immutable, Thread-safe; one is shared by all decoders of a process. bf16 weights are read where
// they lie in the mapped file and expanded to fp32 once for prefill; fp16 and fp32 checkpoints have
// fp32 only (Weight::bf16 is null), because bf16 would lose bits.
class Model {
 public:
  // Reads config.json, tokenizer.json and the safetensors of `directory`; touches every byte once
  // for the digest. Errors are those of LoadConfig, Tokenizer::Load and Checkpoint.
  static Result<std::unique_ptr<Model>> Load(const std::filesystem::path& directory);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const ModelConfig& config() const { return config_; }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  const LayerWeights& layer(int index) const { return layers_[static_cast<size_t>(index)]; }
  const float* final_norm() const { return final_norm_; }          // [hidden]
  const kernels::Weight& embedding() const { return embedding_; }  // [vocab][hidden]
  const kernels::Weight& output() const { return output_; }        // [vocab][hidden]
  const kernels::RopeTable& rope() const { return *rope_; }        // max_positions of the config
  // Writes the embedding of `token` to out[hidden]. REQUIRES: 0 <= token < vocab.
  void Embed(int32_t token, float* out) const;
  // SHA-256 over what the bytes of a block depend on besides its tokens: the configuration and
  // every weight's name, type, shape and bytes. The same model has the same digest however it is
  // cut into shards.
  const Digest& digest() const { return digest_; }

 private:
  class Loader;
  Model();

  ModelConfig config_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<kernels::RopeTable> rope_;
  std::vector<LayerWeights> layers_;
  const float* final_norm_ = nullptr;
  kernels::Weight embedding_;
  kernels::Weight output_;
  // fp32 copies, and bf16 copies of tensors at odd addresses, that the weights point into.
  std::vector<std::unique_ptr<float[]>> expanded_;
  std::vector<std::unique_ptr<uint16_t[]>> realigned_;
  Digest digest_{};
};

}  // namespace kvant::node
