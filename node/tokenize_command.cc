#include "node/tokenize_command.h"

#include <fmt/ranges.h>

#include <cstdio>
#include <nlohmann/json.hpp>
#include <vector>

#include "node/json.h"
#include "node/tokenizer_loader.h"

namespace kvant::node {
namespace {

constexpr uint64_t kMaxTextBytes = uint64_t{1} << 30;

}  // namespace

Result<int> Tokenize(const TokenizeOptions& options) {
  KV_ASSIGN_OR_RETURN(const auto tokenizer, LoadTokenizer(options.model));
  std::string text = options.text;
  if (!options.text_file.empty()) {
    KV_ASSIGN_OR_RETURN(text, ReadFile(options.text_file, kMaxTextBytes));
  }
  KV_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, tokenizer->Encode(text, options.add_special));
  std::string out;
  if (options.json) {
    nlohmann::json list = nlohmann::json::array();
    for (const int32_t id : ids) {
      list.push_back({{"id", id},
                      {"piece", std::string(tokenizer->TokenText(id))},
                      {"special", tokenizer->IsSpecial(id)}});
    }
    out = list.dump();
  } else {
    out = fmt::format("{}", fmt::join(ids, " "));
  }
  std::printf("%s\n", out.c_str());
  return 0;
}

}  // namespace kvant::node
