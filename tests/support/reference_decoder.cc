#include "tests/support/reference_decoder.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "kernels/float_formats.h"
#include "kernels/vector.h"
#include "node/expert_routing.h"

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

Vector Product(const kernels::OrderedWeights& weights, std::span<const double> x) {
  const std::vector<float> all = weights.RowMajor();
  Vector out(static_cast<size_t>(weights.outputs()));
  for (size_t row = 0; row < out.size(); ++row) {
    for (size_t i = 0; i < x.size(); ++i) {
      out[row] += static_cast<double>(all[row * x.size() + i]) * x[i];
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

Vector Slice(const Vector& x, size_t first, size_t count) {
  const auto from = x.begin() + static_cast<ptrdiff_t>(first);
  return {from, from + static_cast<ptrdiff_t>(count)};
}

void Add(Vector* x, const Vector& y) {
  for (size_t i = 0; i < x->size(); ++i) (*x)[i] += y[i];
}

void AddBias(Vector* x, const float* bias) {
  for (size_t i = 0; bias != nullptr && i < x->size(); ++i) (*x)[i] += static_cast<double>(bias[i]);
}

// Norms each head on its own.
void NormHeads(Vector* x, size_t head_dim, const float* weight, double epsilon) {
  for (size_t head = 0; weight != nullptr && head < x->size(); head += head_dim) {
    const Vector normed = Normed(Slice(*x, head, head_dim), weight, epsilon);
    std::copy(normed.begin(), normed.end(), x->begin() + static_cast<ptrdiff_t>(head));
  }
}

// Queries, keys and values of one token: [q_heads][query_dim], [heads][query_dim],
// [heads][value_dim]. Keys and values of latent attention are made for every head.
struct TokenState {
  Vector q;
  Vector k;
  Vector v;
};

class Oracle {
 public:
  explicit Oracle(const node::Model& model) : model_(model), config_(model.config()) {}

  std::vector<Vector> Logits(std::span<const int32_t> tokens) {
    std::vector<std::vector<TokenState>> past(static_cast<size_t>(config_.layers));
    std::vector<Vector> logits;
    for (size_t position = 0; position < tokens.size(); ++position) {
      std::vector<float> embedded(static_cast<size_t>(config_.hidden));
      model_.Embed(tokens[position], embedded.data());
      Vector x(embedded.begin(), embedded.end());
      for (int layer = 0; layer < config_.layers; ++layer) {
        const node::LayerWeights& w = model_.layer(layer);
        const Vector normed = Norm(x, w.attention_norm);
        auto& states = past[static_cast<size_t>(layer)];
        states.push_back(config_.latent ? Latent(w, normed, position)
                                        : Heads(layer, normed, position));
        Vector added = Product(w.output, Attend(layer, states));
        AddBias(&added, w.output_bias);
        Add(&x, w.post_attention_norm != nullptr ? Norm(added, w.post_attention_norm) : added);

        const Vector in = Norm(x, w.mlp_norm);
        added = Mlp(w.mlp, in);
        if (!w.experts.empty()) Add(&added, Experts(w, in));
        Add(&x, w.post_mlp_norm != nullptr ? Norm(added, w.post_mlp_norm) : added);
      }
      logits.push_back(Product(model_.output(), Norm(x, model_.final_norm())));
    }
    return logits;
  }

 private:
  Vector Norm(const Vector& x, const float* weight) const {
    return Normed(x, weight, config_.rms_norm_eps);
  }

  void RotateFor(int layer, Vector* x, size_t dim, size_t position) const {
    const bool local = config_.local_rope_theta != 0.0 && config_.Window(layer) != 0;
    const auto frequencies = kernels::RopeFrequencies(
        static_cast<int>(dim), local ? config_.local_rope_theta : config_.rope_theta,
        local ? kernels::RopeScaling{} : config_.rope_scaling);
    Rotate(x, dim, frequencies, position);
    const double factor = local ? 1.0 : config_.rope_scaling.attention_factor;
    for (double& value : *x) value *= factor;
  }

  TokenState Heads(int layer, const Vector& in, size_t position) const {
    const node::LayerWeights& w = model_.layer(layer);
    const auto dim = static_cast<size_t>(config_.head_dim);
    TokenState state = {Product(w.query, in), Product(w.key, in), Product(w.value, in)};
    AddBias(&state.q, w.query_bias);
    AddBias(&state.k, w.key_bias);
    AddBias(&state.v, w.value_bias);
    NormHeads(&state.q, dim, w.query_norm, config_.rms_norm_eps);
    NormHeads(&state.k, dim, w.key_norm, config_.rms_norm_eps);
    RotateFor(layer, &state.q, dim, position);
    RotateFor(layer, &state.k, dim, position);
    return state;
  }

  TokenState Latent(const node::LayerWeights& w, const Vector& in, size_t position) const {
    const node::LatentAttention& sizes = *config_.latent;
    const auto nope = static_cast<size_t>(sizes.nope_dim);
    const auto rope = static_cast<size_t>(sizes.rope_dim);
    const auto rank = static_cast<size_t>(sizes.kv_rank);
    const auto rotated = [&](Vector x) {
      if (sizes.interleaved) {
        Vector apart(x.size());
        for (size_t i = 0; i < x.size(); ++i) apart[i / 2 + (i % 2) * x.size() / 2] = x[i];
        x = apart;
      }
      RotateFor(0, &x, rope, position);
      return x;
    };
    Vector query_in = in;
    if (sizes.q_rank != 0) {
      query_in = Normed(Product(w.latent.query_down, in), w.latent.query_norm, 1e-6);
    }
    const Vector q = Product(w.query, query_in);
    const Vector down = Product(w.latent.down, in);
    const Vector latent = Normed(Slice(down, 0, rank), w.latent.norm, 1e-6);
    const Vector rope_key = rotated(Slice(down, rank, rope));
    TokenState state;
    const auto append = [](Vector* to, const Vector& from) {
      to->insert(to->end(), from.begin(), from.end());
    };
    for (size_t head = 0; head < static_cast<size_t>(config_.q_heads); ++head) {
      append(&state.q, Slice(q, head * (nope + rope), nope));
      append(&state.q, rotated(Slice(q, head * (nope + rope) + nope, rope)));
      Vector key(nope);
      const std::vector<float> up = w.latent.key_up[head].RowMajor();  // [rank][nope]
      for (size_t i = 0; i < nope; ++i) {
        for (size_t r = 0; r < rank; ++r)
          key[i] += static_cast<double>(up[r * nope + i]) * latent[r];
      }
      append(&state.k, key);
      append(&state.k, rope_key);
      append(&state.v, Product(w.latent.value_up[head], latent));
    }
    return state;
  }

  // The last token over all that its layer's window holds.
  Vector Attend(int layer, const std::vector<TokenState>& states) const {
    const auto key_dim = static_cast<size_t>(config_.query_dim());
    const auto value_dim = static_cast<size_t>(config_.value_dim());
    const auto heads = static_cast<size_t>(config_.q_heads);
    const size_t group = config_.latent ? 1 : heads / static_cast<size_t>(config_.kv_heads);
    const int last = static_cast<int>(states.size()) - 1;
    const auto first = static_cast<size_t>(config_.FirstVisible(layer, last));
    Vector out(heads * value_dim);
    for (size_t head = 0; head < heads; ++head) {
      const size_t kv = head / group;
      Vector weights(states.size());
      double max = -std::numeric_limits<double>::infinity();
      for (size_t t = first; t < states.size(); ++t) {
        for (size_t i = 0; i < key_dim; ++i) {
          weights[t] += states.back().q[head * key_dim + i] * states[t].k[kv * key_dim + i];
        }
        weights[t] *= config_.attention_scale;
        max = std::max(max, weights[t]);
      }
      double sum = 0.0;
      for (size_t t = first; t < states.size(); ++t) sum += weights[t] = std::exp(weights[t] - max);
      for (size_t t = first; t < states.size(); ++t) {
        for (size_t i = 0; i < value_dim; ++i) {
          out[head * value_dim + i] += weights[t] / sum * states[t].v[kv * value_dim + i];
        }
      }
    }
    return out;
  }

  Vector Mlp(const node::MlpWeights& mlp, const Vector& in) const {
    Vector gate = Product(mlp.gate, in);
    const Vector up = Product(mlp.up, in);
    for (size_t i = 0; i < gate.size(); ++i) {
      const double x = gate[i];
      const double u = std::sqrt(2.0 / std::numbers::pi) * (x + 0.044715 * x * x * x);
      const bool silu = config_.activation == node::Activation::kSilu;
      gate[i] = up[i] * (silu ? x / (1.0 + std::exp(-x)) : 0.5 * x * (1.0 + std::tanh(u)));
    }
    return Product(mlp.down, gate);
  }

  Vector Experts(const node::LayerWeights& w, const Vector& in) const {
    const Vector scores = Product(w.router, in);
    std::vector<float> logits(scores.begin(), scores.end());
    Vector out(in.size());
    node::ExpertRouter router(config_.experts);
    for (const node::ExpertChoice& choice : router.Route(logits, w.router_bias)) {
      Vector said = Mlp(w.experts[static_cast<size_t>(choice.expert)], in);
      for (double& value : said) value *= static_cast<double>(choice.weight);
      Add(&out, said);
    }
    return out;
  }

  const node::Model& model_;
  const node::ModelConfig& config_;
};

}  // namespace

std::vector<Vector> ReferenceLogits(const node::Model& model, std::span<const int32_t> tokens) {
  return Oracle(model).Logits(tokens);
}

}  // namespace kvant::support
