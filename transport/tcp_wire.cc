#include "transport/tcp_wire.h"

#include "base/bytes.h"

namespace kvant::tcp {
namespace {
constexpr uint8_t kHasImmediate = 1;
}  // namespace

std::array<std::byte, kHelloBytes> EncodeHello() {
  std::array<std::byte, kHelloBytes> bytes{};
  bytes[0] = static_cast<std::byte>(ControlType::kHello);
  StoreLittle(bytes.data() + 1, kMagic);
  StoreLittle(bytes.data() + 5, kVersion);
  return bytes;
}

std::optional<uint16_t> DecodeHello(std::span<const std::byte> message) {
  if (message.size() != kHelloBytes || message[0] != static_cast<std::byte>(ControlType::kHello) ||
      LoadLittle<uint32_t>(message.data() + 1) != kMagic) {
    return std::nullopt;
  }
  return LoadLittle<uint16_t>(message.data() + 5);
}

std::array<std::byte, kWelcomeBytes> EncodeWelcome(const Welcome& welcome) {
  std::array<std::byte, kWelcomeBytes> bytes{};
  bytes[0] = static_cast<std::byte>(ControlType::kWelcome);
  StoreLittle(bytes.data() + 1, kMagic);
  StoreLittle(bytes.data() + 5, welcome.version);
  StoreLittle(bytes.data() + 7, welcome.bulk_port);
  StoreLittle(bytes.data() + 9, welcome.token.low);
  StoreLittle(bytes.data() + 17, welcome.token.high);
  return bytes;
}

std::optional<Welcome> DecodeWelcome(std::span<const std::byte> message) {
  if (message.size() != kWelcomeBytes ||
      message[0] != static_cast<std::byte>(ControlType::kWelcome) ||
      LoadLittle<uint32_t>(message.data() + 1) != kMagic) {
    return std::nullopt;
  }
  Welcome welcome;
  welcome.version = LoadLittle<uint16_t>(message.data() + 5);
  welcome.bulk_port = LoadLittle<uint16_t>(message.data() + 7);
  welcome.token.low = LoadLittle<uint64_t>(message.data() + 9);
  welcome.token.high = LoadLittle<uint64_t>(message.data() + 17);
  return welcome;
}

void Encode(const BulkHeader& header, std::span<std::byte, kBulkHeaderBytes> to) {
  std::byte* out = to.data();
  StoreLittle(out, kBulkMagic);
  StoreLittle(out + 4, static_cast<uint8_t>(header.op));
  StoreLittle(out + 5, header.immediate ? kHasImmediate : uint8_t{0});
  StoreLittle(out + 6, uint16_t{0});
  StoreLittle(out + 8, header.immediate.value_or(0));
  StoreLittle(out + 12, header.tag);
  StoreLittle(out + 16, header.window);
  StoreLittle(out + 24, header.key);
  StoreLittle(out + 32, header.offset);
  StoreLittle(out + 40, header.length);
}

std::optional<BulkHeader> DecodeBulkHeader(std::span<const std::byte, kBulkHeaderBytes> from) {
  const std::byte* in = from.data();
  const auto op = LoadLittle<uint8_t>(in + 4);
  const auto flags = LoadLittle<uint8_t>(in + 5);
  if (LoadLittle<uint32_t>(in) != kBulkMagic || op < static_cast<uint8_t>(BulkOp::kHello) ||
      op > static_cast<uint8_t>(BulkOp::kGoodbye) || (flags & ~kHasImmediate) != 0 ||
      LoadLittle<uint16_t>(in + 6) != 0) {
    return std::nullopt;
  }
  BulkHeader header;
  header.op = static_cast<BulkOp>(op);
  if ((flags & kHasImmediate) != 0) header.immediate = LoadLittle<uint32_t>(in + 8);
  header.tag = LoadLittle<uint32_t>(in + 12);
  header.window = LoadLittle<uint64_t>(in + 16);
  header.key = LoadLittle<uint64_t>(in + 24);
  header.offset = LoadLittle<uint64_t>(in + 32);
  header.length = LoadLittle<uint64_t>(in + 40);
  return header;
}

void EncodeMessageHeader(uint32_t length, std::span<std::byte, kMessageHeaderBytes> to) {
  StoreLittle(to.data(), kBulkMagic);
  StoreLittle(to.data() + 4, static_cast<uint32_t>(BulkOp::kMessage));
  StoreLittle(to.data() + 8, length);
}

bool IsMessage(std::span<const std::byte> frame) {
  return frame[4] == static_cast<std::byte>(BulkOp::kMessage);
}

std::optional<uint32_t> DecodeMessageHeader(std::span<const std::byte, kMessageHeaderBytes> from) {
  if (LoadLittle<uint32_t>(from.data()) != kBulkMagic ||
      LoadLittle<uint32_t>(from.data() + 4) != static_cast<uint32_t>(BulkOp::kMessage)) {
    return std::nullopt;
  }
  return LoadLittle<uint32_t>(from.data() + 8);
}

}  // namespace kvant::tcp
