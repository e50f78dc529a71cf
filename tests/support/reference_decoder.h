// The oracle of the forward pass: plain loops in double precision, full attention, no tiles, no
// blocks, no BLAS. Slow, and meant to be read beside transformers' modeling_llama.py.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "node/model.h"

namespace kvant::support {

// Logits of every token: [tokens][vocab].
std::vector<std::vector<double>> ReferenceLogits(const node::Model& model,
                                                 std::span<const int32_t> tokens);

}  // namespace kvant::support
