#include "cache_service/block_index.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>

#include "base/check.h"

namespace kvant {
namespace {
// The block that is being added, and its parent, come before another one goes.
size_t EntryCount(uint32_t max_blocks) { return 2 * (size_t{max_blocks} + 1); }
size_t BucketCount(uint32_t max_blocks) { return std::bit_ceil(EntryCount(max_blocks)); }
}  // namespace

uint32_t BlockIndex::Capacity(uint32_t max_blocks) {
  return static_cast<uint32_t>(EntryCount(max_blocks));
}

BlockIndex::BlockIndex(uint32_t max_blocks, uint64_t hash_seed)
    : hash_seed_(hash_seed),
      entries_(EntryCount(max_blocks)),
      buckets_(BucketCount(max_blocks), kNone) {
  for (uint32_t id = capacity(); id-- > 0;) Release(id);
}

uint64_t BlockIndex::BookkeepingBytes(uint32_t max_blocks) {
  return EntryCount(max_blocks) * sizeof(Entry) + BucketCount(max_blocks) * sizeof(uint32_t);
}

uint64_t BlockIndex::Fingerprint(const BlockKey& key) const {
  return XXH3_64bits_withSeed(key.bytes.data(), key.bytes.size(), hash_seed_);
}

uint32_t& BlockIndex::Bucket(const BlockKey& key) {
  return buckets_[Fingerprint(key) & (buckets_.size() - 1)];
}

uint32_t BlockIndex::Find(const BlockKey& key) const {
  uint32_t id = buckets_[Fingerprint(key) & (buckets_.size() - 1)];
  while (id != kNone && entries_[id].key != key) id = entries_[id].next;
  return id;
}

uint32_t BlockIndex::Take() {
  // Blocks are at most max_blocks and have at most one parent each, so there is always one left.
  KV_CHECK(free_ != kNone);
  const uint32_t id = free_;
  free_ = entries_[id].next;
  return id;
}

void BlockIndex::Release(uint32_t id) {
  Entry& entry = entries_[id];
  const uint32_t generation = entry.generation + 1;
  entry = Entry{};
  entry.generation = generation;
  entry.next = free_;
  free_ = id;
}

uint32_t BlockIndex::Add(const BlockKey& key) {
  const uint32_t id = Take();
  Entry& entry = entries_[id];
  entry.key = key;
  entry.state = State::kPlaceholder;
  uint32_t& bucket = Bucket(key);
  entry.next = bucket;
  bucket = id;
  return id;
}

void BlockIndex::Remove(uint32_t id) {
  Entry& entry = entries_[id];
  KV_CHECK(entry.children == 0 && entry.parent == kNone);
  if (entry.state != State::kCondemned) {
    uint32_t* link = &Bucket(entry.key);
    while (*link != id) link = &entries_[*link].next;
    *link = entry.next;
  }
  Release(id);
}

uint32_t BlockIndex::Condemn(uint32_t id) {
  const uint32_t to = Take();
  Entry& from = entries_[id];
  KV_CHECK(from.parent == kNone);
  Entry& entry = entries_[to];
  const uint32_t generation = entry.generation;
  entry = from;
  entry.generation = generation;
  entry.children = 0;
  entry.next = kNone;
  entry.state = State::kCondemned;
  from.state = State::kPlaceholder;
  from.pins = 0;
  from.user_pin = 0;
  return to;
}

void BlockIndex::LinkParent(uint32_t id, const BlockKey& parent) {
  KV_CHECK(entries_[id].parent == kNone);
  if (parent.IsZero() || parent == entries_[id].key) return;
  uint32_t up = Find(parent);
  if (up == kNone) {
    up = Add(parent);
  } else if (entries_[id].children > 0) {
    // The children were here first, so the would-be parent may be among the descendants.
    uint32_t at = up;
    for (int step = 0; at != kNone; ++step, at = entries_[at].parent) {
      if (at == id || step == kMaxClimb) return;
    }
  }
  entries_[id].parent = up;
  ++entries_[up].children;
}

uint32_t BlockIndex::UnlinkParent(uint32_t id) {
  const uint32_t up = entries_[id].parent;
  if (up == kNone) return kNone;
  entries_[id].parent = kNone;
  return --entries_[up].children == 0 ? up : kNone;
}

}  // namespace kvant
