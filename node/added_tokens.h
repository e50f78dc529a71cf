// Finds in a text the tokens that stand outside of the model: special and added ones.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "node/byte_trie.h"
#include "node/pattern.h"

namespace kvant::node {

struct AddedToken {
  int32_t id = 0;
  bool lstrip = false;       // takes the white space before it
  bool rstrip = false;       // and behind it
  bool single_word = false;  // counts only where no letter or digit stands beside it
};

// Leftmost matches, and of those the longest (tokenizers, added_vocabulary.rs). Filled once, then
// Immutable and Thread-safe.
class AddedTokens {
 public:
  // REQUIRES: content is UTF-8 and not empty.
  void Add(std::string_view content, const AddedToken& token);
  bool empty() const { return tokens_.empty(); }

  // Calls on_text(part, whether it begins the text) and on_token(id) in order; empty parts are left
  // out. Errors are on_text's. REQUIRES: text is UTF-8.
  Status Cut(std::string_view text,
             const std::function<Status(std::string_view part, bool at_start)>& on_text,
             const std::function<void(int32_t id)>& on_token) const;

 private:
  bool InsideWord(std::string_view text, size_t begin, size_t end) const;

  ByteTrie trie_;  // values are indices of tokens_
  std::vector<AddedToken> tokens_;
  std::unique_ptr<Pattern> word_;  // a character of a word; with single_word only
};

}  // namespace kvant::node
