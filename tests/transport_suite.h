// The behaviour suite of transports: a test talks through the transport under test to an agent,
// which does what messages tell it. The agent runs in this process, in another, or in another MPI
// rank.
#pragma once

#include <gtest/gtest.h>
#include <sys/types.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "transport/arena.h"
#include "transport/transport.h"

namespace kvant::test {

// Fills with bytes that depend on the seed and the position.
void FillPattern(std::span<std::byte> bytes, uint64_t seed);
bool HasPattern(std::span<const std::byte> bytes, uint64_t seed);
uint64_t HashOf(std::span<const std::byte> bytes);

// Little-endian fields one after the other.
class Packet {
 public:
  Packet() = default;
  explicit Packet(char op) { U8(static_cast<uint8_t>(op)); }
  explicit Packet(std::vector<std::byte> bytes) : bytes_(std::move(bytes)) {}
  Packet& U8(uint8_t value) { return Put(value); }
  Packet& U32(uint32_t value) { return Put(value); }
  Packet& U64(uint64_t value) { return Put(value); }
  Packet& Window(const RemoteWindow& w) { return U64(w.id).U64(w.key).U64(w.length); }
  uint8_t U8() { return Get<uint8_t>(); }
  uint32_t U32() { return Get<uint32_t>(); }
  uint64_t U64() { return Get<uint64_t>(); }
  RemoteWindow Window() {
    RemoteWindow window;
    window.id = U64();
    window.key = U64();
    window.length = U64();
    return window;
  }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  template <typename T>
  Packet& Put(T value) {
    bytes_.resize(bytes_.size() + sizeof(T));
    StoreLittle(bytes_.data() + bytes_.size() - sizeof(T), value);
    return *this;
  }
  template <typename T>
  T Get() {
    if (!RangeFits(at_, sizeof(T), bytes_.size())) return T{};
    at_ += sizeof(T);
    return LoadLittle<T>(bytes_.data() + at_ - sizeof(T));
  }
  std::vector<std::byte> bytes_;
  size_t at_ = 0;
};

// What an agent is told, by the first byte of a message. Answers begin with the small letter.
//   E bytes: echo.  X access u8, length, seed: expose memory with that pattern -> x window.
//   R id: revoke -> r.  H id: -> h, hash of the window's memory.
//   W window, offset, length, seed, immediate u8, value u32: write -> w status u8 when done.
//   G window, offset, length: read -> g status u8, hash.  F count: that many messages f i.
//   N: -> n, counters.  C: close.  D: die.  Q: quit.
// On kWritten it sends k window id, immediate u32, hash of the window.
class Agent {
 public:
  explicit Agent(Transport* transport);
  void Step();
  bool quit() const { return quit_; }

 private:
  struct Outgoing {
    EndpointId endpoint = 0;
    std::vector<std::byte> bytes;
  };
  struct Busy {
    EndpointId endpoint = 0;
    char answer = 0;
    Lease lease;
  };
  struct Exposed {
    Lease lease;
    ExposedWindow window;
  };
  void OnMessage(EndpointId from, std::vector<std::byte> message);
  void OnDone(const Event& event);
  void Answer(EndpointId to, const Packet& packet) { outgoing_.push_back({to, packet.bytes()}); }

  Transport* transport_;
  std::unique_ptr<RegisteredArena> arena_;
  std::map<uint64_t, Exposed> exposed_;
  std::map<uint64_t, Busy> busy_;
  std::deque<Outgoing> outgoing_;
  std::deque<std::pair<EndpointId, Transfer>> transfers_;
  uint64_t next_cookie_ = 1;
  bool quit_ = false;
};

// A child process with an agent over a transport of its own; killed at the end. Made before this
// process has other threads.
class AgentProcess {
 public:
  AgentProcess(const std::function<std::unique_ptr<Transport>()>& make, const std::string& listen);
  ~AgentProcess() { Kill(); }
  AgentProcess(const AgentProcess&) = delete;
  AgentProcess& operator=(const AgentProcess&) = delete;
  void Kill();
  const std::string& address() const { return address_; }

 private:
  pid_t pid_ = 0;
  std::string address_;
};

// How long a test waits for what must come: 10 s, or KVANT_TEST_PATIENCE seconds, for a slow
// machine.
Duration Patience();
// Polls until the predicate holds, for as long; whether it did. It may take what it finds: asked
// once a turn.
bool PollUntil(Transport* transport, std::vector<Event>* events, const std::function<bool()>& done);
// The first of a kind, or nullptr.
const Event* FindEvent(const std::vector<Event>& events, Event::Kind kind);
// Kills the peer while transfers to it are under way: each completes once, and the end is told.
void ExpectDeathCompletesEverything(Transport* transport, AgentProcess* peer);

// Where the transport under test and its agent come from.
class Rig {
 public:
  virtual ~Rig() = default;
  virtual Transport& transport() = 0;
  virtual std::string agent_address() = 0;
  // Gives an agent of this process a turn; elsewhere it runs by itself.
  virtual void StepAgent() {}
};

// Both ends in this process.
class LocalRig : public Rig {
 public:
  LocalRig(std::unique_ptr<Transport> ours, std::unique_ptr<Transport> theirs,
           std::string_view listen)
      : ours_(std::move(ours)), theirs_(std::move(theirs)), agent_(theirs_.get()) {
    auto address = theirs_->Listen(listen);
    EXPECT_TRUE(address.ok()) << address.status().ToString();
    address_ = *address;
  }
  Transport& transport() override { return *ours_; }
  std::string agent_address() override { return address_; }
  void StepAgent() override { agent_.Step(); }

 private:
  std::unique_ptr<Transport> ours_;
  std::unique_ptr<Transport> theirs_;
  Agent agent_;
  std::string address_;
};

struct RigMaker {
  std::string name;
  std::function<std::unique_ptr<Rig>()> make;
};

inline void PrintTo(const RigMaker& maker, std::ostream* out) { *out << maker.name; }

class TransportSuite : public ::testing::TestWithParam<RigMaker> {
 protected:
  void SetUp() override;
  void TearDown() override;

  Transport& transport() { return rig_->transport(); }
  // Polls, collects events, until `done` or Patience() passed; whether it is done.
  bool Pump(const std::function<bool()>& done);
  // Polls for a while, for what must not happen.
  void Idle(Duration time = std::chrono::milliseconds(30));
  Endpoint* Connect();
  void Send(Endpoint* endpoint, const Packet& packet);
  // The next message of this endpoint that begins with `op`.
  Packet Await(Endpoint* endpoint, char op);
  Packet Ask(Endpoint* endpoint, const Packet& packet, char op);
  // kTransferDone of this cookie.
  Status AwaitDone(uint64_t cookie);
  RemoteWindow AgentWindow(Endpoint* endpoint, Access access, uint64_t length, uint64_t seed);
  uint64_t AgentHash(Endpoint* endpoint, const RemoteWindow& window);
  size_t CountEvents(Event::Kind kind, EndpointId endpoint) const;
  Lease Lend(uint64_t bytes);

  std::unique_ptr<Rig> rig_;
  std::unique_ptr<RegisteredArena> arena_;
  std::vector<Event> events_;
};

}  // namespace kvant::test
