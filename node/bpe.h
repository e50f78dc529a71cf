// Byte pair encoding of one piece of text (Sennrich, Haddow and Birch, 2016): the pair with the
// lowest rank is merged first, the leftmost of equal ones.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace kvant::node {

// Pairs of ids, each with two numbers. A hash table of one allocation, because a vocabulary of
// 262,144 tokens has about a million merges. Filled once, then Immutable and Thread-safe.
class PairTable {
 public:
  struct Value {
    int32_t first = 0;
    int32_t second = 0;
  };
  void Reserve(size_t pairs);
  // The last value given for a pair counts. REQUIRES: left >= 0, right >= 0.
  void Set(int32_t left, int32_t right, Value value);
  // nullptr: there is no such pair.
  const Value* Find(int32_t left, int32_t right) const;
  size_t size() const { return size_; }

 private:
  struct Slot {
    uint64_t pair = kEmpty;
    Value value;
  };
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  size_t SlotOf(uint64_t pair) const;

  std::vector<Slot> slots_;  // a power of two of them, at most half of them full
  size_t size_ = 0;
};

// Which pairs of tokens become which token. Filled once, then Immutable and Thread-safe.
class BpeMerges {
 public:
  void Reserve(size_t merges) { merges_.Reserve(merges); }
  // The last of two equal pairs counts.
  void Add(int32_t left, int32_t right, int32_t merged, int32_t rank) {
    merges_.Set(left, right, {rank, merged});
  }
  // Appends what becomes of `symbols`, in O(n log n). REQUIRES: fewer than 2^31 symbols.
  void Merge(std::span<const int32_t> symbols, std::vector<int32_t>* ids) const;

 private:
  // Of few symbols, in their square.
  void MergeFew(std::span<const int32_t> symbols, std::vector<int32_t>* ids) const;

  PairTable merges_;  // first: rank, second: the merged token
};

// A piece of text as the symbols that merging begins with. Filled once, then Immutable and
// Thread-safe.
class BpeSymbols {
 public:
  BpeSymbols();
  // The token of a character. REQUIRES: id >= 0.
  void SetCharacter(char32_t character, int32_t id);
  // The token of a byte of what has no token of its own (byte fallback), or, byte_level, of every
  // byte. REQUIRES: id >= 0.
  void SetByte(uint8_t byte, int32_t id) { bytes_[byte] = id; }
  // What stands for a character that neither has; with `fuse` one for adjacent ones. Without it
  // such characters are left out.
  void SetUnknown(int32_t id, bool fuse) { unknown_ = {id, fuse}; }
  void SetByteLevel() { byte_level_ = true; }

  // REQUIRES: piece is UTF-8.
  void Of(std::string_view piece, std::vector<int32_t>* symbols) const;

 private:
  int32_t FindCharacter(char32_t character) const;

  bool byte_level_ = false;
  std::optional<std::pair<int32_t, bool>> unknown_;
  std::array<int32_t, 256> bytes_;  // -1: none
  std::array<int32_t, 128> ascii_;  // -1: none
  std::unordered_map<char32_t, int32_t> characters_;
};

}  // namespace kvant::node
