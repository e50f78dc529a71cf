#include "cache_service/block_store.h"

#include <algorithm>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "cache_service/block_index.h"
#include "cache_service/hold_table.h"
#include "transport/range_allocator.h"

namespace kvant {
namespace {

using State = BlockIndex::State;
using Kind = HoldTable::Kind;

constexpr uint32_t kNone = BlockIndex::kNone;
constexpr uint64_t kGranule = RangeAllocator::kGranule;
// What RangeAllocator takes for a range and for its size classes; a test counts the real bytes.
constexpr uint64_t kRangeRecordBytes = 48;
constexpr uint64_t kFixedIndexBytes = 16384;
constexpr OwnerId kNobody = 0;

uint64_t RoundUp(uint64_t bytes) { return (bytes + kGranule - 1) / kGranule * kGranule; }
// Lent ranges, and the free ones between them.
uint32_t RangeRecords(uint32_t max_blocks) { return 2 * max_blocks + 2; }

}  // namespace

class BlockStore::Impl {
 public:
  explicit Impl(const BlockStoreOptions& options)
      : options_(options),
        arena_bytes_(options.arena.size() / kGranule * kGranule),
        allocator_(arena_bytes_, RangeRecords(options.max_blocks)),
        index_(options.max_blocks, options.hash_seed),
        queues_(index_.capacity(), options.max_blocks, options.policy),
        holds_(options.max_pins) {
    KV_CHECK(options.max_blocks > 0 && options.max_pins > 0);
  }

  Result<ReserveResult> Reserve(const ReserveRequest& request);
  bool AddLanding(ReservationId id, int delta);
  Status Seal(ReservationId id, std::span<const std::byte> manifest);
  void Abort(ReservationId id);
  BlockState Find(const BlockKey& key) const;
  std::optional<BlockView> View(const BlockKey& key) const;
  void Touch(const BlockKey& key);
  Result<PinId> Pin(const BlockKey& key, OwnerId owner, TimePoint deadline);
  Status SetUserPin(const BlockKey& key, std::optional<TimePoint> deadline);
  void Unpin(PinId id);
  Status Reverify(const BlockKey& key);
  void Reap(TimePoint now);
  void ReleaseOwner(OwnerId owner);
  StoreStats stats() const;
  uint64_t limit_bytes() const {
    return arena_bytes_ + IndexBytes(options_.max_blocks, options_.max_pins, options_.policy);
  }
  void ForEach(const std::function<void(const BlockView&)>& visit) const;
  std::string CheckInvariants() const;

 private:
  BlockView ViewOf(uint32_t id) const;
  Result<PinId> AddPin(const BlockKey& key, Kind kind, OwnerId owner, TimePoint deadline);
  std::span<std::byte> PayloadOf(const BlockIndex::Entry& entry) const {
    return options_.arena.subspan(entry.payload_offset, entry.payload_bytes);
  }
  uint32_t FindSealed(const BlockKey& key) const;
  std::optional<uint32_t> MakeRoom(uint64_t bytes);
  bool EvictOne();
  // The entry's block is gone, its memory already dealt with: the tree follows.
  void Vacate(uint32_t id);
  void LeaveParent(uint32_t id);
  // Takes a sealed block out for good.
  void DropSealed(uint32_t id);
  void FreeRange(uint32_t range);
  void EndReservation(uint32_t slot);
  void EndPin(uint32_t slot);
  void EndHold(uint32_t slot);
  // The entry that a hold is about, or kNone if that is gone (only with fault_ignore_pins).
  uint32_t EntryOf(const HoldTable::Hold& hold) const;
  Status CheckSeal(const HoldTable::Hold& hold, std::span<const std::byte> manifest,
                   BlockManifest* parsed) const;
  Status MoveToCondemned(uint32_t id);

  BlockStoreOptions options_;
  uint64_t arena_bytes_;
  RangeAllocator allocator_;
  BlockIndex index_;
  EvictionQueues queues_;
  HoldTable holds_;
  StoreStats stats_;
  uint64_t arena_used_ = 0;
  uint32_t ranges_ = 0;  // lent: sealed, reserved, condemned, or still landing
};

Result<ReserveResult> BlockStore::Impl::Reserve(const ReserveRequest& request) {
  if (request.key.IsZero() || request.parent == request.key) {
    return InvalidArgument("reserve: block {} cannot have this key and parent",
                           request.key.ShortHex());
  }
  if (request.payload_bytes == 0 || request.payload_bytes > kMaxPayloadBytes ||
      request.manifest_bytes == 0 || request.manifest_bytes > MaxManifestBytes(kMaxManifestRows)) {
    return InvalidArgument(
        "reserve: block {}: a payload of {} and a manifest of {} bytes are not "
        "possible",
        request.key.ShortHex(), request.payload_bytes, request.manifest_bytes);
  }
  const uint64_t bytes = RoundUp(request.manifest_bytes) + RoundUp(request.payload_bytes);
  if (bytes > arena_bytes_) {
    return InvalidArgument(
        "reserve: block {}: {} bytes never fit into {}; give the shard more "
        "memory, or make blocks smaller",
        request.key.ShortHex(), bytes, arena_bytes_);
  }
  uint32_t id = index_.Find(request.key);
  if (id != kNone && index_[id].state != State::kPlaceholder) {
    ReserveResult found;
    found.found = index_[id].state == State::kSealed ? BlockState::kPresent : BlockState::kReserved;
    return found;
  }
  if (holds_.full()) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "reserve: all {} pins and reservations are "
                      "taken",
                      holds_.capacity());
  }
  if (id == kNone) id = index_.Add(request.key);
  index_[id].state = State::kReserved;
  // Before room is made, so that the parent does not go.
  index_.LinkParent(id, request.parent);
  const std::optional<uint32_t> range = MakeRoom(bytes);
  if (!range) {
    Vacate(id);
    return MakeStatus(StatusCode::kResourceExhausted,
                      "reserve: no room for {} bytes, everything in the way is pinned or being "
                      "written",
                      bytes);
  }
  BlockIndex::Entry& entry = index_[id];
  entry.range = *range;
  entry.manifest_offset = allocator_.offset(*range);
  entry.manifest_bytes = static_cast<uint32_t>(request.manifest_bytes);
  entry.payload_offset = entry.manifest_offset + RoundUp(request.manifest_bytes);
  entry.payload_bytes = static_cast<uint32_t>(request.payload_bytes);
  const uint32_t slot = holds_.Add(Kind::kReservation, request.owner, request.deadline);
  HoldTable::Hold& hold = holds_[slot];
  hold.entry = id;
  hold.entry_generation = entry.generation;
  hold.range = *range;
  hold.owns_memory = true;
  ++stats_.reservations;
  return ReserveResult{BlockState::kAbsent, holds_.IdOf(slot), PayloadOf(entry)};
}

std::optional<uint32_t> BlockStore::Impl::MakeRoom(uint64_t bytes) {
  while (true) {
    if (ranges_ < options_.max_blocks) {
      if (const std::optional<uint32_t> range = allocator_.Allocate(bytes)) {
        ++ranges_;
        arena_used_ += allocator_.size(*range);
        return range;
      }
    }
    if (!EvictOne()) return std::nullopt;
  }
}

bool BlockStore::Impl::EvictOne() {
  const uint32_t id = queues_.TakeVictim([&](uint32_t candidate) {
    const BlockIndex::Entry& entry = index_[candidate];
    return entry.children == 0 && (entry.pins == 0 || options_.fault_ignore_pins);
  });
  if (id == kNone) return false;
  ++stats_.evicted;
  DropSealed(id);
  return true;
}

void BlockStore::Impl::DropSealed(uint32_t id) {
  --stats_.blocks;
  stats_.payload_bytes -= index_[id].payload_bytes;
  FreeRange(index_[id].range);
  Vacate(id);
}

void BlockStore::Impl::LeaveParent(uint32_t id) {
  const uint32_t up = index_.UnlinkParent(id);
  if (up == kNone) return;
  if (index_[up].state == State::kPlaceholder) {
    index_.Remove(up);
  } else if (index_[up].state == State::kSealed) {
    queues_.Unpark(up);
  }
}

void BlockStore::Impl::Vacate(uint32_t id) {
  LeaveParent(id);
  if (index_[id].children == 0) {
    index_.Remove(id);
    return;
  }
  BlockIndex::Entry& entry = index_[id];
  entry.state = State::kPlaceholder;
  entry.pins = 0;
  entry.user_pin = 0;
  // Holds on the block that was here must not find the next one.
  ++entry.generation;
}

void BlockStore::Impl::FreeRange(uint32_t range) {
  arena_used_ -= allocator_.size(range);
  allocator_.Free(range);
  --ranges_;
}

uint32_t BlockStore::Impl::EntryOf(const HoldTable::Hold& hold) const {
  return index_[hold.entry].generation == hold.entry_generation ? hold.entry : kNone;
}

bool BlockStore::Impl::AddLanding(ReservationId id, int delta) {
  const uint32_t slot = holds_.SlotOf(id);
  if (slot == HoldTable::kNone || holds_[slot].kind != Kind::kReservation) return false;
  HoldTable::Hold& hold = holds_[slot];
  if (delta > 0) {
    if (hold.ended) return false;
    ++hold.landing;
    return true;
  }
  KV_CHECK(hold.landing > 0);
  if (--hold.landing == 0 && hold.ended) {
    if (hold.owns_memory) FreeRange(hold.range);
    holds_.Remove(slot);
  }
  return true;
}

Status BlockStore::Impl::CheckSeal(const HoldTable::Hold& hold, std::span<const std::byte> manifest,
                                   BlockManifest* parsed) const {
  const BlockIndex::Entry& entry = index_[hold.entry];
  if (manifest.size() > entry.manifest_bytes) {
    return InvalidArgument("seal: block {}: a manifest of {} bytes, {} were reserved",
                           entry.key.ShortHex(), manifest.size(), entry.manifest_bytes);
  }
  KV_ASSIGN_OR_RETURN(*parsed, ParseManifest(manifest));
  if (parsed->key != entry.key || parsed->payload_bytes() != entry.payload_bytes) {
    return InvalidArgument(
        "seal: block {} of {} bytes was reserved, the manifest is of block {} "
        "with {} bytes",
        entry.key.ShortHex(), entry.payload_bytes, parsed->key.ShortHex(), parsed->payload_bytes());
  }
  if (options_.fault_skip_verification) return OkStatus();
  KV_CHECK(hold.landing == 0);
  return VerifyPayload(*parsed, PayloadOf(entry));
}

Status BlockStore::Impl::Seal(ReservationId id, std::span<const std::byte> manifest) {
  const uint32_t slot = holds_.SlotOf(id);
  if (slot == HoldTable::kNone || holds_[slot].kind != Kind::kReservation || holds_[slot].ended) {
    return InvalidArgument("seal: there is no such reservation; its lease may have ended");
  }
  HoldTable::Hold& hold = holds_[slot];
  BlockManifest parsed;
  const Status status = CheckSeal(hold, manifest, &parsed);
  if (!status.ok()) {
    if (status.code() == StatusCode::kDataLoss) ++stats_.seal_refused;
    EndReservation(slot);
    return status;
  }
  BlockIndex::Entry& entry = index_[hold.entry];
  std::copy(manifest.begin(), manifest.end(),
            options_.arena.begin() + static_cast<ptrdiff_t>(entry.manifest_offset));
  entry.manifest_bytes = static_cast<uint32_t>(manifest.size());
  entry.cuts = parsed.CutsAvailable();
  const CutEnds cut_ends = parsed.EndsOfCuts();
  std::copy(cut_ends.begin(), cut_ends.end(), entry.cut_ends.begin());
  entry.state = State::kSealed;
  queues_.Insert(hold.entry, index_.Fingerprint(entry.key));
  ++stats_.blocks;
  ++stats_.sealed;
  stats_.payload_bytes += entry.payload_bytes;
  --stats_.reservations;
  hold.owns_memory = false;
  hold.ended = true;
  if (hold.landing == 0) {
    holds_.Remove(slot);
  } else {
    holds_.Detach(slot);
  }
  return OkStatus();
}

void BlockStore::Impl::EndReservation(uint32_t slot) {
  HoldTable::Hold& hold = holds_[slot];
  KV_CHECK(!hold.ended);
  --stats_.reservations;
  hold.ended = true;
  Vacate(hold.entry);
  if (hold.landing > 0) {
    holds_.Detach(slot);
    return;
  }
  FreeRange(hold.range);
  holds_.Remove(slot);
}

void BlockStore::Impl::Abort(ReservationId id) {
  const uint32_t slot = holds_.SlotOf(id);
  if (slot == HoldTable::kNone || holds_[slot].kind != Kind::kReservation) return;
  if (!holds_[slot].ended) EndReservation(slot);
}

BlockState BlockStore::Impl::Find(const BlockKey& key) const {
  const uint32_t id = index_.Find(key);
  if (id == kNone || index_[id].state == State::kPlaceholder) return BlockState::kAbsent;
  return index_[id].state == State::kSealed ? BlockState::kPresent : BlockState::kReserved;
}

uint32_t BlockStore::Impl::FindSealed(const BlockKey& key) const {
  const uint32_t id = index_.Find(key);
  return id != kNone && index_[id].state == State::kSealed ? id : kNone;
}

BlockView BlockStore::Impl::ViewOf(uint32_t id) const {
  const BlockIndex::Entry& entry = index_[id];
  BlockView view{entry.key,
                 PayloadOf(entry),
                 options_.arena.subspan(entry.manifest_offset, entry.manifest_bytes),
                 entry.cuts,
                 {}};
  std::copy(entry.cut_ends.begin(), entry.cut_ends.end(), view.cut_ends.begin());
  return view;
}

std::optional<BlockView> BlockStore::Impl::View(const BlockKey& key) const {
  const uint32_t id = FindSealed(key);
  if (id == kNone) return std::nullopt;
  return ViewOf(id);
}

void BlockStore::Impl::Touch(const BlockKey& key) {
  const uint32_t id = FindSealed(key);
  if (id != kNone) queues_.Use(id);
}

Result<PinId> BlockStore::Impl::Pin(const BlockKey& key, OwnerId owner, TimePoint deadline) {
  return AddPin(key, Kind::kReadPin, owner, deadline);
}

Result<PinId> BlockStore::Impl::AddPin(const BlockKey& key, Kind kind, OwnerId owner,
                                       TimePoint deadline) {
  const uint32_t id = FindSealed(key);
  if (id == kNone) return Unavailable("pin: block {} is not here", key.ShortHex());
  if (holds_.full()) {
    return MakeStatus(StatusCode::kResourceExhausted, "pin: all {} pins and reservations are taken",
                      holds_.capacity());
  }
  BlockIndex::Entry& entry = index_[id];
  ++entry.pins;
  ++stats_.pins;
  const uint32_t slot = holds_.Add(kind, owner, deadline);
  holds_[slot].entry = id;
  holds_[slot].entry_generation = entry.generation;
  return holds_.IdOf(slot);
}

Status BlockStore::Impl::SetUserPin(const BlockKey& key, std::optional<TimePoint> deadline) {
  const uint32_t id = FindSealed(key);
  if (id == kNone) return Unavailable("pin: block {} is not here", key.ShortHex());
  BlockIndex::Entry& entry = index_[id];
  const PinId before = std::exchange(entry.user_pin, 0);
  Unpin(before);
  if (!deadline) return OkStatus();
  if (!RangeFits(stats_.user_pinned_bytes, entry.payload_bytes, options_.max_user_pinned_bytes)) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "pin: {} of at most {} bytes are pinned by users; unpin something first",
                      stats_.user_pinned_bytes, options_.max_user_pinned_bytes);
  }
  // User pins outlive the connection that asked for them: they belong to nobody.
  KV_ASSIGN_OR_RETURN(entry.user_pin, AddPin(key, Kind::kUserPin, kNobody, *deadline));
  holds_[holds_.SlotOf(entry.user_pin)].payload_bytes = entry.payload_bytes;
  stats_.user_pinned_bytes += entry.payload_bytes;
  return OkStatus();
}

void BlockStore::Impl::EndPin(uint32_t slot) {
  const HoldTable::Hold hold = holds_[slot];
  holds_.Remove(slot);
  --stats_.pins;
  if (hold.kind == Kind::kUserPin) stats_.user_pinned_bytes -= hold.payload_bytes;
  const uint32_t id = EntryOf(hold);
  if (id == kNone) return;
  BlockIndex::Entry& entry = index_[id];
  KV_CHECK(entry.pins > 0);
  if (--entry.pins > 0) return;
  if (entry.state == State::kCondemned) {
    FreeRange(entry.range);
    index_.Remove(id);
  } else if (entry.children == 0) {
    queues_.Unpark(id);
  }
}

void BlockStore::Impl::Unpin(PinId id) {
  const uint32_t slot = holds_.SlotOf(id);
  if (slot != HoldTable::kNone && holds_[slot].kind != Kind::kReservation) EndPin(slot);
}

Status BlockStore::Impl::Reverify(const BlockKey& key) {
  const uint32_t id = FindSealed(key);
  if (id == kNone) return OkStatus();
  const BlockView view = ViewOf(id);
  const Result<BlockManifest> manifest = ParseManifest(view.manifest);
  const Status status = manifest.ok() ? VerifyPayload(*manifest, view.payload) : manifest.status();
  if (status.ok()) return status;
  ++stats_.dropped_corrupt;
  queues_.Erase(id);
  Unpin(std::exchange(index_[id].user_pin, 0));
  if (index_[id].pins == 0) {
    DropSealed(id);
  } else {
    return MoveToCondemned(id);
  }
  return DataLoss("block {} was bad in this shard's memory and is dropped: {}", key.ShortHex(),
                  status.message());
}

Status BlockStore::Impl::MoveToCondemned(uint32_t id) {
  const BlockKey key = index_[id].key;
  --stats_.blocks;
  stats_.payload_bytes -= index_[id].payload_bytes;
  LeaveParent(id);
  const uint32_t generation = index_[id].generation;
  const uint32_t condemned = index_.Condemn(id);
  // Looks at every hold; a bad block is rare enough.
  for (uint32_t slot = 0; slot < holds_.capacity(); ++slot) {
    HoldTable::Hold& hold = holds_[slot];
    if (!hold.used || hold.kind == Kind::kReservation || hold.entry != id ||
        hold.entry_generation != generation) {
      continue;
    }
    hold.entry = condemned;
    hold.entry_generation = index_[condemned].generation;
  }
  Vacate(id);
  return DataLoss(
      "block {} was bad in this shard's memory and is dropped when its readers are "
      "done",
      key.ShortHex());
}

void BlockStore::Impl::EndHold(uint32_t slot) {
  if (holds_[slot].kind == Kind::kReservation) {
    EndReservation(slot);
  } else {
    EndPin(slot);
  }
}

void BlockStore::Impl::Reap(TimePoint now) {
  for (uint32_t slot = holds_.Expired(now); slot != HoldTable::kNone; slot = holds_.Expired(now)) {
    ++stats_.reaped;
    EndHold(slot);
  }
}

void BlockStore::Impl::ReleaseOwner(OwnerId owner) {
  for (uint32_t slot = holds_.AnyOf(owner); slot != HoldTable::kNone; slot = holds_.AnyOf(owner)) {
    EndHold(slot);
  }
}

StoreStats BlockStore::Impl::stats() const {
  StoreStats stats = stats_;
  stats.limit_bytes = limit_bytes();
  stats.used_bytes = stats.limit_bytes - arena_bytes_ + arena_used_;
  return stats;
}

void BlockStore::Impl::ForEach(const std::function<void(const BlockView&)>& visit) const {
  for (uint32_t id = 0; id < index_.capacity(); ++id) {
    if (index_[id].state == State::kSealed) visit(ViewOf(id));
  }
}

std::string BlockStore::Impl::CheckInvariants() const {
  std::vector<uint32_t> children(index_.capacity(), 0);
  std::vector<uint32_t> pins(index_.capacity(), 0);
  uint64_t arena_used = 0;
  uint64_t reservations = 0;
  for (uint32_t slot = 0; slot < holds_.capacity(); ++slot) {
    const HoldTable::Hold& hold = holds_[slot];
    if (!hold.used) continue;
    if (hold.kind == Kind::kReservation) {
      if (!hold.ended) ++reservations;
      if (hold.owns_memory) arena_used += allocator_.size(hold.range);
    } else if (EntryOf(hold) != kNone) {
      ++pins[hold.entry];
    } else {
      return "a pinned block is gone";
    }
  }
  uint64_t blocks = 0;
  uint64_t payload = 0;
  for (uint32_t id = 0; id < index_.capacity(); ++id) {
    const BlockIndex::Entry& entry = index_[id];
    if (entry.state == State::kFree) continue;
    if (entry.parent != kNone) ++children[entry.parent];
    if (entry.state != State::kCondemned && index_.Find(entry.key) != id) {
      return "block " + entry.key.ShortHex() + " is not found by its key";
    }
    if (entry.state == State::kSealed || entry.state == State::kCondemned) {
      arena_used += allocator_.size(entry.range);
    }
    if (queues_.Contains(id) != (entry.state == State::kSealed)) {
      return "block " + entry.key.ShortHex() + " is sealed or queued, but not both";
    }
    if (entry.pins != pins[id]) return "block " + entry.key.ShortHex() + " miscounts its pins";
    if (entry.state != State::kSealed) continue;
    ++blocks;
    payload += entry.payload_bytes;
  }
  for (uint32_t id = 0; id < index_.capacity(); ++id) {
    const BlockIndex::Entry& entry = index_[id];
    if (entry.children != children[id]) {
      return "block " + entry.key.ShortHex() + " miscounts its children";
    }
    if (children[id] > 0 && (entry.state == State::kFree || entry.state == State::kCondemned)) {
      return "a parent link leads to nothing";
    }
    if (entry.state == State::kPlaceholder && children[id] == 0) {
      return "placeholder " + entry.key.ShortHex() + " has no children";
    }
  }
  if (blocks != stats_.blocks || payload != stats_.payload_bytes) return "blocks are miscounted";
  if (reservations != stats_.reservations) return "reservations are miscounted";
  if (arena_used != arena_used_ || arena_used > arena_bytes_) return "arena bytes are miscounted";
  if (!allocator_.Consistent()) return "the allocator is inconsistent";
  return "";
}

BlockStore::BlockStore(const BlockStoreOptions& options) : impl_(std::make_unique<Impl>(options)) {}
BlockStore::~BlockStore() = default;
Result<ReserveResult> BlockStore::Reserve(const ReserveRequest& request) {
  return impl_->Reserve(request);
}
bool BlockStore::AddLanding(ReservationId id, int delta) { return impl_->AddLanding(id, delta); }
Status BlockStore::Seal(ReservationId id, std::span<const std::byte> manifest) {
  return impl_->Seal(id, manifest);
}
void BlockStore::Abort(ReservationId id) { impl_->Abort(id); }
BlockState BlockStore::Find(const BlockKey& key) const { return impl_->Find(key); }
std::optional<BlockView> BlockStore::View(const BlockKey& key) const { return impl_->View(key); }
void BlockStore::Touch(const BlockKey& key) { impl_->Touch(key); }
Result<PinId> BlockStore::Pin(const BlockKey& key, OwnerId owner, TimePoint deadline) {
  return impl_->Pin(key, owner, deadline);
}
Status BlockStore::SetUserPin(const BlockKey& key, std::optional<TimePoint> deadline) {
  return impl_->SetUserPin(key, deadline);
}
void BlockStore::Unpin(PinId id) { impl_->Unpin(id); }
Status BlockStore::Reverify(const BlockKey& key) { return impl_->Reverify(key); }
void BlockStore::Reap(TimePoint now) { impl_->Reap(now); }
void BlockStore::ReleaseOwner(OwnerId owner) { impl_->ReleaseOwner(owner); }
StoreStats BlockStore::stats() const { return impl_->stats(); }
uint64_t BlockStore::limit_bytes() const { return impl_->limit_bytes(); }
void BlockStore::ForEach(const std::function<void(const BlockView&)>& visit) const {
  impl_->ForEach(visit);
}
std::string BlockStore::CheckInvariants() const { return impl_->CheckInvariants(); }

uint64_t BlockStore::IndexBytes(uint32_t max_blocks, uint32_t max_pins,
                                const EvictionPolicy& policy) {
  const uint32_t entries = BlockIndex::Capacity(max_blocks);
  return BlockIndex::BookkeepingBytes(max_blocks) +
         EvictionQueues::BookkeepingBytes(entries, max_blocks, policy) +
         HoldTable::BookkeepingBytes(max_pins) + RangeRecords(max_blocks) * kRangeRecordBytes +
         kFixedIndexBytes;
}

Result<StorePlan> PlanStore(uint64_t memory_bytes, uint64_t expected_block_bytes) {
  constexpr uint64_t kLeast = uint64_t{1} << 20;
  constexpr uint64_t kMaxBlocks = uint64_t{1} << 28;
  if (memory_bytes < kLeast) {
    return InvalidArgument("a shard of {} bytes is too small to be of use; give it at least 1MiB",
                           memory_bytes);
  }
  if (expected_block_bytes == 0) {
    return InvalidArgument("blocks of 0 bytes: expect at least 1");
  }
  StorePlan plan;
  plan.max_blocks = static_cast<uint32_t>(
      std::clamp<uint64_t>(memory_bytes / expected_block_bytes, 64, kMaxBlocks));
  plan.max_pins = std::clamp<uint32_t>(plan.max_blocks, 256, 65536);
  plan.index_bytes = BlockStore::IndexBytes(plan.max_blocks, plan.max_pins, {});
  if (plan.index_bytes > memory_bytes / 2) {
    return InvalidArgument(
        "the index of {} blocks of {} bytes would take {} of {} bytes; expect "
        "larger blocks",
        plan.max_blocks, expected_block_bytes, plan.index_bytes, memory_bytes);
  }
  plan.arena_bytes = (memory_bytes - plan.index_bytes) / 4096 * 4096;
  return plan;
}

}  // namespace kvant
