// The shard server message by message: what it answers, what it refuses, what it forgets.
#include "cache_service/shard_server.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>

#include "base/bytes.h"
#include "cache_service/wire.h"
#include "tests/block_maker.h"

namespace kvant {
namespace {

constexpr EndpointId kClient = 7;

class ShardServerTest : public testing::Test {
 protected:
  ShardServerTest() : arena_(256 << 10) {
    options_.store.arena = arena_;
    options_.store.max_blocks = 64;
    options_.store.max_pins = 256;
    Restart();
  }
  void Restart() {
    server_ = std::make_unique<ShardServer>(options_);
    Event connected;
    connected.kind = Event::Kind::kConnected;
    connected.endpoint = kClient;
    server_->OnEvent(connected, now_);
  }

  wire::Envelope Ask(uint64_t request_id) const {
    wire::Envelope envelope;
    envelope.set_version(kProtocolVersion);
    envelope.set_epoch(kStaticEpoch);
    envelope.set_request_id(request_id);
    envelope.set_deadline_ms(1000);
    return envelope;
  }
  std::vector<Action> Deliver(std::vector<std::byte> bytes) {
    Event event;
    event.kind = Event::Kind::kMessage;
    event.endpoint = kClient;
    event.message = std::move(bytes);
    server_->OnEvent(event, now_);
    return Actions();
  }
  std::vector<Action> Deliver(const wire::Envelope& envelope) {
    return Deliver(EncodeMessage(envelope));
  }
  std::vector<Action> Actions() {
    std::vector<Action> actions;
    server_->TakeActions(&actions);
    return actions;
  }
  std::vector<Action> Done(const Action& transfer, Status status = OkStatus()) {
    Event event;
    event.kind = Event::Kind::kTransferDone;
    event.endpoint = kClient;
    event.cookie = transfer.transfer.cookie;
    event.status = std::move(status);
    server_->OnEvent(event, now_);
    return Actions();
  }
  static wire::Envelope Reply(const Action& action) {
    wire::Envelope envelope;
    EXPECT_EQ(action.kind, Action::Kind::kSend);
    EXPECT_TRUE(DecodeMessage(action.message, &envelope).ok());
    return envelope;
  }
  static StatusCode DoneCode(const std::vector<Action>& actions) {
    if (actions.size() != 1) return StatusCode::kOk;
    return FromWire(Reply(actions[0]).done().status()).code();
  }

  wire::Envelope ReserveOf(const TestBlock& block, uint64_t id) const {
    wire::Envelope ask = Ask(id);
    ask.mutable_reserve()->set_key(ToWire(block.key));
    ask.mutable_reserve()->set_payload_bytes(block.payload.size());
    ask.mutable_reserve()->set_manifest_bytes(MaxManifestBytes(block.manifest.rows.size()));
    ToWire(RemoteWindow{1, 2, block.payload.size()}, ask.mutable_reserve()->mutable_window());
    return ask;
  }
  wire::Envelope SealOf(const TestBlock& block, uint64_t id) const {
    wire::Envelope ask = Ask(id);
    ask.mutable_seal()->set_manifest(ToWire(EncodeManifest(block.manifest)));
    return ask;
  }
  wire::Envelope FetchOf(const std::vector<TestBlock>& blocks, uint64_t id) const {
    wire::Envelope ask = Ask(id);
    ToWire(RemoteWindow{3, 4, 1 << 20}, ask.mutable_fetch()->mutable_window());
    ToWire(SelectAll(), ask.mutable_fetch()->add_selections());
    uint64_t offset = 0;
    for (const TestBlock& block : blocks) {
      wire::FetchItem* item = ask.mutable_fetch()->add_items();
      item->set_key(ToWire(block.key));
      item->set_offset(offset);
      item->set_capacity(block.payload.size());
      item->set_immediate_base(static_cast<uint32_t>(ask.fetch().items_size() - 1) * kMaxLayers);
      offset += block.payload.size();
    }
    return ask;
  }
  void Store(const TestBlock& block) {
    const uint64_t id = next_id_++;
    Deliver(ReserveOf(block, id));
    const std::vector<Action> reads = Deliver(SealOf(block, id));
    ASSERT_EQ(reads.size(), 1U);
    std::copy(block.payload.begin(), block.payload.end(), reads[0].transfer.local.begin());
    const std::vector<Action> answer = Done(reads[0]);
    ASSERT_EQ(answer.size(), 1U);
    ASSERT_EQ(Reply(answer[0]).put_reply().phase(), wire::PutReply::SEALED);
  }

  std::vector<std::byte> arena_;
  ShardServerOptions options_;
  std::unique_ptr<ShardServer> server_;
  TimePoint now_{};
  uint64_t next_id_ = 1000;
};

TEST_F(ShardServerTest, AnswersWhatItCannotUnderstandOnlyIfItKnowsWhom) {
  EXPECT_TRUE(Deliver(std::vector<std::byte>(20)).empty());
  EXPECT_TRUE(Deliver(std::vector<std::byte>{}).empty());
  std::vector<std::byte> flipped = EncodeMessage(Ask(5));
  flipped[2] ^= std::byte{1};
  EXPECT_TRUE(Deliver(flipped).empty());
  wire::Envelope ask = Ask(5);
  ask.set_version(99);
  EXPECT_EQ(DoneCode(Deliver(ask)), StatusCode::kInvalidArgument);
  EXPECT_EQ(DoneCode(Deliver(Ask(6))), StatusCode::kInvalidArgument);  // no body
  EXPECT_EQ(server_->stats().malformed_messages, 5U);
}

TEST_F(ShardServerTest, RefusesAnotherEpoch) {
  wire::Envelope ask = Ask(5);
  ask.set_epoch(kStaticEpoch + 1);
  ask.mutable_stats();
  EXPECT_EQ(DoneCode(Deliver(ask)), StatusCode::kStaleEpoch);
  EXPECT_EQ(server_->stats().stale_epoch, 1U);
}

TEST_F(ShardServerTest, WritesLayerMajorWithAnImmediateAtEachLayersEnd) {
  const std::vector<TestBlock> blocks = {MakeBlock(TestKey(1), {}, 1),
                                         MakeBlock(TestKey(2), {}, 2)};
  for (const TestBlock& block : blocks) Store(block);
  const std::vector<Action> actions = Deliver(FetchOf(blocks, 1));
  ASSERT_EQ(actions.size(), 1U + 18U);
  const wire::FetchReply reply = Reply(actions[0]).fetch_reply();
  ASSERT_EQ(reply.items_size(), 2);
  EXPECT_EQ(*ParseManifest(AsBytes(reply.items(1).manifest())), blocks[1].manifest);
  for (size_t i = 0; i < 18; ++i) {
    const Transfer& transfer = actions[1 + i].transfer;
    const size_t layer = i / 6;
    const size_t item = i / 3 % 2;
    EXPECT_EQ(transfer.remote_offset, item * 900 + layer * 300 + i % 3 * 100);
    EXPECT_EQ(transfer.immediate.has_value(), i % 3 == 2);
    if (transfer.immediate) {
      EXPECT_EQ(*transfer.immediate, item * kMaxLayers + layer);
    }
  }
  EXPECT_EQ(server_->store().stats().pins, 2U);
  for (size_t i = 0; i < 18; ++i) EXPECT_TRUE(Done(actions[1 + i]).empty());
  EXPECT_EQ(server_->store().stats().pins, 0U);
  EXPECT_EQ(server_->stats().payload_bytes_served, 1800U);
}

TEST_F(ShardServerTest, MovesOnlyTheRowsThatAreMissing) {
  const TestBlock block = MakeBlock(TestKey(1), {}, 1, 5, 100, 3);
  Store(block);
  Selection selection;
  selection.first_cuts = {1, 0, 0, 0};
  selection.cuts = {3, 1, 0, 0};
  selection.SetLayers({false, true, false, false, true});
  wire::Envelope ask = FetchOf({block}, 1);
  ToWire(selection, ask.mutable_fetch()->mutable_selections(0));
  const std::vector<Action> actions = Deliver(ask);
  ASSERT_EQ(actions.size(), 1U + 6U);
  for (size_t i = 0; i < 6; ++i) {
    const Transfer& transfer = actions[1 + i].transfer;
    // Values, then refinements of keys, of layer 1 and then of layer 4.
    const size_t layer = i < 3 ? 1 : 4;
    const size_t row = (1 + i % 3) * 5 + layer;
    EXPECT_TRUE(std::equal(transfer.local.begin(), transfer.local.end(),
                           block.payload.begin() + static_cast<ptrdiff_t>(row * 100)));
    EXPECT_EQ(transfer.remote_offset, i * 100);
    EXPECT_EQ(transfer.immediate.has_value(), i % 3 == 2);
    if (transfer.immediate) {
      EXPECT_EQ(*transfer.immediate, layer - 1);
    }
  }
}

TEST_F(ShardServerTest, RefusesSelectionsThatCannotBe) {
  const TestBlock block = MakeBlock(TestKey(1), {}, 1);
  Store(block);
  uint64_t id = 1;
  const auto code = [&](auto&& spoil) {
    wire::Envelope ask = FetchOf({block}, id++);
    spoil(ask.mutable_fetch()->mutable_selections(0));
    const std::vector<Action> actions = Deliver(ask);
    if (actions.size() != 1) return StatusCode::kOk;
    const wire::FetchItemReply item = Reply(actions[0]).fetch_reply().items(0);
    EXPECT_FALSE(item.present());
    return static_cast<StatusCode>(item.code());
  };
  using Wire = wire::Selection;
  const StatusCode refused = StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](Wire*) {}), StatusCode::kOk);
  EXPECT_EQ(code([](Wire* sent) { sent->set_cuts(1), sent->set_first_cuts(1); }), refused);
  EXPECT_EQ(code([](Wire* sent) { sent->set_layer_end(0); }), refused);
  EXPECT_EQ(code([](Wire* sent) { sent->set_layers(std::string(128, '\0')); }), refused);
  EXPECT_EQ(code([](Wire* sent) { sent->set_layers(std::string(128, '\xFF')); }), refused);
  EXPECT_EQ(code([](Wire* sent) { sent->set_layers(std::string(129, '\1')); }), refused);
  EXPECT_EQ(code([](Wire* sent) { sent->set_layers(std::string(100'000, '\1')); }), refused);
}

TEST_F(ShardServerTest, SubmitsNoMoreThanTheClientMayHaveInFlight) {
  options_.limits.max_transfers_per_client = 4;
  Restart();
  const TestBlock block = MakeBlock(TestKey(1), {}, 1);
  Store(block);
  std::vector<Action> flying = Deliver(FetchOf({block}, 1));
  flying.erase(flying.begin());
  size_t submitted = flying.size();
  EXPECT_EQ(submitted, 4U);
  while (!flying.empty()) {
    const Action first = flying.front();
    flying.erase(flying.begin());
    for (Action& action : Done(first)) flying.push_back(std::move(action));
    EXPECT_LE(flying.size(), 4U);
    ++submitted;
  }
  EXPECT_EQ(submitted, 4U + 9U);
}

TEST_F(ShardServerTest, AFailedWriteEndsItsItemOnce) {
  const TestBlock block = MakeBlock(TestKey(1), {}, 1);
  Store(block);
  const std::vector<Action> actions = Deliver(FetchOf({block}, 1));
  const std::vector<Action> told = Done(actions[1], Unavailable("cut"));
  ASSERT_EQ(told.size(), 1U);
  EXPECT_EQ(Reply(told[0]).fetch_item_failed().item(), 0U);
  for (size_t i = 2; i < actions.size(); ++i)
    EXPECT_TRUE(Done(actions[i], Unavailable("cut")).empty());
  EXPECT_EQ(server_->store().stats().pins, 0U);
}

TEST_F(ShardServerTest, ADuplicatedRequestChangesNothing) {
  const TestBlock block = MakeBlock(TestKey(1), {}, 1);
  const std::vector<Action> first = Deliver(ReserveOf(block, 1));
  const std::vector<Action> second = Deliver(ReserveOf(block, 1));
  EXPECT_EQ(Reply(first[0]).put_reply().phase(), wire::PutReply::RESERVED);
  EXPECT_EQ(Reply(second[0]).put_reply().phase(), wire::PutReply::RESERVED);
  EXPECT_EQ(server_->store().stats().reservations, 1U);
  const std::vector<Action> read = Deliver(SealOf(block, 1));
  EXPECT_EQ(read.size(), 1U);
  EXPECT_TRUE(Deliver(SealOf(block, 1)).empty());
}

TEST_F(ShardServerTest, AFetchThatEndedIsNotServedAgain) {
  // The client has verified those bytes; writing them again could only harm.
  const TestBlock block = MakeBlock(TestKey(5), {}, 5);
  Store(block);
  std::vector<Action> actions = Deliver(FetchOf({block}, 900));
  for (size_t i = 0; i < actions.size(); ++i) {
    if (actions[i].kind != Action::Kind::kTransfer) continue;
    for (Action& more : Done(actions[i])) actions.push_back(std::move(more));
  }
  EXPECT_TRUE(Deliver(FetchOf({block}, 900)).empty());
  EXPECT_TRUE(Deliver(FetchOf({block}, 899)).empty());
  EXPECT_FALSE(Deliver(FetchOf({block}, 901)).empty());
}

TEST_F(ShardServerTest, ALostClientLeavesNothingBehind) {
  const TestBlock stored = MakeBlock(TestKey(1), {}, 1);
  const TestBlock open = MakeBlock(TestKey(2), {}, 2);
  Store(stored);
  const uint64_t used = server_->store().stats().used_bytes;
  Deliver(FetchOf({stored}, 1));
  Deliver(ReserveOf(open, 2));
  Deliver(SealOf(open, 2));
  Event closed;
  closed.kind = Event::Kind::kClosed;
  closed.endpoint = kClient;
  server_->OnEvent(closed, now_);
  const ServerStats stats = server_->stats();
  EXPECT_EQ(stats.clients, 0U);
  EXPECT_EQ(stats.store.pins, 0U);
  EXPECT_EQ(stats.store.reservations, 0U);
  EXPECT_EQ(stats.store.used_bytes, used);
  EXPECT_EQ(server_->store().CheckInvariants(), "");
}

TEST_F(ShardServerTest, BytesThatLandAfterTheLeaseEndedHarmNobody) {
  const TestBlock block = MakeBlock(TestKey(1), {}, 1);
  Deliver(ReserveOf(block, 1));
  const std::vector<Action> reads = Deliver(SealOf(block, 1));
  ASSERT_EQ(reads.size(), 1U);
  now_ += std::chrono::seconds(2);
  server_->Tick(now_);
  const std::vector<Action> told = Actions();
  ASSERT_EQ(told.size(), 1U);
  EXPECT_EQ(FromWire(Reply(told[0]).put_reply().status()).code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(server_->store().CheckInvariants(), "");
  EXPECT_TRUE(Done(reads[0]).empty());
  Store(block);
  EXPECT_EQ(server_->store().CheckInvariants(), "");
}

TEST_F(ShardServerTest, LimitsAreAnswers) {
  options_.limits.max_puts_per_client = 1;
  options_.limits.max_requests_per_client = 1;
  Restart();
  const TestBlock a = MakeBlock(TestKey(1), {}, 1);
  const TestBlock b = MakeBlock(TestKey(2), {}, 2);
  Store(a);
  Deliver(ReserveOf(b, 1));
  const std::vector<Action> put = Deliver(ReserveOf(MakeBlock(TestKey(3), {}, 3), 2));
  EXPECT_EQ(FromWire(Reply(put[0]).put_reply().status()).code(), StatusCode::kResourceExhausted);
  Deliver(FetchOf({a}, 3));
  EXPECT_EQ(DoneCode(Deliver(FetchOf({a}, 4))), StatusCode::kResourceExhausted);
  EXPECT_EQ(server_->stats().refused_busy, 2U);
  wire::Envelope lookup = Ask(9);
  lookup.mutable_lookup()->set_keys(std::string((kMaxChain + 1) * 32, 'x'));
  EXPECT_EQ(DoneCode(Deliver(lookup)), StatusCode::kInvalidArgument);
  lookup.mutable_lookup()->set_keys("odd");
  EXPECT_EQ(DoneCode(Deliver(lookup)), StatusCode::kInvalidArgument);
}

TEST_F(ShardServerTest, SurvivesRandomAndMutatedMessages) {
  const TestBlock block = MakeBlock(TestKey(1), {}, 1);
  Store(block);
  Random random(11);
  std::vector<Action> flying;
  for (int i = 0; i < 20000; ++i) {
    wire::Envelope base;
    const TestBlock other = MakeBlock(TestKey(2 + random.Below(5)), TestKey(1), i, 2, 40);
    switch (random.Below(6)) {
      case 0:
        base = ReserveOf(other, random.Below(20));
        break;
      case 1:
        base = SealOf(other, random.Below(20));
        break;
      case 2:
        base = FetchOf({block, other}, random.Below(20));
        break;
      case 3:
        base = Ask(random.Below(20));
        base.mutable_put_ranges()->add_ranges(random.Below(500));
        base.mutable_put_ranges()->add_ranges(random.Chance(0.5) ? random.Below(500)
                                                                 : random.Next());
        break;
      case 4:
        base = Ask(random.Below(20));
        base.mutable_lookup()->set_keys(ToWire(block.key));
        base.mutable_lookup()->set_lease_ms(static_cast<uint32_t>(random.Below(100)));
        break;
      default:
        base = Ask(random.Below(20));
        base.mutable_report_corrupt()->set_key(ToWire(other.key));
    }
    std::vector<std::byte> bytes = EncodeMessage(base);
    for (uint64_t edits = random.Below(4); edits > 0 && bytes.size() > 5; --edits) {
      bytes[random.Below(bytes.size() - 4)] = static_cast<std::byte>(random.Next());
    }
    StoreLittle(bytes.data() + bytes.size() - 4,
                static_cast<uint32_t>(PayloadChecksum(std::span(bytes).first(bytes.size() - 4))));
    for (Action& action : Deliver(bytes)) {
      if (action.kind == Action::Kind::kTransfer) flying.push_back(std::move(action));
    }
    while (flying.size() > random.Below(20)) {
      const Action first = flying.front();
      flying.erase(flying.begin());
      for (Action& action : Done(first, random.Chance(0.1) ? Unavailable("cut") : OkStatus())) {
        if (action.kind == Action::Kind::kTransfer) flying.push_back(std::move(action));
      }
    }
    if (i % 500 != 0) continue;
    now_ += std::chrono::milliseconds(700);
    server_->Tick(now_);
    for (Action& action : Actions()) {
      if (action.kind == Action::Kind::kTransfer) flying.push_back(std::move(action));
    }
    ASSERT_EQ(server_->store().CheckInvariants(), "");
  }
  EXPECT_LE(server_->store().stats().used_bytes, server_->store().limit_bytes());
}

}  // namespace
}  // namespace kvant
