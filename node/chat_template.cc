#include "node/chat_template.h"

#include "node/json.h"

namespace kvant::node {
namespace {

constexpr uint64_t kMaxTokenizerConfigBytes = uint64_t{16} << 20;
constexpr std::string_view kInstead =
    "send the conversation as one \"prompt\" to /v1/completions instead";

}  // namespace

Result<std::string> ApplyChatTemplate(const std::filesystem::path& directory,
                                      std::span<const ChatMessage> messages) {
  const auto path = directory / "tokenizer_config.json";
  if (messages.empty()) return InvalidArgument("a chat request needs at least one message");
  std::error_code error;
  bool has_template = std::filesystem::exists(directory / "chat_template.jinja", error);
  if (!has_template && std::filesystem::exists(path, error)) {
    KV_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxTokenizerConfigBytes));
    KV_ASSIGN_OR_RETURN(const nlohmann::json config, ParseJson(text, path.string()));
    has_template = config.is_object() && FindField(config, "chat_template") != nullptr;
  }
  if (!has_template) {
    return MakeStatus(StatusCode::kUnsupported, "{}: the model has no chat template; {}",
                      directory.string(), kInstead);
  }
  return MakeStatus(StatusCode::kUnsupported,
                    "{}: the model's chat template is a Jinja program, and those are not run; {}",
                    directory.string(), kInstead);
}

}  // namespace kvant::node
