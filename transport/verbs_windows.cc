#include "transport/verbs_windows.h"

#include "base/bytes.h"
#include "base/random.h"

namespace kvant::verbs {

WindowPool::~WindowPool() {
  for (ibv_mw* window : free_) Destroy(window);
}

ibv_mw* WindowPool::Take() {
  if (free_.empty()) return ibv_alloc_mw(device_->domain(), IBV_MW_TYPE_2);
  ibv_mw* window = free_.back();
  free_.pop_back();
  return window;
}

ExposedSlot* ExposedWindows::Add(uint64_t generation, std::span<std::byte> bytes, ibv_mr* memory,
                                 Access access) {
  if (free_.empty() && slots_.size() == kMaxWindows) return nullptr;
  std::optional<Owned<ibv_mr>> own_memory;
  ibv_mw* window = nullptr;
  if (!bytes.empty()) {
    if (!pool_->device().windows_keep_bounds()) {
      auto made = pool_->device().Register(bytes.data(), bytes.size(),
                                           IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND);
      if (!made.ok()) return nullptr;
      own_memory = *std::move(made);
      memory = own_memory->get();
    }
    window = pool_->Take();
    if (window == nullptr) return nullptr;
  }
  if (free_.empty()) {
    free_.push_back(static_cast<uint32_t>(slots_.size()));
    slots_.emplace_back();
  }
  const uint32_t index = free_.back();
  free_.pop_back();
  slots_[index] = {.state = ExposedSlot::State::kExposed,
                   .id = generation << 16 | index,
                   .key = SecureRandomUint64(),
                   .access = access,
                   .bytes = bytes,
                   .memory = memory,
                   .own_memory = std::move(own_memory),
                   .window = window};
  return &slots_[index];
}

ExposedSlot* ExposedWindows::Find(uint64_t id) {
  const uint32_t index = SlotOf(id);
  if (index >= slots_.size()) return nullptr;
  ExposedSlot& slot = slots_[index];
  return slot.state != ExposedSlot::State::kFree && slot.id == id ? &slot : nullptr;
}

void ExposedWindows::Release(ExposedSlot* slot) {
  if (slot->window != nullptr) pool_->Give(slot->window);
  *slot = {};
  free_.push_back(static_cast<uint32_t>(slot - slots_.data()));
}

void ExposedWindows::Drop(ExposedSlot* slot) {
  if (slot->window != nullptr) WindowPool::Destroy(slot->window);
  slot->window = nullptr;
  slot->own_memory.reset();
  slot->bytes = {};
  slot->state = ExposedSlot::State::kDropped;
}

void ExposedWindows::DropAll() {
  for (ExposedSlot& slot : slots_) {
    if (slot.state != ExposedSlot::State::kFree) Drop(&slot);
  }
}

bool KnownWindows::Add(const WindowRecord& record) {
  const size_t index = SlotOf(record.id);
  if (index >= slots_.size()) slots_.resize(index + 1);
  KnownWindow& window = slots_[index];
  if (window.usable || window.letting_go) return false;
  window = {.record = record, .usable = true};
  return true;
}

KnownWindow* KnownWindows::Find(uint64_t id) {
  const size_t index = SlotOf(id);
  return index < slots_.size() && slots_[index].record.id == id ? &slots_[index] : nullptr;
}

KnownWindow* KnownWindows::Find(const Transfer& transfer) {
  KnownWindow* window = Find(transfer.remote.id);
  if (window == nullptr || !window->usable) return nullptr;
  const auto access =
      transfer.op == Transfer::Op::kWrite ? Access::kRemoteWrite : Access::kRemoteRead;
  const WindowRecord& record = window->record;
  const bool granted = record.key == transfer.remote.key &&
                       (record.access & static_cast<uint32_t>(access)) != 0 &&
                       RangeFits(transfer.remote_offset, transfer.local.size(), record.length);
  return granted ? window : nullptr;
}

}  // namespace kvant::verbs
