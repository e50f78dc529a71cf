// Bits as bytes, the lowest bit of a byte first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace kvant::node {

// Single-owner.
class BitWriter {
 public:
  void Put(uint32_t value, int bits) {
    held_ |= static_cast<uint64_t>(value) << count_;
    count_ += bits;
    while (count_ >= 8) {
      bytes_.push_back(static_cast<std::byte>(held_ & 0xFFU));
      held_ >>= 8U;
      count_ -= 8;
    }
  }
  std::vector<std::byte> Take() {
    if (count_ > 0) bytes_.push_back(static_cast<std::byte>(held_ & 0xFFU));
    return std::move(bytes_);
  }

 private:
  uint64_t held_ = 0;
  int count_ = 0;
  std::vector<std::byte> bytes_;
};

// Single-owner; borrows the bytes.
class BitReader {
 public:
  explicit BitReader(std::span<const std::byte> bytes) : bytes_(bytes) {}
  // 0 beyond the end, which overrun() tells.
  uint32_t Take(int bits) {
    while (count_ < bits) {
      const uint64_t next = at_ < bytes_.size() ? static_cast<uint64_t>(bytes_[at_]) : 0;
      ++at_;
      held_ |= next << count_;
      count_ += 8;
    }
    const auto value = static_cast<uint32_t>(held_ & ((uint64_t{1} << bits) - 1));
    held_ >>= bits;
    count_ -= bits;
    return value;
  }
  // Whether exactly all bytes were taken.
  bool AtEnd() const { return at_ == bytes_.size(); }
  bool overrun() const { return at_ > bytes_.size(); }

 private:
  std::span<const std::byte> bytes_;
  size_t at_ = 0;
  uint64_t held_ = 0;
  int count_ = 0;
};

}  // namespace kvant::node
