// Strings, found at a place of a text by their bytes.
#pragma once

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "node/bpe.h"

namespace kvant::node {

// Filled once, then Immutable and Thread-safe.
class ByteTrie {
 public:
  // The last value of two equal strings counts. REQUIRES: the string is not empty, value >= 0.
  void Add(std::string_view string, int32_t value) {
    KV_CHECK(!string.empty() && value >= 0);
    int32_t node = 0;
    for (size_t i = 0; i < string.size(); ++i) {
      const auto byte = static_cast<uint8_t>(string[i]);
      const PairTable::Value* found = steps_.Find(node, byte);
      PairTable::Value step = found != nullptr ? *found : PairTable::Value{nodes_++, -1};
      if (i + 1 == string.size()) step.second = value;
      steps_.Set(node, byte, step);
      node = step.first;
    }
    first_bytes_.set(static_cast<uint8_t>(string.front()));
  }
  bool empty() const { return nodes_ == 1; }

  // Calls on_match(length, value) for every string that text has at `at`, the shorter first.
  template <typename OnMatch>
  void ForEach(std::string_view text, size_t at, const OnMatch& on_match) const {
    if (at >= text.size() || !first_bytes_.test(static_cast<uint8_t>(text[at]))) return;
    int32_t node = 0;
    for (size_t i = at; i < text.size(); ++i) {
      const PairTable::Value* step = steps_.Find(node, static_cast<uint8_t>(text[i]));
      if (step == nullptr) return;
      if (step->second >= 0) on_match(i + 1 - at, step->second);
      node = step->first;
    }
  }
  // The longest of them.
  struct Match {
    size_t length = 0;
    int32_t value = -1;  // none
  };
  Match Longest(std::string_view text, size_t at) const {
    Match longest;
    ForEach(text, at, [&](size_t length, int32_t value) { longest = {length, value}; });
    return longest;
  }

 private:
  PairTable steps_;    // (node, byte): the next node, and the value of what ends there or -1
  int32_t nodes_ = 1;  // node 0 is the root
  std::bitset<256> first_bytes_;
};

}  // namespace kvant::node
