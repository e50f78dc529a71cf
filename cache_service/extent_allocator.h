// Hands out extents of one arena by offset, without touching the arena: a two-level segregated fit
// (Masmano et al., "TLSF", ECRTS 2004) whose bookkeeping lies outside.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace kvant {

// Every extent starts and ends at a multiple of this: a cache line, and what SIMD reads like.
inline constexpr uint64_t kExtentAlignment = 64;

struct Extent {
  uint64_t offset = 0;
  uint64_t length = 0;  // as asked for; the extent itself is rounded up
  uint32_t node = 0;    // the allocator's own
};

// Single-owner. Allocates all its memory at construction; every operation takes constant time.
// Invariants: 1. extents never overlap. 2. Two free neighbours are always merged.
class ExtentAllocator {
 public:
  // At most max_extents live at once. REQUIRES: arena_bytes and max_extents > 0.
  ExtentAllocator(uint64_t arena_bytes, uint32_t max_extents);

  // nullopt: no free stretch is long enough, or max_extents are live. Length 0 takes one unit.
  std::optional<Extent> Allocate(uint64_t length);
  // REQUIRES: `extent` came from Allocate and was not freed.
  void Free(const Extent& extent);

  uint64_t arena_bytes() const { return arena_bytes_; }
  // Bytes of live extents, rounding included.
  uint64_t used_bytes() const { return used_units_ * kExtentAlignment; }
  // Bytes of bookkeeping for this many extents.
  static uint64_t BookkeepingBytes(uint32_t max_extents);
  // Whether the invariants hold; walks everything, for tests.
  bool CheckInvariants() const;

 private:
  static constexpr uint32_t kNone = ~uint32_t{0};
  static constexpr int kSecondBits = 3;
  static constexpr int kSecond = 1 << kSecondBits;
  static constexpr int kBins = 64 * kSecond;
  struct Node {
    uint64_t offset = 0;      // units
    uint64_t length = 0;      // units
    uint32_t before = kNone;  // neighbours in the arena
    uint32_t after = kNone;
    uint32_t previous = kNone;  // neighbours in the bin
    uint32_t next = kNone;
    bool free = false;
  };
  static int BinBelow(uint64_t units);
  static int BinAbove(uint64_t units);
  int FirstBinFrom(int bin) const;
  void Link(uint32_t node);
  void Unlink(uint32_t node);
  uint32_t TakeNode();
  void ReturnNode(uint32_t node);

  uint64_t arena_bytes_;
  uint64_t used_units_ = 0;
  uint32_t live_ = 0;
  uint32_t max_extents_;
  uint32_t spare_ = kNone;
  std::vector<Node> nodes_;
  std::array<uint32_t, kBins> head_;
  std::array<uint64_t, kBins / 64> occupied_{};
};

}  // namespace kvant
