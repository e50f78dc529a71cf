#include "node/model.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <string_view>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"

namespace kvant::node {
namespace {

// What the forward pass reads of the configuration, as text with exact numbers.
std::string DescribeConfig(const ModelConfig& config) {
  const auto exact = [](double value) { return std::bit_cast<uint64_t>(value); };
  const kernels::RopeScaling& rope = config.rope_scaling;
  return fmt::format(
      "kvant model 1\narchitecture {} layers {} hidden {} intermediate {} q_heads {} kv_heads {} "
      "head_dim {} vocab {} eps {:016x} tied {}\nrope {} theta {:016x} factor {:016x} low {:016x} "
      "high {:016x} original {}\n",
      static_cast<int>(config.architecture), config.layers, config.hidden, config.intermediate,
      config.q_heads, config.kv_heads, config.head_dim, config.vocab, exact(config.rms_norm_eps),
      config.tied_output, static_cast<int>(rope.kind), exact(config.rope_theta), exact(rope.factor),
      exact(rope.low_freq_factor), exact(rope.high_freq_factor),
      rope.original_max_position_embeddings);
}

template <typename T>
bool IsAligned(std::span<const std::byte> bytes) {
  return reinterpret_cast<uintptr_t>(bytes.data()) % alignof(T) == 0;
}

}  // namespace

// Fills a Model's weights from its checkpoint and collects what the digest is made of.
class Model::Loader {
 public:
  explicit Loader(Model* model) : model_(*model), text_(DescribeConfig(model->config_)) {}

  Status Load() {
    const ModelConfig& config = model_.config_;
    const int hidden = config.hidden;
    // An embedding table that is not the output layer, too, is read row by row: bf16 is enough.
    KV_RETURN_IF_ERROR(Matrix("model.embed_tokens.weight", config.vocab, hidden, config.tied_output,
                              &model_.embedding_));
    for (int i = 0; i < config.layers; ++i) {
      LayerWeights layer;
      const std::string prefix = fmt::format("model.layers.{}.", i);
      const auto matrix = [&](std::string_view name, int out, int in, kernels::Weight* weight) {
        return Matrix(fmt::format("{}{}.weight", prefix, name), out, in, true, weight);
      };
      KV_RETURN_IF_ERROR(Norm(prefix + "input_layernorm.weight", &layer.attention_norm));
      KV_RETURN_IF_ERROR(matrix("self_attn.q_proj", config.q_width(), hidden, &layer.query));
      KV_RETURN_IF_ERROR(matrix("self_attn.k_proj", config.kv_width(), hidden, &layer.key));
      KV_RETURN_IF_ERROR(matrix("self_attn.v_proj", config.kv_width(), hidden, &layer.value));
      KV_RETURN_IF_ERROR(matrix("self_attn.o_proj", hidden, config.q_width(), &layer.output));
      KV_RETURN_IF_ERROR(Norm(prefix + "post_attention_layernorm.weight", &layer.mlp_norm));
      KV_RETURN_IF_ERROR(matrix("mlp.gate_proj", config.intermediate, hidden, &layer.gate));
      KV_RETURN_IF_ERROR(matrix("mlp.up_proj", config.intermediate, hidden, &layer.up));
      KV_RETURN_IF_ERROR(matrix("mlp.down_proj", hidden, config.intermediate, &layer.down));
      model_.layers_.push_back(layer);
    }
    KV_RETURN_IF_ERROR(Norm("model.norm.weight", &model_.final_norm_));
    if (config.tied_output) {
      model_.output_ = model_.embedding_;
    } else {
      KV_RETURN_IF_ERROR(Matrix("lm_head.weight", config.vocab, hidden, true, &model_.output_));
    }
    model_.digest_ = Sha256(AsBytes(text_));
    return OkStatus();
  }

 private:
  Result<Tensor> Take(std::string_view name, std::span<const int64_t> shape) {
    KV_ASSIGN_OR_RETURN(Tensor tensor, model_.checkpoint_->Find(name, shape));
    text_ += fmt::format("{} {}", name, DataTypeName(tensor.type));
    for (const int64_t size : shape) text_ += fmt::format(" {}", size);
    text_ += fmt::format(" {}\n", ToHex(Sha256(tensor.bytes)));
    return tensor;
  }

  float* NewFloats(size_t count) {
    return model_.expanded_.emplace_back(std::make_unique_for_overwrite<float[]>(count)).get();
  }

  // The tensor's bf16 where it lies, or a copy of it where 16-bit reads would be misaligned.
  const uint16_t* Halves(const Tensor& tensor) {
    if (IsAligned<uint16_t>(tensor.bytes)) {
      return reinterpret_cast<const uint16_t*>(tensor.bytes.data());
    }
    auto& copy = model_.realigned_.emplace_back(
        std::make_unique_for_overwrite<uint16_t[]>(tensor.bytes.size() / sizeof(uint16_t)));
    std::memcpy(copy.get(), tensor.bytes.data(), tensor.bytes.size());
    return copy.get();
  }

  // The tensor's values in fp32: where they lie, or expanded.
  const float* Floats(const Tensor& tensor) {
    if (tensor.type == DataType::kFp32) {
      if (IsAligned<float>(tensor.bytes)) {
        return reinterpret_cast<const float*>(tensor.bytes.data());
      }
      float* copy = NewFloats(tensor.bytes.size() / sizeof(float));
      std::memcpy(copy, tensor.bytes.data(), tensor.bytes.size());
      return copy;
    }
    const size_t count = tensor.bytes.size() / sizeof(uint16_t);
    float* wide = NewFloats(count);
    if (tensor.type == DataType::kBf16) {
      kernels::WidenBf16(Halves(tensor), wide, count);
    } else {
      kernels::WidenFp16(Halves(tensor), wide, count);
    }
    return wide;
  }

  Status Norm(const std::string& name, const float** out) {
    const int64_t shape[] = {model_.config_.hidden};
    KV_ASSIGN_OR_RETURN(const Tensor tensor, Take(name, shape));
    *out = Floats(tensor);
    return OkStatus();
  }

  // A weight matrix [out][in]; without `for_products` a bf16 one is not expanded.
  Status Matrix(const std::string& name, int out, int in, bool for_products,
                kernels::Weight* weight) {
    const int64_t shape[] = {out, in};
    KV_ASSIGN_OR_RETURN(const Tensor tensor, Take(name, shape));
    weight->out_features = out;
    weight->in_features = in;
    if (tensor.type == DataType::kBf16) weight->bf16 = Halves(tensor);
    if (tensor.type != DataType::kBf16 || for_products) weight->fp32 = Floats(tensor);
    return OkStatus();
  }

  Model& model_;
  std::string text_;  // what the digest is taken of
};

Model::Model() = default;
Model::~Model() = default;

Result<std::unique_ptr<Model>> Model::Load(const std::filesystem::path& directory) {
  std::unique_ptr<Model> model(new Model);
  KV_ASSIGN_OR_RETURN(model->config_, LoadConfig(directory));
  KV_ASSIGN_OR_RETURN(model->tokenizer_, Tokenizer::Load(directory / "tokenizer.json"));
  if (model->tokenizer_->vocab_size() > model->config_.vocab) {
    return InvalidArgument(
        "{}: tokenizer.json has token ids up to {}, but config.json a vocab_size of {}; do the "
        "files belong to one model?",
        directory.string(), model->tokenizer_->vocab_size() - 1, model->config_.vocab);
  }
  KV_ASSIGN_OR_RETURN(model->checkpoint_, Checkpoint::Open(directory));
  KV_RETURN_IF_ERROR(Loader(model.get()).Load());
  const ModelConfig& config = model->config_;
  model->rope_ = std::make_unique<kernels::RopeTable>(config.head_dim, config.rope_theta,
                                                      config.rope_scaling, config.max_positions);
  return model;
}

void Model::Embed(int32_t token, float* out) const {
  KV_CHECK(token >= 0 && token < config_.vocab);
  const auto width = static_cast<size_t>(config_.hidden);
  const size_t at = static_cast<size_t>(token) * width;
  if (embedding_.fp32 != nullptr) {
    std::copy_n(embedding_.fp32 + at, width, out);
  } else {
    kernels::WidenBf16(embedding_.bf16 + at, out, width);
  }
}

}  // namespace kvant::node
