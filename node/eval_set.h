// The texts of one `kvant eval`: a file, or held-out files of several kinds.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

#include "base/random.h"
#include "base/status.h"
#include "node/eval_text.h"
#include "node/tokenizer.h"

namespace kvant::node {

// The windows [first, first + windows) of an evaluation are of this kind. Value.
struct EvalKind {
  std::string name;
  size_t first = 0;
  size_t windows = 0;
};

struct EvalWindows {
  std::vector<EvalWindow> windows;
  std::vector<EvalKind> kinds;  // one after the other; empty where texts have no kinds
};

// Immutable. Borrows the tokenizer.
class EvalSet {
 public:
  // One text, of no kind. Errors are EvalText::Load's.
  static Result<EvalSet> OfFile(const std::filesystem::path& file, const Tokenizer* tokenizer);
  // Every subfolder of `folder` is a kind and its files are texts of it, both in the order of their
  // names; hidden ones, and files beside the subfolders, are none. kInvalidArgument: there is no
  // such file, or as EvalText::Load.
  static Result<EvalSet> OfFolder(const std::filesystem::path& folder, const Tokenizer* tokenizer);

  // plan.windows is of each file; of files with kinds 0 is 1, so that every file weighs the same.
  // The stranger of a window is the first prefix of another file of its kind, if there is one.
  // Errors are EvalText::Windows'.
  Result<EvalWindows> Windows(const WindowPlan& plan) const;

  // Tokens of the longest text.
  int longest() const;
  // Takes the texts that are long enough in turns. Otherwise as EvalText::Passkey.
  // REQUIRES: length <= longest().
  Result<PasskeyPrompt> Passkey(int length, double depth, size_t turn, Random* random) const;

 private:
  struct Kind {
    std::string name;  // empty: none
    std::vector<EvalText> texts;
  };
  std::vector<Kind> kinds_;  // at least one, with at least one text each
};

}  // namespace kvant::node
