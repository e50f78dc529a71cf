// Writes small model directories of random weights, for tests and for scripts that have no trained
// model at hand.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "base/status.h"
#include "node/config.h"
#include "node/safetensors.h"

namespace kvant::support {

struct RandomModelOptions {
  node::ModelConfig config;  // vocab >= 258: 256 bytes, BOS, EOS, then merges
  node::DataType type = node::DataType::kBf16;
  int shards = 1;  // more than one: with an index
  uint64_t seed = 1;
};

// A config of 2 layers, 4 query heads and 2 kv heads of 16, hidden 64, vocabulary 300.
node::ModelConfig TinyConfig();
// A Gemma-like one: 4 layers of which all but the third see 100 tokens.
node::ModelConfig TinySlidingConfig();
// A DeepSeek-V3-like one: latents of 32 and rope keys of 8, a dense layer and two of 8 experts.
node::ModelConfig TinyLatentConfig();

// Writes config.json, generation_config.json, tokenizer.json and the safetensors into `directory`,
// which is created. The same options give the same bytes.
Status WriteRandomModel(const std::filesystem::path& directory, const RandomModelOptions& options);

// A byte-level BPE of `vocab` tokens: 256 bytes, <|begin_of_text|> (256), <|end_of_text|> (257) and
// vocab - 258 merges.
std::string RandomTokenizerJson(int vocab);

// A directory of its own below the system's temporary one, removed with all it holds at the end.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace kvant::support
