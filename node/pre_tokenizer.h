// Cuts a text into the pieces that byte pair encoding works on, as the "pre_tokenizer" of
// tokenizer.json says.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "node/pattern.h"

namespace kvant::node {

// What becomes of the matches of a pattern.
enum class SplitBehavior : uint8_t {
  kIsolated,            // pieces of their own
  kRemoved,             // nothing
  kContiguous,          // a piece for adjacent ones
  kMergedWithPrevious,  // the end of the piece before them
  kMergedWithNext,      // the beginning of the piece behind them
};

// Filled once, then Immutable and Thread-safe. Without steps a text is one piece.
class PreTokenizer {
 public:
  PreTokenizer();
  ~PreTokenizer();
  // `description` is the value of "pre_tokenizer"; `name` the file named in errors. kUnsupported
  // names the part that is not implemented.
  static Result<std::unique_ptr<PreTokenizer>> Parse(const nlohmann::json& description,
                                                     const std::string& name);
  Status AddSplit(std::string_view pattern, Pattern::Syntax syntax, SplitBehavior behavior,
                  const std::string& name);
  // Spaces become U+2581, and one stands before the beginning of a whole text.
  void AddMetaspace(bool prepend_first);
  // The pieces' bytes are what the vocabulary is about; with use_regex cut as GPT-2 does.
  Status AddByteLevel(bool prefix_space, bool use_regex, const std::string& name);

  // The pieces of a text, which lie in `text` or in strings that are added to `owned`.
  // `at_start`: `text` is the beginning of what is encoded.
  // REQUIRES: text is UTF-8. kInvalidArgument: a pattern gave up on it.
  Result<std::vector<std::string_view>> Cut(std::string_view text, bool at_start,
                                            std::deque<std::string>* owned) const;
  // Whether a ByteLevel step was met; nothing may follow it.
  bool byte_level() const { return byte_level_; }

 private:
  struct Step;
  Status Add(const nlohmann::json& description, int depth, const std::string& name);
  Status ParseSplit(const nlohmann::json& description, const std::string& name);
  Status ParseMetaspace(const nlohmann::json& description, const std::string& name);

  std::vector<Step> steps_;
  bool byte_level_ = false;
};

}  // namespace kvant::node
