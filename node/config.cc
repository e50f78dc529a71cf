#include "node/config.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/portable_math.h"
#include "node/json.h"

namespace kvant::node {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxConfigBytes = uint64_t{1} << 20;
constexpr int64_t kMaxRopeElements = int64_t{1} << 28;
constexpr std::string_view kSupported =
    "supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, "
    "Gemma3ForCausalLM, DeepseekV2ForCausalLM, DeepseekV3ForCausalLM; rope types default, linear, "
    "llama3, yarn; activations silu, gelu_pytorch_tanh (Gemma)";

struct KnownArchitecture {
  std::string_view name;
  std::string_view model_type;
  Architecture architecture;
};
constexpr KnownArchitecture kArchitectures[] = {
    {"LlamaForCausalLM", "llama", Architecture::kLlama},
    {"MistralForCausalLM", "mistral", Architecture::kMistral},
    {"Qwen2ForCausalLM", "qwen2", Architecture::kQwen2},
    {"Qwen3ForCausalLM", "qwen3", Architecture::kQwen3},
    {"Gemma3ForCausalLM", "gemma3_text", Architecture::kGemma3},
    {"DeepseekV2ForCausalLM", "deepseek_v2", Architecture::kDeepseekV2},
    {"DeepseekV3ForCausalLM", "deepseek_v3", Architecture::kDeepseekV3},
};

template <typename... Args>
Status Unsupported(const std::string& name, fmt::format_string<Args...> what, Args&&... args) {
  return MakeStatus(StatusCode::kUnsupported, "{}: {} is not supported; {}", name,
                    fmt::format(what, std::forward<Args>(args)...), kSupported);
}

// Reads one config.json. Every function fills its part of model_ and leaves the rest.
class ConfigReader {
 public:
  ConfigReader(const json& config, std::string name, ModelConfig* model)
      : config_(config), name_(std::move(name)), model_(*model) {}

  Status Read() {
    KV_RETURN_IF_ERROR(ReadArchitecture());
    KV_RETURN_IF_ERROR(ReadSizes());
    KV_RETURN_IF_ERROR(is_deepseek() ? ReadLatentAttention() : ReadHeads());
    KV_RETURN_IF_ERROR(ReadVariants());
    KV_RETURN_IF_ERROR(ReadWindows());
    KV_RETURN_IF_ERROR(ReadRope());
    return CheckRopeTable();
  }

 private:
  bool is(Architecture architecture) const { return model_.architecture == architecture; }
  bool is_deepseek() const {
    return is(Architecture::kDeepseekV2) || is(Architecture::kDeepseekV3);
  }

  Status Integer(std::string_view key, int max, int* out) {
    const auto value = IntegerField(config_, key, 1, max, name_);
    if (value.ok()) *out = static_cast<int>(*value);
    return value.status();
  }
  Status Integer(std::string_view key, int min, int max, int otherwise, int* out) {
    const auto value = IntegerField(config_, key, min, max, otherwise, name_);
    if (value.ok()) *out = static_cast<int>(*value);
    return value.status();
  }

  Status ReadArchitecture() {
    std::string found;
    if (const json* list = FindField(config_, "architectures"); list != nullptr) {
      if (!list->is_array() || list->empty() || !list->front().is_string()) {
        return InvalidArgument("{}: field \"architectures\" must be a list with a name", name_);
      }
      found = list->front().get<std::string>();
    } else {
      KV_ASSIGN_OR_RETURN(found, StringField(config_, "model_type", "", name_));
      if (found.empty()) {
        return InvalidArgument("{}: neither \"architectures\" nor \"model_type\" is there", name_);
      }
    }
    for (const KnownArchitecture& known : kArchitectures) {
      if (found == known.name || found == known.model_type) {
        model_.architecture = known.architecture;
        return OkStatus();
      }
    }
    return Unsupported(name_, "architecture {}", found);
  }

  Status ReadSizes() {
    KV_RETURN_IF_ERROR(Integer("num_hidden_layers", 1024, &model_.layers));
    KV_RETURN_IF_ERROR(Integer("hidden_size", 1 << 16, &model_.hidden));
    KV_RETURN_IF_ERROR(Integer("intermediate_size", 1 << 20, &model_.intermediate));
    KV_RETURN_IF_ERROR(Integer("num_attention_heads", 1024, &model_.q_heads));
    KV_RETURN_IF_ERROR(Integer("vocab_size", 1 << 22, &model_.vocab));
    const bool gemma = is(Architecture::kGemma3);
    KV_RETURN_IF_ERROR(Integer("max_position_embeddings", 2, 1 << 24, gemma ? 131072 : 2048,
                               &model_.max_positions));
    KV_ASSIGN_OR_RETURN(const double eps,
                        NumberField(config_, "rms_norm_eps", 1e-30, 1.0, 1e-6, name_));
    model_.rms_norm_eps = static_cast<float>(eps);
    KV_ASSIGN_OR_RETURN(model_.tied_output,
                        BooleanField(config_, "tie_word_embeddings", gemma, name_));
    return OkStatus();
  }

  Status ReadHeads() {
    KV_RETURN_IF_ERROR(Integer("num_key_value_heads", 1, 1024, model_.q_heads, &model_.kv_heads));
    if (model_.q_heads % model_.kv_heads != 0) {
      return InvalidArgument(
          "{}: num_attention_heads {} is not a multiple of num_key_value_heads {}", name_,
          model_.q_heads, model_.kv_heads);
    }
    int otherwise = is(Architecture::kQwen3) ? 128 : is(Architecture::kGemma3) ? 256 : 0;
    if (otherwise == 0) {
      if (FindField(config_, "head_dim") == nullptr && model_.hidden % model_.q_heads != 0) {
        return InvalidArgument("{}: hidden_size {} is not a multiple of num_attention_heads {}",
                               name_, model_.hidden, model_.q_heads);
      }
      otherwise = model_.hidden / model_.q_heads;
    }
    KV_RETURN_IF_ERROR(Integer("head_dim", 1, 1024, otherwise, &model_.head_dim));
    KV_RETURN_IF_ERROR(CheckDimension("head_dim", model_.head_dim));
    model_.attention_scale = 1.0 / std::sqrt(static_cast<double>(model_.head_dim));
    return OkStatus();
  }

  Status CheckDimension(std::string_view key, int value) const {
    if (value >= 8 && value <= kernels::kMaxHeadDim && value % 8 == 0) return OkStatus();
    return MakeStatus(StatusCode::kUnsupported,
                      "{}: {} {} is not supported; it must be a multiple of 8 up to {}", name_, key,
                      value, kernels::kMaxHeadDim);
  }

  Status ReadLatentAttention() {
    LatentAttention& latent = model_.latent.emplace();
    KV_RETURN_IF_ERROR(Integer("q_lora_rank", 0, 1 << 16, 0, &latent.q_rank));
    KV_RETURN_IF_ERROR(Integer("kv_lora_rank", kernels::kMaxHeadDim, &latent.kv_rank));
    KV_RETURN_IF_ERROR(Integer("qk_nope_head_dim", 1024, &latent.nope_dim));
    KV_RETURN_IF_ERROR(Integer("qk_rope_head_dim", 1024, &latent.rope_dim));
    KV_RETURN_IF_ERROR(Integer("v_head_dim", 1024, &latent.value_dim));
    KV_RETURN_IF_ERROR(CheckDimension("kv_lora_rank", latent.kv_rank));
    KV_RETURN_IF_ERROR(CheckDimension("qk_rope_head_dim", latent.rope_dim));
    KV_RETURN_IF_ERROR(
        CheckDimension("kv_lora_rank + qk_rope_head_dim", latent.kv_rank + latent.rope_dim));
    if (is(Architecture::kDeepseekV3)) {
      KV_ASSIGN_OR_RETURN(latent.interleaved,
                          BooleanField(config_, "rope_interleave", true, name_));
    }
    model_.kv_heads = 1;
    model_.head_dim = latent.rope_dim;
    model_.attention_scale = 1.0 / std::sqrt(static_cast<double>(model_.query_dim()));
    return ReadExperts();
  }

  Status ReadExperts() {
    const bool v3 = is(Architecture::kDeepseekV3);
    MixtureOfExperts& experts = model_.experts;
    KV_RETURN_IF_ERROR(
        Integer("first_k_dense_replace", 0, 1024, v3 ? 3 : 0, &experts.dense_layers));
    if (experts.dense_layers >= model_.layers) return OkStatus();
    KV_RETURN_IF_ERROR(Integer("n_routed_experts", 1 << 12, &experts.experts));
    KV_RETURN_IF_ERROR(
        Integer("n_shared_experts", 1, 1 << 10, v3 ? 1 : 2, &experts.shared_experts));
    KV_RETURN_IF_ERROR(Integer("moe_intermediate_size", 1 << 20, &experts.intermediate));
    KV_RETURN_IF_ERROR(Integer("num_experts_per_tok", experts.experts, &experts.experts_per_token));
    KV_ASSIGN_OR_RETURN(experts.scale, NumberField(config_, "routed_scaling_factor", 0.0, 1e6,
                                                   v3 ? 2.5 : 1.0, name_));
    KV_ASSIGN_OR_RETURN(experts.normalize, BooleanField(config_, "norm_topk_prob", v3, name_));
    int every = 1;
    KV_RETURN_IF_ERROR(Integer("moe_layer_freq", 1, 1 << 10, 1, &every));
    if (every != 1) return Unsupported(name_, "moe_layer_freq {}", every);
    KV_ASSIGN_OR_RETURN(const std::string method,
                        StringField(config_, "topk_method", v3 ? "noaux_tc" : "greedy", name_));
    KV_ASSIGN_OR_RETURN(const std::string scoring,
                        StringField(config_, "scoring_func", v3 ? "sigmoid" : "softmax", name_));
    using Routing = MixtureOfExperts::Routing;
    if (v3 && method == "noaux_tc" && scoring == "sigmoid") {
      experts.routing = Routing::kSigmoid;
    } else if (!v3 && method == "greedy" && scoring == "softmax") {
      experts.routing = Routing::kGreedy;
    } else if (!v3 && method == "group_limited_greedy" && scoring == "softmax") {
      experts.routing = Routing::kGroupLimited;
    } else {
      return Unsupported(name_, "topk_method {} with scoring_func {}", method, scoring);
    }
    // transformers and DeepSeek's own code disagree on what it means there.
    if (!v3 && experts.normalize) return Unsupported(name_, "norm_topk_prob in DeepSeek-V2");
    if (experts.routing == Routing::kGreedy) return OkStatus();
    KV_RETURN_IF_ERROR(Integer("n_group", 1, experts.experts, v3 ? 8 : 1, &experts.groups));
    KV_RETURN_IF_ERROR(
        Integer("topk_group", 1, experts.groups, v3 ? 4 : 1, &experts.groups_per_token));
    const int in_group = experts.experts / experts.groups;
    if (experts.experts % experts.groups != 0 || (v3 && in_group < 2) ||
        experts.experts_per_token > in_group * experts.groups_per_token) {
      return InvalidArgument(
          "{}: {} experts in {} groups can't give {} experts out of {} groups to a token", name_,
          experts.experts, experts.groups, experts.experts_per_token, experts.groups_per_token);
    }
    return OkStatus();
  }

  // What would change the numbers.
  Status ReadVariants() {
    const bool gemma = is(Architecture::kGemma3);
    const std::string_view wanted = gemma ? "gelu_pytorch_tanh" : "silu";
    KV_ASSIGN_OR_RETURN(std::string activation,
                        StringField(config_, "hidden_act", std::string(wanted), name_));
    if (gemma) {
      KV_ASSIGN_OR_RETURN(activation, StringField(config_, "hidden_activation", activation, name_));
    }
    if (activation != wanted) {
      return Unsupported(name_, "the activation {} in this architecture", activation);
    }
    model_.activation = gemma ? Activation::kGeluTanh : Activation::kSilu;

    KV_ASSIGN_OR_RETURN(const bool bias, BooleanField(config_, "attention_bias", false, name_));
    KV_ASSIGN_OR_RETURN(const bool mlp_bias, BooleanField(config_, "mlp_bias", false, name_));
    if (mlp_bias) return Unsupported(name_, "mlp_bias");
    if (bias && is_deepseek()) return Unsupported(name_, "attention_bias in DeepSeek");
    // Qwen2 and Mistral have no such field; Qwen2 always has these biases, Mistral never.
    model_.qkv_bias = is(Architecture::kQwen2) || (bias && !is(Architecture::kMistral));
    model_.output_bias = bias && !is(Architecture::kQwen2) && !is(Architecture::kMistral);
    model_.qk_norm = gemma || is(Architecture::kQwen3);
    if (gemma) KV_RETURN_IF_ERROR(ReadGemma());
    if (FindField(config_, "quantization_config") != nullptr) {
      return MakeStatus(StatusCode::kUnsupported,
                        "{}: quantized weights are not supported; use the bf16, fp16 or fp32 "
                        "checkpoint of the model, or a GGUF file",
                        name_);
    }
    return OkStatus();
  }

  Status ReadGemma() {
    model_.sandwich_norms = true;
    model_.norm_plus_one = true;
    // As transformers in fp32: the root itself is an fp32 number.
    model_.embedding_scale = std::sqrt(static_cast<float>(model_.hidden));
    KV_ASSIGN_OR_RETURN(const double scalar,
                        NumberField(config_, "query_pre_attn_scalar", 1e-6, 1e9, 256.0, name_));
    model_.attention_scale = 1.0 / std::sqrt(scalar);
    for (const std::string_view key : {"final_logit_softcapping", "attn_logit_softcapping"}) {
      if (FindField(config_, key) != nullptr) return Unsupported(name_, "{}", key);
    }
    KV_ASSIGN_OR_RETURN(const bool both_ways,
                        BooleanField(config_, "use_bidirectional_attention", false, name_));
    if (both_ways) return Unsupported(name_, "use_bidirectional_attention");
    return OkStatus();
  }

  // Which layers slide, and how far they see.
  Status ReadWindows() {
    const bool qwen = is(Architecture::kQwen2) || is(Architecture::kQwen3);
    if (!qwen && !is(Architecture::kMistral) && !is(Architecture::kGemma3)) return OkStatus();
    const json* window = FindField(config_, "sliding_window");
    if (is(Architecture::kMistral) && !config_.contains("sliding_window")) {
      model_.sliding_window = 4096;  // what the architecture had before the field
    } else if (window != nullptr || is(Architecture::kGemma3)) {
      KV_RETURN_IF_ERROR(Integer("sliding_window", 1, 1 << 24, 4096, &model_.sliding_window));
    }
    if (qwen) {
      KV_ASSIGN_OR_RETURN(const bool use,
                          BooleanField(config_, "use_sliding_window", false, name_));
      if (!use) model_.sliding_window = 0;
    }
    if (model_.sliding_window == 0) return OkStatus();
    const auto layers = static_cast<size_t>(model_.layers);
    std::vector<bool> sliding(layers, true);
    const json* types = FindField(config_, "layer_types");
    if (types != nullptr && !is(Architecture::kMistral)) {
      if (!types->is_array() || types->size() != layers) {
        return InvalidArgument("{}: field \"layer_types\" must list {} layers", name_, layers);
      }
      for (size_t i = 0; i < layers; ++i) {
        const json& type = (*types)[i];
        if (type != "sliding_attention" && type != "full_attention") {
          return Unsupported(name_, "layer type {}", type.dump());
        }
        sliding[i] = type == "sliding_attention";
      }
    } else if (is(Architecture::kGemma3)) {
      int pattern = 6;
      KV_RETURN_IF_ERROR(Integer("sliding_window_pattern", 1, 1024, 6, &pattern));
      for (size_t i = 0; i < layers; ++i) sliding[i] = (i + 1) % static_cast<size_t>(pattern) != 0;
    } else if (qwen) {
      int first = 28;
      KV_RETURN_IF_ERROR(Integer("max_window_layers", 0, 1 << 16, 28, &first));
      for (size_t i = 0; i < layers; ++i) sliding[i] = i >= static_cast<size_t>(first);
    }
    if (std::find(sliding.begin(), sliding.end(), true) != sliding.end()) {
      model_.sliding = std::move(sliding);
    } else {
      model_.sliding_window = 0;
    }
    return OkStatus();
  }

  Status ReadRope() {
    const bool gemma = is(Architecture::kGemma3);
    KV_ASSIGN_OR_RETURN(model_.rope_theta, NumberField(config_, "rope_theta", 1.0 + 1e-9, 1e12,
                                                       gemma ? 1e6 : 10000.0, name_));
    if (gemma) {
      KV_ASSIGN_OR_RETURN(model_.local_rope_theta, NumberField(config_, "rope_local_base_freq",
                                                               1.0 + 1e-9, 1e12, 10000.0, name_));
    }
    // transformers 5 writes rope_parameters, with theta inside; older ones rope_scaling or nothing.
    const json* scaling = FindField(config_, "rope_parameters");
    if (scaling == nullptr) scaling = FindField(config_, "rope_scaling");
    if (scaling == nullptr) return OkStatus();
    if (!scaling->is_object()) {
      return InvalidArgument("{}: rope_parameters or rope_scaling must be an object", name_);
    }
    if (const json* global = FindField(*scaling, "full_attention"); global != nullptr) {
      if (!gemma) return Unsupported(name_, "rope by layer type in this architecture");
      if (const json* local = FindField(*scaling, "sliding_attention"); local != nullptr) {
        if (!local->is_object()) {
          return InvalidArgument("{}: rope_parameters of sliding_attention must be an object",
                                 name_);
        }
        KV_ASSIGN_OR_RETURN(const std::string type,
                            StringField(*local, "rope_type", "default", name_));
        if (type != "default") return Unsupported(name_, "rope type {} of sliding layers", type);
        KV_ASSIGN_OR_RETURN(
            model_.local_rope_theta,
            NumberField(*local, "rope_theta", 1.0 + 1e-9, 1e12, model_.local_rope_theta, name_));
      }
      scaling = global;
      if (!scaling->is_object()) {
        return InvalidArgument("{}: rope_parameters of full_attention must be an object", name_);
      }
    }
    return ReadRopeScaling(*scaling);
  }

  // One object of rope parameters, in either spelling.
  Status ReadRopeScaling(const json& scaling) {
    using Kind = kernels::RopeScaling::Kind;
    kernels::RopeScaling& rope = model_.rope_scaling;
    KV_ASSIGN_OR_RETURN(const std::string old_type, StringField(scaling, "type", "default", name_));
    KV_ASSIGN_OR_RETURN(const std::string type, StringField(scaling, "rope_type", old_type, name_));
    KV_ASSIGN_OR_RETURN(model_.rope_theta, NumberField(scaling, "rope_theta", 1.0 + 1e-9, 1e12,
                                                       model_.rope_theta, name_));
    KV_ASSIGN_OR_RETURN(const double rotated,
                        NumberField(scaling, "partial_rotary_factor", 0.0, 1.0, 1.0, name_));
    if (rotated != 1.0) return Unsupported(name_, "partial_rotary_factor {}", rotated);
    if (type == "default") return OkStatus();
    if (type != "linear" && type != "llama3" && type != "yarn") {
      return Unsupported(name_, "rope type {}", type);
    }
    std::vector<std::string_view> needed = {"factor"};
    if (type == "llama3") {
      needed.insert(needed.end(),
                    {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"});
    }
    for (const std::string_view field : needed) {
      if (FindField(scaling, field) == nullptr) {
        return InvalidArgument("{}: rope type {} needs a field \"{}\"", name_, type, field);
      }
    }
    KV_ASSIGN_OR_RETURN(rope.factor, NumberField(scaling, "factor", 1.0, 1e6, 1.0, name_));
    if (type == "linear") {
      rope.kind = Kind::kLinear;
      return OkStatus();
    }
    KV_ASSIGN_OR_RETURN(const int64_t original,
                        IntegerField(scaling, "original_max_position_embeddings", 1, 1 << 24,
                                     model_.max_positions, name_));
    rope.original_max_position_embeddings = static_cast<int>(original);
    return type == "llama3" ? ReadLlama3(scaling) : ReadYarn(scaling);
  }

  Status ReadLlama3(const json& scaling) {
    kernels::RopeScaling& rope = model_.rope_scaling;
    rope.kind = kernels::RopeScaling::Kind::kLlama3;
    KV_ASSIGN_OR_RETURN(rope.low_freq_factor,
                        NumberField(scaling, "low_freq_factor", 1e-6, 1e6, 1.0, name_));
    KV_ASSIGN_OR_RETURN(rope.high_freq_factor,
                        NumberField(scaling, "high_freq_factor", 1e-6, 1e6, 4.0, name_));
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      return InvalidArgument("{}: high_freq_factor {} must be larger than low_freq_factor {}",
                             name_, rope.high_freq_factor, rope.low_freq_factor);
    }
    return OkStatus();
  }

  // YaRN (Peng et al., 2023) as transformers reads it; DeepSeek's mscale_all_dim scales scores.
  Status ReadYarn(const json& scaling) {
    kernels::RopeScaling& rope = model_.rope_scaling;
    rope.kind = kernels::RopeScaling::Kind::kYarn;
    const auto number = [&](std::string_view key, double least, double otherwise) {
      return NumberField(scaling, key, least, 1e6, otherwise, name_);
    };
    const auto stretch = [&](double mscale) {
      return 0.1 * mscale * kernels::PortableLog(rope.factor) + 1.0;
    };
    KV_ASSIGN_OR_RETURN(rope.beta_fast, number("beta_fast", 1e-6, 32.0));
    KV_ASSIGN_OR_RETURN(rope.beta_slow, number("beta_slow", 1e-6, 1.0));
    KV_ASSIGN_OR_RETURN(rope.truncate, BooleanField(scaling, "truncate", true, name_));
    KV_ASSIGN_OR_RETURN(const double mscale, number("mscale", 0.0, 0.0));
    KV_ASSIGN_OR_RETURN(const double mscale_all_dim, number("mscale_all_dim", 0.0, 0.0));
    const double stretched = mscale != 0.0 && mscale_all_dim != 0.0
                                 ? stretch(mscale) / stretch(mscale_all_dim)
                                 : stretch(1.0);
    KV_ASSIGN_OR_RETURN(rope.attention_factor, number("attention_factor", 1e-6, stretched));
    if (is_deepseek() && mscale_all_dim != 0.0) {
      model_.attention_scale *= stretch(mscale_all_dim) * stretch(mscale_all_dim);
    }
    return OkStatus();
  }

  // The tables of rotary positions grow with both.
  Status CheckRopeTable() const {
    if (int64_t{model_.max_positions} * model_.head_dim <= kMaxRopeElements) return OkStatus();
    return MakeStatus(StatusCode::kUnsupported,
                      "{}: max_position_embeddings {} with head_dim {} is not supported; their "
                      "product must not exceed {}",
                      name_, model_.max_positions, model_.head_dim, kMaxRopeElements);
  }

  const json& config_;
  std::string name_;
  ModelConfig& model_;
};

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

kernels::LayerShape ModelConfig::StateShape(int tokens) const {
  if (latent) return {{tokens, 1, latent->rope_dim}, {tokens, 1, latent->kv_rank}, true};
  return kernels::KeysAndValues({tokens, kv_heads, head_dim});
}

bool ModelConfig::IsEos(int32_t token) const {
  return std::find(eos.begin(), eos.end(), token) != eos.end();
}

Result<ModelConfig> ParseConfig(std::string_view config_json, std::string_view generation_json,
                                const std::string& name) {
  const std::string config_name = name + "/config.json";
  KV_ASSIGN_OR_RETURN(const json config, ParseJson(config_json, config_name));
  if (!config.is_object()) return InvalidArgument("{}: must be a JSON object", config_name);
  ModelConfig model;
  KV_RETURN_IF_ERROR(ConfigReader(config, config_name, &model).Read());

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
        "{}: {}. A model is a GGUF file, or a directory with config.json, tokenizer.json and "
        "model.safetensors (or model.safetensors.index.json and its shards), as downloaded from "
        "the Hugging Face hub",
        name,
        std::filesystem::exists(directory, error) ? "is neither a GGUF file nor a directory"
                                                  : "no such model");
  }
  if (!std::filesystem::exists(directory / "config.json", error)) {
    return InvalidArgument(
        "{}: is not a model directory, config.json is missing. A model directory holds "
        "config.json, tokenizer.json and model.safetensors (or model.safetensors.index.json and "
        "its shards); of a GGUF file give the path of the file itself",
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
