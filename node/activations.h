// The buffers of a forward pass, and what prefill and decode do alike in a layer. Rows are a
// prefill's tokens or a decode step's sequences; the bits of none depend on the others.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "kernels/attention.h"
#include "kernels/linear.h"
#include "node/expert_routing.h"
#include "node/model.h"

namespace kvant::node {

// Single-owner. A decoder calls, layer by layer: ProjectState, its own attention from q, k and v to
// attended, FinishAttention, Mlp; after the last layer Logits.
class Activations {
 public:
  static constexpr int kRows = 64;  // most rows of a pass

  // Both are borrowed.
  Activations(const Model* model, kernels::ThreadPool* pool);

  // x -> q, k, v of a layer with rotary positions. positions: [rows].
  void ProjectState(int layer, std::span<const int> positions);
  // x += what a layer's attention makes of `attended`.
  void FinishAttention(int layer, int rows);
  // x += mlp(x).
  void Mlp(int layer, int rows);
  // logits[rows][vocab] = output(norm(x)).
  void Logits(int rows, float* logits);

  float* Row(std::vector<float>& buffer, int row, int width) {
    return buffer.data() + static_cast<size_t>(row) * static_cast<size_t>(width);
  }
  // Room for the partial softmaxes of `count` query rows.
  void ReservePartials(size_t count);
  // `rows` queries from q's row `first_row` on, whose partials are kept from `first_partial` on.
  kernels::QueryBlock Queries(int first_row, int rows, size_t first_partial);

  int hidden() const { return config_.hidden; }
  // Floats of a row of k, v and attended.
  int key_width() const { return state_.keys.kv_heads * state_.keys.head_dim; }
  int value_width() const { return state_.values.kv_heads * state_.values.head_dim; }
  int attended_width() const { return config_.q_heads * state_.values.head_dim; }
  // What a layer keeps of one token.
  const kernels::LayerShape& state() const { return state_; }

  std::vector<float> x;         // [kRows][hidden], the residual stream
  std::vector<float> q;         // [kRows][q_heads][KeyDim(state)]
  std::vector<float> k;         // [kRows][keys.kv_heads][keys.head_dim]
  std::vector<float> v;         // [kRows][values.kv_heads][values.head_dim]
  std::vector<float> attended;  // [kRows][q_heads][values.head_dim]

 private:
  // A row that an expert was chosen for.
  struct Assignment {
    int row = 0;
    float weight = 0.0F;
  };
  void Product(const kernels::OrderedWeights& weights, const float* x, int rows, float* y);
  void ProjectHeads(const LayerWeights& layer, int rows);
  void ProjectLatent(int layer, std::span<const int> positions);
  // One small product for each head. from: [rows][q_heads][from_stride], of which the first
  // in_features are read; to: [rows][q_heads][to_stride].
  void HeadProducts(const std::vector<kernels::OrderedWeights>& weights, int rows,
                    const float* from, int from_stride, float* to, int to_stride);
  // out[rows][hidden] = the gated MLP of `normed`.
  void DenseMlp(const MlpWeights& mlp, const float* in, int rows, float* out);
  // out[rows][hidden] += what the chosen experts say.
  void AddExperts(const LayerWeights& layer, int rows, float* out);
  // x += norm(added), or x += added.
  void AddToStream(const float* norm, int rows);

  const Model& model_;
  const ModelConfig& config_;
  kernels::ThreadPool* pool_;
  kernels::LayerShape state_;
  std::vector<float> normed_;     // [kRows][hidden]
  std::vector<float> added_;      // [kRows][hidden]
  std::vector<float> gate_;       // [kRows][widest MLP]
  std::vector<float> up_;         // [kRows][widest MLP]
  std::vector<float> projected_;  // latent attention: [kRows][q_heads][nope_dim + rope_dim]
  std::vector<float> low_;        // latent attention: [kRows][q_rank or kv_rank + rope_dim]
  std::vector<float> head_in_;    // latent attention: [q_heads][kRows][widest input of a head]
  std::vector<float> head_out_;   // latent attention: [q_heads][kRows][widest output of a head]
  std::vector<float> values_;     // latent attention: [kRows][q_heads][value_dim]
  ExpertRouter router_;
  std::vector<std::vector<Assignment>> assigned_;  // mixture: [experts], room for kRows each
  std::vector<float> scores_;                      // mixture: [kRows][experts]
  std::vector<float> expert_in_;                   // mixture: [kRows][hidden]
  std::vector<float> expert_out_;                  // mixture: [kRows][hidden]
  // Partial softmaxes; as many query rows as a step needs.
  std::vector<float> max_;       // [partials][q_heads]
  std::vector<float> sum_;       // [partials][q_heads]
  std::vector<float> weighted_;  // [partials][q_heads][values.head_dim]
};

}  // namespace kvant::node
