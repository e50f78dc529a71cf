// Which experts of a mixture a token goes to, and with what weights.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "node/config.h"

namespace kvant::node {

struct ExpertChoice {
  int expert = 0;
  float weight = 0.0F;
};

// Chooses for one token after the other, and allocates nothing doing so. Single-owner.
class ExpertRouter {
 public:
  explicit ExpertRouter(const MixtureOfExperts& experts);

  // The choices for one token, by ascending expert, valid until the next call. logits: [experts],
  // the router's product; changed. bias: [experts], added for the choice alone, or nullptr. Of
  // equal scores the lower index wins. DeepSeek-V2, section 2.2.1 and 2.2.2 (kGreedy,
  // kGroupLimited); DeepSeek-V3, section 2.1.2 (kSigmoid).
  std::span<const ExpertChoice> Route(std::span<float> logits, const float* bias);

 private:
  // Indices of the `count` largest scores, valid until the next call.
  std::span<int> Best(std::span<const float> scores, int count);
  // A group is as good as its best expert, or under kSigmoid as its best two together.
  float GroupScore(std::span<const float> scores);

  MixtureOfExperts experts_;
  std::vector<float> scores_;  // [experts]
  std::vector<float> groups_;  // [groups]
  std::vector<uint8_t> open_;  // [groups]
  std::vector<int> order_;     // [experts]
  std::vector<ExpertChoice> choices_;
};

}  // namespace kvant::node
