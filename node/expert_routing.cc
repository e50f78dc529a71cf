#include "node/expert_routing.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/check.h"
#include "kernels/vector.h"

namespace kvant::node {
namespace {

// Indices of the `count` largest scores.
std::vector<int> Best(std::span<const float> scores, int count) {
  std::vector<int> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int a, int b) {
    const float left = scores[static_cast<size_t>(a)];
    const float right = scores[static_cast<size_t>(b)];
    return left != right ? left > right : a < b;
  });
  order.resize(static_cast<size_t>(count));
  return order;
}

// A group is as good as its best expert, or under kSigmoid as its best two together.
float GroupScore(MixtureOfExperts::Routing routing, std::span<const float> scores) {
  const int count = routing == MixtureOfExperts::Routing::kSigmoid ? 2 : 1;
  float sum = 0.0F;
  for (const int index : Best(scores, count)) sum += scores[static_cast<size_t>(index)];
  return sum;
}

}  // namespace

std::vector<ExpertChoice> RouteToken(const MixtureOfExperts& experts, std::span<float> logits,
                                     const float* bias) {
  using Routing = MixtureOfExperts::Routing;
  KV_CHECK(logits.size() == static_cast<size_t>(experts.experts));
  if (experts.routing == Routing::kSigmoid) {
    for (float& logit : logits) logit = 1.0F / (1.0F + std::exp(-logit));
  } else {
    kernels::Softmax(logits.data(), logits.size());
  }
  std::vector<float> choice(logits.begin(), logits.end());
  if (bias != nullptr) {
    for (size_t i = 0; i < choice.size(); ++i) choice[i] += bias[i];
  }
  if (experts.routing != Routing::kGreedy) {
    const auto size = static_cast<size_t>(experts.experts / experts.groups);
    std::vector<float> groups;
    for (size_t at = 0; at < choice.size(); at += size) {
      groups.push_back(GroupScore(experts.routing, std::span(choice).subspan(at, size)));
    }
    std::vector<bool> open(groups.size(), false);
    for (const int group : Best(groups, experts.groups_per_token)) {
      open[static_cast<size_t>(group)] = true;
    }
    for (size_t i = 0; i < choice.size(); ++i) {
      if (!open[i / size]) choice[i] = -std::numeric_limits<float>::infinity();
    }
  }
  std::vector<int> best = Best(choice, experts.experts_per_token);
  std::sort(best.begin(), best.end());
  std::vector<ExpertChoice> choices;
  float sum = 0.0F;
  for (const int expert : best) {
    choices.push_back({expert, logits[static_cast<size_t>(expert)]});
    sum += choices.back().weight;
  }
  // As transformers: so small an addend that only a sum of zero is saved by it.
  const float divisor = experts.normalize ? sum + 1e-20F : 1.0F;
  const auto scale = static_cast<float>(experts.scale);
  for (ExpertChoice& chosen : choices) chosen.weight = chosen.weight / divisor * scale;
  return choices;
}

}  // namespace kvant::node
