// What attention feels of errors in the state it attends: how calibration weighs directions
// (docs/klt.md, "Calibration").
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/random.h"
#include "kernels/dense_algebra.h"
#include "node/decoder.h"
#include "node/model.h"

namespace kvant::node {

// Sums over the queries of sequences, of what they feel of errors in blocks before their own. A few
// tokens may take nearly all attention; so that not they alone decide how directions weigh, what is
// felt of a token counts by how much more that is than of others. Single-owner; borrows the model.
// REQUIRES: kernels::LoadBlas() was ok.
class AttentionWeights {
 public:
  // seed: of the keys that are looked at, one for each query.
  AttentionWeights(const Model* model, uint64_t seed);

  // A new sequence begins.
  void Begin();
  // Takes one layer of its next kBlockTokens tokens, as a LayerSink gets them.
  void AddState(int layer, const float* keys, const float* values);
  // Takes that block's queries, as a QuerySink gets them.
  void AddQueries(int layer, const float* queries);
  // All of the sequence was taken.
  void End();
  // Of the last sequence, [tokens]: how much errors in a token cost, in that of the middle one; 0
  // if it is not known, because few queries come behind it.
  std::span<const float> importance(int layer) const {
    return importance_[static_cast<size_t>(layer)];
  }
  // [width][width], rows as in klt.h: the square of what an error does to a layer's output, but for
  // a factor and the tokens' importance. Errors in the first kKltSinks tokens are not counted:
  // those are coded finer.
  const kernels::Matrix& sum(int layer) const { return sums_[static_cast<size_t>(layer)]; }

 private:
  // What the queries of one block and head felt of the tokens [first, position).
  struct Felt {
    int kv = 0;
    int head = 0;
    int first = 0;
    int count = 0;
    const float* q = nullptr;  // [kBlockTokens][KeyDim]
    // [kBlockTokens][count]: squares of what an error in a key does, but for what it has in common
    // with the query, and of what one in a value does; both but for the metric.
    const float* of_keys = nullptr;
    const float* of_values = nullptr;
  };
  using Visit = std::function<void(const Felt& felt)>;
  void VisitBlock(int layer, int position, const Visit& visit) const;
  void Weigh(int layer);
  void SetImportance(int layer);
  double MeanOfMetric(int layer, int head) const;

  void MakeValueMetrics();

  const Model& model_;
  const ModelConfig& config_;
  kernels::LayerShape state_;
  int width_;
  int key_width_;
  Random random_;
  // Of the sequence under work: [layer][tokens][key or value width], rope applied.
  std::vector<std::vector<float>> keys_;
  std::vector<std::vector<float>> values_;
  std::vector<std::vector<float>> queries_;     // [layer][tokens][q_heads][KeyDim]
  std::vector<std::vector<float>> importance_;  // [layer][tokens]
  // [layer][q_head]: of an error in what a head sums.
  std::vector<std::vector<kernels::Matrix>> metrics_;
  std::vector<kernels::Matrix> sums_;  // [layer]
};

}  // namespace kvant::node
