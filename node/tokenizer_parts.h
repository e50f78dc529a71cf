// What a Tokenizer is made of, whichever file it was read from. Only for the files that make one.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "node/added_tokens.h"
#include "node/bpe.h"
#include "node/normalizer.h"
#include "node/piece_memory.h"
#include "node/pre_tokenizer.h"
#include "node/tokenizer.h"

namespace kvant::node {

constexpr std::string_view kSpaceSymbol = "\xE2\x96\x81";  // U+2581, a space in SentencePiece
constexpr int64_t kMaxTokenId = (int64_t{1} << 22) - 1;

// Where one string is looked up by a view of another.
struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};
using TokenIds = std::unordered_map<std::string, int32_t, StringHash, std::equal_to<>>;

// The tokens by id. One that the vocabulary lacks has nothing written.
struct Vocabulary {
  struct Token {
    std::string written;    // as in the file
    std::string bytes;      // what it stands for
    bool special = false;   // left out of texts
    bool is_byte = false;   // <0x0A>: a byte of a character, put together by byte fallback
    bool in_model = false;  // not merely an added token
    bool unknown = false;   // of SentencePiece: stands for what has no token
  };
  // kInvalidArgument: the id is taken by another token, or too large.
  Status Add(std::string_view written, uint64_t id, bool in_model, const std::string& name);
  const Token* Find(int32_t id) const;
  std::optional<int32_t> IdOf(std::string_view written) const;

  std::vector<Token> tokens;  // [id]
  TokenIds ids;
};

// Encodes what lies between added tokens. Immutable, Thread-safe.
class TextEncoder {
 public:
  virtual ~TextEncoder() = default;
  // Appends the ids of `text`, which is UTF-8. `at_start`: it is the beginning of the whole.
  virtual Status Encode(std::string_view text, bool at_start, std::vector<int32_t>* ids) const = 0;
};

// Byte pair encoding of pieces.
class BpeEncoder : public TextEncoder {
 public:
  Status Encode(std::string_view text, bool at_start, std::vector<int32_t>* ids) const override;

  std::unique_ptr<PreTokenizer> pre_tokenizer;
  BpeSymbols symbols;
  BpeMerges merges;
  // Not nullptr (ignore_merges): a piece that is one of these tokens is that token. Borrowed.
  const Vocabulary* whole_pieces = nullptr;

 private:
  void EncodePiece(std::string_view piece, std::vector<int32_t>* ids) const;

  const uint64_t owner_ = PieceMemory::NewOwner();
};

// How tokens become a text.
struct DecodeRules {
  enum class Bytes : uint8_t {
    kStream,  // all bytes of all tokens put together
    // Tokens of single bytes put together only with their like. Of a run of them that is not UTF-8,
    kWholeRuns,  // each byte becomes U+FFFD (tokenizers, byte_fallback.rs)
    kRuns,       // each invalid byte does (SentencePiece)
  };
  Bytes bytes = Bytes::kStream;
  // Dropped from the text of the first token, wherever it stands in it (tokenizers, metaspace.rs).
  std::string drop_from_first;
  // At most so many of this are dropped from the beginning of the text (strip.rs).
  std::string strip = " ";
  int strip_count = 0;
  // SentencePiece: a space is dropped from the first token that has a text, or, with `strip_each`,
  // from all up to it.
  bool strip_token = false;
  bool strip_each = false;
};

struct Tokenizer::Parts {
  Vocabulary vocabulary;
  AddedTokens raw_added;         // looked for before the normalizer
  AddedTokens normalized_added;  // and behind it
  std::unique_ptr<Normalizer> normalizer = std::make_unique<Normalizer>();
  std::unique_ptr<TextEncoder> encoder;
  DecodeRules decoding;
  std::vector<int32_t> before;  // special tokens around the text
  std::vector<int32_t> after;
};

// GPT-2's alphabet: printable bytes of Latin-1 stand for themselves, the others for U+0100 on.
const std::array<char32_t, 256>& ByteAlphabet();
// From how each token is written (Token::bytes so far) to its bytes: a token with any character
// outside of the alphabet stands for its own UTF-8 (tokenizers, byte_level.rs, decode_chain).
void ReadByteAlphabet(Vocabulary* vocabulary);
// The byte that <0x0A> means.
std::optional<uint8_t> ByteOfToken(std::string_view written);
// How byte fallback writes a byte.
std::string TokenOfByte(uint8_t byte);

}  // namespace kvant::node
