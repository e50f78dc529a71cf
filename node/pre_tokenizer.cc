#include "node/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <cstring>
#include <utility>

#include "node/json.h"
#include "node/utf8.h"

namespace kvant::node {
namespace {

using nlohmann::json;

constexpr size_t kMaxPatternBytes = 64 * 1024;

// GPT-2's pattern, which ByteLevel applies with use_regex (tokenizers, byte_level.rs).
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

Status Unsupported(const std::string& name, std::string_view what) {
  return MakeStatus(StatusCode::kUnsupported,
                    "{}: pre-tokenizer: {} is not supported; supported: ByteLevel, Split with "
                    "behavior Isolated or Removed, Digits, and a Sequence of them that ends in "
                    "ByteLevel",
                    name, what);
}

// `tokenizers` matches with Oniguruma. Escapes that mean something else in PCRE2 are refused, and
// \s becomes the property that Oniguruma means by it.
Result<std::string> TranslatePattern(std::string_view pattern, const std::string& name) {
  if (pattern.size() > kMaxPatternBytes) return Unsupported(name, "a pattern beyond 64 KiB");
  if (pattern.find("&&") != std::string_view::npos) {
    return Unsupported(name, "an intersection of character classes (&&)");
  }
  std::string translated;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] != '\\' || i + 1 == pattern.size()) {
      translated += pattern[i];
      continue;
    }
    const char escaped = pattern[++i];
    if (escaped == 's') {
      translated += "\\p{White_Space}";
    } else if (escaped == 'S') {
      translated += "\\P{White_Space}";
    } else if (std::isalnum(static_cast<unsigned char>(escaped)) == 0 ||
               std::strchr("pPdDrntfx", escaped) != nullptr) {
      translated += '\\';
      translated += escaped;
    } else {
      return Unsupported(name, fmt::format("the escape \\{} in a pattern", escaped));
    }
  }
  return translated;
}

std::string PcreMessage(int code) {
  PCRE2_UCHAR buffer[256];
  pcre2_get_error_message(code, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

}  // namespace

// A compiled pattern. Immutable.
class PreTokenizer::Pattern {
 public:
  static Result<std::unique_ptr<Pattern>> Compile(const std::string& pattern, bool literal,
                                                  const std::string& name) {
    const uint32_t options = PCRE2_UTF | (literal ? PCRE2_LITERAL : PCRE2_UCP);
    int error = 0;
    PCRE2_SIZE at = 0;
    pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                     options, &error, &at, nullptr);
    if (code == nullptr) {
      return InvalidArgument("{}: pre-tokenizer: pattern does not compile at byte {}: {}", name, at,
                             PcreMessage(error));
    }
    // Without JIT the interpreter does the same, more slowly.
    pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
    return std::unique_ptr<Pattern>(new Pattern(code));
  }
  ~Pattern() { pcre2_code_free(code_); }
  Pattern(const Pattern&) = delete;
  Pattern& operator=(const Pattern&) = delete;

  // Calls on_span(begin, end, is_match) for matches and what lies between them, in order; empty
  // spans are left out. Returns a PCRE2 error, or 0.
  template <typename OnSpan>
  int Scan(std::string_view text, const OnSpan& on_span) const {
    const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
        pcre2_match_data_create_from_pattern(code_, nullptr), &pcre2_match_data_free);
    const PCRE2_SIZE* found = pcre2_get_ovector_pointer(match.get());
    size_t done = 0;  // given out so far
    size_t from = 0;  // where to search
    while (from < text.size()) {
      const int code = pcre2_match(code_, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                   from, PCRE2_NO_UTF_CHECK, match.get(), nullptr);
      if (code == PCRE2_ERROR_NOMATCH) break;
      if (code < 0) return code;
      const size_t begin = found[0];
      const size_t end = found[1];
      if (end <= begin) {  // empty: go on behind the next character
        if (begin >= text.size()) break;
        from = begin + Utf8At(text, begin).bytes;
        continue;
      }
      if (begin > done) on_span(done, begin, false);
      on_span(begin, end, true);
      done = from = end;
    }
    if (done < text.size()) on_span(done, text.size(), false);
    return 0;
  }

 private:
  explicit Pattern(pcre2_code* code) : code_(code) {}
  pcre2_code* code_;
};

// One transformation of the list of pieces: a pattern to cut at, or (no pattern) a space to put
// before pieces that lack one.
struct PreTokenizer::Step {
  std::unique_ptr<Pattern> pattern;
  bool drop_matches = false;  // Removed, not inverted
  bool drop_others = false;   // Removed, inverted
};

PreTokenizer::PreTokenizer() = default;
PreTokenizer::~PreTokenizer() = default;

Result<std::unique_ptr<PreTokenizer>> PreTokenizer::Parse(const json& description,
                                                          const std::string& name) {
  std::unique_ptr<PreTokenizer> result(new PreTokenizer);
  if (description.is_null()) return Unsupported(name, "none at all");
  KV_RETURN_IF_ERROR(result->Add(description, name));
  if (!result->byte_level_) return Unsupported(name, "one without ByteLevel");
  return result;
}

Status PreTokenizer::Add(const json& description, const std::string& name) {
  if (!description.is_object()) {
    return InvalidArgument("{}: a pre-tokenizer must be an object", name);
  }
  if (byte_level_) return Unsupported(name, "a step behind ByteLevel");
  KV_ASSIGN_OR_RETURN(const std::string type, StringField(description, "type", "", name));
  if (type == "Split") return AddSplit(description, name);
  if (type == "Digits") {
    KV_ASSIGN_OR_RETURN(const bool individual,
                        BooleanField(description, "individual_digits", false, name));
    return AddPattern(individual ? "\\p{N}" : "\\p{N}+", false, false, false, name);
  }
  if (type == "ByteLevel") {
    KV_ASSIGN_OR_RETURN(const bool prefix_space,
                        BooleanField(description, "add_prefix_space", true, name));
    KV_ASSIGN_OR_RETURN(const bool use_regex, BooleanField(description, "use_regex", true, name));
    if (prefix_space) steps_.emplace_back();
    if (use_regex) KV_RETURN_IF_ERROR(AddPattern(kGpt2Pattern, false, false, false, name));
    byte_level_ = true;
    return OkStatus();
  }
  if (type == "Sequence") {
    const json* list = FindField(description, "pretokenizers");
    if (list == nullptr || !list->is_array()) {
      return InvalidArgument("{}: pre-tokenizer Sequence needs a list \"pretokenizers\"", name);
    }
    for (const json& part : *list) {
      // A sequence inside a sequence would make the depth of this call the file's choice.
      if (part.is_object() && part.value("type", json()) == "Sequence") {
        return Unsupported(name, "a Sequence inside a Sequence");
      }
      KV_RETURN_IF_ERROR(Add(part, name));
    }
    return OkStatus();
  }
  return Unsupported(name, type.empty() ? "one without a type" : type);
}

Status PreTokenizer::AddSplit(const json& description, const std::string& name) {
  KV_ASSIGN_OR_RETURN(const std::string behavior, StringField(description, "behavior", "", name));
  KV_ASSIGN_OR_RETURN(const bool invert, BooleanField(description, "invert", false, name));
  if (behavior != "Isolated" && behavior != "Removed") {
    return Unsupported(name, "Split with behavior " + behavior);
  }
  const json* pattern = FindField(description, "pattern");
  const bool one = pattern != nullptr && pattern->is_object() && pattern->size() == 1;
  const std::string kind = one ? pattern->begin().key() : "";
  if ((kind != "Regex" && kind != "String") || !pattern->begin()->is_string()) {
    return InvalidArgument("{}: pre-tokenizer Split needs a \"pattern\" with a Regex or a String",
                           name);
  }
  return AddPattern(pattern->begin()->get_ref<const std::string&>(), kind == "String",
                    behavior == "Removed", invert, name);
}

Status PreTokenizer::AddPattern(std::string_view pattern, bool literal, bool drop_matches,
                                bool invert, const std::string& name) {
  std::string translated(pattern);
  if (!literal) {
    KV_ASSIGN_OR_RETURN(translated, TranslatePattern(pattern, name));
  }
  KV_ASSIGN_OR_RETURN(auto compiled, Pattern::Compile(translated, literal, name));
  steps_.push_back({std::move(compiled), drop_matches && !invert, drop_matches && invert});
  return OkStatus();
}

Result<std::vector<std::string_view>> PreTokenizer::Cut(std::string_view text,
                                                        std::deque<std::string>* owned) const {
  std::vector<std::string_view> pieces = {text};
  for (const Step& step : steps_) {
    std::vector<std::string_view> next;
    for (const std::string_view piece : pieces) {
      if (step.pattern == nullptr) {
        next.push_back(piece.starts_with(' ') ? piece
                                              : owned->emplace_back(" " + std::string(piece)));
        continue;
      }
      const int error = step.pattern->Scan(piece, [&](size_t begin, size_t end, bool is_match) {
        if (is_match ? step.drop_matches : step.drop_others) return;
        next.push_back(piece.substr(begin, end - begin));
      });
      if (error != 0) {
        return InvalidArgument(
            "cutting a text of {} bytes into pieces: the tokenizer's pattern gave up: {}",
            piece.size(), PcreMessage(error));
      }
    }
    pieces = std::move(next);
  }
  return pieces;
}

}  // namespace kvant::node
