// From a list of chat messages to a prompt.
#pragma once

#include <filesystem>
#include <span>
#include <string>

#include "base/status.h"

namespace kvant::node {

struct ChatMessage {
  std::string role;
  std::string content;
};

// kUnsupported: the model in `directory` has no chat template, or one that is not known here; the
// message says what to use instead.
Result<std::string> ApplyChatTemplate(const std::filesystem::path& directory,
                                      std::span<const ChatMessage> messages);

}  // namespace kvant::node
