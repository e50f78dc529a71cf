// Requests files, and answers files.
#include "base/check.h"
#include "node/requests.h"
#include "tests/fuzz/text_seeds.h"

namespace kvant::fuzz {

std::vector<Bytes> SeedInputs() {
  return TextSeeds(
      {R"({"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"Hello",)"
       R"("max_tokens":5,"temperature":0.5,"top_p":0.9,"seed":7,"stop":["x","y"]},"tenant":"t"})",
       R"({"custom_id":"b","method":"POST","url":"/v1/chat/completions","body":{"messages":)"
       R"([{"role":"system","content":"Be brief."},{"role":"user","content":"Hi"}],)"
       R"("max_tokens":3,"temperature":0}})",
       R"({"custom_id":"c","method":"POST","url":"/v1/completions","conversation":"k",)"
       R"("body":{"prompt":[1,2,3],"stop":"."}})"
       "\n\n"
       R"({"custom_id":"d","method":"POST","url":"/v1/completions","conversation":"k",)"
       R"("body":{"prompt":"more"}})"});
}

}  // namespace kvant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text = kvant::fuzz::AsTextView(data, size);
  const auto requests = kvant::node::ParseRequests(text, "fuzz");
  if (requests.ok()) {
    for (const kvant::node::Request& request : *requests) {
      KV_CHECK(request.max_tokens >= 0 && !request.custom_id.empty());
      // An answer with any strings in it must read back as it was.
      kvant::node::Answer answer;
      answer.custom_id = request.custom_id;
      answer.text = request.prompt;
      const std::string line = FormatAnswer(answer, "model", 0);
      const auto again = kvant::node::ParseAnswers(line, "fuzz");
      KV_CHECK(again.ok() && again->size() == 1 && again->front().text == answer.text);
    }
  }
  (void)kvant::node::ParseAnswers(text, "fuzz");
  return 0;
}
