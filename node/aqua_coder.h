// AQUA-KV as a baseline of `kvant eval`: each layer is predicted from the one below as it was
// decoded, and the rest is quantized.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "node/state_coder.h"

namespace kvant::node {

// out = in * weights + bias. Numbers are fp16. Immutable value.
struct LinearPredictor {
  int in = 0;
  int out = 0;
  std::vector<float> weights;  // [in][out]; empty: nothing is predicted but the bias
  std::vector<float> bias;     // [out]
};

// Least squares with a ridge of 1e-4 of the mean square of an input. x: [rows][in], y: [rows][out].
// in may be 0, which leaves the mean. REQUIRES: rows > 0; kernels::LoadBlas() was ok.
Result<LinearPredictor> FitPredictor(std::span<const float> x, int in, std::span<const float> y,
                                     int out);
// y[rows][out] = what is predicted from x[rows][in].
std::vector<float> Predict(const LinearPredictor& predictor, std::span<const float> x, int rows);

// One token's residual becomes what a reader has of it: scaled by its root mean square in fp16,
// heads turned by Hadamard transforms, each number the nearest of 2^bits levels that are best for a
// Gaussian (HIGGS with a grid of one dimension; Malinovskii et al., 2024, arXiv 2411.17525; levels
// of Max, 1960). Returns the bits stored. x: whole heads. REQUIRES: bits is 2, 3 or 4.
uint64_t QuantizeResidual(int bits, int head_dim, std::span<float> x);

// Rows of a calibration that predictors are learnt from, whatever their bits. Value.
struct AquaSample {
  std::vector<float> keys;    // [rows][width of all layers], before rope
  std::vector<float> values;  // [rows][width of all layers]
};
// Errors are those of the calibration; kInvalidArgument: it gives too few rows.
Result<AquaSample> SampleForAqua(const Model& model, const Calibration& calibration);

// AQUA-KV (Shutova et al., 2025, arXiv 2501.19392): keys before rope are predicted from the decoded
// keys of the layer below, values from its decoded values and the layer's own decoded keys; linear
// predictors with a bias, learnt layer by layer on decoded inputs of the sample. The first layer's
// residual has 4 bits, as published, all others `bits`. The first 4 tokens and the newest 128 stay
// in bf16. kUnsupported: OpenBLAS has no solver.
Result<std::unique_ptr<StateCoder>> MakeAquaCoder(std::string name, const Model* model,
                                                  AquaSample sample, int bits);

}  // namespace kvant::node
