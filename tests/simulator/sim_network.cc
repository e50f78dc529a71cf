#include "tests/simulator/sim_network.h"

#include <algorithm>

#include "tests/simulator/sim_transport.h"

namespace kvant::sim {

FaultTally& FaultTally::operator+=(const FaultTally& more) {
  messages += more.messages;
  payload += more.payload;
  transfers += more.transfers;
  breaks += more.breaks;
  refusals += more.refusals;
  return *this;
}

SimNetwork::SimNetwork(uint64_t seed, const NetworkShape& shape, Journal* journal)
    : random_(seed), shape_(shape), journal_(journal) {}

void SimNetwork::At(TimePoint when, std::function<void()> what) {
  plan_.emplace(Planned{std::max(when, now()), order_++}, std::move(what));
}

bool SimNetwork::Step() {
  if (plan_.empty()) return false;
  auto first = plan_.extract(plan_.begin());
  clock_.AdvanceTo(std::max(now(), first.key().when));
  first.mapped()();
  return true;
}

Duration SimNetwork::Latency() {
  const auto spread = static_cast<uint64_t>((shape_.latency_most - shape_.latency_least).count());
  return shape_.latency_least + Duration(random_.Below(spread + 1));
}

Duration SimNetwork::SomeDelay() {
  return Duration(random_.Below(static_cast<uint64_t>(faults_.delay_at_most.count()) + 1));
}

Duration SimNetwork::TransmitTime(uint64_t bytes) const {
  return Duration(static_cast<int64_t>(1e9 * static_cast<double>(bytes) / shape_.bytes_per_second));
}

TimePoint SimNetwork::BlockedUntil(const Connection& connection) const {
  const auto found = partitions_.find(PairOf(connection.side[0].node, connection.side[1].node));
  return found == partitions_.end() || found->second <= now() ? TimePoint{} : found->second;
}

void SimNetwork::NoteDisorder(const Connection& connection) {
  ++disorder_[PairOf(connection.side[0].node, connection.side[1].node)];
}

uint64_t SimNetwork::Disorder(size_t node_a, size_t node_b) const {
  const auto found = disorder_.find(PairOf(node_a, node_b));
  return found == disorder_.end() ? 0 : found->second;
}

void SimNetwork::Corrupt(std::vector<std::byte>* bytes, uint64_t at_most) {
  if (bytes->empty()) return;
  for (uint64_t i = 1 + random_.Below(at_most); i > 0; --i) {
    (*bytes)[random_.Below(bytes->size())] ^= static_cast<std::byte>(1 + random_.Below(255));
  }
}

bool SimNetwork::Listening(const std::string& address, SimTransport* transport) {
  return listeners_.emplace(address, transport).second;
}

void SimNetwork::StartConnect(std::shared_ptr<Connection> connection, const std::string& address,
                              Duration timeout) {
  std::erase_if(connections_, [](const std::shared_ptr<Connection>& old) {
    return !old->side[0].open && !old->side[1].open;
  });
  connections_.push_back(connection);
  const auto give_up = [this, connection](Duration after, const std::string& who) {
    After(after, [this, connection, who] {
      if (connection->side[1].open || !connection->side[0].open) return;
      const Status why = Unavailable("connecting to {}: nobody listens there", who);
      CloseSide(connection.get(), 0, why, why);
    });
  };
  After(Latency(), [this, connection, address, timeout, give_up] {
    if (!connection->side[0].open) return;
    const auto listener = listeners_.find(address);
    if (listener == listeners_.end()) return give_up(Latency(), address);
    connection->side[1].node = listener->second->node();
    if (BlockedUntil(*connection) != TimePoint{}) return give_up(timeout, address);
    listener->second->Accept(connection);
    journal_->Note(now(), "node {} reached node {}", connection->side[0].node,
                   connection->side[1].node);
    After(Latency(), [connection] {
      Side& near = connection->side[0];
      if (near.open && connection->side[1].open) {
        near.transport->Arrive({.kind = Event::Kind::kConnected, .endpoint = near.endpoint});
      }
    });
  });
}

void SimNetwork::CarryMessage(const std::shared_ptr<Connection>& connection, int from,
                              std::vector<std::byte> message) {
  if (Roll(faults_.cut)) return Break(connection, "a message cut its connection");
  const auto send = [this, &connection, from](std::vector<std::byte> bytes, Duration extra) {
    Side& to = connection->side[1 - from];
    TimePoint at = now() + Latency() + TransmitTime(bytes.size());
    if (extra == Duration::zero()) {
      at = to.message_before = std::max(to.message_before, at);
    } else {
      at += extra;
    }
    ++to.queued;
    At(at, [this, connection, from, moved = std::move(bytes)]() mutable {
      DeliverMessage(connection, 1 - from, std::move(moved));
    });
  };
  if (Roll(faults_.duplicate_message)) {
    ++tally_.messages;
    NoteDisorder(*connection);
    send(message, SomeDelay() + Duration(1));
  }
  if (Roll(faults_.drop_message)) {
    ++tally_.messages;
    NoteDisorder(*connection);
    journal_->Note(now(), "message of {} bytes from node {} dropped", message.size(),
                   connection->side[from].node);
    return;
  }
  if (Roll(faults_.corrupt_message)) {
    ++tally_.messages;
    NoteDisorder(*connection);
    journal_->Note(now(), "message of {} bytes from node {} corrupted", message.size(),
                   connection->side[from].node);
    Corrupt(&message, 1);
  }
  Duration extra{};
  if (Roll(faults_.delay_message)) {
    ++tally_.messages;
    NoteDisorder(*connection);
    extra = SomeDelay();
  }
  send(std::move(message), extra);
}

void SimNetwork::DeliverMessage(std::shared_ptr<Connection> connection, int to,
                                std::vector<std::byte> message) {
  Side& side = connection->side[to];
  if (!side.open) return;
  if (const TimePoint until = BlockedUntil(*connection); until != TimePoint{}) {
    side.message_before = std::max(side.message_before, until);
    At(until, [this, connection, to, moved = std::move(message)]() mutable {
      DeliverMessage(std::move(connection), to, std::move(moved));
    });
    return;
  }
  --side.queued;
  journal_->Note(now(), "message for node {} on {}: {:016x}", side.node, connection->id,
                 Fingerprint(message));
  side.transport->CountMessage(side.endpoint, message.size());
  side.transport->Arrive(
      {.kind = Event::Kind::kMessage, .endpoint = side.endpoint, .message = std::move(message)});
}

void SimNetwork::CloseSide(Connection* connection, int which, const Status& transfers,
                           const Status& closed) {
  Side& side = connection->side[which];
  if (!side.open) return;
  side.open = false;
  NoteDisorder(*connection);
  journal_->Note(now(), "connection {} ended at node {}, code {}", connection->id, side.node,
                 static_cast<uint64_t>(closed.code()));
  side.transport->EndSide(side.endpoint, transfers, closed);
}

void SimNetwork::Break(const std::shared_ptr<Connection>& connection, const char* why) {
  if (!connection->side[0].open && !connection->side[1].open) return;
  ++tally_.breaks;
  NoteDisorder(*connection);
  journal_->Note(now(), why);
  const Status status = Unavailable("connection {}: {}", connection->id, why);
  const int first = static_cast<int>(random_.Below(2));
  CloseSide(connection.get(), first, status, status);
  After(Latency(), [this, connection, first, status] {
    CloseSide(connection.get(), 1 - first, status, status);
  });
}

void SimNetwork::Partition(size_t node_a, size_t node_b, TimePoint until) {
  journal_->Note(now(), "nodes {} and {} parted for {} us", node_a, node_b,
                 static_cast<uint64_t>((until - now()).count() / 1000));
  TimePoint& parted = partitions_[PairOf(node_a, node_b)];
  parted = std::max(parted, until);
  if (until - now() <= shape_.detection) return;
  After(shape_.detection, [this, node_a, node_b] {
    const auto found = partitions_.find(PairOf(node_a, node_b));
    if (found != partitions_.end() && found->second > now()) CutBetween(node_a, node_b);
  });
}

void SimNetwork::HealAll() { partitions_.clear(); }

void SimNetwork::CutBetween(size_t node_a, size_t node_b) {
  const auto copy = connections_;  // Break may lead to new ones
  for (const std::shared_ptr<Connection>& connection : copy) {
    const Side* side = connection->side;
    if (PairOf(side[0].node, side[1].node) != PairOf(node_a, node_b)) continue;
    Break(connection, "a connection was cut");
  }
}

void SimNetwork::Kill(SimTransport* transport) {
  std::erase_if(listeners_, [&](const auto& entry) { return entry.second == transport; });
  transport->CallOffLandings();
  // Either the host still answers (at once), or all is silence.
  const Duration notice = random_.Chance(0.5) ? Latency() : shape_.detection;
  for (const std::shared_ptr<Connection>& connection : connections_) {
    for (int which = 0; which < 2; ++which) {
      Side& side = connection->side[which];
      if (side.transport != transport) continue;
      if (side.open) NoteDisorder(*connection);
      side.open = false;
      side.transport = nullptr;
      After(notice, [this, kept = connection, which] {
        const Status gone = Unavailable("connection {}: the peer died", kept->id);
        CloseSide(kept.get(), 1 - which, gone, gone);
      });
    }
  }
}

}  // namespace kvant::sim
