// Changes a text before it is cut into pieces, as the "normalizer" of tokenizer.json says.
#pragma once

#include <cstdint>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace kvant::node {

// The forms of UAX #15.
enum class UnicodeForm : uint8_t { kNfc, kNfd, kNfkc, kNfkd };

// `text` in that form, in time O(n log n). REQUIRES: text is UTF-8.
std::string NormalizeUnicode(std::string_view text, UnicodeForm form);

// Filled once, then Immutable and Thread-safe. Without steps it changes nothing.
class Normalizer {
 public:
  Normalizer();
  ~Normalizer();
  // `description` is the value of "normalizer", `name` the file named in errors. kUnsupported names
  // the part that is not implemented and those that are.
  static Result<std::unique_ptr<Normalizer>> Parse(const nlohmann::json& description,
                                                   const std::string& name);
  // Adds the step that puts `replacement` for each `literal`.
  void AddReplace(std::string literal, std::string replacement);

  // REQUIRES: text is UTF-8. kInvalidArgument: a pattern gave up on it, or the result would be
  // many times as long as the text.
  Result<std::string> Apply(std::string_view text) const;
  bool empty() const { return steps_.empty(); }

 private:
  struct Step;
  Status Add(const nlohmann::json& description, int depth, const std::string& name);

  std::vector<Step> steps_;
};

}  // namespace kvant::node
