// A connector that speaks shm by hand, to say what no honest one says.
#pragma once

#include <sys/eventfd.h>

#include <memory>
#include <string_view>

#include "base/check.h"
#include "transport/shm_channel.h"
#include "transport/shm_socket.h"

namespace kvant::support {

class RawShmPeer {
 public:
  explicit RawShmPeer(std::string_view name)
      : socket_(*shm::Connect(name)), bell_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    channel_ =
        std::make_unique<shm::Channel>(*SharedMemory::Create(shm::Channel::MemoryBytes()), 0);
    KV_CHECK(shm::SendPacket(
        socket_, {.type = shm::PacketType::kHello, .first = shm::Channel::MemoryBytes()}, {},
        {channel_->fd(), bell_.fd()}));
  }

  const tcp::Socket& socket() const { return socket_; }
  shm::Channel& channel() { return *channel_; }
  // Any bytes from the start of the ring on, said to be there.
  void PutBytes(std::span<const std::byte> bytes, uint64_t head) {
    std::byte* ring = RingOf();
    std::copy_n(bytes.begin(), std::min<size_t>(bytes.size(), shm::kRingBytes), ring);
    channel_->ours().head.store(head);
  }
  void HangUp() { socket_ = tcp::Socket(); }

 private:
  // Of end 0: behind all that is no ring.
  std::byte* RingOf() {
    auto* sides = reinterpret_cast<std::byte*>(&channel_->ours());
    return sides + shm::Channel::MemoryBytes() - 2 * shm::kRingBytes;
  }

  tcp::Socket socket_;
  tcp::Socket bell_;
  std::unique_ptr<shm::Channel> channel_;
};

}  // namespace kvant::support
