#include "node/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/random.h"

namespace kvant::node {
namespace {

// A logit, NaN as minus infinity so that it never wins.
float Logit(float value) {
  return std::isnan(value) ? -std::numeric_limits<float>::infinity() : value;
}

int32_t Greedy(std::span<const float> logits) {
  size_t best = 0;
  for (size_t id = 1; id < logits.size(); ++id) {
    if (Logit(logits[id]) > Logit(logits[best])) best = id;
  }
  return static_cast<int32_t>(best);
}

struct Candidate {
  double weight;  // exp((logit - largest) / temperature)
  int32_t id;
  // Heap order: the heaviest first, of equal ones the smallest id.
  bool operator<(const Candidate& other) const {
    return weight != other.weight ? weight < other.weight : id > other.id;
  }
};

// Moves the smallest set with probability top_p to the front, heaviest first; returns its size.
size_t KeepTop(std::vector<Candidate>& candidates, double total, double top_p) {
  std::make_heap(candidates.begin(), candidates.end());
  auto heap_end = candidates.end();
  double kept = 0.0;
  do {
    std::pop_heap(candidates.begin(), heap_end);
    --heap_end;
    kept += heap_end->weight;
  } while (heap_end != candidates.begin() && kept < top_p * total);
  std::reverse(candidates.begin(), candidates.end());
  return static_cast<size_t>(candidates.end() - heap_end);
}

}  // namespace

Status CheckSampling(const SamplingOptions& options) {
  // Beyond 1e4 the distribution is uniform to the last bit of a float.
  if (!(options.temperature >= 0.0 && options.temperature <= 1e4)) {
    return InvalidArgument("temperature must be a number from 0 (greedy) on, found {}",
                           options.temperature);
  }
  if (!(options.top_p > 0.0 && options.top_p <= 1.0)) {
    return InvalidArgument("top_p must be larger than 0 and at most 1, found {}", options.top_p);
  }
  return OkStatus();
}

int32_t Sample(std::span<const float> logits, const SamplingOptions& options, uint64_t step) {
  KV_CHECK(!logits.empty());
  const int32_t greedy = Greedy(logits);
  const double largest = Logit(logits[static_cast<size_t>(greedy)]);
  if (options.temperature == 0.0 || !std::isfinite(largest)) return greedy;

  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  double total = 0.0;
  for (size_t id = 0; id < logits.size(); ++id) {
    const double weight = std::exp((Logit(logits[id]) - largest) / options.temperature);
    candidates.push_back({weight, static_cast<int32_t>(id)});
    total += weight;
  }
  if (options.top_p < 1.0) {
    candidates.resize(KeepTop(candidates, total, options.top_p));
    total = 0.0;
    for (const Candidate& candidate : candidates) total += candidate.weight;
  }
  // Each step draws from a generator of its own, so a step can be repeated alone.
  double left = Random(options.seed).Fork(step).Unit() * total;
  for (const Candidate& candidate : candidates) {
    left -= candidate.weight;
    if (left < 0.0) return candidate.id;
  }
  return greedy;  // rounding used up the sum
}

StopMatcher::StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {
  std::erase_if(stops_, [](const std::string& stop) { return stop.empty(); });
}

std::string StopMatcher::Push(std::string_view text) {
  if (stopped_) return {};
  held_ += text;
  std::pair<size_t, size_t> first(std::string::npos, 0);  // end and begin of a stop string
  for (const std::string& stop : stops_) {
    const size_t begin = held_.find(stop);
    if (begin != std::string::npos) first = std::min(first, {begin + stop.size(), begin});
  }
  if (first.first != std::string::npos) {
    stopped_ = true;
    std::string before = held_.substr(0, first.second);
    held_.clear();
    return before;
  }
  // The longest suffix that a stop string begins with stays.
  size_t keep = 0;
  for (const std::string& stop : stops_) {
    for (size_t length = std::min(stop.size() - 1, held_.size()); length > keep; --length) {
      if (held_.ends_with(std::string_view(stop).substr(0, length))) keep = length;
    }
  }
  std::string safe = held_.substr(0, held_.size() - keep);
  held_.erase(0, safe.size());
  return safe;
}

std::string StopMatcher::Finish() { return std::exchange(held_, {}); }

}  // namespace kvant::node
