// Text to token ids and back: byte pair encoding (Sennrich et al., 2016) over GPT-2's byte alphabet
// or with byte fallback, as tokenizer.json or a GGUF file says, and SentencePiece's models.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace kvant::node {

// A tokenizer in the tables that a GGUF file holds (keys tokenizer.ggml.*).
struct TokenizerTables {
  enum class Kind : uint8_t {
    kByteLevelBpe,   // tokenizer.ggml.model "gpt2": tokens in the byte alphabet, merges
    kSentencePiece,  // "llama": merges follow from the scores, other bytes as <0x0A>
  };
  // The numbers of tokenizer.ggml.token_type.
  enum class TokenType : uint8_t {
    kNormal = 1,
    kUnknown = 2,
    kControl = 3,
    kUserDefined = 4,
    kUnused = 5,
    kByte = 6,
  };

  Kind kind = Kind::kByteLevelBpe;
  std::string architecture;         // general.architecture: "gemma*" ranks merges by token id
  std::string pre;                  // tokenizer.ggml.pre, of kByteLevelBpe; may be empty
  std::vector<std::string> tokens;  // [id], as written in the file
  std::vector<TokenType> types;     // [id], or empty: all normal
  std::vector<float> scores;        // [id] of kSentencePiece
  std::vector<std::string> merges;  // "a b" in the order of rank; of kSentencePiece may be empty
  std::optional<int32_t> bos;
  std::optional<int32_t> eos;
  std::optional<int32_t> unknown;
  // Absent: what llama.cpp takes for the kind.
  std::optional<bool> add_bos;
  std::optional<bool> add_eos;
  std::optional<bool> add_space_prefix;
};

// Immutable, Thread-safe. The same ids as the Python package `tokenizers` (or `sentencepiece`) for
// what it accepts, which docs/models.md lists.
class Tokenizer {
 public:
  // kInvalidArgument: unreadable or malformed (says where). kUnsupported: names the part that is
  // not implemented and what is.
  static Result<std::unique_ptr<Tokenizer>> Load(const std::filesystem::path& tokenizer_json);
  // From a model directory: its tokenizer.json, or without one its tokenizer.model, with
  // add_bos_token and add_eos_token from its tokenizer_config.json.
  static Result<std::unique_ptr<Tokenizer>> LoadFrom(const std::filesystem::path& directory);
  // `name` is the file named in errors, here and below.
  static Result<std::unique_ptr<Tokenizer>> Parse(std::string_view json, const std::string& name);
  // From the tables of a GGUF file. kInvalidArgument: they contradict each other, or an id lies
  // outside of them. kUnsupported: `pre` is not known; the message lists those that are.
  static Result<std::unique_ptr<Tokenizer>> FromTables(TokenizerTables tables,
                                                       const std::string& name);
  // From the bytes of a SentencePiece model (BPE or unigram). What is not a control token's name is
  // encoded as sentencepiece does; the names become their ids, as in Hugging Face.
  static Result<std::unique_ptr<Tokenizer>> ParseSentencePiece(std::string_view proto, bool add_bos,
                                                               bool add_eos,
                                                               const std::string& name);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // add_special: put around the text what the post-processor's template says (usually a BOS).
  // Special tokens written in the text become their ids in either case, as in Hugging Face.
  // kInvalidArgument: the text is not UTF-8 (says at which byte), or a pattern gave up on it.
  Result<std::vector<int32_t>> Encode(std::string_view text, bool add_special) const;

  // Always valid UTF-8: what is not becomes U+FFFD, as many as Hugging Face writes. Ids that the
  // vocabulary lacks are skipped; special tokens too if skip_special. A space that encoding put
  // before the text is dropped where Hugging Face drops it.
  std::string Decode(std::span<const int32_t> ids, bool skip_special = true) const;

  // The bytes that a token stands for; empty for ids that the vocabulary lacks.
  std::string_view TokenBytes(int32_t id) const;
  // A token as written in the vocabulary, and back, e.g. "<|begin_of_text|>".
  std::string_view TokenText(int32_t id) const;
  std::optional<int32_t> FindToken(std::string_view token) const;
  bool IsSpecial(int32_t id) const;
  // One more than the largest id.
  int vocab_size() const;

  struct Parts;

 private:
  friend class StreamDecoder;
  explicit Tokenizer(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

// Decodes ids one by one: the pieces, put together, are Decode() of all of them. What later tokens
// may change is held back: bytes that may be the beginning of a character, and with Hugging Face's
// byte fallback a whole run of tokens for single bytes. Single-owner.
class StreamDecoder {
 public:
  // `tokenizer` is borrowed.
  explicit StreamDecoder(const Tokenizer* tokenizer, bool skip_special = true)
      : tokenizer_(tokenizer), skip_special_(skip_special) {}
  std::string Push(int32_t id);
  // What is still held back; the decoder may be used for a new text afterwards.
  std::string Finish();

 private:
  // Appends the bytes held back, without the beginning of a character if keep_cut.
  void FlushBytes(bool keep_cut, std::string* text);
  void StripBeginning(std::string* text);

  const Tokenizer* tokenizer_;
  bool skip_special_;
  std::string held_;    // bytes that are not written yet
  bool begun_ = false;  // a token was seen
  bool wrote_ = false;  // a text was written, or the space before it dropped
  int stripped_ = 0;    // dropped from the beginning
};

}  // namespace kvant::node
