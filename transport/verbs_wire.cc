#include "transport/verbs_wire.h"

#include <algorithm>
#include <cstring>

#include "base/bytes.h"

namespace kvant::verbs {
namespace {
constexpr uint32_t kMax24Bits = (1U << 24) - 1;
constexpr uint8_t kMinMtu = 1;  // 256 bytes
constexpr uint8_t kMaxMtu = 5;  // 4096
// Below, one end could not answer the other (docs/transport-guide.md, flow control).
constexpr uint16_t kMinReceives = 4;
}  // namespace

std::array<std::byte, kGreetingBytes> Encode(const Greeting& greeting) {
  std::array<std::byte, kGreetingBytes> bytes{};
  StoreLittle(bytes.data(), kMagic);
  StoreLittle(bytes.data() + 4, kVersion);
  StoreLittle(bytes.data() + 6, static_cast<uint8_t>(greeting.type));
  StoreLittle(bytes.data() + 7, greeting.mtu);
  StoreLittle(bytes.data() + 8, greeting.queue);
  StoreLittle(bytes.data() + 12, greeting.sequence);
  std::memcpy(bytes.data() + 16, greeting.gid.data(), greeting.gid.size());
  StoreLittle(bytes.data() + 32, greeting.lid);
  StoreLittle(bytes.data() + 34, greeting.receives);
  StoreLittle(bytes.data() + 36, greeting.reads);
  StoreLittle(bytes.data() + 38, greeting.text_bytes);
  return bytes;
}

std::optional<Greeting> DecodeGreeting(std::span<const std::byte, kGreetingBytes> from) {
  const std::byte* in = from.data();
  const auto type = LoadLittle<uint8_t>(in + 6);
  if (LoadLittle<uint32_t>(in) != kMagic || LoadLittle<uint16_t>(in + 4) != kVersion ||
      type < static_cast<uint8_t>(GreetingType::kHello) ||
      type > static_cast<uint8_t>(GreetingType::kReady) || LoadLittle<uint8_t>(in + 37) != 0) {
    return std::nullopt;
  }
  Greeting greeting;
  greeting.type = static_cast<GreetingType>(type);
  greeting.mtu = LoadLittle<uint8_t>(in + 7);
  greeting.queue = LoadLittle<uint32_t>(in + 8);
  greeting.sequence = LoadLittle<uint32_t>(in + 12);
  std::memcpy(greeting.gid.data(), in + 16, greeting.gid.size());
  greeting.lid = LoadLittle<uint16_t>(in + 32);
  greeting.receives = LoadLittle<uint16_t>(in + 34);
  greeting.reads = LoadLittle<uint8_t>(in + 36);
  greeting.text_bytes = LoadLittle<uint16_t>(in + 38);
  const bool is_end =
      greeting.type == GreetingType::kHello || greeting.type == GreetingType::kWelcome;
  const bool is_sound = greeting.mtu >= kMinMtu && greeting.mtu <= kMaxMtu &&
                        greeting.queue <= kMax24Bits && greeting.sequence <= kMax24Bits &&
                        greeting.receives >= kMinReceives && greeting.reads > 0;
  if ((is_end && !is_sound) || greeting.text_bytes > kMaxTextBytes) return std::nullopt;
  return greeting;
}

void Encode(const RecordHeader& header, std::span<std::byte, kRecordHeaderBytes> to) {
  std::byte* out = to.data();
  StoreLittle(out, static_cast<uint8_t>(header.type));
  StoreLittle(out + 1, static_cast<uint8_t>(header.last));
  StoreLittle(out + 2, header.credits);
  StoreLittle(out + 4, header.written);
  StoreLittle(out + 8, header.read);
}

std::optional<RecordHeader> DecodeRecordHeader(
    std::span<const std::byte, kRecordHeaderBytes> from) {
  const std::byte* in = from.data();
  const auto type = LoadLittle<uint8_t>(in);
  const auto last = LoadLittle<uint8_t>(in + 1);
  if (type < static_cast<uint8_t>(RecordType::kMessage) ||
      type > static_cast<uint8_t>(RecordType::kGoodbye) || last > 1) {
    return std::nullopt;
  }
  return RecordHeader{.type = static_cast<RecordType>(type),
                      .last = last == 1,
                      .credits = LoadLittle<uint16_t>(in + 2),
                      .written = LoadLittle<uint32_t>(in + 4),
                      .read = LoadLittle<uint32_t>(in + 8)};
}

std::array<std::byte, kWindowRecordBytes> Encode(const WindowRecord& window) {
  std::array<std::byte, kWindowRecordBytes> bytes{};
  StoreLittle(bytes.data(), window.id);
  StoreLittle(bytes.data() + 8, window.key);
  StoreLittle(bytes.data() + 16, window.address);
  StoreLittle(bytes.data() + 24, window.length);
  StoreLittle(bytes.data() + 32, window.device_key);
  StoreLittle(bytes.data() + 36, window.access);
  return bytes;
}

std::optional<WindowRecord> DecodeWindow(std::span<const std::byte> from) {
  if (from.size() != kWindowRecordBytes) return std::nullopt;
  const std::byte* in = from.data();
  const WindowRecord window{.id = LoadLittle<uint64_t>(in),
                            .key = LoadLittle<uint64_t>(in + 8),
                            .address = LoadLittle<uint64_t>(in + 16),
                            .length = LoadLittle<uint64_t>(in + 24),
                            .device_key = LoadLittle<uint32_t>(in + 32),
                            .access = LoadLittle<uint32_t>(in + 36)};
  if (SlotOf(window.id) >= kMaxWindows || window.access == 0 || window.access > 3)
    return std::nullopt;
  return window;
}

std::array<std::byte, kWrittenBytes> EncodeWritten(uint64_t window, uint32_t immediate) {
  std::array<std::byte, kWrittenBytes> bytes{};
  StoreLittle(bytes.data(), window);
  StoreLittle(bytes.data() + 8, immediate);
  return bytes;
}

std::optional<uint32_t> PackImmediate(uint64_t window, uint32_t immediate) {
  if (immediate > 0xFFFF) return std::nullopt;
  return uint32_t{SlotOf(window)} << 16 | immediate;
}

}  // namespace kvant::verbs
