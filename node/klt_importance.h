// How much more an error in one token's state costs than in most tokens': where a model has learnt
// to put attention that it needs nowhere, behind any token and not the first alone, a few tokens
// take nearly all of it (docs/klt.md, "Tokens that matter more").
#pragma once

#include <span>
#include <vector>

#include "base/status.h"
#include "node/config.h"
#include "node/klt_levels.h"

namespace kvant::node {

// log2 of the mean squares of each layer's keys, then values. rows: of the layers of a group, side
// by side. Returns [2 * layers].
std::vector<float> ImportanceFeatures(const ModelConfig& config, std::span<const float> rows);

// KltToken::finer of a token: an error that costs twice as much has a step finer by half an octave.
// predictor: [1 + features], of log2 of how many times as much it costs as in most tokens; the
// first is a constant.
int8_t FinerOf(std::span<const float> predictor, std::span<const float> features);

// Tokens whose importance was measured.
struct ImportanceSamples {
  size_t features = 0;
  std::vector<float> x;  // [tokens][features]
  std::vector<float> y;  // [tokens], how much errors in it cost, in any unit; > 0
};
// The predictor p that needs the fewest bits for what errors cost in all: it has the least
// mean(y / 2^p) where the mean of p is given, and p is 0 in the middle of the tokens.
// kInvalidArgument: too few samples, or not finite.
Result<std::vector<float>> FitImportance(const ImportanceSamples& samples);

}  // namespace kvant::node
