#include "node/pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <utility>

#include "node/utf8.h"

namespace kvant::node {
namespace {

constexpr size_t kMaxPatternBytes = 64 * 1024;

// What Oniguruma's shorthands mean in UTF-8, as members of a PCRE2 class.
constexpr std::string_view kSpace = "\\p{White_Space}";
constexpr std::string_view kWord =
    "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{B2}\\x{B3}\\x{B9}\\x{BC}-\\x{BE}";
constexpr std::string_view kHex = "0-9A-Fa-f";

// Names of properties that are no scripts; PCRE2 wants another name for some.
constexpr std::pair<std::string_view, std::string_view> kProperties[] = {
    {"letter", "L"},
    {"uppercase_letter", "Lu"},
    {"lowercase_letter", "Ll"},
    {"titlecase_letter", "Lt"},
    {"modifier_letter", "Lm"},
    {"other_letter", "Lo"},
    {"mark", "M"},
    {"number", "N"},
    {"decimal_number", "Nd"},
    {"punctuation", "P"},
    {"symbol", "S"},
    {"separator", "Z"},
    {"alphabetic", "Alphabetic"},
    {"alpha", "Alphabetic"},
    {"digit", "Nd"},
    {"space", "White_Space"},
    {"white_space", "White_Space"},
    {"uppercase", "Uppercase"},
    {"upper", "Uppercase"},
    {"lowercase", "Lowercase"},
    {"lower", "Lowercase"},
    {"emoji", "Emoji"},
};

std::string PcreMessage(int code) {
  PCRE2_UCHAR buffer[256];
  pcre2_get_error_message(code, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

// Reads a pattern in Oniguruma's Ruby syntax and writes it in PCRE2's. Single-owner, used once.
class Translator {
 public:
  Translator(std::string_view pattern, const std::string& name) : in_(pattern), name_(name) {}

  Result<std::string> Run() {
    while (at_ < in_.size()) {
      if (in_[at_] == '\\') {
        KV_RETURN_IF_ERROR(Escape());
      } else if (in_class_) {
        KV_RETURN_IF_ERROR(InClass());
      } else {
        KV_RETURN_IF_ERROR(Outside());
      }
    }
    return std::move(out_);
  }

 private:
  Status Unsupported(std::string_view what) const {
    return MakeStatus(StatusCode::kUnsupported,
                      "{}: {} in a pattern is not supported; supported are literals, classes "
                      "without nesting or &&, groups without names, lookaround, (?i), \\p, \\s, "
                      "\\d, \\w, \\h, \\b and their negations",
                      name_, what);
  }
  char Peek(size_t ahead) const { return at_ + ahead < in_.size() ? in_[at_ + ahead] : '\0'; }
  void Copy(size_t count) {
    out_ += in_.substr(at_, count);
    at_ += std::min(count, in_.size() - at_);
  }

  Status InClass() {
    const char c = in_[at_];
    if (c == '[') return Unsupported("a class inside a class");
    if (c == '&' && Peek(1) == '&') return Unsupported("an intersection of classes (&&)");
    if (c == ']') in_class_ = false;
    Copy(1);
    return OkStatus();
  }

  Status Outside() {
    const char c = in_[at_];
    if (c == '[') {
      Copy(1);
      if (Peek(0) == '^') Copy(1);
      // In both syntaxes a ] in the first place stands for itself.
      if (Peek(0) == ']') Copy(1);
      in_class_ = true;
      return OkStatus();
    }
    if (c == '(' && Peek(1) == '?') {
      constexpr std::string_view kGroups[] = {"(?i:", "(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>"};
      for (const std::string_view group : kGroups) {
        if (!in_.substr(at_).starts_with(group)) continue;
        Copy(group.size());
        return OkStatus();
      }
      // Behind other parts the two syntaxes disagree about its reach.
      if (at_ == 0 && in_.starts_with("(?i)")) {
        Copy(4);
        return OkStatus();
      }
      return Unsupported(fmt::format("the group {}", in_.substr(at_, 4)));
    }
    if (c == '{') {
      const size_t end = in_.find('}', at_);
      if (end == std::string_view::npos) return Unsupported("a single {");
      Copy(end + 1 - at_);
      // There a repetition of the repetition, here a possessive one.
      if (Peek(0) == '+') return Unsupported("{n,m}+");
      return OkStatus();
    }
    Copy(1);
    return OkStatus();
  }

  // A shorthand for the members of a class.
  void Shorthand(std::string_view members, bool negated) {
    if (!in_class_) {
      out_ += fmt::format("[{}{}]", negated ? "^" : "", members);
    } else {
      out_ += members;
    }
    at_ += 2;
  }

  Status Escape() {
    if (at_ + 1 == in_.size()) return Unsupported("a \\ at the end");
    const char escaped = in_[at_ + 1];
    const bool negated = std::isupper(static_cast<unsigned char>(escaped)) != 0;
    switch (escaped) {
      case 's':
        Shorthand(kSpace, false);
        return OkStatus();
      case 'S':
        out_ += "\\P{White_Space}";
        at_ += 2;
        return OkStatus();
      case 'w':
      case 'W':
      case 'h':
      case 'H':
        if (negated && in_class_) {
          return Unsupported(fmt::format("\\{} in a class", escaped));
        }
        Shorthand(escaped == 'w' || escaped == 'W' ? kWord : kHex, negated);
        return OkStatus();
      case 'b':
      case 'B':
        if (in_class_) return Unsupported("\\b in a class");
        // Behind a word's character stands none, or the other way round; \B: both or neither.
        out_ += fmt::format("(?:(?<=[{0}])(?{1}[{0}])|(?<![{0}])(?{2}[{0}]))", kWord,
                            negated ? '=' : '!', negated ? '!' : '=');
        at_ += 2;
        return OkStatus();
      case 'v':
        out_ += "\\x{0B}";
        at_ += 2;
        return OkStatus();
      case 'u':
        return CodePoint(4);
      case 'x':
        if (Peek(2) != '{') return CodePoint(2);
        break;
      case 'p':
      case 'P':
        return Property();
      default:
        break;
    }
    const bool plain = std::isalnum(static_cast<unsigned char>(escaped)) == 0;
    if (!plain && std::strchr("dDrntfxAzZ", escaped) == nullptr) {
      return Unsupported(fmt::format("the escape \\{}", escaped));
    }
    Copy(2);
    return OkStatus();
  }

  // \xHH or \uHHHH.
  Status CodePoint(size_t digits) {
    const std::string_view hex = in_.substr(std::min(in_.size(), at_ + 2), digits);
    const bool whole =
        hex.size() == digits &&
        std::all_of(hex.begin(), hex.end(), [](unsigned char c) { return std::isxdigit(c) != 0; });
    // \x80 and above are single bytes there, which no text has.
    if (!whole || (digits == 2 && hex.front() >= '8')) {
      return Unsupported(fmt::format("the escape {}", in_.substr(at_, 2 + digits)));
    }
    out_ += fmt::format("\\x{{{}}}", hex);
    at_ += 2 + digits;
    return OkStatus();
  }

  Status Property() {
    const size_t end = in_.find('}', at_);
    if (Peek(2) != '{' || end == std::string_view::npos) return Unsupported("\\p without {}");
    std::string_view property = in_.substr(at_ + 3, end - at_ - 3);
    bool negated = in_[at_ + 1] == 'P';
    if (property.starts_with('^')) {
      negated = !negated;
      property.remove_prefix(1);
    }
    std::string lower(property);
    std::transform(lower.begin(), lower.end(), lower.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    std::string translated(property);
    if (property.size() > 2) {
      const auto* known = std::find_if(std::begin(kProperties), std::end(kProperties),
                                       [&](const auto& entry) { return entry.first == lower; });
      // Without sc: PCRE2 takes a script's name for its extensions.
      translated = known != std::end(kProperties) ? std::string(known->second) : "sc:" + translated;
    }
    out_ += fmt::format("\\{}{{{}}}", negated ? 'P' : 'p', translated);
    at_ = end + 1;
    return OkStatus();
  }

  std::string_view in_;
  const std::string& name_;
  size_t at_ = 0;
  bool in_class_ = false;
  std::string out_;
};

}  // namespace

struct Pattern::Code {
  explicit Code(pcre2_code* compiled) : code(compiled) {}
  ~Code() { pcre2_code_free(code); }
  Code(const Code&) = delete;
  Code& operator=(const Code&) = delete;
  pcre2_code* code;
};

Pattern::Pattern(std::unique_ptr<Code> code) : code_(std::move(code)) {}
Pattern::~Pattern() = default;

Result<std::unique_ptr<Pattern>> Pattern::Compile(std::string_view pattern, Syntax syntax,
                                                  const std::string& name) {
  if (pattern.size() > kMaxPatternBytes) {
    return MakeStatus(StatusCode::kUnsupported, "{}: a pattern beyond {} bytes is not supported",
                      name, kMaxPatternBytes);
  }
  std::string translated(pattern);
  if (syntax == Syntax::kOniguruma) {
    KV_ASSIGN_OR_RETURN(translated, Translator(pattern, name).Run());
  }
  // In Ruby's syntax ^ and $ always stand at lines, and only \n ends one.
  const uint32_t options =
      PCRE2_UTF | (syntax == Syntax::kLiteral ? PCRE2_LITERAL : PCRE2_UCP | PCRE2_MULTILINE);
  const std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
      pcre2_compile_context_create(nullptr), &pcre2_compile_context_free);
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  PCRE2_SIZE at = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()),
                                   translated.size(), options, &error, &at, context.get());
  if (code == nullptr) {
    return InvalidArgument("{}: pattern \"{}\" does not compile at byte {}: {}", name, translated,
                           at, PcreMessage(error));
  }
  // Without JIT the interpreter does the same, more slowly.
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  return std::unique_ptr<Pattern>(new Pattern(std::make_unique<Code>(code)));
}

Status Pattern::Scan(std::string_view text, std::vector<PatternSpan>* spans) const {
  spans->clear();
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create_from_pattern(code_->code, nullptr), &pcre2_match_data_free);
  const PCRE2_SIZE* found = pcre2_get_ovector_pointer(match.get());
  const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  size_t done = 0;  // given out so far
  size_t from = 0;  // where to search
  while (from < text.size()) {
    int code = pcre2_match(code_->code, subject, text.size(), from, PCRE2_NO_UTF_CHECK, match.get(),
                           nullptr);
    // The interpreter takes its stack from the heap.
    if (code == PCRE2_ERROR_JIT_STACKLIMIT) {
      code = pcre2_match(code_->code, subject, text.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                         match.get(), nullptr);
    }
    if (code == PCRE2_ERROR_NOMATCH) break;
    if (code < 0) {
      return InvalidArgument(
          "cutting a text of {} bytes into pieces: the tokenizer's pattern gave up: {}",
          text.size(), PcreMessage(code));
    }
    const size_t begin = found[0];
    const size_t end = found[1];
    if (end <= begin) {  // empty: go on behind the next character
      if (begin >= text.size()) break;
      from = begin + Utf8At(text, begin).bytes;
      continue;
    }
    if (begin > done) spans->push_back({done, begin, false});
    spans->push_back({begin, end, true});
    done = from = end;
  }
  if (done < text.size()) spans->push_back({done, text.size(), false});
  return OkStatus();
}

}  // namespace kvant::node
