// The shm backend: processes of one host that share memory. Bytes are copied once, by whoever
// transfers, straight between its own memory and the peer's. docs/transport-guide.md gives the
// layout.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "transport/transport.h"

namespace kvant {

struct ShmOptions {
  size_t max_message_bytes = size_t{1} << 20;
  size_t max_outstanding = 1024;  // transfers a peer may have in flight, each way
  size_t max_endpoints = 1024;    // further peers are refused
  // A peer that connected and says nothing gives way after this long.
  Duration handshake_timeout = std::chrono::seconds(5);
  // Wait looks for work this long before it sleeps.
  Duration poll_before_sleep = std::chrono::microseconds(50);
};

// Endpoints and windows of shm have numbers that are none of another transport's.
inline constexpr uint64_t kShmBit = uint64_t{1} << 62;
constexpr bool IsShmId(uint64_t id) { return (id & kShmBit) != 0; }

// A Transport with what only shm has. Addresses are "shm:NAME", known within a network namespace;
// NAME has 1 to 80 characters. Peers are processes of the same user, or of root: whoever may write
// to one another's memory is trusted not to write beside a window. Lengths and offsets that a peer
// says are checked all the same, and shared memory is sealed against shrinking. Only memory of
// MapPages can be exposed.
class ShmTransport : public Transport {
 public:
  // Wait ends as well when this descriptor becomes readable. Once; borrowed.
  virtual void WakeOn(int fd) = 0;
};

Result<std::unique_ptr<ShmTransport>> MakeShmTransport(const ShmOptions& options);

// Whether a process listens there that this one may share memory with.
bool ShmListens(std::string_view address);

}  // namespace kvant
