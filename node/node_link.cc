#include "node/node_link.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <utility>

#include "node/node.pb.h"

namespace kvant::node {
namespace {

std::vector<std::byte> Serialize(const wire::Message& message) {
  std::vector<std::byte> bytes(message.ByteSizeLong());
  message.SerializeToArray(bytes.data(), static_cast<int>(bytes.size()));
  return bytes;
}

}  // namespace

NodeLink::NodeLink(Transport* transport, const Clock* clock, int own_rank)
    : transport_(transport), clock_(clock), own_rank_(own_rank) {}

NodeLink::~NodeLink() = default;

Status NodeLink::Connect(const std::map<int, std::string>& called, const std::set<int>& callers,
                         Duration at_most) {
  const TimePoint deadline = clock_->Now() + at_most;
  std::map<EndpointId, int> pending;
  wire::Message hello;
  hello.set_version(kNodeProtocolVersion);
  hello.mutable_hello()->set_rank(static_cast<uint32_t>(own_rank_));
  for (const auto& [rank, address] : called) {
    KV_ASSIGN_OR_RETURN(Endpoint * endpoint, transport_->Connect(address, at_most));
    pending[endpoint->id()] = rank;
    rank_of_[endpoint->id()] = rank;
    peers_[rank].endpoint = endpoint->id();
  }
  const auto missing_caller = [&] {
    return std::find_if(callers.begin(), callers.end(), [&](int rank) {
      const auto peer = peers_.find(rank);
      return peer == peers_.end() || peer->second.endpoint == 0;
    });
  };
  while (!pending.empty() || missing_caller() != callers.end()) {
    if (clock_->Now() >= deadline) {
      return MakeStatus(StatusCode::kDeadlineExceeded, "rank {} did not connect within {:.0f} s",
                        pending.empty() ? *missing_caller() : pending.begin()->second,
                        Seconds(at_most));
    }
    events_.clear();
    transport_->Poll(&events_);
    for (Event& event : events_) {
      const auto found = pending.find(event.endpoint);
      if (found != pending.end() && event.kind == Event::Kind::kConnected) {
        KV_RETURN_IF_ERROR(Send(found->second, hello));
        pending.erase(found);
      } else if (found != pending.end() && event.kind == Event::Kind::kClosed) {
        return Unavailable("rank {} at {} cannot be reached: {}", found->second,
                           called.at(found->second), event.status.message());
      } else {
        Handle(&event, &early_);
      }
    }
    if (!Flush() && events_.empty()) transport_->Wait(std::chrono::milliseconds(1));
  }
  return OkStatus();
}

Status NodeLink::Send(int rank, const wire::Message& message) {
  const auto peer = peers_.find(rank);
  if (peer == peers_.end() || peer->second.endpoint == 0) {
    return Unavailable("rank {} is not connected", rank);
  }
  unsent_.emplace_back(peer->second.endpoint, Serialize(message));
  Flush();
  return OkStatus();
}

bool NodeLink::Flush() {
  size_t sent = 0;
  for (; sent < unsent_.size(); ++sent) {
    const auto& [id, bytes] = unsent_[sent];
    Endpoint* endpoint = transport_->Find(id);
    if (endpoint == nullptr) continue;  // gone; its kClosed tells
    const Status status = endpoint->Send(bytes);
    if (status.code() == StatusCode::kResourceExhausted) break;
    if (!status.ok())
      spdlog::warn("a message to {} is lost: {}", endpoint->peer(), status.ToString());
  }
  unsent_.erase(unsent_.begin(), unsent_.begin() + static_cast<ptrdiff_t>(sent));
  return sent != 0;
}

void NodeLink::Handle(Event* event, std::vector<Received>* received) {
  if (event->kind == Event::Kind::kClosed) {
    const auto known = rank_of_.find(event->endpoint);
    if (known == rank_of_.end()) return;
    Peer& peer = peers_[known->second];
    if (peer.endpoint == event->endpoint) peer.endpoint = 0;
    received->push_back({known->second, nullptr});
    rank_of_.erase(known);
    return;
  }
  if (event->kind != Event::Kind::kMessage) return;
  auto message = std::make_unique<wire::Message>();
  const bool well_formed =
      message->ParseFromArray(event->message.data(), static_cast<int>(event->message.size())) &&
      message->version() == kNodeProtocolVersion &&
      message->body_case() != wire::Message::BODY_NOT_SET;
  const auto known = rank_of_.find(event->endpoint);
  // Each endpoint says once who it is, and nobody takes the name of a rank that is there.
  const bool introduced = known != rank_of_.end();
  const auto named =
      message->has_hello() ? peers_.find(static_cast<int>(message->hello().rank())) : peers_.end();
  const bool taken = named != peers_.end() && named->second.endpoint != 0;
  if (!well_formed || introduced == message->has_hello() || taken) {
    spdlog::warn("a malformed message between nodes; its sender is disconnected");
    if (Endpoint* endpoint = transport_->Find(event->endpoint)) endpoint->Close();
    return;
  }
  if (message->has_hello()) {
    const int rank = static_cast<int>(message->hello().rank());
    rank_of_[event->endpoint] = rank;
    peers_[rank].endpoint = event->endpoint;
    return;
  }
  received->push_back({known->second, std::move(message)});
}

bool NodeLink::Poll(std::vector<Received>* received) {
  const bool sent = Flush();
  const bool early = !early_.empty();
  for (Received& one : early_) received->push_back(std::move(one));
  early_.clear();
  events_.clear();
  transport_->Poll(&events_);
  for (Event& event : events_) Handle(&event, received);
  return sent || early || !events_.empty();
}

}  // namespace kvant::node
