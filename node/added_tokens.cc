#include "node/added_tokens.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "node/utf8.h"

namespace kvant::node {

void AddedTokens::Add(std::string_view content, const AddedToken& token) {
  KV_CHECK(!content.empty());
  if (token.single_word && word_ == nullptr) {
    // Rust's \w.
    auto word = Pattern::Compile(R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}])",
                                 Pattern::Syntax::kPcre2, "added tokens");
    KV_CHECK(word.ok());
    word_ = *std::move(word);
  }
  trie_.Add(content, static_cast<int32_t>(tokens_.size()));
  tokens_.push_back(token);
}

bool AddedTokens::InsideWord(std::string_view text, size_t begin, size_t end) const {
  std::vector<PatternSpan> spans;
  const auto is_word = [&](size_t at) {
    return word_->Scan(text.substr(at, Utf8At(text, at).bytes), &spans).ok() &&
           spans.front().is_match;
  };
  return (begin > 0 && is_word(CharacterBefore(text, begin))) ||
         (end < text.size() && is_word(end));
}

Status AddedTokens::Cut(std::string_view text,
                        const std::function<Status(std::string_view, bool)>& on_text,
                        const std::function<void(int32_t)>& on_token) const {
  size_t done = 0;
  for (size_t at = 0; at < text.size();) {
    const ByteTrie::Match match = trie_.Longest(text, at);
    if (match.value < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_[static_cast<size_t>(match.value)];
    size_t begin = at;
    size_t end = at + match.length;
    at = end;  // the next match is looked for here, whatever white space this one takes
    if (token.single_word && InsideWord(text, begin, end)) continue;
    if (token.lstrip) {
      begin = std::max(done, StripSpace(text.substr(0, begin), false, true).size());
    }
    if (token.rstrip) end = text.size() - StripSpace(text.substr(end), true, false).size();
    if (done < begin) KV_RETURN_IF_ERROR(on_text(text.substr(done, begin - done), done == 0));
    on_token(token.id);
    done = end;
  }
  if (done < text.size()) KV_RETURN_IF_ERROR(on_text(text.substr(done), done == 0));
  return OkStatus();
}

}  // namespace kvant::node
