// What `kvant eval` feeds a model: that windows are what they say, and that a passkey lies where it
// is said to lie.
#include "node/eval_text.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "node/decoder.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

using testing::HasSubstr;

constexpr int32_t kBos = 256;  // of RandomTokenizerJson, which puts it before a text

class EvalTextTest : public testing::Test {
 protected:
  EvalTextTest() {
    Result<std::unique_ptr<Tokenizer>> tokenizer =
        Tokenizer::Parse(support::RandomTokenizerJson(400), "tokenizer.json");
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().message();
    tokenizer_ = *std::move(tokenizer);
  }
  EvalText Text(const std::string& text) const {
    Result<EvalText> made = EvalText::FromText(text, "book.txt", tokenizer_.get());
    EXPECT_TRUE(made.ok()) << made.status().message();
    return *std::move(made);
  }
  // Sentences that are all different.
  static std::string Book(int sentences) {
    std::string book;
    for (int i = 0; i < sentences; ++i) {
      book +=
          "Sentence number " + std::to_string(i) + (i % 5 == 4 ? " ends a line.\n" : " goes on. ");
    }
    return book;
  }
  std::string Decode(std::span<const int32_t> ids) const { return tokenizer_->Decode(ids); }

  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(EvalTextTest, WindowsFollowTheText) {
  const std::string book = Book(400);
  const EvalText text = Text(book);
  WindowPlan plan;
  plan.prefix = 128;
  plan.suffix = 40;
  const Result<std::vector<EvalWindow>> windows = text.Windows(plan);
  ASSERT_TRUE(windows.ok()) << windows.status().message();
  ASSERT_EQ(windows->size(), static_cast<size_t>(kDefaultWindows));
  size_t last_end = 0;
  for (const EvalWindow& window : *windows) {
    ASSERT_EQ(window.prefix.size(), 128U);
    ASSERT_EQ(window.suffix.size(), 40U);
    EXPECT_EQ(window.prefix[0], kBos);
    // Prefix and suffix are one stretch of the text, behind that of the window before.
    std::vector<int32_t> whole(window.prefix.begin() + 1, window.prefix.end());
    whole.insert(whole.end(), window.suffix.begin(), window.suffix.end());
    const std::string stretch = Decode(whole);
    const size_t begin = book.find(stretch);
    ASSERT_NE(begin, std::string::npos) << stretch;
    EXPECT_GE(begin, last_end);
    last_end = begin + stretch.size();
    // The copy is a span of the prefix.
    ASSERT_EQ(window.copy.size(), 40U);
    EXPECT_NE(std::search(window.prefix.begin() + 1, window.prefix.end(), window.copy.begin(),
                          window.copy.end()),
              window.prefix.end());
    // The stranger is another place's prefix.
    ASSERT_EQ(window.stranger.size(), 128U);
    EXPECT_EQ(window.stranger[0], kBos);
    const std::string strange = Decode(std::span(window.stranger).subspan(1));
    const size_t place = book.find(strange);
    ASSERT_NE(place, std::string::npos);
    EXPECT_TRUE(place + strange.size() <= begin || begin + Decode(window.prefix).size() <= place);
  }
  EXPECT_EQ(last_end, book.size());  // the last window ends where the text does

  const Result<std::vector<EvalWindow>> again = text.Windows(plan);
  ASSERT_TRUE(again.ok());
  for (size_t i = 0; i < windows->size(); ++i) EXPECT_EQ((*again)[i].copy, (*windows)[i].copy);
}

TEST_F(EvalTextTest, WindowsOverlapOnlyWhenAsked) {
  const EvalText text = Text(std::string(300, '1'));  // a token a digit
  ASSERT_EQ(text.tokens(), 300);
  WindowPlan plan;
  plan.prefix = 64;
  plan.suffix = 37;  // a window takes 63 + 37 = 100 tokens
  ASSERT_TRUE(text.Windows(plan).ok());
  EXPECT_EQ((*text.Windows(plan)).size(), 3U);
  plan.windows = 5;
  EXPECT_EQ((*text.Windows(plan)).size(), 5U);
  plan.windows = 202;
  const auto too_many = text.Windows(plan);
  ASSERT_FALSE(too_many.ok());
  EXPECT_THAT(too_many.status().message(), HasSubstr("201 different windows"));
}

TEST_F(EvalTextTest, AShortTextIsNamed) {
  const EvalText text = Text(std::string(99, '1'));
  WindowPlan plan;
  plan.prefix = 64;
  plan.suffix = 37;
  const auto windows = text.Windows(plan);
  ASSERT_FALSE(windows.ok());
  EXPECT_EQ(windows.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(windows.status().message(), HasSubstr("book.txt"));
  EXPECT_THAT(windows.status().message(), HasSubstr("99 tokens"));
  EXPECT_THAT(windows.status().message(), HasSubstr("--text"));
  // One window and no more: nothing is left to be a stranger.
  const EvalText one = Text(std::string(100, '1'));
  ASSERT_TRUE(one.Windows(plan).ok());
  EXPECT_TRUE((*one.Windows(plan))[0].stranger.empty());
  Random random(1);
  EXPECT_THAT(text.Passkey(512, 0.5, &random).status().message(), HasSubstr("512"));
}

TEST_F(EvalTextTest, NotUtf8IsRefused) {
  const auto text = EvalText::FromText("abc\xff", "book.txt", tokenizer_.get());
  ASSERT_FALSE(text.ok());
  EXPECT_THAT(text.status().message(), HasSubstr("book.txt"));
  EXPECT_FALSE(EvalText::Load("/nowhere/book.txt", tokenizer_.get()).ok());
}

TEST_F(EvalTextTest, PasskeyLiesAtItsDepth) {
  const EvalText text = Text(Book(800));
  for (const int length : {512, 1024, 2048}) {
    for (const double depth : {0.05, 0.25, 0.5, 0.75, 0.95}) {
      Random random(static_cast<uint64_t>(length));
      const Result<PasskeyPrompt> prompt = text.Passkey(length, depth, &random);
      ASSERT_TRUE(prompt.ok()) << prompt.status().message();
      EXPECT_EQ(prompt->length, length);
      EXPECT_EQ(prompt->depth, depth);
      // As long as asked, but for what the seams cost.
      EXPECT_LE(static_cast<int>(prompt->tokens.size()), length);
      EXPECT_GE(static_cast<int>(prompt->tokens.size()), length - 8);
      EXPECT_EQ(prompt->tokens[0], kBos);
      // The sentence once, at its depth; the question about it at the end; the answer its number.
      const std::string& whole = prompt->text;
      const size_t at = whole.find("The passkey for the ");
      ASSERT_NE(at, std::string::npos);
      const size_t question = whole.find("\n\nQuestion: What is the passkey for the ");
      ASSERT_NE(question, std::string::npos);
      EXPECT_NEAR(static_cast<double>(at), depth * static_cast<double>(question), 60.0);
      const size_t end = whole.find('.', at);
      const std::string sentence = whole.substr(at, end - at);
      const size_t is = sentence.find(" is ");
      ASSERT_NE(is, std::string::npos);
      const std::string place = sentence.substr(20, is - 20);
      const std::string number = sentence.substr(is + 4);
      EXPECT_EQ(number.size(), 5U);
      EXPECT_EQ(whole.substr(question),
                "\n\nQuestion: What is the passkey for the " + place + "?\nAnswer:");
      EXPECT_EQ(Decode(std::span(prompt->tokens).last(static_cast<size_t>(prompt->answer_tokens))),
                " " + number);
    }
  }
}

TEST_F(EvalTextTest, PasskeyNeedsNoSentences) {
  const EvalText text = Text(std::string(2000, '1'));
  for (const double depth : {0.05, 0.95}) {
    Random random(7);
    const Result<PasskeyPrompt> prompt = text.Passkey(512, depth, &random);
    ASSERT_TRUE(prompt.ok()) << prompt.status().message();
    EXPECT_EQ(prompt->text.starts_with("The passkey"), depth < 0.5);
  }
}

TEST_F(EvalTextTest, GapsOfSentencesAndLines) {
  EXPECT_EQ(SentenceGaps("One. Two? three. Four\n\nfive"), (std::vector<size_t>{4, 16, 21}));
  EXPECT_TRUE(SentenceGaps("no gap. here, nor here.").empty());
  EXPECT_TRUE(SentenceGaps("").empty());
}

}  // namespace
}  // namespace kvant::node
