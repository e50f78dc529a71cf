// What a Hugging Face model directory says about its model: config.json and generation_config.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kernels/codec.h"
#include "kernels/vector.h"

namespace kvant::node {

// Architectures whose forward pass node/decoder.cc knows (docs/models.md, "Architectures").
enum class Architecture : uint8_t {
  kLlama,
  kMistral,
  kQwen2,
  kQwen3,
  kGemma3,
  kDeepseekV2,
  kDeepseekV3
};

// Gate of the MLP.
enum class Activation : uint8_t { kSilu, kGeluTanh };

// Multi-head latent attention (DeepSeek-V2, section 2.1). A token's state is one latent and one
// rope key for all heads.
struct LatentAttention {
  int q_rank = 0;     // 0: queries are projected at once
  int kv_rank = 0;    // width of the latent
  int nope_dim = 0;   // channels of a head's query and key without rope
  int rope_dim = 0;   // channels with rope
  int value_dim = 0;  // channels of a head's value
  bool interleaved = true;
};

// Mixture of experts with shared experts (DeepSeekMoE; DeepSeek-V3, section 2.1.2).
struct MixtureOfExperts {
  // kGreedy: softmax, the best experts. kGroupLimited: softmax, the best of the groups whose best
  // expert is best. kSigmoid: sigmoid plus a bias that only chooses; groups by their best two.
  enum class Routing : uint8_t { kGreedy, kGroupLimited, kSigmoid };
  Routing routing = Routing::kGreedy;
  int experts = 0;  // 0: every layer is dense
  int shared_experts = 0;
  int intermediate = 0;  // of one expert
  int experts_per_token = 0;
  int dense_layers = 0;  // the first ones
  int groups = 1;
  int groups_per_token = 1;
  bool normalize = false;  // weights of a token's experts sum to 1 before `scale`
  double scale = 1.0;
};

// Immutable value. Every number was checked to be in a sane range; q_heads is a multiple of
// kv_heads, dimensions that are attended are multiples of 8.
struct ModelConfig {
  Architecture architecture = Architecture::kLlama;
  int layers = 0;
  int hidden = 0;        // width of the residual stream
  int intermediate = 0;  // width of the gated MLP
  int q_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int vocab = 0;
  int max_positions = 0;  // longest context, in tokens
  float rms_norm_eps = 1e-6F;
  bool tied_output = false;  // the output layer is the embedding table
  double rope_theta = 10000.0;
  kernels::RopeScaling rope_scaling;
  double attention_scale = 0.0;  // of the scores
  Activation activation = Activation::kSilu;
  bool qkv_bias = false;
  bool output_bias = false;       // of attention's output projection
  bool qk_norm = false;           // each head's query and key pass an RMS norm before rope
  bool sandwich_norms = false;    // what a layer's two halves add is normed as well
  bool norm_plus_one = false;     // stored norm weights are w of (1 + w)
  double embedding_scale = 1.0;   // embeddings are multiplied by it
  int sliding_window = 0;         // tokens that a sliding layer attends, its own included
  std::vector<bool> sliding;      // [layers]; empty: none
  double local_rope_theta = 0.0;  // sliding layers' own; 0: the same as the others
  std::optional<LatentAttention> latent;
  MixtureOfExperts experts;
  std::optional<int32_t> bos;
  std::vector<int32_t> eos;  // any of them ends a generation; may be empty

  // Tokens that a layer attends, its own included; 0: all.
  int Window(int layer) const {
    return !sliding.empty() && sliding[static_cast<size_t>(layer)] ? sliding_window : 0;
  }
  // First position that a layer attends from `position`.
  int FirstVisible(int layer, int position) const {
    const int window = Window(layer);
    return window == 0 || position < window ? 0 : position - window + 1;
  }
  bool IsMixture(int layer) const { return experts.experts != 0 && layer >= experts.dense_layers; }
  // What a layer keeps of `tokens` tokens.
  kernels::LayerShape StateShape(int tokens) const;
  // Channels of a head's query as projected, and of its value.
  int query_dim() const { return latent ? latent->nope_dim + latent->rope_dim : head_dim; }
  int value_dim() const { return latent ? latent->value_dim : head_dim; }
  int q_width() const { return q_heads * query_dim(); }
  int kv_width() const { return kv_heads * head_dim; }
  bool IsEos(int32_t token) const;
};

// Reads both files of `directory`; generation_config.json may be absent.
// kInvalidArgument: no model directory, or a field is missing or out of range (named).
// kUnsupported: an architecture, rope type, activation or bias that is not implemented; the message
// lists what is. Both spellings of rope are read: rope_theta and rope_scaling, and rope_parameters
// (transformers 5).
Result<ModelConfig> LoadConfig(const std::filesystem::path& directory);

// The same from text. generation_json may be empty. `name` is the directory named in errors.
Result<ModelConfig> ParseConfig(std::string_view config_json, std::string_view generation_json,
                                const std::string& name);

}  // namespace kvant::node
