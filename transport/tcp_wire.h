// The bytes of the tcp backend: its handshake on ZeroMQ, frames on the bulk socket. All integers
// little-endian. docs/transport-guide.md shows the same tables.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace kvant::tcp {

inline constexpr uint32_t kMagic = 0x3154564B;      // "KVT1", opens hello and welcome
inline constexpr uint32_t kBulkMagic = 0x3142564B;  // "KVB1", opens every bulk frame
inline constexpr uint16_t kVersion = 2;

// The first byte of a control message; 5 was a message of the user's, up to version 1.
enum class ControlType : uint8_t {
  kHello = 1,    // dealer to router: magic u32, version u16
  kWelcome = 2,  // router to dealer: magic u32, version u16, bulk port u16, token 2 x u64
  kRefused = 3,  // router to dealer: why, UTF-8
  kReady = 4,    // router to dealer: the bulk socket showed the token; data may flow
  kGoodbye = 6,  // either way: nothing follows
};
inline constexpr size_t kHelloBytes = 7;
inline constexpr size_t kWelcomeBytes = 25;

struct Token {
  uint64_t low = 0;
  uint64_t high = 0;
  friend bool operator==(const Token&, const Token&) = default;
};
struct Welcome {
  uint16_t version = 0;
  uint16_t bulk_port = 0;
  Token token;
};

std::array<std::byte, kHelloBytes> EncodeHello();
// The version; nothing when it is no hello.
std::optional<uint16_t> DecodeHello(std::span<const std::byte> message);
std::array<std::byte, kWelcomeBytes> EncodeWelcome(const Welcome& welcome);
std::optional<Welcome> DecodeWelcome(std::span<const std::byte> message);

enum class BulkOp : uint8_t {
  kHello = 1,        // the connector's first frame: window, key = token; tag = version
  kWrite = 2,        // `length` bytes follow, for `window` at `offset`
  kRead = 3,         // asks for [offset, offset + length) of `window`; `tag` comes back
  kReadReply = 4,    // `length` bytes follow, in answer to `tag`
  kReadRefused = 5,  // in answer to `tag`
  kGoodbye = 6,      // nothing follows
  kMessage = 7,      // a message of the user's, under its own short header
};

// The 48 bytes before every frame but a message:
//   0 magic u32 | 4 op u8 | 5 flags u8 (bit 0: immediate) | 6 zero u16 | 8 immediate u32 | 12 tag
//   u32 16 window u64 | 24 key u64 | 32 offset u64 | 40 length u64
inline constexpr size_t kBulkHeaderBytes = 48;
struct BulkHeader {
  BulkOp op = BulkOp::kHello;
  std::optional<uint32_t> immediate{};
  uint32_t tag = 0;
  uint64_t window = 0;
  uint64_t key = 0;
  uint64_t offset = 0;
  uint64_t length = 0;
};
void Encode(const BulkHeader& header, std::span<std::byte, kBulkHeaderBytes> to);
// Nothing when magic, op, flags or the zero field are wrong.
std::optional<BulkHeader> DecodeBulkHeader(std::span<const std::byte, kBulkHeaderBytes> from);

// The 12 bytes before a message: 0 magic u32 | 4 op u8 | 5 zero u8 | 6 zero u16 | 8 length u32
inline constexpr size_t kMessageHeaderBytes = 12;
void EncodeMessageHeader(uint32_t length, std::span<std::byte, kMessageHeaderBytes> to);
// Whether a frame that starts so is a message. REQUIRES: kMessageHeaderBytes of it are there.
bool IsMessage(std::span<const std::byte> frame);
// Its length; nothing when it is no message's header.
std::optional<uint32_t> DecodeMessageHeader(std::span<const std::byte, kMessageHeaderBytes> from);

}  // namespace kvant::tcp
