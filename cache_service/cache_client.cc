#include "cache_service/cache_client.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "cache_service/cache_client_impl.h"

namespace kvant {
namespace {

using Kind = ClientEvent::Kind;

Status PassedDeadline(std::string_view what) {
  return MakeStatus(StatusCode::kDeadlineExceeded,
                    "{}: the shard did not answer in time; go on without it", what);
}

// What a reply says of present blocks; nothing where its lists do not fit one another.
std::optional<std::vector<LookupBlock>> ParsePresent(const wire::LookupReply& reply) {
  if (reply.payload_bytes_size() != reply.cuts_size()) return std::nullopt;
  std::vector<LookupBlock> present(static_cast<size_t>(reply.cuts_size()));
  int next_end = 0;
  for (int i = 0; i < reply.cuts_size(); ++i) {
    LookupBlock& block = present[static_cast<size_t>(i)];
    block.state = LookupState::kPresent;
    block.cuts = UnpackCuts(reply.cuts(i));
    block.payload_bytes = reply.payload_bytes(i);
    block.cut_ends.fill(block.payload_bytes);
    uint64_t before = 0;
    for (int cut = 0; cut + 1 < CutCount(block.cuts); ++cut) {
      if (next_end == reply.cut_ends_size()) return std::nullopt;
      const uint64_t end = reply.cut_ends(next_end++);
      if (end <= before || end >= block.payload_bytes) return std::nullopt;
      before = block.cut_ends[static_cast<size_t>(cut)] = end;
    }
  }
  if (next_end != reply.cut_ends_size()) return std::nullopt;
  return present;
}

}  // namespace

// ---- Shards and messages.

uint64_t CacheClient::Impl::NewRequest(Request::Kind kind, OpId op, size_t shard) {
  requests_[next_request_] = {kind, op, shard};
  return next_request_++;
}

wire::Envelope CacheClient::Impl::Ask(uint64_t request_id, TimePoint deadline,
                                      TimePoint now) const {
  wire::Envelope envelope;
  envelope.set_version(kProtocolVersion);
  envelope.set_epoch(map_.epoch());
  envelope.set_request_id(request_id);
  envelope.set_deadline_ms(
      WholeMs(std::clamp<Duration>(deadline - now, Duration(1), kMaxDeadline)));
  return envelope;
}

void CacheClient::Impl::Send(size_t shard, const wire::Envelope& envelope) {
  if (endpoints_[shard] == 0) return;
  Action action;
  action.kind = Action::Kind::kSend;
  action.endpoint = endpoints_[shard];
  action.message = EncodeMessage(envelope);
  actions_.push_back(std::move(action));
}

Status CacheClient::Impl::Unreachable(size_t shard) const {
  return Unavailable("shard {} is not reachable; go on without it", map_.shards()[shard].address);
}

Result<ExposedWindow> CacheClient::Impl::Expose(const Lease& buffer, size_t shard, uint64_t length,
                                                Access access) {
  if (!Reachable(shard)) return Unreachable(shard);
  Result<ExposedWindow> window = arena_->Expose(buffer, endpoints_[shard], 0, length, access);
  if (window.status().code() == StatusCode::kUnavailable) return Unreachable(shard);
  return window;
}

ClientEvent& CacheClient::Impl::Report(Kind kind, OpId op, Status status) {
  if (status.code() == StatusCode::kDeadlineExceeded) ++stats_.deadlines_missed;
  ClientEvent& event = events_.emplace_back();
  event.kind = kind;
  event.op = op;
  event.status = std::move(status);
  return event;
}

void CacheClient::Impl::BindShard(size_t shard, EndpointId endpoint, TimePoint now) {
  KV_CHECK(shard < endpoints_.size() && endpoint != 0);
  if (endpoints_[shard] != 0) OnClosed(endpoints_[shard]);
  endpoints_[shard] = endpoint;
  shard_of_[endpoint] = shard;
  wire::Envelope hello = Ask(0, now + kMaxDeadline, now);
  hello.mutable_hello()->set_name(options_.name);
  Send(shard, hello);
}

bool CacheClient::Impl::OnEvent(const Event& event, TimePoint now) {
  const auto shard = shard_of_.find(event.endpoint);
  if (shard == shard_of_.end()) return false;
  if (event.kind == Event::Kind::kMessage) {
    OnMessage(shard->second, event.message, now);
  } else if (event.kind == Event::Kind::kClosed) {
    OnClosed(event.endpoint);
  } else if (event.kind == Event::Kind::kWritten) {
    return OnWritten(event, now);
  }
  return true;
}

void CacheClient::Impl::OnMessage(size_t shard, std::span<const std::byte> bytes, TimePoint now) {
  wire::Envelope answer;
  if (!DecodeMessage(bytes, &answer).ok()) {
    ++stats_.malformed_messages;
    return;
  }
  // Answers to what has ended meanwhile, and to Hello, find nobody.
  const auto found = requests_.find(answer.request_id());
  if (found == requests_.end() || found->second.shard != shard) return;
  const Request request = found->second;
  const uint64_t id = answer.request_id();
  switch (answer.body_case()) {
    case wire::Envelope::kLookupReply:
      if (request.kind == Request::Kind::kLookup) OnLookupReply(id, request, answer.lookup_reply());
      return;
    case wire::Envelope::kFetchReply:
      if (request.kind == Request::Kind::kFetch) {
        OnFetchReply(id, request, answer.fetch_reply(), now);
      }
      return;
    case wire::Envelope::kFetchItemFailed: {
      if (request.kind != Request::Kind::kFetch) return;
      FetchOp& fetch = fetches_.at(request.op);
      FetchPart& part = fetch.parts.at(id);
      const uint32_t index = answer.fetch_item_failed().item();
      if (index >= part.items.size()) return;
      EndItem(&fetch, request.op, &part, part.items[index],
              FromWire(answer.fetch_item_failed().status()), false);
      return EndFetchIfDone(request.op);
    }
    case wire::Envelope::kPutReply:
      if (request.kind == Request::Kind::kPut) OnPutReply(request, answer.put_reply(), now);
      return;
    case wire::Envelope::kStatsReply:
      if (request.kind == Request::Kind::kCall) {
        EndCall(request.op, OkStatus(), answer.stats_reply().json());
      }
      return;
    case wire::Envelope::kDone:
      return OnRefused(id, request, FromWire(answer.done().status()));
    default:
      ++stats_.malformed_messages;
  }
}

void CacheClient::Impl::OnRefused(uint64_t request_id, const Request& request,
                                  const Status& status) {
  switch (request.kind) {
    case Request::Kind::kLookup:
      return EndLookupPart(request_id, request.op, status);
    case Request::Kind::kFetch:
      EndPart(&fetches_.at(request.op), request.op, request_id,
              status.ok() ? Unavailable("the shard did not answer a fetch with a reply") : status);
      return EndFetchIfDone(request.op);
    case Request::Kind::kPut:
      return EndPut(
          request.op,
          status.ok() ? Unavailable("the shard did not answer a put with a reply") : status, false,
          false, {});
    case Request::Kind::kCall:
      return EndCall(request.op, status, "");
  }
}

void CacheClient::Impl::OnClosed(EndpointId endpoint) {
  const auto found = shard_of_.find(endpoint);
  if (found == shard_of_.end()) return;
  const size_t shard = found->second;
  shard_of_.erase(found);
  if (endpoints_[shard] == endpoint) endpoints_[shard] = 0;
  std::vector<std::pair<uint64_t, Request>> lost;
  for (const auto& entry : requests_) {
    if (entry.second.shard == shard) lost.push_back(entry);
  }
  for (const auto& [id, request] : lost) {
    // Ending one may have ended others.
    if (requests_.contains(id)) OnRefused(id, request, Unreachable(shard));
  }
}

// ---- Lookup.

OpId CacheClient::Impl::Lookup(std::span<const BlockKey> chain, Duration lease, TimePoint deadline,
                               TimePoint now) {
  const OpId op = next_op_++;
  ++stats_.lookups;
  LookupOp& lookup = lookups_[op];
  lookup.deadline = deadline;
  lookup.blocks.resize(chain.size());
  std::map<size_t, std::vector<size_t>> by_shard;
  size_t owner = 0;
  for (size_t i = 0; i < chain.size(); ++i) {
    if (i % kRunBlocks == 0) owner = map_.Owner(RunOf(chain, i));
    by_shard[owner].push_back(i);
    lookup.blocks[i].state = LookupState::kUnreachable;
  }
  for (const auto& [shard, indices] : by_shard) {
    if (!Reachable(shard)) continue;
    for (size_t begin = 0; begin < indices.size(); begin += kMaxChain) {
      const size_t end = std::min(indices.size(), begin + kMaxChain);
      const uint64_t id = NewRequest(Request::Kind::kLookup, op, shard);
      wire::Envelope ask = Ask(id, deadline, now);
      if (lease > Duration::zero()) ask.mutable_lookup()->set_lease_ms(WholeMs(lease));
      std::string* keys = ask.mutable_lookup()->mutable_keys();
      for (size_t i = begin; i < end; ++i) *keys += ToWire(chain[indices[i]]);
      lookup.waiting[id].assign(indices.begin() + static_cast<ptrdiff_t>(begin),
                                indices.begin() + static_cast<ptrdiff_t>(end));
      Send(shard, ask);
    }
  }
  if (lookup.waiting.empty()) EndLookup(op, OkStatus());
  return op;
}

void CacheClient::Impl::OnLookupReply(uint64_t request_id, const Request& request,
                                      const wire::LookupReply& reply) {
  LookupOp& lookup = lookups_.at(request.op);
  const std::vector<size_t>& indices = lookup.waiting.at(request_id);
  const std::string& states = reply.states();
  const auto present =
      std::count(states.begin(), states.end(), static_cast<char>(LookupState::kPresent));
  const std::optional<std::vector<LookupBlock>> described = ParsePresent(reply);
  if (states.size() != indices.size() || !described ||
      described->size() != static_cast<size_t>(present)) {
    ++stats_.malformed_messages;
    return EndLookupPart(request_id, request.op, OkStatus());
  }
  size_t next = 0;
  for (size_t i = 0; i < indices.size(); ++i) {
    LookupBlock& block = lookup.blocks[indices[i]];
    block.state = static_cast<LookupState>(std::min<uint8_t>(
        static_cast<uint8_t>(states[i]), static_cast<uint8_t>(LookupState::kUnreachable)));
    if (block.state == LookupState::kPresent) block = (*described)[next++];
  }
  EndLookupPart(request_id, request.op, OkStatus());
}

void CacheClient::Impl::EndLookupPart(uint64_t request_id, OpId op, const Status& status) {
  LookupOp& lookup = lookups_.at(op);
  if (status.code() == StatusCode::kStaleEpoch) lookup.status = status;
  requests_.erase(request_id);
  lookup.waiting.erase(request_id);
  if (lookup.waiting.empty()) EndLookup(op, lookup.status);
}

void CacheClient::Impl::EndLookup(OpId op, const Status& status) {
  const auto found = lookups_.find(op);
  for (const auto& [id, indices] : found->second.waiting) requests_.erase(id);
  ClientEvent& event = Report(Kind::kLookupDone, op, status);
  event.blocks = std::move(found->second.blocks);
  while (event.prefix_blocks < event.blocks.size() &&
         event.blocks[event.prefix_blocks].state == LookupState::kPresent) {
    ++event.prefix_blocks;
  }
  lookups_.erase(found);
}

// ---- Small calls, deadlines.

OpId CacheClient::Impl::Pin(const BlockKey& key, uint64_t run, Duration duration,
                            TimePoint deadline, TimePoint now) {
  const OpId op = next_op_++;
  const size_t shard = map_.Owner(run);
  CallOp& call = calls_[op];
  call = {deadline, NewRequest(Request::Kind::kCall, op, shard), Kind::kPinDone};
  if (!Reachable(shard)) {
    EndCall(op, Unreachable(shard), "");
    return op;
  }
  wire::Envelope ask = Ask(call.request_id, deadline, now);
  ask.mutable_pin()->set_key(ToWire(key));
  if (duration > Duration::zero()) ask.mutable_pin()->set_duration_ms(WholeMs(duration));
  Send(shard, ask);
  return op;
}

OpId CacheClient::Impl::Stats(size_t shard, TimePoint deadline, TimePoint now) {
  KV_CHECK(shard < map_.size());
  const OpId op = next_op_++;
  CallOp& call = calls_[op];
  call = {deadline, NewRequest(Request::Kind::kCall, op, shard), Kind::kStatsDone};
  if (!Reachable(shard)) {
    EndCall(op, Unreachable(shard), "");
    return op;
  }
  wire::Envelope ask = Ask(call.request_id, deadline, now);
  ask.mutable_stats();
  Send(shard, ask);
  return op;
}

void CacheClient::Impl::EndCall(OpId op, const Status& status, std::string text) {
  const auto found = calls_.find(op);
  const Kind kind = found->second.event;
  requests_.erase(found->second.request_id);
  calls_.erase(found);
  Report(kind, op, status).text = std::move(text);
}

void CacheClient::Impl::ReportCorrupt(const BlockKey& key, uint64_t run, TimePoint now) {
  wire::Envelope ask = Ask(0, now + kMaxDeadline, now);
  ask.mutable_report_corrupt()->set_key(ToWire(key));
  Send(map_.Owner(run), ask);
}

void CacheClient::Impl::Cancel(OpId op, TimePoint now) {
  const Status status(StatusCode::kCancelled, "the caller gave it up");
  if (lookups_.contains(op)) return EndLookup(op, status);
  if (fetches_.contains(op)) return EndFetch(op, status);
  if (puts_.contains(op)) return EndPut(op, status, false, true, now);
  if (calls_.contains(op)) EndCall(op, status, "");
}

void CacheClient::Impl::Tick(TimePoint now) {
  const auto overdue = [&](const auto& ops, const auto& deadline_of) {
    std::vector<OpId> late;
    for (const auto& [op, state] : ops) {
      if (deadline_of(state) <= now) late.push_back(op);
    }
    return late;
  };
  for (const OpId op : overdue(lookups_, [](const auto& state) { return state.deadline; })) {
    ++stats_.deadlines_missed;
    EndLookup(op, OkStatus());
  }
  for (const OpId op :
       overdue(fetches_, [](const auto& state) { return state.request.deadline; })) {
    EndFetch(op, PassedDeadline("fetch"));
  }
  for (const OpId op : overdue(puts_, [](const auto& state) { return state.request.deadline; })) {
    EndPut(op, PassedDeadline("put"), false, true, now);
  }
  for (const OpId op : overdue(calls_, [](const auto& state) { return state.deadline; })) {
    EndCall(op, PassedDeadline("call"), "");
  }
}

void CacheClient::Impl::TakeActions(std::vector<Action>* out) {
  std::move(actions_.begin(), actions_.end(), std::back_inserter(*out));
  actions_.clear();
}

void CacheClient::Impl::TakeEvents(std::vector<ClientEvent>* out) {
  std::move(events_.begin(), events_.end(), std::back_inserter(*out));
  events_.clear();
}

CacheClient::CacheClient(ShardMap map, RegisteredArena* arena, CacheClientOptions options)
    : impl_(std::make_unique<Impl>(std::move(map), arena, std::move(options))) {}
CacheClient::~CacheClient() = default;
void CacheClient::BindShard(size_t shard, EndpointId endpoint, TimePoint now) {
  impl_->BindShard(shard, endpoint, now);
}
bool CacheClient::Reachable(size_t shard) const { return impl_->Reachable(shard); }
const ShardMap& CacheClient::map() const { return impl_->map(); }
OpId CacheClient::Lookup(std::span<const BlockKey> chain, Duration lease, TimePoint deadline,
                         TimePoint now) {
  return impl_->Lookup(chain, lease, deadline, now);
}
OpId CacheClient::Fetch(FetchRequest request, TimePoint now) {
  return impl_->Fetch(std::move(request), now);
}
OpId CacheClient::BeginPut(const PutRequest& request, TimePoint now) {
  return impl_->BeginPut(request, now);
}
void CacheClient::PutReady(OpId op, uint64_t payload_offset, uint64_t length, TimePoint now) {
  impl_->PutReady(op, payload_offset, length, now);
}
void CacheClient::SealPut(OpId op, const BlockManifest& manifest, TimePoint now) {
  impl_->SealPut(op, manifest, now);
}
void CacheClient::Cancel(OpId op, TimePoint now) { impl_->Cancel(op, now); }
OpId CacheClient::Pin(const BlockKey& key, uint64_t run, Duration duration, TimePoint deadline,
                      TimePoint now) {
  return impl_->Pin(key, run, duration, deadline, now);
}
OpId CacheClient::Stats(size_t shard, TimePoint deadline, TimePoint now) {
  return impl_->Stats(shard, deadline, now);
}
void CacheClient::ReportCorrupt(const BlockKey& key, uint64_t run, TimePoint now) {
  impl_->ReportCorrupt(key, run, now);
}
bool CacheClient::OnEvent(const Event& event, TimePoint now) { return impl_->OnEvent(event, now); }
void CacheClient::Tick(TimePoint now) { impl_->Tick(now); }
void CacheClient::TakeActions(std::vector<Action>* out) { impl_->TakeActions(out); }
void CacheClient::TakeEvents(std::vector<ClientEvent>* out) { impl_->TakeEvents(out); }
size_t CacheClient::open_operations() const { return impl_->open_operations(); }
const ClientStats& CacheClient::stats() const { return impl_->stats(); }

}  // namespace kvant
