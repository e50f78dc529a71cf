#include "transport/shm_channel.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace kvant::shm {
namespace {

// [sides][windows of each][ring of each]
constexpr uint64_t kWindowsAt = 2 * sizeof(Side);
constexpr uint64_t kRingsAt = kWindowsAt + 2 * kWindows * sizeof(WindowSlot);

// Records begin at multiples of 8.
constexpr uint64_t Padded(uint64_t bytes) { return (bytes + 7) / 8 * 8; }

}  // namespace

static_assert(std::atomic<uint64_t>::is_always_lock_free);

uint64_t Channel::MemoryBytes() { return kRingsAt + 2 * kRingBytes; }

Channel::Channel(SharedMemory memory, int end) : memory_(std::move(memory)) {
  KV_CHECK(memory_.bytes().size() == MemoryBytes());
  std::byte* start = memory_.bytes().data();
  for (int i = 0; i < 2; ++i) {
    const auto of = static_cast<uint64_t>(i == 0 ? end : 1 - end);
    // Memory of zeros is what all of these are made from.
    sides_[i] = reinterpret_cast<Side*>(start + of * sizeof(Side));
    windows_[i] =
        reinterpret_cast<WindowSlot*>(start + kWindowsAt + of * kWindows * sizeof(WindowSlot));
    rings_[i] = start + kRingsAt + of * kRingBytes;
  }
}

bool Channel::HasSpace(uint64_t bytes) {
  const uint64_t needs = sizeof(Record) + Padded(bytes);
  const auto fits = [&] {
    const uint64_t taken = theirs().tail.load(std::memory_order_seq_cst);
    if (head_ - taken > kRingBytes) {
      broken_ = true;
      return false;
    }
    return needs <= kRingBytes - (head_ - taken);
  };
  if (fits()) return true;
  ours().waits_for_space.store(1, std::memory_order_seq_cst);
  return fits();
}

void Channel::CopyIn(uint64_t at, std::span<const std::byte> bytes) {
  const uint64_t from = at % kRingBytes;
  const uint64_t first = std::min<uint64_t>(bytes.size(), kRingBytes - from);
  if (first > 0) std::memcpy(rings_[0] + from, bytes.data(), first);
  if (bytes.size() > first) std::memcpy(rings_[0], bytes.data() + first, bytes.size() - first);
}

void Channel::CopyOut(uint64_t at, std::span<std::byte> bytes) const {
  const uint64_t from = at % kRingBytes;
  const uint64_t first = std::min<uint64_t>(bytes.size(), kRingBytes - from);
  if (first > 0) std::memcpy(bytes.data(), rings_[1] + from, first);
  if (bytes.size() > first) std::memcpy(bytes.data() + first, rings_[1], bytes.size() - first);
}

void Channel::Put(const Record& record, std::span<const std::byte> body) {
  KV_DCHECK(record.bytes == body.size());
  CopyIn(head_, std::as_bytes(std::span(&record, 1)));
  CopyIn(head_ + sizeof(Record), body);
  head_ += sizeof(Record) + Padded(body.size());
  ours().head.store(head_, std::memory_order_seq_cst);
}

std::optional<Record> Channel::Take(std::vector<std::byte>* body) {
  const uint64_t there = theirs().head.load(std::memory_order_acquire) - tail_;
  if (there == 0) return std::nullopt;
  Record record;
  broken_ = broken_ || there > kRingBytes || there < sizeof(Record);
  if (broken_) return std::nullopt;
  CopyOut(tail_, std::as_writable_bytes(std::span(&record, 1)));
  if (record.bytes > kMaxPieceBytes || sizeof(Record) + Padded(record.bytes) > there) {
    broken_ = true;
    return std::nullopt;
  }
  const size_t before = body->size();
  body->resize(before + record.bytes);
  CopyOut(tail_ + sizeof(Record), std::span(*body).subspan(before));
  tail_ += sizeof(Record) + Padded(record.bytes);
  ours().tail.store(tail_, std::memory_order_seq_cst);
  return record;
}

}  // namespace kvant::shm
