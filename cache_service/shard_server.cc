#include "cache_service/shard_server.h"

#include <algorithm>
#include <deque>
#include <map>
#include <unordered_map>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "cache_service/interval_set.h"
#include "cache_service/wire.h"

namespace kvant {
namespace {

// Room for the manifests of one reply message; the rest goes into the next one.
constexpr size_t kReplyBytes = size_t{256} << 10;
// Separate stretches that one put may announce.
constexpr size_t kMaxPutPieces = 65536;

Duration FromMs(uint64_t ms, Duration at_most) {
  return std::min<Duration>(std::chrono::milliseconds(std::min<uint64_t>(ms, UINT32_MAX)), at_most);
}
Status Busy(std::string_view what, size_t limit) {
  return MakeStatus(StatusCode::kResourceExhausted,
                    "this client already has {} {}; wait for some of them to end", limit, what);
}

}  // namespace

class ShardServer::Impl {
 public:
  explicit Impl(const ShardServerOptions& options)
      : options_(options), store_(WithFaults(options)) {}

  void OnEvent(const Event& event, TimePoint now);
  void Tick(TimePoint now);
  void TakeActions(std::vector<Action>* out);
  ServerStats stats() const;
  BlockStore& store() { return store_; }

 private:
  // One block of a fetch, pinned until its last transfer is done.
  struct Item {
    PinId pin = 0;
    std::span<std::byte> payload;
    uint64_t offset = 0;  // of the destination in the window
    uint32_t immediate_base = 0;
    uint16_t layer_begin = 0;
    size_t remaining = 0;  // transfers not done, submitted or not
    bool failed = false;
  };
  struct Planned {
    uint32_t item = 0;
    SelectedRange range;
  };
  struct Fetch {
    uint64_t request_id = 0;
    RemoteWindow window;
    TimePoint deadline{};
    std::vector<Item> items;
    std::vector<Planned> plan;  // layer-major across the items
    size_t next = 0;            // of the plan
    size_t outstanding = 0;
  };
  struct Put {
    BlockKey key;
    ReservationId reservation = 0;
    RemoteWindow window;
    std::span<std::byte> payload;
    TimePoint deadline{};
    IntervalSet asked;  // stretches that were read or are queued to be
    std::deque<Interval> queued;
    size_t outstanding = 0;
    bool sealing = false;
    std::vector<std::byte> manifest;
  };
  struct Lease {
    PinId pin = 0;
    TimePoint deadline{};
  };
  struct Session {
    std::string name;
    std::map<uint64_t, Fetch> fetches;  // by arrival: see fetch_order
    std::deque<uint64_t> fetch_order;   // of those with something left to submit
    std::map<uint64_t, Put> puts;
    std::map<BlockKey, Lease> leases;
    size_t outstanding = 0;
  };
  struct InFlight {
    EndpointId endpoint = 0;
    uint64_t request_id = 0;
    uint32_t item = 0;
    ReservationId reservation = 0;  // 0: a fetch
    uint64_t bytes = 0;
  };

  static BlockStoreOptions WithFaults(const ShardServerOptions& options) {
    BlockStoreOptions store = options.store;
    store.fault_skip_verification =
        options.faults.skip_checksum_verification || options.faults.seal_before_landed;
    store.fault_ignore_pins = options.faults.ignore_lease_in_eviction;
    return store;
  }

  wire::Envelope Answer(uint64_t request_id) const;
  void Send(EndpointId endpoint, const wire::Envelope& envelope);
  void SendDone(EndpointId endpoint, uint64_t request_id, const Status& status);
  void SendPut(EndpointId endpoint, uint64_t put, wire::PutReply::Phase phase,
               const Status& status = OkStatus());

  void OnMessage(EndpointId endpoint, Session* session, std::span<const std::byte> bytes,
                 TimePoint now);
  void Dispatch(EndpointId endpoint, Session* session, const wire::Envelope& request,
                TimePoint now);
  void OnHello(EndpointId endpoint, Session* session, const wire::Envelope& request);
  void OnLookup(EndpointId endpoint, Session* session, const wire::Envelope& request,
                TimePoint now);
  void OnFetch(EndpointId endpoint, Session* session, const wire::Envelope& request, TimePoint now);
  Status CheckFetch(const Session& session, const wire::Fetch& fetch) const;
  // Fills one item and its part of the plan; says in `reply` what became of it.
  void PlanItem(EndpointId endpoint, Session* session, const wire::Fetch& request, uint32_t index,
                Fetch* fetch, wire::FetchItemReply* reply);
  void OnReserve(EndpointId endpoint, Session* session, const wire::Envelope& request,
                 TimePoint now);
  void OnPutRanges(EndpointId endpoint, Session* session, const wire::Envelope& request);
  void OnSeal(EndpointId endpoint, Session* session, const wire::Envelope& request);
  void OnPin(EndpointId endpoint, const wire::Envelope& request, TimePoint now);
  void OnReport(const wire::ReportCorrupt& report);

  void Lend(EndpointId endpoint, Session* session, const BlockKey& key, TimePoint deadline);
  void DropLease(Session* session, const BlockKey& key);
  // Submits what may be submitted for this client.
  void Advance(EndpointId endpoint, Session* session);
  bool SubmitRead(EndpointId endpoint, Session* session);
  bool SubmitWrite(EndpointId endpoint, Session* session);
  void Submit(EndpointId endpoint, Session* session, const Transfer& transfer,
              const InFlight& in_flight);
  void OnTransferDone(uint64_t cookie, const Status& status);
  void OnWriteDone(const InFlight& done, Session* session, const Status& status);
  void OnReadDone(const InFlight& done, Session* session, const Status& status);
  void FailItem(EndpointId endpoint, Fetch* fetch, uint32_t item, const Status& status);
  void ItemStep(Fetch* fetch, uint32_t item);
  void EndFetchIfDone(Session* session, uint64_t request_id);
  // Publishes if the client asked for it and everything has landed.
  void SealIfLanded(EndpointId endpoint, Session* session, uint64_t put_id);
  void FailPut(EndpointId endpoint, Session* session, uint64_t put_id, const Status& status);
  void EndSession(EndpointId endpoint);

  ShardServerOptions options_;
  BlockStore store_;
  std::map<EndpointId, Session> sessions_;
  std::unordered_map<uint64_t, InFlight> in_flight_;
  std::vector<Action> actions_;
  uint64_t next_cookie_ = 1;
  size_t queued_ranges_ = 0;
  ServerStats stats_;
};

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
  if (session->leases.size() >= options_.limits.max_leases_per_client) return;
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
  const Duration lease = FromMs(request.lookup().lease_ms(), kMaxLease);
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
    if (lease > Duration::zero()) Lend(endpoint, session, key, now + lease);
  }
  Send(endpoint, answer);
}

// ---- Fetch.

Status ShardServer::Impl::CheckFetch(const Session& session, const wire::Fetch& fetch) const {
  if (fetch.items_size() == 0 || static_cast<size_t>(fetch.items_size()) > kMaxFetchItems) {
    return InvalidArgument("fetch: {} items, 1 to {} are possible", fetch.items_size(),
                           kMaxFetchItems);
  }
  if (session.fetches.size() >= options_.limits.max_requests_per_client) {
    return Busy("fetches in progress", options_.limits.max_requests_per_client);
  }
  return OkStatus();
}

void ShardServer::Impl::PlanItem(EndpointId endpoint, Session* session, const wire::Fetch& request,
                                 uint32_t index, Fetch* fetch, wire::FetchItemReply* reply) {
  const auto refuse = [&](StatusCode code) { reply->set_code(static_cast<uint32_t>(code)); };
  const wire::FetchItem& wanted = request.items(static_cast<int>(index));
  Item& item = fetch->items[index];
  item.failed = true;
  const Result<BlockKey> key = KeyFromWire(wanted.key());
  if (!key.ok() || wanted.selection() >= static_cast<uint32_t>(request.selections_size()) ||
      !RangeFits(wanted.offset(), wanted.capacity(), fetch->window.length)) {
    return refuse(StatusCode::kInvalidArgument);
  }
  const Result<Selection> selection =
      FromWire(request.selections(static_cast<int>(wanted.selection())));
  if (!selection.ok()) return refuse(StatusCode::kInvalidArgument);
  const std::optional<BlockView> view = store_.View(*key);
  if (!view) {
    ++stats_.misses;
    return;
  }
  const Result<BlockManifest> manifest = ParseManifest(view->manifest);
  if (!manifest.ok()) {
    ++stats_.data_loss;
    static_cast<void>(store_.Reverify(*key));
    return refuse(StatusCode::kDataLoss);
  }
  const std::vector<SelectedRange> ranges = SelectRanges(*manifest, *selection);
  const uint64_t bytes = ranges.empty() ? 0 : ranges.back().packed_offset + ranges.back().length;
  if (bytes > wanted.capacity()) return refuse(StatusCode::kInvalidArgument);
  if (queued_ranges_ + ranges.size() > options_.limits.max_queued_ranges) {
    return refuse(StatusCode::kResourceExhausted);
  }
  const Result<PinId> pin = store_.Pin(*key, endpoint, TimePoint::max());
  if (!pin.ok()) return refuse(pin.status().code());
  DropLease(session, *key);
  store_.Touch(*key);
  ++stats_.hits;
  item.failed = false;
  item.payload = view->payload;
  item.offset = wanted.offset();
  item.immediate_base = wanted.immediate_base();
  item.layer_begin = selection->layer_begin;
  item.remaining = ranges.size();
  if (ranges.empty()) {
    store_.Unpin(*pin);
  } else {
    item.pin = *pin;
  }
  queued_ranges_ += ranges.size();
  for (const SelectedRange& range : ranges) fetch->plan.push_back({index, range});
  reply->set_present(true);
  reply->set_manifest(ToWire(view->manifest));
}

void ShardServer::Impl::OnFetch(EndpointId endpoint, Session* session,
                                const wire::Envelope& request, TimePoint now) {
  const uint64_t id = request.request_id();
  const Status status = CheckFetch(*session, request.fetch());
  if (!status.ok()) {
    if (status.code() == StatusCode::kInvalidArgument) ++stats_.malformed_messages;
    return SendDone(endpoint, id, status);
  }
  // A message that the wire duplicated.
  const auto [entry, fresh] = session->fetches.try_emplace(id);
  if (!fresh) return;
  Fetch& fetch = entry->second;
  fetch.request_id = id;
  fetch.window = FromWire(request.fetch().window());
  fetch.deadline = now + FromMs(request.deadline_ms(), kMaxDeadline);
  const auto count = static_cast<uint32_t>(request.fetch().items_size());
  fetch.items.resize(count);
  wire::Envelope answer = Answer(id);
  size_t reply_bytes = 0;
  for (uint32_t i = 0; i < count; ++i) {
    if (reply_bytes > kReplyBytes) {
      Send(endpoint, answer);
      answer = Answer(id);
      answer.mutable_fetch_reply()->set_first_item(i);
      reply_bytes = 0;
    }
    wire::FetchItemReply* item = answer.mutable_fetch_reply()->add_items();
    PlanItem(endpoint, session, request.fetch(), i, &fetch, item);
    reply_bytes += item->manifest().size() + 16;
  }
  Send(endpoint, answer);
  std::stable_sort(fetch.plan.begin(), fetch.plan.end(), [](const Planned& a, const Planned& b) {
    return a.range.layer < b.range.layer;
  });
  if (fetch.plan.empty()) {
    session->fetches.erase(entry);
    return;
  }
  session->fetch_order.push_back(id);
  Advance(endpoint, session);
}

// ---- Put.

void ShardServer::Impl::OnReserve(EndpointId endpoint, Session* session,
                                  const wire::Envelope& request, TimePoint now) {
  const uint64_t id = request.request_id();
  const wire::Reserve& reserve = request.reserve();
  if (session->puts.contains(id)) return SendPut(endpoint, id, wire::PutReply::RESERVED);
  const auto fail = [&](const Status& status) {
    if (status.code() == StatusCode::kInvalidArgument) ++stats_.malformed_messages;
    SendPut(endpoint, id, wire::PutReply::FAILED, status);
  };
  if (session->puts.size() >= options_.limits.max_puts_per_client) {
    return fail(Busy("open puts", options_.limits.max_puts_per_client));
  }
  ReserveRequest wanted;
  const Result<BlockKey> key = KeyFromWire(reserve.key());
  if (!key.ok()) return fail(key.status());
  wanted.key = *key;
  if (!reserve.parent().empty()) {
    const Result<BlockKey> parent = KeyFromWire(reserve.parent());
    if (!parent.ok()) return fail(parent.status());
    wanted.parent = *parent;
  }
  wanted.payload_bytes = reserve.payload_bytes();
  wanted.manifest_bytes = reserve.manifest_bytes();
  wanted.owner = endpoint;
  wanted.deadline = now + FromMs(request.deadline_ms(), kMaxDeadline);
  const RemoteWindow window = FromWire(reserve.window());
  if (window.length < wanted.payload_bytes) {
    return fail(InvalidArgument("reserve: the window has {} bytes, the payload {}", window.length,
                                wanted.payload_bytes));
  }
  const Result<ReserveResult> result = store_.Reserve(wanted);
  if (!result.ok()) return fail(result.status());
  if (result->found != BlockState::kAbsent) {
    ++stats_.puts_refused;
    if (result->found == BlockState::kReserved) {
      return SendPut(endpoint, id, wire::PutReply::IN_PROGRESS);
    }
    stats_.dedup_bytes += wanted.payload_bytes;
    store_.Touch(wanted.key);
    return SendPut(endpoint, id, wire::PutReply::ALREADY_THERE);
  }
  Put& put = session->puts[id];
  put.key = wanted.key;
  put.reservation = result->reservation;
  put.window = window;
  put.payload = result->payload;
  put.deadline = wanted.deadline;
  SendPut(endpoint, id, wire::PutReply::RESERVED);
}

void ShardServer::Impl::OnPutRanges(EndpointId endpoint, Session* session,
                                    const wire::Envelope& request) {
  const auto found = session->puts.find(request.request_id());
  // A put that has ended meanwhile: the client was told.
  if (found == session->puts.end() || found->second.sealing) return;
  Put& put = found->second;
  const auto& ranges = request.put_ranges().ranges();
  const auto invalid = [&](const Status& status) {
    ++stats_.malformed_messages;
    FailPut(endpoint, session, request.request_id(), status);
  };
  if (ranges.size() % 2 != 0 || static_cast<size_t>(ranges.size()) > 2 * kMaxPutRanges) {
    return invalid(InvalidArgument("put ranges: {} numbers are not 1 to {} pairs", ranges.size(),
                                   kMaxPutRanges));
  }
  for (int i = 0; i < ranges.size(); i += 2) {
    if (!RangeFits(ranges[i], ranges[i + 1], put.payload.size())) {
      return invalid(InvalidArgument("put ranges: {} bytes at {} lie outside a payload of {}",
                                     ranges[i + 1], ranges[i], put.payload.size()));
    }
    for (const Interval& fresh : put.asked.Add({ranges[i], ranges[i] + ranges[i + 1]})) {
      put.queued.push_back(fresh);
    }
  }
  if (put.asked.pieces() > kMaxPutPieces || put.queued.size() > kMaxPutPieces) {
    return FailPut(endpoint, session, request.request_id(),
                   Busy("separate stretches in one put", kMaxPutPieces));
  }
  Advance(endpoint, session);
}

void ShardServer::Impl::OnSeal(EndpointId endpoint, Session* session,
                               const wire::Envelope& request) {
  const uint64_t id = request.request_id();
  const auto found = session->puts.find(id);
  if (found == session->puts.end()) {
    return SendPut(endpoint, id, wire::PutReply::FAILED,
                   InvalidArgument("seal: there is no such put; its lease may have ended"));
  }
  Put& put = found->second;
  if (put.sealing) return;
  put.sealing = true;
  const auto manifest = AsBytes(request.seal().manifest());
  put.manifest.assign(manifest.begin(), manifest.end());
  // Whatever was not announced before is there now.
  for (const Interval& rest : put.asked.Add({0, put.payload.size()})) put.queued.push_back(rest);
  Advance(endpoint, session);
  SealIfLanded(endpoint, session, id);
}

void ShardServer::Impl::SealIfLanded(EndpointId endpoint, Session* session, uint64_t put_id) {
  const auto found = session->puts.find(put_id);
  if (found == session->puts.end()) return;
  Put& put = found->second;
  const bool landed = put.queued.empty() && put.outstanding == 0;
  if (!put.sealing || (!landed && !options_.faults.seal_before_landed)) return;
  const Status status = store_.Seal(put.reservation, put.manifest);
  if (!status.ok()) {
    if (status.code() == StatusCode::kDataLoss) ++stats_.data_loss;
    return FailPut(endpoint, session, put_id, status);
  }
  ++stats_.puts_sealed;
  session->puts.erase(found);
  SendPut(endpoint, put_id, wire::PutReply::SEALED);
}

void ShardServer::Impl::FailPut(EndpointId endpoint, Session* session, uint64_t put_id,
                                const Status& status) {
  const auto found = session->puts.find(put_id);
  if (found == session->puts.end()) return;
  store_.Abort(found->second.reservation);
  session->puts.erase(found);
  SendPut(endpoint, put_id, wire::PutReply::FAILED, status);
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

// ---- Transfers.

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

bool ShardServer::Impl::SubmitRead(EndpointId endpoint, Session* session) {
  for (auto& [id, put] : session->puts) {
    if (put.queued.empty()) continue;
    const Interval interval = put.queued.front();
    if (!store_.AddLanding(put.reservation, +1)) {
      FailPut(endpoint, session, id,
              MakeStatus(StatusCode::kDeadlineExceeded, "put of block {}: its lease has ended",
                         put.key.ShortHex()));
      return true;
    }
    put.queued.pop_front();
    ++put.outstanding;
    Transfer transfer;
    transfer.op = Transfer::Op::kRead;
    transfer.local = put.payload.subspan(interval.begin, interval.end - interval.begin);
    transfer.remote = put.window;
    transfer.remote_offset = interval.begin;
    Submit(endpoint, session, transfer, {endpoint, id, 0, put.reservation, transfer.local.size()});
    return true;
  }
  return false;
}

bool ShardServer::Impl::SubmitWrite(EndpointId endpoint, Session* session) {
  while (!session->fetch_order.empty()) {
    const uint64_t id = session->fetch_order.front();
    const auto found = session->fetches.find(id);
    if (found == session->fetches.end() || found->second.next == found->second.plan.size()) {
      session->fetch_order.pop_front();
      continue;
    }
    Fetch& fetch = found->second;
    const Planned& planned = fetch.plan[fetch.next++];
    --queued_ranges_;
    const Item& item = fetch.items[planned.item];
    if (item.failed) {
      ItemStep(&fetch, planned.item);
      EndFetchIfDone(session, id);
      continue;
    }
    Transfer transfer;
    transfer.op = Transfer::Op::kWrite;
    transfer.local = item.payload.subspan(planned.range.payload_offset, planned.range.length);
    transfer.remote = fetch.window;
    transfer.remote_offset = item.offset + planned.range.packed_offset;
    if (planned.range.last_of_layer) {
      transfer.immediate = item.immediate_base + (planned.range.layer - item.layer_begin);
    }
    ++fetch.outstanding;
    Submit(endpoint, session, transfer, {endpoint, id, planned.item, 0, planned.range.length});
    return true;
  }
  return false;
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

void ShardServer::Impl::OnWriteDone(const InFlight& done, Session* session, const Status& status) {
  if (status.ok()) stats_.payload_bytes_served += done.bytes;
  Fetch& fetch = session->fetches.at(done.request_id);
  --fetch.outstanding;
  if (!status.ok()) FailItem(done.endpoint, &fetch, done.item, status);
  ItemStep(&fetch, done.item);
  EndFetchIfDone(session, done.request_id);
}

void ShardServer::Impl::OnReadDone(const InFlight& done, Session* session, const Status& status) {
  store_.AddLanding(done.reservation, -1);
  const auto put = session->puts.find(done.request_id);
  if (put == session->puts.end() || put->second.reservation != done.reservation) return;
  --put->second.outstanding;
  if (!status.ok()) {
    return FailPut(done.endpoint, session, done.request_id,
                   Unavailable("put of block {}: reading {} bytes from the client failed: {}",
                               put->second.key.ShortHex(), done.bytes, status.message()));
  }
  stats_.payload_bytes_stored += done.bytes;
  SealIfLanded(done.endpoint, session, done.request_id);
}

void ShardServer::Impl::FailItem(EndpointId endpoint, Fetch* fetch, uint32_t item,
                                 const Status& status) {
  if (fetch->items[item].failed) return;
  fetch->items[item].failed = true;
  wire::Envelope envelope = Answer(fetch->request_id);
  envelope.mutable_fetch_item_failed()->set_item(item);
  ToWire(status, envelope.mutable_fetch_item_failed()->mutable_status());
  Send(endpoint, envelope);
}

void ShardServer::Impl::ItemStep(Fetch* fetch, uint32_t item) {
  Item& stepped = fetch->items[item];
  KV_CHECK(stepped.remaining > 0);
  if (--stepped.remaining == 0) store_.Unpin(stepped.pin);
}

void ShardServer::Impl::EndFetchIfDone(Session* session, uint64_t request_id) {
  const auto found = session->fetches.find(request_id);
  if (found->second.outstanding == 0 && found->second.next == found->second.plan.size()) {
    session->fetches.erase(found);
  }
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
