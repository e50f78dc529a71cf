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

using PartCuts = std::array<uint8_t, kMaxParts>;

// Of part p in bits 8p to 8p+7.
uint32_t PackSelectedCuts(const PartCuts& cuts) {
  uint32_t packed = 0;
  for (size_t part = 0; part < kMaxParts; ++part) {
    packed |= static_cast<uint32_t>(cuts[part]) << (8 * part);
  }
  return packed;
}

PartCuts UnpackSelectedCuts(uint32_t packed) {
  PartCuts cuts;
  for (size_t part = 0; part < kMaxParts; ++part) {
    cuts[part] = static_cast<uint8_t>(packed >> (8 * part));
  }
  return cuts;
}

// Bit l % 8 of byte l / 8 is layers[l].
std::string PackLayers(const std::vector<bool>& layers) {
  std::string packed((layers.size() + 7) / 8, '\0');
  for (size_t i = 0; i < layers.size(); ++i) {
    if (layers[i]) packed[i / 8] = static_cast<char>(packed[i / 8] | (1 << (i % 8)));
  }
  return packed;
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
  out->set_cuts(PackSelectedCuts(selection.cuts));
  out->set_layer_begin(selection.layer_begin);
  out->set_layer_end(selection.layer_end);
  out->set_first_cuts(PackSelectedCuts(selection.first_cuts));
  out->set_layers(PackLayers(selection.layers));
}

Result<Selection> FromWire(const wire::Selection& selection) {
  if (selection.layer_begin() >= selection.layer_end() || selection.layer_end() > kMaxLayers) {
    return InvalidArgument("layers {} to {} are not a range inside 0 to {}",
                           selection.layer_begin(), selection.layer_end(), kMaxLayers);
  }
  Selection out;
  out.cuts = UnpackSelectedCuts(selection.cuts());
  out.first_cuts = UnpackSelectedCuts(selection.first_cuts());
  out.layer_begin = static_cast<uint16_t>(selection.layer_begin());
  out.layer_end = static_cast<uint16_t>(selection.layer_end());
  if (const std::string& packed = selection.layers(); !packed.empty()) {
    const size_t count = out.layer_end - out.layer_begin;
    if (packed.size() != (count + 7) / 8) {
      return InvalidArgument("a set of {} layers has {} bytes, not {}", count, (count + 7) / 8,
                             packed.size());
    }
    out.layers.resize(count);
    for (size_t i = 0; i < count; ++i) out.layers[i] = ((packed[i / 8] >> (i % 8)) & 1) != 0;
    // Bits behind the last layer.
    if (PackLayers(out.layers) != packed) {
      return InvalidArgument("a set of {} layers names others behind them", count);
    }
  }
  KV_RETURN_IF_ERROR(out.Validate());
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
