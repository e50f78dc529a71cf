// From logits to the next token, and from text to where a stop string ends it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace kvant::node {

struct SamplingOptions {
  double temperature = 0.0;  // 0: the most likely token
  double top_p = 1.0;        // (0, 1]: the smallest set of tokens that has this probability
  uint64_t seed = 0;
};

// kInvalidArgument names the field that is out of range.
Status CheckSampling(const SamplingOptions& options);

// The token for step `step` of a generation: a function of the logits, the options and the step
// alone. Equal logits are ordered by id; NaN never wins. REQUIRES: logits not empty, options
// checked.
int32_t Sample(std::span<const float> logits, const SamplingOptions& options, uint64_t step);

// Finds the first stop string in a text that comes in pieces. Single-owner. Text that may be the
// beginning of a stop string is held back, so what was given out never has to be taken back.
class StopMatcher {
 public:
  // Empty stop strings are ignored.
  explicit StopMatcher(std::vector<std::string> stops);
  // Text that is safe to give out. After a stop string was found: the text before it, then nothing.
  // The stop string that is complete first ends the text, the longest of those that end together,
  // so the result does not depend on how the text is cut into pieces.
  std::string Push(std::string_view text);
  bool stopped() const { return stopped_; }
  // What is still held back, when the text ended without a stop string.
  std::string Finish();

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace kvant::node
