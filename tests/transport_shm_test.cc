// What only the shm transport has: peers that die or write garbage into what is shared, and the way
// that a host's processes find it.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstring>

#include "tests/support/raw_shm_peer.h"
#include "tests/transport_suite.h"
#include "transport/factory.h"
#include "transport/shm.h"

namespace kvant::test {
namespace {

using support::RawShmPeer;

constexpr Duration kPatience = std::chrono::seconds(10);

std::string UniqueName() {
  static int made = 0;
  return fmt::format("test-{}-{}", getpid(), made++);
}

std::unique_ptr<ShmTransport> NewShm(const ShmOptions& options = {}) {
  auto transport = MakeShmTransport(options);
  EXPECT_TRUE(transport.ok()) << transport.status().ToString();
  return *std::move(transport);
}

TEST(ShmTransport, APeersDeathCompletesEverything) {
  AgentProcess peer([] { return NewShm(); }, "shm:" + UniqueName());
  ExpectDeathCompletesEverything(NewShm().get(), &peer);
}

TEST(ShmTransport, AddressesAndOptionsAreChecked) {
  auto transport = NewShm();
  for (const std::string& bad : {std::string("shm:"), std::string("h:1"), std::string("shm"),
                                 "shm:" + std::string(81, 'x')}) {
    EXPECT_EQ(transport->Connect(bad, kPatience).status().code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(transport->Listen(bad).status().code(), StatusCode::kInvalidArgument);
    EXPECT_FALSE(ShmListens(bad));
  }
  EXPECT_FALSE(MakeShmTransport({.max_outstanding = 0}).ok());
  const std::string address = "shm:" + UniqueName();
  EXPECT_FALSE(ShmListens(address));
  ASSERT_TRUE(transport->Listen(address).ok());
  EXPECT_TRUE(ShmListens(address));
  EXPECT_EQ(NewShm()->Listen(address).status().code(), StatusCode::kUnavailable) << "it is taken";
  EXPECT_EQ(transport->Listen("shm:" + UniqueName()).status().code(), StatusCode::kInvalidArgument)
      << "it listens already";
}

TEST(ShmTransport, WhereNobodyListensIsKnownAtOnce) {
  auto transport = NewShm();
  ASSERT_TRUE(transport->Connect("shm:" + UniqueName(), kPatience).ok());
  std::vector<Event> events;
  transport->Poll(&events);
  ASSERT_EQ(events.size(), 1U);
  EXPECT_EQ(events[0].kind, Event::Kind::kClosed);
  EXPECT_EQ(events[0].status.code(), StatusCode::kUnavailable);
}

TEST(ShmTransport, ASilentListenerCostsNoMoreThanTheTimeout) {
  const std::string name = UniqueName();
  const auto listener = shm::Listen(name, 5);
  ASSERT_TRUE(listener.ok());
  auto transport = NewShm();
  ASSERT_TRUE(transport->Connect("shm:" + name, std::chrono::milliseconds(100)).ok());
  std::vector<Event> events;
  ASSERT_TRUE(PollUntil(transport.get(), &events, [&] { return !events.empty(); }));
  EXPECT_EQ(events[0].status.code(), StatusCode::kDeadlineExceeded);
}

TEST(ShmTransport, MemoryThatNobodyCanMapIsNotExposed) {
  const std::string address = "shm:" + UniqueName();
  auto server = NewShm();
  ASSERT_TRUE(server->Listen(address).ok());
  auto transport = NewShm();
  Endpoint* endpoint = *transport->Connect(address, kPatience);
  std::vector<std::byte> memory(4096);
  const auto region = *transport->Register(memory);
  EXPECT_EQ(region->Expose(endpoint->id(), 0, 64, Access::kRemoteRead).status().code(),
            StatusCode::kInvalidArgument);
}

// A server that a hostile connector talks to, and an honest one beside it.
class HostileShm : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(server_->Listen("shm:" + name_).ok());
    arena_ = *RegisteredArena::Create(server_.get(), {.bytes = 1 << 20});
  }
  void TearDown() override {
    // The others go on.
    auto honest = NewShm();
    Endpoint* endpoint = *honest->Connect("shm:" + name_, kPatience);
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
  bool Await(Event::Kind kind) {
    return PollUntil(server_.get(), &events_, [&] { return FindEvent(events_, kind) != nullptr; });
  }
  Endpoint* Accept() {
    EXPECT_TRUE(Await(Event::Kind::kConnected));
    return server_->Find(FindEvent(events_, Event::Kind::kConnected)->endpoint);
  }
  void ExpectViolation() {
    ASSERT_TRUE(Await(Event::Kind::kClosed));
    EXPECT_EQ(FindEvent(events_, Event::Kind::kClosed)->status.code(),
              StatusCode::kInvalidArgument);
  }

  const std::string name_ = UniqueName();
  std::unique_ptr<ShmTransport> server_ = NewShm();
  std::unique_ptr<RegisteredArena> arena_;
  std::vector<Event> events_;
};

TEST_F(HostileShm, GarbageInTheRingClosesTheEndpoint) {
  for (const uint64_t head : {uint64_t{8}, uint64_t{24}, shm::kRingBytes, shm::kRingBytes + 1,
                              UINT64_MAX, uint64_t{1} << 40}) {
    SCOPED_TRACE(head);
    events_.clear();
    RawShmPeer peer(name_);
    Accept();
    peer.PutBytes(std::vector<std::byte>(4096, std::byte{0xEE}), head);
    ExpectViolation();
  }
}

TEST_F(HostileShm, TakingMoreThanThereWasClosesTheEndpoint) {
  RawShmPeer peer(name_);
  Endpoint* endpoint = Accept();
  peer.channel().ours().tail.store(1000);
  ASSERT_TRUE(endpoint->Send(AsBytes("hello")).ok());
  ExpectViolation();
}

TEST_F(HostileShm, AMessageWithoutEndClosesTheEndpoint) {
  RawShmPeer peer(name_);
  Accept();
  const std::vector<std::byte> piece(shm::kMaxPieceBytes);
  for (int i = 0; i < 100 && FindEvent(events_, Event::Kind::kClosed) == nullptr; ++i) {
    if (peer.channel().HasSpace(piece.size())) {
      peer.channel().Put({.bytes = static_cast<uint32_t>(piece.size()), .last = 0}, piece);
    }
    server_->Poll(&events_);
  }
  ExpectViolation();
}

TEST_F(HostileShm, MemoryThatMayShrinkIsRefused) {
  RawShmPeer peer(name_);
  Accept();
  const tcp::Socket unsealed(memfd_create("unsealed", MFD_ALLOW_SEALING));
  ASSERT_EQ(ftruncate(unsealed.fd(), 4096), 0);
  ASSERT_TRUE(shm::SendPacket(peer.socket(),
                              {.type = shm::PacketType::kPages, .first = 1, .second = 4096}, {},
                              {unsealed.fd()}));
  ExpectViolation();
}

TEST_F(HostileShm, WindowsThatLieAreNotTouched) {
  RawShmPeer peer(name_);
  Endpoint* endpoint = Accept();
  const SharedMemory pages = *SharedMemory::Create(8192);
  ASSERT_TRUE(shm::SendPacket(peer.socket(),
                              {.type = shm::PacketType::kPages, .first = 1, .second = 8192}, {},
                              {pages.fd()}));
  const Lease lease = *arena_->Lend(4096);
  struct Lie {
    uint64_t pages, offset, length;
  };
  uint64_t cookie = 0;
  for (const Lie& lie : {Lie{1, 8192, 4096}, Lie{1, UINT64_MAX - 100, 4096}, Lie{1, 4097, 4096},
                         Lie{1, 0, UINT64_MAX}, Lie{2, 0, 4096}, Lie{1, 0, 4095}}) {
    shm::WindowSlot& slot = peer.channel().our_window(5);
    slot.id.store(5);
    slot.access.store(3);
    slot.pages.store(lie.pages);
    slot.offset.store(lie.offset);
    slot.length.store(lie.length);
    slot.key.store(77);
    const Transfer read{.op = Transfer::Op::kRead,
                        .local = lease.bytes(),
                        .remote = {5, 77, 4096},
                        .cookie = ++cookie};
    ASSERT_EQ(endpoint->Submit(std::span(&read, 1)), 1U);
    const Event* done = nullptr;
    ASSERT_TRUE(PollUntil(server_.get(), &events_, [&] {
      for (const Event& event : events_) {
        if (event.kind == Event::Kind::kTransferDone && event.cookie == cookie) done = &event;
      }
      return done != nullptr;
    }));
    EXPECT_EQ(done->status.code(), StatusCode::kPermissionDenied);
  }
}

TEST_F(HostileShm, WhatLandsForEverIsFreeWhenThePeerIsGone) {
  RawShmPeer peer(name_);
  Endpoint* endpoint = Accept();
  Lease lease = *arena_->Lend(4096);
  auto window = *arena_->Expose(lease, endpoint->id(), 0, 4096, Access::kRemoteWrite);
  shm::WindowSlot& slot =
      peer.channel().their_window(static_cast<uint32_t>(window.remote().id % shm::kWindows));
  ASSERT_EQ(slot.key.load(), window.remote().key);
  slot.landing.fetch_add(1);
  EXPECT_FALSE(window.Revoke());
  EXPECT_EQ(slot.key.load(), 0U);
  lease.Reset();
  server_->Poll(&events_);
  EXPECT_EQ(arena_->Collect(), 1U);
  peer.HangUp();
  ASSERT_TRUE(Await(Event::Kind::kClosed));
  EXPECT_EQ(arena_->Collect(), 0U);
}

TEST_F(HostileShm, NothingIsExposedToAPeerThatIsGoneBeforeThatIsPolled) {
  RawShmPeer peer(name_);
  Endpoint* endpoint = Accept();
  Lease lease = *arena_->Lend(4096);
  peer.HangUp();
  const auto window = arena_->Expose(lease, endpoint->id(), 0, 4096, Access::kRemoteWrite);
  EXPECT_EQ(window.status().code(), StatusCode::kUnavailable) << window.status().ToString();
  ASSERT_TRUE(Await(Event::Kind::kClosed));
}

TEST_F(HostileShm, AnotherProtocolIsRefused) {
  const tcp::Socket socket = *shm::Connect(name_);
  ASSERT_TRUE(shm::SendPacket(socket, {.version = 9, .first = 1}, {}, {}));
  shm::Packet answer;
  ASSERT_TRUE(PollUntil(server_.get(), &events_, [&] {
    return shm::ReceivePacket(socket, &answer) == shm::Received::kPacket;
  }));
  EXPECT_EQ(answer.header.type, shm::PacketType::kRefused);
  EXPECT_NE(answer.text.find("same release"), std::string::npos);
}

TEST(HostTransport, TakesSharedMemoryWhereThePeerIsHere) {
  const auto name_of = [](bool serve_shm, const char* listen) {
    auto server = *MakeTransport("tcp", {.tcp_alone = !serve_shm});
    std::string address = *server->Listen(listen);
    const size_t any = address.find("0.0.0.0");
    if (any != std::string::npos) address.replace(any, 7, "127.0.0.1");
    auto client = *MakeTransport("tcp", {});
    EXPECT_TRUE(client->Connect(address, kPatience).ok());
    std::vector<Event> events;
    std::vector<Event> ignored;
    EXPECT_TRUE(PollUntil(client.get(), &events, [&] {
      server->Poll(&ignored);
      return !events.empty();
    }));
    EXPECT_EQ(events.at(0).kind, Event::Kind::kConnected);
    return std::string(client->capabilities().name);
  };
  EXPECT_EQ(name_of(true, "tcp://127.0.0.1:0"), "shm");
  EXPECT_EQ(name_of(true, "tcp://0.0.0.0:0"), "shm");
  EXPECT_EQ(name_of(false, "tcp://127.0.0.1:0"), "tcp");
}

}  // namespace
}  // namespace kvant::test
