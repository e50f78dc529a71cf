#include "cache_service/wire.h"

#include <algorithm>
#include <limits>

#include "base/bytes.h"
#include "base/check.h"
#include "cache_service/actions.h"

namespace kvant {
namespace {
constexpr size_t kChecksumBytes = 4;
constexpr size_t kMaxStatusMessage = 1024;
constexpr int kCutBits = 3;
static_assert(kMaxCuts < (1U << kCutBits));

uint32_t MessageChecksum(std::span<const std::byte> bytes) {
  return static_cast<uint32_t>(PayloadChecksum(bytes));
}
}  // namespace

std::vector<std::byte> EncodeMessage(const wire::Envelope& envelope) {
  const size_t size = envelope.ByteSizeLong();
  KV_CHECK(size + kChecksumBytes <= kMaxMessageBytes);
  std::vector<std::byte> bytes(size + kChecksumBytes);
  KV_CHECK(envelope.SerializeToArray(bytes.data(), static_cast<int>(size)));
  StoreLittle(bytes.data() + size, MessageChecksum(std::span(bytes).first(size)));
  return bytes;
}

Status DecodeMessage(std::span<const std::byte> bytes, wire::Envelope* envelope) {
  envelope->Clear();
  if (bytes.size() < kChecksumBytes || bytes.size() > kMaxMessageBytes) {
    return InvalidArgument("a message of {} bytes; {} to {} are possible", bytes.size(),
                           kChecksumBytes, kMaxMessageBytes);
  }
  const auto body = bytes.first(bytes.size() - kChecksumBytes);
  if (LoadLittle<uint32_t>(bytes.data() + body.size()) != MessageChecksum(body)) {
    return DataLoss("a message of {} bytes does not match its checksum", bytes.size());
  }
  if (!envelope->ParseFromArray(body.data(), static_cast<int>(body.size()))) {
    envelope->Clear();
    return InvalidArgument("a message of {} bytes is not an Envelope", bytes.size());
  }
  if (envelope->version() != kProtocolVersion) {
    return InvalidArgument(
        "a message of protocol version {}, this program speaks {}; use the same "
        "release everywhere",
        envelope->version(), kProtocolVersion);
  }
  return OkStatus();
}

Result<BlockKey> KeyFromWire(const std::string& bytes) {
  return BlockKey::FromBytes(AsBytes(bytes));
}

void ToWire(const Status& status, wire::Status* out) {
  out->set_code(static_cast<uint32_t>(status.code()));
  out->set_message(status.message().substr(0, kMaxStatusMessage));
}

Status FromWire(const wire::Status& status) {
  if (status.code() == 0) return OkStatus();
  const bool known = status.code() <= static_cast<uint32_t>(StatusCode::kCancelled);
  return {known ? static_cast<StatusCode>(status.code()) : StatusCode::kUnavailable,
          status.message().substr(0, kMaxStatusMessage)};
}

void ToWire(const RemoteWindow& window, wire::Window* out) {
  out->set_id(window.id);
  out->set_key(window.key);
  out->set_length(window.length);
}

RemoteWindow FromWire(const wire::Window& window) {
  return {window.id(), window.key(), window.length()};
}

void ToWire(const Selection& selection, wire::Selection* out) {
  uint32_t cuts = 0;
  for (size_t part = 0; part < kMaxParts; ++part) {
    cuts |= static_cast<uint32_t>(selection.cuts[part]) << (8 * part);
  }
  out->set_cuts(cuts);
  out->set_layer_begin(selection.layer_begin);
  out->set_layer_end(selection.layer_end);
}

Result<Selection> FromWire(const wire::Selection& selection) {
  if (selection.layer_begin() >= selection.layer_end() || selection.layer_end() > kMaxLayers) {
    return InvalidArgument("layers {} to {} are not a range inside 0 to {}",
                           selection.layer_begin(), selection.layer_end(), kMaxLayers);
  }
  Selection out;
  for (size_t part = 0; part < kMaxParts; ++part) {
    out.cuts[part] = static_cast<uint8_t>(selection.cuts() >> (8 * part));
  }
  out.layer_begin = static_cast<uint16_t>(selection.layer_begin());
  out.layer_end = static_cast<uint16_t>(selection.layer_end());
  return out;
}

uint32_t PackCuts(const std::array<uint8_t, kMaxParts>& cuts) {
  uint32_t packed = 0;
  for (size_t part = 0; part < kMaxParts; ++part) {
    packed |= static_cast<uint32_t>(cuts[part]) << (kCutBits * part);
  }
  return packed;
}

std::array<uint8_t, kMaxParts> UnpackCuts(uint32_t packed) {
  std::array<uint8_t, kMaxParts> cuts;
  for (size_t part = 0; part < kMaxParts; ++part) {
    const uint32_t cut = (packed >> (kCutBits * part)) & ((1U << kCutBits) - 1);
    cuts[part] = static_cast<uint8_t>(std::min<uint32_t>(cut, kMaxCuts));
  }
  return cuts;
}

}  // namespace kvant
