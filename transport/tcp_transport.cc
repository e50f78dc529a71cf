// The tcp transport: listens, greets peers, and gives every endpoint its turn.
#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "base/bytes.h"
#include "base/random.h"
#include "transport/endpoint_table.h"
#include "transport/tcp.h"
#include "transport/tcp_endpoint.h"
#include "transport/watcher.h"

namespace kvant {
namespace tcp {
namespace {

constexpr int kBulkBacklog = 256;
constexpr int kEventsAtOnce = 64;
// Messages, and new connections, that the listener takes in one Poll.
constexpr int kMessagesATurn = 1024;
constexpr int kAcceptsATurn = 32;

Status CheckOptions(const TcpOptions& options) {
  if (options.max_message_bytes == 0 || options.max_outstanding == 0 ||
      options.max_endpoints == 0 || options.max_handshakes == 0 ||
      options.handshake_timeout <= Duration::zero() ||
      options.silence_timeout < std::chrono::milliseconds(100)) {
    return InvalidArgument(
        "making a tcp transport: every limit must be positive and silence_timeout at least 100 ms");
  }
  return OkStatus();
}

class Tcp final : public TcpTransport {
 public:
  explicit Tcp(const TcpOptions& options)
      : shared_(options),
        capabilities_{.name = "tcp",
                      .max_message_bytes = options.max_message_bytes,
                      .max_outstanding = options.max_outstanding,
                      .max_transfer_bytes = kMaxTransferBytes,
                      .crosses_processes = true,
                      .detects_peer_death = true} {}
  Tcp(const Tcp&) = delete;
  Tcp& operator=(const Tcp&) = delete;
  ~Tcp() override {
    for (auto& [id, endpoint] : endpoints_) endpoint->Leave();
  }

  bool UsableEpoll() const { return static_cast<bool>(shared_.watcher); }
  const Capabilities& capabilities() const override { return capabilities_; }
  uint16_t bulk_port() const override { return bulk_port_; }
  TcpDefects defects() const override { return shared_.defects; }

  Result<std::string> Listen(std::string_view address) override;
  Result<Endpoint*> Connect(std::string_view address, Duration timeout) override;
  Endpoint* Find(EndpointId id) override {
    TcpEndpoint* found = endpoints_.Get(id);
    return found == nullptr || found->closed() ? nullptr : found;
  }
  Result<std::unique_ptr<MemoryRegion>> Register(std::span<std::byte> memory) override {
    return MakeTableRegion(shared_.windows, memory);
  }
  void Poll(std::vector<Event>* events) override;
  int descriptor() const override { return shared_.watcher.fd(); }
  Duration MaySleep(Duration at_most) override;
  void Wait(Duration at_most) override;
  LinkCounters counters() const override { return endpoints_.counters(); }

 private:
  // A peer that said hello and was welcomed, but has not shown its token yet.
  struct Handshake {
    std::string identity;
    Token token;
    TimePoint deadline;
    LinkCounters counters;
  };
  // A bulk connection that has not shown its token yet.
  struct NewBulk {
    uint64_t serial = 0;
    Socket socket;
    std::array<std::byte, kBulkHeaderBytes> hello{};
    size_t got = 0;
    TimePoint deadline;
  };

  void Dispatch(const epoll_event& event);
  void DrainRouter();
  void OnRouterMessage(std::string_view identity, std::span<const std::byte> message);
  void OnHello(std::string_view identity, std::span<const std::byte> message);
  void AcceptBulk();
  void OnNewBulk(uint64_t serial);
  // Whether the connection is done with here: an endpoint now, or closed.
  bool ShowToken(NewBulk* connection);
  void CheckTimers();
  TimePoint NextDeadline() const;

  TcpShared shared_;
  Capabilities capabilities_;
  in_addr listen_host_{};
  Socket bulk_listener_;
  uint16_t bulk_port_ = 0;
  std::vector<Handshake> handshakes_;  // oldest first, as are the next
  std::vector<NewBulk> new_bulks_;
  uint64_t next_serial_ = 1;
  EndpointId next_id_ = 1;
  uint64_t monitors_made_ = 0;
  EndpointTable<TcpEndpoint> endpoints_;
  std::vector<EndpointId> turn_;  // whose turn it is in this Poll
};

Result<std::string> Tcp::Listen(std::string_view address) {
  KV_ASSIGN_OR_RETURN(const HostPort parsed, ParseAddress(address));
  if (bulk_listener_) {
    return InvalidArgument("listening on {}: this transport listens already; make another",
                           address);
  }
  KV_ASSIGN_OR_RETURN(listen_host_, Resolve(parsed.host));
  KV_ASSIGN_OR_RETURN(ZmqSocket router, ZmqSocket::MakeRouter(shared_.zmq, shared_.options));
  const std::string port = parsed.port == 0 ? "*" : std::to_string(parsed.port);
  const std::string bound = fmt::format("tcp://{}:{}", ToText(listen_host_), port);
  if (zmq_bind(router.get(), bound.c_str()) != 0) {
    return Unavailable("listening on {}: {}; {}", address, zmq_strerror(errno),
                       errno == EADDRNOTAVAIL
                           ? "give an address of this host, or 0.0.0.0 for all of them"
                           : "choose another port, or stop who has it");
  }
  std::array<char, 256> actual{};
  size_t length = actual.size();
  KV_CHECK(zmq_getsockopt(router.get(), ZMQ_LAST_ENDPOINT, actual.data(), &length) == 0);
  KV_ASSIGN_OR_RETURN(const HostPort taken, ParseAddress(actual.data()));
  KV_ASSIGN_OR_RETURN(Socket bulk, ListenOn(listen_host_, shared_.options.bulk_port, kBulkBacklog));
  KV_ASSIGN_OR_RETURN(bulk_port_, LocalPort(bulk));
  bulk_listener_ = std::move(bulk);
  shared_.router = std::move(router);
  shared_.router_hot = true;
  shared_.Watch(shared_.router.fd(), Source::kRouter, 0, false);
  shared_.Watch(bulk_listener_.fd(), Source::kBulkListener, 0, false);
  return fmt::format("tcp://{}:{}", parsed.host, taken.port);
}

Result<Endpoint*> Tcp::Connect(std::string_view address, Duration timeout) {
  KV_ASSIGN_OR_RETURN(const HostPort parsed, ParseAddress(address));
  KV_ASSIGN_OR_RETURN(const in_addr host, Resolve(parsed.host));
  if (parsed.port == 0) return InvalidArgument("connecting to {}: port 0 is nobody's", address);
  KV_ASSIGN_OR_RETURN(ZmqSocket dealer, ZmqSocket::MakeDealer(shared_.zmq, shared_.options));
  KV_ASSIGN_OR_RETURN(ZmqMonitor monitor, ZmqMonitor::Make(shared_.zmq, dealer, ++monitors_made_));
  const std::string numeric = fmt::format("tcp://{}:{}", ToText(host), parsed.port);
  if (zmq_connect(dealer.get(), numeric.c_str()) != 0) {
    return Unavailable("connecting to {}: {}", address, zmq_strerror(errno));
  }
  const EndpointId id = next_id_++;
  auto endpoint =
      std::make_unique<TcpEndpoint>(&shared_, id, std::string(address), host, std::move(dealer),
                                    std::move(monitor), SteadyClock().Now() + timeout);
  return endpoints_.Add(std::move(endpoint));
}

void Tcp::Dispatch(const epoll_event& event) {
  const auto source = static_cast<Source>(event.data.u64 & 0xFF);
  const uint64_t id = event.data.u64 >> 8;
  switch (source) {
    case Source::kRouter:
      shared_.router_hot = true;
      return;
    case Source::kBulkListener:
      AcceptBulk();
      return;
    case Source::kNewBulk:
      OnNewBulk(id);
      return;
    case Source::kBulk:
    case Source::kDealer:
    case Source::kMonitor:
      if (TcpEndpoint* endpoint = endpoints_.Get(id)) endpoint->OnReady(source, event.events);
      return;
  }
}

void Tcp::Poll(std::vector<Event>* events) {
  endpoints_.Bury();
  std::array<epoll_event, kEventsAtOnce> room;
  for (const epoll_event& event : shared_.watcher.Look(room)) Dispatch(event);
  if (shared_.router_hot) DrainRouter();
  std::swap(turn_, shared_.active);
  for (const EndpointId id : turn_) {
    TcpEndpoint* endpoint = endpoints_.Get(id);
    if (endpoint == nullptr) continue;
    endpoint->active = false;
    endpoint->Progress();
  }
  turn_.clear();
  CheckTimers();
  endpoints_.HandOver(&shared_.events, events,
                      [this](EndpointId id) { shared_.windows->RevokePeer(id); });
}

Duration Tcp::MaySleep(Duration at_most) {
  if (at_most <= Duration::zero() || !shared_.events.empty()) return Duration::zero();
  if (shared_.router_hot) {
    if (shared_.router.Readable()) return Duration::zero();
    shared_.router_hot = false;
  }
  for (const EndpointId id : shared_.active) {
    TcpEndpoint* endpoint = endpoints_.Get(id);
    if (endpoint != nullptr && endpoint->ReadyNow()) return Duration::zero();
  }
  const Duration until_deadline = NextDeadline() - SteadyClock().Now();
  return std::max(Duration::zero(), std::min(at_most, until_deadline));
}

void Tcp::Wait(Duration at_most) {
  const Duration sleep = MaySleep(at_most);
  if (sleep <= Duration::zero()) return;
  const Duration polling = endpoints_.size() == 0 ? Duration{} : shared_.options.poll_before_sleep;
  const Duration rest =
      PollBeforeSleep(polling, sleep, [this] { return shared_.watcher.Sleep({}); });
  if (rest > Duration::zero()) shared_.watcher.Sleep(rest);
}

void Tcp::DrainRouter() {
  ZmqPart sender;
  ZmqPart body;
  for (int i = 0; i < kMessagesATurn; ++i) {
    switch (shared_.router.Receive(&sender, &body)) {
      case ZmqReceived::kNothing:
        shared_.router_hot = false;
        return;
      case ZmqReceived::kMessage:
        OnRouterMessage(AsText(sender.bytes()), body.bytes());
        break;
      case ZmqReceived::kMalformed: {
        ++shared_.defects.bad_messages;
        const auto found = shared_.peers.find(AsText(sender.bytes()));
        // An empty message is what the endpoint itself takes for a violation.
        if (found != shared_.peers.end()) found->second->OnControl({});
        break;
      }
    }
  }
}

void Tcp::OnRouterMessage(std::string_view identity, std::span<const std::byte> message) {
  const auto peer = shared_.peers.find(identity);
  if (peer != shared_.peers.end()) {
    peer->second->OnControl(message);
    return;
  }
  OnHello(identity, message);
}

void Tcp::OnHello(std::string_view identity, std::span<const std::byte> message) {
  const auto version = DecodeHello(message);
  const bool known = std::any_of(handshakes_.begin(), handshakes_.end(),
                                 [identity](const Handshake& h) { return h.identity == identity; });
  if (!version || known) {
    ++shared_.defects.bad_messages;
    return;
  }
  const auto refuse = [&](std::string_view why) {
    static_cast<void>(
        shared_.router.Send(identity, static_cast<uint8_t>(ControlType::kRefused), AsBytes(why)));
  };
  if (*version != kVersion) {
    refuse(fmt::format("protocol version {} is not ours ({}); install the same release", *version,
                       kVersion));
    return;
  }
  if (endpoints_.size() >= shared_.options.max_endpoints) {
    refuse(fmt::format("all {} places are taken", shared_.options.max_endpoints));
    return;
  }
  // A newcomer takes the place of whoever is slowest: garbage cannot lock honest peers out.
  if (handshakes_.size() >= shared_.options.max_handshakes) handshakes_.erase(handshakes_.begin());
  Handshake handshake{.identity = std::string(identity),
                      .token = {SecureRandomUint64(), SecureRandomUint64()},
                      .deadline = SteadyClock().Now() + shared_.options.handshake_timeout,
                      .counters = {}};
  handshake.counters.control_bytes_received = message.size();
  handshake.counters.control_bytes_sent = kWelcomeBytes;
  const auto welcome =
      EncodeWelcome({.version = kVersion, .bulk_port = bulk_port_, .token = handshake.token});
  if (shared_.router.Send(identity, static_cast<uint8_t>(ControlType::kWelcome),
                          std::span(welcome).subspan(1)) == ZmqSent::kSent) {
    handshakes_.push_back(std::move(handshake));
  }
}

void Tcp::AcceptBulk() {
  for (int i = 0; i < kAcceptsATurn; ++i) {
    Socket accepted(accept4(bulk_listener_.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!accepted) return;
    if (new_bulks_.size() >= shared_.options.max_handshakes) {
      ++shared_.defects.bad_bulk_connections;
      new_bulks_.erase(new_bulks_.begin());
    }
    NewBulk connection{.serial = next_serial_++,
                       .socket = std::move(accepted),
                       .deadline = SteadyClock().Now() + shared_.options.handshake_timeout};
    shared_.Watch(connection.socket.fd(), Source::kNewBulk, connection.serial, false);
    new_bulks_.push_back(std::move(connection));
  }
}

void Tcp::OnNewBulk(uint64_t serial) {
  const auto found = std::find_if(new_bulks_.begin(), new_bulks_.end(),
                                  [serial](const NewBulk& c) { return c.serial == serial; });
  if (found != new_bulks_.end() && ShowToken(&*found)) new_bulks_.erase(found);
}

bool Tcp::ShowToken(NewBulk* connection) {
  const ssize_t got = recv(connection->socket.fd(), connection->hello.data() + connection->got,
                           connection->hello.size() - connection->got, MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return false;
  if (got <= 0) {
    ++shared_.defects.bad_bulk_connections;
    return true;
  }
  connection->got += static_cast<size_t>(got);
  if (connection->got < connection->hello.size()) return false;
  const auto hello = DecodeBulkHeader(connection->hello);
  const Token token = hello ? Token{hello->window, hello->key} : Token{};
  const auto handshake =
      std::find_if(handshakes_.begin(), handshakes_.end(),
                   [&token](const Handshake& waiting) { return waiting.token == token; });
  if (!hello || hello->op != BulkOp::kHello || handshake == handshakes_.end()) {
    ++shared_.defects.bad_bulk_connections;
    return true;
  }
  Handshake met = std::move(*handshake);
  handshakes_.erase(handshake);
  shared_.router_hot = true;
  if (shared_.router.Send(met.identity, static_cast<uint8_t>(ControlType::kReady), {}) !=
      ZmqSent::kSent) {
    return true;
  }
  met.counters.control_bytes_received += kBulkHeaderBytes;
  met.counters.control_bytes_sent += 1;
  const EndpointId id = next_id_++;
  shared_.watcher.Unwatch(connection->socket.fd());
  shared_.Watch(connection->socket.fd(), Source::kBulk, id, true);
  auto endpoint = std::make_unique<TcpEndpoint>(&shared_, id, met.identity,
                                                std::move(connection->socket), met.counters);
  shared_.peers.emplace(std::move(met.identity), endpoint.get());
  endpoints_.Add(std::move(endpoint));
  return true;
}

void Tcp::CheckTimers() {
  if (shared_.timed.empty() && handshakes_.empty() && new_bulks_.empty() &&
      shared_.farewells.empty()) {
    return;
  }
  const TimePoint now = SteadyClock().Now();
  std::erase_if(shared_.timed, [&](EndpointId id) {
    TcpEndpoint* endpoint = endpoints_.Get(id);
    if (endpoint == nullptr) return true;
    endpoint->OnTimer(now);
    return !endpoint->HasTimer();
  });
  std::erase_if(handshakes_, [now](const Handshake& h) { return now >= h.deadline; });
  const size_t late =
      std::erase_if(new_bulks_, [now](const NewBulk& c) { return now >= c.deadline; });
  shared_.defects.bad_bulk_connections += late;
  std::erase_if(shared_.farewells, [now](const TcpShared::Farewell& farewell) {
    if (now >= farewell.deadline) return true;
    std::array<std::byte, 4096> ignored;
    ssize_t got = 1;
    for (int i = 0; i < 64 && got > 0; ++i) {
      got = recv(farewell.socket.fd(), ignored.data(), ignored.size(), MSG_DONTWAIT);
    }
    return got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR);
  });
}

TimePoint Tcp::NextDeadline() const {
  TimePoint next = SteadyClock().Now() + std::chrono::hours(1);
  for (const EndpointId id : shared_.timed) {
    const TcpEndpoint* endpoint = endpoints_.Get(id);
    if (endpoint != nullptr) next = std::min(next, endpoint->deadline());
  }
  for (const Handshake& handshake : handshakes_) next = std::min(next, handshake.deadline);
  for (const NewBulk& connection : new_bulks_) next = std::min(next, connection.deadline);
  return next;
}

}  // namespace
}  // namespace tcp

Result<std::unique_ptr<TcpTransport>> MakeTcpTransport(const TcpOptions& options) {
  KV_RETURN_IF_ERROR(tcp::CheckOptions(options));
  auto made = std::make_unique<tcp::Tcp>(options);
  if (!made->UsableEpoll()) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "making a tcp transport: no descriptor left; raise ulimit -n");
  }
  return std::unique_ptr<TcpTransport>(std::move(made));
}

}  // namespace kvant
