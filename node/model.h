// A model as it lies in a Hugging Face directory or a GGUF file: configuration, tokenizer, weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "cache_service/block_key.h"
#include "kernels/ordered_gemm.h"
#include "kernels/vector.h"
#include "node/chat_template.h"
#include "node/config.h"
#include "node/tokenizer.h"
#include "node/weight_source.h"

namespace kvant::node {

// A gated MLP.
struct MlpWeights {
  kernels::OrderedWeights gate;  // [intermediate][hidden]
  kernels::OrderedWeights up;    // [intermediate][hidden]
  kernels::OrderedWeights down;  // [hidden][intermediate]
};

// Multi-head latent attention, absorbed: what made a head's key of a latent is put into its query,
// and its value is made of the sum of latents (DeepSeek-V2, section 2.1.2).
struct LatentWeights {
  kernels::OrderedWeights query_down;             // [q_rank][hidden]; empty without q_rank
  const float* query_norm = nullptr;              // [q_rank]
  kernels::OrderedWeights down;                   // [kv_rank + rope_dim][hidden]
  const float* norm = nullptr;                    // [kv_rank]
  std::vector<kernels::OrderedWeights> key_up;    // of each head: [kv_rank][nope_dim]
  std::vector<kernels::OrderedWeights> value_up;  // of each head: [value_dim][kv_rank]
};

// One transformer layer. Borrowed from its Model. Norms have the 1 added where the architecture
// says so. What an architecture lacks is null or empty.
struct LayerWeights {
  const float* attention_norm = nullptr;  // [hidden]
  kernels::OrderedWeights query;          // [q_width][hidden], or [q_width][q_rank]
  kernels::OrderedWeights key;            // [kv_heads * head_dim][hidden]
  kernels::OrderedWeights value;          // [kv_heads * head_dim][hidden]
  kernels::OrderedWeights output;         // [hidden][q_heads * value_dim]
  const float* query_bias = nullptr;      // [q_heads * head_dim]
  const float* key_bias = nullptr;        // [kv_heads * head_dim]
  const float* value_bias = nullptr;      // [kv_heads * head_dim]
  const float* output_bias = nullptr;     // [hidden]
  const float* query_norm = nullptr;      // [head_dim]
  const float* key_norm = nullptr;        // [head_dim]
  LatentWeights latent;
  const float* post_attention_norm = nullptr;  // [hidden], of what attention adds
  const float* mlp_norm = nullptr;             // [hidden]
  MlpWeights mlp;                              // in a mixture: the shared experts as one
  const float* post_mlp_norm = nullptr;        // [hidden], of what the MLP adds
  kernels::OrderedWeights router;              // [experts][hidden]
  const float* router_bias = nullptr;          // [experts], of the choice alone
  std::vector<MlpWeights> experts;
};

// "exact", "bf16", "int8".
std::string_view WeightFormName(kernels::WeightForm form);
// kInvalidArgument lists the names.
Result<kernels::WeightForm> ParseWeightForm(std::string_view name);

// Immutable, Thread-safe; one is shared by all decoders of a process. Matrices are copied from the
// file into the panels that products read, in one WeightForm; nothing of the file stays in memory
// for them. Always exact are what chooses a mixture's experts, and an embedding that is not the
// output matrix as well: little is read of them.
class Model {
 public:
  // From a Hugging Face directory (config.json, tokenizer, safetensors) or a GGUF file; touches
  // every byte once for the digest. Errors are those of LoadConfig, Tokenizer::LoadFrom,
  // LoadChatTemplate and Checkpoint, or of OpenGguf.
  static Result<std::unique_ptr<Model>> Load(
      const std::filesystem::path& path, kernels::WeightForm form = kernels::WeightForm::kExact);
  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const ModelConfig& config() const { return config_; }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  const ChatTemplate& chat_template() const { return chat_template_; }
  const LayerWeights& layer(int index) const { return layers_[static_cast<size_t>(index)]; }
  const float* final_norm() const { return final_norm_; }                  // [hidden]
  const kernels::OrderedWeights& embedding() const { return embedding_; }  // [vocab][hidden]
  const kernels::OrderedWeights& output() const { return output_; }        // [vocab][hidden]
  // Of the config's max_positions.
  const kernels::RopeTable& rope(int layer) const {
    return local_rope_ != nullptr && config_.Window(layer) != 0 ? *local_rope_ : *rope_;
  }
  // Writes the embedding of `token` to out[hidden]. REQUIRES: 0 <= token < vocab.
  void Embed(int32_t token, float* out) const;
  // SHA-256 over what the bytes of a block depend on besides its tokens: the configuration and
  // every weight's name, type, shape and bytes. The same model has the same digest however it is
  // cut into shards.
  const Digest& digest() const { return digest_; }
  // The form that matrices were asked in, and the bytes of memory that they take.
  kernels::WeightForm weight_form() const { return form_; }
  uint64_t weight_bytes() const { return weight_bytes_; }
  // What the bytes of a block depend on besides, for its class: empty as long as matrices are what
  // the file has.
  std::string numerics() const;

 private:
  class Loader;
  Model();
  // Fill config_, tokenizer_, chat_template_ and weights_.
  Status OpenDirectory(const std::filesystem::path& directory);
  Status OpenFile(const std::filesystem::path& file);

  ModelConfig config_;
  std::unique_ptr<Tokenizer> tokenizer_;
  ChatTemplate chat_template_;
  std::unique_ptr<WeightSource> weights_;
  std::unique_ptr<kernels::RopeTable> rope_;
  std::unique_ptr<kernels::RopeTable> local_rope_;  // sliding layers' own, if they have one
  std::vector<LayerWeights> layers_;
  const float* final_norm_ = nullptr;
  kernels::OrderedWeights embedding_;
  kernels::OrderedWeights output_;
  std::vector<std::unique_ptr<float[]>> vectors_;  // that norms and biases point at
  Digest digest_{};
  kernels::WeightForm form_ = kernels::WeightForm::kExact;
  uint64_t weight_bytes_ = 0;
  bool exact_ = true;  // all matrices
};

}  // namespace kvant::node
