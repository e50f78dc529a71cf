#include "node/activations.h"

#include <algorithm>

#include "base/check.h"
#include "kernels/vector.h"

namespace kvant::node {
namespace {

// What transformers' DeepSeek code gives the norms inside its attention, whatever the config says.
constexpr float kLatentNormEps = 1e-6F;

size_t RowsOf(int width) {
  return static_cast<size_t>(Activations::kRows) * static_cast<size_t>(width);
}

int WidestMlp(const ModelConfig& config) {
  const MixtureOfExperts& experts = config.experts;
  return std::max(config.intermediate, experts.intermediate * std::max(1, experts.shared_experts));
}

}  // namespace

Activations::Activations(const Model* model, kernels::ThreadPool* pool)
    : model_(*model),
      config_(model->config()),
      pool_(pool),
      state_(config_.StateShape(1)),
      router_(config_.experts),
      assigned_(static_cast<size_t>(config_.experts.experts)) {
  for (std::vector<Assignment>& rows : assigned_) rows.reserve(kRows);
  x.resize(RowsOf(config_.hidden));
  q.resize(RowsOf(config_.q_heads * kernels::KeyDim(state_)));
  k.resize(RowsOf(key_width()));
  v.resize(RowsOf(value_width()));
  attended.resize(RowsOf(attended_width()));
  normed_.resize(RowsOf(config_.hidden));
  added_.resize(RowsOf(config_.hidden));
  gate_.resize(RowsOf(WidestMlp(config_)));
  up_.resize(RowsOf(WidestMlp(config_)));
  if (config_.latent) {
    const LatentAttention& latent = *config_.latent;
    projected_.resize(RowsOf(config_.q_width()));
    low_.resize(RowsOf(std::max(latent.q_rank, latent.kv_rank + latent.rope_dim)));
    head_in_.resize(RowsOf(config_.q_heads * std::max(latent.nope_dim, latent.kv_rank)));
    head_out_.resize(RowsOf(config_.q_heads * std::max(latent.kv_rank, latent.value_dim)));
    values_.resize(RowsOf(config_.q_heads * latent.value_dim));
  }
  if (config_.experts.experts != 0) {
    scores_.resize(RowsOf(config_.experts.experts));
    expert_in_.resize(RowsOf(config_.hidden));
    expert_out_.resize(RowsOf(config_.hidden));
  }
  ReservePartials(kRows);
}

void Activations::ReservePartials(size_t count) {
  const auto heads = static_cast<size_t>(config_.q_heads);
  if (max_.size() >= count * heads) return;
  max_.resize(count * heads);
  sum_.resize(count * heads);
  weighted_.resize(count * static_cast<size_t>(attended_width()));
}

kernels::QueryBlock Activations::Queries(int first_row, int rows, size_t first_partial) {
  const auto heads = static_cast<size_t>(config_.q_heads);
  kernels::QueryBlock block;
  block.rows = rows;
  block.q_heads = config_.q_heads;
  block.q = Row(q, first_row, config_.q_heads * kernels::KeyDim(state_));
  block.scale = static_cast<float>(config_.attention_scale);
  block.max = max_.data() + first_partial * heads;
  block.sum = sum_.data() + first_partial * heads;
  block.weighted = weighted_.data() + first_partial * static_cast<size_t>(attended_width());
  return block;
}

void Activations::Product(const kernels::OrderedWeights& weights, const float* in, int rows,
                          float* out) {
  const kernels::LinearProduct product = {&weights, in, out};
  kernels::Linear({&product, 1}, rows, pool_);
}

void Activations::ProjectState(int layer, std::span<const int> positions) {
  const LayerWeights& weights = model_.layer(layer);
  const int rows = static_cast<int>(positions.size());
  kernels::RmsNorm(x.data(), weights.attention_norm, rows, config_.hidden, config_.rms_norm_eps,
                   normed_.data());
  if (config_.latent) return ProjectLatent(layer, positions);
  ProjectHeads(weights, rows);
  const kernels::RopeTable& rope = model_.rope(layer);
  const auto head_dim = static_cast<size_t>(config_.head_dim);
  for (int row = 0; row < rows; ++row) {
    const int position = positions[static_cast<size_t>(row)];
    rope.Apply(Row(q, row, config_.q_width()), config_.q_heads, head_dim, position);
    rope.Apply(Row(k, row, config_.kv_width()), config_.kv_heads, head_dim, position);
  }
}

void Activations::ProjectHeads(const LayerWeights& layer, int rows) {
  const kernels::LinearProduct products[] = {
      {&layer.query, normed_.data(), q.data()},  // [rows][q_heads][head_dim]
      {&layer.key, normed_.data(), k.data()},    // [rows][kv_heads][head_dim]
      {&layer.value, normed_.data(), v.data()},  // [rows][kv_heads][head_dim]
  };
  kernels::Linear(products, rows, pool_);
  if (layer.query_bias != nullptr) {
    kernels::AddBias(q.data(), layer.query_bias, rows, config_.q_width());
    kernels::AddBias(k.data(), layer.key_bias, rows, config_.kv_width());
    kernels::AddBias(v.data(), layer.value_bias, rows, config_.kv_width());
  }
  if (layer.query_norm != nullptr) {
    kernels::RmsNorm(q.data(), layer.query_norm, rows * config_.q_heads, config_.head_dim,
                     config_.rms_norm_eps, q.data());
    kernels::RmsNorm(k.data(), layer.key_norm, rows * config_.kv_heads, config_.head_dim,
                     config_.rms_norm_eps, k.data());
  }
}

void Activations::ProjectLatent(int layer, std::span<const int> positions) {
  const LayerWeights& weights = model_.layer(layer);
  const LatentAttention& sizes = *config_.latent;
  const int rows = static_cast<int>(positions.size());
  if (sizes.q_rank == 0) {
    Product(weights.query, normed_.data(), rows, projected_.data());
  } else {
    Product(weights.latent.query_down, normed_.data(), rows, low_.data());
    kernels::RmsNorm(low_.data(), weights.latent.query_norm, rows, sizes.q_rank, kLatentNormEps,
                     low_.data());
    Product(weights.query, low_.data(), rows, projected_.data());
  }
  // A head's query: its rope channels, then what the latent is multiplied with.
  const int query_dim = config_.query_dim();
  const int key_dim = sizes.rope_dim + sizes.kv_rank;
  HeadProducts(weights.latent.key_up, rows, projected_.data(), query_dim, q.data() + sizes.rope_dim,
               key_dim);
  const int low_width = sizes.kv_rank + sizes.rope_dim;
  Product(weights.latent.down, normed_.data(), rows, low_.data());
  const kernels::RopeTable& rope = model_.rope(layer);
  const auto rotate = [&](float* vectors, int heads, int stride, int position) {
    if (sizes.interleaved) {
      rope.ApplyInterleaved(vectors, heads, static_cast<size_t>(stride), position);
    } else {
      rope.Apply(vectors, heads, static_cast<size_t>(stride), position);
    }
  };
  for (int row = 0; row < rows; ++row) {
    const int position = positions[static_cast<size_t>(row)];
    float* query = Row(q, row, config_.q_heads * key_dim);
    const float* projected = Row(projected_, row, config_.q_width());
    for (int head = 0; head < config_.q_heads; ++head) {
      std::copy_n(projected + head * query_dim + sizes.nope_dim, sizes.rope_dim,
                  query + head * key_dim);
    }
    rotate(query, config_.q_heads, key_dim, position);
    const float* low = Row(low_, row, low_width);
    kernels::RmsNorm(low, weights.latent.norm, 1, sizes.kv_rank, kLatentNormEps,
                     Row(v, row, sizes.kv_rank));
    float* key = Row(k, row, sizes.rope_dim);
    std::copy_n(low + sizes.kv_rank, sizes.rope_dim, key);
    rotate(key, 1, sizes.rope_dim, position);
  }
}

void Activations::HeadProducts(const std::vector<kernels::OrderedWeights>& weights, int rows,
                               const float* from, int from_stride, float* to, int to_stride) {
  const int heads = config_.q_heads;
  pool_->ParallelFor(heads, [&](int head) {
    const kernels::OrderedWeights& of_head = weights[static_cast<size_t>(head)];
    const int inputs = of_head.inputs();
    const int outputs = of_head.outputs();
    float* in = head_in_.data() + RowsOf(head * inputs);
    float* out = head_out_.data() + RowsOf(head * outputs);
    for (int row = 0; row < rows; ++row) {
      std::copy_n(from + (static_cast<ptrdiff_t>(row) * heads + head) * from_stride, inputs,
                  in + static_cast<ptrdiff_t>(row) * inputs);
    }
    const kernels::LinearProduct product = {&of_head, in, out};
    kernels::Linear({&product, 1}, rows, nullptr);
    for (int row = 0; row < rows; ++row) {
      std::copy_n(out + static_cast<ptrdiff_t>(row) * outputs, outputs,
                  to + (static_cast<ptrdiff_t>(row) * heads + head) * to_stride);
    }
  });
}

void Activations::FinishAttention(int layer, int rows) {
  const LayerWeights& weights = model_.layer(layer);
  const float* values = attended.data();  // [rows][q_heads][value_dim]
  if (config_.latent) {
    HeadProducts(weights.latent.value_up, rows, attended.data(), config_.latent->kv_rank,
                 values_.data(), config_.latent->value_dim);
    values = values_.data();
  }
  Product(weights.output, values, rows, added_.data());
  if (weights.output_bias != nullptr) {
    kernels::AddBias(added_.data(), weights.output_bias, rows, config_.hidden);
  }
  AddToStream(weights.post_attention_norm, rows);
}

void Activations::AddToStream(const float* norm, int rows) {
  if (norm != nullptr) {
    kernels::RmsNorm(added_.data(), norm, rows, config_.hidden, config_.rms_norm_eps,
                     added_.data());
  }
  kernels::AddInPlace(x.data(), added_.data(),
                      static_cast<size_t>(rows) * static_cast<size_t>(config_.hidden));
}

void Activations::Mlp(int layer, int rows) {
  const LayerWeights& weights = model_.layer(layer);
  kernels::RmsNorm(x.data(), weights.mlp_norm, rows, config_.hidden, config_.rms_norm_eps,
                   normed_.data());
  DenseMlp(weights.mlp, normed_.data(), rows, added_.data());
  if (!weights.experts.empty()) AddExperts(weights, rows, added_.data());
  AddToStream(weights.post_mlp_norm, rows);
}

void Activations::DenseMlp(const MlpWeights& mlp, const float* in, int rows, float* out) {
  const kernels::LinearProduct products[] = {
      {&mlp.gate, in, gate_.data()},  // [rows][intermediate]
      {&mlp.up, in, up_.data()},      // [rows][intermediate]
  };
  kernels::Linear(products, rows, pool_);
  const size_t count = static_cast<size_t>(rows) * static_cast<size_t>(mlp.gate.outputs());
  if (config_.activation == Activation::kSilu) {
    kernels::SiluMultiply(gate_.data(), up_.data(), count);
  } else {
    kernels::GeluTanhMultiply(gate_.data(), up_.data(), count);
  }
  Product(mlp.down, gate_.data(), rows, out);  // [rows][hidden]
}

void Activations::AddExperts(const LayerWeights& layer, int rows, float* out) {
  const auto experts = static_cast<size_t>(config_.experts.experts);
  const auto width = static_cast<size_t>(config_.hidden);
  Product(layer.router, normed_.data(), rows, scores_.data());
  for (std::vector<Assignment>& rows_of : assigned_) rows_of.clear();
  for (int row = 0; row < rows; ++row) {
    const std::span<float> logits(Row(scores_, row, config_.experts.experts), experts);
    for (const ExpertChoice& choice : router_.Route(logits, layer.router_bias)) {
      assigned_[static_cast<size_t>(choice.expert)].push_back({row, choice.weight});
    }
  }
  for (size_t expert = 0; expert < experts; ++expert) {
    if (assigned_[expert].empty()) continue;
    const int count = static_cast<int>(assigned_[expert].size());
    float* to = expert_in_.data();
    for (const Assignment& assignment : assigned_[expert]) {
      to = std::copy_n(Row(normed_, assignment.row, config_.hidden), width, to);
    }
    DenseMlp(layer.experts[expert], expert_in_.data(), count, expert_out_.data());
    const float* from = expert_out_.data();
    for (const Assignment& assignment : assigned_[expert]) {
      float* sum = out + static_cast<size_t>(assignment.row) * width;
      for (size_t i = 0; i < width; ++i) sum[i] += assignment.weight * from[i];
      from += width;
    }
  }
}

void Activations::Logits(int rows, float* logits) {
  kernels::RmsNorm(x.data(), model_.final_norm(), rows, config_.hidden, config_.rms_norm_eps,
                   normed_.data());
  Product(model_.output(), normed_.data(), rows, logits);
}

}  // namespace kvant::node
