// `kvant calibrate`: makes a codec pack for a model out of forward passes over text.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "node/klt_groups.h"

namespace kvant::node {

struct CalibrateOptions {
  std::string model;
  std::vector<std::string> texts;  // files; each gives the same share of the tokens
  std::string out;                 // file of the pack
  std::string weights;             // file of scripts/calibrate-fisher; empty: from attention
  // Layers that a reader may recompute, ascending; besides nothing. -1: a third of the model's.
  std::vector<int> recompute = {-1};
  int group_width = kKltGroupWidth;
  int tokens = 100000;  // of all texts, at most
  int length = 1024;    // tokens of a sequence, rounded down to whole blocks
  int threads = 0;      // 0: one a core
  uint64_t seed = 1;
};

// Makes the pack, with its progress on stderr. Returns the exit status. kInvalidArgument: texts
// that cannot be read or are too short, or a file that cannot be written. Other errors are
// Model::Load's.
Result<int> Calibrate(const CalibrateOptions& options);

}  // namespace kvant::node
