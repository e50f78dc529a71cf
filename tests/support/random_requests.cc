#include "tests/support/random_requests.h"

#include <nlohmann/json.hpp>

#include "base/random.h"

namespace kvant::support {
namespace {

using Json = nlohmann::json;

// A token of the random tokenizer is one or two characters, so this is at most `characters` tokens.
std::string RandomText(Random* random, size_t characters) {
  std::string text;
  while (text.size() < characters) {
    const bool space = random->Chance(0.2) && !text.empty() && text.back() != ' ';
    text += space ? ' ' : static_cast<char>('a' + random->Below(8));
  }
  return text;
}

class Maker {
 public:
  explicit Maker(const RandomRequestsOptions& options)
      : options_(options), random_(options.seed), tenants_{"", "acme", "zeta"} {
    for (int i = 0; i < 4; ++i) {
      beginnings_.push_back(RandomText(&random_, 20 + random_.Below(Characters(0.5))));
    }
  }

  std::vector<node::Request> Make() {
    for (int i = 0; i < options_.count; ++i) {
      switch (i % 8) {
        case 0:
        case 1:
          Add("shared", Beginning() + RandomText(&random_, 1 + random_.Below(60)));
          break;
        case 2:
          Add("short", RandomText(&random_, 1 + random_.Below(50)));
          break;
        case 3:
          AddExact();
          break;
        case 4:
          AddNearTheLimit(i);
          break;
        default:
          AddConversation(i);
          break;
      }
    }
    // Turns stay in order; everything else meets in any.
    return std::move(requests_);
  }

 private:
  size_t Characters(double share_of_context) const {
    return static_cast<size_t>(share_of_context * options_.context);
  }
  const std::string& Beginning() { return beginnings_[random_.Below(beginnings_.size())]; }

  node::Request& Add(const std::string& kind, std::string prompt) {
    node::Request request;
    request.custom_id = fmt::format("{}-{}", kind, requests_.size());
    request.prompt = std::move(prompt);
    request.tenant = tenants_[random_.Below(tenants_.size())];
    request.max_tokens =
        1 + static_cast<int>(random_.Below(static_cast<uint64_t>(options_.max_tokens)));
    request.temperature = random_.Chance(0.5) ? 0.0 : 0.4 + random_.Unit();
    request.top_p = random_.Chance(0.5) ? 1.0 : 0.5 + random_.Unit() / 2;
    request.seed = random_.Next() >> 1;
    if (random_.Chance(0.4)) {
      request.stop.push_back(RandomText(&random_, 1));
      request.stop.push_back(RandomText(&random_, 2));
    }
    return requests_.emplace_back(std::move(request));
  }

  // As many tokens as stand at a block's edge.
  void AddExact() {
    static constexpr int kLengths[] = {63, 64, 65, 127, 128, 129, 192, 193};
    node::Request& request = Add("exact", "");
    const int length = kLengths[exact_++ % std::size(kLengths)];
    for (int i = 0; i < length; ++i) {
      request.prompt_tokens.push_back(static_cast<int32_t>('a' + random_.Below(8)));
    }
  }

  void AddNearTheLimit(int index) {
    node::Request& request = Add("long", "");
    const int length = index % 24 == 4 ? options_.context
                                       : options_.context - 1 - static_cast<int>(random_.Below(40));
    for (int i = 0; i < length; ++i) {
      request.prompt_tokens.push_back(static_cast<int32_t>('a' + (i * i + i / 64) % 8));
    }
  }

  void AddConversation(int index) {
    const std::string tenant = tenants_[random_.Below(tenants_.size())];
    const uint64_t turns = 2 + random_.Below(3);
    for (uint64_t turn = 0; turn < turns; ++turn) {
      node::Request& request =
          Add("turn", (turn == 0 ? Beginning() : "") + RandomText(&random_, 1 + random_.Below(30)));
      request.tenant = tenant;
      request.conversation = fmt::format("c{}", index);
    }
  }

  RandomRequestsOptions options_;
  Random random_;
  std::vector<std::string> tenants_;
  std::vector<std::string> beginnings_;
  std::vector<node::Request> requests_;
  size_t exact_ = 0;
};

}  // namespace

std::vector<node::Request> RandomRequests(const RandomRequestsOptions& options) {
  return Maker(options).Make();
}

std::string FormatRequests(const std::vector<node::Request>& requests) {
  std::string lines;
  for (const node::Request& request : requests) {
    Json body = {{"max_tokens", request.max_tokens},
                 {"temperature", request.temperature},
                 {"top_p", request.top_p},
                 {"seed", request.seed}};
    if (!request.stop.empty()) body["stop"] = request.stop;
    if (request.prompt_tokens.empty()) {
      body["prompt"] = request.prompt;
    } else {
      body["prompt"] = request.prompt_tokens;
    }
    Json line = {{"custom_id", request.custom_id},
                 {"method", "POST"},
                 {"url", "/v1/completions"},
                 {"body", body}};
    if (!request.tenant.empty()) line["tenant"] = request.tenant;
    if (!request.conversation.empty()) line["conversation"] = request.conversation;
    lines += line.dump() + "\n";
  }
  return lines;
}

}  // namespace kvant::support
