// Codec packs and blocks for tests.
#pragma once

#include <cstdint>
#include <vector>

#include "base/random.h"
#include "node/klt.h"
#include "node/klt_pack.h"
#include "node/model.h"

namespace kvant::support {

struct RandomKltPackOptions {
  // Else an error costs the same in every direction, and the analysis is the synthesis transposed,
  // exactly: what is encoded doesn't depend on the order of anyone's sums.
  bool weighted = true;
  int group_width = node::kKltGroupWidth;
};

// A pack of random numbers: predictions that are worth nothing, transforms that are undone but for
// the rounding to bf16, deviations over all tables and beyond. Groups behind the first leave
// coefficients out. Cuts finest (a step of 0.125), fine (0.5), medium (1) and coarse (2), of which
// all but medium refine each other; sinks have 0.0625.
// REQUIRES: kernels::LoadBlas() was ok.
node::KltPack RandomKltPack(const node::Model& model, Random* random,
                            const RandomKltPackOptions& options = {});

struct KltBlock {
  std::vector<int32_t> tokens;  // node::kBlockTokens
  node::KltCoder::Rows rows;    // [layer], around 0
};
KltBlock RandomKltBlock(const node::Model& model, double deviation, Random* random);

}  // namespace kvant::support
