#include "transport/loopback.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

#include "transport/ring.h"
#include "transport/window_table.h"

namespace kvant {
namespace {

constexpr std::string_view kScheme = "loopback:";
constexpr size_t kMaxMessageBytes = size_t{1} << 20;
constexpr size_t kMaxOutstanding = 1024;
// Messages that wait for the receiver's Poll, over all its endpoints.
constexpr size_t kMaxInbox = 4096;

constexpr Capabilities kCapabilities = {.name = "loopback",
                                        .max_message_bytes = kMaxMessageBytes,
                                        .max_outstanding = kMaxOutstanding,
                                        .max_transfer_bytes = kMaxTransferBytes,
                                        .crosses_processes = false,
                                        .detects_peer_death = true};

}  // namespace

class LoopbackTransport;

// One side of a pair. Owned by its transport; `other_` is cleared when the other side goes.
class LoopbackEndpoint final : public Endpoint {
 public:
  LoopbackEndpoint(LoopbackTransport* transport, EndpointId id, std::string peer)
      : transport_(transport), id_(id), peer_(std::move(peer)) {}

  EndpointId id() const override { return id_; }
  std::string_view peer() const override { return peer_; }
  Status Send(std::span<const std::byte> message) override;
  size_t Submit(std::span<const Transfer> transfers) override;
  void Close() override { End(OkStatus(), StatusCode::kCancelled); }
  const LinkCounters& counters() const override { return counters_; }

  // Carries out what was submitted.
  void Progress();
  // Completes everything, reports kClosed with `why` here and on the other side. No-op when closed.
  void End(const Status& why, StatusCode transfers_end_with);

 private:
  friend class LoopbackTransport;
  Status Execute(const Transfer& transfer);
  void Complete(uint64_t cookie, Status status);
  void EndHere(const Status& why, StatusCode transfers_end_with);

  LoopbackTransport* transport_;
  EndpointId id_;
  std::string peer_;
  LoopbackEndpoint* other_ = nullptr;  // nullptr: closed
  bool closed_ = false;
  Ring<Transfer> queue_;
  size_t done_unpolled_ = 0;  // completed, but not yet reported: they still count as in flight
  LinkCounters counters_;
};

class LoopbackHubState {
 public:
  std::map<std::string, LoopbackTransport*, std::less<>> listeners;
  uint64_t transports_made = 0;  // seeds the window keys
};

class LoopbackTransport final : public Transport {
 public:
  explicit LoopbackTransport(std::shared_ptr<LoopbackHubState> hub)
      : hub_(std::move(hub)), windows_(std::make_shared<WindowTable>(hub_->transports_made++)) {}
  LoopbackTransport(const LoopbackTransport&) = delete;
  LoopbackTransport& operator=(const LoopbackTransport&) = delete;
  ~LoopbackTransport() override {
    for (auto& [id, endpoint] : endpoints_) {
      endpoint->End(Unavailable("{}: its transport is gone", endpoint->peer()),
                    StatusCode::kUnavailable);
    }
    std::erase_if(hub_->listeners, [this](const auto& entry) { return entry.second == this; });
  }

  const Capabilities& capabilities() const override { return kCapabilities; }

  Result<std::string> Listen(std::string_view address) override {
    if (!address.starts_with(kScheme) || address.size() == kScheme.size()) {
      return InvalidArgument("listening on '{}': give loopback:NAME", address);
    }
    if (!hub_->listeners.emplace(address, this).second) {
      return Unavailable("listening on '{}': the name is in use; choose another", address);
    }
    return std::string(address);
  }

  Result<Endpoint*> Connect(std::string_view address, Duration) override {
    if (!address.starts_with(kScheme)) {
      return InvalidArgument("connecting to '{}': give loopback:NAME", address);
    }
    LoopbackEndpoint* ours = NewEndpoint(std::string(address));
    const auto listener = hub_->listeners.find(address);
    if (listener == hub_->listeners.end()) {
      ours->End(Unavailable("connecting to '{}': nobody listens there", address),
                StatusCode::kUnavailable);
      return ours;
    }
    LoopbackTransport* there = listener->second;
    LoopbackEndpoint* theirs = there->NewEndpoint(fmt::format("{}(peer)", address));
    ours->other_ = theirs;
    theirs->other_ = ours;
    Report({.kind = Event::Kind::kConnected, .endpoint = ours->id()});
    there->Report({.kind = Event::Kind::kConnected, .endpoint = theirs->id()});
    return ours;
  }

  Endpoint* Find(EndpointId id) override {
    const auto found = endpoints_.find(id);
    return found == endpoints_.end() ? nullptr : found->second.get();
  }

  Result<std::unique_ptr<MemoryRegion>> Register(std::span<std::byte> memory) override {
    return MakeTableRegion(windows_, memory);
  }

  void Poll(std::vector<Event>* events) override {
    dead_.clear();
    for (auto& [id, endpoint] : endpoints_) endpoint->Progress();
    for (Event& event : inbox_) {
      if (event.kind == Event::Kind::kClosed) {
        Bury(event.endpoint);
      } else if (event.kind == Event::Kind::kTransferDone) {
        if (auto found = endpoints_.find(event.endpoint); found != endpoints_.end()) {
          --found->second->done_unpolled_;
        }
      }
      events->push_back(std::move(event));
    }
    inbox_.clear();
    messages_waiting_ = 0;
  }

  // Everything happens in Poll, so there is nothing to wait for.
  void Wait(Duration) override {}

  LinkCounters counters() const override {
    LinkCounters sum = closed_counters_;
    for (const auto& [id, endpoint] : endpoints_) sum += endpoint->counters();
    return sum;
  }

  void Report(Event event) {
    if (event.kind == Event::Kind::kMessage) ++messages_waiting_;
    inbox_.push_back(std::move(event));
  }
  bool InboxFull() const { return messages_waiting_ >= kMaxInbox; }
  WindowTable& windows() { return *windows_; }

 private:
  LoopbackEndpoint* NewEndpoint(std::string peer) {
    const EndpointId id = next_id_++;
    auto endpoint = std::make_unique<LoopbackEndpoint>(this, id, std::move(peer));
    return endpoints_.emplace(id, std::move(endpoint)).first->second.get();
  }
  // Pointers to a closed endpoint stay valid until the next Poll.
  void Bury(EndpointId id) {
    const auto found = endpoints_.find(id);
    closed_counters_ += found->second->counters();
    windows_->RevokePeer(id);
    dead_.push_back(std::move(found->second));
    endpoints_.erase(found);
  }

  std::shared_ptr<LoopbackHubState> hub_;
  std::shared_ptr<WindowTable> windows_;
  std::map<EndpointId, std::unique_ptr<LoopbackEndpoint>> endpoints_;
  std::vector<std::unique_ptr<LoopbackEndpoint>> dead_;
  std::vector<Event> inbox_;
  size_t messages_waiting_ = 0;
  EndpointId next_id_ = 1;
  LinkCounters closed_counters_;
};

Status LoopbackEndpoint::Send(std::span<const std::byte> message) {
  if (message.size() > kMaxMessageBytes) {
    return InvalidArgument("sending {} bytes to {}: at most {} fit a message", message.size(),
                           peer_, kMaxMessageBytes);
  }
  if (other_ == nullptr) return Unavailable("sending to {}: the endpoint is closed", peer_);
  if (other_->transport_->InboxFull()) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "sending to {}: it has {} messages waiting; poll, then try again", peer_,
                      kMaxInbox);
  }
  counters_.control_bytes_sent += message.size();
  ++counters_.messages_sent;
  other_->counters_.control_bytes_received += message.size();
  other_->transport_->Report({.kind = Event::Kind::kMessage,
                              .endpoint = other_->id_,
                              .message = {message.begin(), message.end()}});
  return OkStatus();
}

size_t LoopbackEndpoint::Submit(std::span<const Transfer> transfers) {
  if (other_ == nullptr) return 0;
  const size_t room = kMaxOutstanding - std::min(kMaxOutstanding, queue_.size() + done_unpolled_);
  const size_t accepted = std::min(room, transfers.size());
  for (const Transfer& transfer : transfers.first(accepted)) queue_.push_back(transfer);
  counters_.transfers_submitted += accepted;
  return accepted;
}

void LoopbackEndpoint::Complete(uint64_t cookie, Status status) {
  ++done_unpolled_;
  transport_->Report({.kind = Event::Kind::kTransferDone,
                      .endpoint = id_,
                      .cookie = cookie,
                      .status = std::move(status)});
}

Status LoopbackEndpoint::Execute(const Transfer& transfer) {
  KV_RETURN_IF_ERROR(transport_->windows().Check(transfer, kMaxTransferBytes));
  const bool write = transfer.op == Transfer::Op::kWrite;
  const uint64_t bytes = transfer.local.size();
  const auto window =
      other_->transport_->windows().Find(other_->id_, transfer.remote, transfer.remote_offset,
                                         bytes, write ? Access::kRemoteWrite : Access::kRemoteRead);
  LinkCounters& from = write ? counters_ : other_->counters_;
  LinkCounters& to = write ? other_->counters_ : counters_;
  if (!window && !write) {
    return MakeStatus(StatusCode::kPermissionDenied,
                      "reading {} bytes from {}: the window is not exposed to us", bytes, peer_);
  }
  from.payload_bytes_sent += bytes;
  to.payload_bytes_received += bytes;
  if (!window) return OkStatus();  // a write is discarded without a word
  if (bytes > 0) {
    if (write) {
      std::memcpy(window->data(), transfer.local.data(), bytes);
    } else {
      std::memcpy(transfer.local.data(), window->data(), bytes);
    }
  }
  if (write && transfer.immediate) {
    other_->transport_->Report({.kind = Event::Kind::kWritten,
                                .endpoint = other_->id_,
                                .window = transfer.remote.id,
                                .immediate = *transfer.immediate});
  }
  return OkStatus();
}

void LoopbackEndpoint::Progress() {
  while (!queue_.empty()) {
    const Transfer transfer = queue_.front();
    queue_.pop_front();
    Complete(transfer.cookie, Execute(transfer));
  }
}

void LoopbackEndpoint::EndHere(const Status& why, StatusCode transfers_end_with) {
  if (std::exchange(closed_, true)) return;
  other_ = nullptr;
  for (; !queue_.empty(); queue_.pop_front()) {
    Complete(queue_.front().cookie,
             Status(transfers_end_with,
                    fmt::format("transferring to {}: the endpoint closed first", peer_)));
  }
  transport_->Report({.kind = Event::Kind::kClosed, .endpoint = id_, .status = why});
}

void LoopbackEndpoint::End(const Status& why, StatusCode transfers_end_with) {
  LoopbackEndpoint* other = other_;
  EndHere(why, transfers_end_with);
  if (other != nullptr) other->EndHere(why, StatusCode::kUnavailable);
}

std::unique_ptr<Transport> LoopbackHub::MakeTransport() {
  return std::make_unique<LoopbackTransport>(state_);
}

LoopbackHub::LoopbackHub() : state_(std::make_shared<LoopbackHubState>()) {}

}  // namespace kvant
