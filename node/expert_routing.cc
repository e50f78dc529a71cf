#include "node/expert_routing.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/check.h"
#include "kernels/vector.h"

namespace kvant::node {

using Routing = MixtureOfExperts::Routing;

ExpertRouter::ExpertRouter(const MixtureOfExperts& experts)
    : experts_(experts),
      scores_(static_cast<size_t>(experts.experts)),
      groups_(static_cast<size_t>(experts.groups)),
      open_(groups_.size()),
      order_(std::max(scores_.size(), groups_.size())) {
  choices_.reserve(static_cast<size_t>(experts.experts_per_token));
}

std::span<int> ExpertRouter::Best(std::span<const float> scores, int count) {
  const auto order = std::span(order_).first(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int a, int b) {
    const float left = scores[static_cast<size_t>(a)];
    const float right = scores[static_cast<size_t>(b)];
    return left != right ? left > right : a < b;
  });
  return order.first(static_cast<size_t>(count));
}

float ExpertRouter::GroupScore(std::span<const float> scores) {
  const int count = experts_.routing == Routing::kSigmoid ? 2 : 1;
  float sum = 0.0F;
  for (const int index : Best(scores, count)) sum += scores[static_cast<size_t>(index)];
  return sum;
}

std::span<const ExpertChoice> ExpertRouter::Route(std::span<float> logits, const float* bias) {
  KV_CHECK(logits.size() == scores_.size());
  if (experts_.routing == Routing::kSigmoid) {
    for (float& logit : logits) logit = 1.0F / (1.0F + std::exp(-logit));
  } else {
    kernels::Softmax(logits.data(), logits.size());
  }
  std::copy(logits.begin(), logits.end(), scores_.begin());
  if (bias != nullptr) {
    for (size_t i = 0; i < scores_.size(); ++i) scores_[i] += bias[i];
  }
  if (experts_.routing != Routing::kGreedy) {
    const size_t size = scores_.size() / groups_.size();
    for (size_t group = 0; group < groups_.size(); ++group) {
      groups_[group] = GroupScore(std::span(scores_).subspan(group * size, size));
    }
    std::fill(open_.begin(), open_.end(), uint8_t{0});
    for (const int group : Best(groups_, experts_.groups_per_token)) {
      open_[static_cast<size_t>(group)] = 1;
    }
    for (size_t i = 0; i < scores_.size(); ++i) {
      if (open_[i / size] == 0) scores_[i] = -std::numeric_limits<float>::infinity();
    }
  }
  const std::span<int> best = Best(scores_, experts_.experts_per_token);
  std::sort(best.begin(), best.end());
  choices_.clear();
  float sum = 0.0F;
  for (const int expert : best) {
    choices_.push_back({expert, logits[static_cast<size_t>(expert)]});
    sum += choices_.back().weight;
  }
  // As transformers: so small an addend that only a sum of zero is saved by it.
  const float divisor = experts_.normalize ? sum + 1e-20F : 1.0F;
  const auto scale = static_cast<float>(experts_.scale);
  for (ExpertChoice& chosen : choices_) chosen.weight = chosen.weight / divisor * scale;
  return choices_;
}

}  // namespace kvant::node
