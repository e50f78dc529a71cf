// Memory that processes of one host share by passing a descriptor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "base/status.h"
#include "transport/tcp_socket.h"

namespace kvant {

// A mapping of memory that never shrinks, so that no access to it can fault whatever the other
// process does. Move-only value; unmaps when destroyed.
class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(SharedMemory&& other) noexcept
      : file_(std::move(other.file_)), bytes_(std::exchange(other.bytes_, {})) {}
  SharedMemory& operator=(SharedMemory&& other) noexcept {
    std::swap(file_, other.file_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~SharedMemory();

  // Zeros. kResourceExhausted: no memory or no descriptor for it.
  static Result<SharedMemory> Create(uint64_t bytes);
  // What another process made and passed. kInvalidArgument: it has another size, or could shrink.
  static Result<SharedMemory> Map(tcp::Socket file, uint64_t bytes);

  explicit operator bool() const { return !bytes_.empty(); }
  std::span<std::byte> bytes() const { return bytes_; }
  int fd() const { return file_.fd(); }

 private:
  SharedMemory(tcp::Socket file, std::span<std::byte> bytes)
      : file_(std::move(file)), bytes_(bytes) {}

  tcp::Socket file_;
  std::span<std::byte> bytes_;
};

}  // namespace kvant
