// A queue in one contiguous array, which grows by doubling and never shrinks: in the steady state
// it allocates nothing.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "base/check.h"

namespace kvant {

// Single-owner. T: default-constructible, movable.
template <typename T>
class Ring {
 public:
  bool empty() const { return size_ == 0; }
  size_t size() const { return size_; }
  T& operator[](size_t index) {
    KV_DCHECK(index < size_);
    return slots_[(head_ + index) & (slots_.size() - 1)];
  }
  T& front() { return (*this)[0]; }
  T& push_back(T value) {
    if (size_ == slots_.size()) Grow();
    T& slot = slots_[(head_ + size_++) & (slots_.size() - 1)];
    slot = std::move(value);
    return slot;
  }
  void pop_front() {
    KV_DCHECK(size_ > 0);
    head_ = (head_ + 1) & (slots_.size() - 1);
    --size_;
  }
  // Drops everything from `size` on. REQUIRES: size <= size().
  void truncate(size_t size) { size_ = size; }

 private:
  void Grow() {
    std::vector<T> larger(slots_.empty() ? 16 : slots_.size() * 2);
    for (size_t i = 0; i < size_; ++i) larger[i] = std::move((*this)[i]);
    slots_ = std::move(larger);
    head_ = 0;
  }
  std::vector<T> slots_;  // a power of two of them
  size_t head_ = 0;
  size_t size_ = 0;
};

}  // namespace kvant
