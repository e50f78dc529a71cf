#include "transport/range_allocator.h"

#include <bit>

#include "base/check.h"

namespace kvant {
namespace {

// How many blocks of the request's own class are looked at before the request is refused; larger
// classes need no look, all their blocks fit.
constexpr int kWalkLimit = 64;

uint64_t RoundUp(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

}  // namespace

RangeAllocator::RangeAllocator(uint64_t capacity, uint32_t max_blocks)
    : capacity_(capacity), blocks_(max_blocks) {
  KV_CHECK(capacity % kGranule == 0 && max_blocks > 0);
  heads_.fill(kNone);
  for (uint32_t block = max_blocks; block-- > 0;) {
    blocks_[block].next_free = unused_;
    unused_ = block;
  }
  if (capacity == 0) return;
  const uint32_t whole = unused_;
  unused_ = blocks_[whole].next_free;
  blocks_[whole].size = capacity;
  Insert(whole);
}

RangeAllocator::Class RangeAllocator::ClassOf(uint64_t size) {
  const int first = std::bit_width(size) - 1;  // >= 6: sizes are multiples of kGranule
  const int second = static_cast<int>(size >> (first - kSecondBits)) & (kSecondCount - 1);
  return {first, second};
}

void RangeAllocator::Insert(uint32_t block) {
  Block& inserted = blocks_[block];
  const Class at = ClassOf(inserted.size);
  uint32_t& head = Head(at);
  inserted.free = true;
  inserted.previous_free = kNone;
  inserted.next_free = head;
  if (head != kNone) blocks_[head].previous_free = block;
  head = block;
  first_bits_ |= uint64_t{1} << at.first;
  second_bits_[at.first] |= 1U << at.second;
}

void RangeAllocator::Remove(uint32_t block) {
  Block& removed = blocks_[block];
  const Class at = ClassOf(removed.size);
  if (removed.previous_free != kNone) {
    blocks_[removed.previous_free].next_free = removed.next_free;
  } else {
    Head(at) = removed.next_free;
  }
  if (removed.next_free != kNone) blocks_[removed.next_free].previous_free = removed.previous_free;
  removed.free = false;
  if (Head(at) == kNone) {
    second_bits_[at.first] &= ~(1U << at.second);
    if (second_bits_[at.first] == 0) first_bits_ &= ~(uint64_t{1} << at.first);
  }
}

uint32_t RangeAllocator::FindFit(uint64_t size) {
  // Any block of a class above the request's own fits; of its own class only some do.
  const Class own = ClassOf(size);
  uint32_t seconds =
      own.second + 1 < kSecondCount ? second_bits_[own.first] & (~0U << (own.second + 1)) : 0;
  int first = own.first;
  if (seconds == 0) {
    const uint64_t firsts = first_bits_ & (~uint64_t{0} << 1 << own.first);
    if (firsts != 0) {
      first = std::countr_zero(firsts);
      seconds = second_bits_[first];
    }
  }
  // The own class first: a tight fit leaves large blocks whole.
  int walked = 0;
  for (uint32_t block = Head(own); block != kNone && walked < kWalkLimit; ++walked) {
    if (blocks_[block].size >= size) return block;
    block = blocks_[block].next_free;
  }
  if (seconds == 0) return kNone;
  return Head({first, std::countr_zero(seconds)});
}

std::optional<uint32_t> RangeAllocator::Allocate(uint64_t bytes) {
  if (bytes == 0 || bytes > capacity_) return std::nullopt;
  const uint64_t size = RoundUp(bytes, kGranule);
  const uint32_t block = FindFit(size);
  if (block == kNone) return std::nullopt;
  const bool splits = blocks_[block].size > size;
  if (splits && unused_ == kNone) return std::nullopt;
  Remove(block);
  if (splits) {
    const uint32_t rest = unused_;
    unused_ = blocks_[rest].next_free;
    Block& head = blocks_[block];
    blocks_[rest] = {.offset = head.offset + size,
                     .size = head.size - size,
                     .before = block,
                     .after = head.after};
    if (head.after != kNone) blocks_[head.after].before = rest;
    head.after = rest;
    head.size = size;
    Insert(rest);
  }
  return block;
}

void RangeAllocator::Free(uint32_t block) {
  KV_CHECK(block < blocks_.size() && !blocks_[block].free && blocks_[block].size > 0);
  const auto absorb = [this](uint32_t left, uint32_t right) {
    blocks_[left].size += blocks_[right].size;
    blocks_[left].after = blocks_[right].after;
    if (blocks_[right].after != kNone) blocks_[blocks_[right].after].before = left;
    blocks_[right] = {};
    blocks_[right].next_free = unused_;
    unused_ = right;
  };
  const uint32_t after = blocks_[block].after;
  if (after != kNone && blocks_[after].free) {
    Remove(after);
    absorb(block, after);
  }
  const uint32_t before = blocks_[block].before;
  if (before != kNone && blocks_[before].free) {
    Remove(before);
    absorb(before, block);
    block = before;
  }
  Insert(block);
}

bool RangeAllocator::Consistent() const {
  uint64_t listed = 0;
  for (int first = 0; first < kFirstCount; ++first) {
    for (int second = 0; second < kSecondCount; ++second) {
      const uint32_t head = heads_[first * kSecondCount + second];
      const bool bit = ((second_bits_[first] >> second) & 1U) != 0;
      if (bit != (head != kNone)) return false;
      for (uint32_t block = head; block != kNone; block = blocks_[block].next_free) {
        const Class at = ClassOf(blocks_[block].size);
        if (!blocks_[block].free || at.first != first || at.second != second) return false;
        ++listed;
      }
    }
    if ((((first_bits_ >> first) & 1U) != 0) != (second_bits_[first] != 0)) return false;
  }
  if (capacity_ == 0) return listed == 0;
  // The block at offset 0 is always record 0: it is only ever split or grown from the left.
  uint64_t end = 0;
  uint64_t free_blocks = 0;
  uint32_t before = kNone;
  for (uint32_t block = 0; block != kNone; block = blocks_[block].after) {
    const Block& current = blocks_[block];
    if (current.offset != end || current.before != before || current.size == 0) return false;
    if (current.free && before != kNone && blocks_[before].free) return false;
    free_blocks += current.free ? 1 : 0;
    end += current.size;
    before = block;
  }
  return end == capacity_ && free_blocks == listed;
}

}  // namespace kvant
