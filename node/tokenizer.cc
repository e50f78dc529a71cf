#include "node/tokenizer.h"

#include <algorithm>
#include <deque>
#include <system_error>
#include <utility>

#include "node/json.h"
#include "node/tokenizer_parts.h"
#include "node/utf8.h"

namespace kvant::node {
namespace {

constexpr uint64_t kMaxFileBytes = uint64_t{256} << 20;
constexpr size_t kMaxTextBytes = size_t{1} << 30;
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

}  // namespace

const std::array<char32_t, 256>& ByteAlphabet() {
  static const std::array<char32_t, 256> alphabet = [] {
    std::array<char32_t, 256> result{};
    char32_t next = 256;
    for (char32_t byte = 0; byte < 256; ++byte) {
      const bool itself = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) ||
                          (byte >= 0xAE && byte <= 0xFF);
      result[byte] = itself ? byte : next++;
    }
    return result;
  }();
  return alphabet;
}

void ReadByteAlphabet(Vocabulary* vocabulary) {
  std::array<int, 512> byte_of{};
  byte_of.fill(-1);
  for (int byte = 0; byte < 256; ++byte) byte_of[ByteAlphabet()[static_cast<size_t>(byte)]] = byte;
  for (Vocabulary::Token& token : vocabulary->tokens) {
    const std::string written = std::exchange(token.bytes, {});
    for (size_t at = 0; at < written.size();) {
      const Utf8Unit unit = Utf8At(written, at);
      at += unit.bytes;
      const int byte = unit.code_point < byte_of.size() ? byte_of[unit.code_point] : -1;
      if (unit.kind != Utf8Unit::Kind::kCharacter || byte < 0) {
        token.bytes = written;
        break;
      }
      token.bytes.push_back(static_cast<char>(byte));
    }
  }
}

std::optional<uint8_t> ByteOfToken(std::string_view written) {
  if (written.size() != 6 || !written.starts_with("<0x") || written.back() != '>') return {};
  int value = 0;
  for (const char c : written.substr(3, 2)) {
    const size_t digit = std::string_view("0123456789abcdef0123456789ABCDEF").find(c);
    if (digit == std::string_view::npos) return {};
    value = value * 16 + static_cast<int>(digit % 16);
  }
  return static_cast<uint8_t>(value);
}

std::string TokenOfByte(uint8_t byte) { return fmt::format("<0x{:02X}>", byte); }

Status Vocabulary::Add(std::string_view written, uint64_t id, bool in_model,
                       const std::string& name) {
  if (id > static_cast<uint64_t>(kMaxTokenId)) {
    return InvalidArgument("{}: the id of token \"{}\" must be an integer from 0 to {}", name,
                           written, kMaxTokenId);
  }
  if (written.empty()) return OkStatus();  // nothing can be written so
  if (id >= tokens.size()) tokens.resize(id + 1);
  Token& token = tokens[id];
  if (!token.written.empty() && token.written != written) {
    return InvalidArgument("{}: id {} has two tokens, \"{}\" and \"{}\"", name, id, token.written,
                           written);
  }
  token.written = written;
  token.bytes = written;
  token.in_model |= in_model;
  ids.insert_or_assign(token.written, static_cast<int32_t>(id));
  return OkStatus();
}

const Vocabulary::Token* Vocabulary::Find(int32_t id) const {
  if (id < 0 || static_cast<size_t>(id) >= tokens.size()) return nullptr;
  const Token& token = tokens[static_cast<size_t>(id)];
  return token.written.empty() ? nullptr : &token;
}

std::optional<int32_t> Vocabulary::IdOf(std::string_view written) const {
  const auto found = ids.find(written);
  return found == ids.end() ? std::nullopt : std::optional(found->second);
}

void BpeEncoder::EncodePiece(std::string_view piece, std::vector<int32_t>* ids) const {
  if (whole_pieces != nullptr) {
    std::string spelled;
    std::string_view written = piece;
    if (pre_tokenizer->byte_level()) {
      for (const char byte : piece) {
        AppendUtf8(ByteAlphabet()[static_cast<uint8_t>(byte)], &spelled);
      }
      written = spelled;
    }
    const auto whole = whole_pieces->IdOf(written);
    if (whole.has_value() && whole_pieces->Find(*whole)->in_model) {
      ids->push_back(*whole);
      return;
    }
  }
  thread_local std::vector<int32_t> begin;
  begin.clear();
  symbols.Of(piece, &begin);
  merges.Merge(begin, ids);
}

Status BpeEncoder::Encode(std::string_view text, bool at_start, std::vector<int32_t>* ids) const {
  thread_local PieceMemory memory;
  std::deque<std::string> owned;
  KV_ASSIGN_OR_RETURN(const auto pieces, pre_tokenizer->Cut(text, at_start, &owned));
  for (const std::string_view piece : pieces) {
    if (memory.Find(owner_, piece, ids)) continue;
    const size_t before = ids->size();
    EncodePiece(piece, ids);
    memory.Set(owner_, piece, std::span(*ids).subspan(before));
  }
  return OkStatus();
}

Tokenizer::Tokenizer(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Tokenizer::~Tokenizer() = default;

Result<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::filesystem::path& tokenizer_json) {
  KV_ASSIGN_OR_RETURN(const std::string text, ReadFile(tokenizer_json, kMaxFileBytes));
  return Parse(text, tokenizer_json.string());
}

Result<std::unique_ptr<Tokenizer>> Tokenizer::LoadFrom(const std::filesystem::path& directory) {
  std::error_code error;
  const auto description = directory / "tokenizer.json";
  const auto proto = directory / "tokenizer.model";
  if (std::filesystem::exists(description, error) || !std::filesystem::exists(proto, error)) {
    return Load(description);
  }
  KV_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(proto, kMaxFileBytes));
  bool add_bos = true;
  bool add_eos = false;
  const auto config_path = directory / "tokenizer_config.json";
  if (std::filesystem::exists(config_path, error)) {
    KV_ASSIGN_OR_RETURN(const std::string text, ReadFile(config_path, kMaxFileBytes));
    KV_ASSIGN_OR_RETURN(const nlohmann::json config, ParseJson(text, config_path.string()));
    if (config.is_object()) {
      KV_ASSIGN_OR_RETURN(add_bos,
                          BooleanField(config, "add_bos_token", true, config_path.string()));
      KV_ASSIGN_OR_RETURN(add_eos,
                          BooleanField(config, "add_eos_token", false, config_path.string()));
    }
  }
  return ParseSentencePiece(bytes, add_bos, add_eos, proto.string());
}

Result<std::vector<int32_t>> Tokenizer::Encode(std::string_view text, bool add_special) const {
  if (text.size() > kMaxTextBytes) {
    return InvalidArgument("encoding a text of {} bytes: more than {} are not taken at once",
                           text.size(), kMaxTextBytes);
  }
  if (const auto invalid = FindInvalidUtf8(text); invalid.has_value()) {
    return InvalidArgument("encoding a text of {} bytes: it is not UTF-8 at byte {}", text.size(),
                           *invalid);
  }
  std::vector<int32_t> ids;
  if (add_special) ids = parts_->before;
  const auto push = [&](int32_t id) { ids.push_back(id); };
  const auto normalize = [&](std::string_view part, bool at_start) -> Status {
    std::string normalized;
    if (!parts_->normalizer->empty()) {
      KV_ASSIGN_OR_RETURN(normalized, parts_->normalizer->Apply(part));
      part = normalized;
    }
    return parts_->normalized_added.Cut(
        part,
        [&](std::string_view inner, bool inner_start) {
          return parts_->encoder->Encode(inner, at_start && inner_start, &ids);
        },
        push);
  };
  KV_RETURN_IF_ERROR(parts_->raw_added.Cut(text, normalize, push));
  if (add_special) ids.insert(ids.end(), parts_->after.begin(), parts_->after.end());
  return ids;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special) const {
  StreamDecoder stream(this, skip_special);
  std::string text;
  for (const int32_t id : ids) text += stream.Push(id);
  text += stream.Finish();
  return text;
}

std::string_view Tokenizer::TokenBytes(int32_t id) const {
  const Vocabulary::Token* token = parts_->vocabulary.Find(id);
  return token == nullptr ? std::string_view() : token->bytes;
}

std::string_view Tokenizer::TokenText(int32_t id) const {
  const Vocabulary::Token* token = parts_->vocabulary.Find(id);
  return token == nullptr ? std::string_view() : token->written;
}

std::optional<int32_t> Tokenizer::FindToken(std::string_view token) const {
  return parts_->vocabulary.IdOf(token);
}

bool Tokenizer::IsSpecial(int32_t id) const {
  const Vocabulary::Token* token = parts_->vocabulary.Find(id);
  return token != nullptr && token->special;
}

int Tokenizer::vocab_size() const { return static_cast<int>(parts_->vocabulary.tokens.size()); }

std::string StreamDecoder::Push(int32_t id) {
  const Tokenizer::Parts& parts = *tokenizer_->parts_;
  const DecodeRules& rules = parts.decoding;
  const Vocabulary::Token* token = parts.vocabulary.Find(id);
  if (token == nullptr || (skip_special_ && token->special)) return {};
  const bool first = !std::exchange(begun_, true);
  std::string text;
  if (rules.bytes == DecodeRules::Bytes::kStream) {
    held_ += token->bytes;
    const size_t left = AppendUtf8Lossy(held_, true, &text);
    held_.erase(0, held_.size() - left);
  } else if (token->is_byte) {
    held_ += token->bytes;
    if (rules.bytes == DecodeRules::Bytes::kRuns) FlushBytes(true, &text);
  } else {
    FlushBytes(false, &text);
    wrote_ |= !text.empty();
    std::string_view piece = token->bytes;
    std::string without;
    if (first && !rules.drop_from_first.empty()) {
      without = token->written;
      for (size_t at = without.find(rules.drop_from_first); at != std::string::npos;
           at = without.find(rules.drop_from_first, at)) {
        without.erase(at, rules.drop_from_first.size());
      }
      piece = without;
    }
    if (rules.strip_token && !wrote_ && !token->unknown && piece.starts_with(' ')) {
      piece.remove_prefix(1);
      wrote_ = !rules.strip_each;
    }
    text += piece;
  }
  wrote_ |= !text.empty();
  StripBeginning(&text);
  return text;
}

void StreamDecoder::FlushBytes(bool keep_cut, std::string* text) {
  const bool whole = tokenizer_->parts_->decoding.bytes == DecodeRules::Bytes::kWholeRuns &&
                     FindInvalidUtf8(held_).has_value();
  size_t at = 0;
  while (at < held_.size()) {
    const Utf8Unit unit = Utf8At(held_, at);
    if (unit.kind == Utf8Unit::Kind::kCut && keep_cut) break;
    if (whole || unit.kind != Utf8Unit::Kind::kCharacter) {
      *text += kReplacement;
      ++at;
    } else {
      text->append(held_, at, unit.bytes);
      at += unit.bytes;
    }
  }
  held_.erase(0, at);
}

void StreamDecoder::StripBeginning(std::string* text) {
  const DecodeRules& rules = tokenizer_->parts_->decoding;
  while (stripped_ < rules.strip_count && text->starts_with(rules.strip)) {
    text->erase(0, rules.strip.size());
    ++stripped_;
  }
  if (!text->empty()) stripped_ = rules.strip_count;
}

std::string StreamDecoder::Finish() {
  std::string text;
  if (tokenizer_->parts_->decoding.bytes == DecodeRules::Bytes::kStream) {
    AppendUtf8Lossy(held_, false, &text);
  } else {
    FlushBytes(false, &text);
  }
  StripBeginning(&text);
  held_.clear();
  begun_ = wrote_ = false;
  stripped_ = 0;
  return text;
}

}  // namespace kvant::node
