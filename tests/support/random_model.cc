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
#include "kernels/linear.h"

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

json ConfigJson(const node::ModelConfig& config, node::DataType type) {
  json rope = {{"rope_type", "default"}, {"rope_theta", config.rope_theta}};
  const kernels::RopeScaling& scaling = config.rope_scaling;
  if (scaling.kind != kernels::RopeScaling::Kind::kNone) rope["factor"] = scaling.factor;
  if (scaling.kind == kernels::RopeScaling::Kind::kLinear) rope["rope_type"] = "linear";
  if (scaling.kind == kernels::RopeScaling::Kind::kLlama3) {
    rope["rope_type"] = "llama3";
    rope["low_freq_factor"] = scaling.low_freq_factor;
    rope["high_freq_factor"] = scaling.high_freq_factor;
    rope["original_max_position_embeddings"] = scaling.original_max_position_embeddings;
  }
  const char* dtype = type == node::DataType::kBf16   ? "bfloat16"
                      : type == node::DataType::kFp16 ? "float16"
                                                      : "float32";
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"attention_bias", false},
          {"mlp_bias", false},
          {"hidden_act", "silu"},
          {"num_hidden_layers", config.layers},
          {"hidden_size", config.hidden},
          {"intermediate_size", config.intermediate},
          {"num_attention_heads", config.q_heads},
          {"num_key_value_heads", config.kv_heads},
          {"head_dim", config.head_dim},
          {"vocab_size", config.vocab},
          {"max_position_embeddings", config.max_positions},
          {"rms_norm_eps", static_cast<double>(config.rms_norm_eps)},
          {"tie_word_embeddings", config.tied_output},
          {"rope_parameters", rope},
          {"bos_token_id", 256},
          {"eos_token_id", 257},
          {"torch_dtype", dtype}};
}

struct RandomTensor {
  std::string name;
  std::vector<int64_t> shape;
  double mean;
  double deviation;
};

// Deviations that keep the residual stream near 1 and the logits a few units apart.
std::vector<RandomTensor> TensorsOf(const node::ModelConfig& c) {
  const auto matrix = [](std::string name, int out, int in) {
    return RandomTensor{std::move(name) + ".weight", {out, in}, 0.0, 1.0 / std::sqrt(in)};
  };
  const auto norm = [&](std::string name) {
    return RandomTensor{std::move(name) + ".weight", {c.hidden}, 1.0, 0.1};
  };
  std::vector<RandomTensor> tensors = {matrix("model.embed_tokens", c.vocab, c.hidden)};
  tensors.back().deviation *= 2.0;
  for (int i = 0; i < c.layers; ++i) {
    const std::string prefix = fmt::format("model.layers.{}.", i);
    tensors.push_back(norm(prefix + "input_layernorm"));
    tensors.push_back(matrix(prefix + "self_attn.q_proj", c.q_width(), c.hidden));
    tensors.push_back(matrix(prefix + "self_attn.k_proj", c.kv_width(), c.hidden));
    tensors.push_back(matrix(prefix + "self_attn.v_proj", c.kv_width(), c.hidden));
    tensors.push_back(matrix(prefix + "self_attn.o_proj", c.hidden, c.q_width()));
    tensors.push_back(norm(prefix + "post_attention_layernorm"));
    tensors.push_back(matrix(prefix + "mlp.gate_proj", c.intermediate, c.hidden));
    tensors.push_back(matrix(prefix + "mlp.up_proj", c.intermediate, c.hidden));
    tensors.push_back(matrix(prefix + "mlp.down_proj", c.hidden, c.intermediate));
  }
  tensors.push_back(norm("model.norm"));
  if (!c.tied_output) {
    tensors.push_back(matrix("lm_head", c.vocab, c.hidden));
    tensors.back().deviation *= 2.0;
  }
  return tensors;
}

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
  config.rms_norm_eps = 1e-5F;
  config.bos = 256;
  config.eos = {257};
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

  const std::vector<RandomTensor> tensors = TensorsOf(options.config);
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
