// The blocks of one shard: reserve, seal, find, pin, evict. A state machine: it reads no clock and
// moves no bytes; the server lets bytes land in the buffers that it hands out.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/clock.h"
#include "base/status.h"
#include "cache_service/block_key.h"
#include "cache_service/eviction_queues.h"
#include "cache_service/manifest.h"

namespace kvant {

// Who holds a reservation or a pin: the server uses its endpoint ids. When an owner goes, all that
// it held is released.
using OwnerId = uint64_t;
// Handles; never reused, 0 is none.
using ReservationId = uint64_t;
using PinId = uint64_t;

struct BlockStoreOptions {
  std::span<std::byte> arena{};  // payloads and manifests; outlives the store
  uint32_t max_blocks = 1024;    // sealed and reserved
  uint32_t max_pins = 4096;      // pins and open reservations
  // Payload bytes that user pins may hold, so that they cannot crowd out everything else.
  uint64_t max_user_pinned_bytes = 0;
  EvictionPolicy policy{};
  // Of the key table. A server draws it at random, so that no client can make keys collide.
  uint64_t hash_seed = 0;
  // TESTS ONLY. Deliberate faults that the simulator must find.
  bool fault_skip_verification = false;  // Seal publishes whatever landed
  bool fault_ignore_pins = false;        // pinned blocks are evicted too
};

// How a memory budget is split into arena and index, so that both together never exceed it.
struct StorePlan {
  uint64_t arena_bytes = 0;
  uint32_t max_blocks = 0;
  uint32_t max_pins = 0;
  uint64_t index_bytes = 0;
};
// kInvalidArgument: the budget is too small to be of use (below 1 MiB).
// expected_block_bytes: how small the average block may be before the index, not the arena, is
// full.
Result<StorePlan> PlanStore(uint64_t memory_bytes, uint64_t expected_block_bytes);

enum class BlockState : uint8_t {
  kAbsent,
  kReserved,  // somebody is writing it
  kPresent,   // sealed: may be read
};

struct ReserveRequest {
  BlockKey key;
  BlockKey parent;  // zero: starts a chain
  uint64_t payload_bytes = 0;
  uint64_t manifest_bytes = 0;  // the most that Seal will bring
  OwnerId owner = 0;
  TimePoint deadline{};  // the reservation is reaped then, unless sealed
};
struct ReserveResult {
  BlockState found = BlockState::kAbsent;  // kAbsent: reserved now. Else: first writer wins.
  ReservationId reservation = 0;
  std::span<std::byte> payload{};  // where the bytes shall land
};

// A sealed block as readers see it. Borrowed: valid until the next call that may evict, or as long
// as a pin on the block is held.
struct BlockView {
  BlockKey key;
  std::span<std::byte> payload;         // inside the arena
  std::span<const std::byte> manifest;  // encoded
  std::array<uint8_t, kMaxParts> cuts{};
  CutEnds cut_ends{};
};

// How many there are, and how often what happened.
struct StoreStats {
  uint64_t blocks = 0;        // sealed
  uint64_t reservations = 0;  // open
  uint64_t pins = 0;
  uint64_t payload_bytes = 0;  // of sealed blocks
  uint64_t used_bytes = 0;     // arena in use, plus the index
  uint64_t limit_bytes = 0;    // whole arena plus index
  uint64_t user_pinned_bytes = 0;
  uint64_t sealed = 0;
  uint64_t evicted = 0;
  uint64_t reaped = 0;           // reservations and pins whose deadline passed
  uint64_t dropped_corrupt = 0;  // by Reverify
  uint64_t seal_refused = 0;     // checksums did not match
};

// Single-owner. Allocates everything at construction, so used memory never exceeds limit_bytes().
// Invariants:
// 1. A block is visible (Find, View, Pin) only after Seal verified every checksum of it.
// 2. A block with stored children is not evicted before them; a pinned or reserved one not at all.
// 3. The memory of a reservation is not lent again while bytes may still land in it.
// 4. No operation takes time that grows with the number of stored blocks (amortised; pins and
//    deadlines cost the logarithm of their number).
class BlockStore {
 public:
  explicit BlockStore(const BlockStoreOptions& options);
  ~BlockStore();
  BlockStore(const BlockStore&) = delete;
  BlockStore& operator=(const BlockStore&) = delete;

  // Makes room if need be and hands out memory. kInvalidArgument: sizes of 0 or too large for this
  // store ever. kResourceExhausted: everything that is in the way is pinned or reserved.
  Result<ReserveResult> Reserve(const ReserveRequest& request);
  // Bytes are about to land in a reservation (+1) or have done so (-1). False: unknown, and nothing
  // may land. The memory of a reservation that ends meanwhile is freed with the last -1, which is
  // therefore accepted, and needed, also after its end.
  bool AddLanding(ReservationId id, int delta);
  // Publishes: checks the manifest against the reservation, and every checksum. On failure the
  // reservation is gone. kInvalidArgument: unknown reservation, malformed manifest, other key or
  // size. kDataLoss: a checksum differs.
  // REQUIRES: nothing is landing (unless fault_skip_verification).
  Status Seal(ReservationId id, std::span<const std::byte> manifest);
  // Gives a reservation up. Unknown ids are ignored.
  void Abort(ReservationId id);

  BlockState Find(const BlockKey& key) const;
  // nullopt unless kPresent.
  std::optional<BlockView> View(const BlockKey& key) const;
  // Counts one use, which the eviction policy looks at.
  void Touch(const BlockKey& key);
  // Keeps a sealed block for a reader until Unpin or `deadline`. kUnavailable: not present.
  // kResourceExhausted: too many pins.
  Result<PinId> Pin(const BlockKey& key, OwnerId owner, TimePoint deadline);
  // Unknown ids are ignored: the deadline may have passed.
  void Unpin(PinId id);
  // Keeps a sealed block because somebody asked for it, until `deadline` (which replaces that of an
  // earlier call); nullopt ends it. kUnavailable: not present. kResourceExhausted: too many pins,
  // or more than max_user_pinned_bytes.
  Status SetUserPin(const BlockKey& key, std::optional<TimePoint> deadline);

  // Verifies a stored block again; drops it if it is bad, as soon as no pin holds it. It is
  // invisible at once. Returns kDataLoss if it was bad, ok if it is good or absent.
  Status Reverify(const BlockKey& key);
  // Ends reservations and pins whose deadline is before or at `now`.
  void Reap(TimePoint now);
  // Ends all reservations and pins of an owner.
  void ReleaseOwner(OwnerId owner);

  StoreStats stats() const;
  // Arena plus index: what the store takes at most, and always takes of address space.
  uint64_t limit_bytes() const;
  // Index bytes that a store of this size allocates.
  static uint64_t IndexBytes(uint32_t max_blocks, uint32_t max_pins, const EvictionPolicy& policy);
  // Sealed blocks in no particular order, for checkers, reports and tests.
  void ForEach(const std::function<void(const BlockView&)>& visit) const;
  // Empty if the invariants hold, else the first one that does not. Walks everything; for tests.
  std::string CheckInvariants() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvant
