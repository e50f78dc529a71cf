// Tokenizer::ParseSentencePiece: SentencePiece's models (Kudo and Richardson, 2018), read without
// its library: Debian's carries a protobuf of its own, whose exported names clash with the one that
// Kvant's messages are made with.
#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

#include "base/bytes.h"
#include "node/byte_trie.h"
#include "node/sentencepiece.pb.h"
#include "node/tokenizer_parts.h"
#include "node/utf8.h"

namespace kvant::node {
namespace {

using sentencepiece::Model;
using Piece = Model::Piece;

constexpr size_t kMaxPieceBytes = 1024;
constexpr size_t kMaxResultBytes = 256;  // NFKC's longest has 33
constexpr uint64_t kMaxMergeWork = uint64_t{1} << 31;
constexpr std::string_view kUnknownSurface = " \xE2\x81\x87 ";  // U+2047 between spaces
constexpr float kUnknownPenalty = 10.0F;  // below the least score (unigram_model.cc)

// The rules of a "precompiled_charsmap": which strings become which before encoding. A double-array
// trie (Darts-clone) in units of 4 bytes, and the results, each ended by a zero.
class CharactersMap {
 public:
  // False: the blob is malformed.
  bool Read(std::string_view blob) {
    if (blob.empty()) return true;
    if (blob.size() < 4) return false;
    const size_t trie_bytes = Unit(blob, 0);
    if (trie_bytes % 4 != 0 || !RangeFits(4, trie_bytes, blob.size())) return false;
    for (size_t i = 0; i < trie_bytes / 4; ++i) units_.push_back(Unit(blob, 4 + 4 * i));
    results_ = blob.substr(4 + trie_bytes);
    return !units_.empty();
  }

  struct Rule {
    size_t length = 0;  // 0: none
    std::string_view result;
  };
  // The longest rule for the beginning of `text`.
  Rule Longest(std::string_view text) const {
    Rule longest;
    if (units_.empty()) return longest;
    uint32_t node = Offset(units_[0]);
    for (size_t i = 0; i < text.size(); ++i) {
      const auto byte = static_cast<uint8_t>(text[i]);
      node ^= byte;
      if (node >= units_.size()) break;
      const uint32_t unit = units_[node];
      if ((unit & 0x800000FFU) != byte) break;
      node ^= Offset(unit);
      const bool has_leaf = ((unit >> 8) & 1) != 0;
      if (!has_leaf || node >= units_.size()) continue;
      const size_t begin = units_[node] & 0x7FFFFFFFU;
      if (begin >= results_.size()) continue;
      const size_t end = std::min(results_.find('\0', begin), results_.size());
      if (end - begin > kMaxResultBytes) continue;
      longest = {i + 1, std::string_view(results_).substr(begin, end - begin)};
    }
    return longest;
  }

 private:
  static uint32_t Unit(std::string_view blob, size_t at) {
    uint32_t unit = 0;
    for (size_t i = 0; i < 4; ++i) {
      unit |= uint32_t{static_cast<uint8_t>(blob[at + i])} << (8 * i);
    }
    return unit;
  }
  static uint32_t Offset(uint32_t unit) { return (unit >> 10) << ((unit & (1U << 9)) >> 6); }

  std::vector<uint32_t> units_;
  std::string results_;
};

// SentencePiece's own normalizer (normalizer.cc).
struct SpaceRules {
  std::string Normalize(std::string_view text) const;
  std::pair<size_t, std::string_view> Prefix(std::string_view text) const;

  CharactersMap characters;
  ByteTrie verbatim;  // user-defined symbols
  bool add_dummy_prefix = true;
  bool remove_extra = true;
  std::string space;  // what a space becomes
};

// How much of the beginning of `text` becomes what.
std::pair<size_t, std::string_view> SpaceRules::Prefix(std::string_view text) const {
  const size_t symbol = verbatim.Longest(text, 0).length;
  if (symbol > 0) return {symbol, text.substr(0, symbol)};
  const CharactersMap::Rule rule = characters.Longest(text);
  if (rule.length > 0) return {rule.length, rule.result};
  const size_t bytes = Utf8At(text, 0).bytes;
  return {bytes, text.substr(0, bytes)};
}

std::string SpaceRules::Normalize(std::string_view text) const {
  while (remove_extra && !text.empty()) {
    const auto [bytes, result] = Prefix(text);
    if (result != " ") break;
    text.remove_prefix(bytes);
  }
  std::string normalized;
  if (text.empty()) return normalized;
  normalized.reserve(text.size() * 3 / 2);
  if (add_dummy_prefix) normalized += space;
  bool after_space = remove_extra;
  while (!text.empty()) {
    auto [bytes, result] = Prefix(text);
    text.remove_prefix(bytes);
    while (after_space && result.starts_with(' ')) result.remove_prefix(1);
    for (const char byte : result) {
      if (byte == ' ') {
        normalized += space;
      } else {
        normalized += byte;
      }
    }
    if (!result.empty()) after_space = result.ends_with(' ');
    after_space &= remove_extra;
  }
  while (remove_extra && normalized.ends_with(space)) {
    normalized.resize(normalized.size() - space.size());
  }
  return normalized;
}

// What both kinds of model share: normalizing, and how unknown characters are written.
class SentencePieceEncoder : public TextEncoder {
 public:
  Status Encode(std::string_view text, bool /*at_start*/, std::vector<int32_t>* ids) const final {
    const std::string normalized = spaces.Normalize(text);
    EncodeNormalized(normalized, ids);
    return OkStatus();
  }

  SpaceRules spaces;
  int32_t unknown = 0;
  std::array<int32_t, 256> bytes{};
  bool byte_fallback = false;

 protected:
  virtual void EncodeNormalized(std::string_view text, std::vector<int32_t>* ids) const = 0;
  // Appends an unknown part; adjacent ones are one token (`after_unknown`: the last one was such).
  void PushUnknown(std::string_view part, bool after_unknown, std::vector<int32_t>* ids) const {
    if (byte_fallback) {
      for (const char byte : part) ids->push_back(bytes[static_cast<uint8_t>(byte)]);
    } else if (!after_unknown) {
      ids->push_back(unknown);
    }
  }
};

// bpe_model.cc: the pair whose concatenation scores best is merged first, the leftmost of equal.
class BpeModel final : public SentencePieceEncoder {
 public:
  // Ids from `own` on stand for characters that are no piece, but parts of one.
  void AddCharacter(char32_t character, int32_t id) { characters_.emplace(character, id); }
  int32_t own = 0;
  BpeMerges merges;
  ByteTrie user_defined;

 private:
  void EncodeNormalized(std::string_view text, std::vector<int32_t>* ids) const override {
    Run run;
    for (size_t at = 0; at < text.size();) {
      const ByteTrie::Match symbol = user_defined.Longest(text, at);
      if (symbol.value >= 0) {
        Flush(&run, ids);
        ids->push_back(symbol.value);
        run.after_unknown = false;
        at += symbol.length;
        continue;
      }
      const Utf8Unit unit = Utf8At(text, at);
      const auto found = characters_.find(unit.code_point);
      // A character that is part of no piece merges with nothing: any id of its own will do.
      run.symbols.push_back(found == characters_.end() ? kNoPiece : found->second);
      run.characters.push_back(text.substr(at, unit.bytes));
      at += unit.bytes;
    }
    Flush(&run, ids);
  }

  static constexpr int32_t kNoPiece = std::numeric_limits<int32_t>::max();
  // Characters that may merge with one another.
  struct Run {
    std::vector<int32_t> symbols;
    std::vector<std::string_view> characters;
    bool after_unknown = false;
  };
  void Flush(Run* run, std::vector<int32_t>* ids) const {
    std::vector<int32_t> merged;
    merges.Merge(run->symbols, &merged);
    // Which characters an unknown symbol stands for: unknown ones never merge out of sight, so the
    // next unmerged occurrence of the symbol is it.
    size_t at = 0;
    for (const int32_t id : merged) {
      if (id < own) {
        ids->push_back(id);
        run->after_unknown = false;
        continue;
      }
      while (run->symbols[at] != id) ++at;
      PushUnknown(run->characters[at++], run->after_unknown, ids);
      run->after_unknown = true;
    }
    run->symbols.clear();
    run->characters.clear();
  }

  std::unordered_map<char32_t, int32_t> characters_;
};

// unigram_model.cc, EncodeOptimized: the sequence of pieces with the greatest sum of scores.
class UnigramModel final : public SentencePieceEncoder {
 public:
  ByteTrie pieces;
  std::vector<double> scores;  // [id]; of a user-defined symbol negative infinity
  float least_score = FLT_MAX;
  float greatest_score = std::numeric_limits<float>::lowest();

 private:
  void EncodeNormalized(std::string_view text, std::vector<int32_t>* ids) const override {
    // The best way to each place. Sums are rounded to float, as there.
    struct Best {
      float score = 0;
      int32_t id = -1;
      size_t begin = 0;
      bool reached = false;
    };
    std::vector<Best> best(text.size() + 1);
    const float unknown_score = least_score - kUnknownPenalty;
    const auto offer = [&](size_t begin, size_t end, float sum, int32_t id) {
      if (best[end].reached && sum <= best[end].score) return;
      best[end] = {static_cast<float>(sum), id, begin, true};
    };
    for (size_t at = 0; at < text.size();) {
      const size_t character = Utf8At(text, at).bytes;
      bool single = false;  // the character is a piece
      pieces.ForEach(text, at, [&](size_t length, int32_t id) {
        double score = scores[static_cast<size_t>(id)];
        if (std::isinf(score)) score = static_cast<float>(length) * greatest_score - 0.1;
        offer(at, at + length, score + best[at].score, id);
        single |= length == character;
      });
      if (!single) offer(at, at + character, unknown_score + best[at].score, unknown);
      at += character;
    }
    std::vector<std::pair<size_t, size_t>> path;
    for (size_t end = text.size(); end > 0; end = best[end].begin) {
      path.emplace_back(best[end].begin, end);
    }
    bool after_unknown = false;
    for (auto part = path.rbegin(); part != path.rend(); ++part) {
      const int32_t id = best[part->second].id;
      const bool is_unknown = id == unknown;
      if (is_unknown) {
        PushUnknown(text.substr(part->first, part->second - part->first), after_unknown, ids);
      } else {
        ids->push_back(id);
      }
      after_unknown = is_unknown;
    }
  }
};

// Reads a model into a Tokenizer::Parts. Single-owner, used once.
class Reader {
 public:
  Reader(const Model& model, const std::string& name) : model_(model), name_(name) {}
  Result<std::unique_ptr<Tokenizer::Parts>> Run(bool add_bos, bool add_eos);

 private:
  using Type = Piece::Type;
  Status ReadVocabulary();
  Status ReadSpaces(SentencePieceEncoder* encoder);
  Status ReadBytes(SentencePieceEncoder* encoder);
  void ReadDecoding();
  Status CheckMergeWork() const;
  std::unique_ptr<SentencePieceEncoder> MakeBpe() const;
  std::unique_ptr<SentencePieceEncoder> MakeUnigram() const;
  Type TypeOf(int32_t id) const { return model_.pieces(id).type(); }

  const Model& model_;
  const std::string& name_;
  int32_t unknown_ = -1;
  std::unique_ptr<Tokenizer::Parts> parts_ = std::make_unique<Tokenizer::Parts>();
};

Status Reader::ReadVocabulary() {
  Vocabulary& vocabulary = parts_->vocabulary;
  const auto count = static_cast<int64_t>(model_.pieces_size());
  if (count > kMaxTokenId + 1) {
    return InvalidArgument("{}: the model has {} pieces; at most {} are read", name_, count,
                           kMaxTokenId + 1);
  }
  vocabulary.tokens.resize(static_cast<size_t>(count));
  vocabulary.ids.reserve(static_cast<size_t>(count));
  for (int32_t id = 0; id < count; ++id) {
    const Piece& piece = model_.pieces(id);
    const std::string& written = piece.piece();
    if (written.empty() || written.size() > kMaxPieceBytes ||
        FindInvalidUtf8(written).has_value() || !std::isfinite(piece.score())) {
      return InvalidArgument(
          "{}: piece {} must be UTF-8 of 1 to {} bytes with a score that is a number", name_, id,
          kMaxPieceBytes);
    }
    if (vocabulary.ids.contains(written)) {
      return InvalidArgument("{}: the piece \"{}\" stands there twice", name_, written);
    }
    KV_RETURN_IF_ERROR(vocabulary.Add(written, static_cast<uint64_t>(id), true, name_));
    if (piece.type() == Piece::UNKNOWN) {
      if (unknown_ >= 0) return InvalidArgument("{}: two pieces are the unknown one", name_);
      unknown_ = id;
    }
    if (piece.type() == Piece::CONTROL) {
      AddedToken added;
      added.id = id;
      parts_->raw_added.Add(written, added);
    }
  }
  if (unknown_ < 0) return InvalidArgument("{}: no piece is the unknown one", name_);
  return OkStatus();
}

Status Reader::ReadSpaces(SentencePieceEncoder* encoder) {
  const Model::Normalizer& rules = model_.normalizer_spec();
  if (model_.trainer_spec().treat_whitespace_as_suffix() ||
      !model_.denormalizer_spec().precompiled_charsmap().empty()) {
    return MakeStatus(StatusCode::kUnsupported,
                      "{}: SentencePiece's treat_whitespace_as_suffix and denormalizers are not "
                      "supported; supported are models that write a space before a word and none "
                      "of them",
                      name_);
  }
  if (!encoder->spaces.characters.Read(rules.precompiled_charsmap())) {
    return InvalidArgument("{}: the rules for characters (precompiled_charsmap) are malformed",
                           name_);
  }
  encoder->spaces.add_dummy_prefix = rules.add_dummy_prefix();
  encoder->spaces.remove_extra = rules.remove_extra_whitespaces();
  encoder->spaces.space = rules.escape_whitespaces() ? kSpaceSymbol : " ";
  for (int32_t id = 0; id < model_.pieces_size(); ++id) {
    if (TypeOf(id) == Piece::USER_DEFINED) {
      encoder->spaces.verbatim.Add(model_.pieces(id).piece(), id);
    }
  }
  return OkStatus();
}

Status Reader::ReadBytes(SentencePieceEncoder* encoder) {
  encoder->unknown = unknown_;
  encoder->byte_fallback = model_.trainer_spec().byte_fallback();
  for (int byte = 0; encoder->byte_fallback && byte < 256; ++byte) {
    const auto id = parts_->vocabulary.IdOf(TokenOfByte(static_cast<uint8_t>(byte)));
    if (!id.has_value() || TypeOf(*id) != Piece::BYTE) {
      return InvalidArgument("{}: byte_fallback without a piece for byte 0x{:02x}", name_, byte);
    }
    encoder->bytes[static_cast<size_t>(byte)] = *id;
  }
  return OkStatus();
}

Status Reader::CheckMergeWork() const {
  uint64_t work = 0;
  for (const Piece& piece : model_.pieces()) work += piece.piece().size() * piece.piece().size();
  if (work <= kMaxMergeWork) return OkStatus();
  return InvalidArgument("{}: the pieces are too long to look for the ways to merge them", name_);
}

std::unique_ptr<SentencePieceEncoder> Reader::MakeBpe() const {
  auto model = std::make_unique<BpeModel>();
  const int32_t count = model_.pieces_size();
  int32_t next_own = count;
  model->own = count;
  const auto mergeable = [&](int32_t id) { return TypeOf(id) == Piece::NORMAL; };
  // The symbol that a part of a piece is; -1 when it cannot occur.
  std::unordered_map<char32_t, int32_t> own;
  const auto symbol_of = [&](std::string_view part) -> int32_t {
    const auto id = parts_->vocabulary.IdOf(part);
    if (id.has_value() && mergeable(*id)) return *id;
    const Utf8Unit unit = Utf8At(part, 0);
    if (unit.bytes != part.size()) return -1;
    const auto [entry, added] = own.try_emplace(unit.code_point, next_own);
    if (added) model->AddCharacter(unit.code_point, next_own++);
    return entry->second;
  };
  std::vector<int32_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  const auto score = [&](int32_t id) { return model_.pieces(id).score(); };
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return score(a) > score(b); });
  model->merges.Reserve(2 * order.size());
  int32_t rank = 0;  // equal scores have one
  for (size_t i = 0; i < order.size(); ++i) {
    const int32_t id = order[i];
    if (i > 0 && score(order[i - 1]) != score(id)) ++rank;
    const std::string_view piece = model_.pieces(id).piece();
    if (TypeOf(id) == Piece::USER_DEFINED) model->user_defined.Add(piece, id);
    if (!mergeable(id)) continue;
    const Utf8Unit first = Utf8At(piece, 0);
    if (first.bytes == piece.size()) model->AddCharacter(first.code_point, id);
    for (size_t at = first.bytes; at < piece.size(); at += Utf8At(piece, at).bytes) {
      const int32_t left = symbol_of(piece.substr(0, at));
      const int32_t right = left < 0 ? -1 : symbol_of(piece.substr(at));
      if (right >= 0) model->merges.Add(left, right, id, rank);
    }
  }
  return model;
}

std::unique_ptr<SentencePieceEncoder> Reader::MakeUnigram() const {
  auto model = std::make_unique<UnigramModel>();
  for (int32_t id = 0; id < model_.pieces_size(); ++id) {
    const Piece& piece = model_.pieces(id);
    const bool user_defined = piece.type() == Piece::USER_DEFINED;
    model->scores.push_back(user_defined ? -std::numeric_limits<double>::infinity()
                                         : double{piece.score()});
    if (piece.type() == Piece::NORMAL) {
      model->least_score = std::min(model->least_score, piece.score());
      model->greatest_score = std::max(model->greatest_score, piece.score());
    }
    if (user_defined || piece.type() == Piece::NORMAL) model->pieces.Add(piece.piece(), id);
  }
  return model;
}

void Reader::ReadDecoding() {
  const Model::Normalizer& spaces = model_.normalizer_spec();
  DecodeRules& rules = parts_->decoding;
  rules.bytes = DecodeRules::Bytes::kRuns;
  rules.strip_token = spaces.add_dummy_prefix() || spaces.remove_extra_whitespaces();
  rules.strip_each = spaces.remove_extra_whitespaces();
  for (int32_t id = 0; id < model_.pieces_size(); ++id) {
    Vocabulary::Token& token = parts_->vocabulary.tokens[static_cast<size_t>(id)];
    const Type type = TypeOf(id);
    const auto byte = type == Piece::BYTE ? ByteOfToken(token.written) : std::nullopt;
    token.special = type == Piece::CONTROL;
    token.unknown = type == Piece::UNKNOWN;
    token.is_byte = byte.has_value();
    token.bytes.clear();
    if (token.is_byte) {
      token.bytes.push_back(static_cast<char>(*byte));
    } else if (token.unknown) {
      token.bytes = model_.trainer_spec().has_unk_surface() ? model_.trainer_spec().unk_surface()
                                                            : std::string(kUnknownSurface);
    } else {
      std::string_view left = token.written;
      for (size_t at = left.find(kSpaceSymbol); at != std::string_view::npos;
           at = left.find(kSpaceSymbol)) {
        token.bytes += left.substr(0, at);
        token.bytes += ' ';
        left.remove_prefix(at + kSpaceSymbol.size());
      }
      token.bytes += left;
    }
  }
}

Result<std::unique_ptr<Tokenizer::Parts>> Reader::Run(bool add_bos, bool add_eos) {
  KV_RETURN_IF_ERROR(ReadVocabulary());
  if (FindInvalidUtf8(model_.trainer_spec().unk_surface()).has_value()) {
    return InvalidArgument("{}: unk_surface is not UTF-8", name_);
  }
  std::unique_ptr<SentencePieceEncoder> encoder;
  const auto type = model_.trainer_spec().model_type();
  const bool has_unused =
      std::any_of(model_.pieces().begin(), model_.pieces().end(),
                  [](const Piece& piece) { return piece.type() == Piece::UNUSED; });
  if (type == Model::Trainer::BPE && !has_unused) {
    KV_RETURN_IF_ERROR(CheckMergeWork());
    encoder = MakeBpe();
  } else if (type == Model::Trainer::UNIGRAM) {
    encoder = MakeUnigram();
  } else {
    return MakeStatus(
        StatusCode::kUnsupported,
        "{}: a SentencePiece model of words or characters, or BPE with unused pieces, "
        "is not supported; supported are unigram and BPE",
        name_);
  }
  KV_RETURN_IF_ERROR(ReadSpaces(encoder.get()));
  KV_RETURN_IF_ERROR(ReadBytes(encoder.get()));
  ReadDecoding();
  // A control piece of that name, as in SentencePieceProcessor::bos_id.
  const auto around = [&](bool wanted, const std::string& written, std::string_view absent,
                          std::vector<int32_t>* ids) {
    const auto id = parts_->vocabulary.IdOf(written.empty() ? absent : written);
    if (wanted && id.has_value() && TypeOf(*id) == Piece::CONTROL) ids->push_back(*id);
  };
  around(add_bos, model_.trainer_spec().bos_piece(), "<s>", &parts_->before);
  around(add_eos, model_.trainer_spec().eos_piece(), "</s>", &parts_->after);
  parts_->encoder = std::move(encoder);
  return std::move(parts_);
}

}  // namespace

Result<std::unique_ptr<Tokenizer>> Tokenizer::ParseSentencePiece(std::string_view proto,
                                                                 bool add_bos, bool add_eos,
                                                                 const std::string& name) {
  Model model;
  if (proto.size() > static_cast<size_t>(std::numeric_limits<int>::max()) ||
      !model.ParseFromArray(proto.data(), static_cast<int>(proto.size())) ||
      model.pieces_size() == 0) {
    return InvalidArgument(
        "{}: this is not a SentencePiece model; a tokenizer.model of another kind is not read: "
        "put the model's tokenizer.json beside it",
        name);
  }
  KV_ASSIGN_OR_RETURN(auto parts, Reader(model, name).Run(add_bos, add_eos));
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(parts)));
}

}  // namespace kvant::node
