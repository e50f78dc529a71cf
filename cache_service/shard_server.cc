#include "cache_service/shard_server.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "base/bytes.h"
#include "cache_service/shard_server_impl.h"

namespace kvant {

void ShardServer::Impl::TakeActions(std::vector<Action>* out) {
  std::move(actions_.begin(), actions_.end(), std::back_inserter(*out));
  actions_.clear();
}

ServerStats ShardServer::Impl::stats() const {
  ServerStats stats = stats_;
  stats.store = store_.stats();
  stats.clients = sessions_.size();
  return stats;
}

// ---- Messages out.

wire::Envelope ShardServer::Impl::Answer(uint64_t request_id) const {
  wire::Envelope envelope;
  envelope.set_version(kProtocolVersion);
  envelope.set_epoch(options_.epoch);
  envelope.set_request_id(request_id);
  return envelope;
}

void ShardServer::Impl::Send(EndpointId endpoint, const wire::Envelope& envelope) {
  Action action;
  action.kind = Action::Kind::kSend;
  action.endpoint = endpoint;
  action.message = EncodeMessage(envelope);
  actions_.push_back(std::move(action));
}

void ShardServer::Impl::SendDone(EndpointId endpoint, uint64_t request_id, const Status& status) {
  if (status.code() == StatusCode::kResourceExhausted) ++stats_.refused_busy;
  wire::Envelope envelope = Answer(request_id);
  ToWire(status, envelope.mutable_done()->mutable_status());
  Send(endpoint, envelope);
}

void ShardServer::Impl::SendPut(EndpointId endpoint, uint64_t put, wire::PutReply::Phase phase,
                                const Status& status) {
  if (status.code() == StatusCode::kResourceExhausted) ++stats_.refused_busy;
  wire::Envelope envelope = Answer(put);
  envelope.mutable_put_reply()->set_phase(phase);
  if (!status.ok()) ToWire(status, envelope.mutable_put_reply()->mutable_status());
  Send(endpoint, envelope);
}

// ---- Events in.

void ShardServer::Impl::OnEvent(const Event& event, TimePoint now) {
  if (event.kind == Event::Kind::kTransferDone) {
    OnTransferDone(event.cookie, event.status);
    return;
  }
  if (event.kind == Event::Kind::kClosed) {
    EndSession(event.endpoint);
    return;
  }
  auto session = sessions_.find(event.endpoint);
  if (session == sessions_.end()) {
    if (event.kind == Event::Kind::kWritten) return;
    if (sessions_.size() >= options_.limits.max_clients) {
      Action close;
      close.kind = Action::Kind::kClose;
      close.endpoint = event.endpoint;
      actions_.push_back(std::move(close));
      return;
    }
    session = sessions_.try_emplace(event.endpoint).first;
  }
  if (event.kind == Event::Kind::kMessage) {
    OnMessage(event.endpoint, &session->second, event.message, now);
  }
}

void ShardServer::Impl::OnMessage(EndpointId endpoint, Session* session,
                                  std::span<const std::byte> bytes, TimePoint now) {
  wire::Envelope request;
  const Status status = DecodeMessage(bytes, &request);
  if (!status.ok()) {
    ++stats_.malformed_messages;
    if (request.request_id() != 0) SendDone(endpoint, request.request_id(), status);
    return;
  }
  if (request.epoch() != options_.epoch) {
    ++stats_.stale_epoch;
    SendDone(
        endpoint, request.request_id(),
        MakeStatus(StatusCode::kStaleEpoch,
                   "the request is of shard map epoch {}, this shard is in {}; refresh the map",
                   request.epoch(), options_.epoch));
    return;
  }
  Dispatch(endpoint, session, request, now);
}

void ShardServer::Impl::Dispatch(EndpointId endpoint, Session* session,
                                 const wire::Envelope& request, TimePoint now) {
  switch (request.body_case()) {
    case wire::Envelope::kHello:
      return OnHello(endpoint, session, request);
    case wire::Envelope::kGoodbye: {
      Action close;
      close.kind = Action::Kind::kClose;
      close.endpoint = endpoint;
      actions_.push_back(std::move(close));
      return;
    }
    case wire::Envelope::kLookup:
      return OnLookup(endpoint, session, request, now);
    case wire::Envelope::kFetch:
      return OnFetch(endpoint, session, request, now);
    case wire::Envelope::kReserve:
      return OnReserve(endpoint, session, request, now);
    case wire::Envelope::kPutRanges:
      return OnPutRanges(endpoint, session, request);
    case wire::Envelope::kSeal:
      return OnSeal(endpoint, session, request);
    case wire::Envelope::kAbort:
      return FailPut(endpoint, session, request.request_id(),
                     MakeStatus(StatusCode::kCancelled, "the client gave the put up"));
    case wire::Envelope::kPin:
      return OnPin(endpoint, request, now);
    case wire::Envelope::kReportCorrupt:
      return OnReport(request.report_corrupt());
    case wire::Envelope::kStats: {
      wire::Envelope reply = Answer(request.request_id());
      reply.mutable_stats_reply()->set_json(stats().ToJson());
      return Send(endpoint, reply);
    }
    default:
      ++stats_.malformed_messages;
      return SendDone(endpoint, request.request_id(),
                      InvalidArgument("a message of kind {} is not a request",
                                      static_cast<int>(request.body_case())));
  }
}

void ShardServer::Impl::OnHello(EndpointId endpoint, Session* session,
                                const wire::Envelope& request) {
  session->name = request.hello().name().substr(0, 64);
  wire::Envelope reply = Answer(request.request_id());
  wire::HelloReply* hello = reply.mutable_hello_reply();
  hello->set_memory_bytes(store_.limit_bytes());
  hello->set_max_block_bytes(std::min<uint64_t>(options_.store.arena.size(), kMaxPayloadBytes));
  hello->set_max_transfers(static_cast<uint32_t>(options_.limits.max_transfers_per_client));
  Send(endpoint, reply);
}

void ShardServer::Impl::Lend(EndpointId endpoint, Session* session, const BlockKey& key,
                             TimePoint deadline) {
  const auto held = session->leases.find(key);
  const bool renews = held != session->leases.end();
  // Two operations of one client may hold a block: the one that needs it longer decides.
  if (renews && held->second.deadline >= deadline) return;
  if (!renews && session->leases.size() >= options_.limits.max_leases_per_client) return;
  // A lease is a courtesy: without one the block may be gone when it is fetched, which is a miss.
  const Result<PinId> pin = store_.Pin(key, endpoint, deadline);
  if (!pin.ok()) return;
  DropLease(session, key);
  session->leases[key] = {*pin, deadline};
}

void ShardServer::Impl::DropLease(Session* session, const BlockKey& key) {
  const auto lease = session->leases.find(key);
  if (lease == session->leases.end()) return;
  store_.Unpin(lease->second.pin);
  session->leases.erase(lease);
}

void ShardServer::Impl::OnLookup(EndpointId endpoint, Session* session,
                                 const wire::Envelope& request, TimePoint now) {
  const auto keys = AsBytes(request.lookup().keys());
  const size_t count = keys.size() / kDigestBytes;
  if (keys.size() % kDigestBytes != 0 || count == 0 || count > kMaxChain) {
    ++stats_.malformed_messages;
    return SendDone(endpoint, request.request_id(),
                    InvalidArgument("lookup: {} bytes are not 1 to {} keys of {} bytes",
                                    keys.size(), kMaxChain, kDigestBytes));
  }
  const Duration lease = CappedMs(request.lookup().lease_ms(), kMaxLease);
  wire::Envelope answer = Answer(request.request_id());
  wire::LookupReply* reply = answer.mutable_lookup_reply();
  reply->mutable_states()->reserve(count);
  stats_.lookup_blocks += count;
  for (size_t i = 0; i < count; ++i) {
    BlockKey key;
    std::copy_n(keys.begin() + static_cast<ptrdiff_t>(i * kDigestBytes), kDigestBytes,
                key.bytes.begin());
    const BlockState state = store_.Find(key);
    reply->mutable_states()->push_back(static_cast<char>(state));
    if (state != BlockState::kPresent) continue;
    const std::optional<BlockView> view = store_.View(key);
    reply->add_cuts(PackCuts(view->cuts));
    reply->add_payload_bytes(view->payload.size());
    for (int cut = 0; cut + 1 < CutCount(view->cuts); ++cut) {
      reply->add_cut_ends(view->cut_ends[static_cast<size_t>(cut)]);
    }
    if (lease > Duration::zero()) Lend(endpoint, session, key, now + lease);
  }
  Send(endpoint, answer);
}

// ---- Small requests.

void ShardServer::Impl::OnPin(EndpointId endpoint, const wire::Envelope& request, TimePoint now) {
  const Result<BlockKey> key = KeyFromWire(request.pin().key());
  if (!key.ok()) {
    ++stats_.malformed_messages;
    return SendDone(endpoint, request.request_id(), key.status());
  }
  std::optional<TimePoint> deadline;
  if (request.pin().duration_ms() > 0) {
    deadline = now + std::chrono::milliseconds(request.pin().duration_ms());
  }
  SendDone(endpoint, request.request_id(), store_.SetUserPin(*key, deadline));
}

void ShardServer::Impl::OnReport(const wire::ReportCorrupt& report) {
  const Result<BlockKey> key = KeyFromWire(report.key());
  if (!key.ok()) {
    ++stats_.malformed_messages;
    return;
  }
  if (!store_.Reverify(*key).ok()) ++stats_.data_loss;
}

// ---- Transfers and time.

void ShardServer::Impl::Submit(EndpointId endpoint, Session* session, const Transfer& transfer,
                               const InFlight& in_flight) {
  Action action;
  action.kind = Action::Kind::kTransfer;
  action.endpoint = endpoint;
  action.transfer = transfer;
  action.transfer.cookie = next_cookie_++;
  in_flight_[action.transfer.cookie] = in_flight;
  actions_.push_back(std::move(action));
  ++session->outstanding;
}

void ShardServer::Impl::Advance(EndpointId endpoint, Session* session) {
  // In turns, so that neither direction waits for the other to run dry.
  bool more = true;
  while (more && session->outstanding < options_.limits.max_transfers_per_client) {
    more = SubmitRead(endpoint, session);
    if (session->outstanding < options_.limits.max_transfers_per_client) {
      more = SubmitWrite(endpoint, session) || more;
    }
  }
}

void ShardServer::Impl::OnTransferDone(uint64_t cookie, const Status& status) {
  const auto found = in_flight_.find(cookie);
  if (found == in_flight_.end()) return;
  const InFlight done = found->second;
  in_flight_.erase(found);
  if (!status.ok()) ++stats_.transfers_failed;
  Session& session = sessions_.at(done.endpoint);
  --session.outstanding;
  if (done.reservation == 0) {
    OnWriteDone(done, &session, status);
  } else {
    OnReadDone(done, &session, status);
  }
  Advance(done.endpoint, &session);
}

void ShardServer::Impl::EndSession(EndpointId endpoint) {
  const auto found = sessions_.find(endpoint);
  if (found == sessions_.end()) return;
  // Nothing of this endpoint is under way any more (transport/transport.h, rule 4).
  for (auto it = in_flight_.begin(); it != in_flight_.end();) {
    if (it->second.endpoint != endpoint) {
      ++it;
      continue;
    }
    if (it->second.reservation != 0) store_.AddLanding(it->second.reservation, -1);
    it = in_flight_.erase(it);
  }
  for (const auto& [id, fetch] : found->second.fetches) {
    queued_ranges_ -= fetch.plan.size() - fetch.next;
  }
  store_.ReleaseOwner(endpoint);
  sessions_.erase(found);
}

void ShardServer::Impl::Tick(TimePoint now) {
  for (auto& [endpoint, session] : sessions_) {
    for (auto& [id, fetch] : session.fetches) {
      if (fetch.deadline > now) continue;
      for (uint32_t item = 0; item < fetch.items.size(); ++item) {
        if (fetch.items[item].remaining == 0) continue;
        FailItem(endpoint, &fetch, item,
                 MakeStatus(StatusCode::kDeadlineExceeded, "fetch: its deadline has passed"));
      }
    }
    for (auto put = session.puts.begin(); put != session.puts.end();) {
      const auto next = std::next(put);
      if (put->second.deadline <= now) {
        FailPut(endpoint, &session, put->first,
                MakeStatus(StatusCode::kDeadlineExceeded, "put of block {}: its lease has ended",
                           put->second.key.ShortHex()));
      }
      put = next;
    }
    std::erase_if(session.leases, [&](const auto& lease) { return lease.second.deadline <= now; });
    Advance(endpoint, &session);
  }
  store_.Reap(now);
}

ShardServer::ShardServer(const ShardServerOptions& options)
    : impl_(std::make_unique<Impl>(options)) {}
ShardServer::~ShardServer() = default;
void ShardServer::OnEvent(const Event& event, TimePoint now) { impl_->OnEvent(event, now); }
void ShardServer::Tick(TimePoint now) { impl_->Tick(now); }
void ShardServer::TakeActions(std::vector<Action>* out) { impl_->TakeActions(out); }
ServerStats ShardServer::stats() const { return impl_->stats(); }
BlockStore& ShardServer::store() { return impl_->store(); }

}  // namespace kvant
