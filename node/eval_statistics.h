// Means and quantiles with the interval that the choice of samples leaves open (bootstrap: Efron,
// 1979).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace kvant::node {

inline constexpr int kResamples = 1000;

// A number and its 95 % percentile interval. Of one sample the interval is the number itself, which
// says nothing: `known` is false then.
struct Estimate {
  double value = 0;
  double low = 0;
  double high = 0;
  bool known = false;
};

// A statistic of the samples that `picked` names, each as often as it stands there.
using Statistic = std::function<double(std::span<const size_t> picked)>;

// The statistic of all `samples`, and its interval over kResamples draws of as many with
// replacement. One seed draws the same for every statistic of as many samples, so that estimates
// can be compared. REQUIRES: samples >= 1.
Estimate Bootstrap(size_t samples, const Statistic& statistic, uint64_t seed);

// The mean of the samples.
Estimate BootstrapMean(std::span<const double> samples, uint64_t seed);

// The value below or at which `share` of the values lie. REQUIRES: not empty; 0 < share <= 1.
double Quantile(std::vector<float> values, double share);

// The quantile of the values of all groups together; whole groups are drawn, because the values
// inside one are alike.
Estimate BootstrapQuantile(std::span<const std::vector<float>> groups, double share, uint64_t seed);

}  // namespace kvant::node
