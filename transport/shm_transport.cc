// The shm transport: listens, greets peers, and gives every endpoint its turn.
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>

#include "base/bytes.h"
#include "transport/endpoint_table.h"
#include "transport/shm.h"
#include "transport/shm_endpoint.h"
#include "transport/watcher.h"

namespace kvant {
namespace shm {
namespace {

constexpr int kBacklog = 256;
constexpr int kEventsAtOnce = 64;
constexpr size_t kMaxNewcomers = 64;
// Descriptors are looked at in one of so many calls of Poll, and in the next one after a sleep.
constexpr uint32_t kPollsBetween = 16;
// What epoll says of those that are no endpoint.
constexpr uint64_t kBell = 0;
constexpr uint64_t kListener = 1;
constexpr uint64_t kNewcomer = 2;
constexpr uint64_t kOther = 3;  // what WakeOn said

class ShmRegion final : public MemoryRegion {
 public:
  ShmRegion(ShmShared* shared, std::span<std::byte> memory) : shared_(shared), memory_(memory) {
    shared_->memory.AddMemory(memory_);
  }
  ~ShmRegion() override {
    std::vector<uint64_t> inside;
    for (const auto& [id, window] : shared_->exposed) {
      if (window.begin >= memory_.data() && window.begin <= memory_.data() + memory_.size())
        inside.push_back(id);
    }
    for (const uint64_t id : inside) shared_->Revoke(id);
    shared_->memory.RemoveMemory(memory_);
  }
  ShmRegion(const ShmRegion&) = delete;
  ShmRegion& operator=(const ShmRegion&) = delete;

  std::span<std::byte> bytes() const override { return memory_; }
  Result<RemoteWindow> Expose(EndpointId peer, uint64_t offset, uint64_t length,
                              Access access) override;
  bool Revoke(uint64_t window_id) override { return shared_->Revoke(window_id); }
  bool Landing(uint64_t window_id) const override {
    const auto found = shared_->exposed.find(window_id);
    return found != shared_->exposed.end() && found->second.revoked && !shared_->Revoke(window_id);
  }

 private:
  ShmShared* shared_;
  std::span<std::byte> memory_;
};

Result<RemoteWindow> ShmRegion::Expose(EndpointId peer, uint64_t offset, uint64_t length,
                                       Access access) {
  if (!RangeFits(offset, length, memory_.size())) {
    return InvalidArgument("exposing [{}, +{}) of a region of {} bytes to endpoint {}: outside it",
                           offset, length, memory_.size(), peer);
  }
  const auto pages =
      std::find_if(shared_->pages.begin(), shared_->pages.end(), [&](const Pages& candidate) {
        const std::span<std::byte> whole = candidate.memory.bytes();
        return memory_.data() >= whole.data() &&
               memory_.data() + memory_.size() <= whole.data() + whole.size();
      });
  if (pages == shared_->pages.end()) {
    return InvalidArgument(
        "exposing memory to endpoint {}: no process can map it; take it from the transport's "
        "arena",
        peer);
  }
  ShmEndpoint* endpoint = shared_->find(peer);
  // To a peer that has gone meanwhile nothing is exposed; that it has is told by kClosed.
  if (endpoint == nullptr) return RemoteWindow{kShmBit, 0, length};
  const auto before = static_cast<uint64_t>(memory_.data() - pages->memory.bytes().data());
  return endpoint->Expose(*pages, before + offset, length, access);
}

class Shm final : public ShmTransport {
 public:
  explicit Shm(const ShmOptions& options)
      : shared_(options),
        capabilities_{.name = "shm",
                      .max_message_bytes = options.max_message_bytes,
                      .max_outstanding = options.max_outstanding,
                      .max_transfer_bytes = kMaxTransferBytes,
                      .crosses_processes = true,
                      .detects_peer_death = true} {
    if (!Usable()) return;
    shared_.watcher.Watch(shared_.bell.fd(), kBell);
    shared_.find = [this](EndpointId id) { return FindOpen(id); };
  }
  Shm(const Shm&) = delete;
  Shm& operator=(const Shm&) = delete;
  ~Shm() override {
    for (auto& [id, endpoint] : endpoints_) endpoint->Leave();
  }

  bool Usable() const { return shared_.watcher && shared_.bell; }
  void WakeOn(int fd) override {
    shared_.watcher.Watch(fd, kOther);
    woken_by_other_ = true;
  }
  const Capabilities& capabilities() const override { return capabilities_; }
  Result<std::string> Listen(std::string_view address) override;
  Result<Endpoint*> Connect(std::string_view address, Duration timeout) override;
  Endpoint* Find(EndpointId id) override { return FindOpen(id); }
  Result<std::span<std::byte>> MapPages(uint64_t bytes) override {
    KV_ASSIGN_OR_RETURN(SharedMemory made, SharedMemory::Create(bytes));
    const std::span<std::byte> mapped = made.bytes();
    shared_.pages.push_back({shared_.next_pages++, std::move(made)});
    return mapped;
  }
  void UnmapPages(std::span<std::byte> pages) override;
  Result<std::unique_ptr<MemoryRegion>> Register(std::span<std::byte> memory) override {
    return std::unique_ptr<MemoryRegion>(std::make_unique<ShmRegion>(&shared_, memory));
  }
  void Poll(std::vector<Event>* events) override;
  void Wait(Duration at_most) override;
  LinkCounters counters() const override { return endpoints_.counters(); }

 private:
  // Somebody who has connected but not said hello.
  struct Newcomer {
    tcp::Socket socket;
    TimePoint deadline;
  };

  ShmEndpoint* FindOpen(EndpointId id) {
    ShmEndpoint* found = endpoints_.Get(id);
    return found == nullptr || found->closed() ? nullptr : found;
  }
  void LookAtDescriptors();
  void Accept();
  // Whether the newcomer is done with: an endpoint now, or turned away.
  bool Greet(Newcomer* newcomer);
  void CheckTimers();
  bool AnyReady() {
    return std::any_of(endpoints_.begin(), endpoints_.end(),
                       [](const auto& entry) { return entry.second->ReadyNow(); });
  }
  void SetSleeping(bool sleeping) {
    for (auto& [id, endpoint] : endpoints_) endpoint->SetSleeping(sleeping);
  }

  ShmShared shared_;
  Capabilities capabilities_;
  std::string name_;
  tcp::Socket listener_;
  std::vector<Newcomer> newcomers_;  // oldest first
  EndpointId next_id_ = kShmBit | 1;
  EndpointTable<ShmEndpoint> endpoints_;
  uint32_t polls_ = 0;
  bool woken_by_other_ = false;
  bool look_ = true;  // at descriptors, in the next Poll
};

Result<std::string> Shm::Listen(std::string_view address) {
  KV_ASSIGN_OR_RETURN(const std::string_view name, ParseName(address));
  if (listener_) {
    return InvalidArgument("listening on {}: this transport listens already; make another",
                           address);
  }
  KV_ASSIGN_OR_RETURN(listener_, shm::Listen(name, kBacklog));
  name_ = name;
  shared_.watcher.Watch(listener_.fd(), kListener);
  return std::string(address);
}

Result<Endpoint*> Shm::Connect(std::string_view address, Duration timeout) {
  KV_ASSIGN_OR_RETURN(const std::string_view name, ParseName(address));
  KV_ASSIGN_OR_RETURN(SharedMemory memory, SharedMemory::Create(Channel::MemoryBytes()));
  auto channel = std::make_unique<Channel>(std::move(memory), 0);
  tcp::Socket socket;
  Status refused;
  if (auto connected = shm::Connect(name); !connected.ok()) {
    refused = connected.status();
  } else if (!Trusted(*connected)) {
    refused = Unavailable("connecting to {}: its process belongs to another user", address);
  } else if (!SendPacket(*connected, {.type = PacketType::kHello, .first = Channel::MemoryBytes()},
                         {}, {channel->fd(), shared_.bell.fd()})) {
    refused = Unavailable("connecting to {}: it takes no hello", address);
  } else {
    socket = *std::move(connected);
  }
  const EndpointId id = next_id_++;
  auto endpoint =
      std::make_unique<ShmEndpoint>(&shared_, id, std::string(address), std::move(socket),
                                    std::move(channel), SteadyClock().Now() + timeout);
  if (!refused.ok()) endpoint->Fail(refused);
  look_ = true;
  return endpoints_.Add(std::move(endpoint));
}

void Shm::UnmapPages(std::span<std::byte> pages) {
  const auto found = std::find_if(
      shared_.pages.begin(), shared_.pages.end(),
      [&](const Pages& candidate) { return candidate.memory.bytes().data() == pages.data(); });
  if (found == shared_.pages.end()) return;
  for (auto& [id, endpoint] : endpoints_) endpoint->Forget(found->number);
  shared_.pages.erase(found);
}

void Shm::Accept() {
  while (true) {
    tcp::Socket accepted(accept4(listener_.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!accepted) return;
    const auto refuse = [&](std::string_view why) {
      SendPacket(accepted, {.type = PacketType::kRefused}, why, {});
    };
    if (!Trusted(accepted)) {
      refuse("it belongs to another user");
      continue;
    }
    if (endpoints_.size() >= shared_.options.max_endpoints) {
      refuse(fmt::format("all {} places are taken", shared_.options.max_endpoints));
      continue;
    }
    if (newcomers_.size() >= kMaxNewcomers) newcomers_.erase(newcomers_.begin());
    shared_.watcher.Watch(accepted.fd(), kNewcomer);
    newcomers_.push_back(
        {std::move(accepted), SteadyClock().Now() + shared_.options.handshake_timeout});
  }
}

bool Shm::Greet(Newcomer* newcomer) {
  Packet packet;
  switch (ReceivePacket(newcomer->socket, &packet)) {
    case Received::kNothing:
      return false;
    case Received::kEnd:
    case Received::kMalformed:
      return true;
    case Received::kPacket:
      break;
  }
  const PacketHeader& hello = packet.header;
  const auto refuse = [&](std::string_view why) {
    SendPacket(newcomer->socket, {.type = PacketType::kRefused}, why, {});
    return true;
  };
  if (hello.version != kVersion || hello.type != PacketType::kHello || packet.files.size() != 2 ||
      hello.first != Channel::MemoryBytes()) {
    return refuse("its protocol is another; install the same release");
  }
  auto memory = SharedMemory::Map(std::move(packet.files[0]), hello.first);
  if (!memory.ok()) return refuse(memory.status().message());
  if (!SendPacket(newcomer->socket, {.type = PacketType::kWelcome}, {}, {shared_.bell.fd()}))
    return true;
  const EndpointId id = next_id_++;
  shared_.watcher.Unwatch(newcomer->socket.fd());
  endpoints_.Add(std::make_unique<ShmEndpoint>(
      &shared_, id, fmt::format("shm:{}(peer)", name_), std::move(newcomer->socket),
      std::make_unique<Channel>(*std::move(memory), 1), std::move(packet.files[1])));
  return true;
}

void Shm::LookAtDescriptors() {
  std::array<epoll_event, kEventsAtOnce> room;
  const std::span<epoll_event> ready = shared_.watcher.Look(room);
  bool greet = false;
  for (const epoll_event& event : ready) {
    const uint64_t data = event.data.u64;
    if (data == kBell) {
      uint64_t rung = 0;
      static_cast<void>(read(shared_.bell.fd(), &rung, sizeof(rung)) == sizeof(rung));
    } else if (data == kListener) {
      Accept();
      greet = true;
    } else if (data == kNewcomer) {
      greet = true;
    } else if (data != kOther) {
      if (ShmEndpoint* endpoint = FindOpen(data)) endpoint->OnSocket();
    }
  }
  if (greet) std::erase_if(newcomers_, [this](Newcomer& newcomer) { return Greet(&newcomer); });
  look_ = ready.size() == kEventsAtOnce;
}

void Shm::CheckTimers() {
  if (newcomers_.empty() && !endpoints_.HasTimer()) return;
  const TimePoint now = SteadyClock().Now();
  endpoints_.OnTimers(now);
  std::erase_if(newcomers_, [now](const Newcomer& n) { return now >= n.deadline; });
}

void Shm::Poll(std::vector<Event>* events) {
  endpoints_.Bury();
  if (look_ || ++polls_ % kPollsBetween == 0) LookAtDescriptors();
  for (auto& [id, endpoint] : endpoints_) endpoint->Progress();
  CheckTimers();
  // What an endpoint exposed it took back when it ended.
  endpoints_.HandOver(&shared_.events, events, [](EndpointId) {});
}

void Shm::Wait(Duration at_most) {
  if (at_most <= Duration::zero() || !shared_.events.empty() || look_ || AnyReady()) return;
  const bool alone = endpoints_.empty() && !woken_by_other_;
  const Duration polling = alone ? Duration{} : shared_.options.poll_before_sleep;
  Duration sleep = PollBeforeSleep(polling, at_most, [this] {
    look_ = woken_by_other_ && shared_.watcher.Sleep({});
    return look_ || AnyReady();
  });
  if (sleep <= Duration::zero()) return;
  const TimePoint now = SteadyClock().Now();
  sleep = endpoints_.UntilTimer(now, sleep);
  for (const Newcomer& newcomer : newcomers_) sleep = std::min(sleep, newcomer.deadline - now);
  SetSleeping(true);
  if (sleep > Duration::zero() && !AnyReady()) {
    look_ = shared_.watcher.Sleep(sleep);
  }
  SetSleeping(false);
}

}  // namespace
}  // namespace shm

bool ShmListens(std::string_view address) {
  const auto name = shm::ParseName(address);
  if (!name.ok()) return false;
  const auto probe = shm::Connect(*name);
  return probe.ok() && shm::Trusted(*probe);
}

Result<std::unique_ptr<ShmTransport>> MakeShmTransport(const ShmOptions& options) {
  if (options.max_message_bytes == 0 || options.max_outstanding == 0 ||
      options.max_endpoints == 0 || options.handshake_timeout <= Duration::zero()) {
    return InvalidArgument("making a shm transport: every limit must be positive");
  }
  auto made = std::make_unique<shm::Shm>(options);
  if (!made->Usable()) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "making a shm transport: no descriptor left; raise ulimit -n");
  }
  return std::unique_ptr<ShmTransport>(std::move(made));
}

}  // namespace kvant
