#include "node/planner.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <string>

namespace kvant::node {
namespace {

// The first observation replaces the guess; later ones weigh an eighth, so that a rate follows a
// change within some ten observations and one outlier does not turn a decision.
constexpr double kWeight = 0.125;

// A forecast is corrected by no more than this factor: what is further off is an accident.
constexpr double kMostCorrection = 4;

void Average(double observed, uint64_t* observations, double* average) {
  *average += (observed - *average) * (*observations == 0 ? 1.0 : kWeight);
  ++*observations;
}

Duration FromSeconds(double seconds) {
  return std::chrono::duration_cast<Duration>(
      std::chrono::duration<double>(std::min(seconds, 1e6)));
}

}  // namespace

Status Planner::CheckBudget(std::span<const ReadChoice> choices) const {
  if (!options_.max_kl.has_value() || MayRead(choices.front())) return OkStatus();
  if (!choices.front().error.has_value()) {
    return InvalidArgument(
        "--max-kl {} needs to know what reading costs, and nothing declares it for this codec. "
        "Store with a codec pack, which does (--store klt --pack FILE --cuts coarse,fine,finest), "
        "or use --codec raw, which costs nothing",
        *options_.max_kl);
  }
  std::string errors;
  for (const ReadChoice& choice : choices) {
    errors += fmt::format("{}{} {:.2g}", errors.empty() ? "" : ", ", choice.name,
                          choice.error.value_or(0));
  }
  return InvalidArgument(
      "--max-kl {} can't be kept: blocks are computed over all of their cuts, which cost {:.2g} "
      "nats a token. Store finer cuts (--cuts), or allow more. The cuts and what they cost: {}",
      *options_.max_kl, *choices.front().error, errors);
}

size_t Planner::Coarsest(std::span<const ReadChoice> choices) const {
  size_t index = choices.size();
  while (index-- > 0) {
    if (choices[index].cuts.way == 0 && MayRead(choices[index])) break;
  }
  KV_CHECK(index < choices.size());
  return index;
}

size_t Planner::Choose(std::span<const ReadChoice> choices, std::span<const FetchWork> work) const {
  const size_t coarsest = Coarsest(choices);
  size_t best = coarsest;
  for (size_t i = choices.size(); i-- > 0;) {
    if (!MayRead(choices[i])) continue;
    if (!options_.max_kl.has_value() && i >= coarsest) continue;
    const bool better = options_.max_kl.has_value() ? FetchTime(work[i]) <= FetchTime(work[best])
                                                    : FetchTime(work[i]) <= options_.fetch_budget;
    if (better) best = i;
  }
  return best;
}

double Planner::DecodeRate(size_t depth) const {
  for (const size_t first : {depth / kMaxCuts * kMaxCuts, size_t{0}}) {
    const size_t of_way = depth % kMaxCuts;
    for (size_t off = 0; off < kMaxCuts; ++off) {
      // Of two as near, the deeper one: it is not faster.
      for (const size_t near : {of_way + off, of_way - off}) {
        if (near < kMaxCuts && decodes_[first + near] != 0)
          return rates_.decode_tokens_per_s[first + near];
      }
    }
  }
  return rates_.decode_tokens_per_s[depth];
}

Duration Planner::FetchTime(const FetchWork& work) const {
  double decode = work.recompute_work / rates_.prefill_tokens_per_s;
  for (size_t depth = 0; depth < kMaxChoices; ++depth) {
    if (work.decode_tokens[depth] > 0) decode += work.decode_tokens[depth] / DecodeRate(depth);
  }
  if (work.bytes == 0) return FromSeconds(decode);
  const double transfer = static_cast<double>(work.bytes) / rates_.link_bytes_per_s;
  const auto pieces = static_cast<double>(std::max<size_t>(work.pieces, 1));
  return FromSeconds(rates_.round_trip_s + std::max(transfer, decode) +
                     std::min(transfer, decode) / pieces);
}

double Planner::EncodeRate() const {
  const bool decoded = std::any_of(decodes_.begin(), decodes_.end(), [](auto n) { return n != 0; });
  if (encodes_ != 0 || !decoded) return rates_.encode_tokens_per_s;
  return std::min(rates_.encode_tokens_per_s, DecodeRate(kMaxCuts - 1) / 2);  // of the first way
}

Plan Planner::Decide(const PlanQuestion& question) {
  const auto corrected = [&](bool fetch, Duration forecast) {
    return FromSeconds(Seconds(forecast) * corrections_[fetch ? 1 : 0]);
  };
  Plan plan;
  plan.choice = question.choice;
  plan.fetch_forecast = corrected(true, FetchTime(question.fetch));
  plan.compute_forecast = corrected(
      false, FetchTime(question.also_fetch) +
                 FromSeconds(question.compute_work / rates_.prefill_tokens_per_s +
                             static_cast<double>(question.compute_tokens) / EncodeRate()));
  plan.fetch = plan.fetch_forecast <= plan.compute_forecast;
  if (plan.fetch) {
    ++stats_.fetch_plans;
    ++stats_.fetch_plans_at[plan.choice];
  } else {
    ++stats_.compute_plans;
  }
  plan.correction = corrections_[plan.fetch ? 1 : 0];
  return plan;
}

void Planner::SawRoundTrip(Duration took) {
  Average(Seconds(took), &round_trips_, &rates_.round_trip_s);
}

double Planner::LinkRate(uint64_t payload_bytes, Duration took) const {
  // What is left above the round trip is the link; at least a tenth of the time, lest a round trip
  // that was overestimated makes the link look infinitely fast.
  const double seconds = std::max(Seconds(took) - rates_.round_trip_s, Seconds(took) * 0.1);
  return seconds <= 0 ? 0 : static_cast<double>(payload_bytes) / seconds;
}

void Planner::SawFetch(uint64_t payload_bytes, Duration took) {
  const double rate = LinkRate(payload_bytes, took);
  if (rate > 0) Average(rate, &links_, &rates_.link_bytes_per_s);
}

void Planner::SawFetchWithin(uint64_t payload_bytes, Duration took) {
  if (LinkRate(payload_bytes, took) > rates_.link_bytes_per_s) SawFetch(payload_bytes, took);
}

void Planner::SawDecode(size_t depth, double tokens, Duration took) {
  if (took <= Duration{}) return;
  Average(tokens / Seconds(took), &decodes_[depth], &rates_.decode_tokens_per_s[depth]);
}

void Planner::SawPrefill(double work, Duration took) {
  if (took <= Duration{}) return;
  Average(work / Seconds(took), &prefills_, &rates_.prefill_tokens_per_s);
}

void Planner::SawEncode(size_t tokens, Duration took) {
  if (took <= Duration{}) return;
  Average(static_cast<double>(tokens) / Seconds(took), &encodes_, &rates_.encode_tokens_per_s);
}

void Planner::SawOutcome(const Plan& plan, Duration took) {
  if (took <= Duration{}) return;
  ++stats_.outcomes;
  stats_.forecast_error_sum += std::abs(Seconds(plan.forecast() - took)) / Seconds(took);
  const double forecast = Seconds(plan.forecast()) / plan.correction;
  if (forecast <= 0) return;
  double& correction = corrections_[plan.fetch ? 1 : 0];
  const double found = std::clamp(Seconds(took) / forecast, 1 / kMostCorrection, kMostCorrection);
  correction += (found - correction) * kWeight;
}

}  // namespace kvant::node
