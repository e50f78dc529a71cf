// Messages of the cache protocol for the fuzz targets: made well-formed where a checksum would
// otherwise end every input at once.
#pragma once

#include <google/protobuf/stubs/logging.h>

#include <cstdint>
#include <span>

#include "cache_service/actions.h"
#include "cache_service/block_key.h"
#include "cache_service/manifest.h"
#include "cache_service/wire.h"
#include "cluster/shard_map.h"
#include "tests/fuzz/fuzz_input.h"

namespace kvant::fuzz {

inline BlockKey SmallKey(uint8_t number) {
  BlockKey key;
  key.bytes.fill(std::byte{0x5E});
  key.bytes[0] = static_cast<std::byte>(number);
  return key;
}

// A block of two rows of zeros.
inline BlockManifest ZeroManifest(uint8_t number) {
  BlockManifest manifest;
  manifest.key = SmallKey(number);
  manifest.codec = 1;
  manifest.token_count = 4;
  const Bytes row(64);
  manifest.Append(0, 0, 0, 0, row, 0);
  manifest.Append(1, 0, 0, 1, row, 0);
  return manifest;
}

// Protobuf reports what it refuses on stderr; here nearly everything is refused.
inline void SilenceProtobuf() { google::protobuf::SetLogHandler(nullptr); }

// The envelope that `body` encodes, of our version and epoch, as it goes on the wire; empty if it
// is none or too long.
inline Bytes Repaired(std::span<const std::byte> body, wire::Envelope* envelope) {
  if (!envelope->ParseFromArray(body.data(), static_cast<int>(body.size()))) return {};
  envelope->set_version(kProtocolVersion);
  if (envelope->ByteSizeLong() > kMaxMessageBytes / 2) return {};
  return EncodeMessage(*envelope);
}

// Appends a command of a fuzz input: its number, two bytes of length, the message's body.
inline void AppendMessage(uint8_t command, const wire::Envelope& envelope, Bytes* out) {
  const std::string body = envelope.SerializeAsString();
  out->push_back(static_cast<std::byte>(command));
  out->push_back(static_cast<std::byte>(body.size() & 0xFF));
  out->push_back(static_cast<std::byte>(body.size() >> 8));
  const Bytes bytes = ToBytes(body);
  out->insert(out->end(), bytes.begin(), bytes.end());
}

}  // namespace kvant::fuzz
