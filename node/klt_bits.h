// Bits as bytes, the lowest bit of a byte first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "base/bytes.h"

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
  // 0 beyond the end, which overrun() tells. REQUIRES: bits <= 32.
  uint32_t Take(int bits) {
    if (count_ < bits) Fill();
    const auto value = static_cast<uint32_t>(held_ & ((uint64_t{1} << bits) - 1));
    held_ >>= bits;
    count_ -= bits;
    return value;
  }
  // Whether exactly all bytes were taken.
  bool AtEnd() const { return taken() == bytes_.size(); }
  bool overrun() const { return taken() > bytes_.size(); }

 private:
  // Whole bytes, of which the last may be taken in part.
  size_t taken() const { return at_ - static_cast<size_t>(count_ / 8); }
  void Fill() {
    // As many bytes as there is room for; what a longer load brings besides is the same again next
    // time.
    if (bytes_.size() >= sizeof(uint64_t) && at_ <= bytes_.size() - sizeof(uint64_t)) {
      held_ |= LoadLittle<uint64_t>(bytes_.data() + at_) << count_;
      const int more = (63 - count_) / 8;
      at_ += static_cast<size_t>(more);
      count_ += 8 * more;
      return;
    }
    for (; count_ <= 56; ++at_, count_ += 8) {
      const uint64_t next = at_ < bytes_.size() ? static_cast<uint64_t>(bytes_[at_]) : 0;
      held_ |= next << count_;
    }
  }

  std::span<const std::byte> bytes_;
  size_t at_ = 0;
  uint64_t held_ = 0;
  int count_ = 0;  // bits of held_ that count
};

}  // namespace kvant::node
