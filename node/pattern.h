// Regular expressions as the Python package `tokenizers` means them: what it hands to Oniguruma
// (Ruby's syntax) is translated for PCRE2.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace kvant::node {

// A part of a text, given by byte offsets: a match, or what lies between two.
struct PatternSpan {
  size_t begin = 0;
  size_t end = 0;
  bool is_match = false;
};

// A compiled pattern. Immutable, Thread-safe.
class Pattern {
 public:
  enum class Syntax : unsigned char {
    kLiteral,    // stands for itself
    kOniguruma,  // translated; what has no counterpart is refused
    kPcre2,      // with UTF and Unicode properties
  };
  // `name` is the file named in errors. kInvalidArgument: it does not compile (says where).
  // kUnsupported: names the part of a pattern that cannot be translated.
  static Result<std::unique_ptr<Pattern>> Compile(std::string_view pattern, Syntax syntax,
                                                  const std::string& name);
  ~Pattern();
  Pattern(const Pattern&) = delete;
  Pattern& operator=(const Pattern&) = delete;

  // The whole text in order, cut at the bounds of the matches; empty spans are left out.
  // REQUIRES: text is UTF-8. kInvalidArgument: the pattern gave up on it.
  Status Scan(std::string_view text, std::vector<PatternSpan>* spans) const;

 private:
  struct Code;
  explicit Pattern(std::unique_ptr<Code> code);
  std::unique_ptr<Code> code_;
};

}  // namespace kvant::node
