#include "cache_service/cache_client.h"

#include <algorithm>
#include <map>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "cache_service/arriving_block.h"
#include "cache_service/wire.h"

namespace kvant {
namespace {

using Kind = ClientEvent::Kind;

uint32_t ToMs(Duration duration) {
  const auto ms = std::chrono::ceil<std::chrono::milliseconds>(duration).count();
  return static_cast<uint32_t>(std::clamp<int64_t>(ms, 1, UINT32_MAX));
}
Status PassedDeadline(std::string_view what) {
  return MakeStatus(StatusCode::kDeadlineExceeded,
                    "{}: the shard did not answer in time; go on without it", what);
}

}  // namespace

class CacheClient::Impl {
 public:
  Impl(ShardMap map, RegisteredArena* arena, CacheClientOptions options)
      : map_(std::move(map)),
        arena_(arena),
        options_(std::move(options)),
        endpoints_(map_.size(), 0) {}

  void BindShard(size_t shard, EndpointId endpoint, TimePoint now);
  bool Reachable(size_t shard) const { return endpoints_[shard] != 0; }
  const ShardMap& map() const { return map_; }
  OpId Lookup(std::span<const BlockKey> chain, Duration lease, TimePoint deadline, TimePoint now);
  OpId Fetch(FetchRequest request, TimePoint now);
  OpId BeginPut(const PutRequest& request, TimePoint now);
  void PutReady(OpId op, uint64_t payload_offset, uint64_t length, TimePoint now);
  void SealPut(OpId op, const BlockManifest& manifest, TimePoint now);
  void Cancel(OpId op, TimePoint now);
  OpId Pin(const BlockKey& key, uint64_t run, Duration duration, TimePoint deadline, TimePoint now);
  OpId Stats(size_t shard, TimePoint deadline, TimePoint now);
  void ReportCorrupt(const BlockKey& key, uint64_t run, TimePoint now);
  bool OnEvent(const Event& event, TimePoint now);
  void Tick(TimePoint now);
  void TakeActions(std::vector<Action>* out);
  void TakeEvents(std::vector<ClientEvent>* out);
  size_t open_operations() const {
    return lookups_.size() + fetches_.size() + puts_.size() + calls_.size();
  }
  const ClientStats& stats() const { return stats_; }

 private:
  // A message on its way, or answered in pieces: what the answer is about.
  struct Request {
    enum class Kind : uint8_t { kLookup, kFetch, kPut, kCall } kind = Kind::kLookup;
    OpId op = 0;
    size_t shard = 0;
  };
  struct LookupOp {
    TimePoint deadline{};
    std::vector<LookupBlock> blocks;
    std::map<uint64_t, std::vector<size_t>> waiting;  // request to indices of its keys
  };
  struct FetchPart {
    std::vector<size_t> items;         // of the operation
    std::vector<uint32_t> immediates;  // base by item of the part, increasing
    EndpointId endpoint = 0;
    ExposedWindow window;
    size_t open = 0;  // items not ended
  };
  struct FetchOp {
    FetchRequest request;
    std::vector<ArrivingBlock> blocks;  // by item
    std::vector<bool> ended;            // by item
    size_t open = 0;
    Status status;
    std::map<uint64_t, FetchPart> parts;  // by request
  };
  struct PutOp {
    PutRequest request;
    size_t shard = 0;
    uint64_t request_id = 0;
    bool reserved = false;
    bool sealing = false;
    std::vector<std::byte> manifest;                   // while sealing
    std::vector<std::pair<uint64_t, uint64_t>> ready;  // offset, length; not announced yet
    ExposedWindow window;
  };
  struct CallOp {
    TimePoint deadline{};
    uint64_t request_id = 0;
    Kind event = Kind::kPinDone;
  };

  uint64_t NewRequest(Request::Kind kind, OpId op, size_t shard);
  wire::Envelope Ask(uint64_t request_id, TimePoint deadline, TimePoint now) const;
  void Send(size_t shard, const wire::Envelope& envelope);
  Status Unreachable(size_t shard) const;

  void OnMessage(size_t shard, std::span<const std::byte> bytes, TimePoint now);
  void OnRefused(uint64_t request_id, const Request& request, const Status& status);
  void OnClosed(EndpointId endpoint);
  bool OnWritten(const Event& event, TimePoint now);

  void OnLookupReply(uint64_t request_id, const Request& request, const wire::LookupReply& reply);
  // status not ok: those keys stay kUnreachable.
  void EndLookupPart(uint64_t request_id, OpId op);
  void EndLookup(OpId op, const Status& status);

  void StartPart(OpId op, FetchOp* fetch, size_t shard, std::vector<size_t> items, TimePoint now);
  void OnFetchReply(uint64_t request_id, const Request& request, const wire::FetchReply& reply,
                    TimePoint now);
  void OnFetchItem(FetchOp* fetch, OpId op, FetchPart* part, size_t item,
                   const wire::FetchItemReply& reply, TimePoint now);
  void ReportLayers(FetchOp* fetch, OpId op, FetchPart* part, size_t item, TimePoint now);
  void EndItem(FetchOp* fetch, OpId op, FetchPart* part, size_t item, const Status& status,
               bool present);
  void EndPart(FetchOp* fetch, OpId op, uint64_t request_id, const Status& status);
  void EndFetchIfDone(OpId op);
  void EndFetch(OpId op, const Status& status);

  void OnPutReply(const Request& request, const wire::PutReply& reply, TimePoint now);
  void SendReady(PutOp* put, TimePoint now);
  void SendSeal(PutOp* put, TimePoint now);
  void EndPut(OpId op, const Status& status, bool already_there, bool tell_shard, TimePoint now);

  void EndCall(OpId op, const Status& status, std::string text);
  ClientEvent& Report(Kind kind, OpId op, Status status);

  ShardMap map_;
  RegisteredArena* arena_;
  CacheClientOptions options_;
  std::vector<EndpointId> endpoints_;  // by shard, 0: not reached
  std::map<EndpointId, size_t> shard_of_;
  std::map<uint64_t, Request> requests_;
  std::map<std::pair<EndpointId, uint64_t>, uint64_t> windows_;  // of fetches, to their request
  std::map<OpId, LookupOp> lookups_;
  std::map<OpId, FetchOp> fetches_;
  std::map<OpId, PutOp> puts_;
  std::map<OpId, CallOp> calls_;
  std::vector<Action> actions_;
  std::vector<ClientEvent> events_;
  uint64_t next_op_ = 1;
  uint64_t next_request_ = 1;
  ClientStats stats_;
};

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
  envelope.set_deadline_ms(ToMs(std::clamp<Duration>(deadline - now, Duration(1), kMaxDeadline)));
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
      return EndLookupPart(request_id, request.op);
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
      if (lease > Duration::zero()) ask.mutable_lookup()->set_lease_ms(ToMs(lease));
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
  if (states.size() != indices.size() || reply.cuts_size() != present ||
      reply.payload_bytes_size() != present) {
    ++stats_.malformed_messages;
    return EndLookupPart(request_id, request.op);
  }
  int next = 0;
  for (size_t i = 0; i < indices.size(); ++i) {
    LookupBlock& block = lookup.blocks[indices[i]];
    block.state = static_cast<LookupState>(std::min<uint8_t>(
        static_cast<uint8_t>(states[i]), static_cast<uint8_t>(LookupState::kUnreachable)));
    if (block.state != LookupState::kPresent) continue;
    block.cuts = UnpackCuts(reply.cuts(next));
    block.payload_bytes = reply.payload_bytes(next);
    ++next;
  }
  EndLookupPart(request_id, request.op);
}

void CacheClient::Impl::EndLookupPart(uint64_t request_id, OpId op) {
  LookupOp& lookup = lookups_.at(op);
  requests_.erase(request_id);
  lookup.waiting.erase(request_id);
  if (lookup.waiting.empty()) EndLookup(op, OkStatus());
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

// ---- Fetch.

OpId CacheClient::Impl::Fetch(FetchRequest request, TimePoint now) {
  const OpId op = next_op_++;
  FetchOp& fetch = fetches_[op];
  fetch.request = std::move(request);
  const std::vector<FetchItem>& items = fetch.request.items;
  KV_CHECK(fetch.request.buffer != nullptr && *fetch.request.buffer);
  fetch.ended.assign(items.size(), false);
  fetch.open = items.size();
  fetch.blocks.resize(items.size());
  std::map<size_t, std::vector<size_t>> by_shard;
  for (size_t i = 0; i < items.size(); ++i) {
    const Selection& selection = items[i].selection;
    if (!RangeFits(items[i].offset, items[i].capacity, fetch.request.buffer->size()) ||
        selection.layer_begin >= selection.layer_end || selection.layer_end > kMaxLayers ||
        items[i].key.IsZero()) {
      EndItem(&fetch, op, nullptr, i,
              InvalidArgument("fetch: item {}: {} bytes at {} of {}, layers {} to {} are not "
                              "possible",
                              i, items[i].capacity, items[i].offset, fetch.request.buffer->size(),
                              selection.layer_begin, selection.layer_end),
              false);
      continue;
    }
    fetch.blocks[i] = ArrivingBlock(items[i].key, selection, items[i].capacity);
    by_shard[map_.Owner(items[i].run)].push_back(i);
  }
  for (auto& [shard, indices] : by_shard) {
    for (size_t begin = 0; begin < indices.size(); begin += kMaxFetchItems) {
      const size_t end = std::min(indices.size(), begin + kMaxFetchItems);
      StartPart(op, &fetch, shard,
                {indices.begin() + static_cast<ptrdiff_t>(begin),
                 indices.begin() + static_cast<ptrdiff_t>(end)},
                now);
    }
  }
  EndFetchIfDone(op);
  return op;
}

void CacheClient::Impl::StartPart(OpId op, FetchOp* fetch, size_t shard, std::vector<size_t> items,
                                  TimePoint now) {
  const Lease& buffer = *fetch->request.buffer;
  Result<ExposedWindow> window =
      Reachable(shard)
          ? arena_->Expose(buffer, endpoints_[shard], 0, buffer.size(), Access::kRemoteWrite)
          : Result<ExposedWindow>(Unreachable(shard));
  if (!window.ok()) {
    for (const size_t item : items) EndItem(fetch, op, nullptr, item, window.status(), false);
    return;
  }
  const uint64_t id = NewRequest(Request::Kind::kFetch, op, shard);
  FetchPart& part = fetch->parts[id];
  part.window = *std::move(window);
  part.open = items.size();
  part.endpoint = endpoints_[shard];
  windows_[{part.endpoint, part.window.remote().id}] = id;
  wire::Envelope ask = Ask(id, fetch->request.deadline, now);
  wire::Fetch* message = ask.mutable_fetch();
  ToWire(part.window.remote(), message->mutable_window());
  uint32_t immediate = 0;
  const Selection* last = nullptr;
  for (const size_t index : items) {
    const FetchItem& item = fetch->request.items[index];
    if (last == nullptr || !(*last == item.selection)) {
      ToWire(item.selection, message->add_selections());
      last = &item.selection;
    }
    wire::FetchItem* wanted = message->add_items();
    wanted->set_key(ToWire(item.key));
    wanted->set_selection(static_cast<uint32_t>(message->selections_size() - 1));
    wanted->set_offset(item.offset);
    wanted->set_capacity(item.capacity);
    wanted->set_immediate_base(immediate);
    part.immediates.push_back(immediate);
    immediate += static_cast<uint32_t>(fetch->blocks[index].layers());
  }
  part.items = std::move(items);
  Send(shard, ask);
}

void CacheClient::Impl::OnFetchReply(uint64_t request_id, const Request& request,
                                     const wire::FetchReply& reply, TimePoint now) {
  FetchOp& fetch = fetches_.at(request.op);
  const Status status = FromWire(reply.status());
  if (!status.ok()) {
    EndPart(&fetch, request.op, request_id, status);
    return EndFetchIfDone(request.op);
  }
  FetchPart& part = fetch.parts.at(request_id);
  if (!RangeFits(reply.first_item(), static_cast<uint64_t>(reply.items_size()),
                 part.items.size())) {
    ++stats_.malformed_messages;
    return;
  }
  for (int i = 0; i < reply.items_size(); ++i) {
    const size_t item = part.items[reply.first_item() + static_cast<size_t>(i)];
    OnFetchItem(&fetch, request.op, &part, item, reply.items(i), now);
  }
  EndFetchIfDone(request.op);
}

void CacheClient::Impl::OnFetchItem(FetchOp* fetch, OpId op, FetchPart* part, size_t item,
                                    const wire::FetchItemReply& reply, TimePoint now) {
  ArrivingBlock& block = fetch->blocks[item];
  if (fetch->ended[item] || block.manifest() != nullptr) return;
  if (reply.code() != 0) {
    wire::Status refused;
    refused.set_code(reply.code());
    refused.set_message(fmt::format("the shard refused block {}", block.key().ShortHex()));
    return EndItem(fetch, op, part, item, FromWire(refused), false);
  }
  if (!reply.present()) return EndItem(fetch, op, part, item, OkStatus(), false);
  const Status status = block.SetManifest(AsBytes(reply.manifest()));
  if (!status.ok()) {
    if (status.code() == StatusCode::kDataLoss) {
      ++stats_.data_loss;
      ReportCorrupt(block.key(), fetch->request.items[item].run, now);
    }
    return EndItem(fetch, op, part, item, status, false);
  }
  ReportLayers(fetch, op, part, item, now);
}

bool CacheClient::Impl::OnWritten(const Event& event, TimePoint now) {
  const auto window = windows_.find({event.endpoint, event.window});
  if (window == windows_.end()) return false;
  const Request request = requests_.at(window->second);
  FetchOp& fetch = fetches_.at(request.op);
  FetchPart& part = fetch.parts.at(window->second);
  const auto above =
      std::upper_bound(part.immediates.begin(), part.immediates.end(), event.immediate);
  if (above == part.immediates.begin()) return true;
  const auto index = static_cast<size_t>(above - part.immediates.begin()) - 1;
  const size_t item = part.items[index];
  if (fetch.ended[item] ||
      !fetch.blocks[item].SetWritten(event.immediate - part.immediates[index])) {
    return true;
  }
  ReportLayers(&fetch, request.op, &part, item, now);
  EndFetchIfDone(request.op);
  return true;
}

void CacheClient::Impl::ReportLayers(FetchOp* fetch, OpId op, FetchPart* part, size_t item,
                                     TimePoint now) {
  ArrivingBlock& block = fetch->blocks[item];
  const FetchItem& wanted = fetch->request.items[item];
  uint16_t layer = 0;
  while (block.TakeComplete(&layer)) {
    if (options_.verify) {
      uint64_t bytes = 0;
      const auto destination =
          fetch->request.buffer->bytes().subspan(wanted.offset, wanted.capacity);
      const Status status = block.Verify(layer, destination, &bytes);
      if (!status.ok()) {
        ++stats_.data_loss;
        ReportCorrupt(wanted.key, wanted.run, now);
        return EndItem(fetch, op, part, item, status, false);
      }
      stats_.payload_bytes_fetched += bytes;
    }
    ClientEvent& event = Report(Kind::kLayerArrived, op, OkStatus());
    event.item = item;
    event.layer = layer;
    event.present = true;
    event.manifest = block.manifest();
  }
  if (block.complete()) EndItem(fetch, op, part, item, OkStatus(), true);
}

void CacheClient::Impl::EndItem(FetchOp* fetch, OpId op, FetchPart* part, size_t item,
                                const Status& status, bool present) {
  if (fetch->ended[item]) return;
  fetch->ended[item] = true;
  --fetch->open;
  if (part != nullptr) --part->open;
  if (!status.ok()) {
    ++stats_.items_failed;
    if (fetch->status.ok()) fetch->status = status;
  } else {
    ++(present ? stats_.items_fetched : stats_.items_absent);
  }
  ClientEvent& event = Report(Kind::kItemDone, op, status);
  event.item = item;
  event.present = present;
  event.manifest = fetch->blocks[item].manifest();
}

void CacheClient::Impl::EndPart(FetchOp* fetch, OpId op, uint64_t request_id,
                                const Status& status) {
  FetchPart& part = fetch->parts.at(request_id);
  for (const size_t item : part.items) EndItem(fetch, op, &part, item, status, false);
}

void CacheClient::Impl::EndFetchIfDone(OpId op) {
  FetchOp& fetch = fetches_.at(op);
  // A shard that has nothing more to write loses its window at once.
  for (auto part = fetch.parts.begin(); part != fetch.parts.end();) {
    if (part->second.open > 0) {
      ++part;
      continue;
    }
    windows_.erase({part->second.endpoint, part->second.window.remote().id});
    requests_.erase(part->first);
    part = fetch.parts.erase(part);
  }
  if (fetch.open > 0) return;
  Report(Kind::kFetchDone, op, fetch.status);
  fetches_.erase(op);
}

void CacheClient::Impl::EndFetch(OpId op, const Status& status) {
  FetchOp& fetch = fetches_.at(op);
  std::vector<uint64_t> ids;
  for (const auto& [id, part] : fetch.parts) ids.push_back(id);
  for (const uint64_t id : ids) EndPart(&fetch, op, id, status);
  EndFetchIfDone(op);
}

// ---- Put.

OpId CacheClient::Impl::BeginPut(const PutRequest& request, TimePoint now) {
  const OpId op = next_op_++;
  PutOp& put = puts_[op];
  put.request = request;
  put.shard = map_.Owner(request.run);
  put.request_id = NewRequest(Request::Kind::kPut, op, put.shard);
  KV_CHECK(request.buffer != nullptr && *request.buffer);
  if (request.key.IsZero() || request.payload_bytes == 0 || request.manifest_rows == 0 ||
      request.manifest_rows > kMaxManifestRows || request.payload_bytes > request.buffer->size()) {
    EndPut(op,
           InvalidArgument("put of block {}: a payload of {} bytes in a buffer of {}, {} rows, is "
                           "not possible",
                           request.key.ShortHex(), request.payload_bytes, request.buffer->size(),
                           request.manifest_rows),
           false, false, now);
    return op;
  }
  if (!Reachable(put.shard)) {
    EndPut(op, Unreachable(put.shard), false, false, now);
    return op;
  }
  Result<ExposedWindow> window = arena_->Expose(*request.buffer, endpoints_[put.shard], 0,
                                                request.payload_bytes, Access::kRemoteRead);
  if (!window.ok()) {
    EndPut(op, window.status(), false, false, now);
    return op;
  }
  put.window = *std::move(window);
  wire::Envelope ask = Ask(put.request_id, request.deadline, now);
  wire::Reserve* reserve = ask.mutable_reserve();
  reserve->set_key(ToWire(request.key));
  if (!request.parent.IsZero()) reserve->set_parent(ToWire(request.parent));
  reserve->set_payload_bytes(request.payload_bytes);
  reserve->set_manifest_bytes(MaxManifestBytes(request.manifest_rows));
  ToWire(put.window.remote(), reserve->mutable_window());
  Send(put.shard, ask);
  return op;
}

void CacheClient::Impl::PutReady(OpId op, uint64_t payload_offset, uint64_t length, TimePoint now) {
  const auto found = puts_.find(op);
  if (found == puts_.end() || found->second.sealing) return;
  PutOp& put = found->second;
  KV_CHECK(RangeFits(payload_offset, length, put.request.payload_bytes));
  auto& ready = put.ready;
  if (!ready.empty() && ready.back().first + ready.back().second == payload_offset) {
    ready.back().second += length;
  } else {
    ready.emplace_back(payload_offset, length);
  }
  if (put.reserved) SendReady(&put, now);
}

void CacheClient::Impl::SendReady(PutOp* put, TimePoint now) {
  size_t next = 0;
  while (next < put->ready.size()) {
    wire::Envelope ask = Ask(put->request_id, put->request.deadline, now);
    const size_t end = std::min(put->ready.size(), next + kMaxPutRanges);
    for (; next < end; ++next) {
      ask.mutable_put_ranges()->add_ranges(put->ready[next].first);
      ask.mutable_put_ranges()->add_ranges(put->ready[next].second);
    }
    Send(put->shard, ask);
  }
  put->ready.clear();
}

void CacheClient::Impl::SealPut(OpId op, const BlockManifest& manifest, TimePoint now) {
  const auto found = puts_.find(op);
  if (found == puts_.end() || found->second.sealing) return;
  PutOp& put = found->second;
  Status status = manifest.Validate();
  if (status.ok() &&
      (manifest.key != put.request.key || manifest.payload_bytes() != put.request.payload_bytes ||
       manifest.rows.size() > put.request.manifest_rows)) {
    status = InvalidArgument(
        "put of block {}: {} bytes in at most {} rows were announced, the "
        "manifest is of block {} with {} bytes in {} rows",
        put.request.key.ShortHex(), put.request.payload_bytes, put.request.manifest_rows,
        manifest.key.ShortHex(), manifest.payload_bytes(), manifest.rows.size());
  }
  if (!status.ok()) return EndPut(op, status, false, true, now);
  put.sealing = true;
  put.manifest = EncodeManifest(manifest);
  if (put.reserved) SendSeal(&put, now);
}

void CacheClient::Impl::SendSeal(PutOp* put, TimePoint now) {
  // The shard reads whatever was not announced: Seal says that all of it is there.
  put->ready.clear();
  wire::Envelope ask = Ask(put->request_id, put->request.deadline, now);
  ask.mutable_seal()->set_manifest(ToWire(put->manifest));
  Send(put->shard, ask);
}

void CacheClient::Impl::OnPutReply(const Request& request, const wire::PutReply& reply,
                                   TimePoint now) {
  PutOp& put = puts_.at(request.op);
  switch (reply.phase()) {
    case wire::PutReply::RESERVED:
      if (put.reserved) return;
      put.reserved = true;
      if (put.sealing) {
        SendSeal(&put, now);
      } else {
        SendReady(&put, now);
      }
      return;
    case wire::PutReply::ALREADY_THERE:
    case wire::PutReply::IN_PROGRESS:
      // Only the answer to Reserve can say so; a late copy of one that was overtaken is ignored.
      if (put.reserved) return;
      return EndPut(request.op, OkStatus(), true, false, now);
    case wire::PutReply::SEALED:
      if (put.sealing) EndPut(request.op, OkStatus(), false, false, now);
      return;
    default: {
      const Status status = FromWire(reply.status());
      EndPut(request.op, status.ok() ? Unavailable("the shard gave the put up") : status, false,
             false, now);
    }
  }
}

void CacheClient::Impl::EndPut(OpId op, const Status& status, bool already_there, bool tell_shard,
                               TimePoint now) {
  const auto found = puts_.find(op);
  PutOp& put = found->second;
  if (tell_shard) {
    wire::Envelope ask = Ask(put.request_id, put.request.deadline, now);
    ask.mutable_abort();
    Send(put.shard, ask);
  }
  if (!status.ok()) {
    ++stats_.puts_failed;
  } else if (already_there) {
    ++stats_.puts_already_there;
  } else {
    ++stats_.puts_sealed;
    stats_.payload_bytes_put += put.request.payload_bytes;
  }
  requests_.erase(put.request_id);
  puts_.erase(found);
  Report(Kind::kPutDone, op, status).already_there = already_there;
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
  if (duration > Duration::zero()) ask.mutable_pin()->set_duration_ms(ToMs(duration));
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
