#include "node/tier_link.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "node/block_arrival.h"

namespace kvant::node {
namespace {

// One fetch covers at most so many blocks, so that the first layers of a long prefix are not held
// up by the lookups of its end.
constexpr size_t kFetchBlocks = 16;
// A shard is told of a put's bytes when so many have been computed, or all: a message for each row
// would cost more than its rows gain by travelling early.
constexpr uint64_t kPutChunkBytes = uint64_t{128} << 10;
// And at most this share of the arena, so that several fetches and puts go on at once.
constexpr uint64_t kArenaShare = 4;
// Forms that a warning names; more are a mistake, or malice, that need no line each.
constexpr size_t kMaxWarned = 16;
// While others decode, the network is looked at so often.
constexpr Duration kLookAgainAfter = std::chrono::microseconds(200);

}  // namespace

// What is known of one operation of the client until it is done.
struct TierLink::Operation {
  enum class Kind : uint8_t { kLookup, kFetch, kPut };
  // Of a block, the rows of one selection. Few blocks have two.
  struct Item {
    size_t arrival = 0;  // index into arrivals
    uint64_t run = 0;
    uint64_t offset = 0;  // in the buffer
    Selection selection;
    std::vector<SelectedRow> rows;  // of the manifest, once it came
  };
  Kind kind = Kind::kLookup;
  TimePoint started{};
  std::shared_ptr<Lease> buffer;
  LookupDone lookup_done;
  FetchDone fetch_done;
  PutDone put_done;
  std::optional<Status> outcome;       // of a put that ended before it was sealed
  std::vector<BlockArrival> arrivals;  // of a fetch; they stay in place
  bool arrived = false;                // of a fetch: the client is done with it
  bool held = false;                   // then: it was not over, and is counted in held_
  size_t decoding = 0;                 // layers that others decode
  std::vector<Item> items;
  uint64_t arrived_bytes = 0;  // of a put: computed and not yet announced
  // [BlockClass::DecodeDepth] of a fetch, so far.
  std::array<Duration, kMaxChoices> decode_took{};
  std::array<size_t, kMaxChoices> decoded_layers{};
  int next_layer = 0;  // of a put: the first that was not announced
};

Result<std::unique_ptr<TierLink>> TierLink::Create(Transport* transport, ShardMap map,
                                                   const BlockClass* block_class,
                                                   const Clock* clock, Planner* planner,
                                                   const TierLinkOptions& options) {
  CacheConnectionOptions connection_options;
  connection_options.arena_bytes =
      std::max(options.arena_bytes, 2 * block_class->most_stored_bytes());
  connection_options.client.name = options.name;
  // The link verifies its own copy of what arrives.
  connection_options.client.verify = false;
  KV_ASSIGN_OR_RETURN(
      std::unique_ptr<CacheConnection> connection,
      CacheConnection::Create(transport, std::move(map), clock, connection_options));
  std::unique_ptr<TierLink> link(new TierLink);
  link->connection_ = std::move(connection);
  link->transport_ = transport;
  link->block_class_ = block_class;
  link->clock_ = clock;
  link->planner_ = planner;
  link->meter_.emplace(planner, clock->Now());
  link->arena_bytes_ = connection_options.arena_bytes;
  link->timeout_ = options.timeout;
  if (options.pool != nullptr && options.pool->threads() > 1) {
    link->decoders_ = options.pool->threads();
    link->decoding_ = std::make_unique<BlockDecoding>(options.pool, clock);
  }
  return link;
}

TierLink::TierLink() = default;

TierLink::~TierLink() = default;

bool TierLink::Poll() {
  if (beside_) beside_();
  events_.clear();
  const bool progress = connection_->Poll(&events_);
  meter_->Looked(clock_->Now());
  // OnEvent may start operations but never polls, so the list stands still.
  for (const ClientEvent& event : events_) OnEvent(event);
  bool decoded = false;
  if (decoding_ != nullptr && decoding_->open() > 0) {
    decoded_.clear();
    decoded = decoding_->Take(&decoded_);
    for (const BlockDecoding::Outcome& outcome : decoded_) OnDecoded(outcome);
  }
  if (held_ > 0 || entering_known_ || (decoding_ != nullptr && decoding_->open() > 0)) {
    GiveUpDecoding();
    Resume();
  }
  return progress || !events_.empty() || decoded;
}

void TierLink::Wait(Duration at_most) {
  if (decoding_ != nullptr && decoding_->open() > 0) {
    decoding_->HelpOrWait(std::min(at_most, kLookAgainAfter));
    return;
  }
  transport_->Wait(at_most);
  meter_->Looked(clock_->Now());
}

void TierLink::Lookup(std::span<const BlockKey> chain, LookupDone done) {
  const TimePoint now = clock_->Now();
  auto operation = std::make_unique<Operation>();
  operation->started = now;
  operation->lookup_done = std::move(done);
  // The lease holds what was found until it is fetched.
  const OpId op = connection_->client().Lookup(chain, timeout_, now + timeout_, now);
  operations_[op] = std::move(operation);
  connection_->Flush();
}

bool TierLink::FetchTakes(size_t blocks, uint64_t bytes) const {
  return blocks <= 1 || (blocks <= kFetchBlocks && bytes <= arena_bytes_ / kArenaShare);
}

uint64_t TierLink::MissingBytes(const BlockFetch& fetch) const {
  const std::optional<Portion>& copied = fetch.block->copied;
  uint64_t bytes = 0;
  for (const Selection& selection :
       block_class_->Missing(copied ? &*copied : nullptr, fetch.block->portion)) {
    bytes += block_class_->MostBytes(selection, fetch.ends);
  }
  return bytes;
}

bool TierLink::Fetch(std::span<const BlockFetch> blocks, FetchDone done) {
  KV_CHECK(!blocks.empty());
  uint64_t total = 0;
  for (const BlockFetch& fetch : blocks) total += MissingBytes(fetch);
  const Result<std::shared_ptr<Lease>> buffer = connection_->Lend(total);
  if (!buffer.ok()) return false;

  const TimePoint now = clock_->Now();
  auto operation = std::make_unique<Operation>();
  operation->kind = Operation::Kind::kFetch;
  operation->started = now;
  operation->buffer = *buffer;
  operation->fetch_done = std::move(done);
  meter_->FetchBegan(now);
  FetchRequest request;
  request.buffer = *buffer;
  request.deadline = now + timeout_;
  uint64_t offset = 0;
  operation->arrivals.reserve(blocks.size());
  for (const BlockFetch& fetch : blocks) {
    const std::optional<Portion>& copied = fetch.block->copied;
    std::vector<Selection> missing =
        block_class_->Missing(copied ? &*copied : nullptr, fetch.block->portion);
    KV_CHECK(!missing.empty());
    for (Selection& selection : missing) {
      const uint64_t bytes = block_class_->MostBytes(selection, fetch.ends);
      request.items.push_back({fetch.block->key, fetch.run, selection, offset, bytes});
      operation->items.push_back(
          {operation->arrivals.size(), fetch.run, offset, std::move(selection), {}});
      offset += bytes;
    }
    operation->arrivals.emplace_back(block_class_, fetch.block, fetch.tokens, fetch.position);
  }
  operations_[connection_->client().Fetch(std::move(request), now)] = std::move(operation);
  connection_->Flush();
  return true;
}

TierLink::PutId TierLink::BeginPut(const BlockKey& key, const BlockKey& parent, uint64_t run,
                                   uint64_t stored_bytes) {
  const Result<std::shared_ptr<Lease>> buffer = connection_->Lend(stored_bytes);
  if (!buffer.ok()) return 0;
  const TimePoint now = clock_->Now();
  PutRequest request;
  request.key = key;
  request.parent = parent;
  request.run = run;
  request.payload_bytes = stored_bytes;
  request.manifest_rows = block_class_->form().rows().size();
  request.buffer = *buffer;
  request.deadline = now + timeout_;
  auto operation = std::make_unique<Operation>();
  operation->kind = Operation::Kind::kPut;
  operation->started = now;
  operation->buffer = *buffer;
  const OpId op = connection_->client().BeginPut(request, now);
  operations_[op] = std::move(operation);
  return op;
}

void TierLink::PutLayer(PutId put, int layer, std::span<const std::byte> payload) {
  const auto found = operations_.find(put);
  if (found == operations_.end() || found->second->outcome.has_value()) return;
  const std::span<std::byte> buffer = found->second->buffer->bytes();
  Operation& operation = *found->second;
  const kernels::PayloadLayout& layout = block_class_->layout();
  for (const kernels::PayloadRow& row : layout.rows()) {
    if (row.layer != layer) continue;
    std::memcpy(buffer.data() + row.offset, payload.data() + row.offset, row.length);
    operation.arrived_bytes += row.length;
  }
  const bool last = layer + 1 == layout.layers();
  if (operation.arrived_bytes < kPutChunkBytes && !last) return;
  // Layers of one extent stand one behind the other.
  for (const kernels::PayloadRow& row : layout.rows()) {
    if (row.layer != layer) continue;
    const uint64_t begin = layout.Row(row.kind, row.cut, operation.next_layer).offset;
    connection_->client().PutReady(put, begin, row.offset + row.length - begin, clock_->Now());
  }
  operation.next_layer = layer + 1;
  operation.arrived_bytes = 0;
}

void TierLink::PutAll(PutId put, std::span<const std::byte> stored) {
  const auto found = operations_.find(put);
  if (found == operations_.end() || found->second->outcome.has_value()) return;
  const std::span<std::byte> buffer = found->second->buffer->bytes();
  KV_CHECK(stored.size() <= buffer.size());
  std::memcpy(buffer.data(), stored.data(), stored.size());
  connection_->client().PutReady(put, 0, stored.size(), clock_->Now());
}

void TierLink::SealPut(PutId put, const BlockManifest& manifest, PutDone done) {
  const auto found = operations_.find(put);
  KV_CHECK(found != operations_.end());
  if (found->second->outcome.has_value()) {
    // It ended before it was sealed: its shard is gone, or somebody else put the block first.
    const Status outcome = *found->second->outcome;
    operations_.erase(found);
    done(outcome);
    return;
  }
  found->second->put_done = std::move(done);
  connection_->client().SealPut(put, manifest, clock_->Now());
}

void TierLink::CancelPut(PutId put) {
  const auto found = operations_.find(put);
  if (found == operations_.end()) return;
  if (!found->second->outcome.has_value()) connection_->client().Cancel(put, clock_->Now());
  operations_.erase(found);
}

void TierLink::FailBlock(const BlockArrival& arrival, const Status& status) {
  const CachedBlockPtr& block = arrival.block();
  if (block->complete() || !block->failed.ok()) return;
  if (decoding_ != nullptr) decoding_->Abandon(&arrival);
  block->failed = status;
  ++stats_.failed_blocks;
  spdlog::info("block {} was not fetched: {}", block->key.ShortHex(), status.ToString());
}

void TierLink::WarnUnread(const BlockManifest& manifest, const Status& status) {
  ++stats_.unread_blocks;
  const std::pair<uint32_t, std::optional<Digest>> form(manifest.codec, manifest.basis);
  if (warned_of_.size() >= kMaxWarned ||
      std::find(warned_of_.begin(), warned_of_.end(), form) != warned_of_.end()) {
    return;
  }
  warned_of_.push_back(form);
  spdlog::warn("block {} is recomputed, and so are others like it: {}", manifest.key.ShortHex(),
               status.message());
}

void TierLink::SawUnread(size_t blocks) {
  stats_.unread_blocks += blocks;
  if (std::exchange(warned_of_rows_, true)) return;
  spdlog::warn(
      "{} blocks are recomputed, and so are others like them: they are stored in other cuts than "
      "this node's; give all nodes of a tier the same --store, --cuts, --recompute and --also",
      blocks);
}

void TierLink::Refuse(Operation* operation, size_t index, const Status& status) {
  const BlockArrival& arrival = operation->arrivals[index];
  if (status.code() == StatusCode::kDataLoss) {
    ++stats_.data_loss;
    const auto item = std::find_if(operation->items.begin(), operation->items.end(),
                                   [&](const auto& of) { return of.arrival == index; });
    connection_->client().ReportCorrupt(arrival.block()->key, item->run, clock_->Now());
  }
  FailBlock(arrival, status);
}

void TierLink::SawDecoding(Operation* operation, const BlockArrival& arrival, size_t layers,
                           Duration took) {
  const size_t depth = block_class_->DecodeDepth(arrival.block()->portion.cuts);
  operation->decode_took[depth] += took;
  operation->decoded_layers[depth] += layers;
}

void TierLink::OnLayer(OpId op, Operation* operation, const ClientEvent& event) {
  Operation::Item& item = operation->items[event.item];
  BlockArrival& arrival = operation->arrivals[item.arrival];
  const CachedBlockPtr& block = arrival.block();
  if (!block->failed.ok()) return;
  const Status accepted = arrival.Accept(event.manifest);
  if (accepted.code() == StatusCode::kUnsupported) WarnUnread(*event.manifest, accepted);
  if (!accepted.ok()) return Refuse(operation, item.arrival, accepted);
  if (item.rows.empty()) item.rows = SelectRows(*event.manifest, item.selection);
  uint64_t bytes = 0;
  const TimePoint started = clock_->Now();
  const Status status = arrival.TakeLayer(event.layer, item.rows,
                                          operation->buffer->bytes().data() + item.offset, &bytes);
  SawDecoding(operation, arrival, 0, clock_->Now() - started);
  if (!status.ok()) return Refuse(operation, item.arrival, status);
  stats_.fetched_bytes += bytes;
  meter_->Arrived(bytes);
  Decode(op, operation, item.arrival);
}

void TierLink::Decode(OpId op, Operation* operation, size_t index) {
  BlockArrival& arrival = operation->arrivals[index];
  const CachedBlockPtr& block = arrival.block();
  if (decoding_ != nullptr && arrival.decodes_long()) {
    for (const uint16_t layer : arrival.TakeWhole()) {
      ++operation->decoding;
      decoding_->Begin(op, index, &arrival, layer);
    }
    return;
  }
  const TimePoint started = clock_->Now();
  const int missing = block->layers_missing;
  const Status status = arrival.DecodeWhole();
  SawDecoding(operation, arrival, static_cast<size_t>(missing - block->layers_missing),
              clock_->Now() - started);
  if (!status.ok()) Refuse(operation, index, status);
}

void TierLink::OnDecoded(const BlockDecoding::Outcome& outcome) {
  Operation* operation = operations_.at(outcome.operation).get();
  BlockArrival& arrival = operation->arrivals[outcome.index];
  --operation->decoding;
  if (!outcome.status.ok()) {
    // Of one that failed before, what was left comes back as cancelled.
    if (arrival.block()->failed.ok()) Refuse(operation, outcome.index, outcome.status);
  } else if (arrival.block()->failed.ok()) {
    arrival.MarkReady(outcome.ready);
    SawDecoding(operation, arrival, outcome.ready.size(),
                std::chrono::duration_cast<Duration>(outcome.took / decoders_));
  }
  EndOrHold(outcome.operation);
}

void TierLink::EndOrHold(OpId op) {
  Operation* operation = operations_.at(op).get();
  if (IsOver(*operation)) {
    FinishFetch(op);
  } else if (operation->arrived && operation->decoding == 0 && !operation->held) {
    operation->held = true;
    ++held_;
  }
}

bool TierLink::IsOver(const Operation& operation) {
  // What a block awaited may be there, and not seen yet by Resume.
  const auto waits = [](const BlockArrival& arrival) {
    const CachedBlock& block = *arrival.block();
    return block.failed.ok() && (block.awaits_entering() || arrival.has_whole());
  };
  return operation.arrived && operation.decoding == 0 &&
         std::none_of(operation.arrivals.begin(), operation.arrivals.end(), waits);
}

void TierLink::Resume() {
  if (!std::exchange(entering_known_, false) && held_ == 0) return;
  std::vector<OpId> over;
  for (const auto& [op, operation] : operations_) {
    for (size_t index = 0; index < operation->arrivals.size(); ++index) {
      const BlockArrival& arrival = operation->arrivals[index];
      if (arrival.has_whole() && arrival.block()->failed.ok()) Decode(op, operation.get(), index);
    }
    if (operation->held && IsOver(*operation)) over.push_back(op);
  }
  for (const OpId op : over) FinishFetch(op);
}

void TierLink::GiveUpDecoding() {
  const TimePoint now = clock_->Now();
  for (const auto& [op, operation] : operations_) {
    const bool too_late = operation->arrived && now >= operation->started + timeout_;
    for (const BlockArrival& arrival : operation->arrivals) {
      // Neither a sequence nor the node's cache.
      const bool wanted = arrival.block().use_count() > 1;
      // What waits for this node's own computing takes its time.
      const bool late = too_late && !arrival.block()->needs_entering;
      if (!late && wanted) continue;
      FailBlock(arrival,
                wanted ? MakeStatus(StatusCode::kDeadlineExceeded,
                                    "it arrived, but was not decoded within {:.1f} s of its fetch",
                                    Seconds(timeout_))
                       : MakeStatus(StatusCode::kCancelled, "nobody waits for it any more"));
    }
  }
}

void TierLink::FinishFetch(OpId op) {
  const auto found = operations_.find(op);
  Operation* operation = found->second.get();
  for (const BlockArrival& arrival : operation->arrivals) {
    stats_.fetched_blocks += arrival.block()->complete() ? 1 : 0;
  }
  held_ -= operation->held ? 1 : 0;
  for (size_t depth = 0; depth < kMaxChoices; ++depth) {
    const double tokens = block_class_->TokensOfLayers(operation->decoded_layers[depth]);
    if (tokens > 0) planner_->SawDecode(depth, tokens, operation->decode_took[depth]);
  }
  const FetchDone done = std::move(operation->fetch_done);
  operations_.erase(found);
  if (done) done();
}

void TierLink::OnEvent(const ClientEvent& event) {
  const auto found = operations_.find(event.op);
  if (found == operations_.end()) return;
  Operation* operation = found->second.get();
  switch (event.kind) {
    case ClientEvent::Kind::kLookupDone: {
      meter_->LookupDone(operation->started);
      const LookupDone done = std::move(operation->lookup_done);
      operations_.erase(found);
      done(event.blocks);
      return;
    }
    case ClientEvent::Kind::kLayerArrived:
      OnLayer(event.op, operation, event);
      return;
    case ClientEvent::Kind::kItemDone: {
      if (event.status.ok() && event.present) return;
      const size_t index = operation->items[event.item].arrival;
      const CachedBlockPtr& block = operation->arrivals[index].block();
      if (block->failed.ok()) block->absent = event.status.ok();
      const Status status =
          event.status.ok() ? Unavailable("the tier does not have it (any more)") : event.status;
      Refuse(operation, index, status);
      return;
    }
    case ClientEvent::Kind::kFetchDone:
      meter_->FetchEnded();
      operation->arrived = true;
      operation->buffer = nullptr;
      EndOrHold(event.op);
      return;
    case ClientEvent::Kind::kPutDone: {
      if (!event.status.ok()) stats_.put_failure = event.status;
      ++(!event.status.ok()    ? stats_.put_failed
         : event.already_there ? stats_.put_already_there
                               : stats_.put_blocks);
      if (!operation->put_done) {
        operation->outcome = event.status;
        return;
      }
      const PutDone done = std::move(operation->put_done);
      operations_.erase(found);
      done(event.status);
      return;
    }
    case ClientEvent::Kind::kPinDone:
    case ClientEvent::Kind::kStatsDone:
      return;
  }
}

}  // namespace kvant::node
