// Prefill and decode as two nodes of one process, with a shard between them: the same answers
// whatever becomes of the prefill node.
#include "node/prefill_role.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/random.h"
#include "node/node.pb.h"
#include "tests/support/node_world.h"
#include "tests/support/random_requests.h"

namespace kvant::node {
namespace {

using support::AnswerText;
using support::NodeWorld;
using support::NodeWorldOptions;
using support::RandomRequests;
using support::TextsOf;

constexpr int kPrefillRank = 0;
constexpr int kDecodeRank = 1;

class Disaggregated {
 public:
  explicit Disaggregated(Duration patience = std::chrono::seconds(20)) {
    shard_side_ = hub_.MakeTransport();
    KV_CHECK(shard_side_->Listen("loopback:shard").ok());
    ShardHostOptions host;
    host.memory_bytes = uint64_t{32} << 20;
    shard_ = *ShardHost::Create(shard_side_.get(), host);
    prefill_ = MakeNode(&prefill_tier_);
    decode_ = MakeNode(&decode_tier_);

    prefill_wire_ = hub_.MakeTransport();
    decode_wire_ = hub_.MakeTransport();
    KV_CHECK(prefill_wire_->Listen("loopback:prefill").ok());
    prefill_link_ = std::make_unique<NodeLink>(prefill_wire_.get(), &SteadyClock(), kPrefillRank);
    decode_link_ = std::make_unique<NodeLink>(decode_wire_.get(), &SteadyClock(), kDecodeRank);
    KV_CHECK(
        decode_link_->Connect({{kPrefillRank, "loopback:prefill"}}, {}, std::chrono::seconds(2))
            .ok());
    router_ = std::make_unique<PrefillRouter>(decode_link_.get(), &SteadyClock(),
                                              std::vector<int>{kPrefillRank}, patience);
    prefill_->Start(nullptr);
    decode_->Start(router_.get());
    server_ = std::make_unique<PrefillServer>(prefill_link_.get(), &prefill_->supply(),
                                              &prefill_->domains(), &prefill_->model().config());
    SchedulerOptions options = decode_->MakeSchedulerOptions();
    options.store_all_answers = true;
    scheduler_ = std::make_unique<Scheduler>(&decode_->block_class(), &decode_->supply(),
                                             decode_->tier(), router_.get(), &decode_->decoder(),
                                             &decode_->clock(), &decode_->domains(), options);
  }

  // One round of everybody.
  void Step() {
    std::vector<NodeLink::Received> received;
    if (prefill_link_ != nullptr && !silent_) {
      prefill_->tier()->Poll();
      prefill_link_->Poll(&received);
      for (const auto& message : received) {
        if (message.message != nullptr) server_->OnMessage(message.rank, *message.message);
      }
      server_->Step();
    }
    received.clear();
    // Else a tiny model is computed too fast for anything to be fetched.
    for (int i = 0; i < 100; ++i) decode_->planner().SawPrefill(1, std::chrono::hours(1));
    scheduler_->Step();
    decode_link_->Poll(&received);
    for (const auto& message : received) router_->OnMessage(message.rank, message.message.get());
    router_->Tick();
  }
  std::vector<Answer> AnswerAll(const std::vector<Request>& requests,
                                const std::function<void(int round)>& between = {}) {
    std::map<std::string, size_t> order;
    for (const Request& request : requests) {
      order[request.custom_id] = order.size();
      scheduler_->Submit(request);
    }
    std::vector<Answer> answers;
    const TimePoint deadline = SteadyClock().Now() + std::chrono::seconds(60);
    // A few quiet rounds more, for what is between the nodes.
    int quiet = 0;
    for (int round = 0; quiet < 5; ++round) {
      quiet = Quiet() ? quiet + 1 : 0;
      if (SteadyClock().Now() >= deadline) {
        ADD_FAILURE() << scheduler_->open_requests() << " requests were not answered";
        break;
      }
      if (between) between(round);
      Step();
      for (Answer& answer : scheduler_->TakeAnswers()) answers.push_back(std::move(answer));
    }
    std::sort(answers.begin(), answers.end(), [&](const Answer& a, const Answer& b) {
      return order.at(a.custom_id) < order.at(b.custom_id);
    });
    return answers;
  }
  void KillPrefill() {
    server_.reset();
    prefill_link_.reset();
    prefill_wire_.reset();
  }
  void Silence() { silent_ = true; }

  NodeRuntime& prefill() { return *prefill_; }
  NodeRuntime& decode() { return *decode_; }
  LoopbackHub& hub() { return hub_; }

 private:
  bool Quiet() const {
    const bool prefilled = server_ == nullptr || silent_ ||
                           (server_->idle() && prefill_->tier()->idle() && decode_link_->flushed());
    return scheduler_->idle() && prefilled;
  }
  std::unique_ptr<NodeRuntime> MakeNode(std::unique_ptr<Transport>* transport) {
    NodeOptions options = NodeWorldOptions().node;
    options.model = support::TinyModel();
    std::unique_ptr<NodeRuntime> node = *NodeRuntime::Create(options);
    *transport = hub_.MakeTransport();
    const Status status = node->ConnectTier(
        transport->get(), *ShardMap::Make(kStaticEpoch, {kvant::Shard{"loopback:shard"}}),
        std::chrono::seconds(2), [this] { shard_->Turn(SteadyClock().Now()); });
    KV_CHECK(status.ok());
    return node;
  }

  LoopbackHub hub_;
  std::unique_ptr<Transport> shard_side_;
  std::unique_ptr<ShardHost> shard_;
  std::unique_ptr<Transport> prefill_tier_;
  std::unique_ptr<Transport> decode_tier_;
  std::unique_ptr<NodeRuntime> prefill_;
  std::unique_ptr<NodeRuntime> decode_;
  std::unique_ptr<Transport> prefill_wire_;
  std::unique_ptr<Transport> decode_wire_;
  std::unique_ptr<NodeLink> prefill_link_;
  std::unique_ptr<NodeLink> decode_link_;
  std::unique_ptr<PrefillRouter> router_;
  std::unique_ptr<PrefillServer> server_;
  std::unique_ptr<Scheduler> scheduler_;
  bool silent_ = false;
};

std::vector<AnswerText> Reference(const std::vector<Request>& requests) {
  NodeWorldOptions options;
  options.node.max_batch = 1;
  return TextsOf(NodeWorld(options).Answer(requests));
}

TEST(Disaggregation, PromptsAreComputedByThePrefillNode) {
  const std::vector<Request> requests = RandomRequests({.seed = 21});
  const std::vector<AnswerText> expected = Reference(requests);
  Disaggregated job;
  EXPECT_EQ(TextsOf(job.AnswerAll(requests)), expected);
  EXPECT_GT(job.decode().supply().stats().asked_blocks, 0u);
  EXPECT_GT(job.decode().tier()->stats().fetched_blocks, 0u);
  EXPECT_GT(job.prefill().supply().stats().computed_blocks,
            job.decode().supply().stats().computed_blocks);
}

TEST(Disaggregation, APrefillNodeThatDiesIsDoneWithout) {
  const std::vector<Request> requests = RandomRequests({.seed = 22});
  const std::vector<AnswerText> expected = Reference(requests);
  for (const int round : {0, 3, 17}) {
    SCOPED_TRACE(testing::Message() << "killed in round " << round);
    Disaggregated job;
    EXPECT_EQ(TextsOf(job.AnswerAll(requests,
                                    [&](int now) {
                                      if (now == round) job.KillPrefill();
                                    })),
              expected);
    EXPECT_GT(job.decode().supply().stats().computed_blocks, 0u);
  }
}

TEST(Disaggregation, APrefillNodeThatSaysNothingIsGivenUp) {
  const std::vector<Request> requests = RandomRequests({.seed = 23, .count = 8});
  const std::vector<AnswerText> expected = Reference(requests);
  Disaggregated job(std::chrono::milliseconds(30));
  job.Silence();
  EXPECT_EQ(TextsOf(job.AnswerAll(requests)), expected);
  EXPECT_GT(job.decode().supply().stats().computed_blocks, 0u);
}

// A turn's answer is stored in the background, so that whoever goes on from it finds it.
TEST(Disaggregation, AnswersAreFoundByTheNextTurn) {
  Request first;
  first.custom_id = "first";
  first.prompt_tokens.assign(70, 'a');
  first.max_tokens = 80;
  first.temperature = 1.0;
  Disaggregated job;
  const std::vector<Answer> answered = job.AnswerAll({first});
  ASSERT_EQ(answered.size(), 1u);
  const std::vector<int32_t>& generated = answered.front().tokens;
  ASSERT_GT(generated.size(), 60u) << "choose another seed";

  Request next = first;
  next.custom_id = "next";
  next.prompt_tokens.insert(next.prompt_tokens.end(), generated.begin(), generated.end());
  next.prompt_tokens.push_back('b');
  const std::vector<AnswerText> expected = Reference({next});
  const std::vector<Answer> continued = job.AnswerAll({next});
  EXPECT_EQ(TextsOf(continued), expected);
  const int stored = static_cast<int>((70 + generated.size()) / 64 * 64);
  EXPECT_EQ(continued.front().cached_tokens, stored);
}

// One endpoint of a stranger who connects to a node.
class Stranger {
 public:
  Stranger(LoopbackHub* hub, const std::string& address) : transport_(hub->MakeTransport()) {
    endpoint_ = (*transport_->Connect(address, std::chrono::seconds(1)))->id();
    Closed();
  }
  bool Send(const std::string& bytes) {
    Endpoint* endpoint = transport_->Find(endpoint_);
    return endpoint != nullptr && endpoint->Send(std::as_bytes(std::span(bytes))).ok();
  }
  bool Closed() {
    std::vector<Event> events;
    transport_->Poll(&events);
    for (const Event& event : events) closed_ |= event.kind == Event::Kind::kClosed;
    return closed_;
  }

 private:
  std::unique_ptr<Transport> transport_;
  EndpointId endpoint_ = 0;
  bool closed_ = false;
};

std::string Hello(uint32_t rank) {
  wire::Message message;
  message.set_version(kNodeProtocolVersion);
  message.mutable_hello()->set_rank(rank);
  return message.SerializeAsString();
}

TEST(NodeMessages, MalformedOnesEndTheirEndpoint) {
  LoopbackHub hub;
  const std::unique_ptr<Transport> transport = hub.MakeTransport();
  ASSERT_TRUE(transport->Listen("loopback:node").ok());
  NodeLink link(transport.get(), &SteadyClock(), 0);
  std::vector<NodeLink::Received> received;
  wire::Message progress;
  progress.set_version(kNodeProtocolVersion);
  progress.mutable_progress()->set_answered(1);
  wire::Message old = progress;
  old.set_version(kNodeProtocolVersion + 1);
  wire::Message empty;
  empty.set_version(kNodeProtocolVersion);
  const std::vector<std::vector<std::string>> bad = {
      {"garbage \xff\xff"},
      {""},
      {progress.SerializeAsString()},  // before it said who it is
      {Hello(1), old.SerializeAsString()},
      {Hello(1), empty.SerializeAsString()},
  };
  for (const auto& messages : bad) {
    Stranger stranger(&hub, "loopback:node");
    for (const std::string& message : messages) EXPECT_TRUE(stranger.Send(message));
    for (int i = 0; i < 5; ++i) link.Poll(&received);
    EXPECT_TRUE(stranger.Closed());
  }
  Stranger good(&hub, "loopback:node");
  EXPECT_TRUE(good.Send(Hello(3)));
  EXPECT_TRUE(good.Send(progress.SerializeAsString()));
  received.clear();
  for (int i = 0; i < 5; ++i) link.Poll(&received);
  ASSERT_EQ(received.size(), 1u);
  EXPECT_EQ(received.front().rank, 3);
  EXPECT_FALSE(good.Closed());
}

TEST(NodeMessages, NobodyTakesTheNameOfARankThatIsThere) {
  LoopbackHub hub;
  const std::unique_ptr<Transport> transport = hub.MakeTransport();
  ASSERT_TRUE(transport->Listen("loopback:node").ok());
  NodeLink link(transport.get(), &SteadyClock(), 0);
  std::vector<NodeLink::Received> received;
  Stranger first(&hub, "loopback:node");
  EXPECT_TRUE(first.Send(Hello(2)));
  for (int i = 0; i < 5; ++i) link.Poll(&received);
  Stranger second(&hub, "loopback:node");
  EXPECT_TRUE(second.Send(Hello(2)));
  for (int i = 0; i < 5; ++i) link.Poll(&received);
  EXPECT_TRUE(second.Closed());
  EXPECT_FALSE(first.Closed());
}

// Jobs that cannot be, and jobs at random: the node stays up and answers good ones.
TEST(NodeMessages, JobsThatCannotBeAreRefused) {
  const std::vector<Request> requests = RandomRequests({.seed = 24, .count = 8});
  const std::vector<AnswerText> expected = Reference(requests);
  Disaggregated job;
  Stranger stranger(&job.hub(), "loopback:prefill");
  ASSERT_TRUE(stranger.Send(Hello(7)));
  Random random(5);
  const auto send = [&](int round) {
    if (round >= 300) return;
    wire::Message message;
    message.set_version(kNodeProtocolVersion);
    wire::PrefillAsk& ask = *message.mutable_prefill_ask();
    ask.set_job(random.Next());
    ask.set_reply(random.Chance(0.5));
    const uint64_t tokens = random.Below(700);
    for (uint64_t i = 0; i < tokens; ++i) {
      ask.add_tokens(
          static_cast<uint32_t>(random.Chance(0.001) ? random.Next() : random.Below(300)));
    }
    for (uint64_t i = random.Below(4); i > 0; --i) {
      ask.add_missing(static_cast<uint32_t>(random.Chance(0.1) ? random.Next() : random.Below(8)));
    }
    std::string bytes = message.SerializeAsString();
    if (random.Chance(0.1)) bytes[random.Below(bytes.size())] ^= static_cast<char>(random.Next());
    if (!stranger.Send(bytes)) {
      stranger = Stranger(&job.hub(), "loopback:prefill");
      stranger.Send(Hello(7));
    }
    stranger.Closed();
  };
  EXPECT_EQ(TextsOf(job.AnswerAll(requests, send)), expected);
}

}  // namespace
}  // namespace kvant::node
