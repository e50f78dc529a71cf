#include "transport/window_table.h"

#include <algorithm>
#include <utility>

#include "base/bytes.h"

namespace kvant {
namespace {

bool Inside(std::span<const std::byte> part, std::span<const std::byte> whole) {
  return part.data() >= whole.data() && part.data() <= whole.data() + whole.size() &&
         RangeFits(static_cast<uint64_t>(part.data() - whole.data()), part.size(), whole.size());
}

class TableRegion final : public MemoryRegion {
 public:
  TableRegion(std::shared_ptr<WindowTable> table, std::span<std::byte> memory)
      : table_(std::move(table)), memory_(memory) {
    table_->AddMemory(memory_);
  }
  ~TableRegion() override { table_->RemoveMemory(memory_); }
  TableRegion(const TableRegion&) = delete;
  TableRegion& operator=(const TableRegion&) = delete;

  std::span<std::byte> bytes() const override { return memory_; }
  Result<RemoteWindow> Expose(EndpointId peer, uint64_t offset, uint64_t length,
                              Access access) override {
    if (!RangeFits(offset, length, memory_.size())) {
      return InvalidArgument(
          "exposing [{}, +{}) of a region of {} bytes to endpoint {}: outside it", offset, length,
          memory_.size(), peer);
    }
    return table_->Expose(peer, memory_.subspan(offset, length), access);
  }
  bool Revoke(uint64_t window_id) override { return table_->Revoke(window_id); }
  bool Landing(uint64_t window_id) const override { return table_->Landing(window_id); }

 private:
  std::shared_ptr<WindowTable> table_;
  std::span<std::byte> memory_;
};

}  // namespace

WindowTable::WindowTable(std::optional<uint64_t> key_seed) {
  if (key_seed) seeded_keys_.emplace(*key_seed);
}

void WindowTable::RemoveMemory(std::span<std::byte> memory) {
  for (Slot& slot : slots_) {
    if (slot.id != 0 && !slot.revoked && Inside(slot.bytes, memory)) Revoke(slot.id);
  }
  const auto found = std::find_if(memory_.begin(), memory_.end(), [memory](const auto& known) {
    return known.data() == memory.data() && known.size() == memory.size();
  });
  if (found != memory_.end()) memory_.erase(found);
}

uint64_t WindowTable::NextKey() {
  if (seeded_keys_) return seeded_keys_->Next();
  // The operating system is asked for many keys at once: a call for each would cost more than the
  // rest of Expose.
  if (keys_left_ == 0) {
    SecureRandomBytes(std::as_writable_bytes(std::span(keys_)));
    keys_left_ = keys_.size();
  }
  return keys_[--keys_left_];
}

RemoteWindow WindowTable::Expose(EndpointId peer, std::span<std::byte> bytes, Access access) {
  uint32_t index = 0;
  if (free_.empty()) {
    index = static_cast<uint32_t>(slots_.size());
    KV_CHECK(index < (1U << kSlotBits));
    slots_.emplace_back();
  } else {
    index = free_.back();
    free_.pop_back();
  }
  Slot& slot = slots_[index];
  slot = {.id = (++generation_ << kSlotBits) | index,
          .key = NextKey(),
          .peer = peer,
          .bytes = bytes,
          .access = access};
  return {slot.id, slot.key, bytes.size()};
}

const WindowTable::Slot* WindowTable::SlotOf(uint64_t id) const {
  const uint64_t index = id & ((uint64_t{1} << kSlotBits) - 1);
  if (id == 0 || index >= slots_.size() || slots_[index].id != id) return nullptr;
  return &slots_[index];
}

void WindowTable::Release(Slot* slot) {
  free_.push_back(static_cast<uint32_t>(slot - slots_.data()));
  *slot = {};
}

bool WindowTable::Revoke(uint64_t id) {
  auto* slot = const_cast<Slot*>(SlotOf(id));
  if (slot == nullptr) return true;
  slot->revoked = true;
  if (slot->landing > 0) return false;
  Release(slot);
  return true;
}

bool WindowTable::Landing(uint64_t id) const {
  const Slot* slot = SlotOf(id);
  return slot != nullptr && slot->landing > 0;
}

void WindowTable::RevokePeer(EndpointId peer) {
  for (Slot& slot : slots_) {
    if (slot.id != 0 && !slot.revoked && slot.peer == peer) Revoke(slot.id);
  }
}

std::optional<std::span<std::byte>> WindowTable::Find(EndpointId peer, const RemoteWindow& remote,
                                                      uint64_t offset, uint64_t length,
                                                      Access access) const {
  const Slot* slot = SlotOf(remote.id);
  if (slot == nullptr || slot->revoked || slot->peer != peer || slot->key != remote.key) {
    return std::nullopt;
  }
  if ((static_cast<uint8_t>(slot->access) & static_cast<uint8_t>(access)) == 0) return std::nullopt;
  if (!RangeFits(offset, length, slot->bytes.size())) return std::nullopt;
  return slot->bytes.subspan(offset, length);
}

bool WindowTable::Exposed(uint64_t id) const {
  const Slot* slot = SlotOf(id);
  return slot != nullptr && !slot->revoked;
}

void WindowTable::BeginLanding(uint64_t id) {
  auto* slot = const_cast<Slot*>(SlotOf(id));
  KV_CHECK(slot != nullptr);
  ++slot->landing;
}

void WindowTable::EndLanding(uint64_t id) {
  auto* slot = const_cast<Slot*>(SlotOf(id));
  KV_CHECK(slot != nullptr && slot->landing > 0);
  if (--slot->landing == 0 && slot->revoked) Release(slot);
}

Status WindowTable::Check(const Transfer& transfer, uint64_t max_transfer_bytes) const {
  const std::span<const std::byte> local = transfer.local;
  if (local.size() > max_transfer_bytes) {
    return InvalidArgument("transferring {} bytes: at most {} at once; split it", local.size(),
                           max_transfer_bytes);
  }
  if (!RangeFits(transfer.remote_offset, local.size(), transfer.remote.length)) {
    return InvalidArgument("transferring [{}, +{}) of a remote window of {} bytes: outside it",
                           transfer.remote_offset, local.size(), transfer.remote.length);
  }
  const bool registered =
      local.empty() || std::any_of(memory_.begin(), memory_.end(),
                                   [local](const auto& memory) { return Inside(local, memory); });
  if (!registered) {
    return InvalidArgument(
        "transferring {} bytes of memory that is not registered: lease it from "
        "the transport's arena",
        local.size());
  }
  return OkStatus();
}

std::unique_ptr<MemoryRegion> MakeTableRegion(std::shared_ptr<WindowTable> table,
                                              std::span<std::byte> memory) {
  return std::make_unique<TableRegion>(std::move(table), memory);
}

}  // namespace kvant
