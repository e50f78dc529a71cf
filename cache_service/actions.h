// What a state machine of the cache service wants done, and the limits of the protocol that both
// sides keep (docs/wire-protocol.md).
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/clock.h"
#include "transport/transport.h"

namespace kvant {

// One thing to do on an endpoint. The pump does them in order for each endpoint and keeps what the
// transport refuses for now; an action for an endpoint that is closed is dropped, except that a
// transfer dropped so is reported back as kTransferDone with kUnavailable.
struct Action {
  enum class Kind : uint8_t { kSend, kTransfer, kClose };
  Kind kind = Kind::kSend;
  EndpointId endpoint = 0;
  std::vector<std::byte> message;  // kSend
  Transfer transfer;               // kTransfer
};

inline constexpr uint32_t kProtocolVersion = 1;
inline constexpr size_t kMaxMessageBytes = size_t{1} << 20;
inline constexpr size_t kMaxChain = 4096;      // keys in one Lookup
inline constexpr size_t kMaxFetchItems = 512;  // blocks in one Fetch
inline constexpr size_t kMaxPutRanges = 4096;  // ranges in one PutRanges
inline constexpr Duration kMaxLease = std::chrono::seconds(60);
inline constexpr Duration kMaxDeadline = std::chrono::minutes(10);

}  // namespace kvant
