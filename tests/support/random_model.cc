#include "tests/support/random_model.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <utility>
#include <vector>

#include "base/bytes.h"
#include "base/check.h"
#include "base/random.h"
#include "kernels/float_formats.h"

namespace kvant::support {
namespace {

using nlohmann::json;

// GPT-2's alphabet as UTF-8, as tokenizer.json writes bytes.
std::string ByteAsText(int byte) {
  const auto printable = [](int b) {
    return (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
  };
  int code_point = byte;
  if (!printable(byte)) {
    code_point = 256;
    for (int b = 0; b < byte; ++b) code_point += printable(b) ? 0 : 1;
  }
  if (code_point < 0x80) return std::string(1, static_cast<char>(code_point));
  return {static_cast<char>(0xC0 | (code_point >> 6)),
          static_cast<char>(0x80 | (code_point & 0x3F))};
}

std::string Letter(int index) { return std::string(1, static_cast<char>('a' + index)); }

// Merges in the order of their rank: a space with a letter, two letters, a space with three.
std::vector<std::pair<std::string, std::string>> Merges(size_t count) {
  const std::string space = ByteAsText(' ');
  std::vector<std::pair<std::string, std::string>> merges;
  for (int a = 0; a < 26; ++a) merges.emplace_back(space, Letter(a));
  for (int a = 0; a < 26; ++a) {
    for (int b = 0; b < 26; ++b) merges.emplace_back(Letter(a), Letter(b));
  }
  for (int a = 0; a < 26; ++a) {
    for (int bc = 0; bc < 26 * 26; ++bc) {
      merges.emplace_back(space + Letter(a), Letter(bc / 26) + Letter(bc % 26));
    }
  }
  merges.resize(std::min(count, merges.size()));
  return merges;
}

struct ArchitectureName {
  const char* name;
  const char* type;
};
ArchitectureName NameOf(node::Architecture architecture) {
  switch (architecture) {
    case node::Architecture::kLlama:
      return {"LlamaForCausalLM", "llama"};
    case node::Architecture::kMistral:
      return {"MistralForCausalLM", "mistral"};
    case node::Architecture::kQwen2:
      return {"Qwen2ForCausalLM", "qwen2"};
    case node::Architecture::kQwen3:
      return {"Qwen3ForCausalLM", "qwen3"};
    case node::Architecture::kGemma3:
      return {"Gemma3ForCausalLM", "gemma3_text"};
    case node::Architecture::kDeepseekV2:
      return {"DeepseekV2ForCausalLM", "deepseek_v2"};
    case node::Architecture::kDeepseekV3:
      return {"DeepseekV3ForCausalLM", "deepseek_v3"};
  }
  return {"LlamaForCausalLM", "llama"};
}

json RopeJson(const node::ModelConfig& config) {
  json rope = {{"rope_type", "default"}, {"rope_theta", config.rope_theta}};
  const kernels::RopeScaling& scaling = config.rope_scaling;
  if (scaling.kind != kernels::RopeScaling::Kind::kNone) rope["factor"] = scaling.factor;
  if (scaling.kind == kernels::RopeScaling::Kind::kLinear) rope["rope_type"] = "linear";
  if (scaling.kind == kernels::RopeScaling::Kind::kLlama3) {
    rope["rope_type"] = "llama3";
    rope["low_freq_factor"] = scaling.low_freq_factor;
    rope["high_freq_factor"] = scaling.high_freq_factor;
  }
  if (scaling.kind == kernels::RopeScaling::Kind::kYarn) rope["rope_type"] = "yarn";
  if (scaling.kind == kernels::RopeScaling::Kind::kYarn ||
      scaling.kind == kernels::RopeScaling::Kind::kLlama3) {
    rope["original_max_position_embeddings"] = scaling.original_max_position_embeddings;
  }
  return rope;
}

void AddLatentAttention(const node::ModelConfig& config, json* out) {
  const node::LatentAttention& latent = *config.latent;
  (*out)["q_lora_rank"] = latent.q_rank == 0 ? json() : json(latent.q_rank);
  (*out)["kv_lora_rank"] = latent.kv_rank;
  (*out)["qk_nope_head_dim"] = latent.nope_dim;
  (*out)["qk_rope_head_dim"] = latent.rope_dim;
  (*out)["v_head_dim"] = latent.value_dim;
  (*out)["rope_interleave"] = latent.interleaved;
  const node::MixtureOfExperts& experts = config.experts;
  (*out)["first_k_dense_replace"] = experts.experts == 0 ? config.layers : experts.dense_layers;
  if (experts.experts == 0) return;
  using Routing = node::MixtureOfExperts::Routing;
  const bool sigmoid = experts.routing == Routing::kSigmoid;
  (*out)["n_routed_experts"] = experts.experts;
  (*out)["n_shared_experts"] = experts.shared_experts;
  (*out)["moe_intermediate_size"] = experts.intermediate;
  (*out)["num_experts_per_tok"] = experts.experts_per_token;
  (*out)["n_group"] = experts.groups;
  (*out)["topk_group"] = experts.groups_per_token;
  (*out)["norm_topk_prob"] = experts.normalize;
  (*out)["routed_scaling_factor"] = experts.scale;
  (*out)["scoring_func"] = sigmoid ? "sigmoid" : "softmax";
  (*out)["topk_method"] = sigmoid                               ? "noaux_tc"
                          : experts.routing == Routing::kGreedy ? "greedy"
                                                                : "group_limited_greedy";
}

// What ParseConfig makes this configuration of. Fields that follow from the architecture
// (qk_norm, sandwich_norms, ...) must be as it has them.
json ConfigJson(const node::ModelConfig& config, node::DataType type) {
  const ArchitectureName name = NameOf(config.architecture);
  const bool gemma = config.architecture == node::Architecture::kGemma3;
  const char* dtype = type == node::DataType::kBf16   ? "bfloat16"
                      : type == node::DataType::kFp16 ? "float16"
                                                      : "float32";
  json out = {{"architectures", {name.name}},
              {"model_type", name.type},
              {"attention_bias", config.output_bias},
              {"mlp_bias", false},
              {"num_hidden_layers", config.layers},
              {"hidden_size", config.hidden},
              {"intermediate_size", config.intermediate},
              {"num_attention_heads", config.q_heads},
              {"vocab_size", config.vocab},
              {"max_position_embeddings", config.max_positions},
              {"rms_norm_eps", static_cast<double>(config.rms_norm_eps)},
              {"tie_word_embeddings", config.tied_output},
              {"rope_parameters", RopeJson(config)},
              {"bos_token_id", 256},
              {"eos_token_id", 257},
              {"torch_dtype", dtype}};
  out[gemma ? "hidden_activation" : "hidden_act"] = gemma ? "gelu_pytorch_tanh" : "silu";
  if (config.latent) {
    AddLatentAttention(config, &out);
  } else {
    out["num_key_value_heads"] = config.kv_heads;
    out["head_dim"] = config.head_dim;
  }
  out["sliding_window"] = config.sliding_window == 0 ? json() : json(config.sliding_window);
  if (config.sliding_window != 0) {
    out["use_sliding_window"] = true;
    out["layer_types"] = json::array();
    for (int layer = 0; layer < config.layers; ++layer) {
      out["layer_types"].push_back(config.Window(layer) != 0 ? "sliding_attention"
                                                             : "full_attention");
    }
  }
  if (gemma) {
    out["query_pre_attn_scalar"] = 1.0 / (config.attention_scale * config.attention_scale);
    out["rope_parameters"] = {
        {"full_attention", RopeJson(config)},
        {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", config.local_rope_theta}}}};
  }
  return out;
}

struct RandomTensor {
  std::string name;
  std::vector<int64_t> shape;
  double mean;
  double deviation;
};

// Deviations that keep the residual stream near 1 and the logits a few units apart.
class TensorList {
 public:
  explicit TensorList(const node::ModelConfig& config) : c_(config) {
    Matrix("model.embed_tokens", c_.vocab, c_.hidden, 2.0);
    for (int i = 0; i < c_.layers; ++i) AddLayer(i);
    Norm("model.norm", c_.hidden);
    if (!c_.tied_output) Matrix("lm_head", c_.vocab, c_.hidden, 2.0);
  }
  std::vector<RandomTensor> tensors;

 private:
  void Matrix(const std::string& name, int out, int in, double times = 1.0) {
    tensors.push_back({name + ".weight", {out, in}, 0.0, times / std::sqrt(in)});
  }
  void Norm(const std::string& name, int width) {
    tensors.push_back({name + ".weight", {width}, c_.norm_plus_one ? 0.0 : 1.0, 0.1});
  }
  void Mlp(const std::string& name, int intermediate) {
    Matrix(name + ".gate_proj", intermediate, c_.hidden);
    Matrix(name + ".up_proj", intermediate, c_.hidden);
    Matrix(name + ".down_proj", c_.hidden, intermediate);
  }

  void AddLayer(int index) {
    const std::string prefix = fmt::format("model.layers.{}.", index);
    const std::string attention = prefix + "self_attn.";
    Norm(prefix + "input_layernorm", c_.hidden);
    c_.latent ? AddLatentAttention(attention) : AddAttention(attention);
    Matrix(attention + "o_proj", c_.hidden, c_.q_heads * c_.value_dim());
    Norm(prefix + "post_attention_layernorm", c_.hidden);
    if (c_.sandwich_norms) {
      Norm(prefix + "pre_feedforward_layernorm", c_.hidden);
      Norm(prefix + "post_feedforward_layernorm", c_.hidden);
    }
    if (c_.IsMixture(index)) {
      AddExperts(prefix + "mlp.");
    } else {
      Mlp(prefix + "mlp", c_.intermediate);
    }
  }

  void AddAttention(const std::string& prefix) {
    const std::pair<const char*, int> projections[] = {
        {"q_proj", c_.q_width()}, {"k_proj", c_.kv_width()}, {"v_proj", c_.kv_width()}};
    for (const auto& [name, width] : projections) {
      Matrix(prefix + name, width, c_.hidden);
      if (c_.qkv_bias) tensors.push_back({prefix + name + ".bias", {width}, 0.0, 0.3});
    }
    if (c_.output_bias) tensors.push_back({prefix + "o_proj.bias", {c_.hidden}, 0.0, 0.3});
    if (!c_.qk_norm) return;
    Norm(prefix + "q_norm", c_.head_dim);
    Norm(prefix + "k_norm", c_.head_dim);
  }

  void AddLatentAttention(const std::string& prefix) {
    const node::LatentAttention& latent = *c_.latent;
    if (latent.q_rank == 0) {
      Matrix(prefix + "q_proj", c_.q_width(), c_.hidden);
    } else {
      Matrix(prefix + "q_a_proj", latent.q_rank, c_.hidden);
      Norm(prefix + "q_a_layernorm", latent.q_rank);
      Matrix(prefix + "q_b_proj", c_.q_width(), latent.q_rank);
    }
    Matrix(prefix + "kv_a_proj_with_mqa", latent.kv_rank + latent.rope_dim, c_.hidden);
    Norm(prefix + "kv_a_layernorm", latent.kv_rank);
    Matrix(prefix + "kv_b_proj", c_.q_heads * (latent.nope_dim + latent.value_dim), latent.kv_rank);
  }

  void AddExperts(const std::string& prefix) {
    const node::MixtureOfExperts& experts = c_.experts;
    Matrix(prefix + "gate", experts.experts, c_.hidden, 2.0);
    if (experts.routing == node::MixtureOfExperts::Routing::kSigmoid) {
      tensors.push_back({prefix + "gate.e_score_correction_bias", {experts.experts}, 0.0, 0.2});
    }
    for (int expert = 0; expert < experts.experts; ++expert) {
      Mlp(fmt::format("{}experts.{}", prefix, expert), experts.intermediate);
    }
    Mlp(prefix + "shared_experts", experts.shared_experts * experts.intermediate);
  }

  const node::ModelConfig& c_;
};

std::string RandomValues(const RandomTensor& tensor, node::DataType type, Random* random) {
  size_t count = 1;
  for (const int64_t size : tensor.shape) count *= static_cast<size_t>(size);
  const size_t width = type == node::DataType::kFp32 ? sizeof(float) : sizeof(uint16_t);
  std::string bytes(count * width, '\0');
  for (size_t i = 0; i < count; ++i) {
    const auto value = static_cast<float>(tensor.mean + tensor.deviation * random->Normal());
    char* to = bytes.data() + i * width;
    if (type == node::DataType::kFp32) {
      std::memcpy(to, &value, sizeof(value));
    } else {
      const uint16_t half =
          type == node::DataType::kBf16 ? kernels::ToBf16(value) : kernels::ToFp16(value);
      std::memcpy(to, &half, sizeof(half));
    }
  }
  return bytes;
}

Status WriteFile(const std::filesystem::path& path, std::string_view text) {
  std::ofstream file(path, std::ios::binary);
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
  file.close();
  if (!file) return InvalidArgument("writing {}: is the disk full?", path.string());
  return OkStatus();
}

}  // namespace

node::ModelConfig TinyConfig() {
  node::ModelConfig config;
  config.layers = 2;
  config.hidden = 64;
  config.intermediate = 96;
  config.q_heads = 4;
  config.kv_heads = 2;
  config.head_dim = 16;
  config.vocab = 300;
  config.max_positions = 2048;
  config.attention_scale = 0.25;
  config.rms_norm_eps = 1e-5F;
  config.bos = 256;
  config.eos = {257};
  return config;
}

node::ModelConfig TinySlidingConfig() {
  node::ModelConfig config = TinyConfig();
  config.architecture = node::Architecture::kGemma3;
  config.layers = 4;
  config.activation = node::Activation::kGeluTanh;
  config.qk_norm = true;
  config.sandwich_norms = true;
  config.norm_plus_one = true;
  config.tied_output = true;
  config.embedding_scale = 8.0;  // the root of `hidden`
  config.sliding_window = 100;
  config.sliding = {true, true, false, true};
  config.rope_theta = 1e6;
  config.local_rope_theta = 10000.0;
  return config;
}

node::ModelConfig TinyLatentConfig() {
  node::ModelConfig config = TinyConfig();
  config.architecture = node::Architecture::kDeepseekV3;
  config.layers = 3;
  config.kv_heads = 1;
  config.head_dim = 8;  // of the rope key
  config.latent = {0, 32, 12, 8, 20, true};
  config.attention_scale = 1.0 / std::sqrt(20.0);  // of nope_dim + rope_dim
  config.experts.routing = node::MixtureOfExperts::Routing::kSigmoid;
  config.experts.experts = 8;
  config.experts.shared_experts = 1;
  config.experts.intermediate = 24;
  config.experts.experts_per_token = 3;
  config.experts.dense_layers = 1;
  config.experts.groups = 4;
  config.experts.groups_per_token = 2;
  config.experts.normalize = true;
  config.experts.scale = 2.5;
  return config;
}

std::string RandomTokenizerJson(int vocab) {
  KV_CHECK(vocab >= 258);
  json vocabulary = json::object();
  for (int byte = 0; byte < 256; ++byte) vocabulary[ByteAsText(byte)] = byte;
  json merges = json::array();
  int next = 258;
  for (const auto& [left, right] : Merges(static_cast<size_t>(vocab - 258))) {
    vocabulary[left + right] = next++;
    merges.push_back({left, right});
  }
  json added = json::array();
  for (const auto& [content, id] :
       {std::pair("<|begin_of_text|>", 256), std::pair("<|end_of_text|>", 257)}) {
    added.push_back({{"id", id},
                     {"content", content},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  const json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  const json first = {{"SpecialToken", {{"id", "<|begin_of_text|>"}, {"type_id", 0}}}};
  const json text = {{"Sequence", {{"id", "A"}, {"type_id", 0}}}};
  const json specials = {
      {"<|begin_of_text|>",
       {{"id", "<|begin_of_text|>"}, {"ids", {256}}, {"tokens", {"<|begin_of_text|>"}}}}};
  const json root = {{"version", "1.0"},
                     {"truncation", nullptr},
                     {"padding", nullptr},
                     {"added_tokens", added},
                     {"normalizer", nullptr},
                     {"pre_tokenizer", byte_level},
                     {"post_processor",
                      {{"type", "TemplateProcessing"},
                       {"single", json::array({first, text})},
                       {"pair", json::array({first, text})},
                       {"special_tokens", specials}}},
                     {"decoder", byte_level},
                     {"model",
                      {{"type", "BPE"},
                       {"dropout", nullptr},
                       {"unk_token", nullptr},
                       {"continuing_subword_prefix", nullptr},
                       {"end_of_word_suffix", nullptr},
                       {"fuse_unk", false},
                       {"byte_fallback", false},
                       {"ignore_merges", false},
                       {"vocab", vocabulary},
                       {"merges", merges}}}};
  return root.dump(1);
}

Status WriteRandomModel(const std::filesystem::path& directory, const RandomModelOptions& options) {
  KV_CHECK(options.shards >= 1 && options.type != node::DataType::kOther);
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) return InvalidArgument("creating {}: {}", directory.string(), error.message());
  KV_RETURN_IF_ERROR(
      WriteFile(directory / "config.json", ConfigJson(options.config, options.type).dump(1)));
  KV_RETURN_IF_ERROR(WriteFile(directory / "generation_config.json",
                               json{{"bos_token_id", 256}, {"eos_token_id", {257}}}.dump(1)));
  KV_RETURN_IF_ERROR(
      WriteFile(directory / "tokenizer.json", RandomTokenizerJson(options.config.vocab)));

  const std::vector<RandomTensor> tensors = TensorList(options.config).tensors;
  json weight_map = json::object();
  for (int shard = 0; shard < options.shards; ++shard) {
    const std::string file = options.shards == 1 ? "model.safetensors"
                                                 : fmt::format("model-{:05}-of-{:05}.safetensors",
                                                               shard + 1, options.shards);
    json header = json::object();
    std::string data;
    for (size_t i = static_cast<size_t>(shard); i < tensors.size();
         i += static_cast<size_t>(options.shards)) {
      // A generator for each tensor, so that the values do not depend on the shards.
      Random random = Random(options.seed).Fork(i);
      const size_t begin = data.size();
      data += RandomValues(tensors[i], options.type, &random);
      header[tensors[i].name] = {{"dtype", node::DataTypeName(options.type)},
                                 {"shape", tensors[i].shape},
                                 {"data_offsets", {begin, data.size()}}};
      weight_map[tensors[i].name] = file;
    }
    std::string text = header.dump();
    text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the data is aligned
    std::string length(sizeof(uint64_t), '\0');
    StoreLittle(reinterpret_cast<std::byte*>(length.data()), static_cast<uint64_t>(text.size()));
    KV_RETURN_IF_ERROR(WriteFile(directory / file, length + text + data));
  }
  if (options.shards == 1) return OkStatus();
  return WriteFile(directory / "model.safetensors.index.json",
                   json{{"metadata", json::object()}, {"weight_map", weight_map}}.dump(1));
}

TemporaryDirectory::TemporaryDirectory() {
  std::string pattern = (std::filesystem::temp_directory_path() / "kvant-test-XXXXXX").string();
  KV_CHECK(::mkdtemp(pattern.data()) != nullptr);
  path_ = pattern;
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace kvant::support
