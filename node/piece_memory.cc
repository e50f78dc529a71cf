#include "node/piece_memory.h"

#include <algorithm>
#include <atomic>

namespace kvant::node {

uint64_t PieceMemory::NewOwner() {
  static std::atomic<uint64_t> last{0};
  return ++last;
}

size_t PieceMemory::PlaceOf(std::string_view piece) {
  // Fibonacci hashing (Knuth, TAOCP 6.4), eight bytes at a time.
  constexpr uint64_t kFactor = 0x9E3779B97F4A7C15U;
  uint64_t hash = piece.size();
  for (size_t at = 0; at < piece.size(); at += sizeof(uint64_t)) {
    uint64_t eight = 0;
    std::memcpy(&eight, piece.data() + at, std::min(sizeof(eight), piece.size() - at));
    hash = (hash ^ eight) * kFactor;
    hash ^= hash >> 32;
  }
  return (hash >> 20) % kEntries;
}

void PieceMemory::Set(uint64_t owner, std::string_view piece, std::span<const int32_t> ids) {
  if (piece.size() > kMostBytes || ids.size() > kMostIds) return;
  Entry& entry = entries_[PlaceOf(piece)];
  entry.owner = owner;
  std::copy(ids.begin(), ids.end(), entry.ids.begin());
  std::copy(piece.begin(), piece.end(), entry.text.begin());
  entry.bytes = static_cast<uint8_t>(piece.size());
  entry.count = static_cast<uint8_t>(ids.size());
}

}  // namespace kvant::node
