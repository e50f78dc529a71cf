#include "node/pre_tokenizer.h"

#include <algorithm>
#include <utility>

#include "node/json.h"
#include "node/utf8.h"

namespace kvant::node {
namespace {

using nlohmann::json;

constexpr int kMaxDepth = 8;
constexpr size_t kMaxSteps = 64;
constexpr std::string_view kMetaspace = "\xE2\x96\x81";  // U+2581

// GPT-2's pattern, which ByteLevel applies with use_regex (tokenizers, byte_level.rs).
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
// Rust's \w+|[^\w\s]+ (tokenizers, whitespace.rs), for PCRE2.
constexpr std::string_view kWordsPattern =
    R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]+|)"
    R"([^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}\p{White_Space}]+)";
constexpr std::string_view kPunctuationPattern = R"([!-/:-@\[-`{-~\p{P}])";

Status Unsupported(const std::string& name, std::string_view what) {
  return MakeStatus(StatusCode::kUnsupported,
                    "{}: pre-tokenizer: {} is not supported; supported: Split, Digits, Metaspace, "
                    "Whitespace, WhitespaceSplit, Punctuation, ByteLevel, and a Sequence of them "
                    "in which nothing stands behind ByteLevel",
                    name, what);
}

// Both spellings: of Split ("MergedWithNext"), and of Python's constructors.
Result<SplitBehavior> ParseBehavior(const std::string& text, const std::string& name) {
  constexpr std::pair<std::string_view, SplitBehavior> kBehaviors[] = {
      {"Isolated", SplitBehavior::kIsolated},
      {"Removed", SplitBehavior::kRemoved},
      {"Contiguous", SplitBehavior::kContiguous},
      {"MergedWithPrevious", SplitBehavior::kMergedWithPrevious},
      {"MergedWithNext", SplitBehavior::kMergedWithNext}};
  for (const auto& [written, behavior] : kBehaviors) {
    if (text == written) return behavior;
  }
  return Unsupported(name, "the behavior \"" + text + "\"");
}

// Puts the spans of one text together as `behavior` says (tokenizers, normalizer.rs, split).
void ApplyBehavior(SplitBehavior behavior, std::vector<PatternSpan>* spans) {
  std::vector<PatternSpan> result;
  bool previous_match = false;
  switch (behavior) {
    case SplitBehavior::kIsolated:
      return;
    case SplitBehavior::kRemoved:
      std::erase_if(*spans, [](const PatternSpan& span) { return span.is_match; });
      return;
    case SplitBehavior::kContiguous:
      for (const PatternSpan& span : *spans) {
        if (!result.empty() && result.back().is_match == span.is_match) {
          result.back().end = span.end;
        } else {
          result.push_back(span);
        }
      }
      break;
    case SplitBehavior::kMergedWithPrevious:
      for (const PatternSpan& span : *spans) {
        if (span.is_match && !previous_match && !result.empty()) {
          result.back().end = span.end;
        } else {
          result.push_back(span);
        }
        previous_match = span.is_match;
      }
      break;
    case SplitBehavior::kMergedWithNext:
      for (auto span = spans->rbegin(); span != spans->rend(); ++span) {
        if (span->is_match && !previous_match && !result.empty()) {
          result.back().begin = span->begin;
        } else {
          result.push_back(*span);
        }
        previous_match = span->is_match;
      }
      std::reverse(result.begin(), result.end());
      break;
  }
  *spans = std::move(result);
}

}  // namespace

// One transformation of the list of pieces.
struct PreTokenizer::Step {
  enum class Kind : uint8_t { kSplit, kPrefixSpace, kMetaspace };
  enum class Prepend : uint8_t { kAlways, kFirst, kNever };
  Kind kind = Kind::kSplit;
  std::unique_ptr<Pattern> pattern;  // of kSplit, and of a kMetaspace that cuts
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;
  Prepend prepend = Prepend::kAlways;  // of kMetaspace
  std::string replacement = std::string(kMetaspace);
};

PreTokenizer::PreTokenizer() = default;
PreTokenizer::~PreTokenizer() = default;

Result<std::unique_ptr<PreTokenizer>> PreTokenizer::Parse(const json& description,
                                                          const std::string& name) {
  auto result = std::make_unique<PreTokenizer>();
  if (!description.is_null()) KV_RETURN_IF_ERROR(result->Add(description, 0, name));
  return result;
}

Status PreTokenizer::Add(const json& description, int depth, const std::string& name) {
  if (!description.is_object()) {
    return InvalidArgument("{}: a pre-tokenizer must be an object", name);
  }
  if (byte_level_) return Unsupported(name, "a step behind ByteLevel");
  if (depth > kMaxDepth || steps_.size() >= kMaxSteps) {
    return Unsupported(name, "one with more than 8 levels or 64 steps");
  }
  KV_ASSIGN_OR_RETURN(const std::string type, StringField(description, "type", "", name));
  if (type == "Split") return ParseSplit(description, name);
  if (type == "Metaspace") return ParseMetaspace(description, name);
  if (type == "Digits") {
    KV_ASSIGN_OR_RETURN(const bool individual,
                        BooleanField(description, "individual_digits", false, name));
    return AddSplit("\\p{N}", Pattern::Syntax::kPcre2,
                    individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous, name);
  }
  if (type == "Whitespace") {
    KV_RETURN_IF_ERROR(
        AddSplit(kWordsPattern, Pattern::Syntax::kPcre2, SplitBehavior::kRemoved, name));
    steps_.back().invert = true;
    return OkStatus();
  }
  if (type == "WhitespaceSplit") {
    return AddSplit("\\p{White_Space}", Pattern::Syntax::kPcre2, SplitBehavior::kRemoved, name);
  }
  if (type == "Punctuation") {
    KV_ASSIGN_OR_RETURN(const std::string written,
                        StringField(description, "behavior", "Isolated", name));
    KV_ASSIGN_OR_RETURN(const SplitBehavior behavior, ParseBehavior(written, name));
    return AddSplit(kPunctuationPattern, Pattern::Syntax::kPcre2, behavior, name);
  }
  if (type == "ByteLevel") {
    KV_ASSIGN_OR_RETURN(const bool prefix_space,
                        BooleanField(description, "add_prefix_space", true, name));
    KV_ASSIGN_OR_RETURN(const bool use_regex, BooleanField(description, "use_regex", true, name));
    return AddByteLevel(prefix_space, use_regex, name);
  }
  if (type == "Sequence") {
    const json* list = FindField(description, "pretokenizers");
    if (list == nullptr || !list->is_array()) {
      return InvalidArgument("{}: pre-tokenizer Sequence needs a list \"pretokenizers\"", name);
    }
    for (const json& part : *list) KV_RETURN_IF_ERROR(Add(part, depth + 1, name));
    return OkStatus();
  }
  return Unsupported(name, type.empty() ? "one without a type" : type);
}

Status PreTokenizer::ParseSplit(const json& description, const std::string& name) {
  KV_ASSIGN_OR_RETURN(const std::string written, StringField(description, "behavior", "", name));
  KV_ASSIGN_OR_RETURN(const SplitBehavior behavior, ParseBehavior(written, name));
  KV_ASSIGN_OR_RETURN(const bool invert, BooleanField(description, "invert", false, name));
  const json* pattern = FindField(description, "pattern");
  const bool one = pattern != nullptr && pattern->is_object() && pattern->size() == 1;
  const std::string kind = one ? pattern->begin().key() : "";
  if ((kind != "Regex" && kind != "String") || !pattern->begin()->is_string() ||
      pattern->begin()->get_ref<const std::string&>().empty()) {
    return InvalidArgument("{}: pre-tokenizer Split needs a \"pattern\" with a Regex or a String",
                           name);
  }
  KV_RETURN_IF_ERROR(AddSplit(
      pattern->begin()->get_ref<const std::string&>(),
      kind == "Regex" ? Pattern::Syntax::kOniguruma : Pattern::Syntax::kLiteral, behavior, name));
  steps_.back().invert = invert;
  return OkStatus();
}

Status PreTokenizer::ParseMetaspace(const json& description, const std::string& name) {
  Step step;
  step.kind = Step::Kind::kMetaspace;
  KV_ASSIGN_OR_RETURN(step.replacement, StringField(description, "replacement", kMetaspace, name));
  const bool one =
      !step.replacement.empty() && Utf8At(step.replacement, 0).bytes == step.replacement.size();
  if (!one) return InvalidArgument("{}: Metaspace: replacement must be one character", name);
  // Files from before tokenizers 0.15 have add_prefix_space only.
  KV_ASSIGN_OR_RETURN(const bool prefix, BooleanField(description, "add_prefix_space", true, name));
  KV_ASSIGN_OR_RETURN(const std::string scheme, StringField(description, "prepend_scheme",
                                                            prefix ? "always" : "never", name));
  if (scheme == "first") {
    step.prepend = Step::Prepend::kFirst;
  } else if (scheme == "never") {
    step.prepend = Step::Prepend::kNever;
  } else if (scheme != "always") {
    return Unsupported(name, "Metaspace with prepend_scheme " + scheme);
  }
  KV_ASSIGN_OR_RETURN(const bool split, BooleanField(description, "split", true, name));
  if (split) {
    KV_ASSIGN_OR_RETURN(step.pattern,
                        Pattern::Compile(step.replacement, Pattern::Syntax::kLiteral, name));
    step.behavior = SplitBehavior::kMergedWithNext;
  }
  steps_.push_back(std::move(step));
  return OkStatus();
}

Status PreTokenizer::AddSplit(std::string_view pattern, Pattern::Syntax syntax,
                              SplitBehavior behavior, const std::string& name) {
  Step step;
  KV_ASSIGN_OR_RETURN(step.pattern, Pattern::Compile(pattern, syntax, name));
  step.behavior = behavior;
  steps_.push_back(std::move(step));
  return OkStatus();
}

void PreTokenizer::AddMetaspace(bool prepend_first) {
  Step& step = steps_.emplace_back();
  step.kind = Step::Kind::kMetaspace;
  step.prepend = prepend_first ? Step::Prepend::kFirst : Step::Prepend::kNever;
}

Status PreTokenizer::AddByteLevel(bool prefix_space, bool use_regex, const std::string& name) {
  if (prefix_space) steps_.emplace_back().kind = Step::Kind::kPrefixSpace;
  if (use_regex) {
    KV_RETURN_IF_ERROR(
        AddSplit(kGpt2Pattern, Pattern::Syntax::kOniguruma, SplitBehavior::kIsolated, name));
  }
  byte_level_ = true;
  return OkStatus();
}

Result<std::vector<std::string_view>> PreTokenizer::Cut(std::string_view text, bool at_start,
                                                        std::deque<std::string>* owned) const {
  std::vector<std::string_view> pieces = {text};
  std::vector<PatternSpan> spans;
  for (const Step& step : steps_) {
    std::vector<std::string_view> next;
    bool first = at_start;  // of the pieces
    for (std::string_view piece : pieces) {
      if (step.kind == Step::Kind::kPrefixSpace && !piece.starts_with(' ')) {
        piece = owned->emplace_back(" " + std::string(piece));
      }
      if (step.kind == Step::Kind::kMetaspace) {
        std::string& replaced = owned->emplace_back();
        for (const char byte : piece) {
          if (byte == ' ') {
            replaced += step.replacement;
          } else {
            replaced += byte;
          }
        }
        const bool prepend = step.prepend == Step::Prepend::kAlways ||
                             (step.prepend == Step::Prepend::kFirst && first);
        if (prepend && !replaced.starts_with(step.replacement)) {
          replaced.insert(0, step.replacement);
        }
        piece = replaced;
      }
      first = false;
      if (step.pattern == nullptr) {
        next.push_back(piece);
        continue;
      }
      KV_RETURN_IF_ERROR(step.pattern->Scan(piece, &spans));
      for (PatternSpan& span : spans) span.is_match ^= step.invert;
      ApplyBehavior(step.behavior, &spans);
      for (const PatternSpan& span : spans) {
        next.push_back(piece.substr(span.begin, span.end - span.begin));
      }
    }
    pieces = std::move(next);
  }
  return pieces;
}

}  // namespace kvant::node
