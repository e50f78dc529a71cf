// Byte order and views: all formats of Kvant are little-endian, whatever the machine.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace kvant {

static_assert(std::endian::native == std::endian::little,
              "kernels read tiles in place; a big-endian port needs swapping loads");

template <std::unsigned_integral T>
inline void StoreLittle(std::byte* to, T value) {
  std::memcpy(to, &value, sizeof(T));
}
template <std::unsigned_integral T>
inline T LoadLittle(const std::byte* from) {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

inline std::span<const std::byte> AsBytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}
inline std::string_view AsText(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Makes bytes of whatever stood in memory: for those of which all are set anyway, without zeros
// first.
struct UninitializedAllocator : std::allocator<std::byte> {
  template <typename T>
  struct rebind {
    static_assert(std::is_same_v<T, std::byte>);
    using other = UninitializedAllocator;
  };
  void construct(std::byte*) noexcept {}
};
using UninitializedBytes = std::vector<std::byte, UninitializedAllocator>;

// Lower-case hexadecimal, two digits a byte.
std::string ToHex(std::span<const std::byte> bytes);

// True when [offset, offset + length) lies inside [0, size), without overflow.
inline bool RangeFits(uint64_t offset, uint64_t length, uint64_t size) {
  return offset <= size && length <= size - offset;
}

}  // namespace kvant
