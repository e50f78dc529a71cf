#include "node/eval_text.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "node/decoder.h"
#include "node/json.h"

namespace kvant::node {
namespace {

// The places of scripts/train/recall.py.
constexpr std::string_view kAdjectives[] = {
    "north",  "south",  "east",   "west",  "red",   "blue",   "green", "yellow", "black",
    "white",  "old",    "new",    "upper", "lower", "main",   "inner", "outer",  "small",
    "large",  "first",  "second", "third", "front", "back",   "left",  "right",  "central",
    "hidden", "silver", "golden", "quiet", "long",  "narrow", "round"};
constexpr std::string_view kNouns[] = {
    "gate",    "door",      "vault",   "archive", "server",    "printer",  "office",
    "cabinet", "garage",    "library", "lab",     "workshop",  "tower",    "cellar",
    "safe",    "warehouse", "station", "bridge",  "hangar",    "kitchen",  "studio",
    "router",  "database",  "cluster", "locker",  "container", "elevator", "greenhouse",
    "chest",   "harbor",    "tunnel",  "depot",   "clinic",    "museum",   "theater",
    "camera",  "terminal",  "backup",  "boiler",  "shed"};

bool IsUpper(char c) { return c >= 'A' && c <= 'Z'; }

// `sentence` in `filler` at the gap nearest to `depth` of its length, with such a gap on both
// sides.
std::string PutSentence(std::string_view filler, double depth, std::string_view sentence) {
  const double wanted = depth * static_cast<double>(filler.size());
  const auto distance = [&](size_t gap) { return std::abs(static_cast<double>(gap) - wanted); };
  const std::vector<size_t> gaps = SentenceGaps(filler);
  const auto nearest = std::min_element(
      gaps.begin(), gaps.end(), [&](size_t a, size_t b) { return distance(a) < distance(b); });
  if (nearest == gaps.end()) {
    return depth < 0.5 ? fmt::format("{}\n{}", sentence, filler)
                       : fmt::format("{}\n{}", filler, sentence);
  }
  const char gap = filler[*nearest];
  return fmt::format("{}{}{}{}", filler.substr(0, *nearest), gap, sentence,
                     filler.substr(*nearest));
}

size_t CommonPrefix(std::span<const int32_t> a, std::span<const int32_t> b) {
  return static_cast<size_t>(
      std::distance(a.begin(), std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first));
}

}  // namespace

std::vector<size_t> SentenceGaps(std::string_view text) {
  std::vector<size_t> gaps;
  for (size_t i = 0; i < text.size(); ++i) {
    const bool line_end = text[i] == '\n' && (i == 0 || text[i - 1] != '\n');
    const bool sentence_end = text[i] == ' ' && i > 0 && i + 1 < text.size() &&
                              (text[i - 1] == '.' || text[i - 1] == '!' || text[i - 1] == '?') &&
                              IsUpper(text[i + 1]);
    if (line_end || sentence_end) gaps.push_back(i);
  }
  return gaps;
}

Result<EvalText> EvalText::Load(const std::filesystem::path& file, const Tokenizer* tokenizer) {
  KV_ASSIGN_OR_RETURN(const std::string text, ReadFile(file, kMaxTextBytes));
  return FromText(text, file.string(), tokenizer);
}

Result<EvalText> EvalText::FromText(std::string_view text, const std::string& name,
                                    const Tokenizer* tokenizer) {
  EvalText result;
  result.name_ = name;
  result.tokenizer_ = tokenizer;
  const auto encode = [&](std::string_view part, bool special) -> Result<std::vector<int32_t>> {
    Result<std::vector<int32_t>> ids = tokenizer->Encode(part, special);
    if (ids.ok()) return ids;
    return InvalidArgument("text '{}': {}", name, ids.status().message());
  };
  KV_ASSIGN_OR_RETURN(result.ids_, encode(text, false));
  // What stands before a text is what stands before a letter.
  KV_ASSIGN_OR_RETURN(const std::vector<int32_t> plain, encode("x", false));
  KV_ASSIGN_OR_RETURN(const std::vector<int32_t> whole, encode("x", true));
  const auto begin = std::search(whole.begin(), whole.end(), plain.begin(), plain.end());
  result.front_.assign(whole.begin(), begin == whole.end() ? whole.begin() : begin);
  return result;
}

Result<std::vector<EvalWindow>> EvalText::Windows(const WindowPlan& plan) const {
  KV_CHECK(plan.prefix % kBlockTokens == 0 && plan.prefix > static_cast<int>(front_.size()) &&
           plan.suffix >= 2 && plan.windows >= 0);
  const int own_prefix = plan.prefix - static_cast<int>(front_.size());
  const int length = own_prefix + plan.suffix;  // tokens that a window takes of the text
  if (tokens() < length) {
    return InvalidArgument(
        "text '{}' has {} tokens, and one window of --prefix {} --suffix {} takes {}: give a "
        "longer text with --text, or ask for less",
        name_, tokens(), plan.prefix, plan.suffix, length);
  }
  const int fitting = tokens() / length;
  const int count = plan.windows > 0 ? plan.windows : std::min(fitting, kDefaultWindows);
  const int last_start = tokens() - length;
  if (count - 1 > last_start) {
    return InvalidArgument("text '{}' has {} tokens: {} different windows of {} are all there are",
                           name_, tokens(), last_start + 1, length);
  }
  const auto start = [&](int window) {
    return count == 1 ? 0
                      : static_cast<int>(static_cast<int64_t>(last_start) * window / (count - 1));
  };
  const auto slice = [&](int begin, int size) {
    return std::span(ids_).subspan(static_cast<size_t>(begin), static_cast<size_t>(size));
  };
  const auto prefix_at = [&](int begin) {
    std::vector<int32_t> prefix = front_;
    const auto own = slice(begin, own_prefix);
    prefix.insert(prefix.end(), own.begin(), own.end());
    return prefix;
  };
  Random random(plan.seed);
  std::vector<EvalWindow> windows;
  for (int window = 0; window < count; ++window) {
    EvalWindow& made = windows.emplace_back();
    const int begin = start(window);
    made.prefix = prefix_at(begin);
    const auto suffix = slice(begin + own_prefix, plan.suffix);
    made.suffix.assign(suffix.begin(), suffix.end());
    // Half a text away, so that it is not the neighbour, which is about the same.
    const int end = tokens() - own_prefix;
    for (const int other : {start((window + count / 2) % count), 0, end}) {
      if (std::abs(other - begin) < own_prefix) continue;
      made.stranger = prefix_at(other);
      break;
    }
    const int copy = std::min({kCopyTokens, plan.suffix, own_prefix});
    const auto room = static_cast<uint64_t>(own_prefix - copy + 1);
    const auto span = slice(begin + static_cast<int>(random.Below(room)), copy);
    made.copy.assign(span.begin(), span.end());
  }
  return windows;
}

Result<PasskeyPrompt> EvalText::Passkey(int length, double depth, Random* random) const {
  if (tokens() < length) {
    return InvalidArgument("text '{}' has {} tokens, a passkey prompt of {} needs as many", name_,
                           tokens(), length);
  }
  const std::string_view adjective = kAdjectives[random->Below(std::size(kAdjectives))];
  const std::string_view noun = kNouns[random->Below(std::size(kNouns))];
  const uint64_t number = 10000 + random->Below(90000);
  const std::string sentence =
      fmt::format("The passkey for the {} {} is {}.", adjective, noun, number);
  const std::string question =
      fmt::format("\n\nQuestion: What is the passkey for the {} {}?\nAnswer:", adjective, noun);
  const std::string answer = fmt::format(" {}", number);
  const auto begin =
      static_cast<size_t>(random->Below(static_cast<uint64_t>(tokens() - length) + 1));

  PasskeyPrompt prompt;
  prompt.length = length;
  prompt.depth = depth;
  // Sentence and question take some of the length; how many tokens is known once they are encoded,
  // and a second try makes up for what the seams cost.
  int filler = length;
  while (true) {
    const std::string text =
        tokenizer_->Decode(std::span(ids_).subspan(begin, static_cast<size_t>(filler)));
    prompt.text = PutSentence(text, depth, sentence) + question;
    KV_ASSIGN_OR_RETURN(const std::vector<int32_t> asked, tokenizer_->Encode(prompt.text, true));
    KV_ASSIGN_OR_RETURN(prompt.tokens, tokenizer_->Encode(prompt.text + answer, true));
    prompt.answer_tokens =
        static_cast<int>(prompt.tokens.size() - CommonPrefix(asked, prompt.tokens));
    const int excess = static_cast<int>(prompt.tokens.size()) - length;
    if (excess <= 0) return prompt;
    if (excess >= filler) {
      return InvalidArgument("a passkey prompt of {} tokens has no room for its question", length);
    }
    filler -= excess;
  }
}

}  // namespace kvant::node
