#include "node/tokenizer.h"

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <unordered_map>
#include <utility>

#include "node/bpe.h"
#include "node/json.h"
#include "node/pre_tokenizer.h"
#include "node/utf8.h"

namespace kvant::node {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxFileBytes = uint64_t{256} << 20;
constexpr int64_t kMaxTokenId = (int64_t{1} << 22) - 1;

Status Unsupported(const std::string& name, std::string_view what) {
  return MakeStatus(
      StatusCode::kUnsupported,
      "{}: {} is not supported; supported is byte-level BPE as in Llama 3 and GPT-2: "
      "model BPE, decoder ByteLevel, normalizer none or NFC, post-processor ByteLevel "
      "or TemplateProcessing",
      name, what);
}

std::string TypeOf(const json& part) {
  if (!part.is_object()) return "";
  const json* type = FindField(part, "type");
  return type != nullptr && type->is_string() ? type->get<std::string>() : "";
}

// GPT-2's alphabet: printable bytes of Latin-1 stand for themselves, the others for U+0100 on.
std::array<char32_t, 256> ByteAlphabet() {
  std::array<char32_t, 256> alphabet{};
  char32_t next = 256;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool itself = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) ||
                        (byte >= 0xAE && byte <= 0xFF);
    alphabet[byte] = itself ? byte : next++;
  }
  return alphabet;
}

// Characters that no normalization to NFC changes, whatever stands beside them: neither combining
// nor composed anew. A part of those with NFC_Quick_Check=Yes and combining class 0.
bool NfcLeavesAlone(char32_t c) {
  constexpr std::pair<char32_t, char32_t> kRanges[] = {
      {0x0000, 0x02FF},   // Latin, IPA
      {0x0391, 0x03CE},   // Greek
      {0x0400, 0x0482},   // Cyrillic
      {0x048A, 0x052F},   // Cyrillic
      {0x05D0, 0x05EA},   // Hebrew letters
      {0x0620, 0x064A},   // Arabic letters
      {0x0E01, 0x0E30},   // Thai consonants
      {0x2010, 0x2027},   // punctuation
      {0x2030, 0x205E},   // punctuation
      {0x20A0, 0x20BF},   // currency
      {0x2190, 0x21FF},   // arrows
      {0x2200, 0x22FF},   // mathematics
      {0x2500, 0x27BF},   // boxes, symbols, dingbats
      {0x3000, 0x3029},   // ideographic punctuation
      {0x3041, 0x3096},   // Hiragana
      {0x30A0, 0x30FF},   // Katakana
      {0x4E00, 0x9FFF},   // ideographs
      {0xAC00, 0xD7A3},   // Hangul syllables
      {0xFE0F, 0xFE0F},   // emoji variation
      {0xFF01, 0xFF9D},   // full-width forms
      {0x1F300, 0x1FAFF}  // emoji
  };
  return std::any_of(std::begin(kRanges), std::end(kRanges),
                     [c](const auto& range) { return c >= range.first && c <= range.second; });
}

// Finds the added tokens that are written in a text: leftmost, and the longest of those.
class AddedTokens {
 public:
  void Add(std::string content, int32_t id) {
    auto& list = by_first_byte_[static_cast<uint8_t>(content.front())];
    list.emplace_back(std::move(content), id);
    std::sort(list.begin(), list.end(),
              [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
  }
  // Calls on_text(part) and on_token(id) in order; empty parts are left out.
  template <typename OnText, typename OnToken>
  Status Cut(std::string_view text, const OnText& on_text, const OnToken& on_token) const {
    size_t done = 0;
    for (size_t at = 0; at < text.size();) {
      const std::pair<std::string, int32_t>* found = nullptr;
      for (const auto& candidate : by_first_byte_[static_cast<uint8_t>(text[at])]) {
        if (text.substr(at).starts_with(candidate.first)) {
          found = &candidate;
          break;
        }
      }
      if (found == nullptr) {
        ++at;
        continue;
      }
      if (at > done) KV_RETURN_IF_ERROR(on_text(text.substr(done, at - done)));
      on_token(found->second);
      at += found->first.size();
      done = at;
    }
    if (done < text.size()) KV_RETURN_IF_ERROR(on_text(text.substr(done)));
    return OkStatus();
  }

 private:
  std::array<std::vector<std::pair<std::string, int32_t>>, 256> by_first_byte_;  // longest first
};

}  // namespace

struct Tokenizer::Parts {
  // One entry per id; written empty: no such token.
  struct Token {
    std::string written;  // as in the vocabulary
    std::string bytes;
    bool special = false;
  };

  Status ParseVocabulary(const json& model, const std::string& name);
  Status ParseMerges(const json& model, const std::string& name);
  Status ParseAddedTokens(const json& list, const std::string& name);
  Status ParseNormalizer(const json* normalizer, const std::string& name);
  Status ParsePostProcessor(const json* post_processor, const std::string& name);
  Status ParseTemplate(const json& processor, const std::string& name);
  Status AddToken(const std::string& written, const json& id, const std::string& name);
  // Pre-tokenizes a text without added tokens and appends its ids.
  Status EncodeText(std::string_view text, std::vector<int32_t>* ids) const;

  std::array<char32_t, 256> alphabet = ByteAlphabet();
  std::map<char32_t, uint8_t> byte_of;  // the inverse of alphabet
  std::vector<Token> tokens;
  std::unordered_map<std::string, int32_t> ids;
  BpeMerges merges;
  bool ignore_merges = false;  // a piece that is a token is that token
  bool nfc = false;
  AddedTokens raw_added;         // looked for before the normalizer
  AddedTokens normalized_added;  // and behind it
  std::unique_ptr<PreTokenizer> pre_tokenizer;
  std::vector<int32_t> before;  // the template's special tokens around the text
  std::vector<int32_t> after;
};

Status Tokenizer::Parts::AddToken(const std::string& written, const json& id,
                                  const std::string& name) {
  if (!id.is_number_unsigned() || id.get<uint64_t>() > static_cast<uint64_t>(kMaxTokenId)) {
    return InvalidArgument("{}: the id of token \"{}\" must be an integer from 0 to {}", name,
                           written, kMaxTokenId);
  }
  if (written.empty()) return InvalidArgument("{}: a token is empty", name);
  const auto index = id.get<size_t>();
  if (index >= tokens.size()) tokens.resize(index + 1);
  Token& token = tokens[index];
  if (!token.written.empty() && token.written != written) {
    return InvalidArgument("{}: id {} has two tokens, \"{}\" and \"{}\"", name, index,
                           token.written, written);
  }
  token.written = written;
  ids[written] = static_cast<int32_t>(index);
  // A token with any character outside the alphabet stands for its own UTF-8 (tokenizers,
  // byte_level.rs, decode_chain).
  token.bytes.clear();
  for (size_t at = 0; at < written.size();) {
    const Utf8Unit unit = Utf8At(written, at);
    const auto byte = byte_of.find(unit.code_point);
    if (byte == byte_of.end()) {
      token.bytes = written;
      break;
    }
    token.bytes.push_back(static_cast<char>(byte->second));
    at += unit.bytes;
  }
  return OkStatus();
}

Status Tokenizer::Parts::ParseVocabulary(const json& model, const std::string& name) {
  const json* vocabulary = FindField(model, "vocab");
  if (vocabulary == nullptr || !vocabulary->is_object()) {
    return InvalidArgument("{}: field \"model.vocab\" must be an object", name);
  }
  for (const auto& [written, id] : vocabulary->items()) {
    KV_RETURN_IF_ERROR(AddToken(written, id, name));
  }
  for (int byte = 0; byte < 256; ++byte) {
    const bool in_utf8 = byte < 0xF5 && byte != 0xC0 && byte != 0xC1;
    std::string written;
    AppendUtf8(alphabet[static_cast<size_t>(byte)], &written);
    const auto found = ids.find(written);
    if (found == ids.end()) {
      if (!in_utf8) continue;
      return Unsupported(name, fmt::format("a vocabulary without a token for byte 0x{:02x}", byte));
    }
    merges.SetByte(static_cast<uint8_t>(byte), found->second);
  }
  return OkStatus();
}

Status Tokenizer::Parts::ParseMerges(const json& model, const std::string& name) {
  const json* list = FindField(model, "merges");
  if (list == nullptr || !list->is_array()) {
    return InvalidArgument("{}: field \"model.merges\" must be a list", name);
  }
  size_t number = 0;
  for (const json& merge : *list) {
    ++number;
    // Two forms: "a b", and ["a", "b"] since tokenizers 0.20.
    std::string left;
    std::string right;
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      left = merge[0].get<std::string>();
      right = merge[1].get<std::string>();
    } else if (merge.is_string()) {
      const auto& both = merge.get_ref<const std::string&>();
      const size_t space = both.find(' ');
      left = both.substr(0, space);
      if (space != std::string::npos) right = both.substr(space + 1);
    }
    const auto left_id = ids.find(left);
    const auto right_id = ids.find(right);
    const auto merged_id = ids.find(left + right);
    if (left_id == ids.end() || right_id == ids.end() || merged_id == ids.end()) {
      return InvalidArgument(
          "{}: merge number {} (\"{}\" with \"{}\") must be two tokens of the vocabulary whose "
          "concatenation is one, too",
          name, number, left, right);
    }
    merges.Add(left_id->second, right_id->second, merged_id->second);
  }
  return OkStatus();
}

Status Tokenizer::Parts::ParseAddedTokens(const json& list, const std::string& name) {
  if (!list.is_array()) return InvalidArgument("{}: \"added_tokens\" must be a list", name);
  for (const json& entry : list) {
    const json* id = entry.is_object() ? FindField(entry, "id") : nullptr;
    if (id == nullptr) return InvalidArgument("{}: an added token has no id", name);
    KV_ASSIGN_OR_RETURN(const std::string content, StringField(entry, "content", "", name));
    for (const std::string_view flag : {"lstrip", "rstrip", "single_word"}) {
      KV_ASSIGN_OR_RETURN(const bool set, BooleanField(entry, flag, false, name));
      if (set) return Unsupported(name, fmt::format("{} of added token {}", flag, content));
    }
    KV_ASSIGN_OR_RETURN(const bool special, BooleanField(entry, "special", false, name));
    KV_ASSIGN_OR_RETURN(const bool normalized, BooleanField(entry, "normalized", !special, name));
    KV_RETURN_IF_ERROR(AddToken(content, *id, name));
    tokens[id->get<size_t>()].special = special;
    (normalized ? normalized_added : raw_added).Add(content, id->get<int32_t>());
  }
  return OkStatus();
}

Status Tokenizer::Parts::ParseNormalizer(const json* normalizer, const std::string& name) {
  if (normalizer == nullptr) return OkStatus();
  nfc = TypeOf(*normalizer) == "NFC";
  const json* list = normalizer->is_object() ? FindField(*normalizer, "normalizers") : nullptr;
  const bool nothing = TypeOf(*normalizer) == "Sequence" && list != nullptr && list->empty();
  if (!nfc && !nothing) return Unsupported(name, "normalizer " + TypeOf(*normalizer));
  return OkStatus();
}

Status Tokenizer::Parts::ParseTemplate(const json& processor, const std::string& name) {
  const json* single = FindField(processor, "single");
  const json* specials = FindField(processor, "special_tokens");
  if (single == nullptr || !single->is_array()) {
    return InvalidArgument("{}: TemplateProcessing needs a list \"single\"", name);
  }
  int sequences = 0;
  for (const json& part : *single) {
    if (!part.is_object()) return InvalidArgument("{}: a part of \"single\" is no object", name);
    if (part.contains("Sequence")) {
      ++sequences;
      continue;
    }
    const json* token = FindField(part, "SpecialToken");
    const json* id = token != nullptr && token->is_object() ? FindField(*token, "id") : nullptr;
    const bool known = id != nullptr && id->is_string() && specials != nullptr &&
                       specials->is_object() && specials->contains(id->get<std::string>());
    const json* entry = known ? &(*specials)[id->get<std::string>()] : nullptr;
    const json* list = known && entry->is_object() ? FindField(*entry, "ids") : nullptr;
    if (list == nullptr || !list->is_array()) {
      return InvalidArgument(
          "{}: TemplateProcessing: a special token of \"single\" is not in "
          "\"special_tokens\"",
          name);
    }
    for (const json& value : *list) {
      if (!value.is_number_unsigned() || value.get<uint64_t>() >= tokens.size()) {
        return InvalidArgument(
            "{}: TemplateProcessing: special token {} has an id outside the "
            "vocabulary",
            name, id->get<std::string>());
      }
      (sequences == 0 ? before : after).push_back(value.get<int32_t>());
    }
  }
  if (sequences != 1) return Unsupported(name, "a template with other than one sequence");
  return OkStatus();
}

Status Tokenizer::Parts::ParsePostProcessor(const json* post_processor, const std::string& name) {
  if (post_processor == nullptr) return OkStatus();
  std::vector<const json*> processors = {post_processor};
  if (TypeOf(*post_processor) == "Sequence") {
    const json* list = FindField(*post_processor, "processors");
    if (list == nullptr || !list->is_array()) {
      return InvalidArgument("{}: post-processor Sequence needs a list \"processors\"", name);
    }
    processors.clear();
    for (const json& processor : *list) processors.push_back(&processor);
  }
  int templates = 0;
  for (const json* processor : processors) {
    const std::string type = TypeOf(*processor);
    if (type == "ByteLevel") continue;  // moves offsets, no ids
    if (type != "TemplateProcessing") return Unsupported(name, "post-processor " + type);
    if (++templates > 1) return Unsupported(name, "more than one TemplateProcessing");
    KV_RETURN_IF_ERROR(ParseTemplate(*processor, name));
  }
  return OkStatus();
}

Status Tokenizer::Parts::EncodeText(std::string_view text, std::vector<int32_t>* out) const {
  std::deque<std::string> owned;
  KV_ASSIGN_OR_RETURN(const auto pieces, pre_tokenizer->Cut(text, &owned));
  std::string written;
  for (const std::string_view piece : pieces) {
    if (ignore_merges) {
      written.clear();
      for (const char byte : piece) AppendUtf8(alphabet[static_cast<uint8_t>(byte)], &written);
      if (const auto whole = ids.find(written); whole != ids.end()) {
        out->push_back(whole->second);
        continue;
      }
    }
    merges.Encode(piece, out);
  }
  return OkStatus();
}

Tokenizer::Tokenizer(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Tokenizer::~Tokenizer() = default;

Result<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::filesystem::path& tokenizer_json) {
  KV_ASSIGN_OR_RETURN(const std::string text, ReadFile(tokenizer_json, kMaxFileBytes));
  return Parse(text, tokenizer_json.string());
}

Result<std::unique_ptr<Tokenizer>> Tokenizer::Parse(std::string_view text,
                                                    const std::string& name) {
  KV_ASSIGN_OR_RETURN(const json root, ParseJson(text, name));
  const json* model = root.is_object() ? FindField(root, "model") : nullptr;
  if (model == nullptr || !model->is_object()) {
    return InvalidArgument("{}: field \"model\" must be an object", name);
  }
  // Old files of BPE carry no type.
  KV_ASSIGN_OR_RETURN(const std::string type, StringField(*model, "type", "BPE", name));
  if (type != "BPE") return Unsupported(name, "model " + type);
  for (const std::string_view affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    KV_ASSIGN_OR_RETURN(const std::string value, StringField(*model, affix, "", name));
    if (!value.empty()) return Unsupported(name, affix);
  }
  KV_ASSIGN_OR_RETURN(const bool byte_fallback, BooleanField(*model, "byte_fallback", false, name));
  if (byte_fallback) return Unsupported(name, "byte_fallback (SentencePiece)");
  KV_ASSIGN_OR_RETURN(const double dropout, NumberField(*model, "dropout", 0.0, 1.0, 0.0, name));
  if (dropout != 0.0) return Unsupported(name, "dropout");
  const json* decoder = FindField(root, "decoder");
  if (decoder == nullptr || TypeOf(*decoder) != "ByteLevel") {
    return Unsupported(name, "decoder " + (decoder == nullptr ? "none" : TypeOf(*decoder)));
  }

  auto parts = std::make_unique<Parts>();
  for (size_t byte = 0; byte < 256; ++byte) {
    parts->byte_of[parts->alphabet[byte]] = static_cast<uint8_t>(byte);
  }
  KV_ASSIGN_OR_RETURN(parts->ignore_merges, BooleanField(*model, "ignore_merges", false, name));
  KV_RETURN_IF_ERROR(parts->ParseVocabulary(*model, name));
  KV_RETURN_IF_ERROR(parts->ParseMerges(*model, name));
  if (const json* added = FindField(root, "added_tokens"); added != nullptr) {
    KV_RETURN_IF_ERROR(parts->ParseAddedTokens(*added, name));
  }
  KV_RETURN_IF_ERROR(parts->ParseNormalizer(FindField(root, "normalizer"), name));
  const json* pre_tokenizer = FindField(root, "pre_tokenizer");
  KV_ASSIGN_OR_RETURN(
      parts->pre_tokenizer,
      PreTokenizer::Parse(pre_tokenizer == nullptr ? json() : *pre_tokenizer, name));
  KV_RETURN_IF_ERROR(parts->ParsePostProcessor(FindField(root, "post_processor"), name));
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(parts)));
}

Result<std::vector<int32_t>> Tokenizer::Encode(std::string_view text, bool add_special) const {
  if (const auto invalid = FindInvalidUtf8(text); invalid.has_value()) {
    return InvalidArgument("encoding a text of {} bytes: it is not UTF-8 at byte {}", text.size(),
                           *invalid);
  }
  std::vector<int32_t> ids;
  if (add_special) ids = parts_->before;
  const auto push = [&](int32_t id) { ids.push_back(id); };
  const auto encode = [&](std::string_view part) { return parts_->EncodeText(part, &ids); };
  const auto normalize = [&](std::string_view part) -> Status {
    for (size_t at = 0; parts_->nfc && at < part.size();) {
      const Utf8Unit unit = Utf8At(part, at);
      if (!NfcLeavesAlone(unit.code_point)) {
        return MakeStatus(StatusCode::kUnsupported,
                          "encoding a text of {} bytes: the tokenizer normalizes to NFC, which is "
                          "not implemented for U+{:04X}; use a model without normalizer for it",
                          text.size(), static_cast<uint32_t>(unit.code_point));
      }
      at += unit.bytes;
    }
    return parts_->normalized_added.Cut(part, encode, push);
  };
  KV_RETURN_IF_ERROR(parts_->raw_added.Cut(text, normalize, push));
  if (add_special) ids.insert(ids.end(), parts_->after.begin(), parts_->after.end());
  return ids;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string bytes;
  for (const int32_t id : ids) {
    if (!(skip_special && IsSpecial(id))) bytes += TokenBytes(id);
  }
  std::string text;
  AppendUtf8Lossy(bytes, false, &text);
  return text;
}

std::string_view Tokenizer::TokenBytes(int32_t id) const {
  return id >= 0 && id < vocab_size() ? parts_->tokens[static_cast<size_t>(id)].bytes
                                      : std::string_view();
}

std::optional<int32_t> Tokenizer::FindToken(std::string_view token) const {
  const auto found = parts_->ids.find(std::string(token));
  return found == parts_->ids.end() ? std::nullopt : std::optional(found->second);
}

bool Tokenizer::IsSpecial(int32_t id) const {
  return id >= 0 && id < vocab_size() && parts_->tokens[static_cast<size_t>(id)].special;
}

int Tokenizer::vocab_size() const { return static_cast<int>(parts_->tokens.size()); }

std::string StreamDecoder::Push(int32_t id) {
  if (skip_special_ && tokenizer_->IsSpecial(id)) return {};
  held_ += tokenizer_->TokenBytes(id);
  std::string text;
  const size_t left = AppendUtf8Lossy(held_, true, &text);
  held_.erase(0, held_.size() - left);
  return text;
}

std::string StreamDecoder::Finish() {
  std::string text;
  AppendUtf8Lossy(std::exchange(held_, {}), false, &text);
  return text;
}

}  // namespace kvant::node
