#include "transport/transport.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>

namespace kvant {

Result<std::span<std::byte>> Transport::MapPages(uint64_t bytes) {
  void* start = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) {
    return MakeStatus(StatusCode::kResourceExhausted, "mapping {} bytes: {}; ask for less memory",
                      bytes, std::strerror(errno));
  }
  return std::span(static_cast<std::byte*>(start), bytes);
}

void Transport::UnmapPages(std::span<std::byte> pages) { munmap(pages.data(), pages.size()); }

LinkCounters& LinkCounters::operator+=(const LinkCounters& more) {
  control_bytes_sent += more.control_bytes_sent;
  control_bytes_received += more.control_bytes_received;
  payload_bytes_sent += more.payload_bytes_sent;
  payload_bytes_received += more.payload_bytes_received;
  messages_sent += more.messages_sent;
  transfers_submitted += more.transfers_submitted;
  return *this;
}

}  // namespace kvant
