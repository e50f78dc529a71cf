// The tokenizer of a model, wherever the model keeps it.
#pragma once

#include <filesystem>
#include <memory>

#include "base/status.h"
#include "node/tokenizer.h"

namespace kvant::node {

// `model` is a model directory (Tokenizer::LoadFrom) or a GGUF file (OpenGgufTokenizer), with their
// errors. kInvalidArgument: neither of them.
Result<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::filesystem::path& model);

}  // namespace kvant::node
