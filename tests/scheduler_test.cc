// The promise of the main path: with the whole of what is stored read (`--wire full`), an answer
// does not depend on the cache, on who else is answered, on threads, or on what fails on the way.
#include "node/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "tests/support/node_world.h"
#include "tests/support/random_model.h"
#include "tests/support/random_requests.h"

namespace kvant::node {
namespace {

using support::AnswerText;
using support::NodeWorld;
using support::NodeWorldOptions;
using support::RandomRequests;
using support::TextsOf;

constexpr uint64_t kPlenty = uint64_t{64} << 20;

std::vector<AnswerText> Reference(const std::string& codec, const std::vector<Request>& requests) {
  NodeWorldOptions options;
  options.node.codec = codec;
  options.node.max_batch = 1;
  return TextsOf(NodeWorld(options).Answer(requests));
}

class Equality : public testing::TestWithParam<std::string> {
 protected:
  NodeWorldOptions Options(uint64_t shard_bytes) const {
    NodeWorldOptions options;
    options.node.codec = Codec();
    if (GetParam() == kLossless) options.node.store = kLossless;
    SetModel(support::TinyModel(), &options);
    options.shard_bytes = shard_bytes;
    return options;
  }
  void SetModel(const std::filesystem::path& model, NodeWorldOptions* options) const {
    options->node.model = model;
    if (GetParam() != kExact) return;
    options->node.store = "klt";
    options->node.pack = support::KltPackOf(model);
    options->node.cuts = "coarse,fine,finest,exact";
  }
  // What is attended, whatever it is stored as.
  static std::string Codec() {
    return GetParam() == kLossless || GetParam() == kExact ? "raw" : GetParam();
  }

  static constexpr const char* kLossless = "lossless";
  static constexpr const char* kExact = "klt_exact";
};

INSTANTIATE_TEST_SUITE_P(Codecs, Equality,
                         testing::Values("raw", "lossless", "klt_exact", "tile8", "tile4"),
                         [](const auto& codec) { return codec.param; });

TEST_P(Equality, OfBatchesThreadsAndCaches) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const std::vector<Request> requests = RandomRequests({.seed = seed});
    const std::vector<AnswerText> expected = Reference(Codec(), requests);
    ASSERT_EQ(expected.size(), requests.size());

    NodeWorldOptions batched = Options(0);
    batched.node.max_batch = 8;
    batched.node.threads = 2;
    EXPECT_EQ(TextsOf(NodeWorld(batched).Answer(requests)), expected) << "no cache, batch of 8";

    NodeWorld cached(Options(kPlenty));
    EXPECT_EQ(TextsOf(cached.Answer(requests)), expected) << "a shard";
    EXPECT_GT(cached.stats().cached_tokens, 0u);
    const std::vector<Answer> again = cached.Answer(requests);
    EXPECT_EQ(TextsOf(again), expected) << "everything is in memory";
    EXPECT_GT(cached.stats().local_hit_tokens, cached.stats().prompt_tokens / 2);
    for (const Answer& answer : again) {
      if (!answer.error.ok()) continue;
      EXPECT_EQ(answer.cached_tokens, (answer.prompt_tokens - 1) / 64 * 64) << answer.custom_id;
    }

    // Without memory of its own the node takes everything from the shard.
    NodeWorldOptions remote = Options(kPlenty);
    remote.node.local_cache_bytes = 0;
    remote.always_fetch = true;
    NodeWorld from_tier(remote);
    EXPECT_EQ(TextsOf(from_tier.Answer(requests)), expected) << "no memory in the node";
    EXPECT_EQ(TextsOf(from_tier.Answer(requests)), expected) << "all from the shard";
    EXPECT_GT(from_tier.node().tier()->stats().fetched_blocks, 0u);
  }
}

// Layers that see 100 tokens, so that most of a prefix is not fetched.
TEST_P(Equality, OfModelsWithSlidingLayers) {
  uint64_t saved = 0;
  for (const auto& model : {support::SlidingModel(), support::AllSlidingModel()}) {
    for (const Wire wire : {Wire::kFull, Wire::kK8V4, Wire::kK4V4}) {
      SCOPED_TRACE(testing::Message() << model << " at " << WireName(wire));
      // Blocks of klt have their own cuts.
      if (Options(0).node.store == "klt" && wire != Wire::kFull) continue;
      const std::vector<Request> requests =
          RandomRequests({.seed = 20 + static_cast<uint64_t>(wire)});
      NodeWorldOptions alone = Options(0);
      SetModel(model, &alone);
      alone.node.wire = WireName(wire);
      alone.node.max_batch = 1;
      const std::vector<AnswerText> expected = TextsOf(NodeWorld(alone).Answer(requests));
      for (const uint64_t local_bytes : {uint64_t{0}, uint64_t{300} << 10}) {
        NodeWorldOptions options = Options(kPlenty);
        SetModel(model, &options);
        options.node.wire = WireName(wire);
        options.node.local_cache_bytes = local_bytes;
        options.always_fetch = true;
        NodeWorld world(options);
        for (int pass = 0; pass < 2; ++pass) {
          EXPECT_EQ(TextsOf(world.Answer(requests)), expected)
              << "pass " << pass << " with " << local_bytes << " bytes in the node";
        }
        saved += world.node().supply().stats().sliding_bytes_skipped;
      }
    }
  }
  EXPECT_GT(saved, 0u);
}

TEST(Chat, IsAPromptThatTheModelsTemplateWrites) {
  support::TemporaryDirectory model;
  ASSERT_TRUE(support::WriteRandomModel(model.path(), {.config = support::TinyConfig()}).ok());
  std::ofstream(model.path() / "chat_template.jinja")
      << "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + "
         "message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}";
  NodeWorldOptions options;
  options.node.model = model.path();
  Request chat;
  chat.custom_id = "a";
  chat.chat = true;
  chat.messages = {{"user", "which way?"}};
  Request written;
  written.custom_id = "a";
  // The template writes every special token, so no BOS is put in front.
  const auto tokenizer = Tokenizer::LoadFrom(model.path());
  ASSERT_TRUE(tokenizer.ok());
  written.prompt_tokens =
      *(*tokenizer)
           ->Encode("<|im_start|>user\nwhich way?<|im_end|>\n<|im_start|>assistant\n", false);
  const std::vector<AnswerText> answers = TextsOf(NodeWorld(options).Answer({chat}));
  EXPECT_EQ(answers, TextsOf(NodeWorld(options).Answer({written})));

  options.node.model = support::TinyModel();
  const std::vector<Answer> refused = NodeWorld(options).Answer({chat});
  ASSERT_EQ(refused.size(), 1u);
  EXPECT_EQ(refused[0].error.code(), StatusCode::kUnsupported);
}

TEST_P(Equality, UnderConstantEviction) {
  const std::vector<Request> requests = RandomRequests({.seed = 7, .count = 64});
  const std::vector<AnswerText> expected = Reference(Codec(), requests);
  NodeWorldOptions options = Options(1 << 20);  // has room for 64 blocks
  options.node.local_cache_bytes = 64 << 10;
  options.always_fetch = true;
  options.node.tier_arena_bytes = 1;  // two blocks, as little as there can be
  NodeWorld world(options);
  for (int pass = 0; pass < 2; ++pass) {
    EXPECT_EQ(TextsOf(world.Answer(requests)), expected) << "pass " << pass;
  }
  EXPECT_GT(world.node().cache().evicted(), 0u);
  EXPECT_GT(world.shard().stats().store.evicted, 0u) << world.shard().stats().ToJson();
}

TEST_P(Equality, OverWiresThatFail) {
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    // With the last one blocks that are here in part are built upon.
    const auto& model = seed <= 2 ? support::TinyModel() : support::SlidingModel();
    SCOPED_TRACE(testing::Message() << "seed " << seed << ", " << model);
    const std::vector<Request> requests = RandomRequests({.seed = 40 + seed});
    NodeWorldOptions alone = Options(0);
    SetModel(model, &alone);
    alone.node.max_batch = 1;
    const std::vector<AnswerText> expected = TextsOf(NodeWorld(alone).Answer(requests));
    NodeWorldOptions options = Options(kPlenty);
    SetModel(model, &options);
    options.node.local_cache_bytes = seed <= 2 ? 0 : 300 << 10;
    options.node.tier_timeout_s = 0.05;
    options.always_fetch = true;
    FaultOptions faults;
    faults.seed = seed;
    faults.drop_message = 0.01;
    faults.delay_message = 0.05;
    faults.duplicate_message = 0.05;
    faults.corrupt_message = 0.01;
    faults.delay_written = 0.05;
    faults.drop_written = 0.01;
    faults.corrupt_payload = 0.1;
    faults.cut = 0.002;
    faults.refuse_send = 0.05;
    faults.refuse_submit = 0.05;
    faults.fail_transfer = 0.02;
    options.faults = faults;
    NodeWorld world(options);
    for (int pass = 0; pass < 2; ++pass) {
      EXPECT_EQ(TextsOf(world.Answer(requests)), expected) << "pass " << pass;
    }
    EXPECT_GT(world.fault_counts().corrupted, 0u);
    // Seen by the node in what it fetched, or by the shard in what it was given.
    EXPECT_GT(world.node().tier()->stats().data_loss + world.shard().stats().data_loss, 0u);
  }
}

Request Ask(const std::string& name, int tokens, int max_tokens) {
  Request request;
  request.custom_id = name;
  for (int i = 0; i < tokens; ++i) request.prompt_tokens.push_back('a' + i * i % 8);
  request.max_tokens = max_tokens;
  request.seed = 4;
  return request;
}

NodeWorldOptions Cached() {
  NodeWorldOptions options;
  options.shard_bytes = kPlenty;
  options.always_fetch = true;
  return options;
}

TEST(Scheduler, WhatWasGeneratedIsFoundByTheNextTurn) {
  NodeWorldOptions options = Cached();
  options.store_all_answers = true;
  NodeWorld world(options);
  const Request first = Ask("first", 70, 80);
  const std::vector<Answer> answered = world.Answer({first});
  const std::vector<int32_t>& generated = answered.front().tokens;
  ASSERT_GT(generated.size(), 60u) << "choose another seed";
  EXPECT_EQ(world.shard().stats().store.sealed, (70 + generated.size()) / 64);

  Request next = Ask("next", 70, 20);
  next.prompt_tokens.insert(next.prompt_tokens.end(), generated.begin(), generated.end());
  next.prompt_tokens.push_back('b');
  const std::vector<Answer> continued = world.Answer({next});
  EXPECT_EQ(continued.front().cached_tokens, static_cast<int>((70 + generated.size()) / 64 * 64));
  EXPECT_EQ(TextsOf(continued), Reference("tile8", {next}));
}

TEST(Scheduler, AnAnswerIsNotStoredWhereMoreWouldBeFetchedForIt) {
  NodeWorldOptions options = Cached();
  options.node.wire = "k8v4";
  options.node.local_cache_bytes = 0;
  options.store_all_answers = true;
  NodeWorld world(options);
  const Request first = Ask("first", 200, 1);
  world.Answer({first});
  EXPECT_EQ(world.shard().stats().store.sealed, 3u);
  // What was read in fewer bits is not read once more, in full, to compute the answer's block.
  const Request again = Ask("again", 200, 80);
  EXPECT_EQ(world.Answer({again}).front().cached_tokens, 192);
  EXPECT_EQ(world.shard().stats().store.sealed, 3u);
  EXPECT_EQ(world.shard().stats().payload_bytes_served, world.node().tier()->stats().fetched_bytes);
}

TEST(Scheduler, TenantsFindOnlyWhatTheirDomainStored) {
  NodeWorldOptions options = Cached();
  options.node.domains = {"shared=acme,zeta"};
  NodeWorld world(options);
  const auto cached = [&](const std::string& tenant) {
    Request request = Ask("ask", 200, 1);
    request.tenant = tenant;
    return world.Answer({request}).front().cached_tokens;
  };
  EXPECT_EQ(cached("omega"), 0);
  EXPECT_EQ(cached("omega"), 192);
  EXPECT_EQ(cached("acme"), 0);
  EXPECT_EQ(cached("zeta"), 192);
  EXPECT_EQ(cached("shared"), 0) << "a tenant with the name of a domain";
  EXPECT_EQ(cached(""), 0);
}

// Names come from outside: no choice of them makes one tenant continue another's conversation.
TEST(Scheduler, AConversationBelongsToItsTenant) {
  NodeWorld world(Cached());
  Request secret = Ask("secret", 100, 5);
  secret.tenant = "a";
  secret.conversation = std::string("b\0c", 3);
  Request curious = Ask("curious", 10, 5);
  curious.tenant = std::string("a\0b", 3);
  curious.conversation = "c";
  const std::vector<Answer> answers = world.Answer({secret, curious});
  EXPECT_EQ(answers[0].prompt_tokens, 100);
  EXPECT_EQ(answers[1].prompt_tokens, 10);
}

TEST(Scheduler, AFailedTurnEndsItsConversation) {
  NodeWorld world(Cached());
  std::vector<Request> turns = {Ask("one", 70, 5), Ask("two", support::kTinyContext, 5),
                                Ask("three", 5, 5), Ask("alone", 5, 5)};
  for (size_t i = 0; i < 3; ++i) turns[i].conversation = "talk";
  const std::vector<Answer> answers = world.Answer(turns);
  EXPECT_TRUE(answers[0].error.ok());
  EXPECT_THAT(answers[1].error.message(), testing::HasSubstr("shorten the prompt"));
  EXPECT_THAT(answers[2].error.message(), testing::HasSubstr("'two' failed"));
  EXPECT_TRUE(answers[3].error.ok());
}

class Taught : public testing::Test {
 protected:
  Taught() : world_(NodeWorldOptions()) {
    NodeRuntime& node = world_.node();
    scheduler_ = std::make_unique<Scheduler>(&node.block_class(), &node.supply(), nullptr, nullptr,
                                             &node.decoder(), &node.clock(), &node.domains(),
                                             node.MakeSchedulerOptions());
  }
  Answer Run(const Request& request) {
    scheduler_->Submit(request);
    while (!scheduler_->idle()) scheduler_->Step();
    return scheduler_->TakeAnswers().front();
  }
  NodeWorld world_;
  std::unique_ptr<Scheduler> scheduler_;
};

TEST_F(Taught, ATeacherOfTheSameAnswerAgreesEverywhere) {
  const Answer own = Run(Ask("own", 70, 40));
  scheduler_->SetTeacher("taught", own.tokens);
  const Answer taught = Run(Ask("taught", 70, 40));
  EXPECT_EQ(taught.tokens, own.tokens);
  EXPECT_EQ(scheduler_->stats().teacher_tokens, own.tokens.size());
  EXPECT_EQ(scheduler_->stats().teacher_agreed, own.tokens.size());
}

TEST_F(Taught, ATeacherOfAnotherModelIsRefused) {
  for (const std::vector<int32_t>& tokens :
       {std::vector<int32_t>{}, std::vector<int32_t>{-1}, std::vector<int32_t>{300},
        std::vector<int32_t>(static_cast<size_t>(support::kTinyContext), 'a')}) {
    scheduler_->SetTeacher("taught", tokens);
    const Answer answer = Run(Ask("taught", 5, 5));
    EXPECT_EQ(answer.error.code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(answer.error.message(), testing::HasSubstr("another model"));
  }
}

TEST_F(Taught, ListenersHearTheAnswerInPieces) {
  std::string heard;
  int pieces = 0;
  scheduler_->SetListener([&](const std::string&, std::string_view text) {
    heard += text;
    ++pieces;
  });
  Request request = Ask("spoken", 70, 60);
  request.stop = {"zzzz"};
  const Answer answer = Run(request);
  EXPECT_EQ(heard, answer.text);
  EXPECT_GT(pieces, 5);
}

}  // namespace
}  // namespace kvant::node
