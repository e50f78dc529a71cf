// What only the tcp transport has: ports, handshakes, peers that die, and garbage on both ports.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <thread>

#include "base/random.h"
#include "tests/transport_suite.h"
#include "transport/tcp.h"
#include "transport/tcp_socket.h"
#include "transport/tcp_wire.h"
#include "transport/tcp_zmq.h"

namespace kvant::test {
namespace {

constexpr Duration kPatience = std::chrono::seconds(10);

std::unique_ptr<TcpTransport> NewTcp(const TcpOptions& options = {}) {
  auto transport = MakeTcpTransport(options);
  EXPECT_TRUE(transport.ok()) << transport.status().ToString();
  return *std::move(transport);
}

const Event* FindClosed(const std::vector<Event>& events) {
  return FindEvent(events, Event::Kind::kClosed);
}

TEST(TcpTransport, ADeadPortIsKnownAtOnce) {
  // A port that was free a moment ago.
  const auto host = tcp::Resolve("127.0.0.1");
  uint16_t port = 0;
  {
    const auto listener = tcp::ListenOn(*host, 0, 1);
    port = *tcp::LocalPort(*listener);
  }
  auto transport = NewTcp();
  const TimePoint start = SteadyClock().Now();
  ASSERT_TRUE(transport->Connect(fmt::format("tcp://127.0.0.1:{}", port), kPatience).ok());
  std::vector<Event> events;
  ASSERT_TRUE(PollUntil(transport.get(), &events, [&] { return FindClosed(events) != nullptr; }));
  EXPECT_EQ(FindClosed(events)->status.code(), StatusCode::kUnavailable);
  EXPECT_LT(SteadyClock().Now() - start, std::chrono::seconds(3));
}

TEST(TcpTransport, ASilentServerCostsNoMoreThanTheTimeout) {
  const auto host = tcp::Resolve("127.0.0.1");
  const auto listener = tcp::ListenOn(*host, 0, 5);
  auto transport = NewTcp();
  const TimePoint start = SteadyClock().Now();
  ASSERT_TRUE(transport
                  ->Connect(fmt::format("tcp://127.0.0.1:{}", *tcp::LocalPort(*listener)),
                            std::chrono::milliseconds(200))
                  .ok());
  std::vector<Event> events;
  ASSERT_TRUE(PollUntil(transport.get(), &events, [&] { return FindClosed(events) != nullptr; }));
  EXPECT_EQ(FindClosed(events)->status.code(), StatusCode::kDeadlineExceeded);
  EXPECT_GE(SteadyClock().Now() - start, std::chrono::milliseconds(200));
  EXPECT_LT(SteadyClock().Now() - start, std::chrono::seconds(3));
}

TEST(TcpTransport, AddressesAndOptionsAreChecked) {
  auto transport = NewTcp();
  for (const char* bad : {"tcp://", "tcp://:1", "tcp://a", "tcp://h:99999", "tcp://h:1x", "h:1"}) {
    EXPECT_EQ(transport->Connect(bad, kPatience).status().code(), StatusCode::kInvalidArgument)
        << bad;
    EXPECT_EQ(transport->Listen(bad).status().code(), StatusCode::kInvalidArgument) << bad;
  }
  EXPECT_EQ(transport->Connect("tcp://no.such.host.invalid:1", kPatience).status().code(),
            StatusCode::kUnavailable);
  EXPECT_FALSE(MakeTcpTransport({.max_outstanding = 0}).ok());
  const auto address = transport->Listen("tcp://0.0.0.0:0");
  ASSERT_TRUE(address.ok());
  EXPECT_TRUE(address->starts_with("tcp://0.0.0.0:"));
  EXPECT_NE(transport->bulk_port(), 0);
  EXPECT_FALSE(transport->Listen("tcp://127.0.0.1:0").ok()) << "it listens already";
  const std::string port = address->substr(address->rfind(':'));
  EXPECT_EQ(NewTcp()->Listen("tcp://0.0.0.0" + port).status().code(), StatusCode::kUnavailable)
      << "the port is in use";
}

TEST(TcpTransport, APeerOfAnotherVersionIsRefused) {
  auto server = NewTcp();
  const std::string address = *server->Listen("tcp://127.0.0.1:0");
  const tcp::ZmqContext context;
  const auto dealer = tcp::ZmqSocket::MakeDealer(context, {});
  ASSERT_EQ(zmq_connect(dealer->get(), address.c_str()), 0);
  auto hello = tcp::EncodeHello();
  StoreLittle(hello.data() + 5, uint16_t{99});
  ASSERT_EQ(dealer->Send({}, static_cast<uint8_t>(hello[0]), std::span(hello).subspan(1)),
            tcp::ZmqSent::kSent);
  tcp::ZmqPart answer;
  std::vector<Event> events;
  ASSERT_TRUE(PollUntil(server.get(), &events, [&] {
    return dealer->Receive(nullptr, &answer) == tcp::ZmqReceived::kMessage;
  }));
  EXPECT_EQ(static_cast<tcp::ControlType>(answer.bytes()[0]), tcp::ControlType::kRefused);
  EXPECT_NE(AsText(answer.bytes()).find("99"), std::string_view::npos);
}

// More messages than the receiver's queue holds, unread, and their sender gone: libzmq 4.3 would
// abort this process at the next heartbeat, so there are none.
TEST(TcpTransport, AFloodFromAPeerThatHungUpIsOutlived) {
  auto server = NewTcp({.silence_timeout = std::chrono::milliseconds(600)});
  const std::string address = *server->Listen("tcp://127.0.0.1:0");
  {
    const tcp::ZmqContext context;
    const auto dealer = tcp::ZmqSocket::MakeDealer(context, {});
    const int patience = 50;
    const int now = 0;
    zmq_setsockopt(dealer->get(), ZMQ_SNDTIMEO, &patience, sizeof(patience));
    zmq_setsockopt(dealer->get(), ZMQ_LINGER, &now, sizeof(now));
    ASSERT_EQ(zmq_connect(dealer->get(), address.c_str()), 0);
    const std::vector<std::byte> message(1 << 16);
    int sent = 0;
    while (zmq_send(dealer->get(), message.data(), message.size(), 0) >= 0) ++sent;
    EXPECT_GT(sent, 128);  // until the server's queue is full, and the kernel's buffers
  }
  std::this_thread::sleep_for(std::chrono::seconds(1));
  // Whoever comes is served.
  auto client = NewTcp();
  std::vector<Event> events;
  std::vector<Event> seen;
  ASSERT_TRUE(client->Connect(address, kPatience).ok());
  EXPECT_TRUE(PollUntil(client.get(), &events, [&] {
    server->Poll(&seen);
    return !events.empty();
  }));
  EXPECT_EQ(events.at(0).kind, Event::Kind::kConnected);
  EXPECT_GT(server->defects().bad_messages, 0u);
}

std::unique_ptr<AgentProcess> StartAgent() {
  return std::make_unique<AgentProcess>([] { return NewTcp(); }, "tcp://127.0.0.1:0");
}

TEST(TcpTransport, APeersDeathCompletesEverything) {
  const auto peer = StartAgent();
  ExpectDeathCompletesEverything(NewTcp().get(), peer.get());
}

// ZeroMQ's thread reports the end of a connection to an endpoint that may be gone already, and
// must not wait for it there: it serves all others.
TEST(TcpTransport, APeersDeathHurtsNoOther) {
  std::vector<std::unique_ptr<AgentProcess>> peers(64);
  for (auto& peer : peers) peer = StartAgent();
  const auto other = StartAgent();
  auto transport = NewTcp();
  std::vector<Event> events;
  const auto connect = [&](const std::string& address) {
    events.clear();
    EXPECT_TRUE(transport->Connect(address, kPatience).ok());
    return PollUntil(transport.get(), &events, [&] { return !events.empty(); }) &&
           events[0].kind == Event::Kind::kConnected;
  };
  for (const auto& peer : peers) ASSERT_TRUE(connect(peer->address()));
  for (const auto& peer : peers) {
    events.clear();
    peer->Kill();
    ASSERT_TRUE(PollUntil(transport.get(), &events, [&] { return FindClosed(events) != nullptr; }));
  }
  EXPECT_TRUE(connect(other->address()));
}

uint64_t ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  uint64_t total = 0;
  uint64_t resident = 0;
  statm >> total >> resident;
  return resident * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

// Throws garbage at both ports of a server: raw bytes, mutated handshakes, and, as a peer that was
// let in, mutated bulk frames and messages.
class Attacker {
 public:
  Attacker(std::string address, uint16_t bulk_port, uint64_t seed)
      : address_(std::move(address)),
        message_port_(tcp::ParseAddress(address_)->port),
        bulk_port_(bulk_port),
        random_(seed) {}

  void Throw() {
    switch (random_.Below(8)) {
      case 0:
        return ThrowRaw(message_port_, Bytes(200));
      case 1:
        return ThrowRaw(bulk_port_, Bytes(200));
      case 2:
        return ThrowRaw(bulk_port_, MutatedFrame());
      case 3:
        return ThrowMessage();
      default:
        return ThrowAsPeer();
    }
  }
  void CloseAll() {
    raw_.clear();
    insider_ = {};
    inside_ = {};
  }

 private:
  std::vector<std::byte> Bytes(size_t most) {
    std::vector<std::byte> bytes(random_.Below(most));
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random_.Next());
    return bytes;
  }
  std::vector<std::byte> MutatedFrame() {
    std::vector<std::byte> frame(tcp::kBulkHeaderBytes);
    tcp::BulkHeader header{.op = static_cast<tcp::BulkOp>(1 + random_.Below(6))};
    if (random_.Chance(0.3)) header.immediate = 5;
    header.tag = random_.Chance(0.5) ? 0 : static_cast<uint32_t>(random_.Next());
    header.window =
        random_.Chance(0.5) ? random_.Next() : (random_.Below(8) << 24) + random_.Below(4);
    header.key = random_.Next();
    header.offset = random_.Chance(0.5) ? random_.Below(100) : random_.Next();
    header.length = random_.Chance(0.7) ? random_.Below(300) : random_.Next();
    tcp::Encode(header, std::span<std::byte, tcp::kBulkHeaderBytes>(frame));
    if (random_.Chance(0.3)) {
      frame[random_.Below(frame.size())] ^= static_cast<std::byte>(1 + random_.Below(255));
    }
    if (random_.Chance(0.5)) {
      const auto payload = Bytes(300);
      frame.insert(frame.end(), payload.begin(), payload.end());
    }
    if (random_.Chance(0.1)) frame.resize(random_.Below(frame.size()));
    return frame;
  }
  void ThrowRaw(uint16_t port, const std::vector<std::byte>& bytes) {
    if (raw_.size() > 32) raw_.erase(raw_.begin());
    auto socket = tcp::StartConnect(*tcp::Resolve("127.0.0.1"), port);
    if (!socket.ok()) return;
    // On this host the connection stands at once, or the bytes stay here; both are attacks.
    static_cast<void>(send(socket->fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL));
    raw_.push_back(*std::move(socket));
  }
  void ThrowMessage() {
    if (!stranger_.get() || random_.Chance(0.02)) {
      stranger_ = *tcp::ZmqSocket::MakeDealer(context_, {});
      zmq_connect(stranger_.get(), address_.c_str());
    }
    const auto bytes = Bytes(100);
    if (random_.Chance(0.2)) {
      zmq_send(stranger_.get(), bytes.data(), bytes.size(), ZMQ_DONTWAIT | ZMQ_SNDMORE);
    }
    if (random_.Chance(0.1)) {
      const auto hello = tcp::EncodeHello();
      zmq_send(stranger_.get(), hello.data(), hello.size(), ZMQ_DONTWAIT);
    } else {
      zmq_send(stranger_.get(), bytes.data(), bytes.size(), ZMQ_DONTWAIT);
    }
  }
  // Becomes a peer with a proper handshake, then misbehaves until thrown out.
  void ThrowAsPeer() {
    tcp::ZmqPart answer;
    if (!insider_.get()) {
      insider_ = *tcp::ZmqSocket::MakeDealer(context_, {});
      zmq_connect(insider_.get(), address_.c_str());
      const auto hello = tcp::EncodeHello();
      zmq_send(insider_.get(), hello.data(), hello.size(), ZMQ_DONTWAIT);
      return;
    }
    if (!inside_) {
      if (insider_.Receive(nullptr, &answer) != tcp::ZmqReceived::kMessage) return;
      const auto welcome = tcp::DecodeWelcome(answer.bytes());
      if (!welcome) return;
      auto socket = tcp::StartConnect(*tcp::Resolve("127.0.0.1"), welcome->bulk_port);
      std::vector<std::byte> hello(tcp::kBulkHeaderBytes);
      tcp::Encode({.op = tcp::BulkOp::kHello,
                   .tag = tcp::kVersion,
                   .window = welcome->token.low,
                   .key = welcome->token.high},
                  std::span<std::byte, tcp::kBulkHeaderBytes>(hello));
      static_cast<void>(send(socket->fd(), hello.data(), hello.size(), MSG_NOSIGNAL));
      inside_ = *std::move(socket);
      ++times_inside;
      return;
    }
    if (random_.Chance(0.2)) {
      auto bytes = Bytes(50);
      if (random_.Chance(0.7)) bytes.insert(bytes.begin(), std::byte{5});
      // To the agent itself an unknown letter is a test failure; an echo is not.
      if (bytes.size() > 1) bytes[1] = std::byte{'E'};
      zmq_send(insider_.get(), bytes.data(), bytes.size() == 1 ? 0 : bytes.size(), ZMQ_DONTWAIT);
      return;
    }
    const auto frame = MutatedFrame();
    if (send(inside_.fd(), frame.data(), frame.size(), MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
      insider_ = {};
      inside_ = {};
    }
  }

 public:
  int times_inside = 0;

 private:
  std::string address_;
  uint16_t message_port_;
  uint16_t bulk_port_;
  Random random_;
  tcp::ZmqContext context_;
  tcp::ZmqSocket stranger_;
  tcp::ZmqSocket insider_;
  tcp::Socket inside_;
  std::vector<tcp::Socket> raw_;
};

// 32 MiB of writes are accepted, then a message: it waits for the frame under way, not for them
// all.
TEST(TcpTransport, AMessageOvertakesWaitingWrites) {
  constexpr uint32_t kWrites = 32;
  constexpr size_t kWriteBytes = size_t{1} << 20;
  auto server = NewTcp();
  auto client = NewTcp();
  const auto memory = [](Transport* transport) {
    return *RegisteredArena::Create(transport, {.bytes = kWriteBytes * 2});
  };
  auto arena = memory(server.get());
  auto from = memory(client.get());
  Endpoint* endpoint = *client->Connect(*server->Listen("tcp://127.0.0.1:0"), kPatience);
  std::vector<Event> events;
  std::vector<Event> seen;
  ASSERT_TRUE(PollUntil(client.get(), &events, [&] {
    server->Poll(&seen);
    return !events.empty() && !seen.empty();
  }));
  const Lease to = *arena->Lend(kWriteBytes);
  const auto window = arena->Expose(to, seen.at(0).endpoint, 0, kWriteBytes, Access::kRemoteWrite);
  const Lease local = *from->Lend(kWriteBytes);
  std::vector<Transfer> writes(kWrites);
  for (uint32_t i = 0; i < kWrites; ++i) {
    writes[i] = {.local = local.bytes(), .remote = window->remote(), .immediate = i};
  }
  ASSERT_EQ(endpoint->Submit(writes), kWrites);
  const std::vector<std::byte> message(100, std::byte{7});
  ASSERT_TRUE(endpoint->Send(message).ok());
  seen.clear();
  ASSERT_TRUE(PollUntil(server.get(), &seen, [&] {
    client->Poll(&events);
    return FindEvent(seen, Event::Kind::kMessage) != nullptr;
  }));
  EXPECT_EQ(FindEvent(seen, Event::Kind::kMessage)->message, message);
  const auto written = [&seen] {
    return std::count_if(seen.begin(), seen.end(),
                         [](const Event& e) { return e.kind == Event::Kind::kWritten; });
  };
  EXPECT_LT(written(), kWrites);
  EXPECT_TRUE(PollUntil(server.get(), &seen, [&] {
    client->Poll(&events);
    return written() == kWrites;
  }));
}

TEST(TcpTransport, GarbageHurtsNobody) {
  const char* wanted = std::getenv("KVANT_GARBAGE_FRAMES");
  const uint64_t frames = wanted != nullptr ? std::strtoull(wanted, nullptr, 10) : 4000;
  auto server = NewTcp({.max_handshakes = 16});
  const std::string address = *server->Listen("tcp://127.0.0.1:0");
  Agent agent(server.get());
  auto client = NewTcp();
  auto arena = *RegisteredArena::Create(client.get(), {.bytes = 1 << 20});
  Endpoint* endpoint = *client->Connect(address, kPatience);
  std::vector<Event> events;
  const auto pump = [&](const std::function<bool()>& done) {
    return PollUntil(client.get(), &events, [&] {
      agent.Step();
      return done();
    });
  };
  ASSERT_TRUE(pump([&] { return !events.empty(); }));
  ASSERT_EQ(events[0].kind, Event::Kind::kConnected);
  const Lease lease = *arena->Lend(100000);
  Attacker attacker(address, server->bulk_port(), 20261122);
  const uint64_t before = ResidentBytes();
  for (uint64_t i = 0; i < frames; ++i) {
    attacker.Throw();
    if (i % 4 == 0) agent.Step();
    if (i % 200 != 0) continue;
    // The honest client: a window of its own, written by the server on request.
    events.clear();
    FillPattern(lease.bytes(), 0);
    auto window = arena->Expose(lease, endpoint->id(), 0, lease.size(), Access::kRemoteWrite);
    Packet order('W');
    order.Window(window->remote()).U64(0).U64(lease.size()).U64(i).U8(1).U32(7);
    ASSERT_TRUE(endpoint->Send(order.bytes()).ok());
    ASSERT_TRUE(pump([&] {
      return std::any_of(events.begin(), events.end(),
                         [](const Event& e) { return e.kind == Event::Kind::kWritten; });
    })) << "after "
        << i << " frames";
    EXPECT_TRUE(HasPattern(lease.bytes(), i));
  }
  // A newcomer is let in amid the noise.
  auto newcomer = NewTcp();
  ASSERT_TRUE(newcomer->Connect(address, kPatience).ok());
  std::vector<Event> greeted;
  EXPECT_TRUE(PollUntil(newcomer.get(), &greeted, [&] {
    agent.Step();
    return !greeted.empty();
  }));
  EXPECT_EQ(greeted.at(0).kind, Event::Kind::kConnected);
  const TcpDefects defects = server->defects();
  EXPECT_GT(defects.bad_messages, 0U);
  EXPECT_GT(defects.bad_bulk_connections, 0U);
  EXPECT_GT(defects.violations, 0U);
  EXPECT_GT(attacker.times_inside, 3);
#ifdef __SANITIZE_ADDRESS__
  constexpr uint64_t kMayGrow = uint64_t{512} << 20;  // it keeps 256 MiB of freed memory aside
#else
  constexpr uint64_t kMayGrow = uint64_t{96} << 20;
#endif
  EXPECT_LT(ResidentBytes(), before + kMayGrow);
  attacker.CloseAll();
}

}  // namespace
}  // namespace kvant::test
