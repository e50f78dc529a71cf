// `kvant tokenize`: the ids of a text, for a person who looks into a model.
#pragma once

#include <string>

#include "base/status.h"

namespace kvant::node {

struct TokenizeOptions {
  std::string model;  // as LoadTokenizer takes it
  std::string text;
  std::string text_file;    // not empty: read instead of `text`
  bool add_special = true;  // put around the text what the tokenizer says
  bool json = false;        // a list of {"id", "piece", "special"} instead of ids
};

// Prints to stdout and returns the exit status. Errors are those of LoadTokenizer and
// Tokenizer::Encode, and kInvalidArgument for a file that cannot be read.
Result<int> Tokenize(const TokenizeOptions& options);

}  // namespace kvant::node
