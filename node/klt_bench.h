// `kvant bench klt`: how fast a codec pack encodes and decodes, beside prefill of the same tokens.
#pragma once

#include <string>

#include "base/status.h"

namespace kvant::node {

struct KltBenchOptions {
  std::string model;
  std::string pack;   // file; empty: the one beside the model
  std::string text;   // file
  int tokens = 1024;  // of the text, a multiple of the block
  std::string json;   // file; empty: only the table
};

// One thread, everything in turns of one run. Returns the exit status. Errors are those of model,
// pack and text.
Result<int> BenchKlt(const KltBenchOptions& options);

}  // namespace kvant::node
