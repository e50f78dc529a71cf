#include "node/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <utility>

#include "node/json.h"
#include "node/pattern.h"
#include "node/utf8.h"

namespace kvant::node {
namespace {

using nlohmann::json;

constexpr int kMaxDepth = 8;
constexpr size_t kMaxSteps = 64;
// A hostile file must not make gigabytes out of a text.
constexpr size_t kMaxContentBytes = 256;
constexpr size_t kMaxGrowth = 64;

Status Unsupported(const std::string& name, const std::string& what) {
  return MakeStatus(StatusCode::kUnsupported,
                    "{}: normalizer {} is not supported; supported: NFC, NFD, NFKC, NFKD, Replace, "
                    "Prepend, Lowercase, Strip, and a Sequence of them",
                    name, what);
}

// Characters that combine or decompose since versions of Unicode after 9.0. The normal forms of
// `tokenizers` are those of 9.0, in which these stand for themselves and combine with nothing.
// Found by comparing all code points; U+11930 stands for the pair that U+11938 decomposes into.
constexpr std::pair<char32_t, char32_t> kSinceUnicode9[] = {
    {0x07FD, 0x07FD},   {0x0898, 0x089F},   {0x08CA, 0x08D3},   {0x09FE, 0x09FE},
    {0x0C3C, 0x0C3C},   {0x0D3B, 0x0D3C},   {0x0EBA, 0x0EBA},   {0x1715, 0x1715},
    {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},   {0x32FF, 0x32FF},   {0xA7F2, 0xA7F4},
    {0xA82C, 0xA82C},   {0xAB69, 0xAB69},   {0x10781, 0x10785}, {0x10787, 0x107B0},
    {0x107B2, 0x107BA}, {0x10D24, 0x10D27}, {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF},
    {0x10F46, 0x10F50}, {0x10F82, 0x10F85}, {0x11070, 0x11070}, {0x1133B, 0x1133B},
    {0x1145E, 0x1145E}, {0x11839, 0x1183A}, {0x11930, 0x11930}, {0x11938, 0x11938},
    {0x1193D, 0x1193E}, {0x11943, 0x11943}, {0x119E0, 0x119E0}, {0x11A34, 0x11A34},
    {0x11A47, 0x11A47}, {0x11A99, 0x11A99}, {0x11D42, 0x11D42}, {0x11D44, 0x11D45},
    {0x11D97, 0x11D97}, {0x11F41, 0x11F42}, {0x16FF0, 0x16FF1}, {0x1E030, 0x1E06D},
    {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE}, {0x1E2EC, 0x1E2EF},
    {0x1E4EC, 0x1E4EF}, {0x1F16C, 0x1F16C}, {0x1FBF0, 0x1FBF9}};

bool IsSinceUnicode9(char32_t c) {
  const auto* range = std::upper_bound(
      std::begin(kSinceUnicode9), std::end(kSinceUnicode9), c,
      [](char32_t value, const auto& candidate) { return value < candidate.first; });
  return range != std::begin(kSinceUnicode9) && c <= std::prev(range)->second;
}

std::string Lower(std::string_view text) {
  std::string lower;
  lower.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const Utf8Unit unit = Utf8At(text, at);
    at += unit.bytes;
    if (unit.code_point == 0x130) {  // the only one whose small form is two characters
      lower += "i\xCC\x87";
    } else {
      AppendUtf8(
          static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(unit.code_point))),
          &lower);
    }
  }
  return lower;
}

// Appends decomposed characters in canonical order, composed or not, and clears them. Not left to
// utf8proc_decompose, which is quadratic in a run of marks.
void AppendOrdered(bool compose, std::vector<utf8proc_int32_t>* points, std::string* out) {
  const auto combining_class = [](utf8proc_int32_t c) {
    return utf8proc_get_property(c)->combining_class;
  };
  for (auto begin = points->begin(); begin != points->end();) {
    if (combining_class(*begin) == 0) {
      ++begin;
      continue;
    }
    const auto end = std::find_if(begin, points->end(),
                                  [&](utf8proc_int32_t c) { return combining_class(c) == 0; });
    std::stable_sort(begin, end, [&](utf8proc_int32_t a, utf8proc_int32_t b) {
      return combining_class(a) < combining_class(b);
    });
    begin = end;
  }
  auto length = static_cast<utf8proc_ssize_t>(points->size());
  if (compose) {
    length = utf8proc_normalize_utf32(
        points->data(), length, static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  }
  KV_CHECK(length >= 0 && static_cast<size_t>(length) <= points->size());
  for (utf8proc_ssize_t i = 0; i < length; ++i) {
    AppendUtf8(static_cast<char32_t>((*points)[static_cast<size_t>(i)]), out);
  }
  points->clear();
}

}  // namespace

std::string NormalizeUnicode(std::string_view text, UnicodeForm form) {
  const bool compose = form == UnicodeForm::kNfc || form == UnicodeForm::kNfkc;
  const bool compatible = form == UnicodeForm::kNfkc || form == UnicodeForm::kNfkd;
  // Nothing below combines, and with NFC nothing below U+0300 changes.
  const uint8_t first_changed = form == UnicodeForm::kNfc ? 0xCC : 0x80;
  if (std::all_of(text.begin(), text.end(),
                  [&](char byte) { return static_cast<uint8_t>(byte) < first_changed; })) {
    return std::string(text);
  }
  const auto options = static_cast<utf8proc_option_t>(
      UTF8PROC_STABLE | (compose ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE) |
      (compatible ? UTF8PROC_COMPAT : 0));
  std::string normalized;
  normalized.reserve(text.size());
  std::vector<utf8proc_int32_t> points;           // decomposed, not yet in order
  std::array<utf8proc_int32_t, 64> decomposed{};  // the longest decomposition has 18 characters
  for (size_t at = 0; at < text.size();) {
    const Utf8Unit unit = Utf8At(text, at);
    at += unit.bytes;
    if (IsSinceUnicode9(unit.code_point)) {
      AppendOrdered(compose, &points, &normalized);
      AppendUtf8(unit.code_point, &normalized);
      continue;
    }
    int boundary = 0;
    const auto count =
        utf8proc_decompose_char(static_cast<utf8proc_int32_t>(unit.code_point), decomposed.data(),
                                decomposed.size(), options, &boundary);
    KV_CHECK(count >= 0 && static_cast<size_t>(count) <= decomposed.size());
    points.insert(points.end(), decomposed.begin(), decomposed.begin() + count);
  }
  AppendOrdered(compose, &points, &normalized);
  return normalized;
}

struct Normalizer::Step {
  enum class Kind : uint8_t { kForm, kReplace, kReplaceLiteral, kPrepend, kLowercase, kStrip };
  Kind kind = Kind::kForm;
  UnicodeForm form = UnicodeForm::kNfc;
  std::unique_ptr<Pattern> pattern;  // of kReplace
  std::string literal;               // of kReplaceLiteral
  std::string content;               // of both, and of kPrepend
  bool left = false;                 // of kStrip
  bool right = false;
};

Normalizer::Normalizer() = default;
Normalizer::~Normalizer() = default;

Result<std::unique_ptr<Normalizer>> Normalizer::Parse(const json& description,
                                                      const std::string& name) {
  auto result = std::make_unique<Normalizer>();
  if (!description.is_null()) KV_RETURN_IF_ERROR(result->Add(description, 0, name));
  return result;
}

void Normalizer::AddReplace(std::string literal, std::string replacement) {
  Step& step = steps_.emplace_back();
  step.kind = Step::Kind::kReplaceLiteral;
  step.literal = std::move(literal);
  step.content = std::move(replacement);
}

Status Normalizer::Add(const json& description, int depth, const std::string& name) {
  if (!description.is_object()) return InvalidArgument("{}: a normalizer must be an object", name);
  if (depth > kMaxDepth || steps_.size() >= kMaxSteps) {
    return Unsupported(name, "with more than 8 levels or 64 steps");
  }
  KV_ASSIGN_OR_RETURN(const std::string type, StringField(description, "type", "", name));
  if (type == "Sequence") {
    const json* list = FindField(description, "normalizers");
    if (list == nullptr || !list->is_array()) {
      return InvalidArgument("{}: normalizer Sequence needs a list \"normalizers\"", name);
    }
    for (const json& part : *list) KV_RETURN_IF_ERROR(Add(part, depth + 1, name));
    return OkStatus();
  }
  Step step;
  constexpr std::pair<std::string_view, UnicodeForm> kForms[] = {{"NFC", UnicodeForm::kNfc},
                                                                 {"NFD", UnicodeForm::kNfd},
                                                                 {"NFKC", UnicodeForm::kNfkc},
                                                                 {"NFKD", UnicodeForm::kNfkd}};
  const auto* form = std::find_if(std::begin(kForms), std::end(kForms),
                                  [&](const auto& entry) { return entry.first == type; });
  if (form != std::end(kForms)) {
    step.form = form->second;
  } else if (type == "Lowercase") {
    step.kind = Step::Kind::kLowercase;
  } else if (type == "Strip") {
    step.kind = Step::Kind::kStrip;
    KV_ASSIGN_OR_RETURN(step.left, BooleanField(description, "strip_left", true, name));
    KV_ASSIGN_OR_RETURN(step.right, BooleanField(description, "strip_right", true, name));
  } else if (type == "Prepend") {
    step.kind = Step::Kind::kPrepend;
    KV_ASSIGN_OR_RETURN(step.content, StringField(description, "prepend", "", name));
  } else if (type == "Replace") {
    KV_ASSIGN_OR_RETURN(step.content, StringField(description, "content", "", name));
    const json* pattern = FindField(description, "pattern");
    const bool one = pattern != nullptr && pattern->is_object() && pattern->size() == 1 &&
                     pattern->begin()->is_string();
    const std::string kind = one ? pattern->begin().key() : "";
    if (kind != "String" && kind != "Regex") {
      return InvalidArgument("{}: normalizer Replace needs a \"pattern\" with a Regex or a String",
                             name);
    }
    const auto& text = pattern->begin()->get_ref<const std::string&>();
    if (text.empty()) return InvalidArgument("{}: normalizer Replace: its pattern is empty", name);
    if (kind == "String") {
      step.kind = Step::Kind::kReplaceLiteral;
      step.literal = text;
    } else {
      step.kind = Step::Kind::kReplace;
      KV_ASSIGN_OR_RETURN(step.pattern, Pattern::Compile(text, Pattern::Syntax::kOniguruma, name));
    }
  } else {
    return Unsupported(name, type.empty() ? "without a type" : type);
  }
  if (step.content.size() > kMaxContentBytes) {
    return Unsupported(name, type + " with more than 256 bytes");
  }
  steps_.push_back(std::move(step));
  return OkStatus();
}

Result<std::string> Normalizer::Apply(std::string_view text) const {
  std::string now(text);
  std::vector<PatternSpan> spans;
  const size_t limit = text.size() * kMaxGrowth + kMaxSteps * kMaxContentBytes;
  for (const Step& step : steps_) {
    std::string next;
    switch (step.kind) {
      case Step::Kind::kForm:
        now = NormalizeUnicode(now, step.form);
        break;
      case Step::Kind::kLowercase:
        now = Lower(now);
        break;
      case Step::Kind::kPrepend:
        if (!now.empty()) now.insert(0, step.content);
        break;
      case Step::Kind::kStrip:
        now = std::string(StripSpace(now, step.left, step.right));
        break;
      case Step::Kind::kReplace:
        KV_RETURN_IF_ERROR(step.pattern->Scan(now, &spans));
        for (const PatternSpan& span : spans) {
          if (span.is_match) {
            next += step.content;
          } else {
            next.append(now, span.begin, span.end - span.begin);
          }
        }
        now = std::move(next);
        break;
      case Step::Kind::kReplaceLiteral:
        next.reserve(now.size());
        for (size_t from = 0; from < now.size();) {
          const size_t found = std::min(now.find(step.literal, from), now.size());
          next.append(now, from, found - from);
          if (found < now.size()) next += step.content;
          from = found + step.literal.size();
        }
        now = std::move(next);
        break;
    }
    if (now.size() > limit) {
      return InvalidArgument(
          "encoding a text of {} bytes: the tokenizer's normalizer makes more than {} bytes of it",
          text.size(), limit);
    }
  }
  return now;
}

}  // namespace kvant::node
