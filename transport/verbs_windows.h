// The windows of one connection, both ways: those that this end exposes, and what it knows of those
// that the peer does.
#pragma once

#include <infiniband/verbs.h>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "transport/ring.h"
#include "transport/transport.h"
#include "transport/verbs_device.h"
#include "transport/verbs_wire.h"

namespace kvant::verbs {

// Memory windows of a device that are bound to nothing. Single-owner.
class WindowPool {
 public:
  explicit WindowPool(const Device* device) : device_(device) {}
  WindowPool(const WindowPool&) = delete;
  WindowPool& operator=(const WindowPool&) = delete;
  ~WindowPool();
  const Device& device() const { return *device_; }
  // nullptr: the device has no more.
  ibv_mw* Take();
  void Give(ibv_mw* window) { free_.push_back(window); }
  // Of one that is bound: nobody reaches memory through it any more.
  static void Destroy(ibv_mw* window) { ibv_dealloc_mw(window); }

 private:
  const Device* device_;
  std::vector<ibv_mw*> free_;
};

// A window that this end exposes. A slot is used anew only after the peer has said that nothing of
// it is under way there, and the device has forgotten the window's key.
struct ExposedSlot {
  enum class State : uint8_t {
    kFree,
    kExposed,       // the peer may use it
    kRevoked,       // it was told to let go
    kInvalidating,  // it has; the device is forgetting the key
    kDropped,       // its memory went away first
  };
  State state = State::kFree;
  uint64_t id = 0;
  uint64_t key = 0;
  Access access = Access::kRemoteRead;
  std::span<std::byte> bytes{};
  ibv_mr* memory = nullptr;
  std::optional<Owned<ibv_mr>> own_memory{};  // of this range alone, where windows need it
  ibv_mw* window = nullptr;                   // nullptr: it is empty, there is nothing to reach
  bool let_go = false;                        // the peer has said so
};

// Single-owner: an endpoint.
class ExposedWindows {
 public:
  explicit ExposedWindows(WindowPool* pool) : pool_(pool) {}
  ExposedWindows(const ExposedWindows&) = delete;
  ExposedWindows& operator=(const ExposedWindows&) = delete;
  ~ExposedWindows() { DropAll(); }
  // generation: of the transport, never the same. memory: what `bytes` is registered as.
  // nullptr: no slot, no window or no memory that may be locked is left.
  ExposedSlot* Add(uint64_t generation, std::span<std::byte> bytes, ibv_mr* memory, Access access);
  // nullptr: not in use (any more).
  ExposedSlot* Find(uint64_t id);
  ExposedSlot& operator[](uint32_t slot) { return slots_[slot]; }
  size_t size() const { return slots_.size(); }
  // The device has forgotten its key.
  void Release(ExposedSlot* slot);
  // Ends it by force: the peer's next use breaks the connection. The slot stays taken. REQUIRES:
  // nothing unposted names its window.
  void Drop(ExposedSlot* slot);
  // Before the connection ends: windows hold on to it.
  void DropAll();

 private:
  WindowPool* pool_;
  std::vector<ExposedSlot> slots_;
  std::vector<uint32_t> free_;
};

// A window of the peer, as it announced it.
struct KnownWindow {
  WindowRecord record{};
  bool usable = false;       // announced and not revoked
  bool letting_go = false;   // revoked, and something of ours is under way there
  uint32_t outstanding = 0;  // transfers of ours that were begun there
};

// Single-owner: an endpoint.
class KnownWindows {
 public:
  // False: its slot is taken.
  bool Add(const WindowRecord& record);
  // That the transfer may use; nullptr: there is none.
  KnownWindow* Find(const Transfer& transfer);
  // nullptr: it is none that was announced.
  KnownWindow* Find(uint64_t id);

 private:
  std::vector<KnownWindow> slots_;
};

}  // namespace kvant::verbs
