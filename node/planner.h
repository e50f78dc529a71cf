// Fetch or compute: which of the two gives a prefix sooner, by what was measured so far.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "base/clock.h"
#include "node/block_class.h"

namespace kvant::node {

// Exponentially weighted averages of what this node saw. Before the first observation the guesses
// stand that the constructor's comments give.
struct MeasuredRates {
  double link_bytes_per_s = 1e9;      // of fetches, payload bytes over the time they took
  double round_trip_s = 200e-6;       // of lookups
  double prefill_tokens_per_s = 500;  // of blocks computed here
};

struct PlanQuestion {
  uint64_t fetch_bytes = 0;   // payload to be fetched: what the reader wants and does not have
  size_t compute_tokens = 0;  // tokens to be computed instead
  uint64_t also_fetch_bytes =
      0;  // what computing would need on top: the rest of earlier blocks, at the full cut
};

struct Plan {
  bool fetch = true;
  Duration fetch_forecast{};
  Duration compute_forecast{};
  Duration forecast() const { return fetch ? fetch_forecast : compute_forecast; }
};

struct PlannerStats {
  uint64_t fetch_plans = 0;
  uint64_t compute_plans = 0;
  uint64_t outcomes = 0;
  double forecast_error_sum = 0;  // of |forecast - outcome| / outcome
  double mean_forecast_error() const {
    return outcomes == 0 ? 0 : forecast_error_sum / static_cast<double>(outcomes);
  }
};

// Single-owner.
class Planner {
 public:
  // --wire auto: the most extents whose fetch is forecast to end within this time.
  explicit Planner(Duration fetch_budget) : fetch_budget_(fetch_budget) {}

  Plan Decide(const PlanQuestion& question);
  // The cuts that `wire` means. fetch_bytes: what a fetch at these cuts would move.
  using FetchBytes = std::function<uint64_t(const Cuts& cuts)>;
  Cuts ChooseCuts(const BlockClass& block_class, Wire wire, const FetchBytes& fetch_bytes) const;

  void SawRoundTrip(Duration took);
  void SawFetch(uint64_t payload_bytes, Duration took);
  void SawPrefill(size_t tokens, Duration took);
  // How long carrying out a plan took.
  void SawOutcome(const Plan& plan, Duration took);

  const MeasuredRates& rates() const { return rates_; }
  const PlannerStats& stats() const { return stats_; }

 private:
  Duration FetchTime(uint64_t payload_bytes) const;

  Duration fetch_budget_;
  MeasuredRates rates_;
  PlannerStats stats_;
  uint64_t observations_[3] = {};  // link, round trip, prefill
};

}  // namespace kvant::node
