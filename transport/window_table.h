// What the backends share: which memory is registered, which windows are exposed to whom, and what
// may touch them. The one place that decides whether bytes from outside may land.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/random.h"
#include "base/status.h"
#include "transport/transport.h"

namespace kvant {

// Of one transfer, of every backend.
inline constexpr uint64_t kMaxTransferBytes = uint64_t{1} << 30;

// Single-owner: the transport's thread. Invariants: an id is never reused; a revoked window's slot
// is kept until nothing is landing in it.
class WindowTable {
 public:
  // With a seed, keys are a function of it (for simulation); without, they are secret.
  explicit WindowTable(std::optional<uint64_t> key_seed);

  void AddMemory(std::span<std::byte> memory) { memory_.push_back(memory); }
  // Also revokes the windows inside.
  void RemoveMemory(std::span<std::byte> memory);
  RemoteWindow Expose(EndpointId peer, std::span<std::byte> bytes, Access access);
  // False while something is landing in the window.
  bool Revoke(uint64_t id);
  bool Landing(uint64_t id) const;
  // Revokes everything exposed to `peer`.
  void RevokePeer(EndpointId peer);

  // The bytes that `peer` may access so; nothing when the window is unknown, revoked, another's,
  // the key is wrong, the access is not granted or the range is outside.
  std::optional<std::span<std::byte>> Find(EndpointId peer, const RemoteWindow& remote,
                                           uint64_t offset, uint64_t length, Access access) const;
  // Whether the window is still exposed.
  bool Exposed(uint64_t id) const;
  // Brackets a receive into the window that cannot be called off.
  void BeginLanding(uint64_t id);
  void EndLanding(uint64_t id);

  // Whether a transfer may be started: kInvalidArgument with the reason, else ok.
  Status Check(const Transfer& transfer, uint64_t max_transfer_bytes) const;

 private:
  struct Slot {
    uint64_t id = 0;  // 0: free
    uint64_t key = 0;
    EndpointId peer = 0;
    std::span<std::byte> bytes;
    Access access = Access::kRemoteRead;
    bool revoked = false;
    uint32_t landing = 0;
  };
  static constexpr uint64_t kSlotBits = 24;
  uint64_t NextKey();
  const Slot* SlotOf(uint64_t id) const;
  void Release(Slot* slot);

  std::vector<std::span<std::byte>> memory_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
  uint64_t generation_ = 0;
  std::optional<Random> seeded_keys_;
  std::array<uint64_t, 64> keys_{};
  size_t keys_left_ = 0;
};

// The region of every backend that needs nothing from the hardware. The table may outlive the
// transport through it.
std::unique_ptr<MemoryRegion> MakeTableRegion(std::shared_ptr<WindowTable> table,
                                              std::span<std::byte> memory);

}  // namespace kvant
