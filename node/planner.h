// Fetch or compute, and of what is fetched how much: what gives a prefix soonest, by what was
// measured so far.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "base/clock.h"
#include "node/block_class.h"

namespace kvant::node {

// Exponentially weighted averages of what this node saw. Before the first observation the guesses
// stand that are written here.
struct MeasuredRates {
  double link_bytes_per_s = 1e9;      // of fetches, payload bytes over the time they took
  double round_trip_s = 200e-6;       // of lookups
  double prefill_tokens_per_s = 500;  // of blocks and tails computed here, BlockClass::PrefillWork
  // Of blocks computed here, into what is stored. Before one was seen, encoding is taken to be no
  // faster than half of decoding.
  double encode_tokens_per_s = 1e4;
  // [BlockClass::DecodeDepth] of blocks that were fetched. A depth that was never seen is taken to
  // be as fast as the nearest one of its way that was, or as the first way's.
  std::array<double, kMaxChoices> decode_tokens_per_s = GuessedDecodeRates();

  static constexpr std::array<double, kMaxChoices> GuessedDecodeRates() {
    std::array<double, kMaxChoices> rates{};
    for (double& rate : rates) rate = 1e4;
    return rates;
  }
};

// What a fetch moves, and what is decoded of it.
struct FetchWork {
  uint64_t bytes = 0;  // as they are stored: what the reader wants and does not have
  // [BlockClass::DecodeDepth]; a token of which only some layers are decoded is that part of one.
  std::array<double, kMaxChoices> decode_tokens{};
  // Of first layers that the reader computes itself, BlockClass::PrefillWork.
  double recompute_work = 0;
  size_t pieces = 0;  // each of them is decoded while others travel
};

struct PlanQuestion {
  FetchWork fetch;
  size_t choice = 0;          // of BlockClass::choices, at which `fetch` reads
  size_t compute_tokens = 0;  // to be computed instead
  double compute_work = 0;    // what that amounts to, BlockClass::PrefillWork
  // What computing would need on top: the rest of earlier blocks, at the full cut.
  FetchWork also_fetch;
};

struct Plan {
  bool fetch = true;
  size_t choice = 0;
  Duration fetch_forecast{};
  Duration compute_forecast{};
  double correction = 1;  // what was made of the forecast by earlier outcomes
  Duration forecast() const { return fetch ? fetch_forecast : compute_forecast; }
};

struct PlannerStats {
  uint64_t fetch_plans = 0;
  uint64_t compute_plans = 0;
  std::array<uint64_t, kMaxChoices> fetch_plans_at{};  // [choice]
  uint64_t outcomes = 0;
  double forecast_error_sum = 0;  // of |forecast - outcome| / outcome
  double mean_forecast_error() const {
    return outcomes == 0 ? 0 : forecast_error_sum / static_cast<double>(outcomes);
  }
};

struct PlannerOptions {
  // Without max_kl: the finest choice is read whose fetch is forecast to end within this time.
  Duration fetch_budget = std::chrono::milliseconds(50);
  // The error budget: of the choices whose declared error is at most this, the one is read whose
  // fetch is forecast to end first.
  std::optional<double> max_kl;
};

// Single-owner.
class Planner {
 public:
  explicit Planner(const PlannerOptions& options) : options_(options) {}

  // Whether the budget allows it at all.
  bool MayRead(const ReadChoice& choice) const {
    return !options_.max_kl.has_value() ||
           (choice.error.has_value() && *choice.error <= *options_.max_kl);
  }
  // kInvalidArgument: the budget allows none of them, or not the first, which is what is computed
  // with. Says what each costs and what to do.
  Status CheckBudget(std::span<const ReadChoice> choices) const;
  // The coarsest of a form's own choices that may be read. REQUIRES: CheckBudget; so do those
  // below.
  size_t Coarsest(std::span<const ReadChoice> choices) const;
  // What `auto` reads: an index into choices; with an error budget of all ways', else of the first
  // way's. work: [choice] what fetching at it would take. Of equal ones the earlier, which of a way
  // is the finer.
  size_t Choose(std::span<const ReadChoice> choices, std::span<const FetchWork> work) const;
  Plan Decide(const PlanQuestion& question);

  void SawRoundTrip(Duration took);
  void SawFetch(uint64_t payload_bytes, Duration took);
  // As SawFetch where the bytes may have been there before: the link is at least so fast.
  void SawFetchWithin(uint64_t payload_bytes, Duration took);
  // tokens as in FetchWork.
  void SawDecode(size_t depth, double tokens, Duration took);
  // work: BlockClass::PrefillWork.
  void SawPrefill(double work, Duration took);
  void SawEncode(size_t tokens, Duration took);
  // How long carrying out a plan took. What such plans took longer than forecast, or less long, is
  // made good in later forecasts.
  void SawOutcome(const Plan& plan, Duration took);

  const MeasuredRates& rates() const { return rates_; }
  const PlannerStats& stats() const { return stats_; }

 private:
  // What is decoded or computed while the rest travels costs nothing more than the longer of both,
  // but for the first piece, or the last.
  Duration FetchTime(const FetchWork& work) const;
  double DecodeRate(size_t depth) const;
  double LinkRate(uint64_t payload_bytes, Duration took) const;
  double EncodeRate() const;

  PlannerOptions options_;
  MeasuredRates rates_;
  PlannerStats stats_;
  std::array<double, 2> corrections_ = {1, 1};  // of plans that compute, that fetch
  // Observations so far.
  uint64_t links_ = 0;
  uint64_t round_trips_ = 0;
  uint64_t prefills_ = 0;
  uint64_t encodes_ = 0;
  std::array<uint64_t, kMaxChoices> decodes_{};
};

}  // namespace kvant::node
