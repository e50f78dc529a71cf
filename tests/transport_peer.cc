// The agent and the fixture of the transports' behaviour suite.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstdlib>

#include "base/check.h"
#include "base/clock.h"
#include "tests/transport_suite.h"

namespace kvant::test {
namespace {

constexpr uint64_t kArenaBytes = uint64_t{64} << 20;

uint64_t Mix(uint64_t value) {
  value ^= value >> 33;
  value *= 0xFF51AFD7ED558CCDULL;
  return value ^ (value >> 29);
}

}  // namespace

Duration Patience() {
  const char* given = std::getenv("KVANT_TEST_PATIENCE");
  return std::chrono::seconds(given != nullptr ? std::max(1, std::atoi(given)) : 10);
}

void FillPattern(std::span<std::byte> bytes, uint64_t seed) {
  for (size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = static_cast<std::byte>(Mix(seed * 0x9E3779B97F4A7C15ULL + i / 8) >> (i % 8 * 8));
  }
}

bool HasPattern(std::span<const std::byte> bytes, uint64_t seed) {
  std::vector<std::byte> expected(bytes.size());
  FillPattern(expected, seed);
  return std::equal(bytes.begin(), bytes.end(), expected.begin());
}

uint64_t HashOf(std::span<const std::byte> bytes) {
  uint64_t hash = 0xCBF29CE484222325ULL;
  for (const std::byte byte : bytes) hash = (hash ^ static_cast<uint64_t>(byte)) * 0x100000001B3ULL;
  return hash;
}

Agent::Agent(Transport* transport) : transport_(transport) {
  auto arena = RegisteredArena::Create(transport, {.bytes = kArenaBytes});
  EXPECT_TRUE(arena.ok()) << arena.status().ToString();
  arena_ = *std::move(arena);
}

void Agent::Step() {
  std::vector<Event> events;
  transport_->Poll(&events);
  for (Event& event : events) {
    if (event.kind == Event::Kind::kMessage) OnMessage(event.endpoint, std::move(event.message));
    if (event.kind == Event::Kind::kTransferDone) OnDone(event);
    if (event.kind == Event::Kind::kWritten) {
      const auto found = exposed_.find(event.window);
      const uint64_t hash = found == exposed_.end() ? 0 : HashOf(found->second.lease.bytes());
      Answer(event.endpoint, Packet('k').U64(event.window).U32(event.immediate).U64(hash));
    }
  }
  while (!transfers_.empty()) {
    Endpoint* endpoint = transport_->Find(transfers_.front().first);
    if (endpoint != nullptr && endpoint->Submit(std::span(&transfers_.front().second, 1)) == 0)
      break;
    transfers_.pop_front();
  }
  while (!outgoing_.empty()) {
    Endpoint* endpoint = transport_->Find(outgoing_.front().endpoint);
    if (endpoint != nullptr &&
        endpoint->Send(outgoing_.front().bytes).code() == StatusCode::kResourceExhausted) {
      break;
    }
    outgoing_.pop_front();
  }
}

void Agent::OnDone(const Event& event) {
  const auto found = busy_.find(event.cookie);
  if (found == busy_.end()) return;
  Packet answer(found->second.answer);
  answer.U8(static_cast<uint8_t>(event.status.code()));
  answer.U64(HashOf(found->second.lease.bytes()));
  Answer(event.endpoint, answer);
  busy_.erase(found);
}

void Agent::OnMessage(EndpointId from, std::vector<std::byte> message) {
  if (message.empty()) {
    Answer(from, Packet());
    return;
  }
  Packet in(std::move(message));
  switch (static_cast<char>(in.U8())) {
    case 'E':
      Answer(from, in);
      break;
    case 'X': {
      const auto access = static_cast<Access>(in.U8());
      const uint64_t length = in.U64();
      auto lease = arena_->Lend(std::max<uint64_t>(length, 1));
      ASSERT_TRUE(lease.ok()) << lease.status().ToString();
      FillPattern(lease->bytes(), in.U64());
      auto window = arena_->Expose(*lease, from, 0, length, access);
      ASSERT_TRUE(window.ok()) << window.status().ToString();
      const RemoteWindow remote = window->remote();
      exposed_[remote.id] = {*std::move(lease), *std::move(window)};
      Answer(from, Packet('x').Window(remote));
      break;
    }
    case 'R':
      exposed_[in.U64()].window.Revoke();
      Answer(from, Packet('r'));
      break;
    case 'H':
      Answer(from, Packet('h').U64(HashOf(exposed_[in.U64()].lease.bytes())));
      break;
    case 'W':
    case 'G': {
      const bool write = static_cast<char>(in.bytes()[0]) == 'W';
      Transfer transfer{.op = write ? Transfer::Op::kWrite : Transfer::Op::kRead,
                        .local = {},
                        .remote = in.Window()};
      transfer.remote_offset = in.U64();
      const uint64_t length = in.U64();
      auto lease = arena_->Lend(std::max<uint64_t>(length, 1));
      ASSERT_TRUE(lease.ok()) << lease.status().ToString();
      transfer.local = lease->bytes().first(length);
      if (write) {
        FillPattern(transfer.local, in.U64());
        if (in.U8() != 0) transfer.immediate = in.U32();
      }
      transfer.cookie = next_cookie_++;
      busy_[transfer.cookie] = {from, write ? 'w' : 'g', *std::move(lease)};
      transfers_.emplace_back(from, transfer);
      break;
    }
    case 'F': {
      const uint64_t count = in.U64();
      for (uint64_t i = 0; i < count; ++i) {
        Answer(from, Packet('f').U32(static_cast<uint32_t>(i)));
      }
      break;
    }
    case 'N': {
      const Endpoint* endpoint = transport_->Find(from);
      const LinkCounters& c = endpoint->counters();
      Answer(from, Packet('n')
                       .U64(c.payload_bytes_sent)
                       .U64(c.payload_bytes_received)
                       .U64(c.control_bytes_sent)
                       .U64(c.control_bytes_received));
      break;
    }
    case 'C':
      transport_->Find(from)->Close();
      break;
    case 'D':
      _exit(9);
    case 'Q':
      quit_ = true;
      break;
    default:
      ADD_FAILURE() << "the agent got a message of unknown kind";
  }
}

AgentProcess::AgentProcess(const std::function<std::unique_ptr<Transport>()>& make,
                           const std::string& listen) {
  std::array<int, 2> ends{};
  KV_CHECK(pipe(ends.data()) == 0);
  pid_ = fork();
  if (pid_ == 0) {
    const auto transport = make();
    const std::string address = *transport->Listen(listen);
    KV_CHECK(write(ends[1], address.data(), address.size()) > 0);
    close(ends[1]);
    Agent agent(transport.get());
    while (true) {
      agent.Step();
      transport->Wait(std::chrono::milliseconds(5));
    }
  }
  close(ends[1]);
  std::array<char, 128> text{};
  const ssize_t got = read(ends[0], text.data(), text.size());
  close(ends[0]);
  address_.assign(text.data(), static_cast<size_t>(std::max<ssize_t>(got, 0)));
}

void AgentProcess::Kill() {
  if (pid_ <= 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = 0;
}

bool PollUntil(Transport* transport, std::vector<Event>* events,
               const std::function<bool()>& done) {
  const TimePoint deadline = SteadyClock().Now() + Patience();
  while (!done()) {
    if (SteadyClock().Now() > deadline) return false;
    const size_t before = events->size();
    transport->Poll(events);
    if (events->size() == before) transport->Wait(std::chrono::milliseconds(1));
  }
  return true;
}

const Event* FindEvent(const std::vector<Event>& events, Event::Kind kind) {
  const auto found = std::find_if(events.begin(), events.end(),
                                  [kind](const Event& event) { return event.kind == kind; });
  return found == events.end() ? nullptr : &*found;
}

void ExpectDeathCompletesEverything(Transport* transport, AgentProcess* peer) {
  auto arena = *RegisteredArena::Create(transport, {.bytes = 16 << 20});
  Endpoint* endpoint = *transport->Connect(peer->address(), Patience());
  const EndpointId id = endpoint->id();
  std::vector<Event> events;
  const auto await = [&](Event::Kind kind) {
    return PollUntil(transport, &events, [&] { return FindEvent(events, kind) != nullptr; });
  };
  ASSERT_TRUE(await(Event::Kind::kConnected));
  const Packet wanted =
      Packet('X').U8(static_cast<uint8_t>(Access::kRemoteReadWrite)).U64(4 << 20).U64(1);
  ASSERT_TRUE(endpoint->Send(wanted.bytes()).ok());
  ASSERT_TRUE(await(Event::Kind::kMessage));
  Packet answer(FindEvent(events, Event::Kind::kMessage)->message);
  answer.U8();
  const RemoteWindow window = answer.Window();
  const Lease lease = *arena->Lend(4 << 20);
  std::vector<Transfer> transfers(200);
  for (size_t i = 0; i < transfers.size(); ++i) {
    transfers[i] = {.op = i % 2 == 0 ? Transfer::Op::kRead : Transfer::Op::kWrite,
                    .local = lease.bytes(),
                    .remote = window,
                    .cookie = i};
  }
  const size_t accepted = endpoint->Submit(transfers);
  EXPECT_EQ(accepted, transfers.size());
  for (int i = 0; i < 3; ++i) transport->Poll(&events);
  peer->Kill();
  ASSERT_TRUE(await(Event::Kind::kClosed));
  EXPECT_EQ(FindEvent(events, Event::Kind::kClosed)->status.code(), StatusCode::kUnavailable);
  std::vector<int> completions(accepted);
  for (const Event& event : events) {
    if (event.kind == Event::Kind::kTransferDone) ++completions[event.cookie];
  }
  EXPECT_EQ(std::count(completions.begin(), completions.end(), 1),
            static_cast<ptrdiff_t>(accepted));
  EXPECT_EQ(transport->Find(id), nullptr);
}

void TransportSuite::SetUp() {
  rig_ = GetParam().make();
  auto arena = RegisteredArena::Create(&transport(), {.bytes = kArenaBytes});
  ASSERT_TRUE(arena.ok()) << arena.status().ToString();
  arena_ = *std::move(arena);
}

void TransportSuite::TearDown() {
  arena_.reset();
  rig_.reset();
}

bool TransportSuite::Pump(const std::function<bool()>& done) {
  const TimePoint deadline = SteadyClock().Now() + Patience();
  // `done` may take what it finds, so it is asked once a turn.
  while (!done()) {
    if (SteadyClock().Now() > deadline) return false;
    const size_t before = events_.size();
    transport().Poll(&events_);
    rig_->StepAgent();
    if (events_.size() == before) transport().Wait(std::chrono::microseconds(200));
  }
  return true;
}

void TransportSuite::Idle(Duration time) {
  const TimePoint until = SteadyClock().Now() + time;
  Pump([&] { return SteadyClock().Now() > until; });
}

Endpoint* TransportSuite::Connect() {
  auto endpoint = transport().Connect(rig_->agent_address(), Patience());
  EXPECT_TRUE(endpoint.ok()) << endpoint.status().ToString();
  if (!endpoint.ok()) return nullptr;
  const EndpointId id = (*endpoint)->id();
  EXPECT_TRUE(Pump([&] { return CountEvents(Event::Kind::kConnected, id) > 0; }));
  return *endpoint;
}

void TransportSuite::Send(Endpoint* endpoint, const Packet& packet) {
  Status status;
  EXPECT_TRUE(Pump([&] {
    status = endpoint->Send(packet.bytes());
    return status.code() != StatusCode::kResourceExhausted;
  }));
  EXPECT_TRUE(status.ok()) << status.ToString();
}

Packet TransportSuite::Await(Endpoint* endpoint, char op) {
  const EndpointId id = endpoint->id();
  Packet found;
  EXPECT_TRUE(Pump([&] {
    for (auto event = events_.begin(); event != events_.end(); ++event) {
      if (event->kind != Event::Kind::kMessage || event->endpoint != id) continue;
      if (event->message.empty() || static_cast<char>(event->message[0]) != op) continue;
      found = Packet(std::move(event->message));
      events_.erase(event);
      return true;
    }
    return false;
  })) << "no answer '"
      << op << "'";
  found.U8();
  return found;
}

Packet TransportSuite::Ask(Endpoint* endpoint, const Packet& packet, char op) {
  Send(endpoint, packet);
  return Await(endpoint, op);
}

Status TransportSuite::AwaitDone(uint64_t cookie) {
  const Event* found = nullptr;
  const bool done = Pump([&] {
    for (const Event& event : events_) {
      if (event.kind == Event::Kind::kTransferDone && event.cookie == cookie) found = &event;
    }
    return found != nullptr;
  });
  return done ? found->status
              : MakeStatus(StatusCode::kDeadlineExceeded, "the test waited in vain");
}

RemoteWindow TransportSuite::AgentWindow(Endpoint* endpoint, Access access, uint64_t length,
                                         uint64_t seed) {
  return Ask(endpoint, Packet('X').U8(static_cast<uint8_t>(access)).U64(length).U64(seed), 'x')
      .Window();
}

uint64_t TransportSuite::AgentHash(Endpoint* endpoint, const RemoteWindow& window) {
  return Ask(endpoint, Packet('H').U64(window.id), 'h').U64();
}

size_t TransportSuite::CountEvents(Event::Kind kind, EndpointId endpoint) const {
  return static_cast<size_t>(std::count_if(events_.begin(), events_.end(), [&](const Event& event) {
    return event.kind == kind && event.endpoint == endpoint;
  }));
}

Lease TransportSuite::Lend(uint64_t bytes) {
  auto lease = arena_->Lend(bytes);
  EXPECT_TRUE(lease.ok()) << lease.status().ToString();
  return *std::move(lease);
}

}  // namespace kvant::test
