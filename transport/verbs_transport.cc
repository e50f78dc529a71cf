// The verbs transport: listens, greets peers, and gives every endpoint its turn.
#include <fcntl.h>
#include <sched.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>

#include "base/bytes.h"
#include "transport/endpoint_table.h"
#include "transport/verbs.h"
#include "transport/verbs_endpoint.h"

namespace kvant {
namespace verbs {
namespace {

constexpr std::string_view kScheme = "verbs";
constexpr int kBacklog = 256;
constexpr size_t kEventsAtOnce = 64;
constexpr size_t kMaxNewcomers = 64;
// Descriptors are looked at in one of so many calls of Poll, and in the next one after a sleep.
constexpr uint32_t kPollsBetween = 16;
// Last words get this long when the transport goes away.
constexpr Duration kLeaveTimeout = std::chrono::milliseconds(500);
// What the watcher says of those that are no endpoint.
constexpr uint64_t kChannel = 1;
constexpr uint64_t kListener = 2;
constexpr uint64_t kNewcomer = 3;
constexpr EndpointId kFirstEndpoint = 4;

class Verbs;

class VerbsRegion final : public MemoryRegion {
 public:
  VerbsRegion(Verbs* transport, std::span<std::byte> memory, Owned<ibv_mr> registered);
  ~VerbsRegion() override;
  VerbsRegion(const VerbsRegion&) = delete;
  VerbsRegion& operator=(const VerbsRegion&) = delete;

  std::span<std::byte> bytes() const override { return memory_; }
  Result<RemoteWindow> Expose(EndpointId peer, uint64_t offset, uint64_t length,
                              Access access) override;
  bool Revoke(uint64_t window_id) override;
  bool Landing(uint64_t window_id) const override;

 private:
  Verbs* transport_;
  std::span<std::byte> memory_;
  Owned<ibv_mr> registered_;
};

class Verbs final : public Transport {
 public:
  Verbs(const VerbsOptions& options, std::unique_ptr<Device> device)
      : shared_(options, std::move(device)),
        capabilities_{.name = kScheme,
                      .max_message_bytes = options.max_message_bytes,
                      .max_outstanding = options.max_outstanding,
                      .max_transfer_bytes = kMaxTransferBytes,
                      .crosses_processes = true,
                      .detects_peer_death = true} {}
  Verbs(const Verbs&) = delete;
  Verbs& operator=(const Verbs&) = delete;
  ~Verbs() override;

  // False: no descriptor was left.
  bool Prepare();
  const Capabilities& capabilities() const override { return capabilities_; }
  Result<std::string> Listen(std::string_view address) override;
  Result<Endpoint*> Connect(std::string_view address, Duration timeout) override;
  Endpoint* Find(EndpointId id) override { return FindOpen(id); }
  VerbsEndpoint* FindOpen(EndpointId id) {
    VerbsEndpoint* found = endpoints_.Get(id);
    return found == nullptr || found->closed() ? nullptr : found;
  }
  VerbsShared& shared() { return shared_; }
  Result<std::unique_ptr<MemoryRegion>> Register(std::span<std::byte> memory) override;
  void Poll(std::vector<Event>* events) override;
  void Wait(Duration at_most) override;
  LinkCounters counters() const override { return endpoints_.counters(); }

 private:
  // Somebody who has connected, but has not greeted to the end.
  struct Newcomer {
    Greeter greeter;
    TimePoint deadline;
    std::unique_ptr<Queue> queue{};  // since its hello
  };

  void LookAtDescriptors();
  void TakeChannelEvent();
  void Accept();
  // Whether the newcomer is done with: an endpoint now, or turned away.
  bool Greet(Newcomer* newcomer);
  bool Welcome(Newcomer* newcomer, const Greeting& hello);
  void CheckTimers();
  bool AnyReady() {
    return std::any_of(endpoints_.begin(), endpoints_.end(),
                       [](const auto& entry) { return entry.second->ReadyNow(); });
  }
  Duration UntilDeadline(TimePoint now, Duration at_most) const;

  VerbsShared shared_;
  Capabilities capabilities_;
  tcp::Socket listener_;
  std::vector<Newcomer> newcomers_;  // oldest first
  EndpointId next_id_ = kFirstEndpoint;
  EndpointTable<VerbsEndpoint> endpoints_;
  uint32_t polls_ = 0;
  bool look_ = true;  // at descriptors, in the next Poll
};

VerbsRegion::VerbsRegion(Verbs* transport, std::span<std::byte> memory, Owned<ibv_mr> registered)
    : transport_(transport), memory_(memory), registered_(std::move(registered)) {
  transport_->shared().memory.AddMemory(memory_);
  transport_->shared().registered.push_back({memory_, registered_.get()});
}

VerbsRegion::~VerbsRegion() {
  VerbsShared& shared = transport_->shared();
  std::vector<std::pair<uint64_t, EndpointId>> inside;
  for (const auto& [id, window] : shared.exposed) {
    if (window.begin >= memory_.data() && window.begin <= memory_.data() + memory_.size())
      inside.emplace_back(id, window.peer);
  }
  for (const auto& [id, peer] : inside) {
    if (VerbsEndpoint* endpoint = transport_->FindOpen(peer)) endpoint->Drop(id);
  }
  std::erase_if(shared.registered,
                [this](const Registered& known) { return known.memory == registered_.get(); });
  shared.memory.RemoveMemory(memory_);
}

Result<RemoteWindow> VerbsRegion::Expose(EndpointId peer, uint64_t offset, uint64_t length,
                                         Access access) {
  if (!RangeFits(offset, length, memory_.size())) {
    return InvalidArgument("exposing [{}, +{}) of a region of {} bytes to endpoint {}: outside it",
                           offset, length, memory_.size(), peer);
  }
  VerbsEndpoint* endpoint = transport_->FindOpen(peer);
  // To a peer that has gone meanwhile nothing is exposed; that it has is told by kClosed.
  if (endpoint == nullptr) return RemoteWindow{0, 0, length};
  return endpoint->Expose({memory_, registered_.get()}, memory_.subspan(offset, length), access);
}

bool VerbsRegion::Revoke(uint64_t window_id) {
  const auto& exposed = transport_->shared().exposed;
  const auto found = exposed.find(window_id);
  if (found == exposed.end()) return true;
  return transport_->FindOpen(found->second.peer)->Revoke(window_id);
}

bool VerbsRegion::Landing(uint64_t window_id) const {
  return transport_->shared().exposed.contains(window_id);
}

bool Verbs::Prepare() {
  if (!shared_.watcher || shared_.channel == nullptr) return false;
  const int fd = shared_.channel->fd;
  const int flags = fcntl(fd, F_GETFL);
  if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) != 0) return false;
  shared_.watcher.Watch(fd, kChannel);
  return true;
}

Verbs::~Verbs() {
  const TimePoint deadline = SteadyClock().Now() + kLeaveTimeout;
  for (auto& [id, endpoint] : endpoints_) endpoint->Leave();
  const auto leaving = [this] {
    bool any = false;
    for (auto& [id, endpoint] : endpoints_) any = endpoint->Leaving() || any;
    return any;
  };
  while (leaving() && SteadyClock().Now() < deadline) sched_yield();
}

Result<std::string> Verbs::Listen(std::string_view address) {
  KV_ASSIGN_OR_RETURN(const tcp::HostPort parsed, tcp::ParseAddress(address, kScheme));
  if (listener_) {
    return InvalidArgument("listening on {}: this transport listens already; make another",
                           address);
  }
  KV_ASSIGN_OR_RETURN(const in_addr host, tcp::Resolve(parsed.host));
  KV_ASSIGN_OR_RETURN(listener_, tcp::ListenOn(host, parsed.port, kBacklog));
  KV_ASSIGN_OR_RETURN(const uint16_t port, tcp::LocalPort(listener_));
  shared_.watcher.Watch(listener_.fd(), kListener);
  return fmt::format("{}://{}:{}", kScheme, parsed.host, port);
}

Result<Endpoint*> Verbs::Connect(std::string_view address, Duration timeout) {
  KV_ASSIGN_OR_RETURN(const tcp::HostPort parsed, tcp::ParseAddress(address, kScheme));
  KV_ASSIGN_OR_RETURN(const in_addr host, tcp::Resolve(parsed.host));
  if (parsed.port == 0) return InvalidArgument("connecting to {}: port 0 is nobody's", address);
  const EndpointId id = next_id_++;
  KV_ASSIGN_OR_RETURN(auto queue, Queue::Make(shared_.device.get(), shared_.channel.get()));
  Result<tcp::Socket> socket = tcp::StartConnect(host, parsed.port);
  VerbsEndpoint* endpoint = endpoints_.Add(std::make_unique<VerbsEndpoint>(
      &shared_, id, std::string(address), socket.ok() ? *std::move(socket) : tcp::Socket(),
      std::move(queue), SteadyClock().Now() + timeout));
  if (!socket.ok()) endpoint->Fail(socket.status());
  return endpoint;
}

Result<std::unique_ptr<MemoryRegion>> Verbs::Register(std::span<std::byte> memory) {
  // Of its key peers get nothing: what they may reach, a window grants.
  KV_ASSIGN_OR_RETURN(Owned<ibv_mr> registered,
                      shared_.device->Register(memory.data(), memory.size(),
                                               IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND));
  return std::unique_ptr<MemoryRegion>(
      std::make_unique<VerbsRegion>(this, memory, std::move(registered)));
}

void Verbs::Accept() {
  while (true) {
    tcp::Socket accepted(accept4(listener_.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!accepted) return;
    Greeter greeter(std::move(accepted));
    if (endpoints_.size() >= shared_.options.max_endpoints) {
      greeter.Send({.type = GreetingType::kRefused},
                   fmt::format("all {} places are taken", shared_.options.max_endpoints));
      continue;
    }
    if (newcomers_.size() >= kMaxNewcomers) newcomers_.erase(newcomers_.begin());
    tcp::TuneForBulk(greeter.socket(), shared_.options.silence_timeout);
    shared_.watcher.Watch(greeter.socket().fd(), kNewcomer);
    newcomers_.push_back(
        {std::move(greeter), SteadyClock().Now() + shared_.options.handshake_timeout});
  }
}

bool Verbs::Welcome(Newcomer* newcomer, const Greeting& hello) {
  Result<std::unique_ptr<Queue>> queue = Queue::Make(shared_.device.get(), shared_.channel.get());
  const Status status = queue.ok() ? (*queue)->Connect(hello) : queue.status();
  if (!status.ok()) {
    newcomer->greeter.Send({.type = GreetingType::kRefused}, status.message());
    return true;
  }
  newcomer->queue = *std::move(queue);
  return !newcomer->greeter.Send(newcomer->queue->Introduce(GreetingType::kWelcome));
}

bool Verbs::Greet(Newcomer* newcomer) {
  Greeting greeting;
  std::string text;
  switch (newcomer->greeter.Receive(&greeting, &text)) {
    case Greeter::Received::kNothing:
      return false;
    case Greeter::Received::kEnd:
      return true;
    case Greeter::Received::kMalformed:
      newcomer->greeter.Send({.type = GreetingType::kRefused},
                             "its protocol is another; install the same release");
      return true;
    case Greeter::Received::kGreeting:
      break;
  }
  if (newcomer->queue == nullptr && greeting.type == GreetingType::kHello)
    return Welcome(newcomer, greeting);
  if (newcomer->queue == nullptr || greeting.type != GreetingType::kReady) return true;
  const EndpointId id = next_id_++;
  tcp::Socket socket = newcomer->greeter.TakeSocket();
  shared_.watcher.Unwatch(socket.fd());
  std::string peer = tcp::PeerAddress(socket, kScheme);
  endpoints_.Add(std::make_unique<VerbsEndpoint>(&shared_, id, std::move(peer), std::move(socket),
                                                 std::move(newcomer->queue)));
  return true;
}

void Verbs::TakeChannelEvent() {
  const Library& library = shared_.device->library();
  ibv_cq* completions = nullptr;
  void* queue = nullptr;
  // One a look: where there are more, the channel stays readable.
  if (library.get_cq_event(shared_.channel.get(), &completions, &queue) != 0) return;
  library.ack_cq_events(completions, 1);
  static_cast<Queue*>(queue)->OnArmedEvent();
}

void Verbs::LookAtDescriptors() {
  std::array<epoll_event, kEventsAtOnce> room;
  const std::span<epoll_event> ready = shared_.watcher.Look(room);
  bool greet = false;
  for (const epoll_event& event : ready) {
    switch (event.data.u64) {
      case kChannel:
        TakeChannelEvent();
        break;
      case kListener:
        Accept();
        greet = true;
        break;
      case kNewcomer:
        greet = true;
        break;
      default:
        if (VerbsEndpoint* endpoint = FindOpen(event.data.u64)) endpoint->OnSocket();
    }
  }
  if (greet) std::erase_if(newcomers_, [this](Newcomer& newcomer) { return Greet(&newcomer); });
  look_ = ready.size() == kEventsAtOnce;
}

void Verbs::CheckTimers() {
  if (newcomers_.empty() && !endpoints_.HasTimer()) return;
  const TimePoint now = SteadyClock().Now();
  endpoints_.OnTimers(now);
  std::erase_if(newcomers_, [now](const Newcomer& n) { return now >= n.deadline; });
}

void Verbs::Poll(std::vector<Event>* events) {
  endpoints_.Bury();
  if (look_ || ++polls_ % kPollsBetween == 0) LookAtDescriptors();
  for (auto& [id, endpoint] : endpoints_) endpoint->Progress();
  CheckTimers();
  // What an endpoint exposed it took back when it ended.
  endpoints_.HandOver(&shared_.events, events, [](EndpointId) {});
}

Duration Verbs::UntilDeadline(TimePoint now, Duration at_most) const {
  at_most = endpoints_.UntilTimer(now, at_most);
  for (const Newcomer& newcomer : newcomers_) at_most = std::min(at_most, newcomer.deadline - now);
  return at_most;
}

void Verbs::Wait(Duration at_most) {
  if (at_most <= Duration::zero() || !shared_.events.empty() || look_ || AnyReady()) return;
  Duration sleep =
      PollBeforeSleep(endpoints_.empty() ? Duration{} : shared_.options.poll_before_sleep, at_most,
                      [this] { return AnyReady(); });
  const TimePoint now = SteadyClock().Now();
  sleep = UntilDeadline(now, sleep);
  if (sleep <= Duration::zero()) return;
  for (auto& [id, endpoint] : endpoints_) endpoint->Arm();
  // What came before the channel was asked to tell of it, it does not tell.
  if (!AnyReady()) look_ = shared_.watcher.Sleep(sleep);
}

}  // namespace
}  // namespace verbs

std::optional<std::string> VerbsUnavailable(const VerbsOptions& options) {
  const auto device = verbs::Device::Open(options.device);
  if (device.ok()) return std::nullopt;
  return device.status().message();
}

Result<std::unique_ptr<Transport>> MakeVerbsTransport(const VerbsOptions& options) {
  if (options.max_message_bytes == 0 || options.max_outstanding == 0 ||
      options.max_endpoints == 0 || options.handshake_timeout <= Duration::zero() ||
      options.release_timeout <= Duration::zero() ||
      options.silence_timeout < std::chrono::milliseconds(100)) {
    return InvalidArgument(
        "making a verbs transport: every limit must be positive and silence_timeout at least 100 "
        "ms");
  }
  KV_ASSIGN_OR_RETURN(auto device, verbs::Device::Open(options.device));
  auto made = std::make_unique<verbs::Verbs>(options, std::move(device));
  if (!made->Prepare()) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "making a verbs transport: no descriptor left; raise ulimit -n");
  }
  return std::unique_ptr<Transport>(std::move(made));
}

}  // namespace kvant
