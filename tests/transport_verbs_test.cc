// The verbs transport on a real device, or one that the kernel emulates: the behaviour suite, a
// peer that dies, and peers that lie. Without a device nothing here can run: scripts/verbs-vm
// starts a machine that has one.
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>

#include "tests/support/raw_verbs_peer.h"
#include "tests/transport_suite.h"
#include "transport/verbs.h"

namespace kvant::test {
namespace {

using support::RawVerbsPeer;

std::unique_ptr<Transport> NewVerbs(const VerbsOptions& options = {}) {
  auto transport = MakeVerbsTransport(options);
  EXPECT_TRUE(transport.ok()) << transport.status().ToString();
  return *std::move(transport);
}

constexpr const char* kAnyPort = "verbs://127.0.0.1:0";

INSTANTIATE_TEST_SUITE_P(
    Verbs, TransportSuite,
    ::testing::Values(RigMaker{
        "verbs", [] { return std::make_unique<LocalRig>(NewVerbs(), NewVerbs(), kAnyPort); }}),
    [](const auto& test) { return test.param.name; });

TEST(VerbsTransport, APeersDeathCompletesEverything) {
  AgentProcess peer([] { return NewVerbs(); }, kAnyPort);
  ExpectDeathCompletesEverything(NewVerbs().get(), &peer);
}

TEST(VerbsTransport, AddressesAndOptionsAreChecked) {
  auto transport = NewVerbs();
  for (const char* bad : {"verbs://", "tcp://127.0.0.1:1", "verbs://127.0.0.1", "verbs:h:1"}) {
    EXPECT_EQ(transport->Connect(bad, Patience()).status().code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(transport->Listen(bad).status().code(), StatusCode::kInvalidArgument);
  }
  EXPECT_FALSE(MakeVerbsTransport({.max_outstanding = 0}).ok());
  const auto absent = MakeVerbsTransport({.device = "none"});
  EXPECT_EQ(absent.status().code(), StatusCode::kUnsupported);
  EXPECT_EQ(absent.status().message(), "no RDMA device: none is called 'none'");
  const std::string address = *transport->Listen(kAnyPort);
  EXPECT_EQ(NewVerbs()->Listen(address).status().code(), StatusCode::kUnavailable) << "it is taken";
  EXPECT_EQ(transport->Listen(kAnyPort).status().code(), StatusCode::kInvalidArgument)
      << "it listens already";
}

Status HowConnectingEnds(const std::string& address, Duration timeout) {
  auto transport = NewVerbs();
  EXPECT_TRUE(transport->Connect(address, timeout).ok());
  std::vector<Event> events;
  EXPECT_TRUE(PollUntil(transport.get(), &events, [&] { return !events.empty(); }));
  EXPECT_EQ(events.at(0).kind, Event::Kind::kClosed);
  return events.at(0).status;
}

TEST(VerbsTransport, NobodyAndSilenceAreToldInTime) {
  const in_addr host = *tcp::Resolve("127.0.0.1");
  std::string address;
  {
    const tcp::Socket silent = *tcp::ListenOn(host, 0, 5);
    address = fmt::format("verbs://127.0.0.1:{}", *tcp::LocalPort(silent));
    EXPECT_EQ(HowConnectingEnds(address, std::chrono::milliseconds(100)).code(),
              StatusCode::kDeadlineExceeded);
  }
  EXPECT_EQ(HowConnectingEnds(address, Patience()).code(), StatusCode::kUnavailable);
}

TEST(VerbsTransport, AMessageWakesWhoSleeps) {
  AgentProcess peer([] { return NewVerbs(); }, kAnyPort);
  auto transport = NewVerbs();
  Endpoint* endpoint = *transport->Connect(peer.address(), Patience());
  std::vector<Event> events;
  ASSERT_TRUE(PollUntil(transport.get(), &events,
                        [&] { return FindEvent(events, Event::Kind::kConnected) != nullptr; }));
  for (int round = 0; round < 5; ++round) {
    events.clear();
    ASSERT_TRUE(endpoint->Send(Packet('E').U64(1).bytes()).ok());
    const TimePoint start = SteadyClock().Now();
    while (events.empty() && SteadyClock().Now() - start < Patience()) {
      transport->Wait(Patience());
      transport->Poll(&events);
    }
    EXPECT_EQ(events.size(), 1U);
    EXPECT_LT(SteadyClock().Now() - start, Patience()) << "it slept through the answer";
  }
}

TEST(VerbsTransport, WindowsAreGivenBackWithTheirRegion) {
  AgentProcess peer([] { return NewVerbs(); }, kAnyPort);
  auto transport = NewVerbs();
  Endpoint* endpoint = *transport->Connect(peer.address(), Patience());
  const EndpointId id = endpoint->id();
  std::vector<Event> events;
  ASSERT_TRUE(PollUntil(transport.get(), &events,
                        [&] { return FindEvent(events, Event::Kind::kConnected) != nullptr; }));
  for (int round = 0; round < 3; ++round) {
    const std::span<std::byte> pages = *transport->MapPages(1 << 20);
    auto region = *transport->Register(pages);
    const RemoteWindow kept = *region->Expose(id, 0, 4096, Access::kRemoteReadWrite);
    const RemoteWindow revoked = *region->Expose(id, 4096, 4096, Access::kRemoteReadWrite);
    if (round > 0) transport->Poll(&events);
    EXPECT_FALSE(region->Revoke(revoked.id));
    EXPECT_TRUE(region->Landing(revoked.id));
    if (round > 1) {
      EXPECT_TRUE(
          PollUntil(transport.get(), &events, [&] { return !region->Landing(revoked.id); }));
    }
    region.reset();
    transport->UnmapPages(pages);
    events.clear();
    ASSERT_TRUE(endpoint->Send(Packet('E').Window(kept).bytes()).ok());
    EXPECT_TRUE(PollUntil(transport.get(), &events, [&] { return !events.empty(); }));
    ASSERT_EQ(events.at(0).kind, Event::Kind::kMessage) << events.at(0).status.ToString();
  }
}

// A server that a hostile connector talks to, and an honest one beside it.
class HostileVerbs : public testing::Test {
 protected:
  void SetUp() override {
    address_ = *server_->Listen(kAnyPort);
    arena_ = *RegisteredArena::Create(server_.get(), {.bytes = 1 << 20});
  }
  void TearDown() override {
    // The others go on.
    auto honest = NewVerbs();
    Endpoint* endpoint = *honest->Connect(address_, Patience());
    ASSERT_TRUE(endpoint->Send(AsBytes("hello")).ok());
    const size_t before = CountMessages();
    std::vector<Event> ignored;
    ASSERT_TRUE(PollUntil(server_.get(), &events_, [&] {
      honest->Poll(&ignored);
      return CountMessages() > before;
    }));
  }

  size_t CountMessages() const {
    return static_cast<size_t>(std::count_if(events_.begin(), events_.end(), [](const Event& e) {
      return e.kind == Event::Kind::kMessage;
    }));
  }
  EndpointId Accept(RawVerbsPeer* peer) {
    events_.clear();
    EXPECT_TRUE(PollUntil(server_.get(), &events_, [&] {
      peer->Greet();
      return FindEvent(events_, Event::Kind::kConnected) != nullptr;
    }));
    return events_.at(0).endpoint;
  }
  void ExpectEnd(StatusCode code) {
    const Event* closed = nullptr;
    ASSERT_TRUE(PollUntil(server_.get(), &events_, [&] {
      closed = FindEvent(events_, Event::Kind::kClosed);
      return closed != nullptr;
    }));
    EXPECT_EQ(closed->status.code(), code) << closed->status.ToString();
  }
  // A window over the middle of this lease, as the peer has heard of it.
  verbs::WindowRecord ExposeTo(RawVerbsPeer* peer, EndpointId id, const Lease& lease,
                               Access access) {
    FillPattern(lease.bytes(), 1);
    window_ = *arena_->Expose(lease, id, 4096, 4096, access);
    std::optional<verbs::WindowRecord> record;
    EXPECT_TRUE(PollUntil(server_.get(), &events_, [&] {
      peer->Poll([&](const verbs::RecordHeader& header, std::span<const std::byte> body) {
        if (header.type == verbs::RecordType::kExposed) record = verbs::DecodeWindow(body);
      });
      return record.has_value();
    }));
    return *record;
  }
  // The device refuses that access, and nothing changed.
  void ExpectRefused(RawVerbsPeer* peer, bool write, uint64_t address, uint32_t key,
                     const Lease& lease) {
    peer->Transfer(write, address, key, 4096);
    EXPECT_TRUE(PollUntil(server_.get(), &events_, [&] {
      peer->Poll({});
      return peer->broken();
    }));
    EXPECT_FALSE(peer->transferred());
    EXPECT_TRUE(HasPattern(lease.bytes(), 1));
  }

  std::unique_ptr<Transport> server_ =
      NewVerbs({.release_timeout = std::chrono::milliseconds(500)});
  std::string address_;
  std::unique_ptr<RegisteredArena> arena_;
  ExposedWindow window_;
  std::vector<Event> events_;
};

TEST_F(HostileVerbs, TheDeviceKeepsAWindowsBounds) {
  const Lease lease = *arena_->Lend(3 * 4096);
  for (const int64_t beside : {int64_t{-4096}, int64_t{-1}, int64_t{1}, int64_t{4096}}) {
    SCOPED_TRACE(beside);
    RawVerbsPeer peer(address_);
    const EndpointId id = Accept(&peer);
    const auto record = ExposeTo(&peer, id, lease, Access::kRemoteReadWrite);
    ExpectRefused(&peer, beside > 0, record.address + static_cast<uint64_t>(beside),
                  record.device_key, lease);
    ExpectEnd(StatusCode::kUnavailable);
    window_ = {};
  }
}

TEST_F(HostileVerbs, TheDeviceKeepsAWindowsAccess) {
  const Lease lease = *arena_->Lend(3 * 4096);
  for (const bool write : {true, false}) {
    RawVerbsPeer peer(address_);
    const EndpointId id = Accept(&peer);
    const auto record =
        ExposeTo(&peer, id, lease, write ? Access::kRemoteRead : Access::kRemoteWrite);
    ExpectRefused(&peer, write, record.address, record.device_key, lease);
    ExpectEnd(StatusCode::kUnavailable);
    window_ = {};
  }
}

TEST_F(HostileVerbs, AKeyIsOfNoUseToAnother) {
  const Lease lease = *arena_->Lend(3 * 4096);
  RawVerbsPeer owner(address_);
  const auto record = ExposeTo(&owner, Accept(&owner), lease, Access::kRemoteReadWrite);
  RawVerbsPeer thief(address_);
  Accept(&thief);
  ExpectRefused(&thief, true, record.address, record.device_key, lease);
  ExpectEnd(StatusCode::kUnavailable);
  window_ = {};
}

TEST_F(HostileVerbs, AKeyIsDeadWhenItsWindowIsGone) {
  const Lease lease = *arena_->Lend(3 * 4096);
  RawVerbsPeer peer(address_);
  const auto record = ExposeTo(&peer, Accept(&peer), lease, Access::kRemoteReadWrite);
  window_.Revoke();
  std::array<std::byte, sizeof(uint64_t)> body;
  StoreLittle(body.data(), record.id);
  peer.Put({.type = verbs::RecordType::kRevoked}, body);
  ASSERT_TRUE(PollUntil(server_.get(), &events_, [&] { return arena_->Collect() == 0; }));
  ExpectRefused(&peer, true, record.address, record.device_key, lease);
  ExpectEnd(StatusCode::kUnavailable);
}

TEST_F(HostileVerbs, WhoDoesNotLetGoIsCutOff) {
  Lease lease = *arena_->Lend(3 * 4096);
  RawVerbsPeer peer(address_);
  const auto record = ExposeTo(&peer, Accept(&peer), lease, Access::kRemoteReadWrite);
  window_.Revoke();
  EXPECT_EQ(arena_->Collect(), 1U);
  ExpectEnd(StatusCode::kUnavailable);
  EXPECT_EQ(arena_->Collect(), 0U);
  ExpectRefused(&peer, true, record.address, record.device_key, lease);
}

TEST_F(HostileVerbs, GarbageInRecordsClosesTheEndpoint) {
  using verbs::RecordType;
  const std::vector<std::byte> garbage(100, std::byte{0xEE});
  for (const RecordType type : {RecordType::kWritten, RecordType::kExposed, RecordType::kRevoke,
                                RecordType::kRevoked, static_cast<RecordType>(99)}) {
    for (const size_t bytes : {size_t{0}, size_t{8}, size_t{12}, verbs::kWindowRecordBytes}) {
      SCOPED_TRACE(testing::Message() << static_cast<int>(type) << " " << bytes);
      if (type == RecordType::kWritten && bytes == verbs::kWrittenBytes) continue;  // of no window
      RawVerbsPeer peer(address_);
      Accept(&peer);
      peer.Put({.type = type}, std::span(garbage).first(bytes));
      ExpectEnd(StatusCode::kInvalidArgument);
    }
  }
}

TEST_F(HostileVerbs, AMessageWithoutEndClosesTheEndpoint) {
  RawVerbsPeer peer(address_);
  Accept(&peer);
  const std::vector<std::byte> piece(verbs::kMaxPieceBytes);
  ASSERT_TRUE(PollUntil(server_.get(), &events_, [&] {
    peer.Poll({});
    if (!peer.broken() && peer.MayPut()) peer.Put({.last = false}, piece);
    return FindEvent(events_, Event::Kind::kClosed) != nullptr;
  }));
  ExpectEnd(StatusCode::kInvalidArgument);
}

TEST_F(HostileVerbs, ImmediatesOfNoWindowAreIgnored) {
  const Lease lease = *arena_->Lend(3 * 4096);
  RawVerbsPeer peer(address_);
  const auto record = ExposeTo(&peer, Accept(&peer), lease, Access::kRemoteReadWrite);
  peer.Transfer(true, record.address, record.device_key, 64, 0xFFFF0001);
  peer.Put({}, AsBytes("after it"));
  ASSERT_TRUE(PollUntil(server_.get(), &events_, [&] { return CountMessages() == 1; }));
  EXPECT_EQ(FindEvent(events_, Event::Kind::kWritten), nullptr);
  window_ = {};
}

TEST_F(HostileVerbs, GarbageInGreetingsIsRefused) {
  const tcp::HostPort at = *tcp::ParseAddress(address_, "verbs");
  for (const size_t bytes : {size_t{1}, verbs::kGreetingBytes, size_t{5000}}) {
    const tcp::Socket socket = *tcp::StartConnect(*tcp::Resolve(at.host), at.port);
    const std::vector<std::byte> garbage(bytes, std::byte{0xEE});
    ASSERT_TRUE(PollUntil(server_.get(), &events_, [&] {
      return send(socket.fd(), garbage.data(), bytes, MSG_NOSIGNAL) == static_cast<ssize_t>(bytes);
    }));
    if (bytes == 1) continue;  // it may still come
    verbs::Greeter greeter{tcp::Socket(dup(socket.fd()))};
    verbs::Greeting answer;
    std::string text;
    ASSERT_TRUE(PollUntil(server_.get(), &events_, [&] {
      return greeter.Receive(&answer, &text) != verbs::Greeter::Received::kNothing;
    }));
    EXPECT_TRUE(text.empty() || text.find("same release") != std::string::npos);
  }
  EXPECT_TRUE(events_.empty());
}

}  // namespace
}  // namespace kvant::test
