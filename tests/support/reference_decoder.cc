#include "tests/support/reference_decoder.h"

#include <algorithm>
#include <cmath>

#include "kernels/vector.h"

namespace kvant::support {
namespace {

using Vector = std::vector<double>;

Vector Normed(const Vector& x, const float* weight, double epsilon) {
  double squares = 0.0;
  for (const double value : x) squares += value * value;
  const double scale = 1.0 / std::sqrt(squares / static_cast<double>(x.size()) + epsilon);
  Vector out(x.size());
  for (size_t i = 0; i < x.size(); ++i) out[i] = x[i] * scale * static_cast<double>(weight[i]);
  return out;
}

Vector Product(const kernels::Weight& weight, const Vector& x) {
  const auto width = static_cast<size_t>(weight.in_features);
  Vector out(static_cast<size_t>(weight.out_features));
  for (size_t row = 0; row < out.size(); ++row) {
    for (size_t i = 0; i < width; ++i) {
      out[row] += static_cast<double>(weight.fp32[row * width + i]) * x[i];
    }
  }
  return out;
}

void Rotate(Vector* x, size_t head_dim, const std::vector<double>& frequencies, size_t position) {
  const size_t half = head_dim / 2;
  for (size_t head = 0; head < x->size(); head += head_dim) {
    for (size_t i = 0; i < half; ++i) {
      const double angle = frequencies[i] * static_cast<double>(position);
      double& low = (*x)[head + i];
      double& high = (*x)[head + half + i];
      const double rotated = low * std::cos(angle) - high * std::sin(angle);
      high = high * std::cos(angle) + low * std::sin(angle);
      low = rotated;
    }
  }
}

// One query row over all keys and values so far: [tokens][kv_heads * head_dim].
Vector Attend(const node::ModelConfig& config, const Vector& q, const std::vector<Vector>& keys,
              const std::vector<Vector>& values) {
  const auto dim = static_cast<size_t>(config.head_dim);
  const auto group = static_cast<size_t>(config.q_heads / config.kv_heads);
  Vector out(q.size());
  for (size_t head = 0; head < static_cast<size_t>(config.q_heads); ++head) {
    const size_t kv = head / group * dim;
    Vector weights(keys.size());
    for (size_t t = 0; t < keys.size(); ++t) {
      for (size_t i = 0; i < dim; ++i) weights[t] += q[head * dim + i] * keys[t][kv + i];
      weights[t] /= std::sqrt(static_cast<double>(dim));
    }
    const double max = *std::max_element(weights.begin(), weights.end());
    double sum = 0.0;
    for (double& weight : weights) sum += weight = std::exp(weight - max);
    for (size_t t = 0; t < keys.size(); ++t) {
      for (size_t i = 0; i < dim; ++i) out[head * dim + i] += weights[t] / sum * values[t][kv + i];
    }
  }
  return out;
}

void Add(Vector* x, const Vector& y) {
  for (size_t i = 0; i < x->size(); ++i) (*x)[i] += y[i];
}

}  // namespace

std::vector<Vector> ReferenceLogits(const node::Model& model, std::span<const int32_t> tokens) {
  const node::ModelConfig& config = model.config();
  const auto dim = static_cast<size_t>(config.head_dim);
  const std::vector<double> frequencies =
      kernels::RopeFrequencies(config.head_dim, config.rope_theta, config.rope_scaling);
  std::vector<std::vector<Vector>> keys(static_cast<size_t>(config.layers));    // [layer][token]
  std::vector<std::vector<Vector>> values(static_cast<size_t>(config.layers));  // [layer][token]
  std::vector<Vector> logits;
  for (size_t position = 0; position < tokens.size(); ++position) {
    std::vector<float> embedded(static_cast<size_t>(config.hidden));
    model.Embed(tokens[position], embedded.data());
    Vector x(embedded.begin(), embedded.end());
    for (int layer = 0; layer < config.layers; ++layer) {
      const node::LayerWeights& w = model.layer(layer);
      const Vector normed = Normed(x, w.attention_norm, config.rms_norm_eps);
      Vector q = Product(w.query, normed);
      Vector k = Product(w.key, normed);
      Rotate(&q, dim, frequencies, position);
      Rotate(&k, dim, frequencies, position);
      auto& layer_keys = keys[static_cast<size_t>(layer)];
      auto& layer_values = values[static_cast<size_t>(layer)];
      layer_keys.push_back(std::move(k));
      layer_values.push_back(Product(w.value, normed));
      Add(&x, Product(w.output, Attend(config, q, layer_keys, layer_values)));

      const Vector mlp = Normed(x, w.mlp_norm, config.rms_norm_eps);
      Vector gate = Product(w.gate, mlp);
      const Vector up = Product(w.up, mlp);
      for (size_t i = 0; i < gate.size(); ++i) gate[i] *= up[i] / (1.0 + std::exp(-gate[i]));
      Add(&x, Product(w.down, gate));
    }
    logits.push_back(Product(model.output(), Normed(x, model.final_norm(), config.rms_norm_eps)));
  }
  return logits;
}

}  // namespace kvant::support
