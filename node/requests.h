// Requests and answers as files: one JSON object a line in the format of OpenAI's batch API, as
// vLLM's run-batch takes them, plus the optional top-level `tenant` and `conversation`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "node/chat_template.h"

namespace kvant::node {

// One line of a requests file. Defaults are those of OpenAI's API, but for `seed`, which is 0: an
// answer of Kvant is a function of its request.
struct Request {
  std::string custom_id;  // unique in its file
  bool chat = false;      // /v1/chat/completions
  std::string prompt;
  std::vector<int32_t> prompt_tokens;  // used instead of `prompt` when not empty
  std::vector<ChatMessage> messages;
  int max_tokens = 16;
  double temperature = 1.0;
  double top_p = 1.0;
  uint64_t seed = 0;
  std::vector<std::string> stop;
  std::string tenant;        // empty: the default tenant
  std::string conversation;  // empty: stands alone
};

// Reads a whole requests file's text. kInvalidArgument names `file_name`, the line, the field and
// the remedy. Empty lines are skipped.
Result<std::vector<Request>> ParseRequests(std::string_view text, std::string_view file_name);

enum class FinishReason : uint8_t { kStop, kLength, kError };

struct Answer {
  std::string custom_id;
  bool chat = false;
  std::string text;
  std::vector<int32_t> tokens;  // generated, the end token excluded
  FinishReason finish = FinishReason::kStop;
  int prompt_tokens = 0;
  int cached_tokens = 0;   // of the prompt, found in this node's memory or in the tier
  int tier_tokens = 0;     // of the prompt, in blocks that the tier had when it was asked
  int fetched_tokens = 0;  // those of them that were fetched, not computed
  Duration ttft{};
  Duration tpot{};  // mean time per token after the first; 0 with fewer than two
  Status error;     // not ok: nothing was generated
};

// One line of an answers file, without the newline. `model` is the name shown.
std::string FormatAnswer(const Answer& answer, std::string_view model, int64_t created_unix_s);
// Reads an answers file written by FormatAnswer back. Errors as ParseRequests.
Result<std::vector<Answer>> ParseAnswers(std::string_view text, std::string_view file_name);

// Whole files. kInvalidArgument: cannot be read, or written (names the path and the reason).
Result<std::string> ReadFile(const std::string& path);
Status WriteFile(const std::string& path, std::string_view text);
// Whether WriteFile could write there; leaves what is there as it is. An empty path is fine.
Status CheckWritable(const std::string& path);

}  // namespace kvant::node
