// What a Hugging Face model directory says about its model: config.json and generation_config.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kernels/vector.h"

namespace kvant::node {

// Architectures whose forward pass node/decoder.cc knows.
enum class Architecture : uint8_t { kLlama };

// Immutable value. Every number was checked to be in a sane range; q_heads is a multiple of
// kv_heads, head_dim of 8.
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
  std::optional<int32_t> bos;
  std::vector<int32_t> eos;  // any of them ends a generation; may be empty

  int q_width() const { return q_heads * head_dim; }
  int kv_width() const { return kv_heads * head_dim; }
  bool IsEos(int32_t token) const;
};

// Reads both files of `directory`; generation_config.json may be absent.
// kInvalidArgument: no model directory, or a field is missing or out of range (named).
// kUnsupported: an architecture, rope type, activation or bias that is not implemented; the message
// lists what is.
Result<ModelConfig> LoadConfig(const std::filesystem::path& directory);

// The same from text. generation_json may be empty. `name` is the directory named in errors.
Result<ModelConfig> ParseConfig(std::string_view config_json, std::string_view generation_json,
                                const std::string& name);

}  // namespace kvant::node
