#include "transport/faulty.h"

#include <algorithm>
#include <deque>
#include <map>
#include <unordered_map>
#include <utility>

#include "base/random.h"

namespace kvant {
namespace {

class Faulty;

class FaultyEndpoint final : public Endpoint {
 public:
  FaultyEndpoint(Faulty* owner, Endpoint* inner)
      : owner_(owner), inner_(inner), id_(inner->id()), peer_(inner->peer()) {}
  EndpointId id() const override { return id_; }
  std::string_view peer() const override { return peer_; }
  Status Send(std::span<const std::byte> message) override;
  size_t Submit(std::span<const Transfer> transfers) override;
  void Close() override { inner_->Close(); }
  const LinkCounters& counters() const override { return inner_->counters(); }

 private:
  friend class Faulty;
  struct Pending {
    std::span<std::byte> local;
    bool read = false;
  };
  Faulty* owner_;
  Endpoint* inner_;
  EndpointId id_;
  std::string peer_;
  bool cut_ = false;
  // Accepted, not completed; by cookie, for the memory that a read's fault may change.
  std::unordered_multimap<uint64_t, Pending> pending_;
};

class FaultyRegion final : public MemoryRegion {
 public:
  FaultyRegion(Faulty* owner, std::unique_ptr<MemoryRegion> inner)
      : owner_(owner), inner_(std::move(inner)) {}
  std::span<std::byte> bytes() const override { return inner_->bytes(); }
  Result<RemoteWindow> Expose(EndpointId peer, uint64_t offset, uint64_t length,
                              Access access) override;
  bool Revoke(uint64_t window_id) override;
  bool Landing(uint64_t window_id) const override { return inner_->Landing(window_id); }

 private:
  Faulty* owner_;
  std::unique_ptr<MemoryRegion> inner_;
};

class Faulty final : public FaultyTransport {
 public:
  Faulty(std::unique_ptr<Transport> inner, const FaultOptions& options)
      : inner_(std::move(inner)), options_(options), random_(options.seed) {}

  const FaultCounts& counts() const override { return counts_; }
  void SetFaults(const FaultOptions& options) override { options_ = options; }

  const Capabilities& capabilities() const override { return inner_->capabilities(); }
  Result<std::string> Listen(std::string_view address) override { return inner_->Listen(address); }
  Result<Endpoint*> Connect(std::string_view address, Duration timeout) override {
    KV_ASSIGN_OR_RETURN(Endpoint * made, inner_->Connect(address, timeout));
    return Wrap(made);
  }
  Endpoint* Find(EndpointId id) override {
    Endpoint* inner = inner_->Find(id);
    return inner == nullptr ? nullptr : Wrap(inner);
  }
  Result<std::unique_ptr<MemoryRegion>> Register(std::span<std::byte> memory) override {
    if (registers_++ == options_.fail_register_at) {
      ++counts_.refused;
      return MakeStatus(StatusCode::kResourceExhausted,
                        "registering {} bytes: a fault was asked for", memory.size());
    }
    KV_ASSIGN_OR_RETURN(std::unique_ptr<MemoryRegion> inner, inner_->Register(memory));
    return std::unique_ptr<MemoryRegion>(new FaultyRegion(this, std::move(inner)));
  }
  Result<std::span<std::byte>> MapPages(uint64_t bytes) override { return inner_->MapPages(bytes); }
  void UnmapPages(std::span<std::byte> pages) override { inner_->UnmapPages(pages); }
  void Poll(std::vector<Event>* events) override;
  void Wait(Duration at_most) override {
    // What is delayed comes with the next Polls.
    if (delayed_.empty() && failed_.empty()) inner_->Wait(at_most);
  }
  LinkCounters counters() const override { return inner_->counters(); }

 private:
  friend class FaultyEndpoint;
  friend class FaultyRegion;
  struct Delayed {
    uint64_t due = 0;  // in Polls
    Event event;
  };
  FaultyEndpoint* Wrap(Endpoint* inner) {
    auto& wrapped = endpoints_[inner->id()];
    if (wrapped == nullptr) wrapped = std::make_unique<FaultyEndpoint>(this, inner);
    return wrapped.get();
  }
  bool Chance(double probability) { return probability > 0 && random_.Chance(probability); }
  uint64_t Later() { return polls_ + 1 + random_.Below(std::max(1U, options_.max_delay_polls)); }
  void Change(std::span<std::byte> bytes) {
    if (bytes.empty()) return;
    bytes[random_.Below(bytes.size())] ^= static_cast<std::byte>(1 + random_.Below(255));
    ++counts_.corrupted;
  }
  void OnEvent(Event event, std::vector<Event>* events);
  void OnMessage(Event event, std::vector<Event>* events);
  void OnWritten(Event event, std::vector<Event>* events);
  void OnDone(Event event, std::vector<Event>* events);
  void OnClosed(Event event, std::vector<Event>* events);
  // Whether the endpoint breaks instead of delivering this.
  bool Cut(EndpointId id);

  std::unique_ptr<Transport> inner_;
  FaultOptions options_;
  Random random_;
  FaultCounts counts_;
  uint64_t polls_ = 0;
  uint64_t submits_ = 0;
  uint64_t registers_ = 0;
  uint64_t exposes_ = 0;
  std::map<EndpointId, std::unique_ptr<FaultyEndpoint>> endpoints_;
  std::vector<std::unique_ptr<FaultyEndpoint>> dead_;
  std::map<uint64_t, std::span<std::byte>> windows_;
  std::vector<Delayed> delayed_;  // in the order of arrival
  std::vector<Event> failed_;     // kTransferDone of transfers that were never passed on
  std::vector<Event> arrived_;
};

Status FaultyEndpoint::Send(std::span<const std::byte> message) {
  if (owner_->Chance(owner_->options_.refuse_send)) {
    ++owner_->counts_.refused;
    return MakeStatus(StatusCode::kResourceExhausted, "sending to {}: a fault was asked for",
                      peer_);
  }
  return inner_->Send(message);
}

size_t FaultyEndpoint::Submit(std::span<const Transfer> transfers) {
  const bool nth = owner_->submits_++ == owner_->options_.fail_submit_at;
  if (nth || owner_->Chance(owner_->options_.refuse_submit)) {
    ++owner_->counts_.refused;
    return 0;
  }
  size_t accepted = 0;
  for (const Transfer& transfer : transfers) {
    // A closed endpoint accepts nothing, a failing transfer included.
    if (cut_ || owner_->inner_->Find(id_) == nullptr) break;
    if (owner_->Chance(owner_->options_.fail_transfer)) {
      ++owner_->counts_.failed_transfers;
      owner_->failed_.push_back(
          {.kind = Event::Kind::kTransferDone,
           .endpoint = id_,
           .cookie = transfer.cookie,
           .status = Unavailable("transferring to {}: a fault was asked for", peer_)});
      ++accepted;
      continue;
    }
    const auto pending = pending_.emplace(
        transfer.cookie, Pending{transfer.local, transfer.op == Transfer::Op::kRead});
    if (inner_->Submit(std::span(&transfer, 1)) == 0) {
      pending_.erase(pending);
      break;
    }
    ++accepted;
  }
  return accepted;
}

Result<RemoteWindow> FaultyRegion::Expose(EndpointId peer, uint64_t offset, uint64_t length,
                                          Access access) {
  if (owner_->exposes_++ == owner_->options_.fail_expose_at) {
    ++owner_->counts_.refused;
    return MakeStatus(StatusCode::kResourceExhausted,
                      "exposing {} bytes to endpoint {}: a fault was asked for", length, peer);
  }
  KV_ASSIGN_OR_RETURN(const RemoteWindow window, inner_->Expose(peer, offset, length, access));
  owner_->windows_[window.id] = inner_->bytes().subspan(offset, length);
  return window;
}

bool FaultyRegion::Revoke(uint64_t window_id) {
  owner_->windows_.erase(window_id);
  return inner_->Revoke(window_id);
}

void Faulty::Poll(std::vector<Event>* events) {
  dead_.clear();
  ++polls_;
  // Those that were delayed before come first, then what is new.
  for (size_t i = 0; i < delayed_.size();) {
    if (delayed_[i].due > polls_) {
      ++i;
      continue;
    }
    events->push_back(std::move(delayed_[i].event));
    delayed_.erase(delayed_.begin() + static_cast<ptrdiff_t>(i));
  }
  for (Event& event : failed_) events->push_back(std::move(event));
  failed_.clear();
  arrived_.clear();
  inner_->Poll(&arrived_);
  for (Event& event : arrived_) OnEvent(std::move(event), events);
}

void Faulty::OnEvent(Event event, std::vector<Event>* events) {
  switch (event.kind) {
    case Event::Kind::kConnected:
      if (Endpoint* inner = inner_->Find(event.endpoint)) Wrap(inner);
      events->push_back(std::move(event));
      return;
    case Event::Kind::kMessage:
      OnMessage(std::move(event), events);
      return;
    case Event::Kind::kWritten:
      OnWritten(std::move(event), events);
      return;
    case Event::Kind::kTransferDone:
      OnDone(std::move(event), events);
      return;
    case Event::Kind::kClosed:
      OnClosed(std::move(event), events);
      return;
  }
}

bool Faulty::Cut(EndpointId id) {
  const auto found = endpoints_.find(id);
  if (found == endpoints_.end()) return false;
  FaultyEndpoint& endpoint = *found->second;
  if (endpoint.cut_) return true;
  if (!Chance(options_.cut)) return false;
  endpoint.cut_ = true;
  ++counts_.cut;
  // A pointer to an endpoint that closed in this Poll is valid until the next.
  endpoint.inner_->Close();
  return true;
}

void Faulty::OnMessage(Event event, std::vector<Event>* events) {
  if (Cut(event.endpoint)) return;
  if (Chance(options_.drop_message)) {
    ++counts_.dropped;
    return;
  }
  if (Chance(options_.corrupt_message)) Change(event.message);
  if (Chance(options_.duplicate_message)) {
    ++counts_.duplicated;
    delayed_.push_back({Later(), event});
  }
  if (Chance(options_.delay_message)) {
    ++counts_.delayed;
    delayed_.push_back({Later(), std::move(event)});
    return;
  }
  events->push_back(std::move(event));
}

void Faulty::OnWritten(Event event, std::vector<Event>* events) {
  if (Cut(event.endpoint)) return;
  const auto window = windows_.find(event.window);
  if (window != windows_.end() && Chance(options_.corrupt_payload)) Change(window->second);
  if (Chance(options_.drop_written)) {
    ++counts_.dropped;
    return;
  }
  if (Chance(options_.delay_written)) {
    ++counts_.delayed;
    delayed_.push_back({Later(), std::move(event)});
    return;
  }
  events->push_back(std::move(event));
}

void Faulty::OnDone(Event event, std::vector<Event>* events) {
  const auto endpoint = endpoints_.find(event.endpoint);
  if (endpoint != endpoints_.end()) {
    const auto pending = endpoint->second->pending_.find(event.cookie);
    if (pending != endpoint->second->pending_.end()) {
      if (event.status.ok() && pending->second.read && Chance(options_.corrupt_payload)) {
        Change(pending->second.local);
      }
      endpoint->second->pending_.erase(pending);
    }
    if (endpoint->second->cut_ && !event.status.ok()) {
      event.status =
          Unavailable("transferring to {}: the connection was cut", endpoint->second->peer());
    }
  }
  events->push_back(std::move(event));
}

void Faulty::OnClosed(Event event, std::vector<Event>* events) {
  std::erase_if(delayed_, [&](const Delayed& d) { return d.event.endpoint == event.endpoint; });
  const auto mine = std::stable_partition(failed_.begin(), failed_.end(), [&](const Event& failed) {
    return failed.endpoint != event.endpoint;
  });
  std::move(mine, failed_.end(), std::back_inserter(*events));
  failed_.erase(mine, failed_.end());
  const auto endpoint = endpoints_.find(event.endpoint);
  if (endpoint != endpoints_.end()) {
    if (endpoint->second->cut_) {
      event.status = Unavailable("{}: the connection was cut", endpoint->second->peer());
    }
    dead_.push_back(std::move(endpoint->second));
    endpoints_.erase(endpoint);
  }
  events->push_back(std::move(event));
}

}  // namespace

std::unique_ptr<FaultyTransport> MakeFaultyTransport(std::unique_ptr<Transport> inner,
                                                     const FaultOptions& options) {
  return std::make_unique<Faulty>(std::move(inner), options);
}

}  // namespace kvant
