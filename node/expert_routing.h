// Which experts of a mixture a token goes to, and with what weights.
#pragma once

#include <span>
#include <vector>

#include "node/config.h"

namespace kvant::node {

struct ExpertChoice {
  int expert = 0;
  float weight = 0.0F;
};

// The choices for one token, by ascending expert. logits: [experts], the router's product; changed.
// bias: [experts], added for the choice alone, or nullptr. Of equal scores the lower index wins.
// DeepSeek-V2, section 2.2.1 and 2.2.2 (kGreedy, kGroupLimited); DeepSeek-V3, section 2.1.2
// (kSigmoid).
std::vector<ExpertChoice> RouteToken(const MixtureOfExperts& experts, std::span<float> logits,
                                     const float* bias);

}  // namespace kvant::node
