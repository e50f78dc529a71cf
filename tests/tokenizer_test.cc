// The same ids and texts as the Python package `tokenizers`, from tests/golden/tokenizer
// (scripts/golden/tokenizer.py), and what happens to files that are not supported or malformed.
#include "node/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/random.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

using nlohmann::json;
using testing::HasSubstr;
using Ids = std::vector<int32_t>;

std::string ReadText(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::filesystem::path GoldenDirectory() {
  return std::filesystem::path(KVANT_SOURCE_DIR) / "tests/golden/tokenizer";
}

class GoldenTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    auto loaded = Tokenizer::Load(GoldenDirectory() / (GetParam() + ".json"));
    ASSERT_TRUE(loaded.ok()) << loaded.status().ToString();
    tokenizer_ = *std::move(loaded);
    cases_ = json::parse(ReadText(GoldenDirectory() / (GetParam() + ".cases.json")));
    ASSERT_GT(cases_.size(), 40U);
  }
  std::unique_ptr<Tokenizer> tokenizer_;
  json cases_;
};

TEST_P(GoldenTest, EncodesAsHuggingFace) {
  int compared = 0;
  for (const json& golden : cases_) {
    if (!golden.contains("ids")) continue;
    const auto text = golden["text"].get<std::string>();
    const auto ids = tokenizer_->Encode(text, false);
    ASSERT_TRUE(ids.ok()) << ids.status().ToString();
    ++compared;
    EXPECT_EQ(*ids, golden["ids"].get<Ids>()) << text;
    EXPECT_EQ(*tokenizer_->Encode(text, true), golden["special"].get<Ids>()) << text;
  }
  EXPECT_GT(compared, 30);
}

TEST_P(GoldenTest, DecodesAsHuggingFace) {
  for (const json& golden : cases_) {
    if (!golden.contains("decode")) continue;
    const auto ids = golden["decode"].get<Ids>();
    EXPECT_EQ(tokenizer_->Decode(ids), golden["text"].get<std::string>());
    EXPECT_EQ(tokenizer_->Decode(ids, false), golden["all"].get<std::string>());
  }
}

TEST_P(GoldenTest, StreamsWhatItDecodes) {
  for (const json& golden : cases_) {
    const auto ids = golden[golden.contains("ids") ? "ids" : "decode"].get<Ids>();
    for (const bool skip_special : {true, false}) {
      StreamDecoder stream(tokenizer_.get(), skip_special);
      std::string text;
      for (const int32_t id : ids) text += stream.Push(id);
      text += stream.Finish();
      EXPECT_EQ(text, tokenizer_->Decode(ids, skip_special));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, GoldenTest,
                         testing::Values("gpt2", "gpt2_prefix_space", "llama3", "digits",
                                         "removed_inverted", "nfc_removed", "llama2", "gemma",
                                         "metaspace_first", "metaspace_split", "added", "words",
                                         "behaviors", "deepseek2", "deepseek3", "qwen2"));

class TinyTest : public testing::Test {
 protected:
  void SetUp() override {
    description_ = json::parse(support::RandomTokenizerJson(400));
    tokenizer_ = *Tokenizer::Parse(description_.dump(), "t");
  }
  // The error that the tokenizer's description ends in after `change`.
  template <typename Change>
  Status ErrorAfter(const Change& change) {
    json changed = description_;
    change(changed);
    const auto parsed = Tokenizer::Parse(changed.dump(), "t");
    EXPECT_FALSE(parsed.ok());
    return parsed.status();
  }
  json description_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(TinyTest, RoundTripsAnyText) {
  Random random(5);
  for (int round = 0; round < 300; ++round) {
    std::string text;
    for (uint64_t length = random.Below(60); length > 0; --length) {
      const char* pieces[] = {"a", "b", " ", "\n", "é", "字", "😀", "Z", "1", "\x01", "'s", "."};
      text += pieces[random.Below(std::size(pieces))];
    }
    const auto ids = tokenizer_->Encode(text, true);
    ASSERT_TRUE(ids.ok());
    EXPECT_EQ(tokenizer_->Decode(*ids), text);
  }
}

TEST_F(TinyTest, SaysWhereTextIsNotUtf8) {
  const auto ids = tokenizer_->Encode("abc\xff", false);
  EXPECT_EQ(ids.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(ids.status().message(), HasSubstr("at byte 3"));
  for (const std::string_view bad : {"\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe4\xbd"}) {
    EXPECT_FALSE(tokenizer_->Encode(bad, false).ok());
  }
}

TEST_F(TinyTest, KnowsItsTokens) {
  EXPECT_EQ(tokenizer_->FindToken("<|begin_of_text|>"), 256);
  EXPECT_EQ(tokenizer_->FindToken("nothing like it"), std::nullopt);
  EXPECT_TRUE(tokenizer_->IsSpecial(257));
  EXPECT_FALSE(tokenizer_->IsSpecial(65));
  EXPECT_EQ(tokenizer_->vocab_size(), 400);
  EXPECT_EQ(tokenizer_->TokenBytes(32), " ");
  EXPECT_EQ(tokenizer_->TokenBytes(-1), "");
  EXPECT_EQ(tokenizer_->TokenBytes(400), "");
}

TEST_F(TinyTest, LongPiecesTakeNoQuadraticTime) {
  const std::string text(1 << 20, 'a');
  const auto begin = std::chrono::steady_clock::now();
  const auto ids = tokenizer_->Encode(text, false);
  ASSERT_TRUE(ids.ok());
  EXPECT_EQ(ids->size(), text.size() / 2);
  // A quadratic loop over a million symbols needs minutes.
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(30));
}

TEST_F(TinyTest, RefusesWhatItDoesNotImplement) {
  const auto refused = [&](auto change, std::string_view what) {
    const Status status = ErrorAfter(change);
    EXPECT_EQ(status.code(), StatusCode::kUnsupported) << status.ToString();
    EXPECT_THAT(status.message(), HasSubstr(std::string(what)));
    EXPECT_THAT(status.message(), HasSubstr("supported"));
  };
  refused([](json& t) { t["model"]["type"] = "Unigram"; }, "model Unigram");
  refused([](json& t) { t["model"]["end_of_word_suffix"] = "</w>"; }, "end_of_word_suffix");
  refused([](json& t) { t["model"]["dropout"] = 0.1; }, "dropout");
  refused([](json& t) { t["normalizer"] = {{"type", "Precompiled"}}; }, "normalizer Precompiled");
  refused([](json& t) { t["pre_tokenizer"] = {{"type", "UnicodeScripts"}}; }, "UnicodeScripts");
  refused([](json& t) { t["decoder"] = nullptr; }, "decoder none");
  refused([](json& t) { t["decoder"] = {{"type", "WordPiece"}}; }, "decoder WordPiece");
  refused([](json& t) { t["post_processor"] = {{"type", "BertProcessing"}}; }, "BertProcessing");
  refused(
      [](json& t) {
        const json digits = {{"type", "Digits"}};
        t["pre_tokenizer"] = {{"type", "Sequence"},
                              {"pretokenizers", json::array({t["pre_tokenizer"], digits})}};
      },
      "behind ByteLevel");
  const auto with_pattern = [](const char* pattern) {
    return [pattern](json& t) {
      const json byte_level = t["pre_tokenizer"];
      const json split = {{"type", "Split"},
                          {"pattern", {{"Regex", pattern}}},
                          {"behavior", "Isolated"},
                          {"invert", false}};
      t["pre_tokenizer"] = {{"type", "Sequence"},
                            {"pretokenizers", json::array({split, byte_level})}};
    };
  };
  refused(with_pattern(R"(\R)"), "\\R");
  refused(with_pattern(R"([a-z&&[^b]])"), "&&");
  refused(with_pattern(R"([a[b]])"), "class inside");
  refused(with_pattern(R"((?<n>a))"), "(?<n");
  refused(with_pattern(R"(a(?i)b)"), "(?i)");
  refused(with_pattern(R"(a{1,2}+)"), "{n,m}+");
  refused(with_pattern(R"(\xE9)"), "\\xE9");
  EXPECT_THAT(ErrorAfter(with_pattern("(a")).message(), HasSubstr("does not compile"));
}

TEST_F(TinyTest, SaysWhatIsMalformed) {
  EXPECT_THAT(Tokenizer::Parse("{", "t").status().message(), HasSubstr("malformed JSON"));
  EXPECT_THAT(Tokenizer::Parse("[]", "t").status().message(), HasSubstr("\"model\""));
  EXPECT_THAT(ErrorAfter([](json& t) { t["model"]["vocab"]["a"] = -1; }).message(),
              HasSubstr("the id of token \"a\""));
  EXPECT_THAT(ErrorAfter([](json& t) { t["model"]["vocab"]["a"] = 98; }).message(),
              HasSubstr("id 98 has two tokens"));
  EXPECT_THAT(ErrorAfter([](json& t) { t["model"]["merges"][2] = "x"; }).message(),
              HasSubstr("merge number 3"));
  EXPECT_THAT(Tokenizer::Load("/nonexistent/tokenizer.json").status().message(),
              HasSubstr("no such file"));
}

// Any change of a few bytes ends in a tokenizer or in an error (run under the asan preset).
TEST_F(TinyTest, SurvivesMutations) {
  const std::string good = json::parse(support::RandomTokenizerJson(262)).dump();
  Random random(77);
  for (int round = 0; round < 3000; ++round) {
    std::string text = good;
    for (uint64_t edits = 1 + random.Below(3); edits > 0; --edits) {
      const size_t at = random.Below(text.size());
      const char* tokens[] = {"0", "-", "\"", "null", "[", "}", "1e99", "\\u0000"};
      if (random.Chance(0.5)) {
        text[at] = static_cast<char>(random.Below(128));
      } else {
        text.insert(at, tokens[random.Below(std::size(tokens))]);
      }
    }
    const auto parsed = Tokenizer::Parse(text, "t");
    if (parsed.ok()) {
      const auto ids = (*parsed)->Encode("some text <|end_of_text|>", true);
      if (ids.ok()) (*parsed)->Decode(*ids);
    }
  }
}

}  // namespace
}  // namespace kvant::node
