// `kvant generate` beside kvantd, as a user meets them: a prefix found again, a shard that dies or
// hangs in the middle, one that comes back empty.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/support/node_world.h"
#include "tests/support/program.h"
#include "tests/support/random_model.h"

namespace kvant {
namespace {

using nlohmann::json;
using support::Program;
using support::ProgramResult;
using support::RunProgram;
using support::Shard;
using testing::AllOf;
using testing::HasSubstr;

class GenerateProgram : public testing::Test {
 protected:
  // A model that is slow enough to be worth fetching, with a prompt of some twenty blocks.
  static void SetUpTestSuite() {
    directory_ = std::make_unique<support::TemporaryDirectory>();
    support::RandomModelOptions options;
    options.config = support::TinyConfig();
    options.config.layers = 4;
    options.config.hidden = 256;
    options.config.intermediate = 768;
    options.config.kv_heads = 4;
    options.config.head_dim = 64;
    ASSERT_TRUE(support::WriteRandomModel(Model(), options).ok());
    for (int i = 0; prompt_.size() < 2000; ++i) prompt_ += static_cast<char>('a' + i * i % 23 % 8);
  }
  static void TearDownTestSuite() { directory_.reset(); }
  static std::string Model() { return directory_->path() / "model"; }

  static std::vector<std::string> Command(const std::vector<std::string>& more) {
    std::vector<std::string> command = {
        KVANT_PATH, "generate",     "--model", Model(),       "--prompt", prompt_,
        "--json",   "--max-tokens", "24",      "--seed",      "5",        "--temperature",
        "0.8",      "--threads",    "1",       "--log-level", "info"};
    command.insert(command.end(), more.begin(), more.end());
    return command;
  }
  static json Generate(const std::vector<std::string>& more) {
    const ProgramResult result = RunProgram(Command(more));
    EXPECT_EQ(result.exit, 0) << result.errors;
    return json::parse(result.out, nullptr, false);
  }
  static std::string Alone() { return Generate({"--no-cache"}).at("text"); }

  static inline std::unique_ptr<support::TemporaryDirectory> directory_;
  static inline std::string prompt_;
};

TEST_F(GenerateProgram, TheSecondRunFindsThePrefixOnTwoShards) {
  Shard first(KVANTD_PATH);
  Shard second(KVANTD_PATH);
  const std::string cache = first.address + "," + second.address;
  const std::string expected = Alone();
  const json cold = Generate({"--cache", cache});
  EXPECT_EQ(cold.at("text"), expected);
  EXPECT_EQ(cold.at("hit_tokens"), 0);
  EXPECT_EQ(cold.at("recomputed_tokens"), cold.at("prompt_tokens"));
  EXPECT_EQ(cold.at("fetched_bytes"), 0);

  const json warm = Generate({"--cache", cache});
  EXPECT_EQ(warm.at("text"), expected);
  EXPECT_EQ(warm.at("tokens"), cold.at("tokens"));
  const int prompt = warm.at("prompt_tokens");
  EXPECT_GT(prompt, 640);
  EXPECT_EQ(warm.at("hit_tokens"), (prompt - 1) / 64 * 64);
  EXPECT_LE(warm.at("recomputed_tokens").get<int>(), 64);
  EXPECT_GT(warm.at("fetched_bytes").get<uint64_t>(), 0u);
  EXPECT_GT(warm.at("ttft_ms").get<double>(), 0);
  EXPECT_GT(warm.at("tpot_ms").get<double>(), 0);

  for (Shard* shard : {&first, &second}) {
    shard->program.Signal(SIGTERM);
    EXPECT_EQ(shard->program.Wait(std::chrono::seconds(60)), 0);
    EXPECT_THAT(shard->program.Errors(), HasSubstr("kvantd stats"));
  }
}

TEST_F(GenerateProgram, WhatIsStoredLosslessIsReadInFewerBytesWhoeverReadsIt) {
  const std::string expected = Generate({"--codec", "raw", "--no-cache"}).at("text");
  Shard plain(KVANTD_PATH);
  Shard lossless(KVANTD_PATH);
  uint64_t fetched[2] = {};
  for (const Shard* shard : {&plain, &lossless}) {
    const char* store = shard == &plain ? "plain" : "lossless";
    EXPECT_EQ(
        Generate({"--codec", "raw", "--store", store, "--cache", shard->address}).at("hit_tokens"),
        0);
    for (const char* reader : {"plain", "lossless"}) {
      const json warm = Generate({"--codec", "raw", "--store", reader, "--cache", shard->address});
      EXPECT_EQ(warm.at("text"), expected);
      EXPECT_LE(warm.at("recomputed_tokens").get<int>(), 64);
      fetched[shard == &plain ? 0 : 1] = warm.at("fetched_bytes").get<uint64_t>();
    }
  }
  EXPECT_LT(fetched[1], fetched[0] * 9 / 10);
}

TEST_F(GenerateProgram, WorksAlone) {
  const ProgramResult result = RunProgram(
      {KVANT_PATH, "generate", "--model", Model(), "--prompt", "abc", "--max-tokens", "5"});
  EXPECT_EQ(result.exit, 0) << result.errors;
  EXPECT_THAT(result.errors,
              AllOf(HasSubstr("prompt tokens found in the cache"), HasSubstr("resident memory:")));
  const json alone = Generate({});
  EXPECT_EQ(alone.at("text"), Alone());
  EXPECT_EQ(alone.at("hit_tokens"), 0);
}

TEST_F(GenerateProgram, AShardThatIsNotThereIsNamedAndDoneWithout) {
  Shard there(KVANTD_PATH);
  std::string gone;
  { gone = Shard(KVANTD_PATH).address; }
  Program generate(Command({"--cache", there.address + "," + gone}));
  EXPECT_EQ(generate.Wait(std::chrono::seconds(120)), 0);
  EXPECT_EQ(json::parse(generate.Out()).at("text"), Alone());
  EXPECT_THAT(generate.Errors(), HasSubstr(gone));
}

// Tried until a shard died between the plan and its last byte: all fetches take some 10 ms, and one
// of the two shards may hold nothing.
TEST_F(GenerateProgram, AShardKilledInTheMiddleCostsRecomputationOnly) {
  const std::string expected = Generate({"--codec", "raw", "--no-cache"}).at("text");
  std::unique_ptr<Shard> shards[] = {std::make_unique<Shard>(KVANTD_PATH),
                                     std::make_unique<Shard>(KVANTD_PATH)};
  const std::vector<std::string> cached = {"--codec", "raw", "--cache",
                                           shards[0]->address + "," + shards[1]->address};
  EXPECT_EQ(Generate(cached).at("text"), expected);
  bool in_the_middle = false;
  for (size_t attempt = 0; attempt < 10 && !in_the_middle; ++attempt) {
    std::unique_ptr<Shard>& victim = shards[attempt % 2];
    const std::string address = victim->address;
    // The smallest arena, so that there are many fetches one behind the other.
    std::vector<std::string> command = Command(cached);
    command.insert(command.end(), {"--tier-timeout", "4", "--arena", "1"});
    Program generate(command);
    ASSERT_TRUE(generate.AwaitErrors("plan: fetch", std::chrono::seconds(120)))
        << generate.Errors();
    victim->program.Signal(SIGKILL);
    ASSERT_EQ(generate.Wait(std::chrono::seconds(120)), 0) << generate.Errors();
    const json answer = json::parse(generate.Out());
    EXPECT_EQ(answer.at("text"), expected);
    in_the_middle = answer.at("recomputed_tokens").get<int>() > 64;
    if (in_the_middle) {
      EXPECT_THAT(generate.Errors(), AllOf(HasSubstr("is recomputed"), HasSubstr(address)));
    }

    victim.reset();
    victim = std::make_unique<Shard>(KVANTD_PATH, address);
    ASSERT_EQ(victim->address, address);
    EXPECT_EQ(Generate(cached).at("text"), expected) << "fills the empty shard";
    const json full = Generate(cached);
    EXPECT_EQ(full.at("text"), expected);
    EXPECT_LE(full.at("recomputed_tokens").get<int>(), 64) << "hits everything again";
  }
  EXPECT_TRUE(in_the_middle);
}

TEST_F(GenerateProgram, AShardThatHangsIsGivenUpInTime) {
  const std::string expected = Alone();
  Shard first(KVANTD_PATH);
  Shard second(KVANTD_PATH);
  const std::string cache = first.address + "," + second.address;
  EXPECT_EQ(Generate({"--cache", cache}).at("text"), expected);
  first.program.Signal(SIGSTOP);
  Program generate(Command({"--cache", cache, "--tier-timeout", "1"}));
  EXPECT_EQ(generate.Wait(std::chrono::seconds(60)), 0) << generate.Errors();
  EXPECT_EQ(json::parse(generate.Out()).at("text"), expected);
  first.program.Signal(SIGCONT);
}

}  // namespace
}  // namespace kvant
