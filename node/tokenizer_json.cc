// Tokenizer::Parse: from tokenizer.json.
#include <algorithm>
#include <utility>

#include "node/json.h"
#include "node/tokenizer_parts.h"
#include "node/utf8.h"

namespace kvant::node {
namespace {

using nlohmann::json;

constexpr int kMaxStrip = 1024;

Status Unsupported(const std::string& name, std::string_view what) {
  return MakeStatus(StatusCode::kUnsupported,
                    "{}: {} is not supported; supported is byte pair encoding, byte-level or with "
                    "byte fallback: model BPE, decoders ByteLevel, Metaspace and sequences of "
                    "Replace, ByteFallback, Fuse and Strip, post-processors ByteLevel and "
                    "TemplateProcessing",
                    name, what);
}

std::string TypeOf(const json& part) {
  if (!part.is_object()) return "";
  const json* type = FindField(part, "type");
  return type != nullptr && type->is_string() ? type->get<std::string>() : "";
}

// The parts of a Sequence (nested ones in their places), or the one part itself.
Status Flatten(const json& part, std::string_view list_name, int depth, const std::string& name,
               std::vector<const json*>* parts) {
  if (TypeOf(part) != "Sequence") {
    parts->push_back(&part);
    return OkStatus();
  }
  const json* list = FindField(part, list_name);
  if (list == nullptr || !list->is_array()) {
    return InvalidArgument("{}: a Sequence needs a list \"{}\"", name, list_name);
  }
  if (depth > 8) return Unsupported(name, "a Sequence in more than 8 others");
  for (const json& inner : *list) {
    KV_RETURN_IF_ERROR(Flatten(inner, list_name, depth + 1, name, parts));
  }
  return OkStatus();
}

// Reads the parts one by one into a Tokenizer::Parts. Single-owner, used once.
class Reader {
 public:
  Reader(const json& root, const std::string& name) : root_(root), name_(name) {}
  Result<std::unique_ptr<Tokenizer::Parts>> Run();

 private:
  Status ReadModel(const json& model);
  Status ReadVocabulary(const json& model);
  Status ReadSymbols(const json& model);
  Status ReadMerges(const json& model);
  Status ReadAddedTokens(const json& list);
  Status ReadDecoder();
  Status ReadDecoderStep(const json& step);
  Status ReadPostProcessor(const json& processor);
  Status ReadTemplate(const json& processor);
  // What the decoder's Replace steps make of a token.
  Result<std::string> Replaced(std::string_view written) const;

  const json& root_;
  const std::string& name_;
  std::unique_ptr<Tokenizer::Parts> parts_ = std::make_unique<Tokenizer::Parts>();
  std::unique_ptr<BpeEncoder> encoder_ = std::make_unique<BpeEncoder>();
  // Of the decoder:
  bool byte_level_ = false;
  bool byte_fallback_ = false;
  bool fused_ = false;
  Normalizer replace_;
  std::string metaspace_;
};

Status Reader::ReadVocabulary(const json& model) {
  const json* vocabulary = FindField(model, "vocab");
  if (vocabulary == nullptr || !vocabulary->is_object()) {
    return InvalidArgument("{}: field \"model.vocab\" must be an object", name_);
  }
  parts_->vocabulary.ids.reserve(vocabulary->size());
  for (const auto& [written, id] : vocabulary->items()) {
    if (!id.is_number_unsigned()) {
      return InvalidArgument("{}: the id of token \"{}\" must be an integer from 0 to {}", name_,
                             written, kMaxTokenId);
    }
    KV_RETURN_IF_ERROR(parts_->vocabulary.Add(written, id.get<uint64_t>(), true, name_));
  }
  return OkStatus();
}

Status Reader::ReadSymbols(const json& model) {
  const Vocabulary& vocabulary = parts_->vocabulary;
  KV_ASSIGN_OR_RETURN(const bool fallback, BooleanField(model, "byte_fallback", false, name_));
  KV_ASSIGN_OR_RETURN(const bool fuse, BooleanField(model, "fuse_unk", false, name_));
  KV_ASSIGN_OR_RETURN(const std::string unknown, StringField(model, "unk_token", "", name_));
  if (!unknown.empty()) {
    const auto id = vocabulary.IdOf(unknown);
    if (!id.has_value()) {
      return InvalidArgument("{}: unk_token \"{}\" is not in the vocabulary", name_, unknown);
    }
    encoder_->symbols.SetUnknown(*id, fuse);
  }
  if (encoder_->pre_tokenizer->byte_level()) {
    encoder_->symbols.SetByteLevel();
    for (size_t byte = 0; byte < 256; ++byte) {
      std::string written;
      AppendUtf8(ByteAlphabet()[byte], &written);
      const auto id = vocabulary.IdOf(written);
      if (id.has_value()) encoder_->symbols.SetByte(static_cast<uint8_t>(byte), *id);
    }
    return OkStatus();
  }
  for (const auto& [written, id] : vocabulary.ids) {
    const Utf8Unit unit = Utf8At(written, 0);
    if (unit.bytes == written.size()) encoder_->symbols.SetCharacter(unit.code_point, id);
  }
  for (int byte = 0; fallback && byte < 256; ++byte) {
    const auto id = vocabulary.IdOf(TokenOfByte(static_cast<uint8_t>(byte)));
    if (id.has_value()) encoder_->symbols.SetByte(static_cast<uint8_t>(byte), *id);
  }
  return OkStatus();
}

Status Reader::ReadMerges(const json& model) {
  const json* list = FindField(model, "merges");
  if (list == nullptr || !list->is_array()) {
    return InvalidArgument("{}: field \"model.merges\" must be a list", name_);
  }
  const Vocabulary& vocabulary = parts_->vocabulary;
  encoder_->merges.Reserve(list->size());
  int32_t rank = 0;
  std::string merged;
  for (const json& merge : *list) {
    // Two forms: "a b", and ["a", "b"] since tokenizers 0.20.
    std::string_view left;
    std::string_view right;
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      left = merge[0].get_ref<const std::string&>();
      right = merge[1].get_ref<const std::string&>();
    } else if (merge.is_string()) {
      left = merge.get_ref<const std::string&>();
      const size_t space = std::min(left.find(' '), left.size());
      right = left.substr(std::min(space + 1, left.size()));
      left = left.substr(0, space);
    }
    merged.assign(left);
    merged += right;
    const auto left_id = vocabulary.IdOf(left);
    const auto right_id = vocabulary.IdOf(right);
    const auto merged_id = vocabulary.IdOf(merged);
    if (!left_id.has_value() || !right_id.has_value() || !merged_id.has_value()) {
      return InvalidArgument(
          "{}: merge number {} (\"{}\" with \"{}\") must be two tokens of the vocabulary whose "
          "concatenation is one, too",
          name_, rank + 1, left, right);
    }
    encoder_->merges.Add(*left_id, *right_id, *merged_id, rank++);
  }
  return OkStatus();
}

Status Reader::ReadModel(const json& model) {
  // Old files of BPE carry no type.
  KV_ASSIGN_OR_RETURN(const std::string type, StringField(model, "type", "BPE", name_));
  if (type != "BPE") return Unsupported(name_, "model " + type);
  for (const std::string_view affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    KV_ASSIGN_OR_RETURN(const std::string value, StringField(model, affix, "", name_));
    if (!value.empty()) return Unsupported(name_, affix);
  }
  KV_ASSIGN_OR_RETURN(const double dropout, NumberField(model, "dropout", 0.0, 1.0, 0.0, name_));
  if (dropout != 0.0) return Unsupported(name_, "dropout");
  KV_ASSIGN_OR_RETURN(const bool ignore_merges, BooleanField(model, "ignore_merges", false, name_));
  if (ignore_merges) encoder_->whole_pieces = &parts_->vocabulary;
  KV_RETURN_IF_ERROR(ReadVocabulary(model));
  KV_RETURN_IF_ERROR(ReadSymbols(model));
  return ReadMerges(model);
}

Status Reader::ReadAddedTokens(const json& list) {
  if (!list.is_array()) return InvalidArgument("{}: \"added_tokens\" must be a list", name_);
  for (const json& entry : list) {
    const json* id = entry.is_object() ? FindField(entry, "id") : nullptr;
    if (id == nullptr) return InvalidArgument("{}: an added token has no id", name_);
    KV_ASSIGN_OR_RETURN(const std::string content, StringField(entry, "content", "", name_));
    if (content.empty()) continue;  // as tokenizers does
    if (!id->is_number_unsigned()) {
      return InvalidArgument("{}: the id of token \"{}\" must be an integer from 0 to {}", name_,
                             content, kMaxTokenId);
    }
    KV_RETURN_IF_ERROR(parts_->vocabulary.Add(content, id->get<uint64_t>(), false, name_));
    AddedToken token;
    token.id = id->get<int32_t>();
    KV_ASSIGN_OR_RETURN(token.lstrip, BooleanField(entry, "lstrip", false, name_));
    KV_ASSIGN_OR_RETURN(token.rstrip, BooleanField(entry, "rstrip", false, name_));
    KV_ASSIGN_OR_RETURN(token.single_word, BooleanField(entry, "single_word", false, name_));
    KV_ASSIGN_OR_RETURN(const bool special, BooleanField(entry, "special", false, name_));
    KV_ASSIGN_OR_RETURN(const bool normalized, BooleanField(entry, "normalized", !special, name_));
    parts_->vocabulary.tokens[static_cast<size_t>(token.id)].special = special;
    if (!normalized) {
      parts_->raw_added.Add(content, token);
      continue;
    }
    KV_ASSIGN_OR_RETURN(const std::string looked_for, parts_->normalizer->Apply(content));
    if (!looked_for.empty()) parts_->normalized_added.Add(looked_for, token);
    // Decoded as it is looked for (tokenizers, added_vocabulary.rs, simple_id_to_token).
    parts_->vocabulary.tokens[static_cast<size_t>(token.id)].bytes = looked_for;
  }
  return OkStatus();
}

Status Reader::ReadDecoderStep(const json& step) {
  const std::string type = TypeOf(step);
  DecodeRules& rules = parts_->decoding;
  if (type == "Fuse") {
    fused_ = true;
    return OkStatus();
  }
  if (type == "Strip") {
    KV_ASSIGN_OR_RETURN(rules.strip, StringField(step, "content", " ", name_));
    KV_ASSIGN_OR_RETURN(const int64_t start, IntegerField(step, "start", 0, kMaxStrip, 0, name_));
    KV_ASSIGN_OR_RETURN(const int64_t stop, IntegerField(step, "stop", 0, kMaxStrip, 0, name_));
    if (!fused_ || stop != 0 || rules.strip.empty() || rules.strip_count != 0) {
      return Unsupported(name_, "a decoder's Strip other than of a fused text's beginning");
    }
    rules.strip_count = static_cast<int>(start);
    return OkStatus();
  }
  if (fused_) return Unsupported(name_, "decoder " + type + " behind Fuse");
  if (type == "ByteLevel") {
    byte_level_ = true;
    return OkStatus();
  }
  if (type == "ByteFallback") {
    byte_fallback_ = true;
    return OkStatus();
  }
  if (byte_fallback_) return Unsupported(name_, "decoder " + type + " behind ByteFallback");
  if (type == "Metaspace") {
    KV_ASSIGN_OR_RETURN(const std::string replacement,
                        StringField(step, "replacement", kSpaceSymbol, name_));
    KV_ASSIGN_OR_RETURN(const bool prefix, BooleanField(step, "add_prefix_space", true, name_));
    KV_ASSIGN_OR_RETURN(const std::string scheme,
                        StringField(step, "prepend_scheme", prefix ? "always" : "never", name_));
    if (replacement.empty() || !replace_.empty()) {
      return Unsupported(name_, "decoder Metaspace behind another or without replacement");
    }
    if (scheme != "never") rules.drop_from_first = replacement;
    replace_.AddReplace(replacement, " ");
    return OkStatus();
  }
  if (type == "Replace") {
    const json* pattern = FindField(step, "pattern");
    const json* literal =
        pattern != nullptr && pattern->is_object() ? FindField(*pattern, "String") : nullptr;
    KV_ASSIGN_OR_RETURN(const std::string content, StringField(step, "content", "", name_));
    if (literal == nullptr || !literal->is_string() ||
        literal->get_ref<const std::string&>().empty() || content.size() > 16) {
      return Unsupported(name_, "a decoder's Replace other than of a String by a short one");
    }
    replace_.AddReplace(literal->get<std::string>(), content);
    return OkStatus();
  }
  return Unsupported(name_, "decoder " + (type.empty() ? "none" : type));
}

Status Reader::ReadDecoder() {
  const json* decoder = FindField(root_, "decoder");
  if (decoder == nullptr) return Unsupported(name_, "decoder none");
  std::vector<const json*> steps;
  KV_RETURN_IF_ERROR(Flatten(*decoder, "decoders", 0, name_, &steps));
  for (const json* step : steps) KV_RETURN_IF_ERROR(ReadDecoderStep(*step));
  if (byte_level_) {
    if (byte_fallback_ || !replace_.empty()) {
      return Unsupported(name_, "decoder ByteLevel with others");
    }
    ReadByteAlphabet(&parts_->vocabulary);
    return OkStatus();
  }
  parts_->decoding.bytes = DecodeRules::Bytes::kWholeRuns;
  for (Vocabulary::Token& token : parts_->vocabulary.tokens) {
    KV_ASSIGN_OR_RETURN(token.bytes, replace_.Apply(token.bytes));
    const auto byte = byte_fallback_ ? ByteOfToken(token.bytes) : std::nullopt;
    if (!byte.has_value()) continue;
    token.is_byte = true;
    token.bytes.assign(1, static_cast<char>(*byte));
  }
  return OkStatus();
}

Status Reader::ReadTemplate(const json& processor) {
  const json* single = FindField(processor, "single");
  const json* specials = FindField(processor, "special_tokens");
  if (single == nullptr || !single->is_array()) {
    return InvalidArgument("{}: TemplateProcessing needs a list \"single\"", name_);
  }
  int sequences = 0;
  for (const json& part : *single) {
    if (!part.is_object()) return InvalidArgument("{}: a part of \"single\" is no object", name_);
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
          "{}: TemplateProcessing: a special token of \"single\" is not in \"special_tokens\"",
          name_);
    }
    for (const json& value : *list) {
      if (!value.is_number_unsigned() ||
          value.get<uint64_t>() >= parts_->vocabulary.tokens.size()) {
        return InvalidArgument(
            "{}: TemplateProcessing: special token {} has an id outside the vocabulary", name_,
            id->get<std::string>());
      }
      (sequences == 0 ? parts_->before : parts_->after).push_back(value.get<int32_t>());
    }
  }
  if (sequences != 1) return Unsupported(name_, "a template with other than one sequence");
  return OkStatus();
}

Status Reader::ReadPostProcessor(const json& processor) {
  std::vector<const json*> processors;
  KV_RETURN_IF_ERROR(Flatten(processor, "processors", 0, name_, &processors));
  int templates = 0;
  for (const json* part : processors) {
    const std::string type = TypeOf(*part);
    if (type == "ByteLevel") continue;  // moves offsets, no ids
    if (type != "TemplateProcessing") return Unsupported(name_, "post-processor " + type);
    if (++templates > 1) return Unsupported(name_, "more than one TemplateProcessing");
    KV_RETURN_IF_ERROR(ReadTemplate(*part));
  }
  return OkStatus();
}

Result<std::unique_ptr<Tokenizer::Parts>> Reader::Run() {
  const json* model = root_.is_object() ? FindField(root_, "model") : nullptr;
  if (model == nullptr || !model->is_object()) {
    return InvalidArgument("{}: field \"model\" must be an object", name_);
  }
  const json none;
  const auto field = [&](std::string_view key) -> const json& {
    const json* found = FindField(root_, key);
    return found == nullptr ? none : *found;
  };
  KV_ASSIGN_OR_RETURN(parts_->normalizer, Normalizer::Parse(field("normalizer"), name_));
  KV_ASSIGN_OR_RETURN(encoder_->pre_tokenizer, PreTokenizer::Parse(field("pre_tokenizer"), name_));
  KV_RETURN_IF_ERROR(ReadModel(*model));
  const json& added = field("added_tokens");
  if (!added.is_null()) KV_RETURN_IF_ERROR(ReadAddedTokens(added));
  KV_RETURN_IF_ERROR(ReadDecoder());
  const json& processor = field("post_processor");
  if (!processor.is_null()) KV_RETURN_IF_ERROR(ReadPostProcessor(processor));
  parts_->encoder = std::move(encoder_);
  return std::move(parts_);
}

}  // namespace

Result<std::unique_ptr<Tokenizer>> Tokenizer::Parse(std::string_view text,
                                                    const std::string& name) {
  KV_ASSIGN_OR_RETURN(const json root, ParseJson(text, name));
  KV_ASSIGN_OR_RETURN(auto parts, Reader(root, name).Run());
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(parts)));
}

}  // namespace kvant::node
