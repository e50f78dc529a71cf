// Requests files and answers files.
#include "node/requests.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/random.h"
#include "tests/support/random_model.h"
#include "tests/support/random_requests.h"

namespace kvant::node {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(ParseRequests, ReadsEveryField) {
  const auto requests = ParseRequests(
      R"({"custom_id": "a", "method": "POST", "url": "/v1/completions", "tenant": "acme",)"
      R"( "conversation": "c1", "body": {"model": "m", "prompt": "Hi", "max_tokens": 7,)"
      R"( "temperature": 0.5, "top_p": 0.9, "seed": 11, "stop": ["x", "yz"], "user": "u"}})"
      "\n\n  \r\n"
      R"({"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body":)"
      R"( {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],)"
      R"( "max_completion_tokens": 3, "stop": "end", "seed": -1}})"
      "\n"
      R"({"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": [5, 6]}})",
      "in.jsonl");
  ASSERT_TRUE(requests.ok()) << requests.status().ToString();
  ASSERT_EQ(requests->size(), 3u);
  const Request& a = (*requests)[0];
  EXPECT_EQ(a.custom_id, "a");
  EXPECT_FALSE(a.chat);
  EXPECT_EQ(a.prompt, "Hi");
  EXPECT_EQ(a.tenant, "acme");
  EXPECT_EQ(a.conversation, "c1");
  EXPECT_EQ(a.max_tokens, 7);
  EXPECT_EQ(a.temperature, 0.5);
  EXPECT_EQ(a.top_p, 0.9);
  EXPECT_EQ(a.seed, 11u);
  EXPECT_THAT(a.stop, ElementsAre("x", "yz"));
  const Request& b = (*requests)[1];
  EXPECT_TRUE(b.chat);
  ASSERT_EQ(b.messages.size(), 2u);
  EXPECT_EQ(b.messages[1].role, "user");
  EXPECT_EQ(b.messages[1].content, "q");
  EXPECT_EQ(b.max_tokens, 3);
  EXPECT_THAT(b.stop, ElementsAre("end"));
  EXPECT_EQ(b.seed, ~uint64_t{0});
  const Request& c = (*requests)[2];
  EXPECT_THAT(c.prompt_tokens, ElementsAre(5, 6));
  EXPECT_EQ(c.temperature, 1.0) << "OpenAI's default";
  EXPECT_EQ(c.max_tokens, 16);
  EXPECT_EQ(c.seed, 0u);
}

// One malformed line, what the message must name, and the remedy that it must hold.
struct Malformed {
  const char* what;
  const char* line;
  const char* field;
  const char* remedy;
};

std::string WithBody(const std::string& body) {
  return R"({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": )" + body + "}";
}

TEST(ParseRequests, MalformedLinesAreNamed) {
  const Malformed cases[] = {
      {"cut off", R"({"custom_id": "a")", "not JSON", "character"},
      {"an overflow", R"({"custom_id": 8e999})", "too large", "double"},
      {"not UTF-8", "{\"custom_id\": \"\xff\"}", "not JSON", "UTF-8"},
      {"a list", "[1]", "line 2", "one JSON object a line"},
      {"a number", "7", "line 2", "one JSON object a line"},
      {"no name", R"({"method": "POST"})", "'custom_id'", "name of its own"},
      {"a number as name", R"({"custom_id": 3})", "'custom_id'", "expected a string"},
      {"no method", R"({"custom_id": "a"})", "'method'", "POST"},
      {"get", R"({"custom_id": "a", "method": "GET"})", "'method'", "POST"},
      {"url", R"({"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}})",
       "'url'", "/v1/completions"},
      {"no body", R"({"custom_id": "a", "method": "POST", "url": "/v1/completions"})", "'body'",
       "object"},
      {"unknown field", R"({"custom_id": "a", "prio": 1})", "'prio'", "tenant"},
      {"tenant", R"({"custom_id": "a", "method": "POST", "url": "/v1/completions", "tenant": 1})",
       "'tenant'", "string"},
      {"a name used twice",
       R"({"custom_id": "first", "method": "POST", "url": "/v1/completions", "body": {"prompt": "p"}})",
       "'custom_id'", "unique"},
  };
  const std::string good =
      R"({"custom_id": "first", "method": "POST", "url": "/v1/completions", "body": {"prompt": "p"}})"
      "\n";
  for (const Malformed& c : cases) {
    const auto parsed = ParseRequests(good + c.line, "in.jsonl");
    ASSERT_FALSE(parsed.ok()) << c.what;
    EXPECT_EQ(parsed.status().code(), StatusCode::kInvalidArgument) << c.what;
    EXPECT_THAT(parsed.status().message(), testing::AllOf(HasSubstr("in.jsonl, line 2"),
                                                          HasSubstr(c.field), HasSubstr(c.remedy)))
        << c.what;
  }
}

TEST(ParseRequests, MalformedBodiesAreNamed) {
  const Malformed cases[] = {
      {"no prompt", "{}", "'body.prompt'", "string or token ids"},
      {"number as prompt", R"({"prompt": 1})", "'body.prompt'", "string or a list"},
      {"no tokens", R"({"prompt": []})", "'body.prompt'", "string or a list"},
      {"negative token", R"({"prompt": [1, -1]})", "'body.prompt'", "token ids"},
      {"huge token", R"({"prompt": [18446744073709551615]})", "'body.prompt'", "token ids"},
      {"fraction as token", R"({"prompt": [1.5]})", "'body.prompt'", "token ids"},
      {"two strings", R"({"prompt": ["a", "b"]})", "'body.prompt'", "one string"},
      {"unknown", R"({"prompt": "p", "n": 2})", "'body.n'", "max_tokens"},
      {"stream", R"({"prompt": "p", "stream": true})", "'body.stream'", "remove"},
      {"max_tokens 0", R"({"prompt": "p", "max_tokens": 0})", "'body.max_tokens'", "1 to"},
      {"max_tokens text", R"({"prompt": "p", "max_tokens": "9"})", "'body.max_tokens'", "number"},
      {"max_tokens 1.5", R"({"prompt": "p", "max_tokens": 1.5})", "'body.max_tokens'", "whole"},
      {"temperature", R"({"prompt": "p", "temperature": 2.5})", "'body.temperature'", "0 to 2"},
      {"top_p 0", R"({"prompt": "p", "top_p": 0})", "'body.top_p'", "above 0"},
      {"top_p 2", R"({"prompt": "p", "top_p": 2})", "'body.top_p'", "0 to 1"},
      {"seed", R"({"prompt": "p", "seed": 1.5})", "'body.seed'", "integer"},
      {"stop number", R"({"prompt": "p", "stop": 1})", "'body.stop'", "non-empty string"},
      {"stop empty", R"({"prompt": "p", "stop": [""]})", "'body.stop'", "non-empty"},
      {"stop many",
       R"({"prompt": "p", "stop": ["1","2","3","4","5","6","7","8","9","a","b","c","d","e","f","g","h"]})",
       "'body.stop'", "at most 16"},
  };
  for (const Malformed& c : cases) {
    const auto parsed = ParseRequests("\n\n" + WithBody(c.line), "in.jsonl");
    ASSERT_FALSE(parsed.ok()) << c.what;
    EXPECT_THAT(parsed.status().message(), testing::AllOf(HasSubstr("in.jsonl, line 3"),
                                                          HasSubstr(c.field), HasSubstr(c.remedy)))
        << c.what;
  }
}

TEST(ParseRequests, ChatNeedsMessages) {
  const std::string head =
      R"({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": )";
  for (const char* body : {R"({})", R"({"messages": []})", R"({"messages": [1]})",
                           R"({"messages": [{"content": "x"}]})"}) {
    const auto parsed = ParseRequests(head + body + "}", "in.jsonl");
    ASSERT_FALSE(parsed.ok()) << body;
    EXPECT_THAT(parsed.status().message(), HasSubstr("'body.messages'")) << body;
  }
}

TEST(ParseRequests, ContentMayBeAListOfTexts) {
  const std::string head =
      R"({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": )"
      R"({"messages": [{"role": "user", "content": )";
  const auto parsed = ParseRequests(
      head + R"([{"type": "text", "text": "which "}, {"type": "text", "text": "way?"}]}]}})",
      "in.jsonl");
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  EXPECT_EQ((*parsed)[0].messages[0].content, "which way?");
  for (const char* content : {R"([{"type": "image_url"}])", R"([{"type": "text"}])",
                              R"([{"type": "text", "text": 1}])", "[1]"}) {
    const auto refused = ParseRequests(head + content + "}]}}", "in.jsonl");
    ASSERT_FALSE(refused.ok()) << content;
    EXPECT_THAT(refused.status().message(), HasSubstr("'body.messages.content'")) << content;
  }
}

TEST(ParseRequests, AnEmptyFileIsRefused) {
  const auto parsed = ParseRequests("\n \n", "in.jsonl");
  ASSERT_FALSE(parsed.ok());
  EXPECT_THAT(parsed.status().message(), HasSubstr("holds no request"));
}

// Depth costs an attacker one byte a level; the parser must not pay with its stack.
TEST(ParseRequests, DeepNestingIsRefused) {
  const std::string deep(1 << 20, '[');
  EXPECT_FALSE(ParseRequests(WithBody("{\"prompt\": " + deep), "in.jsonl").ok());
  const std::string closed = deep + std::string(1 << 20, ']');
  EXPECT_FALSE(ParseRequests(WithBody("{\"prompt\": " + closed + "}"), "in.jsonl").ok());
}

TEST(ParseRequests, ReadsWhatIsWritten) {
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    const std::vector<Request> requests = support::RandomRequests({.seed = seed});
    const std::string text = support::FormatRequests(requests);
    const auto parsed = ParseRequests(text, "in.jsonl");
    ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
    EXPECT_EQ(support::FormatRequests(*parsed), text);
  }
}

TEST(ParseRequests, MutationsEndInAStatus) {
  const std::string text = support::FormatRequests(support::RandomRequests({.count = 8}));
  Random random(3);
  int refused = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string mutated = text.substr(0, 1 + random.Below(2000));
    for (uint64_t edits = 1 + random.Below(3); edits > 0; --edits) {
      const size_t at = random.Below(mutated.size());
      switch (random.Below(3)) {
        case 0:
          mutated[at] = static_cast<char>(random.Next());
          break;
        case 1:
          mutated.erase(at, 1 + random.Below(8));
          break;
        default:
          mutated.insert(at, 1 + random.Below(8), "{}[]\",:0-\\"[random.Below(10)]);
          break;
      }
      if (mutated.empty()) mutated = "{";
    }
    const auto parsed = ParseRequests(mutated, "in.jsonl");
    if (parsed.ok()) continue;
    ++refused;
    EXPECT_THAT(parsed.status().message(), HasSubstr("in.jsonl"));
  }
  EXPECT_GT(refused, 1000);
}

TEST(Answers, AreReadBackAsWritten) {
  Answer text;
  text.custom_id = "a\n\"b\"";
  text.text = "caf\xc3\xa9 \xe2\x82\xac\n";
  text.tokens = {1, 2, 3};
  text.finish = FinishReason::kLength;
  text.prompt_tokens = 129;
  text.cached_tokens = 64;
  text.tier_tokens = 128;
  text.fetched_tokens = 64;
  text.ttft = std::chrono::microseconds(1500);
  text.tpot = std::chrono::microseconds(250);
  Answer chat = text;
  chat.custom_id = "chat";
  chat.chat = true;
  chat.finish = FinishReason::kStop;
  Answer failed;
  failed.custom_id = "failed";
  failed.error = InvalidArgument("the prompt is too long");
  failed.finish = FinishReason::kError;
  std::string lines;
  for (const Answer& answer : {text, chat, failed}) {
    const std::string line = FormatAnswer(answer, "model", 1234);
    EXPECT_EQ(line.find('\n'), std::string::npos);
    lines += line + "\n";
  }
  EXPECT_THAT(lines, HasSubstr(R"("prompt_tokens_details":{"cached_tokens":64})"));
  const auto parsed = ParseAnswers(lines, "out.jsonl");
  ASSERT_TRUE(parsed.ok()) << parsed.status().ToString();
  ASSERT_EQ(parsed->size(), 3u);
  for (size_t i = 0; i < 2; ++i) {
    const Answer& written = i == 0 ? text : chat;
    const Answer& read = (*parsed)[i];
    EXPECT_EQ(read.custom_id, written.custom_id);
    EXPECT_EQ(read.chat, written.chat);
    EXPECT_EQ(read.text, written.text);
    EXPECT_EQ(read.tokens, written.tokens);
    EXPECT_EQ(read.finish, written.finish);
    EXPECT_EQ(read.prompt_tokens, written.prompt_tokens);
    EXPECT_EQ(read.cached_tokens, written.cached_tokens);
    EXPECT_EQ(read.tier_tokens, written.tier_tokens);
    EXPECT_EQ(read.fetched_tokens, written.fetched_tokens);
    EXPECT_EQ(read.ttft, written.ttft);
    EXPECT_EQ(read.tpot, written.tpot);
  }
  EXPECT_FALSE((*parsed)[2].error.ok());
  EXPECT_EQ((*parsed)[2].error.message(), failed.error.message());
  EXPECT_EQ((*parsed)[2].finish, FinishReason::kError);
}

TEST(Answers, OfSomebodyElseAreNamed) {
  for (const char* line : {"{}", R"({"custom_id": "a", "error": null})", R"([])",
                           R"({"custom_id": 1})", R"({"custom_id": "a", "error": {}})"}) {
    const auto parsed = ParseAnswers(std::string("\n") + line, "ref.jsonl");
    ASSERT_FALSE(parsed.ok()) << line;
    EXPECT_THAT(parsed.status().message(),
                testing::AllOf(HasSubstr("ref.jsonl, line 2"), HasSubstr("not an answer")));
  }
}

TEST(Files, ErrorsNameThePath) {
  const support::TemporaryDirectory directory;
  const std::string path = directory.path() / "file";
  ASSERT_TRUE(WriteFile(path, std::string_view("a\0b", 3)).ok());
  const auto text = ReadFile(path);
  ASSERT_TRUE(text.ok());
  EXPECT_EQ(*text, std::string_view("a\0b", 3));
  const auto missing = ReadFile(path + "-missing");
  ASSERT_FALSE(missing.ok());
  EXPECT_THAT(missing.status().message(),
              testing::AllOf(HasSubstr("file-missing"), HasSubstr("No such file")));
  const Status unwritable = WriteFile(directory.path() / "no" / "such", "x");
  ASSERT_FALSE(unwritable.ok());
  EXPECT_THAT(unwritable.message(), HasSubstr("no/such"));
  const auto folder = ReadFile(directory.path());
  ASSERT_FALSE(folder.ok()) << "a directory is not a file";
}

}  // namespace
}  // namespace kvant::node
