// Requests made from a seed, for tests: several tenants, shared beginnings that end inside a block,
// conversations, stop strings, sampled and greedy answers, lengths around the edges of a block and
// of the context.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "node/requests.h"

namespace kvant::support {

struct RandomRequestsOptions {
  uint64_t seed = 1;
  int count = 24;       // conversations count once, whatever their turns
  int context = 512;    // of the model, in tokens; one request in 24 exceeds it
  int max_tokens = 90;  // of an answer
};

// The same options give the same requests. Text is of the alphabet that RandomTokenizerJson merges.
std::vector<node::Request> RandomRequests(const RandomRequestsOptions& options);

// A requests file: what ParseRequests reads back as `requests`.
std::string FormatRequests(const std::vector<node::Request>& requests);

}  // namespace kvant::support
