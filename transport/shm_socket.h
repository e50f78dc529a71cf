// Packets between the two ends of a shm connection, which carry descriptors. Each is a header and,
// of a refusal, a text.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "transport/tcp_socket.h"

namespace kvant::shm {

inline constexpr uint32_t kMagic = 0x3153564B;  // "KVS1"
inline constexpr uint16_t kVersion = 1;

enum class PacketType : uint8_t {
  kHello = 1,    // connector; descriptors: channel, bell. first: bytes of the channel
  kWelcome = 2,  // listener; descriptor: bell
  kRefused = 3,  // listener; why
  kPages = 4,    // both; descriptor: memory. first: its number, second: its bytes
  kForget = 5,   // both: of such memory nothing is exposed any more. first: its number
};

struct PacketHeader {
  uint32_t magic = kMagic;
  uint16_t version = kVersion;
  PacketType type = PacketType::kHello;
  uint8_t reserved = 0;
  uint64_t first = 0;
  uint64_t second = 0;
};
static_assert(sizeof(PacketHeader) == 24);

struct Packet {
  PacketHeader header;
  std::string text;
  std::vector<tcp::Socket> files;
};

// "shm:NAME" -> NAME. kInvalidArgument says what is wrong with it.
Result<std::string_view> ParseName(std::string_view address);
// Non-blocking. kUnavailable: the name is taken.
Result<tcp::Socket> Listen(std::string_view name, int backlog);
// Non-blocking. kUnavailable: nobody listens.
Result<tcp::Socket> Connect(std::string_view name);
// Whether the process at the other end may share memory with this one: it runs as the same user, or
// one of both as root.
bool Trusted(const tcp::Socket& socket);

// False: the socket is full (errno is EAGAIN), or broken.
bool SendPacket(const tcp::Socket& socket, const PacketHeader& header, std::string_view text,
                std::initializer_list<int> files);
enum class Received : uint8_t { kPacket, kNothing, kEnd, kMalformed };
Received ReceivePacket(const tcp::Socket& socket, Packet* packet);

}  // namespace kvant::shm
