#include "transport/host_transport.h"

#include <sys/socket.h>

#include <algorithm>
#include <string>
#include <utility>

#include "transport/tcp_socket.h"

namespace kvant {
namespace {

std::string ShmAddress(in_addr host, uint16_t port) {
  return fmt::format("shm:tcp-{}:{}", tcp::ToText(host), port);
}

// Whether the address is one of this host's: only to such a one can a socket be bound.
bool IsOurs(in_addr host) {
  const tcp::Socket probe(socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr = host;
  return probe &&
         bind(probe.fd(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
}

// Memory as both transports know it.
class HostRegion final : public MemoryRegion {
 public:
  HostRegion(std::unique_ptr<MemoryRegion> tcp, std::unique_ptr<MemoryRegion> shm)
      : tcp_(std::move(tcp)), shm_(std::move(shm)) {}

  std::span<std::byte> bytes() const override { return tcp_->bytes(); }
  Result<RemoteWindow> Expose(EndpointId peer, uint64_t offset, uint64_t length,
                              Access access) override {
    return Of(peer).Expose(peer, offset, length, access);
  }
  bool Revoke(uint64_t window_id) override { return Of(window_id).Revoke(window_id); }
  bool Landing(uint64_t window_id) const override { return Of(window_id).Landing(window_id); }

 private:
  MemoryRegion& Of(uint64_t id) const { return IsShmId(id) ? *shm_ : *tcp_; }

  std::unique_ptr<MemoryRegion> tcp_;
  std::unique_ptr<MemoryRegion> shm_;
};

class HostTransport final : public Transport {
 public:
  HostTransport(std::unique_ptr<TcpTransport> tcp, std::unique_ptr<ShmTransport> shm)
      : tcp_(std::move(tcp)), shm_(std::move(shm)), capabilities_(tcp_->capabilities()) {
    const Capabilities& near = shm_->capabilities();
    const auto lower = [](auto* limit, auto other) { *limit = std::min(*limit, other); };
    lower(&capabilities_.max_message_bytes, near.max_message_bytes);
    lower(&capabilities_.max_outstanding, near.max_outstanding);
    lower(&capabilities_.max_transfer_bytes, near.max_transfer_bytes);
    shm_->WakeOn(tcp_->descriptor());
  }

  const Capabilities& capabilities() const override { return capabilities_; }

  Result<std::string> Listen(std::string_view address) override {
    KV_ASSIGN_OR_RETURN(std::string taken, tcp_->Listen(address));
    KV_ASSIGN_OR_RETURN(const tcp::HostPort parsed, tcp::ParseAddress(taken));
    KV_ASSIGN_OR_RETURN(const in_addr host, tcp::Resolve(parsed.host));
    // Who can't serve it serves tcp alone.
    static_cast<void>(shm_->Listen(ShmAddress(host, parsed.port)));
    return taken;
  }

  Result<Endpoint*> Connect(std::string_view address, Duration timeout) override {
    KV_ASSIGN_OR_RETURN(const tcp::HostPort parsed, tcp::ParseAddress(address));
    KV_ASSIGN_OR_RETURN(const in_addr host, tcp::Resolve(parsed.host));
    const std::string here = NameHere(host, parsed.port);
    return here.empty() ? tcp_->Connect(address, timeout) : shm_->Connect(here, timeout);
  }

  Endpoint* Find(EndpointId id) override { return IsShmId(id) ? shm_->Find(id) : tcp_->Find(id); }
  Result<std::span<std::byte>> MapPages(uint64_t bytes) override { return shm_->MapPages(bytes); }
  void UnmapPages(std::span<std::byte> pages) override { shm_->UnmapPages(pages); }
  Result<std::unique_ptr<MemoryRegion>> Register(std::span<std::byte> memory) override {
    KV_ASSIGN_OR_RETURN(auto of_tcp, tcp_->Register(memory));
    KV_ASSIGN_OR_RETURN(auto of_shm, shm_->Register(memory));
    return std::unique_ptr<MemoryRegion>(
        std::make_unique<HostRegion>(std::move(of_tcp), std::move(of_shm)));
  }
  void Poll(std::vector<Event>* events) override {
    const size_t before = events->size();
    shm_->Poll(events);
    tcp_->Poll(events);
    for (const Event& event : std::span(*events).subspan(before)) {
      if (event.kind != Event::Kind::kConnected) continue;
      (IsShmId(event.endpoint) ? near_ : far_) = true;
      capabilities_.name = near_ && far_ ? "tcp and shm" : near_ ? "shm" : "tcp";
    }
  }
  void Wait(Duration at_most) override { shm_->Wait(tcp_->MaySleep(at_most)); }
  LinkCounters counters() const override {
    LinkCounters sum = tcp_->counters();
    sum += shm_->counters();
    return sum;
  }

 private:
  // The shm address under which a listener of this host serves, or nothing.
  std::string NameHere(in_addr host, uint16_t port) const {
    std::string name = ShmAddress(host, port);
    if (ShmListens(name)) return name;
    // A listener on all addresses has their name.
    name = ShmAddress({INADDR_ANY}, port);
    return ShmListens(name) && IsOurs(host) ? name : "";
  }

  std::unique_ptr<TcpTransport> tcp_;
  std::unique_ptr<ShmTransport> shm_;
  Capabilities capabilities_;
  bool near_ = false;  // whether a connection went over shm
  bool far_ = false;   // and over tcp
};

}  // namespace

std::unique_ptr<Transport> MakeHostTransport(std::unique_ptr<TcpTransport> tcp,
                                             std::unique_ptr<ShmTransport> shm) {
  return std::make_unique<HostTransport>(std::move(tcp), std::move(shm));
}

}  // namespace kvant
