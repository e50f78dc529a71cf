// The blocks of a store by key, and the prefix tree that they form.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cache_service/block_key.h"
#include "cache_service/manifest.h"

namespace kvant {

// Single-owner. Allocates everything at construction; every operation takes constant time.
// Invariants: 1. a key has at most one entry. 2. An entry stands as long as it holds a block or has
// children. 3. Parent links form a forest.
class BlockIndex {
 public:
  static constexpr uint32_t kNone = ~uint32_t{0};

  enum class State : uint8_t {
    kFree,         // not in use
    kPlaceholder,  // no block, but stored children: the parent lives elsewhere, or is gone
    kReserved,
    kSealed,
    kCondemned,  // found bad, no longer under its key, kept until its last pin ends
  };
  struct Entry {
    BlockKey key;
    uint32_t parent = kNone;
    uint32_t children = 0;
    uint32_t next = kNone;  // in the bucket, or in the list of free entries
    uint32_t generation = 0;
    uint32_t range = 0;           // the allocator's block
    uint32_t manifest_bytes = 0;  // of the encoded manifest; of its place while reserved
    uint32_t payload_bytes = 0;
    uint32_t pins = 0;
    uint64_t user_pin = 0;        // the hold's id, 0: none
    uint64_t payload_offset = 0;  // in the arena
    uint64_t manifest_offset = 0;
    std::array<uint8_t, kMaxParts> cuts{};
    std::array<uint32_t, kMaxCuts> cut_ends{};  // as CutEnds
    State state = State::kFree;
  };

  // Room for each block, and a placeholder for each block's parent.
  BlockIndex(uint32_t max_blocks, uint64_t hash_seed);

  static uint32_t Capacity(uint32_t max_blocks);
  uint32_t capacity() const { return static_cast<uint32_t>(entries_.size()); }
  Entry& operator[](uint32_t id) { return entries_[id]; }
  const Entry& operator[](uint32_t id) const { return entries_[id]; }
  uint32_t Find(const BlockKey& key) const;
  // A new kPlaceholder entry. REQUIRES: Find(key) == kNone.
  uint32_t Add(const BlockKey& key);
  // REQUIRES: no children, no parent.
  void Remove(uint32_t id);
  // Moves the block of `id` to an entry of its own that no key leads to, state kCondemned, and
  // returns that; `id` becomes a placeholder. REQUIRES: parent unlinked.
  uint32_t Condemn(uint32_t id);
  // Makes `id` a child of `parent`, for which a placeholder is made if need be. Does nothing where
  // a circle could come of it, which no honest client asks for.
  void LinkParent(uint32_t id, const BlockKey& parent);
  // Takes that back. Returns the parent if that was its last child, else kNone.
  uint32_t UnlinkParent(uint32_t id);
  // 64 bits of the key that nobody outside can foresee.
  uint64_t Fingerprint(const BlockKey& key) const;

  static uint64_t BookkeepingBytes(uint32_t max_blocks);

 private:
  // How far up LinkParent looks for a circle.
  static constexpr int kMaxClimb = 64;
  uint32_t Take();
  void Release(uint32_t id);
  uint32_t& Bucket(const BlockKey& key);

  uint64_t hash_seed_;
  std::vector<Entry> entries_;
  std::vector<uint32_t> buckets_;
  uint32_t free_ = kNone;
};

}  // namespace kvant
