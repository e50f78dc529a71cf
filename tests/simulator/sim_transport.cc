#include "tests/simulator/sim_transport.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/bytes.h"

namespace kvant::sim {

class SimRegion final : public MemoryRegion {
 public:
  SimRegion(SimTransport* transport, std::span<std::byte> memory)
      : transport_(transport), memory_(memory) {
    transport_->regions_.push_back(this);
  }
  ~SimRegion() override {
    std::erase(transport_->regions_, this);
    std::erase_if(transport_->windows_,
                  [this](const auto& entry) { return entry.second.region == this; });
  }
  std::span<std::byte> bytes() const override { return memory_; }

  Result<RemoteWindow> Expose(EndpointId peer, uint64_t offset, uint64_t length,
                              Access access) override {
    if (!RangeFits(offset, length, memory_.size())) {
      return InvalidArgument("exposing {} + {} of {} bytes: outside the region", offset, length,
                             memory_.size());
    }
    SimNetwork& network = *transport_->network_;
    if (network.Roll(network.faults_.refuse_expose)) {
      ++network.tally_.refusals;
      return MakeStatus(StatusCode::kResourceExhausted, "exposing memory: refused by the seed");
    }
    const uint64_t id = network.next_id_++;
    const uint64_t key = network.random_.Next();
    transport_->windows_[id] = {this, peer, key, offset, length, access};
    return RemoteWindow{id, key, length};
  }
  bool Revoke(uint64_t window_id) override {
    const auto found = transport_->windows_.find(window_id);
    if (found == transport_->windows_.end()) return true;
    found->second.revoked = true;
    if (found->second.landing > 0) return false;
    transport_->windows_.erase(found);
    return true;
  }
  bool Landing(uint64_t window_id) const override {
    const auto found = transport_->windows_.find(window_id);
    return found != transport_->windows_.end() && found->second.landing > 0;
  }

 private:
  SimTransport* transport_;
  std::span<std::byte> memory_;
};

// Owned by its transport until the Poll after kClosed.
class SimEndpoint final : public Endpoint {
 public:
  SimEndpoint(SimTransport* transport, std::shared_ptr<Connection> connection, int which,
              std::string peer)
      : transport_(transport),
        network_(transport->network_),
        connection_(std::move(connection)),
        which_(which),
        peer_(std::move(peer)) {}

  EndpointId id() const override { return side().endpoint; }
  std::string_view peer() const override { return peer_; }
  const LinkCounters& counters() const override { return counters_; }

  Status Send(std::span<const std::byte> message) override {
    if (!side().open) return Unavailable("sending to {}: the connection is closed", peer_);
    if (message.size() > network_->shape_.max_message_bytes) {
      return InvalidArgument("sending {} bytes to {}: longer than a message may be", message.size(),
                             peer_);
    }
    if (far().queued >= kMaxQueued || network_->Roll(network_->faults_.refuse_send)) {
      ++network_->tally_.refusals;
      return MakeStatus(StatusCode::kResourceExhausted, "sending to {}: its queue is full", peer_);
    }
    Count(&LinkCounters::control_bytes_sent, message.size());
    Count(&LinkCounters::messages_sent, 1);
    network_->CarryMessage(connection_, which_, {message.begin(), message.end()});
    return OkStatus();
  }

  size_t Submit(std::span<const Transfer> transfers) override {
    size_t accepted = 0;
    for (const Transfer& transfer : transfers) {
      if (!side().open || outstanding_.size() >= network_->shape_.max_outstanding) break;
      if (network_->Roll(network_->faults_.refuse_submit)) {
        ++network_->tally_.refusals;
        break;
      }
      Start(transfer);
      ++accepted;
    }
    Count(&LinkCounters::transfers_submitted, accepted);
    return accepted;
  }

  void Close() override {
    if (!side().open) return;
    network_->CloseSide(connection_.get(), which_,
                        {StatusCode::kCancelled, "the endpoint was closed here"}, OkStatus());
    const TimePoint at = std::max(far().message_before, network_->now() + network_->Latency());
    network_->At(at, [network = network_, connection = connection_, which = which_] {
      network->CloseSide(connection.get(), 1 - which, Unavailable("the peer closed the connection"),
                         OkStatus());
    });
  }

  // Completes whatever is under way.
  void CompleteAll(const Status& status) {
    while (!outstanding_.empty()) Complete(outstanding_.begin()->first, status);
  }
  void Count(uint64_t LinkCounters::*counter, uint64_t by) {
    counters_.*counter += by;
    transport_->total_.*counter += by;
  }

 private:
  static constexpr size_t kMaxQueued = 4096;

  // What a planned step needs to find this endpoint again, which may be gone by then.
  struct Handle {
    SimNetwork* network;
    std::shared_ptr<Connection> connection;
    int which;
    uint64_t transfer;
    const Side& side() const { return connection->side[which]; }
    const Side& far() const { return connection->side[1 - which]; }
    SimEndpoint* endpoint() const {
      return side().open ? static_cast<SimEndpoint*>(side().transport->Find(side().endpoint))
                         : nullptr;
    }
    // The transfer, unless it is complete already.
    const Transfer* Find() const {
      SimEndpoint* here = endpoint();
      if (here == nullptr) return nullptr;
      const auto found = here->outstanding_.find(transfer);
      return found == here->outstanding_.end() ? nullptr : &found->second;
    }
  };

  const Side& side() const { return connection_->side[which_]; }
  const Side& far() const { return connection_->side[1 - which_]; }

  void Complete(uint64_t transfer, const Status& status) {
    const auto found = outstanding_.find(transfer);
    if (found == outstanding_.end()) return;
    Event done{.kind = Event::Kind::kTransferDone, .endpoint = id()};
    done.cookie = found->second.cookie;
    done.status = status;
    outstanding_.erase(found);
    network_->journal_->Note(network_->now(), "transfer {} of node {} done, code {}", transfer,
                             side().node, static_cast<uint64_t>(status.code()));
    transport_->Arrive(std::move(done));
  }

  void Start(const Transfer& transfer) {
    const uint64_t number = network_->next_id_++;
    outstanding_[number] = transfer;
    const Handle handle{network_, connection_, which_, number};
    network_->journal_->Note(network_->now(),
                             transfer.op == Transfer::Op::kWrite
                                 ? "transfer {} of node {}: write of {} bytes"
                                 : "transfer {} of node {}: read of {} bytes",
                             number, side().node, transfer.local.size());
    Status refused;
    if (!transport_->Registered(transfer.local) ||
        !RangeFits(transfer.remote_offset, transfer.local.size(), transfer.remote.length)) {
      refused = InvalidArgument(
          "transfer of {} bytes to {}: memory not registered, or outside "
          "the window",
          transfer.local.size(), peer_);
    } else if (network_->Roll(network_->faults_.fail_transfer)) {
      ++network_->tally_.transfers;
      refused = Unavailable("transfer to {}: failed by the seed", peer_);
    }
    Side& from = connection_->side[which_];
    const Duration wire = network_->TransmitTime(transfer.local.size());
    if (!refused.ok()) {
      const bool half = transfer.op == Transfer::Op::kRead && network_->random_.Chance(0.5) &&
                        refused.code() == StatusCode::kUnavailable;
      network_->After(network_->Latency(), [handle, refused, half] {
        const Transfer* found = handle.Find();
        if (found == nullptr) return;
        // A broken read leaves anything in the memory that it was to fill.
        if (half) std::memset(found->local.data(), 0x5A, found->local.size() / 2);
        handle.endpoint()->Complete(handle.transfer, refused);
      });
    } else if (transfer.op == Transfer::Op::kWrite) {
      // The bytes leave some time after Submit: until kTransferDone they must not change.
      from.bulk_before = std::max(from.bulk_before, network_->now()) + wire;
      network_->At(from.bulk_before, [handle] { Depart(handle); });
    } else {
      network_->After(network_->Latency(), [handle] { ReadRemote(handle); });
    }
  }

  static void Depart(const Handle& handle) {
    const Transfer* transfer = handle.Find();
    if (transfer == nullptr) return;
    SimNetwork& network = *handle.network;
    std::vector<std::byte> bytes(transfer->local.begin(), transfer->local.end());
    SimEndpoint* here = handle.endpoint();
    here->Count(&LinkCounters::payload_bytes_sent, bytes.size());
    if (network.Roll(network.faults_.corrupt_payload)) {
      ++network.tally_.payload;
      network.NoteDisorder(*handle.connection);
      network.journal_->Note(network.now(), "transfer {}: payload corrupted", handle.transfer);
      network.Corrupt(&bytes, 3);
    }
    const bool vanishes = network.Roll(network.faults_.drop_write);
    if (vanishes) {
      ++network.tally_.transfers;
    } else {
      Side& to = handle.connection->side[1 - handle.which];
      to.bulk_before = std::max(to.bulk_before, network.now() + network.Latency());
      network.At(to.bulk_before, [handle, sent = *transfer, moved = std::move(bytes)]() mutable {
        Land(handle, sent, std::move(moved));
      });
    }
    network.After(Duration(network.random_.Below(20'000)), [handle] {
      if (handle.Find() != nullptr) handle.endpoint()->Complete(handle.transfer, OkStatus());
    });
  }

  static void Land(const Handle& handle, const Transfer& sent, std::vector<std::byte> bytes) {
    SimNetwork& network = *handle.network;
    const Side& to = handle.far();
    if (!to.open) return;
    if (const TimePoint until = network.BlockedUntil(*handle.connection); until != TimePoint{}) {
      Side& side = handle.connection->side[1 - handle.which];
      side.bulk_before = std::max(side.bulk_before, until);
      network.At(until, [handle, sent, moved = std::move(bytes)]() mutable {
        Land(handle, sent, std::move(moved));
      });
      return;
    }
    std::byte* memory = to.transport->Reach(to.endpoint, sent.remote, sent.remote_offset,
                                            bytes.size(), Access::kRemoteWrite);
    if (memory == nullptr) {
      network.journal_->Note(network.now(), "transfer {}: write discarded at node {}",
                             handle.transfer, to.node);
      return;
    }
    const bool silent = network.Roll(network.faults_.drop_written);
    if (silent) ++network.tally_.transfers;
    const auto finish = [handle, sent, silent](uint64_t content) {
      SimNetwork& wires = *handle.network;
      const Side& there = handle.far();
      wires.journal_->Note(wires.now(), "transfer {}: landed at node {}: {:016x}", handle.transfer,
                           there.node, content);
      there.transport->total_.payload_bytes_received += sent.local.size();
      if (!sent.immediate.has_value() || silent) return;
      Event event{.kind = Event::Kind::kWritten, .endpoint = there.endpoint};
      event.window = sent.remote.id;
      event.immediate = *sent.immediate;
      there.transport->Arrive(std::move(event));
    };
    if (!network.shape_.slow_landing) {
      std::memcpy(memory, bytes.data(), bytes.size());
      return finish(Fingerprint(bytes));
    }
    const size_t half = bytes.size() / 2;
    std::memcpy(memory, bytes.data(), half);
    ++to.transport->windows_[sent.remote.id].landing;
    Side& side = handle.connection->side[1 - handle.which];
    side.bulk_before = std::max(side.bulk_before, network.now() + network.Latency());
    network.At(side.bulk_before, [handle, sent, half, finish, moved = std::move(bytes)] {
      const Side& there = handle.far();
      if (!there.open) return;
      const auto window = there.transport->windows_.find(sent.remote.id);
      if (window == there.transport->windows_.end()) return;  // its region is gone
      std::byte* start = window->second.region->bytes().data() + window->second.offset;
      std::memcpy(start + sent.remote_offset + half, moved.data() + half, moved.size() - half);
      const bool revoked = window->second.revoked;
      there.transport->Landed(sent.remote.id);
      if (!revoked) finish(Fingerprint(moved));
    });
  }

  static void ReadRemote(const Handle& handle) {
    const Transfer* transfer = handle.Find();
    if (transfer == nullptr || !handle.far().open) return;
    SimNetwork& network = *handle.network;
    if (const TimePoint until = network.BlockedUntil(*handle.connection); until != TimePoint{}) {
      network.At(until, [handle] { ReadRemote(handle); });
      return;
    }
    const Side& to = handle.far();
    const std::byte* memory =
        to.transport->Reach(to.endpoint, transfer->remote, transfer->remote_offset,
                            transfer->local.size(), Access::kRemoteRead);
    if (memory == nullptr) {
      const Status denied(StatusCode::kPermissionDenied, "the peer does not expose that range");
      network.After(network.Latency(), [handle, denied] {
        if (handle.Find() != nullptr) handle.endpoint()->Complete(handle.transfer, denied);
      });
      return;
    }
    std::vector<std::byte> bytes(memory, memory + transfer->local.size());
    to.transport->total_.payload_bytes_sent += bytes.size();
    if (network.Roll(network.faults_.corrupt_payload)) {
      ++network.tally_.payload;
      network.NoteDisorder(*handle.connection);
      network.journal_->Note(network.now(), "transfer {}: payload corrupted", handle.transfer);
      network.Corrupt(&bytes, 3);
    }
    const TimePoint first = network.now() + network.Latency() + network.TransmitTime(bytes.size());
    const TimePoint second = network.shape_.slow_landing ? first + network.Latency() : first;
    const size_t half = network.shape_.slow_landing ? bytes.size() / 2 : 0;
    if (half > 0) {
      network.At(first, [handle, head = std::vector(bytes.begin(),
                                                    bytes.begin() + static_cast<ptrdiff_t>(half))] {
        const Transfer* found = handle.Find();
        if (found != nullptr) std::memcpy(found->local.data(), head.data(), head.size());
      });
    }
    network.At(second, [handle, half, moved = std::move(bytes)] {
      const Transfer* found = handle.Find();
      if (found == nullptr) return;
      std::memcpy(found->local.data() + half, moved.data() + half, moved.size() - half);
      handle.endpoint()->Count(&LinkCounters::payload_bytes_received, moved.size());
      handle.endpoint()->Complete(handle.transfer, OkStatus());
    });
  }

  SimTransport* transport_;
  SimNetwork* network_;
  std::shared_ptr<Connection> connection_;
  int which_;
  std::string peer_;
  LinkCounters counters_;
  std::map<uint64_t, Transfer> outstanding_;
};

SimTransport::SimTransport(SimNetwork* network, size_t node, std::function<void()> wake)
    : network_(network), node_(node), wake_(std::move(wake)) {
  capabilities_.name = "sim";
  capabilities_.max_message_bytes = network->shape_.max_message_bytes;
  capabilities_.max_outstanding = network->shape_.max_outstanding;
  capabilities_.max_transfer_bytes = uint64_t{1} << 30;
  capabilities_.crosses_processes = true;
  capabilities_.detects_peer_death = true;
}

SimTransport::~SimTransport() { network_->Kill(this); }

Result<std::string> SimTransport::Listen(std::string_view address) {
  if (!network_->Listening(std::string(address), this)) {
    return Unavailable("listening on {}: somebody does already", address);
  }
  return std::string(address);
}

Result<Endpoint*> SimTransport::Connect(std::string_view address, Duration timeout) {
  auto connection = std::make_shared<Connection>();
  connection->id = network_->next_id_++;
  Side& side = connection->side[0];
  side.transport = this;
  side.node = node_;
  side.endpoint = network_->next_id_++;
  side.open = true;
  auto endpoint = std::make_unique<SimEndpoint>(this, connection, 0, std::string(address));
  Endpoint* result = endpoint.get();
  endpoints_[side.endpoint] = std::move(endpoint);
  network_->StartConnect(std::move(connection), std::string(address), timeout);
  return result;
}

void SimTransport::Accept(const std::shared_ptr<Connection>& connection) {
  Side& side = connection->side[1];
  side.transport = this;
  side.node = node_;
  side.endpoint = network_->next_id_++;
  side.open = true;
  endpoints_[side.endpoint] = std::make_unique<SimEndpoint>(
      this, connection, 1, "sim:node" + std::to_string(connection->side[0].node));
  Arrive({.kind = Event::Kind::kConnected, .endpoint = side.endpoint});
}

Endpoint* SimTransport::Find(EndpointId id) {
  const auto found = endpoints_.find(id);
  return found == endpoints_.end() ? nullptr : found->second.get();
}

Result<std::unique_ptr<MemoryRegion>> SimTransport::Register(std::span<std::byte> memory) {
  return std::unique_ptr<MemoryRegion>(std::make_unique<SimRegion>(this, memory));
}

void SimTransport::Poll(std::vector<Event>* events) {
  closed_.clear();
  for (Event& event : inbox_) {
    if (event.kind == Event::Kind::kClosed) {
      const auto found = endpoints_.find(event.endpoint);
      closed_.push_back(std::move(found->second));
      endpoints_.erase(found);
    }
    events->push_back(std::move(event));
  }
  inbox_.clear();
}

void SimTransport::Arrive(Event event) {
  inbox_.push_back(std::move(event));
  wake_();
}

void SimTransport::EndSide(EndpointId endpoint, const Status& transfers, const Status& closed) {
  static_cast<SimEndpoint*>(Find(endpoint))->CompleteAll(transfers);
  // What had begun to land is called off with the connection.
  for (auto it = windows_.begin(); it != windows_.end();) {
    if (it->second.peer == endpoint) it->second.landing = 0;
    it = it->second.peer == endpoint && it->second.revoked ? windows_.erase(it) : std::next(it);
  }
  Event event{.kind = Event::Kind::kClosed, .endpoint = endpoint};
  event.status = closed;
  Arrive(std::move(event));
}

void SimTransport::CountMessage(EndpointId endpoint, size_t bytes) {
  static_cast<SimEndpoint*>(Find(endpoint))->Count(&LinkCounters::control_bytes_received, bytes);
}

std::byte* SimTransport::Reach(EndpointId peer, const RemoteWindow& window, uint64_t offset,
                               uint64_t length, Access access) {
  const auto found = windows_.find(window.id);
  if (found == windows_.end()) return nullptr;
  const Window& exposed = found->second;
  const bool allowed = exposed.peer == peer && exposed.key == window.key && !exposed.revoked &&
                       (static_cast<int>(exposed.access) & static_cast<int>(access)) != 0 &&
                       RangeFits(offset, length, exposed.length);
  return allowed ? exposed.region->bytes().data() + exposed.offset + offset : nullptr;
}

void SimTransport::Landed(uint64_t window) {
  const auto found = windows_.find(window);
  if (--found->second.landing == 0 && found->second.revoked) windows_.erase(found);
}

void SimTransport::CallOffLandings() {
  for (auto& [id, window] : windows_) window.landing = 0;
}

bool SimTransport::Registered(std::span<const std::byte> memory) const {
  return std::any_of(regions_.begin(), regions_.end(), [&](const SimRegion* region) {
    const std::span<std::byte> bytes = region->bytes();
    return memory.data() >= bytes.data() &&
           RangeFits(static_cast<uint64_t>(memory.data() - bytes.data()), memory.size(),
                     bytes.size());
  });
}

}  // namespace kvant::sim
