#include "cache_service/hold_table.h"

#include <bit>

#include "base/check.h"

namespace kvant {
namespace {
size_t BucketCount(uint32_t capacity) { return std::bit_ceil<size_t>(capacity); }
}  // namespace

HoldTable::HoldTable(uint32_t capacity)
    : holds_(capacity), heap_(capacity), buckets_(BucketCount(capacity), kNone) {
  for (uint32_t slot = capacity; slot-- > 0;) {
    holds_[slot].next = free_;
    free_ = slot;
  }
}

uint64_t HoldTable::BookkeepingBytes(uint32_t capacity) {
  return capacity * (sizeof(Hold) + sizeof(uint32_t)) + BucketCount(capacity) * sizeof(uint32_t);
}

uint32_t& HoldTable::Bucket(uint64_t owner) {
  // Owners are small numbers given out in turn: their low bits spread well.
  return buckets_[owner & (buckets_.size() - 1)];
}

uint32_t HoldTable::Add(Kind kind, uint64_t owner, TimePoint deadline) {
  KV_CHECK(!full());
  const uint32_t slot = free_;
  Hold& hold = holds_[slot];
  free_ = hold.next;
  const uint32_t generation = hold.generation + 1;
  hold = Hold{};
  hold.generation = generation;
  hold.kind = kind;
  hold.owner = owner;
  hold.deadline = deadline;
  hold.used = true;
  uint32_t& bucket = Bucket(owner);
  hold.next = bucket;
  if (bucket != kNone) holds_[bucket].previous = slot;
  bucket = slot;
  Place(heap_size_++, slot);
  SiftUp(heap_size_ - 1);
  ++size_;
  return slot;
}

void HoldTable::Detach(uint32_t slot) {
  Hold& hold = holds_[slot];
  if (hold.heap_at == kNone) return;
  (hold.previous == kNone ? Bucket(hold.owner) : holds_[hold.previous].next) = hold.next;
  if (hold.next != kNone) holds_[hold.next].previous = hold.previous;
  hold.previous = hold.next = kNone;
  const uint32_t at = hold.heap_at;
  hold.heap_at = kNone;
  const uint32_t last = heap_[--heap_size_];
  if (last == slot) return;
  Place(at, last);
  SiftUp(at);
  SiftDown(holds_[last].heap_at);
}

void HoldTable::Remove(uint32_t slot) {
  Detach(slot);
  Hold& hold = holds_[slot];
  hold.used = false;
  hold.next = free_;
  free_ = slot;
  --size_;
}

uint64_t HoldTable::IdOf(uint32_t slot) const {
  return (uint64_t{holds_[slot].generation} << 32) | slot;
}

uint32_t HoldTable::SlotOf(uint64_t id) const {
  const auto slot = static_cast<uint32_t>(id);
  if (slot >= holds_.size() || !holds_[slot].used || IdOf(slot) != id) return kNone;
  return slot;
}

uint32_t HoldTable::Expired(TimePoint now) const {
  if (heap_size_ == 0 || holds_[heap_[0]].deadline > now) return kNone;
  return heap_[0];
}

uint32_t HoldTable::AnyOf(uint64_t owner) const {
  uint32_t slot = buckets_[owner & (buckets_.size() - 1)];
  while (slot != kNone && holds_[slot].owner != owner) slot = holds_[slot].next;
  return slot;
}

void HoldTable::Place(uint32_t heap_index, uint32_t slot) {
  heap_[heap_index] = slot;
  holds_[slot].heap_at = heap_index;
}

void HoldTable::SiftUp(uint32_t heap_index) {
  const uint32_t slot = heap_[heap_index];
  while (heap_index > 0) {
    const uint32_t up = (heap_index - 1) / 2;
    if (holds_[heap_[up]].deadline <= holds_[slot].deadline) break;
    Place(heap_index, heap_[up]);
    heap_index = up;
  }
  Place(heap_index, slot);
}

void HoldTable::SiftDown(uint32_t heap_index) {
  const uint32_t slot = heap_[heap_index];
  while (true) {
    uint32_t down = 2 * heap_index + 1;
    if (down >= heap_size_) break;
    if (down + 1 < heap_size_ && holds_[heap_[down + 1]].deadline < holds_[heap_[down]].deadline) {
      ++down;
    }
    if (holds_[slot].deadline <= holds_[heap_[down]].deadline) break;
    Place(heap_index, heap_[down]);
    heap_index = down;
  }
  Place(heap_index, slot);
}

}  // namespace kvant
