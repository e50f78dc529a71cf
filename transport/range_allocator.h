// Divides a range of bytes into blocks: two-level segregated fit (Masmano et al., "TLSF: a new
// dynamic memory allocator for real-time systems", 2004) with its bookkeeping outside the memory.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace kvant {

// Single-owner. O(1) but for a bounded walk when memory is nearly full; allocates nothing after
// construction. Invariants:
//   1. Blocks cover [0, capacity) without gap or overlap, in the order of the neighbour links.
//   2. No two neighbours are both free.
//   3. A free block is in exactly the list of its size class; a list's bit is set iff it holds one.
class RangeAllocator {
 public:
  static constexpr uint64_t kGranule = 64;  // bytes: a cache line, and the widest vector load

  // REQUIRES: capacity is a multiple of kGranule, max_blocks > 0.
  RangeAllocator(uint64_t capacity, uint32_t max_blocks);

  // A block of at least `bytes` > 0; nothing when no free block is large enough or the
  // bookkeeping is full.
  std::optional<uint32_t> Allocate(uint64_t bytes);
  // REQUIRES: `block` is allocated.
  void Free(uint32_t block);
  uint64_t offset(uint32_t block) const { return blocks_[block].offset; }
  uint64_t size(uint32_t block) const { return blocks_[block].size; }
  // Checks the invariants; for tests. O(blocks).
  bool Consistent() const;

 private:
  static constexpr uint32_t kNone = UINT32_MAX;
  static constexpr int kSecondBits = 4;  // 16 classes per power of two: at most 1/16 of rounding
  static constexpr int kSecondCount = 1 << kSecondBits;
  static constexpr int kFirstCount = 64;
  struct Block {
    uint64_t offset = 0;
    uint64_t size = 0;
    uint32_t before = kNone;         // neighbour in memory
    uint32_t after = kNone;          // neighbour in memory
    uint32_t previous_free = kNone;  // in the class list
    uint32_t next_free = kNone;      // in the class list, or in the list of unused records
    bool free = false;
  };
  struct Class {
    int first = 0;
    int second = 0;
  };
  static Class ClassOf(uint64_t size);
  uint32_t& Head(Class at) { return heads_[at.first * kSecondCount + at.second]; }
  void Insert(uint32_t block);
  void Remove(uint32_t block);
  uint32_t FindFit(uint64_t size);

  uint64_t capacity_;
  std::vector<Block> blocks_;
  uint32_t unused_ = kNone;
  uint64_t first_bits_ = 0;
  std::array<uint32_t, kFirstCount> second_bits_{};
  std::array<uint32_t, kFirstCount * kSecondCount> heads_;
};

}  // namespace kvant
