#include "node/eval_set.h"

#include <algorithm>
#include <system_error>
#include <utility>

#include "base/check.h"

namespace kvant::node {
namespace {

namespace fs = std::filesystem;

// What lies in a folder and is not hidden, by name.
Result<std::vector<fs::path>> EntriesOf(const fs::path& folder) {
  std::error_code error;
  std::vector<fs::path> entries;
  for (auto it = fs::directory_iterator(folder, error); !error && it != fs::directory_iterator();
       it.increment(error)) {
    if (!it->path().filename().string().starts_with('.')) entries.push_back(it->path());
  }
  if (error) {
    return InvalidArgument("cannot list the texts in '{}': {}", folder.string(), error.message());
  }
  std::sort(entries.begin(), entries.end());
  return entries;
}

}  // namespace

Result<EvalSet> EvalSet::OfFile(const fs::path& file, const Tokenizer* tokenizer) {
  KV_ASSIGN_OR_RETURN(EvalText text, EvalText::Load(file, tokenizer));
  EvalSet set;
  set.kinds_.emplace_back().texts.push_back(std::move(text));
  return set;
}

Result<EvalSet> EvalSet::OfFolder(const fs::path& folder, const Tokenizer* tokenizer) {
  EvalSet set;
  KV_ASSIGN_OR_RETURN(const std::vector<fs::path> kinds, EntriesOf(folder));
  std::error_code ignored;
  for (const fs::path& kind : kinds) {
    if (!fs::is_directory(kind, ignored)) continue;
    KV_ASSIGN_OR_RETURN(const std::vector<fs::path> files, EntriesOf(kind));
    Kind made{kind.filename().string(), {}};
    for (const fs::path& file : files) {
      if (!fs::is_regular_file(file, ignored)) continue;
      KV_ASSIGN_OR_RETURN(EvalText text, EvalText::Load(file, tokenizer));
      made.texts.push_back(std::move(text));
    }
    if (!made.texts.empty()) set.kinds_.push_back(std::move(made));
  }
  if (set.kinds_.empty()) {
    return InvalidArgument(
        "'{}' has no texts: it needs a subfolder for each kind, with files in it "
        "(scripts/texts makes such folders)",
        folder.string());
  }
  return set;
}

Result<EvalWindows> EvalSet::Windows(const WindowPlan& plan) const {
  EvalWindows all;
  WindowPlan of_file = plan;
  for (const Kind& kind : kinds_) {
    const size_t begin = all.windows.size();
    if (!kind.name.empty()) of_file.windows = std::max(plan.windows, 1);
    std::vector<std::vector<EvalWindow>> made;  // [text]
    for (const EvalText& text : kind.texts) {
      KV_ASSIGN_OR_RETURN(made.emplace_back(), text.Windows(of_file));
      ++of_file.seed;  // repeated spans are not at the same place of each
    }
    for (size_t text = 0; text < made.size(); ++text) {
      const size_t other = (text + made.size() / 2) % made.size();
      for (EvalWindow& window : made[text]) {
        if (other != text) window.stranger = made[other].front().prefix;
        all.windows.push_back(window);
      }
    }
    if (!kind.name.empty()) {
      all.kinds.push_back({kind.name, begin, all.windows.size() - begin});
    }
  }
  return all;
}

int EvalSet::longest() const {
  int tokens = 0;
  for (const Kind& kind : kinds_) {
    for (const EvalText& text : kind.texts) tokens = std::max(tokens, text.tokens());
  }
  return tokens;
}

Result<PasskeyPrompt> EvalSet::Passkey(int length, double depth, size_t turn,
                                       Random* random) const {
  std::vector<const EvalText*> fitting;
  for (const Kind& kind : kinds_) {
    for (const EvalText& text : kind.texts) {
      if (text.tokens() >= length) fitting.push_back(&text);
    }
  }
  KV_CHECK(!fitting.empty());
  return fitting[turn % fitting.size()]->Passkey(length, depth, random);
}

}  // namespace kvant::node
