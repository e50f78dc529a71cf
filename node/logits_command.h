// `kvant logits`: what a model says after every token of a text, for whoever asks why an answer is
// odd.
#pragma once

#include <string>

#include "base/status.h"

namespace kvant::node {

struct LogitsOptions {
  std::string model;
  std::string weights = "exact";  // WeightFormName
  std::string tokens;             // "1,2,3"; spaces and line ends separate as well
  std::string tokens_file;        // the same in a file; used when `tokens` is empty
  std::string dtype = "fp32";     // of the keys and values that later tokens attend: fp32, bf16
  std::string codec;              // not empty: the codec that they are kept in, in place of dtype
  std::string out;                // NPY file: fp32 [tokens][vocab]
  int threads = 0;                // 0: one for each core this process may use
};

// Computes blocks of 64 tokens, each over the encoded blocks before it, as prefill does. Returns
// the exit status. kInvalidArgument: what is no token, more tokens than the model's context, or a
// file that cannot be written; others as NodeRuntime::Create says.
Result<int> WriteLogits(const LogitsOptions& options);

}  // namespace kvant::node
