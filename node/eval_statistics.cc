#include "node/eval_statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/check.h"
#include "base/random.h"

namespace kvant::node {

Estimate Bootstrap(size_t samples, const Statistic& statistic, uint64_t seed) {
  KV_CHECK(samples >= 1);
  std::vector<size_t> picked(samples);
  std::iota(picked.begin(), picked.end(), size_t{0});
  Estimate estimate;
  estimate.value = statistic(picked);
  estimate.low = estimate.high = estimate.value;
  if (samples == 1) return estimate;
  estimate.known = true;
  Random random(seed);
  std::vector<double> drawn;
  for (int i = 0; i < kResamples; ++i) {
    for (size_t& pick : picked) pick = static_cast<size_t>(random.Below(samples));
    drawn.push_back(statistic(picked));
  }
  std::sort(drawn.begin(), drawn.end());
  estimate.low = drawn[kResamples / 40];
  estimate.high = drawn[kResamples - 1 - kResamples / 40];
  return estimate;
}

Estimate BootstrapMean(std::span<const double> samples, uint64_t seed) {
  return Bootstrap(
      samples.size(),
      [&](std::span<const size_t> picked) {
        double sum = 0;
        for (const size_t pick : picked) sum += samples[pick];
        return sum / static_cast<double>(picked.size());
      },
      seed);
}

double Quantile(std::vector<float> values, double share) {
  KV_CHECK(!values.empty() && share > 0 && share <= 1);
  const double rank = std::ceil(share * static_cast<double>(values.size())) - 1;
  const auto nth = values.begin() + static_cast<std::ptrdiff_t>(std::max(rank, 0.0));
  std::nth_element(values.begin(), nth, values.end());
  return *nth;
}

Estimate BootstrapQuantile(std::span<const std::vector<float>> groups, double share,
                           uint64_t seed) {
  return Bootstrap(
      groups.size(),
      [&](std::span<const size_t> picked) {
        std::vector<float> values;
        for (const size_t pick : picked) {
          values.insert(values.end(), groups[pick].begin(), groups[pick].end());
        }
        return Quantile(std::move(values), share);
      },
      seed);
}

}  // namespace kvant::node
