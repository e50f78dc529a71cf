// Control messages to bytes and back, and the values that travel in them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "cache_service/block_key.h"
#include "cache_service/manifest.h"
#include "cache_service/protocol.pb.h"
#include "transport/transport.h"

namespace kvant {

// The envelope's bytes, then the low 32 bits of their XXH3-64, little-endian. A flipped byte must
// not turn one valid request into another one.
std::vector<std::byte> EncodeMessage(const wire::Envelope& envelope);
// For bytes that nobody vouches for. kDataLoss: the checksum differs. kInvalidArgument: too long,
// not an Envelope, or of another protocol version; `envelope` then holds what could be read, its
// request_id is 0 if nothing could.
Status DecodeMessage(std::span<const std::byte> bytes, wire::Envelope* envelope);

inline std::string ToWire(const BlockKey& key) {
  return {reinterpret_cast<const char*>(key.bytes.data()), key.bytes.size()};
}
inline std::string ToWire(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}
// kInvalidArgument: not a key.
Result<BlockKey> KeyFromWire(const std::string& bytes);

void ToWire(const Status& status, wire::Status* out);
// Codes that nobody knows become kUnavailable.
Status FromWire(const wire::Status& status);
void ToWire(const RemoteWindow& window, wire::Window* out);
RemoteWindow FromWire(const wire::Window& window);
void ToWire(const Selection& selection, wire::Selection* out);
// kInvalidArgument: layers out of range, cuts that are none, or not the one form of a selection.
Result<Selection> FromWire(const wire::Selection& selection);

uint32_t PackCuts(const std::array<uint8_t, kMaxParts>& cuts);
std::array<uint8_t, kMaxParts> UnpackCuts(uint32_t packed);

}  // namespace kvant
