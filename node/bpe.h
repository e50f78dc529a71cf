// Byte pair encoding of one piece of text (Sennrich, Haddow and Birch, 2016): the pair with the
// lowest rank is merged first, the leftmost of equal ones.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace kvant::node {

// Filled once, then Immutable and Thread-safe.
class BpeMerges {
 public:
  // The token of a single byte. Every byte that a text may hold needs one.
  void SetByte(uint8_t byte, int32_t id) { byte_ids_[byte] = id; }
  // Pairs are added in the order of their rank; the first of two equal pairs counts.
  void Add(int32_t left, int32_t right, int32_t merged);
  // Appends the ids of `piece`, in O(n log n).
  void Encode(std::string_view piece, std::vector<int32_t>* ids) const;

 private:
  struct Merge {
    int32_t rank = 0;
    int32_t merged = 0;
  };
  const Merge* Find(int32_t left, int32_t right) const;

  std::array<int32_t, 256> byte_ids_{};
  std::unordered_map<uint64_t, Merge> merges_;
};

}  // namespace kvant::node
