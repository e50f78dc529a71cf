// What attention feels of errors in the state it attends: how calibration weighs directions
// (docs/klt.md, "Calibration").
#pragma once

#include <cstdint>
#include <vector>

#include "base/random.h"
#include "kernels/dense_algebra.h"
#include "node/decoder.h"
#include "node/model.h"

namespace kvant::node {

// Sums over the queries of sequences. Single-owner; borrows the model.
// REQUIRES: kernels::LoadBlas() was ok.
class AttentionWeights {
 public:
  // seed: of the keys that are looked at, one for each query.
  AttentionWeights(const Model* model, uint64_t seed);

  // A new sequence begins.
  void Begin();
  // Takes one layer of its next kBlockTokens tokens, as a LayerSink gets them.
  void AddState(int layer, const float* keys, const float* values);
  // Takes that block's queries, as a QuerySink gets them. position: of its first token.
  void AddQueries(int layer, int position, const float* queries);
  // [width][width], rows as in klt.h: the square of what an error does to a layer's output, but for
  // a factor. Errors in the first kKltSinks tokens are not counted: those are coded finer.
  const kernels::Matrix& sum(int layer) const { return sums_[static_cast<size_t>(layer)]; }

 private:
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
  // [layer][q_head]: of an error in what a head sums.
  std::vector<std::vector<kernels::Matrix>> metrics_;
  std::vector<kernels::Matrix> sums_;  // [layer]
};

}  // namespace kvant::node
