#include "node/klt_importance.h"

#include <algorithm>
#include <cmath>

#include "kernels/dense_algebra.h"
#include "node/klt_groups.h"

namespace kvant::node {
namespace {

using kernels::Matrix;

constexpr double kRidge = 1e-2;  // of features of variance 1
constexpr int kRounds = 40;      // of Newton's method
constexpr double kTiny = 1e-20;  // mean square of what is 0

}  // namespace

std::vector<float> ImportanceFeatures(const ModelConfig& config, std::span<const float> rows) {
  const kernels::LayerShape state = config.StateShape(1);
  const auto width = static_cast<size_t>(StateWidth(config));
  const auto keys = static_cast<size_t>(state.keys.kv_heads * state.keys.head_dim);
  std::vector<float> features;
  const auto add = [&](std::span<const float> part) {
    double squares = 0;
    for (const float x : part) squares += static_cast<double>(x) * static_cast<double>(x);
    features.push_back(
        static_cast<float>(std::log2(squares / static_cast<double>(part.size()) + kTiny)));
  };
  for (size_t at = 0; at < rows.size(); at += width) {
    add(rows.subspan(at, keys));
    add(rows.subspan(at + keys, width - keys));
  }
  return features;
}

int8_t FinerOf(std::span<const float> predictor, std::span<const float> features) {
  float sum = predictor[0];
  for (size_t i = 0; i < features.size(); ++i) sum += predictor[1 + i] * features[i];
  // What is no number, of a state that overflowed, is like the others.
  if (!(std::abs(sum) < 1e6F)) return 0;
  return static_cast<int8_t>(std::clamp(std::lround(sum), static_cast<long>(kKltLeastFiner),
                                        static_cast<long>(kKltMostFiner)));
}

// The cost y of a token whose step squared is 2^-p is y / 2^p, and its bits grow with p: the least
// cost for given bits is that of the least mean(y e^-q) + mean(q), q = p ln 2, which is convex.
Result<std::vector<float>> FitImportance(const ImportanceSamples& samples) {
  const size_t count = samples.y.size();
  const size_t features = samples.features;
  const auto size = static_cast<int>(features) + 1;
  if (count < 4 * static_cast<size_t>(size))
    return InvalidArgument("{} tokens are too few to tell which matter more", count);
  // Features as multiples of their own deviation, for the ridge.
  std::vector<double> mean(features);
  std::vector<double> deviation(features);
  for (size_t t = 0; t < count; ++t) {
    for (size_t f = 0; f < features; ++f)
      mean[f] += static_cast<double>(samples.x[t * features + f]) / static_cast<double>(count);
  }
  for (size_t t = 0; t < count; ++t) {
    for (size_t f = 0; f < features; ++f)
      deviation[f] += std::pow(static_cast<double>(samples.x[t * features + f]) - mean[f], 2) /
                      static_cast<double>(count);
  }
  for (double& d : deviation) d = std::sqrt(d) + 1e-6;
  const auto z = [&](size_t token, int i) {
    const auto f = static_cast<size_t>(i);
    return f == features
               ? 1.0
               : (static_cast<double>(samples.x[token * features + f]) - mean[f]) / deviation[f];
  };
  double total = 0;
  for (const float y : samples.y) total += static_cast<double>(y);
  if (!std::isfinite(total) || !(total > 0))
    return InvalidArgument("what errors in tokens cost is not finite, or 0 of all");
  std::vector<double> a(static_cast<size_t>(size));
  a.back() = std::log(total / static_cast<double>(count));
  const auto predict = [&](std::span<const double> by, size_t token) {
    double q = 0;
    for (int i = 0; i < size; ++i) q += by[static_cast<size_t>(i)] * z(token, i);
    return q;
  };
  const auto objective = [&](std::span<const double> by) {
    double sum = 0;
    for (size_t t = 0; t < count; ++t) {
      const double q = predict(by, t);
      sum += (static_cast<double>(samples.y[t]) * std::exp(-q) + q) / static_cast<double>(count);
    }
    for (size_t i = 0; i < features; ++i) sum += 0.5 * kRidge * by[i] * by[i];
    return sum;
  };
  double best = objective(a);
  for (int round = 0; round < kRounds; ++round) {
    Matrix hessian(size, size);
    Matrix slope(1, size);
    for (size_t t = 0; t < count; ++t) {
      const double w = static_cast<double>(samples.y[t]) * std::exp(-predict(a, t));
      for (int i = 0; i < size; ++i) {
        const double zi = z(t, i) / static_cast<double>(count);
        slope.At(0, i) += zi * (1 - w);
        for (int k = 0; k < size; ++k) hessian.At(i, k) += zi * z(t, k) * w;
      }
    }
    for (int i = 0; i < size; ++i) {
      hessian.At(i, i) += i + 1 < size ? kRidge : 1e-9;
      if (i + 1 < size) slope.At(0, i) += kRidge * a[static_cast<size_t>(i)];
    }
    KV_ASSIGN_OR_RETURN(const Matrix move, kernels::SolvePositive(std::move(hessian), slope));
    double by = 1;
    std::vector<double> tried = a;
    double found = best;
    for (; by > 1e-4; by /= 2) {
      for (int i = 0; i < size; ++i)
        tried[static_cast<size_t>(i)] = a[static_cast<size_t>(i)] - by * move.At(0, i);
      found = objective(tried);
      if (found < best) break;
    }
    if (!(found < best)) break;
    const double gained = best - found;
    a = tried;
    best = found;
    if (gained < 1e-7) break;
  }
  std::vector<double> all(count);
  for (size_t t = 0; t < count; ++t) all[t] = predict(a, t);
  std::nth_element(all.begin(), all.begin() + static_cast<ptrdiff_t>(count / 2), all.end());
  double constant = a.back() - all[count / 2];
  std::vector<float> predictor(1);
  for (size_t f = 0; f < features; ++f) {
    const double slope = a[f] / deviation[f];
    constant -= slope * mean[f];
    predictor.push_back(static_cast<float>(slope / std::log(2.0)));
  }
  predictor[0] = static_cast<float>(constant / std::log(2.0));
  return predictor;
}

}  // namespace kvant::node
