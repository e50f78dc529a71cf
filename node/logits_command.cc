#include "node/logits_command.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "node/block_past.h"
#include "node/json.h"
#include "node/npy.h"
#include "node/runtime.h"

namespace kvant::node {
namespace {

constexpr uint64_t kMaxTokensFileBytes = uint64_t{256} << 20;
constexpr std::string_view kSeparators = ", \t\r\n";

Result<std::vector<int32_t>> ParseTokens(std::string_view text) {
  std::vector<int32_t> tokens;
  for (size_t at = text.find_first_not_of(kSeparators); at != text.npos;
       at = text.find_first_not_of(kSeparators, at)) {
    const size_t end = std::min(text.find_first_of(kSeparators, at), text.size());
    const std::string_view word = text.substr(at, end - at);
    int32_t token = 0;
    const auto [stop, error] = std::from_chars(word.data(), word.data() + word.size(), token);
    if (error != std::errc() || stop != word.data() + word.size() || token < 0) {
      return InvalidArgument(
          "token {}: '{}' is no token id; ids are whole numbers from 0 on, as 'kvant tokenize' "
          "prints them",
          tokens.size(), word.substr(0, 40));
    }
    tokens.push_back(token);
    at = end;
  }
  if (tokens.empty()) {
    return InvalidArgument("no tokens: give --tokens 1,2,3 or --tokens-file FILE");
  }
  return tokens;
}

Status CheckTokens(std::span<const int32_t> tokens, const LogitsOptions& options,
                   const ModelConfig& config) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= config.vocab) {
      return InvalidArgument(
          "token {}: id {} is beyond the vocabulary of {}, whose ids end at {}; 'kvant tokenize' "
          "gives a text's ids",
          i, tokens[i], options.model, config.vocab - 1);
    }
  }
  if (tokens.size() > static_cast<size_t>(config.max_positions)) {
    return InvalidArgument("{} tokens are more than the context of {} tokens that {} has",
                           tokens.size(), config.max_positions, options.model);
  }
  return OkStatus();
}

}  // namespace

Result<int> WriteLogits(const LogitsOptions& options) {
  std::string text = options.tokens;
  if (text.empty() && !options.tokens_file.empty()) {
    KV_ASSIGN_OR_RETURN(text, ReadFile(options.tokens_file, kMaxTokensFileBytes));
  }
  KV_ASSIGN_OR_RETURN(const std::vector<int32_t> tokens, ParseTokens(text));
  NodeOptions node_options;
  node_options.model = options.model;
  node_options.weights = options.weights;
  node_options.codec = !options.codec.empty()    ? options.codec
                       : options.dtype == "bf16" ? "raw"
                                                 : "raw-fp32";
  node_options.local_cache_bytes = 0;
  node_options.threads = options.threads;
  KV_ASSIGN_OR_RETURN(const std::unique_ptr<NodeRuntime> node, NodeRuntime::Create(node_options));
  const ModelConfig& config = node->model().config();
  KV_RETURN_IF_ERROR(CheckTokens(tokens, options, config));
  const auto vocab = static_cast<size_t>(config.vocab);
  KV_ASSIGN_OR_RETURN(const std::unique_ptr<NpyWriter> writer,
                      NpyWriter::Create(options.out, tokens.size(), vocab));

  const BlockClass& block_class = node->block_class();
  std::vector<CachedBlockPtr> blocks;
  std::vector<float> logits(kBlockTokens * vocab);
  for (size_t at = 0; at < tokens.size(); at += kBlockTokens) {
    const auto part =
        std::span(tokens).subspan(at, std::min<size_t>(kBlockTokens, tokens.size() - at));
    BlockPast past(block_class, blocks, block_class.FullCuts(), nullptr);
    const auto block =
        std::make_shared<CachedBlock>(block_class, BlockKey{}, block_class.FullCuts());
    const auto sink = [&](int layer, const float* keys, const float* values) {
      // Nothing attends what stands behind the last whole block.
      if (part.size() == kBlockTokens) {
        block_class.EncodeLayer(layer, keys, values, block->bytes.data(), nullptr);
        block->MarkReady(layer);
      }
      return OkStatus();
    };
    KV_RETURN_IF_ERROR(
        node->decoder().Prefill({part, static_cast<int>(at), &past}, sink, logits.data()));
    blocks.push_back(block);
    KV_RETURN_IF_ERROR(writer->Append(std::span(logits).first(part.size() * vocab)));
  }
  KV_RETURN_IF_ERROR(writer->Finish());
  std::fprintf(stderr, "kvant: %s: logits of %zu tokens, %zu each, over a past in %s\n",
               options.out.c_str(), tokens.size(), vocab, node_options.codec.c_str());
  return 0;
}

}  // namespace kvant::node
