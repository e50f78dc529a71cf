// Reservations and pins: who keeps which entry of the store, and until when.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/clock.h"

namespace kvant {

// Single-owner. Allocates everything at construction. Add and Remove cost the logarithm of the
// number of holds with a deadline, all else is constant but for what it returns.
class HoldTable {
 public:
  static constexpr uint32_t kNone = ~uint32_t{0};

  enum class Kind : uint8_t { kReservation, kReadPin, kUserPin };
  struct Hold {
    uint64_t owner = 0;
    TimePoint deadline{};
    uint32_t entry = 0;
    uint32_t entry_generation = 0;
    uint32_t range = 0;          // reservations: the memory
    uint32_t payload_bytes = 0;  // user pins: what they count for
    uint32_t landing = 0;        // reservations: transfers that may still write
    Kind kind = Kind::kReadPin;
    bool ended = false;  // reservations: gone, kept for what is still landing
    bool owns_memory = false;
    bool used = false;
    // The table's own.
    uint32_t generation = 0;
    uint32_t heap_at = kNone;
    uint32_t previous = kNone;
    uint32_t next = kNone;
  };

  explicit HoldTable(uint32_t capacity);

  uint32_t capacity() const { return static_cast<uint32_t>(holds_.size()); }
  uint32_t size() const { return size_; }
  bool full() const { return free_ == kNone; }
  Hold& operator[](uint32_t slot) { return holds_[slot]; }
  const Hold& operator[](uint32_t slot) const { return holds_[slot]; }
  // REQUIRES: !full(). Returns the slot.
  uint32_t Add(Kind kind, uint64_t owner, TimePoint deadline);
  void Remove(uint32_t slot);
  // The hold ends but its slot stays: neither deadline nor owner lead to it any more.
  void Detach(uint32_t slot);
  // A handle that is never given again.
  uint64_t IdOf(uint32_t slot) const;
  // kNone when the id is unknown.
  uint32_t SlotOf(uint64_t id) const;
  // A hold whose deadline is at or before `now`, or kNone.
  uint32_t Expired(TimePoint now) const;
  // A hold of the owner, or kNone.
  uint32_t AnyOf(uint64_t owner) const;

  static uint64_t BookkeepingBytes(uint32_t capacity);

 private:
  void Place(uint32_t heap_index, uint32_t slot);
  void SiftUp(uint32_t heap_index);
  void SiftDown(uint32_t heap_index);
  uint32_t& Bucket(uint64_t owner);

  std::vector<Hold> holds_;
  std::vector<uint32_t> heap_;     // slots, earliest deadline first
  std::vector<uint32_t> buckets_;  // by owner
  uint32_t heap_size_ = 0;
  uint32_t free_ = kNone;
  uint32_t size_ = 0;
};

}  // namespace kvant
