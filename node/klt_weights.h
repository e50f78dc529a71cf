// Weights of the klt codec made elsewhere, in one safetensors file (docs/klt.md, "Weights from
// gradients"): `scripts/calibrate-fisher` writes them, `kvant calibrate --weights` takes them.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "base/status.h"
#include "kernels/dense_algebra.h"

namespace kvant::node {

// Value.
struct KltWeights {
  // [layer][width][width], symmetric: an error x in the rows of all tokens, as in klt.h, costs
  // x^T layers[l] x nats a token.
  std::vector<kernels::Matrix> layers;
  std::string made_on;  // in words
};

// kInvalidArgument names the file, and what is missing, malformed, or of another model's shape.
Result<KltWeights> LoadKltWeights(const std::filesystem::path& file, int layers, int width);

}  // namespace kvant::node
