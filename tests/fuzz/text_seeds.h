// Corpora of text: seed inputs written as literals.
#pragma once

#include <initializer_list>
#include <string_view>
#include <vector>

#include "tests/fuzz/fuzz_input.h"

namespace kvant::fuzz {

inline std::vector<Bytes> TextSeeds(std::initializer_list<std::string_view> texts) {
  std::vector<Bytes> seeds;
  for (const std::string_view text : texts) seeds.push_back(ToBytes(text));
  return seeds;
}

inline std::string_view AsTextView(const uint8_t* data, size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

}  // namespace kvant::fuzz
