#include "node/planner.h"

#include <algorithm>
#include <cmath>

namespace kvant::node {
namespace {

// The first observation replaces the guess; later ones weigh an eighth, so that a rate follows a
// change within some ten observations and one outlier does not turn a decision.
constexpr double kWeight = 0.125;

void Average(double observed, uint64_t* observations, double* average) {
  *average += (observed - *average) * (*observations == 0 ? 1.0 : kWeight);
  ++*observations;
}

Duration FromSeconds(double seconds) {
  return std::chrono::duration_cast<Duration>(
      std::chrono::duration<double>(std::min(seconds, 1e6)));
}

}  // namespace

Duration Planner::FetchTime(uint64_t payload_bytes) const {
  if (payload_bytes == 0) return Duration{};
  return FromSeconds(rates_.round_trip_s +
                     static_cast<double>(payload_bytes) / rates_.link_bytes_per_s);
}

Plan Planner::Decide(const PlanQuestion& question) {
  Plan plan;
  plan.fetch_forecast = FetchTime(question.fetch_bytes);
  plan.compute_forecast =
      FetchTime(question.also_fetch_bytes) +
      FromSeconds(static_cast<double>(question.compute_tokens) / rates_.prefill_tokens_per_s);
  plan.fetch = plan.fetch_forecast <= plan.compute_forecast;
  ++(plan.fetch ? stats_.fetch_plans : stats_.compute_plans);
  return plan;
}

Cuts Planner::ChooseCuts(const BlockClass& block_class, Wire wire,
                         const FetchBytes& fetch_bytes) const {
  if (wire != Wire::kAuto) return block_class.CutsOf(wire);
  for (const Wire candidate : {Wire::kFull, Wire::kK8V4}) {
    const Cuts cuts = block_class.CutsOf(candidate);
    if (FetchTime(fetch_bytes(cuts)) <= fetch_budget_) return cuts;
  }
  return block_class.CutsOf(Wire::kK4V4);
}

void Planner::SawRoundTrip(Duration took) {
  Average(Seconds(took), &observations_[1], &rates_.round_trip_s);
}

void Planner::SawFetch(uint64_t payload_bytes, Duration took) {
  // What is left above the round trip is the link; at least a tenth of the time, lest a round trip
  // that was overestimated makes the link look infinitely fast.
  const double seconds = std::max(Seconds(took) - rates_.round_trip_s, Seconds(took) * 0.1);
  if (seconds <= 0) return;
  Average(static_cast<double>(payload_bytes) / seconds, &observations_[0],
          &rates_.link_bytes_per_s);
}

void Planner::SawPrefill(size_t tokens, Duration took) {
  if (took <= Duration{}) return;
  Average(static_cast<double>(tokens) / Seconds(took), &observations_[2],
          &rates_.prefill_tokens_per_s);
}

void Planner::SawOutcome(const Plan& plan, Duration took) {
  if (took <= Duration{}) return;
  ++stats_.outcomes;
  stats_.forecast_error_sum += std::abs(Seconds(plan.forecast() - took)) / Seconds(took);
}

}  // namespace kvant::node
