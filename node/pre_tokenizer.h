// Cuts a text into the pieces that byte pair encoding works on, as the "pre_tokenizer" of
// tokenizer.json says.
#pragma once

#include <deque>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace kvant::node {

// Immutable, Thread-safe.
class PreTokenizer {
 public:
  // `description` is the value of "pre_tokenizer"; `name` the file named in errors. kUnsupported
  // names the part that is not implemented.
  static Result<std::unique_ptr<PreTokenizer>> Parse(const nlohmann::json& description,
                                                     const std::string& name);
  ~PreTokenizer();

  // The pieces of a text, which lie in `text` or in strings that are added to `owned`.
  // REQUIRES: text is UTF-8. kInvalidArgument: the pattern gave up on it.
  Result<std::vector<std::string_view>> Cut(std::string_view text,
                                            std::deque<std::string>* owned) const;

 private:
  class Pattern;
  struct Step;
  PreTokenizer();
  Status Add(const nlohmann::json& description, const std::string& name);
  Status AddSplit(const nlohmann::json& description, const std::string& name);
  Status AddPattern(std::string_view pattern, bool literal, bool drop_matches, bool invert,
                    const std::string& name);

  std::vector<Step> steps_;
  bool byte_level_ = false;  // a ByteLevel step was met; nothing may follow it
};

}  // namespace kvant::node
