#include "node/config.h"

#include <algorithm>

#include "node/json.h"

namespace kvant::node {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxConfigBytes = uint64_t{1} << 20;
constexpr int64_t kMaxRopeElements = int64_t{1} << 28;
constexpr std::string_view kSupported =
    "supported: LlamaForCausalLM with rope type default, linear or llama3, silu, without biases";

Status CheckArchitecture(const json& config, const std::string& name) {
  std::string found;
  if (const json* list = FindField(config, "architectures"); list != nullptr) {
    if (!list->is_array() || list->empty() || !list->front().is_string()) {
      return InvalidArgument("{}: field \"architectures\" must be a list with a name", name);
    }
    found = list->front().get<std::string>();
  } else {
    KV_ASSIGN_OR_RETURN(const std::string type, StringField(config, "model_type", "", name));
    if (type.empty()) {
      return InvalidArgument("{}: neither \"architectures\" nor \"model_type\" is there", name);
    }
    found = type == "llama" ? "LlamaForCausalLM" : type;
  }
  if (found != "LlamaForCausalLM") {
    return MakeStatus(StatusCode::kUnsupported, "{}: architecture {} is not supported; {}", name,
                      found, kSupported);
  }
  return OkStatus();
}

// What would change the numbers and is not implemented.
Status CheckVariants(const json& config, const std::string& name) {
  KV_ASSIGN_OR_RETURN(const std::string activation,
                      StringField(config, "hidden_act", "silu", name));
  if (activation != "silu") {
    return MakeStatus(StatusCode::kUnsupported, "{}: hidden_act {} is not supported; {}", name,
                      activation, kSupported);
  }
  for (const std::string_view bias : {"attention_bias", "mlp_bias"}) {
    KV_ASSIGN_OR_RETURN(const bool present, BooleanField(config, bias, false, name));
    if (present) {
      return MakeStatus(StatusCode::kUnsupported, "{}: {} is not supported; {}", name, bias,
                        kSupported);
    }
  }
  if (FindField(config, "quantization_config") != nullptr) {
    return MakeStatus(StatusCode::kUnsupported,
                      "{}: quantized weights are not supported; use the bf16, fp16 or fp32 "
                      "checkpoint of the model",
                      name);
  }
  return OkStatus();
}

// Fills rope_theta and rope_scaling.
Status ParseRope(const json& config, const std::string& name, ModelConfig* model) {
  using Kind = kernels::RopeScaling::Kind;
  kernels::RopeScaling& rope = model->rope_scaling;
  double& theta = model->rope_theta;
  KV_ASSIGN_OR_RETURN(theta, NumberField(config, "rope_theta", 1.0, 1e12, 10000.0, name));
  // transformers 5 writes rope_parameters, with theta inside; older ones rope_scaling or nothing.
  const json* scaling = FindField(config, "rope_parameters");
  if (scaling == nullptr) scaling = FindField(config, "rope_scaling");
  if (scaling == nullptr) return OkStatus();
  if (!scaling->is_object()) {
    return InvalidArgument("{}: rope_parameters or rope_scaling must be an object", name);
  }
  KV_ASSIGN_OR_RETURN(const std::string old_type, StringField(*scaling, "type", "default", name));
  KV_ASSIGN_OR_RETURN(const std::string type, StringField(*scaling, "rope_type", old_type, name));
  KV_ASSIGN_OR_RETURN(theta, NumberField(*scaling, "rope_theta", 1.0, 1e12, theta, name));
  KV_ASSIGN_OR_RETURN(const double rotated,
                      NumberField(*scaling, "partial_rotary_factor", 0.0, 1.0, 1.0, name));
  if (rotated != 1.0) {
    return MakeStatus(StatusCode::kUnsupported, "{}: partial_rotary_factor {} is not supported; {}",
                      name, rotated, kSupported);
  }
  if (type == "default") return OkStatus();
  if (type != "linear" && type != "llama3") {
    return MakeStatus(StatusCode::kUnsupported, "{}: rope type {} is not supported; {}", name, type,
                      kSupported);
  }
  if (FindField(*scaling, "factor") == nullptr) {
    return InvalidArgument("{}: rope type {} needs a field \"factor\"", name, type);
  }
  KV_ASSIGN_OR_RETURN(rope.factor, NumberField(*scaling, "factor", 1.0, 1e6, 1.0, name));
  if (type == "linear") {
    rope.kind = Kind::kLinear;
    return OkStatus();
  }
  rope.kind = Kind::kLlama3;
  KV_ASSIGN_OR_RETURN(rope.low_freq_factor,
                      NumberField(*scaling, "low_freq_factor", 1e-6, 1e6, 1.0, name));
  KV_ASSIGN_OR_RETURN(rope.high_freq_factor,
                      NumberField(*scaling, "high_freq_factor", 1e-6, 1e6, 4.0, name));
  KV_ASSIGN_OR_RETURN(
      const int64_t original,
      IntegerField(*scaling, "original_max_position_embeddings", 1, 1 << 24, 8192, name));
  rope.original_max_position_embeddings = static_cast<int>(original);
  if (rope.high_freq_factor <= rope.low_freq_factor) {
    return InvalidArgument("{}: high_freq_factor {} must be larger than low_freq_factor {}", name,
                           rope.high_freq_factor, rope.low_freq_factor);
  }
  return OkStatus();
}

// A token id or a list of them.
Result<std::vector<int32_t>> TokenIds(const json& object, std::string_view key, int vocab,
                                      const std::string& name) {
  std::vector<int32_t> ids;
  const json* field = FindField(object, key);
  if (field == nullptr) return ids;
  const json list = field->is_array() ? *field : json::array({*field});
  for (const json& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() >= static_cast<uint64_t>(vocab)) {
      return InvalidArgument("{}: field \"{}\" must be token ids below the vocabulary size {}",
                             name, key, vocab);
    }
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

}  // namespace

bool ModelConfig::IsEos(int32_t token) const {
  return std::find(eos.begin(), eos.end(), token) != eos.end();
}

Result<ModelConfig> ParseConfig(std::string_view config_json, std::string_view generation_json,
                                const std::string& name) {
  const std::string config_name = name + "/config.json";
  KV_ASSIGN_OR_RETURN(const json config, ParseJson(config_json, config_name));
  if (!config.is_object()) return InvalidArgument("{}: must be a JSON object", config_name);
  KV_RETURN_IF_ERROR(CheckArchitecture(config, config_name));
  KV_RETURN_IF_ERROR(CheckVariants(config, config_name));

  ModelConfig model;
  const auto read = [&](std::string_view key, int max, int* out) {
    const auto value = IntegerField(config, key, 1, max, config_name);
    if (value.ok()) *out = static_cast<int>(*value);
    return value.status();
  };
  KV_RETURN_IF_ERROR(read("num_hidden_layers", 1024, &model.layers));
  KV_RETURN_IF_ERROR(read("hidden_size", 1 << 16, &model.hidden));
  KV_RETURN_IF_ERROR(read("intermediate_size", 1 << 20, &model.intermediate));
  KV_RETURN_IF_ERROR(read("num_attention_heads", 1024, &model.q_heads));
  KV_RETURN_IF_ERROR(read("vocab_size", 1 << 22, &model.vocab));
  KV_ASSIGN_OR_RETURN(const int64_t kv_heads, IntegerField(config, "num_key_value_heads", 1, 1024,
                                                           model.q_heads, config_name));
  model.kv_heads = static_cast<int>(kv_heads);
  KV_ASSIGN_OR_RETURN(const int64_t positions, IntegerField(config, "max_position_embeddings", 2,
                                                            1 << 24, 2048, config_name));
  model.max_positions = static_cast<int>(positions);
  if (FindField(config, "head_dim") == nullptr && model.hidden % model.q_heads != 0) {
    return InvalidArgument("{}: hidden_size {} is not a multiple of num_attention_heads {}",
                           config_name, model.hidden, model.q_heads);
  }
  KV_ASSIGN_OR_RETURN(
      const int64_t head_dim,
      IntegerField(config, "head_dim", 1, 1024, model.hidden / model.q_heads, config_name));
  model.head_dim = static_cast<int>(head_dim);
  if (model.q_heads % model.kv_heads != 0) {
    return InvalidArgument("{}: num_attention_heads {} is not a multiple of num_key_value_heads {}",
                           config_name, model.q_heads, model.kv_heads);
  }
  if (model.head_dim < 8 || model.head_dim > 1024 || model.head_dim % 8 != 0) {
    return MakeStatus(StatusCode::kUnsupported,
                      "{}: head_dim {} is not supported; it must be a multiple of 8 up to 1024",
                      config_name, model.head_dim);
  }
  // The tables of rotary positions grow with both.
  if (int64_t{model.max_positions} * model.head_dim > kMaxRopeElements) {
    return MakeStatus(StatusCode::kUnsupported,
                      "{}: max_position_embeddings {} with head_dim {} is not supported; their "
                      "product must not exceed {}",
                      config_name, model.max_positions, model.head_dim, kMaxRopeElements);
  }
  KV_ASSIGN_OR_RETURN(const double eps,
                      NumberField(config, "rms_norm_eps", 1e-30, 1.0, 1e-6, config_name));
  model.rms_norm_eps = static_cast<float>(eps);
  KV_ASSIGN_OR_RETURN(model.tied_output,
                      BooleanField(config, "tie_word_embeddings", false, config_name));
  KV_RETURN_IF_ERROR(ParseRope(config, config_name, &model));

  KV_ASSIGN_OR_RETURN(std::vector<int32_t> bos,
                      TokenIds(config, "bos_token_id", model.vocab, config_name));
  KV_ASSIGN_OR_RETURN(model.eos, TokenIds(config, "eos_token_id", model.vocab, config_name));
  if (!generation_json.empty()) {
    // generation_config.json is what `generate` of transformers obeys; it wins where it speaks.
    const std::string generation_name = name + "/generation_config.json";
    KV_ASSIGN_OR_RETURN(const json generation, ParseJson(generation_json, generation_name));
    if (!generation.is_object()) {
      return InvalidArgument("{}: must be a JSON object", generation_name);
    }
    KV_ASSIGN_OR_RETURN(std::vector<int32_t> better_bos,
                        TokenIds(generation, "bos_token_id", model.vocab, generation_name));
    KV_ASSIGN_OR_RETURN(std::vector<int32_t> better_eos,
                        TokenIds(generation, "eos_token_id", model.vocab, generation_name));
    if (!better_bos.empty()) bos = std::move(better_bos);
    if (!better_eos.empty()) model.eos = std::move(better_eos);
  }
  if (!bos.empty()) model.bos = bos.front();
  return model;
}

Result<ModelConfig> LoadConfig(const std::filesystem::path& directory) {
  std::error_code error;
  const std::string name = directory.string();
  if (!std::filesystem::is_directory(directory, error)) {
    return InvalidArgument(
        "{}: no such model directory. A model directory holds config.json, tokenizer.json and "
        "model.safetensors (or model.safetensors.index.json and its shards), as downloaded from "
        "the Hugging Face hub",
        name);
  }
  if (!std::filesystem::exists(directory / "config.json", error)) {
    return InvalidArgument(
        "{}: is not a model directory, config.json is missing. A model directory holds "
        "config.json, tokenizer.json and model.safetensors (or model.safetensors.index.json and "
        "its shards)",
        name);
  }
  KV_ASSIGN_OR_RETURN(const std::string config,
                      ReadFile(directory / "config.json", kMaxConfigBytes));
  std::string generation;
  if (std::filesystem::exists(directory / "generation_config.json", error)) {
    KV_ASSIGN_OR_RETURN(generation,
                        ReadFile(directory / "generation_config.json", kMaxConfigBytes));
  }
  return ParseConfig(config, generation, name);
}

}  // namespace kvant::node
