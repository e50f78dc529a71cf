// What short pieces of text became, of those that a thread met last: a text repeats its words.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

namespace kvant::node {

// Direct-mapped; a piece that takes the place of another makes it forgotten. Single-owner.
class PieceMemory {
 public:
  // A number that no other caller gives, for all that it remembers; not 0.
  static uint64_t NewOwner();

  // Appends what became of a piece, if it is known. owner: whose tokens they are.
  bool Find(uint64_t owner, std::string_view piece, std::vector<int32_t>* ids) const {
    if (piece.size() > kMostBytes) return false;
    const Entry& entry = entries_[PlaceOf(piece)];
    if (entry.owner != owner || entry.bytes != piece.size() ||
        std::memcmp(entry.text.data(), piece.data(), piece.size()) != 0) {
      return false;
    }
    ids->insert(ids->end(), entry.ids.begin(), entry.ids.begin() + entry.count);
    return true;
  }
  // Long pieces, and those of many tokens, are not remembered.
  void Set(uint64_t owner, std::string_view piece, std::span<const int32_t> ids);

 private:
  static constexpr size_t kMostBytes = 20;
  static constexpr size_t kMostIds = 8;
  static constexpr size_t kEntries = 2048;
  struct Entry {
    uint64_t owner = 0;
    std::array<int32_t, kMostIds> ids{};
    std::array<char, kMostBytes> text{};
    uint8_t bytes = 0;
    uint8_t count = 0;
  };
  static size_t PlaceOf(std::string_view piece);

  std::vector<Entry> entries_ = std::vector<Entry>(kEntries);
};

}  // namespace kvant::node
