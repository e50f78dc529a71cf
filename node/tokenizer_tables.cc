// Tokenizer::FromTables: from what a GGUF file holds.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <utility>

#include "node/tokenizer_parts.h"
#include "node/utf8.h"

namespace kvant::node {
namespace {

using Kind = TokenizerTables::Kind;
using TokenType = TokenizerTables::TokenType;

constexpr size_t kMaxTokenBytes = 4096;
constexpr uint64_t kMaxMergeWork = uint64_t{1} << 31;

// Patterns of the models' own tokenizer.json, each as one Split; behaviour Isolated.
constexpr std::string_view kGpt2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::string_view kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
    R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|)"
    R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kTekken =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|)"
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|)"
    R"(\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kGpt4o =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?|)"
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?|)"
    R"(\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kDeepSeek3 =
    R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|)"
    R"( ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kHan = R"([\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+)";
constexpr std::string_view kHanHangul = R"([\x{0800}-\x{9FA5}\x{AC00}-\x{D7FF}]+)";
// The cased letters, as DeepSeek's first tokenizer lists them.
constexpr std::string_view kCased =
    R"(\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF})"
    R"(\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F})"
    R"(\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481})"
    R"(\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD})"
    R"(\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77})"
    R"(\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45})"
    R"(\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D})"
    R"(\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC})"
    R"(\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4})"
    R"(\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D})"
    R"(\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139})"
    R"(\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B})"
    R"(\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D})"
    R"(\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E})"
    R"(\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A})"
    R"(\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB})"
    R"(\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}]+)";
constexpr std::string_view kWidePunctuation =
    R"(\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+)";

// How a file's tokenizer.ggml.pre cuts.
struct PreTokenizing {
  std::string_view names;  // separated by spaces, one before and behind each
  std::vector<std::string_view> patterns;
  bool ignore_merges = false;
  bool add_bos = false;  // where the file does not say
};

const std::vector<PreTokenizing>& PreTokenizings() {
  static const std::vector<PreTokenizing> all = {
      {" llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 ",
       {kLlama3},
       true,
       true},
      {" dbrx smaug-bpe glm4 chatglm-bpe ", {kLlama3}},
      {" qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez kormo ", {kQwen2}},
      {" gpt-2 gpt2 phi-2 mpt olmo jais roberta-bpe exaone4 ", {kGpt2}},
      {" smollm starcoder refact command-r codeshell exaone minerva-7b ", {R"(\p{N})", kGpt2}},
      {" tekken ", {kTekken}, true},
      {" gpt-4o llama4 kanana2 ", {kGpt4o}},
      {" deepseek-llm ",
       {R"([\r\n])", kCased, kWidePunctuation, R"(\s+$)", kHanHangul, R"(\p{N})"}},
      {" deepseek-coder ", {R"([\r\n])", R"(\s?\p{L}+)", R"(\s?\p{P}+)", kHanHangul, R"(\p{N})"}},
      {" deepseek-v3 deepseek3-llm hunyuan-dense ", {R"(\p{N}{1,3})", kHan, kDeepSeek3}},
      {" default ", {R"([\p{P}\$\+<=>\^~\|]+)", kGpt2, R"(\p{N}+)", "[0-9][0-9][0-9]"}},
      {" falcon ", {R"([\p{P}\$\+<=>\^~\|`]+)", kGpt2, "[0-9][0-9][0-9]"}},
  };
  return all;
}

// Reads the tables of one file into a Tokenizer::Parts. Single-owner, used once.
class Reader {
 public:
  Reader(TokenizerTables tables, const std::string& name)
      : tables_(std::move(tables)), name_(name) {}
  Result<std::unique_ptr<Tokenizer::Parts>> Run();

 private:
  // Gemma writes spaces as such in tokens of nothing else, and ranks merges by id.
  bool gemma() const { return tables_.architecture.starts_with("gemma"); }
  bool sentence_piece() const { return tables_.kind == Kind::kSentencePiece; }
  Status CheckLengths() const;
  Status ReadVocabulary();
  Status ReadByteLevel();
  Status ReadSentencePiece();
  Status ReadMerges();
  void DeriveMerges();
  Status ReadSpecial();
  Status AddAround(std::optional<int32_t> id, bool wanted, std::vector<int32_t>* around) const;

  TokenizerTables tables_;
  const std::string& name_;
  bool add_bos_ = false;
  std::unique_ptr<Tokenizer::Parts> parts_ = std::make_unique<Tokenizer::Parts>();
  std::unique_ptr<BpeEncoder> encoder_ = std::make_unique<BpeEncoder>();
};

Status Reader::CheckLengths() const {
  const size_t count = tables_.tokens.size();
  if (count == 0 || count > static_cast<size_t>(kMaxTokenId) + 1) {
    return InvalidArgument("{}: the tokenizer has {} tokens; between 1 and {} are read", name_,
                           count, kMaxTokenId + 1);
  }
  const auto check = [&](size_t length, std::string_view what) -> Status {
    if (length == 0 || length == count) return OkStatus();
    return InvalidArgument("{}: the tokenizer has {} tokens, but {} {}", name_, count, length,
                           what);
  };
  KV_RETURN_IF_ERROR(check(tables_.types.size(), "token types"));
  if (!sentence_piece()) return OkStatus();
  KV_RETURN_IF_ERROR(check(tables_.scores.size(), "scores"));
  const bool finite = std::all_of(tables_.scores.begin(), tables_.scores.end(),
                                  [](float score) { return std::isfinite(score); });
  if (!finite) return InvalidArgument("{}: a score of the tokenizer is not a number", name_);
  if (!tables_.merges.empty()) return OkStatus();
  if (tables_.scores.empty()) {
    return InvalidArgument("{}: the tokenizer has neither scores nor merges", name_);
  }
  uint64_t work = 0;
  for (const std::string& token : tables_.tokens) work += token.size() * token.size();
  if (work > kMaxMergeWork) {
    return InvalidArgument("{}: the tokens are too long to look for the ways to merge them", name_);
  }
  return OkStatus();
}

Status Reader::ReadVocabulary() {
  Vocabulary& vocabulary = parts_->vocabulary;
  vocabulary.tokens.resize(tables_.tokens.size());
  vocabulary.ids.reserve(tables_.tokens.size());
  for (size_t id = 0; id < tables_.tokens.size(); ++id) {
    std::string& written = tables_.tokens[id];
    if (written.size() > kMaxTokenBytes || FindInvalidUtf8(written).has_value()) {
      return InvalidArgument("{}: token {} is longer than {} bytes or not UTF-8", name_, id,
                             kMaxTokenBytes);
    }
    const bool spaces = written.find_first_not_of(' ') == std::string::npos;
    if (sentence_piece() && gemma() && spaces) {
      const size_t count = written.size();
      written.clear();
      for (size_t i = 0; i < count; ++i) written += kSpaceSymbol;
    }
    KV_RETURN_IF_ERROR(vocabulary.Add(written, id, true, name_));
  }
  return OkStatus();
}

Status Reader::ReadByteLevel() {
  const std::string pre = " " + (tables_.pre.empty() ? "default" : tables_.pre) + " ";
  const auto& all = PreTokenizings();
  const auto found = std::find_if(all.begin(), all.end(), [&](const PreTokenizing& one) {
    return tables_.pre.find(' ') == std::string::npos &&
           one.names.find(pre) != std::string_view::npos;
  });
  if (found == all.end()) {
    std::string known;
    for (const PreTokenizing& one : all) known += one.names.substr(1);
    return MakeStatus(StatusCode::kUnsupported,
                      "{}: pre-tokenizer \"{}\" is not supported; supported: {}", name_,
                      tables_.pre, known);
  }
  for (const std::string_view pattern : found->patterns) {
    KV_RETURN_IF_ERROR(encoder_->pre_tokenizer->AddSplit(pattern, Pattern::Syntax::kOniguruma,
                                                         SplitBehavior::kIsolated, name_));
  }
  KV_RETURN_IF_ERROR(encoder_->pre_tokenizer->AddByteLevel(tables_.add_space_prefix.value_or(false),
                                                           false, name_));
  if (found->ignore_merges) encoder_->whole_pieces = &parts_->vocabulary;
  add_bos_ = found->add_bos;
  encoder_->symbols.SetByteLevel();
  for (size_t byte = 0; byte < 256; ++byte) {
    std::string written;
    AppendUtf8(ByteAlphabet()[byte], &written);
    const auto id = parts_->vocabulary.IdOf(written);
    if (id.has_value()) encoder_->symbols.SetByte(static_cast<uint8_t>(byte), *id);
  }
  ReadByteAlphabet(&parts_->vocabulary);
  return ReadMerges();
}

Status Reader::ReadMerges() {
  const Vocabulary& vocabulary = parts_->vocabulary;
  encoder_->merges.Reserve(tables_.merges.size());
  int32_t rank = 0;
  for (const std::string& merge : tables_.merges) {
    const std::string_view both = merge;
    // The first token may begin with a space of its own.
    const size_t space = std::min(both.find(' ', 1), both.size());
    const std::string_view left = both.substr(0, space);
    const std::string_view right = both.substr(std::min(space + 1, both.size()));
    const auto left_id = vocabulary.IdOf(left);
    const auto right_id = vocabulary.IdOf(right);
    const auto merged_id = vocabulary.IdOf(std::string(left) + std::string(right));
    if (!left_id.has_value() || !right_id.has_value() || !merged_id.has_value()) {
      return InvalidArgument(
          "{}: merge number {} (\"{}\") must be two tokens of the vocabulary whose concatenation "
          "is one, too",
          name_, rank + 1, merge);
    }
    encoder_->merges.Add(*left_id, *right_id, *merged_id, rank++);
  }
  return OkStatus();
}

// The merges that a vocabulary with scores implies: every way in which a token is two others, the
// token with the higher score first; of equal scores the longer left part first, then the longer
// right part, then the lower ids (transformers, generate_merges).
void Reader::DeriveMerges() {
  struct Way {
    size_t left_characters;
    size_t right_characters;
    int32_t merged;
    int32_t left;
    int32_t right;
    auto Order() const {
      return std::tuple(~left_characters, ~right_characters, merged, left, right);
    }
  };
  const Vocabulary& vocabulary = parts_->vocabulary;
  std::vector<int32_t> order(vocabulary.tokens.size());
  std::iota(order.begin(), order.end(), 0);
  const auto score = [&](int32_t id) { return tables_.scores[static_cast<size_t>(id)]; };
  if (!gemma()) {
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return score(a) > score(b); });
  }
  encoder_->merges.Reserve(2 * order.size());
  std::vector<Way> ways;
  int32_t rank = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    const std::string_view written = vocabulary.tokens[static_cast<size_t>(order[i])].written;
    const size_t characters =
        static_cast<size_t>(std::count_if(written.begin(), written.end(), [](char byte) {
          return (static_cast<uint8_t>(byte) & 0xC0) != 0x80;
        }));
    size_t left_characters = 0;
    for (size_t at = 0; at < written.size(); ++left_characters) {
      at += Utf8At(written, at).bytes;
      if (at == written.size()) break;
      const auto left = vocabulary.IdOf(written.substr(0, at));
      if (!left.has_value()) continue;
      const auto right = vocabulary.IdOf(written.substr(at));
      if (!right.has_value()) continue;
      const size_t count = left_characters + 1;
      ways.push_back({count, characters - count, order[i], *left, *right});
    }
    const bool more = !gemma() && i + 1 < order.size() && score(order[i]) == score(order[i + 1]);
    if (more) continue;
    std::sort(ways.begin(), ways.end(),
              [](const Way& a, const Way& b) { return a.Order() < b.Order(); });
    for (const Way& way : ways) {
      encoder_->merges.Add(way.left, way.right, way.merged, rank++);
    }
    ways.clear();
  }
}

Status Reader::ReadSentencePiece() {
  const Vocabulary& vocabulary = parts_->vocabulary;
  add_bos_ = true;
  const bool prefix = !gemma() && tables_.add_space_prefix.value_or(true);
  encoder_->pre_tokenizer->AddMetaspace(prefix);
  for (const auto& [written, id] : vocabulary.ids) {
    const Utf8Unit unit = Utf8At(written, 0);
    if (unit.bytes == written.size()) encoder_->symbols.SetCharacter(unit.code_point, id);
  }
  parts_->decoding.bytes = DecodeRules::Bytes::kWholeRuns;
  if (prefix) parts_->decoding.strip_count = 1;
  Normalizer spaces;
  spaces.AddReplace(std::string(kSpaceSymbol), " ");
  for (Vocabulary::Token& token : parts_->vocabulary.tokens) {
    const auto byte = ByteOfToken(token.written);
    token.is_byte = byte.has_value();
    if (byte.has_value()) {
      token.bytes.assign(1, static_cast<char>(*byte));
    } else {
      KV_ASSIGN_OR_RETURN(token.bytes, spaces.Apply(token.written));
    }
  }
  for (int byte = 0; byte < 256; ++byte) {
    const auto id = vocabulary.IdOf(TokenOfByte(static_cast<uint8_t>(byte)));
    if (id.has_value()) encoder_->symbols.SetByte(static_cast<uint8_t>(byte), *id);
  }
  if (tables_.unknown.has_value()) {
    if (vocabulary.Find(*tables_.unknown) == nullptr) {
      return InvalidArgument("{}: the id of the unknown token, {}, lies outside of the {} tokens",
                             name_, *tables_.unknown, vocabulary.tokens.size());
    }
    encoder_->symbols.SetUnknown(*tables_.unknown, true);
  }
  if (!tables_.merges.empty()) return ReadMerges();
  DeriveMerges();
  return OkStatus();
}

Status Reader::ReadSpecial() {
  for (size_t id = 0; id < tables_.types.size(); ++id) {
    const TokenType type = tables_.types[id];
    Vocabulary::Token& token = parts_->vocabulary.tokens[id];
    const bool special = type == TokenType::kControl || type == TokenType::kUnknown;
    if (token.written.empty() || (!special && type != TokenType::kUserDefined)) continue;
    token.special = special;
    // Gemma's tokens of spaces are reached by merges, because a text's spaces are none of theirs.
    const bool spaces = gemma() && token.bytes.find_first_not_of(' ') == std::string::npos;
    if (special || !spaces) {
      AddedToken added;
      added.id = static_cast<int32_t>(id);
      parts_->raw_added.Add(token.written, added);
    }
  }
  KV_RETURN_IF_ERROR(AddAround(tables_.bos, tables_.add_bos.value_or(add_bos_), &parts_->before));
  return AddAround(tables_.eos, tables_.add_eos.value_or(false), &parts_->after);
}

Status Reader::AddAround(std::optional<int32_t> id, bool wanted,
                         std::vector<int32_t>* around) const {
  if (!id.has_value()) return OkStatus();
  if (parts_->vocabulary.Find(*id) == nullptr) {
    return InvalidArgument("{}: the id of the BOS or EOS token, {}, lies outside of the {} tokens",
                           name_, *id, parts_->vocabulary.tokens.size());
  }
  if (wanted) around->push_back(*id);
  return OkStatus();
}

Result<std::unique_ptr<Tokenizer::Parts>> Reader::Run() {
  KV_RETURN_IF_ERROR(CheckLengths());
  KV_RETURN_IF_ERROR(ReadVocabulary());
  encoder_->pre_tokenizer = std::make_unique<PreTokenizer>();
  KV_RETURN_IF_ERROR(sentence_piece() ? ReadSentencePiece() : ReadByteLevel());
  KV_RETURN_IF_ERROR(ReadSpecial());
  parts_->encoder = std::move(encoder_);
  return std::move(parts_);
}

}  // namespace

Result<std::unique_ptr<Tokenizer>> Tokenizer::FromTables(TokenizerTables tables,
                                                         const std::string& name) {
  KV_ASSIGN_OR_RETURN(auto parts, Reader(std::move(tables), name).Run());
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(parts)));
}

}  // namespace kvant::node
