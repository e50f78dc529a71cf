#include "node/model.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string_view>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "node/gguf_model.h"
#include "node/safetensors.h"

namespace kvant::node {
namespace {

// What the forward pass reads of the configuration, as text with exact numbers.
std::string DescribeConfig(const ModelConfig& config) {
  const auto exact = [](double value) { return std::bit_cast<uint64_t>(value); };
  const kernels::RopeScaling& rope = config.rope_scaling;
  std::string text = fmt::format(
      "kvant model 2\narchitecture {} layers {} hidden {} intermediate {} q_heads {} kv_heads {} "
      "head_dim {} vocab {} eps {:016x} tied {} scale {:016x} activation {} bias {} {} qk_norm {} "
      "sandwich {} plus_one {} embedding {:016x}\n",
      static_cast<int>(config.architecture), config.layers, config.hidden, config.intermediate,
      config.q_heads, config.kv_heads, config.head_dim, config.vocab, exact(config.rms_norm_eps),
      config.tied_output, exact(config.attention_scale), static_cast<int>(config.activation),
      config.qkv_bias, config.output_bias, config.qk_norm, config.sandwich_norms,
      config.norm_plus_one, exact(config.embedding_scale));
  text += fmt::format(
      "rope {} theta {:016x} factor {:016x} low {:016x} high {:016x} original {} fast {:016x} slow "
      "{:016x} truncate {} attention {:016x} local {:016x}\n",
      static_cast<int>(rope.kind), exact(config.rope_theta), exact(rope.factor),
      exact(rope.low_freq_factor), exact(rope.high_freq_factor),
      rope.original_max_position_embeddings, exact(rope.beta_fast), exact(rope.beta_slow),
      rope.truncate, exact(rope.attention_factor), exact(config.local_rope_theta));
  text += fmt::format("window {} of ", config.sliding_window);
  for (const bool sliding : config.sliding) text += sliding ? '1' : '0';
  if (config.latent) {
    const LatentAttention& latent = *config.latent;
    text += fmt::format("\nlatent q_rank {} kv_rank {} nope {} rope {} value {} interleaved {}",
                        latent.q_rank, latent.kv_rank, latent.nope_dim, latent.rope_dim,
                        latent.value_dim, latent.interleaved);
  }
  const MixtureOfExperts& experts = config.experts;
  text += fmt::format(
      "\nexperts {} routing {} shared {} intermediate {} per_token {} dense {} groups {} of {} "
      "normalize {} scale {:016x}\n",
      experts.experts, static_cast<int>(experts.routing), experts.shared_experts,
      experts.intermediate, experts.experts_per_token, experts.dense_layers,
      experts.groups_per_token, experts.groups, experts.normalize, exact(experts.scale));
  return text;
}

// The numbers of a tensor's bytes, where they lie or, misaligned, in *copy.
template <typename T>
std::span<const T> NumbersOf(std::span<const std::byte> bytes, std::vector<T>* copy) {
  const size_t count = bytes.size() / sizeof(T);
  if (reinterpret_cast<uintptr_t>(bytes.data()) % alignof(T) == 0) {
    return {reinterpret_cast<const T*>(bytes.data()), count};
  }
  copy->resize(count);
  std::memcpy(copy->data(), bytes.data(), bytes.size());
  return *copy;
}

// A tensor's numbers, in bf16 or else in fp32: where they lie, or a copy.
struct Numbers {
  explicit Numbers(const Tensor& tensor) {
    if (tensor.type == DataType::kFp32) {
      fp32 = NumbersOf(tensor.bytes, &floats);
      return;
    }
    const std::span<const uint16_t> found = NumbersOf(tensor.bytes, &halves);
    if (tensor.type == DataType::kBf16) {
      bf16 = found;
      return;
    }
    floats.resize(found.size());
    kernels::WidenFp16(found.data(), floats.data(), floats.size());
    fp32 = floats;
  }
  std::span<const uint16_t> bf16;
  std::span<const float> fp32;
  std::vector<uint16_t> halves;
  std::vector<float> floats;
};

template <typename T>
kernels::OrderedWeights PackTransposed(const T* from, int outputs, int inputs,
                                       kernels::WeightForm form) {
  const auto rows = static_cast<size_t>(outputs);
  const auto columns = static_cast<size_t>(inputs);
  std::vector<T> turned(rows * columns);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t column = 0; column < columns; ++column) {
      turned[column * rows + row] = from[row * columns + column];
    }
  }
  return {turned.data(), inputs, outputs, form};
}

constexpr std::pair<kernels::WeightForm, std::string_view> kWeightForms[] = {
    {kernels::WeightForm::kExact, "exact"},
    {kernels::WeightForm::kBf16, "bf16"},
    {kernels::WeightForm::kInt8, "int8"}};

}  // namespace

std::string_view WeightFormName(kernels::WeightForm form) {
  return kWeightForms[static_cast<size_t>(form)].second;
}

Result<kernels::WeightForm> ParseWeightForm(std::string_view name) {
  std::string known;
  for (const auto& [form, form_name] : kWeightForms) {
    if (form_name == name) return form;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", form_name);
  }
  return InvalidArgument("unknown form of weights '{}': use one of {}", name, known);
}

// Fills a Model's weights from its checkpoint and collects what the digest is made of.
class Model::Loader {
 public:
  explicit Loader(Model* model) : model_(*model), text_(DescribeConfig(model->config_)) {}

  Status Load() {
    const ModelConfig& config = model_.config_;
    const int hidden = config.hidden;
    KV_RETURN_IF_ERROR(Matrix("model.embed_tokens.weight", config.vocab, hidden, &model_.embedding_,
                              config.tied_output ? model_.form_ : kernels::WeightForm::kExact));
    for (int i = 0; i < config.layers; ++i) {
      prefix_ = fmt::format("model.layers.{}.", i);
      LayerWeights& layer = model_.layers_.emplace_back();
      KV_RETURN_IF_ERROR(LoadNorms(&layer));
      KV_RETURN_IF_ERROR(config.latent ? LoadLatentAttention(&layer) : LoadAttention(&layer));
      KV_RETURN_IF_ERROR(config.IsMixture(i)
                             ? LoadExperts(&layer)
                             : LoadMlp(prefix_ + "mlp", config.intermediate, &layer.mlp));
    }
    KV_RETURN_IF_ERROR(Norm("model.norm.weight", hidden, &model_.final_norm_));
    if (config.tied_output) {
      model_.output_ = model_.embedding_;
    } else {
      KV_RETURN_IF_ERROR(Matrix("lm_head.weight", config.vocab, hidden, &model_.output_));
    }
    model_.digest_ = Sha256(AsBytes(text_));
    return OkStatus();
  }

 private:
  // Names follow transformers' modeling files; prefix_ is the layer's.
  Status LoadNorms(LayerWeights* layer) {
    const int hidden = model_.config_.hidden;
    const auto norm = [&](std::string_view name, const float** out) {
      return Norm(fmt::format("{}{}.weight", prefix_, name), hidden, out);
    };
    KV_RETURN_IF_ERROR(norm("input_layernorm", &layer->attention_norm));
    if (!model_.config_.sandwich_norms) {
      return norm("post_attention_layernorm", &layer->mlp_norm);
    }
    KV_RETURN_IF_ERROR(norm("post_attention_layernorm", &layer->post_attention_norm));
    KV_RETURN_IF_ERROR(norm("pre_feedforward_layernorm", &layer->mlp_norm));
    return norm("post_feedforward_layernorm", &layer->post_mlp_norm);
  }

  Status LoadAttention(LayerWeights* layer) {
    const ModelConfig& config = model_.config_;
    const auto project = [&](std::string_view name, int out, int in, bool has_bias,
                             kernels::OrderedWeights* weight, const float** bias) -> Status {
      KV_RETURN_IF_ERROR(
          Matrix(fmt::format("{}self_attn.{}.weight", prefix_, name), out, in, weight));
      return has_bias ? Vector(fmt::format("{}self_attn.{}.bias", prefix_, name), out, bias)
                      : OkStatus();
    };
    const int q_width = config.q_width();
    const int kv_width = config.kv_width();
    const bool bias = config.qkv_bias;
    KV_RETURN_IF_ERROR(
        project("q_proj", q_width, config.hidden, bias, &layer->query, &layer->query_bias));
    KV_RETURN_IF_ERROR(
        project("k_proj", kv_width, config.hidden, bias, &layer->key, &layer->key_bias));
    KV_RETURN_IF_ERROR(
        project("v_proj", kv_width, config.hidden, bias, &layer->value, &layer->value_bias));
    KV_RETURN_IF_ERROR(project("o_proj", config.hidden, q_width, config.output_bias, &layer->output,
                               &layer->output_bias));
    if (!config.qk_norm) return OkStatus();
    KV_RETURN_IF_ERROR(
        Norm(prefix_ + "self_attn.q_norm.weight", config.head_dim, &layer->query_norm));
    return Norm(prefix_ + "self_attn.k_norm.weight", config.head_dim, &layer->key_norm);
  }

  Status LoadLatentAttention(LayerWeights* layer) {
    const ModelConfig& config = model_.config_;
    const LatentAttention& sizes = *config.latent;
    LatentWeights& latent = layer->latent;
    const auto matrix = [&](std::string_view name, int out, int in,
                            kernels::OrderedWeights* weight) {
      return Matrix(fmt::format("{}self_attn.{}.weight", prefix_, name), out, in, weight);
    };
    if (sizes.q_rank == 0) {
      KV_RETURN_IF_ERROR(matrix("q_proj", config.q_width(), config.hidden, &layer->query));
    } else {
      KV_RETURN_IF_ERROR(matrix("q_a_proj", sizes.q_rank, config.hidden, &latent.query_down));
      KV_RETURN_IF_ERROR(
          Norm(prefix_ + "self_attn.q_a_layernorm.weight", sizes.q_rank, &latent.query_norm));
      KV_RETURN_IF_ERROR(matrix("q_b_proj", config.q_width(), sizes.q_rank, &layer->query));
    }
    KV_RETURN_IF_ERROR(
        matrix("kv_a_proj_with_mqa", sizes.kv_rank + sizes.rope_dim, config.hidden, &latent.down));
    KV_RETURN_IF_ERROR(
        Norm(prefix_ + "self_attn.kv_a_layernorm.weight", sizes.kv_rank, &latent.norm));
    KV_RETURN_IF_ERROR(LoadHeads(&latent));
    return matrix("o_proj", config.hidden, config.q_heads * sizes.value_dim, &layer->output);
  }

  // Of each head, what makes its key and what makes its value.
  Status LoadHeads(LatentWeights* latent) {
    const LatentAttention& sizes = *model_.config_.latent;
    const int heads = model_.config_.q_heads;
    const int rows = sizes.nope_dim + sizes.value_dim;
    const std::string name = prefix_ + "self_attn.kv_b_proj.weight";
    const int64_t shape[] = {int64_t{heads} * rows, sizes.kv_rank};
    KV_ASSIGN_OR_RETURN(const Tensor tensor, Take(name, shape));
    const Numbers numbers(tensor);
    const auto pack = [&](const auto* all) {
      for (int head = 0; head < heads; ++head) {
        const auto* of_head = all + static_cast<ptrdiff_t>(head) * rows * sizes.kv_rank;
        latent->key_up.push_back(
            PackTransposed(of_head, sizes.nope_dim, sizes.kv_rank, model_.form_));
        latent->value_up.emplace_back(
            of_head + static_cast<ptrdiff_t>(sizes.nope_dim) * sizes.kv_rank, sizes.value_dim,
            sizes.kv_rank, model_.form_);
        Count(latent->key_up.back());
        Count(latent->value_up.back());
      }
    };
    numbers.bf16.empty() ? pack(numbers.fp32.data()) : pack(numbers.bf16.data());
    model_.weights_->Release(name);
    return OkStatus();
  }

  Status LoadMlp(const std::string& name, int intermediate, MlpWeights* mlp) {
    const int hidden = model_.config_.hidden;
    KV_RETURN_IF_ERROR(Matrix(name + ".gate_proj.weight", intermediate, hidden, &mlp->gate));
    KV_RETURN_IF_ERROR(Matrix(name + ".up_proj.weight", intermediate, hidden, &mlp->up));
    return Matrix(name + ".down_proj.weight", hidden, intermediate, &mlp->down);
  }

  Status LoadExperts(LayerWeights* layer) {
    const MixtureOfExperts& sizes = model_.config_.experts;
    KV_RETURN_IF_ERROR(Matrix(prefix_ + "mlp.gate.weight", sizes.experts, model_.config_.hidden,
                              &layer->router, kernels::WeightForm::kExact));
    if (sizes.routing == MixtureOfExperts::Routing::kSigmoid) {
      KV_RETURN_IF_ERROR(
          Vector(prefix_ + "mlp.gate.e_score_correction_bias", sizes.experts, &layer->router_bias));
    }
    for (int expert = 0; expert < sizes.experts; ++expert) {
      KV_RETURN_IF_ERROR(LoadMlp(fmt::format("{}mlp.experts.{}", prefix_, expert),
                                 sizes.intermediate, &layer->experts.emplace_back()));
    }
    return LoadMlp(prefix_ + "mlp.shared_experts", sizes.shared_experts * sizes.intermediate,
                   &layer->mlp);
  }

  Result<Tensor> Take(std::string_view name, std::span<const int64_t> shape) {
    KV_ASSIGN_OR_RETURN(Tensor tensor, model_.weights_->Find(name, shape));
    text_ += fmt::format("{} {}", name, DataTypeName(tensor.type));
    for (const int64_t size : shape) text_ += fmt::format(" {}", size);
    text_ += fmt::format(" {}\n", ToHex(Sha256(tensor.bytes)));
    return tensor;
  }

  Status Vector(const std::string& name, int width, const float** out, float added = 0.0F) {
    const int64_t shape[] = {width};
    KV_ASSIGN_OR_RETURN(const Tensor tensor, Take(name, shape));
    const Numbers numbers(tensor);
    const auto count = static_cast<size_t>(width);
    float* kept =
        model_.vectors_.emplace_back(std::make_unique_for_overwrite<float[]>(count)).get();
    if (numbers.bf16.empty()) {
      std::copy_n(numbers.fp32.data(), count, kept);
    } else {
      kernels::WidenBf16(numbers.bf16.data(), kept, count);
    }
    if (added != 0.0F) std::for_each_n(kept, count, [&](float& value) { value = added + value; });
    *out = kept;
    model_.weights_->Release(name);
    return OkStatus();
  }

  Status Norm(const std::string& name, int width, const float** out) {
    return Vector(name, width, out, model_.config_.norm_plus_one ? 1.0F : 0.0F);
  }

  // A weight matrix [out][in].
  Status Matrix(const std::string& name, int out, int in, kernels::OrderedWeights* weight) {
    return Matrix(name, out, in, weight, model_.form_);
  }
  Status Matrix(const std::string& name, int out, int in, kernels::OrderedWeights* weight,
                kernels::WeightForm form) {
    const int64_t shape[] = {out, in};
    KV_ASSIGN_OR_RETURN(const Tensor tensor, Take(name, shape));
    const Numbers numbers(tensor);
    *weight = numbers.bf16.empty() ? kernels::OrderedWeights(numbers.fp32.data(), out, in, form)
                                   : kernels::OrderedWeights(numbers.bf16.data(), out, in, form);
    Count(*weight);
    model_.weights_->Release(name);
    return OkStatus();
  }

  void Count(const kernels::OrderedWeights& weights) {
    model_.weight_bytes_ += weights.bytes();
    model_.exact_ = model_.exact_ && weights.exact();
  }

  Model& model_;
  std::string text_;    // what the digest is taken of
  std::string prefix_;  // of the names of the layer under work
};

Model::Model() = default;
Model::~Model() = default;

Status Model::OpenDirectory(const std::filesystem::path& directory) {
  KV_ASSIGN_OR_RETURN(config_, LoadConfig(directory));
  KV_ASSIGN_OR_RETURN(tokenizer_, Tokenizer::LoadFrom(directory));
  if (tokenizer_->vocab_size() > config_.vocab) {
    return InvalidArgument(
        "{}: the tokenizer has token ids up to {}, but config.json a vocab_size of {}; do the "
        "files belong to one model?",
        directory.string(), tokenizer_->vocab_size() - 1, config_.vocab);
  }
  KV_ASSIGN_OR_RETURN(chat_template_, LoadChatTemplate(directory));
  KV_ASSIGN_OR_RETURN(weights_, Checkpoint::Open(directory));
  return OkStatus();
}

Status Model::OpenFile(const std::filesystem::path& file) {
  KV_ASSIGN_OR_RETURN(GgufModel gguf, OpenGguf(file));
  config_ = std::move(gguf.config);
  tokenizer_ = std::move(gguf.tokenizer);
  chat_template_ = std::move(gguf.chat_template);
  weights_ = std::move(gguf.weights);
  return OkStatus();
}

Result<std::unique_ptr<Model>> Model::Load(const std::filesystem::path& path,
                                           kernels::WeightForm form) {
  std::unique_ptr<Model> model(new Model);
  model->form_ = form;
  KV_RETURN_IF_ERROR(IsGgufFile(path) ? model->OpenFile(path) : model->OpenDirectory(path));
  KV_RETURN_IF_ERROR(Loader(model.get()).Load());
  const ModelConfig& config = model->config_;
  model->rope_ = std::make_unique<kernels::RopeTable>(config.head_dim, config.rope_theta,
                                                      config.rope_scaling, config.max_positions);
  if (config.local_rope_theta != 0.0 && !config.sliding.empty()) {
    model->local_rope_ = std::make_unique<kernels::RopeTable>(
        config.head_dim, config.local_rope_theta, kernels::RopeScaling{}, config.max_positions);
  }
  return model;
}

std::string Model::numerics() const {
  return exact_ ? "" : fmt::format("/weights {}", WeightFormName(form_));
}

void Model::Embed(int32_t token, float* out) const {
  KV_CHECK(token >= 0 && token < config_.vocab);
  embedding_.CopyRow(token, out);
  if (config_.embedding_scale == 1.0) return;
  const auto scale = static_cast<float>(config_.embedding_scale);
  for (int i = 0; i < config_.hidden; ++i) out[i] *= scale;
}

}  // namespace kvant::node
