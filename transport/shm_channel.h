// What two endpoints of the shm backend share: a ring of records and a table of windows each way.
// Everything that the other process writes is read once and checked; what it can break by writing
// garbage is this connection alone.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/status.h"
#include "transport/shared_memory.h"

namespace kvant::shm {

// Of records' ring; a power of two.
inline constexpr uint64_t kRingBytes = uint64_t{1} << 18;
// Windows exposed to one peer at once.
inline constexpr uint32_t kWindows = 1U << 14;

enum class RecordKind : uint8_t {
  kMessage = 1,  // a piece of one; `last` ends it
  kWritten = 2,  // a write with an immediate landed
  kGoodbye = 3,
};

struct Record {
  uint32_t bytes = 0;  // that follow
  RecordKind kind = RecordKind::kMessage;
  uint8_t last = 1;
  uint16_t reserved = 0;
  uint32_t immediate = 0;
  uint32_t reserved_too = 0;
  uint64_t window = 0;
};
static_assert(sizeof(Record) == 24);
inline constexpr uint64_t kMaxPieceBytes = kRingBytes / 4;

// One end's part of the memory, but for its ring. Counts only grow.
struct alignas(64) Side {
  std::atomic<uint64_t> head;                  // bytes that were put into this side's ring
  alignas(64) std::atomic<uint64_t> tail;      // bytes that this side took from the other's ring
  alignas(64) std::atomic<uint32_t> sleeping;  // 1: ring this side's bell after a change
  std::atomic<uint32_t> waits_for_space;       // 1: ring it when its ring has room
  alignas(64) std::atomic<uint64_t> written;  // bytes that this side wrote into the other's windows
  std::atomic<uint64_t> read;                 // and read from them
};

// A window that one end exposes to the other.
struct alignas(64) WindowSlot {
  std::atomic<uint64_t> key;      // 0: not exposed
  std::atomic<uint32_t> landing;  // transfers of the other end that are at it
  std::atomic<uint32_t> access;
  std::atomic<uint64_t> id;
  std::atomic<uint64_t> pages;   // whose memory, as announced over the socket
  std::atomic<uint64_t> offset;  // in these pages
  std::atomic<uint64_t> length;
};

// The memory as one end sees it. The two ends are 0, who made it, and 1. Single-owner.
class Channel {
 public:
  static uint64_t MemoryBytes();
  Channel(SharedMemory memory, int end);
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  int fd() const { return memory_.fd(); }
  Side& ours() const { return *sides_[0]; }
  Side& theirs() const { return *sides_[1]; }
  WindowSlot& our_window(uint32_t slot) const { return windows_[0][slot]; }
  WindowSlot& their_window(uint32_t slot) const { return windows_[1][slot]; }

  // Whether a record with so many bytes fits into our ring now. Where it doesn't, the other end
  // is asked to ring our bell when it has taken something.
  bool HasSpace(uint64_t bytes);
  // REQUIRES: HasSpace(record.bytes), body has record.bytes.
  void Put(const Record& record, std::span<const std::byte> body);
  // Whether there is a record of theirs.
  bool Readable() const { return theirs().head.load(std::memory_order_acquire) != tail_; }
  // Takes the next one; its bytes are appended to `body`. Nothing: there is none, or what stands
  // there is no record, which broken() tells apart.
  std::optional<Record> Take(std::vector<std::byte>* body);
  bool broken() const { return broken_; }

 private:
  void CopyIn(uint64_t at, std::span<const std::byte> bytes);
  void CopyOut(uint64_t at, std::span<std::byte> bytes) const;

  SharedMemory memory_;
  Side* sides_[2] = {};          // ours, theirs
  WindowSlot* windows_[2] = {};  // ours, theirs
  std::byte* rings_[2] = {};     // ours, theirs
  uint64_t head_ = 0;  // of our ring: what the other end may have overwritten is not asked
  uint64_t tail_ = 0;  // of theirs
  bool broken_ = false;
};

}  // namespace kvant::shm
