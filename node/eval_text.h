// What `kvant eval` feeds a model: windows of held-out text, a repeated span of each, and documents
// that hide a passkey. All of it is a function of the text, the sizes and the seed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/random.h"
#include "base/status.h"
#include "node/tokenizer.h"

namespace kvant::node {

struct WindowPlan {
  int prefix = 1024;  // tokens, the tokenizer's BOS counted; a multiple of kBlockTokens
  int suffix = 256;   // tokens, >= 2
  int windows = 0;    // 0: as many as the text has without overlap, kDefaultWindows at most
  uint64_t seed = 1;  // chooses the repeated spans
};
inline constexpr int kDefaultWindows = 16;

// A prefix and what follows it in the text. Value.
struct EvalWindow {
  std::vector<int32_t> prefix;  // [plan.prefix]
  std::vector<int32_t> suffix;  // [plan.suffix]
  // Another place's prefix, which does not overlap this one: [plan.prefix], or empty where the text
  // is too short to have one.
  std::vector<int32_t> stranger;
  // A span of the prefix, to stand behind the prefix once more.
  std::vector<int32_t> copy;
};
// Tokens of EvalWindow::copy, where prefix and suffix are long enough, and those of them that are
// not counted: until then a reader cannot know what is repeated.
inline constexpr int kCopyTokens = 128;
inline constexpr int kCopyUncounted = 8;

// A document with the sentence "The passkey for the north gate is 48213." at a depth, the question
// after it, and the answer (the forms of scripts/train/recall.py). Value.
struct PasskeyPrompt {
  int length = 0;  // asked for
  double depth = 0;
  std::string text;             // up to "Answer:"
  std::vector<int32_t> tokens;  // text and answer, at most `length`
  int answer_tokens = 0;        // the last of them: " 48213"
};

// Immutable. Borrows the tokenizer.
class EvalText {
 public:
  // kInvalidArgument: the file cannot be read, is longer than kMaxTextBytes, or is not UTF-8.
  static Result<EvalText> Load(const std::filesystem::path& file, const Tokenizer* tokenizer);
  // `name` is the file named in errors.
  static Result<EvalText> FromText(std::string_view text, const std::string& name,
                                   const Tokenizer* tokenizer);

  int tokens() const { return static_cast<int>(ids_.size()); }
  // Windows spread evenly over the text; they overlap only if more are asked for than fit.
  // kInvalidArgument: the text is too short (says what would fit).
  Result<std::vector<EvalWindow>> Windows(const WindowPlan& plan) const;

  // Draws place, number and filler from `random`. depth: 0..1, where the sentence begins.
  // kInvalidArgument: the text has fewer than `length` tokens.
  Result<PasskeyPrompt> Passkey(int length, double depth, Random* random) const;

 private:
  EvalText() = default;

  std::string name_;
  const Tokenizer* tokenizer_ = nullptr;
  std::vector<int32_t> front_;  // what the tokenizer puts before a text, e.g. BOS
  std::vector<int32_t> ids_;    // the text without it
};

inline constexpr uint64_t kMaxTextBytes = uint64_t{64} << 20;

// Where a sentence may be put into `text`: the offsets of the space after a sentence's end, and of
// line ends. Empty if there is none.
std::vector<size_t> SentenceGaps(std::string_view text);

}  // namespace kvant::node
