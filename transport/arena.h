// Registered memory as a value: one block a thread, mapped and registered once at start; leases
// lend ranges of it, windows expose leased ranges to a peer and give memory back only when no byte
// can land in it any more.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/status.h"
#include "transport/range_allocator.h"
#include "transport/transport.h"

namespace kvant {

class RegisteredArena;

// A range of an arena, lent. Move-only value; Single-owner (the arena's thread). The memory goes
// back to the arena when the lease and every window over it are gone and drained. REQUIRES:
// destroyed before its arena.
class Lease {
 public:
  Lease() = default;
  Lease(Lease&& other) noexcept { *this = std::move(other); }
  Lease& operator=(Lease&& other) noexcept;
  ~Lease() { Reset(); }

  explicit operator bool() const { return arena_ != nullptr; }
  uint64_t offset() const { return offset_; }  // bytes from the arena's start
  uint64_t size() const { return bytes_.size(); }
  std::span<std::byte> bytes() const { return bytes_; }
  // Gives the range back now; empty afterwards.
  void Reset();

 private:
  friend class RegisteredArena;
  RegisteredArena* arena_ = nullptr;
  uint32_t block_ = 0;
  uint64_t offset_ = 0;
  std::span<std::byte> bytes_;
};

// A part of a lease that one peer may reach. Move-only value; Single-owner. Destruction revokes;
// the memory below stays quarantined in the arena until the last landing byte has landed.
class ExposedWindow {
 public:
  ExposedWindow() = default;
  ExposedWindow(ExposedWindow&& other) noexcept { *this = std::move(other); }
  ExposedWindow& operator=(ExposedWindow&& other) noexcept;
  ~ExposedWindow() { Revoke(); }

  explicit operator bool() const { return arena_ != nullptr; }
  // What to send to the peer.
  const RemoteWindow& remote() const { return remote_; }
  // Takes the window back; empty afterwards. True: no byte lands any more. False: one still may,
  // and the range is quarantined: neither read nor reuse the lease's bytes before
  // RegisteredArena::Collect() says that nothing is quarantined, or drop the lease at once.
  bool Revoke();

 private:
  friend class RegisteredArena;
  RegisteredArena* arena_ = nullptr;
  uint32_t block_ = 0;
  RemoteWindow remote_;
};

struct ArenaOptions {
  uint64_t bytes = 0;           // rounded up to whole pages
  bool huge_pages = true;       // advise the kernel; it may decline
  bool populate = false;        // touch every page at start rather than on first use
  uint32_t max_leases = 65536;  // ranges, lent or free, that the bookkeeping has room for
};

struct ArenaUse {
  uint64_t capacity_bytes = 0;
  uint64_t lent_bytes = 0;         // rounding and quarantine included
  uint64_t high_water_bytes = 0;   // the most that was ever lent
  uint64_t quarantined_bytes = 0;  // given back, but a window may still be landing
  uint64_t leases = 0;             // lent now
  uint64_t exhausted = 0;          // times Lend said kResourceExhausted
};

// One memory block, registered with one transport. Single-owner; outlives its leases and windows
// (checked), is outlived by its transport. After Create it allocates nothing on success paths.
class RegisteredArena {
 public:
  static Result<std::unique_ptr<RegisteredArena>> Create(Transport* transport,
                                                         const ArenaOptions& options);
  ~RegisteredArena();
  RegisteredArena(const RegisteredArena&) = delete;
  RegisteredArena& operator=(const RegisteredArena&) = delete;

  // A range of `bytes` > 0, aligned to 64. O(1). kResourceExhausted: back off until leases return.
  // kInvalidArgument: more than the arena ever holds.
  Result<Lease> Lend(uint64_t bytes);
  // Lets `peer` reach [offset, offset + length) of the lease. kInvalidArgument: outside the lease.
  Result<ExposedWindow> Expose(const Lease& lease, EndpointId peer, uint64_t offset,
                               uint64_t length, Access access);
  // Takes back what finished landing; returns how many windows are still quarantined. Lend calls it
  // when short.
  size_t Collect();
  ArenaUse use() const;
  std::span<std::byte> bytes() const { return memory_; }

 private:
  friend class Lease;
  friend class ExposedWindow;
  struct Quarantined {
    uint64_t window = 0;
    uint32_t block = 0;
  };
  RegisteredArena(Transport* transport, std::span<std::byte> memory,
                  std::unique_ptr<MemoryRegion> region, uint32_t max_leases);
  void Hold(uint32_t block) { ++holders_[block]; }
  void Drop(uint32_t block);
  bool Revoke(uint64_t window, uint32_t block);

  Transport* transport_;
  std::span<std::byte> memory_;
  std::unique_ptr<MemoryRegion> region_;
  RangeAllocator allocator_;
  std::vector<uint32_t> holders_;  // by block: the lease and the windows over it
  std::vector<Quarantined> quarantine_;
  ArenaUse use_;
};

}  // namespace kvant
