// Held-out files by kind: that each file of each kind is measured, in an order that depends on
// nothing but names.
#include "node/eval_set.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "node/requests.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

using testing::HasSubstr;

class EvalSetTest : public testing::Test {
 protected:
  EvalSetTest() {
    Result<std::unique_ptr<Tokenizer>> tokenizer =
        Tokenizer::Parse(support::RandomTokenizerJson(400), "tokenizer.json");
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status().message();
    tokenizer_ = *std::move(tokenizer);
    plan_.prefix = 64;
    plan_.suffix = 37;  // a window takes 63 + 37 = 100 tokens
  }
  // A text of one digit, a token each.
  void Write(const std::string& name, char digit, size_t tokens) {
    const std::filesystem::path file = directory_.path() / name;
    std::filesystem::create_directories(file.parent_path());
    EXPECT_TRUE(WriteFile(file, std::string(tokens, digit)).ok());
  }
  EvalSet Load() {
    Result<EvalSet> set = EvalSet::OfFolder(directory_.path(), tokenizer_.get());
    EXPECT_TRUE(set.ok()) << set.status().message();
    return *std::move(set);
  }
  // The digits that the windows' prefixes are made of, or their strangers'.
  std::string Digits(const EvalWindows& windows, bool stranger = false) {
    std::string digits;
    for (const EvalWindow& window : windows.windows) {
      const std::vector<int32_t>& ids = stranger ? window.stranger : window.prefix;
      digits += ids.empty() ? "-" : tokenizer_->Decode(std::span(ids).last(1));
    }
    return digits;
  }

  support::TemporaryDirectory directory_;
  std::unique_ptr<Tokenizer> tokenizer_;
  WindowPlan plan_;
};

TEST_F(EvalSetTest, TakesEachFileOfEachKindByName) {
  Write("prose/b.txt", '2', 250);
  Write("prose/a.txt", '1', 350);
  Write("prose/.hidden.txt", '9', 350);
  Write("code/c.c", '3', 110);  // no room for a second prefix
  Write("manifest.json", '9', 350);
  std::filesystem::create_directories(directory_.path() / "empty");
  const EvalSet set = Load();
  EXPECT_EQ(set.longest(), 350);

  Result<EvalWindows> windows = set.Windows(plan_);
  ASSERT_TRUE(windows.ok()) << windows.status().message();
  EXPECT_EQ(Digits(*windows), "312");
  // Of another file of its kind, where there is one.
  EXPECT_EQ(Digits(*windows, true), "-21");
  ASSERT_EQ(windows->kinds.size(), 2U);
  EXPECT_EQ(windows->kinds[0].name, "code");
  EXPECT_EQ(windows->kinds[0].windows, 1U);
  EXPECT_EQ(windows->kinds[1].name, "prose");
  EXPECT_EQ(windows->kinds[1].first, 1U);
  EXPECT_EQ(windows->kinds[1].windows, 2U);

  plan_.windows = 2;
  windows = set.Windows(plan_);
  ASSERT_TRUE(windows.ok()) << windows.status().message();
  EXPECT_EQ(Digits(*windows), "331122");
  EXPECT_EQ(windows->kinds[1].first, 2U);
  EXPECT_EQ(windows->kinds[1].windows, 4U);
}

TEST_F(EvalSetTest, OneFileHasNoKind) {
  Write("a.txt", '1', 350);
  const Result<EvalSet> set = EvalSet::OfFile(directory_.path() / "a.txt", tokenizer_.get());
  ASSERT_TRUE(set.ok());
  const Result<EvalWindows> windows = set->Windows(plan_);
  ASSERT_TRUE(windows.ok());
  EXPECT_EQ(windows->windows.size(), 3U);
  EXPECT_TRUE(windows->kinds.empty());
}

TEST_F(EvalSetTest, PasskeysTakeTurnsInTextsThatAreLongEnough) {
  Write("prose/a.txt", '1', 600);
  Write("prose/b.txt", '2', 300);
  Write("prose/c.txt", '3', 600);
  const EvalSet set = Load();
  for (const auto& [turn, digit] :
       {std::pair(0, "111"), std::pair(1, "333"), std::pair(2, "111")}) {
    Random random(7);
    const auto prompt = set.Passkey(512, 0.5, static_cast<size_t>(turn), &random);
    ASSERT_TRUE(prompt.ok()) << prompt.status().message();
    EXPECT_THAT(prompt->text, HasSubstr(digit));
  }
}

TEST_F(EvalSetTest, SaysWhatIsMissing) {
  const auto refused = [&](const std::filesystem::path& folder) {
    const Result<EvalSet> set = EvalSet::OfFolder(folder, tokenizer_.get());
    EXPECT_FALSE(set.ok());
    EXPECT_EQ(set.status().code(), StatusCode::kInvalidArgument);
    return std::string(set.status().message());
  };
  EXPECT_THAT(refused(directory_.path() / "nowhere"), HasSubstr("nowhere"));
  Write("a.txt", '1', 350);
  EXPECT_THAT(refused(directory_.path()), HasSubstr("a subfolder for each kind"));
  Write("prose/short.txt", '1', 99);
  const Result<EvalWindows> windows = Load().Windows(plan_);
  ASSERT_FALSE(windows.ok());
  EXPECT_THAT(windows.status().message(), HasSubstr("short.txt"));
}

}  // namespace
}  // namespace kvant::node
