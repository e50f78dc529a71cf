// The bytes of the verbs backend: frames on the socket that two ends greet each other over, and
// records in messages of the connection. All integers little-endian. docs/transport-guide.md shows
// the same tables.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

namespace kvant::verbs {

inline constexpr uint32_t kMagic = 0x3156564B;  // "KVV1"
inline constexpr uint16_t kVersion = 1;

enum class GreetingType : uint8_t {
  kHello = 1,    // connector: who it is
  kWelcome = 2,  // listener: who it is; its end of the connection stands
  kRefused = 3,  // listener; `text_bytes` of why follow
  kReady = 4,    // connector: its end stands too
};

// One end of a connection, as the other must know it:
//   0 magic u32 | 4 version u16 | 6 type u8 | 7 mtu u8 | 8 queue u32 | 12 sequence u32 | 16 gid 16
//   bytes | 32 lid u16 | 34 receives u16 | 36 reads u8 | 37 zero u8 | 38 text_bytes u16
struct Greeting {
  GreetingType type = GreetingType::kHello;
  uint8_t mtu = 0;        // as ibv_mtu counts
  uint32_t queue = 0;     // 24 bits
  uint32_t sequence = 0;  // of the first packet, 24 bits
  std::array<uint8_t, 16> gid{};
  uint16_t lid = 0;
  uint16_t receives = 0;  // posted: the credits that the other end begins with
  uint8_t reads = 0;      // that it answers at once
  uint16_t text_bytes = 0;
};
inline constexpr size_t kGreetingBytes = 40;
inline constexpr size_t kMaxTextBytes = 1024;

std::array<std::byte, kGreetingBytes> Encode(const Greeting& greeting);
// Nothing when it is of another protocol or release, or a field is out of range.
std::optional<Greeting> DecodeGreeting(std::span<const std::byte, kGreetingBytes> from);

enum class RecordType : uint8_t {
  kMessage = 1,  // a piece of a message; `last`: the message ends here
  kWritten = 2,  // a write with immediate has landed, where it did not say so itself
  kExposed = 3,  // a window of the sender that the receiver may use
  kRevoke = 4,   // window: let go of it
  kRevoked = 5,  // window: nothing of the sender is under way there, nor will be
  kCredits = 6,  // nothing but the header
  kGoodbye = 7,  // nothing follows
};

// What every record begins with:
//   0 type u8 | 1 last u8 | 2 credits u16 | 4 written u32 | 8 read u32
struct RecordHeader {
  RecordType type = RecordType::kMessage;
  bool last = true;
  uint16_t credits = 0;  // receives that the sender posted anew since its last record
  // Payload bytes that the sender wrote and read since its last record.
  uint32_t written = 0;
  uint32_t read = 0;
};
inline constexpr size_t kRecordHeaderBytes = 12;
// A record, header included. Receives are this long.
inline constexpr size_t kMaxRecordBytes = 4096;
inline constexpr size_t kMaxPieceBytes = kMaxRecordBytes - kRecordHeaderBytes;

void Encode(const RecordHeader& header, std::span<std::byte, kRecordHeaderBytes> to);
// Nothing when the type is unknown or `last` no truth value.
std::optional<RecordHeader> DecodeRecordHeader(std::span<const std::byte, kRecordHeaderBytes> from);

// Of kExposed: 0 id u64 | 8 key u64 | 16 address u64 | 24 length u64 | 32 device key u32 | 36
// access u32. The low 16 bits of an id are its slot, below kMaxWindows.
inline constexpr size_t kMaxWindows = 16384;
struct WindowRecord {
  uint64_t id = 0;
  uint64_t key = 0;
  uint64_t address = 0;
  uint64_t length = 0;
  uint32_t device_key = 0;
  uint32_t access = 0;
};
inline constexpr size_t kWindowRecordBytes = 40;
constexpr uint16_t SlotOf(uint64_t window) { return static_cast<uint16_t>(window & 0xFFFF); }

std::array<std::byte, kWindowRecordBytes> Encode(const WindowRecord& window);
// Nothing when it has another length, or a slot or an access that there is not.
std::optional<WindowRecord> DecodeWindow(std::span<const std::byte> from);

// Of kWritten: 0 window u64 | 8 immediate u32.
inline constexpr size_t kWrittenBytes = 12;
std::array<std::byte, kWrittenBytes> EncodeWritten(uint64_t window, uint32_t immediate);

// The immediate of a write that says itself that it has landed: slot and value. Nothing when the
// value needs more than 16 bits.
std::optional<uint32_t> PackImmediate(uint64_t window, uint32_t immediate);

}  // namespace kvant::verbs
