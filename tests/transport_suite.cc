// One behaviour, every transport: what docs/transport-guide.md promises.
#include "tests/transport_suite.h"

#include <set>

namespace kvant::test {
namespace {

Packet WriteOrder(const RemoteWindow& window, uint64_t offset, uint64_t length, uint64_t seed,
                  std::optional<uint32_t> immediate) {
  return Packet('W')
      .Window(window)
      .U64(offset)
      .U64(length)
      .U64(seed)
      .U8(immediate ? 1 : 0)
      .U32(immediate.value_or(0));
}

Packet Echo(size_t bytes, uint64_t seed) {
  std::vector<std::byte> message(bytes);
  FillPattern(message, seed);
  message[0] = std::byte{'E'};
  return Packet(std::move(message));
}

uint64_t PatternHash(uint64_t bytes, uint64_t seed) {
  std::vector<std::byte> expected(bytes);
  FillPattern(expected, seed);
  return HashOf(expected);
}

// The writes and reads of these sizes cross every chunk and buffer boundary of the backends.
constexpr uint64_t kSizes[] = {
    0, 1, 7, 64, 4095, 4096, 65536, 100003, 1 << 20, (1 << 20) + 1, 9 * (1 << 20) + 13};

TEST_P(TransportSuite, EchoesMessagesOfAllSizes) {
  Endpoint* endpoint = Connect();
  ASSERT_NE(endpoint, nullptr);
  const size_t most = transport().capabilities().max_message_bytes;
  for (const size_t bytes : {size_t{1}, size_t{2}, size_t{1000}, size_t{65536}, most}) {
    const Packet sent = Echo(bytes, bytes);
    EXPECT_EQ(Ask(endpoint, sent, 'E').bytes(), sent.bytes()) << bytes;
  }
  EXPECT_EQ(endpoint->Send(std::vector<std::byte>(most + 1)).code(), StatusCode::kInvalidArgument);
}

TEST_P(TransportSuite, AnEmptyMessageIsAMessage) {
  Endpoint* endpoint = Connect();
  Send(endpoint, Packet());
  EXPECT_TRUE(Pump([&] { return CountEvents(Event::Kind::kMessage, endpoint->id()) == 1; }));
  EXPECT_TRUE(events_.back().message.empty());
}

TEST_P(TransportSuite, MessagesArriveInOrderOnce) {
  Endpoint* endpoint = Connect();
  constexpr uint32_t kCount = 3000;
  Send(endpoint, Packet('F').U64(kCount));
  for (uint32_t i = 0; i < kCount; ++i) ASSERT_EQ(Await(endpoint, 'f').U32(), i);
  Idle();
  EXPECT_EQ(CountEvents(Event::Kind::kMessage, endpoint->id()), 0U);
}

TEST_P(TransportSuite, AFloodIsPushedBackOrDelivered) {
  Endpoint* endpoint = Connect();
  const Packet echo = Echo(1000, 5);
  size_t sent = 0;
  for (; sent < 20000; ++sent) {
    const Status status = endpoint->Send(echo.bytes());
    if (status.ok()) continue;
    ASSERT_EQ(status.code(), StatusCode::kResourceExhausted) << status.ToString();
    break;
  }
  EXPECT_LT(sent, 20000U) << "no back-pressure";
  EXPECT_TRUE(Pump([&] { return CountEvents(Event::Kind::kMessage, endpoint->id()) == sent; }));
}

TEST_P(TransportSuite, SubmitTakesNoMoreThanMaxOutstanding) {
  Endpoint* endpoint = Connect();
  const RemoteWindow window = AgentWindow(endpoint, Access::kRemoteWrite, 64, 1);
  const Lease lease = Lend(64);
  const size_t most = transport().capabilities().max_outstanding;
  std::vector<Transfer> transfers(most + 10);
  for (size_t i = 0; i < transfers.size(); ++i) {
    transfers[i].local = lease.bytes();
    transfers[i].remote = window;
    transfers[i].cookie = i + 1;
  }
  EXPECT_EQ(endpoint->Submit(transfers), most);
  EXPECT_EQ(endpoint->Submit(std::span(transfers).subspan(most)), 0U);
  EXPECT_TRUE(
      Pump([&] { return CountEvents(Event::Kind::kTransferDone, endpoint->id()) == most; }));
  EXPECT_EQ(endpoint->Submit(std::span(transfers).subspan(most)), 10U);
  EXPECT_TRUE(
      Pump([&] { return CountEvents(Event::Kind::kTransferDone, endpoint->id()) == most + 10; }));
}

TEST_P(TransportSuite, WritesOfAllSizesLand) {
  Endpoint* endpoint = Connect();
  for (const uint64_t size : kSizes) {
    for (const uint64_t offset : {uint64_t{0}, uint64_t{13}}) {
      const RemoteWindow window = AgentWindow(endpoint, Access::kRemoteWrite, size + offset, 9);
      const Lease lease = Lend(size + 1);
      FillPattern(lease.bytes(), size);
      const auto value = static_cast<uint32_t>(size ^ 0xABCD);
      const Transfer transfer{.op = Transfer::Op::kWrite,
                              .local = lease.bytes().first(size),
                              .remote = window,
                              .remote_offset = offset,
                              .immediate = value,
                              .cookie = size * 2 + (offset > 0 ? 1 : 0) + 100};
      ASSERT_EQ(endpoint->Submit(std::span(&transfer, 1)), 1U);
      EXPECT_TRUE(AwaitDone(transfer.cookie).ok());
      Packet landed = Await(endpoint, 'k');
      EXPECT_EQ(landed.U64(), window.id);
      EXPECT_EQ(landed.U32(), value);
      if (size + offset == 0) continue;
      std::vector<std::byte> expected(size + offset);
      FillPattern(expected, 9);
      std::copy_n(lease.bytes().begin(), size, expected.begin() + static_cast<ptrdiff_t>(offset));
      EXPECT_EQ(landed.U64(), HashOf(expected)) << size << " at " << offset;
      Ask(endpoint, Packet('R').U64(window.id), 'r');
    }
  }
}

TEST_P(TransportSuite, ReadsOfAllSizesLand) {
  Endpoint* endpoint = Connect();
  for (const uint64_t size : kSizes) {
    for (const uint64_t offset : {uint64_t{0}, uint64_t{13}}) {
      const RemoteWindow window = AgentWindow(endpoint, Access::kRemoteRead, size + offset, 77);
      const Lease lease = Lend(size + 1);
      FillPattern(lease.bytes(), 3);
      const std::byte guard = lease.bytes().back();
      const Transfer transfer{.op = Transfer::Op::kRead,
                              .local = lease.bytes().first(size),
                              .remote = window,
                              .remote_offset = offset,
                              .cookie = size * 2 + (offset > 0 ? 1 : 0) + 100};
      ASSERT_EQ(endpoint->Submit(std::span(&transfer, 1)), 1U);
      ASSERT_TRUE(AwaitDone(transfer.cookie).ok());
      std::vector<std::byte> expected(size + offset);
      FillPattern(expected, 77);
      EXPECT_TRUE(std::equal(expected.begin() + static_cast<ptrdiff_t>(offset), expected.end(),
                             lease.bytes().begin()))
          << size << " at " << offset;
      EXPECT_EQ(lease.bytes().back(), guard);
      Ask(endpoint, Packet('R').U64(window.id), 'r');
    }
  }
}

TEST_P(TransportSuite, ThePeerWritesIntoAndReadsFromOurWindow) {
  Endpoint* endpoint = Connect();
  const Lease lease = Lend(300000);
  FillPattern(lease.bytes(), 21);
  auto window = arena_->Expose(lease, endpoint->id(), 0, lease.size(), Access::kRemoteReadWrite);
  ASSERT_TRUE(window.ok());
  Packet read = Ask(endpoint, Packet('G').Window(window->remote()).U64(0).U64(lease.size()), 'g');
  EXPECT_EQ(read.U8(), 0);
  EXPECT_EQ(read.U64(), HashOf(lease.bytes()));
  Send(endpoint, WriteOrder(window->remote(), 1000, 200000, 22, 5));
  EXPECT_TRUE(Pump([&] { return CountEvents(Event::Kind::kWritten, endpoint->id()) == 1; }));
  EXPECT_TRUE(HasPattern(lease.bytes().subspan(1000, 200000), 22));
  EXPECT_EQ(Await(endpoint, 'w').U8(), 0);
}

TEST_P(TransportSuite, AnImmediateComesAfterAllEarlierBytes) {
  Endpoint* endpoint = Connect();
  constexpr uint64_t kPiece = 70001;
  constexpr uint64_t kPieces = 40;
  const Lease lease = Lend(kPiece * kPieces);
  FillPattern(lease.bytes(), 31);
  for (uint32_t round = 0; round < 5; ++round) {
    const RemoteWindow window = AgentWindow(endpoint, Access::kRemoteWrite, lease.size(), 1);
    std::vector<Transfer> transfers(kPieces);
    for (uint64_t i = 0; i < kPieces; ++i) {
      transfers[i] = {.op = Transfer::Op::kWrite,
                      .local = lease.bytes().subspan(i * kPiece, kPiece),
                      .remote = window,
                      .remote_offset = i * kPiece,
                      .cookie = round * kPieces + i + 1};
    }
    transfers.back().immediate = round;
    ASSERT_EQ(endpoint->Submit(transfers), kPieces);
    Packet landed = Await(endpoint, 'k');
    EXPECT_EQ(landed.U64(), window.id);
    EXPECT_EQ(landed.U32(), round);
    EXPECT_EQ(landed.U64(), HashOf(lease.bytes()));
    for (const Transfer& transfer : transfers) EXPECT_TRUE(AwaitDone(transfer.cookie).ok());
    Ask(endpoint, Packet('R').U64(window.id), 'r');
  }
}

TEST_P(TransportSuite, WrongWindowsChangeNothing) {
  Endpoint* endpoint = Connect();
  Endpoint* other = Connect();
  constexpr uint64_t kBytes = 5000;
  const RemoteWindow writable = AgentWindow(endpoint, Access::kRemoteWrite, kBytes, 1);
  const RemoteWindow readable = AgentWindow(endpoint, Access::kRemoteRead, kBytes, 2);
  const RemoteWindow revoked = AgentWindow(endpoint, Access::kRemoteReadWrite, kBytes, 3);
  Ask(endpoint, Packet('R').U64(revoked.id), 'r');
  RemoteWindow wrong_key = writable;
  wrong_key.key ^= 1;
  RemoteWindow unknown = writable;
  unknown.id += uint64_t{1} << 40;
  RemoteWindow longer = writable;
  longer.length += 10;  // lies about the length: only the peer can tell
  struct Case {
    Endpoint* endpoint;
    RemoteWindow window;
    uint64_t offset;
    const char* what;
  };
  const Lease lease = Lend(kBytes);
  FillPattern(lease.bytes(), 66);
  uint64_t cookie = 1000;
  for (const Case& bad :
       {Case{endpoint, wrong_key, 0, "wrong key"}, Case{endpoint, unknown, 0, "unknown"},
        Case{endpoint, revoked, 0, "revoked"}, Case{endpoint, longer, 10, "out of range"},
        Case{endpoint, readable, 0, "not writable"}, Case{other, writable, 0, "another peer's"}}) {
    const Transfer write{.op = Transfer::Op::kWrite,
                         .local = lease.bytes(),
                         .remote = bad.window,
                         .remote_offset = bad.offset,
                         .immediate = 7,
                         .cookie = ++cookie};
    ASSERT_EQ(bad.endpoint->Submit(std::span(&write, 1)), 1U);
    EXPECT_TRUE(AwaitDone(cookie).ok()) << bad.what;
  }
  const Lease target = Lend(kBytes);
  FillPattern(target.bytes(), 67);
  for (const Case& bad :
       {Case{endpoint, wrong_key, 0, "wrong key"}, Case{endpoint, unknown, 0, "unknown"},
        Case{endpoint, revoked, 0, "revoked"}, Case{endpoint, longer, 10, "out of range"},
        Case{endpoint, writable, 0, "not readable"}, Case{other, readable, 0, "another peer's"}}) {
    const Transfer read{.op = Transfer::Op::kRead,
                        .local = target.bytes(),
                        .remote = bad.window,
                        .remote_offset = bad.offset,
                        .cookie = ++cookie};
    ASSERT_EQ(bad.endpoint->Submit(std::span(&read, 1)), 1U);
    EXPECT_EQ(AwaitDone(cookie).code(), StatusCode::kPermissionDenied) << bad.what;
  }
  EXPECT_TRUE(HasPattern(target.bytes(), 67));
  EXPECT_EQ(AgentHash(endpoint, writable), PatternHash(kBytes, 1));
  EXPECT_EQ(AgentHash(endpoint, readable), PatternHash(kBytes, 2));
  EXPECT_EQ(AgentHash(endpoint, revoked), PatternHash(kBytes, 3));
  Idle();
  for (const Event& event : events_) {
    EXPECT_TRUE(event.kind != Event::Kind::kMessage || event.message.at(0) != std::byte{'k'});
  }
  // The connection is as good as before.
  EXPECT_EQ(Ask(endpoint, Echo(100, 1), 'E').bytes(), Echo(100, 1).bytes());
}

TEST_P(TransportSuite, WhatCannotBeStartedCompletesWithInvalidArgument) {
  Endpoint* endpoint = Connect();
  const RemoteWindow window = AgentWindow(endpoint, Access::kRemoteReadWrite, 100, 1);
  const Lease lease = Lend(200);
  std::vector<std::byte> unregistered(100);
  const Transfer transfers[] = {
      {.op = Transfer::Op::kWrite, .local = unregistered, .remote = window, .cookie = 1},
      {.op = Transfer::Op::kRead, .local = unregistered, .remote = window, .cookie = 2},
      {.op = Transfer::Op::kWrite, .local = lease.bytes(), .remote = window, .cookie = 3},
      {.op = Transfer::Op::kRead,
       .local = lease.bytes().first(2),
       .remote = window,
       .remote_offset = UINT64_MAX,
       .cookie = 4}};
  ASSERT_EQ(endpoint->Submit(transfers), 4U);
  for (uint64_t cookie = 1; cookie <= 4; ++cookie) {
    EXPECT_EQ(AwaitDone(cookie).code(), StatusCode::kInvalidArgument);
  }
  const LinkCounters& counters = endpoint->counters();
  EXPECT_EQ(counters.payload_bytes_sent, 0U);
}

TEST_P(TransportSuite, RevokeStopsBytesAndDrains) {
  Endpoint* endpoint = Connect();
  for (int round = 0; round < 10; ++round) {
    Lease lease = Lend(4 << 20);
    FillPattern(lease.bytes(), 1);
    auto window = arena_->Expose(lease, endpoint->id(), 0, lease.size(), Access::kRemoteWrite);
    ASSERT_TRUE(window.ok());
    Send(endpoint, WriteOrder(window->remote(), 0, lease.size(), 2, 1));
    // Sooner or later than the bytes come, from round to round.
    Idle(std::chrono::microseconds(500 * round));
    const bool was_written = CountEvents(Event::Kind::kWritten, endpoint->id()) > 0;
    const bool drained = window->Revoke();
    EXPECT_TRUE(drained || Pump([&] { return arena_->Collect() == 0; }));
    const uint64_t before = HashOf(lease.bytes());
    EXPECT_EQ(Await(endpoint, 'w').U8(), 0);
    Idle(std::chrono::milliseconds(2));
    EXPECT_EQ(HashOf(lease.bytes()), before) << "bytes landed after the window was drained";
    EXPECT_TRUE(!was_written || HasPattern(lease.bytes(), 2));
    std::erase_if(events_, [](const Event& e) { return e.kind == Event::Kind::kWritten; });
  }
}

TEST_P(TransportSuite, CloseCompletesEverythingOnce) {
  for (int round = 0; round < 4; ++round) {
    events_.clear();
    Endpoint* endpoint = Connect();
    const EndpointId id = endpoint->id();
    const RemoteWindow window =
        AgentWindow(endpoint, Access::kRemoteReadWrite, 1 << 20, static_cast<uint64_t>(round));
    const Lease lease = Lend(1 << 20);
    std::vector<Transfer> transfers(60);
    for (size_t i = 0; i < transfers.size(); ++i) {
      transfers[i] = {.op = i % 2 == 0 ? Transfer::Op::kWrite : Transfer::Op::kRead,
                      .local = lease.bytes(),
                      .remote = window,
                      .cookie = i + 1};
    }
    const size_t accepted = endpoint->Submit(transfers);
    if (round % 2 == 1) transport().Poll(&events_);
    if (round < 2) {
      endpoint->Close();
    } else {
      Send(endpoint, Packet('C'));
    }
    ASSERT_TRUE(Pump([&] { return CountEvents(Event::Kind::kClosed, id) == 1; }));
    Idle();
    EXPECT_EQ(CountEvents(Event::Kind::kClosed, id), 1U);
    EXPECT_EQ(transport().Find(id), nullptr);
    std::multiset<uint64_t> done;
    bool after_closed = false;
    for (const Event& event : events_) {
      if (event.endpoint != id) continue;
      EXPECT_FALSE(after_closed) << "an event after kClosed";
      if (event.kind == Event::Kind::kTransferDone) done.insert(event.cookie);
      if (event.kind == Event::Kind::kClosed) {
        after_closed = true;
        EXPECT_TRUE(event.status.ok()) << event.status.ToString();
      }
    }
    EXPECT_EQ(done.size(), accepted);
    EXPECT_EQ(std::set<uint64_t>(done.begin(), done.end()).size(), accepted);
  }
}

TEST_P(TransportSuite, ManyOutstandingBothWaysComplete) {
  Endpoint* endpoint = Connect();
  constexpr uint64_t kBytes = 32768;
  constexpr size_t kCount = 600;
  const RemoteWindow window = AgentWindow(endpoint, Access::kRemoteReadWrite, kBytes * 2, 4);
  const Lease lease = Lend(kBytes * 2);
  FillPattern(lease.bytes(), 5);
  std::vector<Transfer> transfers(kCount);
  for (size_t i = 0; i < kCount; ++i) {
    const bool write = i % 3 != 0;
    transfers[i] = {.op = write ? Transfer::Op::kWrite : Transfer::Op::kRead,
                    .local = lease.bytes().subspan(write ? 0 : kBytes, kBytes),
                    .remote = window,
                    .remote_offset = write ? 0 : kBytes,
                    .cookie = i + 1};
  }
  size_t submitted = 0;
  ASSERT_TRUE(Pump([&] {
    submitted += endpoint->Submit(std::span(transfers).subspan(submitted));
    return CountEvents(Event::Kind::kTransferDone, endpoint->id()) == kCount;
  }));
  std::set<uint64_t> cookies;
  for (const Event& event : events_) {
    if (event.kind != Event::Kind::kTransferDone) continue;
    EXPECT_TRUE(event.status.ok()) << event.status.ToString();
    EXPECT_TRUE(cookies.insert(event.cookie).second);
  }
  std::vector<std::byte> theirs(kBytes * 2);
  FillPattern(theirs, 4);
  EXPECT_TRUE(std::equal(theirs.begin() + kBytes, theirs.end(), lease.bytes().begin() + kBytes));
}

TEST_P(TransportSuite, CountersAgreeWithWhatWasSent) {
  Endpoint* endpoint = Connect();
  const RemoteWindow window = AgentWindow(endpoint, Access::kRemoteReadWrite, 10000, 4);
  const Lease lease = Lend(10000);
  const Transfer transfers[] = {{.op = Transfer::Op::kWrite,
                                 .local = lease.bytes().first(7000),
                                 .remote = window,
                                 .cookie = 1},
                                {.op = Transfer::Op::kRead,
                                 .local = lease.bytes().first(3000),
                                 .remote = window,
                                 .cookie = 2}};
  ASSERT_EQ(endpoint->Submit(transfers), 2U);
  EXPECT_TRUE(AwaitDone(1).ok());
  EXPECT_TRUE(AwaitDone(2).ok());
  Packet theirs = Ask(endpoint, Packet('N'), 'n');
  const LinkCounters& ours = endpoint->counters();
  EXPECT_EQ(ours.payload_bytes_sent, 7000U);
  EXPECT_EQ(ours.payload_bytes_received, 3000U);
  EXPECT_EQ(theirs.U64(), 3000U);
  EXPECT_EQ(theirs.U64(), 7000U);
  const uint64_t their_control_sent = theirs.U64();
  EXPECT_EQ(theirs.U64(), ours.control_bytes_sent);
  // All that they had sent before the answer; the answer itself is an n and four numbers.
  EXPECT_GE(ours.control_bytes_received, their_control_sent + 33);
  EXPECT_LE(ours.control_bytes_received, their_control_sent + 33 + 64);
  EXPECT_EQ(ours.messages_sent, 2U);
  EXPECT_EQ(ours.transfers_submitted, 2U);
  EXPECT_GE(transport().counters().payload_bytes_sent, 7000U);
}

TEST_P(TransportSuite, NothingGoesToNobody) {
  Endpoint* endpoint = Connect();
  const EndpointId id = endpoint->id();
  endpoint->Close();
  EXPECT_FALSE(endpoint->Send(Packet('E').bytes()).ok());
  const Transfer transfer{.op = Transfer::Op::kWrite, .local = {}};
  EXPECT_EQ(endpoint->Submit(std::span(&transfer, 1)), 0U);
  EXPECT_TRUE(Pump([&] { return CountEvents(Event::Kind::kClosed, id) == 1; }));
  EXPECT_FALSE(transport().Connect("carrier-pigeon:1", std::chrono::seconds(1)).ok());
  EXPECT_FALSE(transport().Listen("carrier-pigeon:1").ok());
}

TEST_P(TransportSuite, WaitReturnsByItsDeadline) {
  Connect();
  Idle();
  const TimePoint start = SteadyClock().Now();
  for (int i = 0; i < 5; ++i) transport().Wait(std::chrono::milliseconds(5));
  EXPECT_LT(SteadyClock().Now() - start, std::chrono::seconds(2));
}

}  // namespace
}  // namespace kvant::test
