// What every fuzz target has: the entry point, inputs from which a corpus can be made anew, and a
// reader that takes decisions out of bytes.
//
// A target is one file, NAME_fuzz.cc, built twice: with libFuzzer (clang, preset fuzz) and with
// replay_main.cc as a plain test. It aborts (KV_CHECK) when a promise is broken.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace kvant::fuzz {

using Bytes = std::vector<std::byte>;

// Well-formed inputs of this target, from which mutation goes far. Written to the corpus by
// `NAME_replay --write-seeds DIR` when a format changes.
std::vector<Bytes> SeedInputs();

// Takes values from the front of an input; at its end, zeros. Single-owner.
class FuzzInput {
 public:
  FuzzInput(const uint8_t* data, size_t size)
      : left_(reinterpret_cast<const std::byte*>(data), size) {}

  bool empty() const { return left_.empty(); }
  template <typename T>
  T Take() {
    T value{};
    const std::span<const std::byte> bytes = TakeBytes(sizeof(T));
    if (!bytes.empty()) std::memcpy(&value, bytes.data(), bytes.size());
    return value;
  }
  // At most `length` bytes.
  std::span<const std::byte> TakeBytes(size_t length) {
    const auto bytes = left_.first(std::min(length, left_.size()));
    left_ = left_.subspan(bytes.size());
    return bytes;
  }
  std::span<const std::byte> Rest() { return TakeBytes(left_.size()); }

 private:
  std::span<const std::byte> left_;
};

inline Bytes ToBytes(std::string_view text) {
  const auto* data = reinterpret_cast<const std::byte*>(text.data());
  return {data, data + text.size()};
}

}  // namespace kvant::fuzz
