// One peer of a tcp transport: the state of its connection, and what both ends of it share.
#pragma once

#include <netinet/in.h>

#include <chrono>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "transport/tcp.h"
#include "transport/tcp_bulk.h"
#include "transport/tcp_socket.h"
#include "transport/tcp_wire.h"
#include "transport/tcp_zmq.h"
#include "transport/watcher.h"
#include "transport/window_table.h"

namespace kvant::tcp {

class TcpEndpoint;

// After a Close, what was accepted before gets this long to leave; after a peer's goodbye on one
// channel, the other channel gets this long to say it too.
inline constexpr Duration kGoodbyeTimeout = std::chrono::seconds(1);

// Whose descriptor became ready; with an id it makes epoll's 64 bits of data.
enum class Source : uint8_t { kRouter, kBulkListener, kBulk, kDealer, kMonitor, kNewBulk };

struct StringHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
};

// What the endpoints of a transport share. Owned by the transport, outlives them. Single-owner.
struct TcpShared {
  explicit TcpShared(const TcpOptions& given);

  // Reports readiness of `fd` as (source, id); `edge`: once a change, both ways.
  void Watch(int fd, Source source, uint64_t id, bool edge) const;
  // Gives the endpoint a turn in the next Poll.
  void Activate(TcpEndpoint* endpoint);
  // Has its deadline looked at.
  void SetTimer(EndpointId endpoint) { timed.push_back(endpoint); }

  const TcpOptions options;
  ZmqContext zmq;
  Watcher watcher;
  std::shared_ptr<WindowTable> windows;
  std::vector<Event> events;  // not polled yet
  TcpDefects defects;
  ZmqSocket router;
  bool router_hot = false;  // may hold messages that its descriptor does not signal
  std::vector<EndpointId> active;
  std::vector<EndpointId> timed;
  // Accepted peers by their ZeroMQ identity.
  std::unordered_map<std::string, TcpEndpoint*, StringHash, std::equal_to<>> peers;
  // Sockets that said goodbye; closed when the peer has read it, so that no reset overtakes it.
  struct Farewell {
    Socket socket;
    TimePoint deadline;
  };
  std::vector<Farewell> farewells;
};

class TcpEndpoint final : public Endpoint {
 public:
  // Connects: says hello to a listener. `shared` outlives the endpoint.
  TcpEndpoint(TcpShared* shared, EndpointId id, std::string peer, in_addr host, ZmqSocket dealer,
              ZmqMonitor monitor, TimePoint deadline);
  // Accepts: both channels stand already. `so_far`: what the handshake moved.
  TcpEndpoint(TcpShared* shared, EndpointId id, std::string identity, Socket bulk,
              const LinkCounters& so_far);
  TcpEndpoint(const TcpEndpoint&) = delete;
  TcpEndpoint& operator=(const TcpEndpoint&) = delete;

  EndpointId id() const override { return id_; }
  std::string_view peer() const override { return peer_; }
  Status Send(std::span<const std::byte> message) override;
  size_t Submit(std::span<const Transfer> transfers) override;
  void Close() override;
  const LinkCounters& counters() const override { return counters_; }

  // The transport drives these.
  bool active = false;  // stands in TcpShared::active
  void OnControl(std::span<const std::byte> message);
  void OnReady(Source source, uint32_t epoll_events);
  void Progress();
  void OnTimer(TimePoint now);
  bool HasTimer() const { return state_ != State::kOpen && state_ != State::kClosed; }
  TimePoint deadline() const { return deadline_; }
  // Whether a Poll now would do something.
  bool ReadyNow() const;
  bool closed() const { return state_ == State::kClosed; }
  void OnReported() { stream_->OnReported(1); }
  // The transport goes away: goodbye as far as it goes without waiting.
  void Leave();

 private:
  enum class State : uint8_t {
    kHello,        // connecting: waits for welcome
    kBulk,         // connecting: waits for the bulk socket
    kReady,        // connecting: waits for ready
    kOpen,         //
    kClosing,      // Close was called: the goodbye is on its way
    kPeerClosing,  // the peer's goodbye came on one channel
    kClosed,
  };
  bool Connecting() const { return state_ < State::kOpen; }
  ZmqSent SendControl(ControlType type, std::span<const std::byte> rest);
  void OnWelcome(std::span<const std::byte> message);
  void OnBulkConnected();
  void OpenStream(Socket bulk);
  void ProgressBulk();
  void DrainDealer();
  void OnPeerGoodbye();
  void Broken(const Status& why);
  void Finish(const Status& why, StatusCode transfers_end_with);

  TcpShared* shared_;
  EndpointId id_;
  std::string peer_;
  std::string identity_;  // empty on the connecting side
  in_addr host_{};
  ZmqSocket dealer_;    // empty on the accepting side
  ZmqMonitor monitor_;  // of dealer_
  Socket connecting_bulk_;
  Token token_;
  std::unique_ptr<BulkStream> stream_;
  State state_ = State::kHello;
  TimePoint deadline_{};
  bool dealer_hot_ = true;
  bool monitor_hot_ = false;
  bool control_goodbye_ = false;
  bool sent_since_poll_ = false;
  LinkCounters counters_;
};

}  // namespace kvant::tcp
