// A shard ready to run: memory, store, server and pump over a transport that listens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "base/clock.h"
#include "base/status.h"
#include "cache_service/pump.h"
#include "cache_service/shard_server.h"
#include "transport/transport.h"

namespace kvant {

// "512MiB", "2GiB", "65536": a number and an optional unit of B, KiB, MiB, GiB, TiB.
// kInvalidArgument: anything else, or more than 2^63.
Result<uint64_t> ParseBytes(std::string_view text);

struct ShardHostOptions {
  uint64_t memory_bytes = uint64_t{512} << 20;  // payloads, manifests and index together
  // How small the average block may be before the index is full and not the memory.
  uint64_t expected_block_bytes = uint64_t{16} << 10;
  double user_pin_share = 0.25;  // of the memory that user pins may hold
  // Touches all of the memory at start: else who puts what fills it first waits for the kernel to
  // find pages, often longer than for the bytes.
  bool populate = false;
};

// Single-owner; borrows the transport.
class ShardHost {
 public:
  // kInvalidArgument: too little memory to be of use. kResourceExhausted: more than there is.
  // Otherwise what Register says.
  static Result<std::unique_ptr<ShardHost>> Create(Transport* transport,
                                                   const ShardHostOptions& options);

  // One round of progress. True if anything happened; else the caller may wait on the transport.
  bool Turn(TimePoint now) { return pump_->Turn(now); }
  ServerStats stats() const { return server_->stats(); }
  ServerPump& pump() { return *pump_; }

 private:
  ShardHost() = default;
  std::unique_ptr<std::byte[]> memory_;
  std::unique_ptr<MemoryRegion> region_;
  std::unique_ptr<ShardServer> server_;
  std::unique_ptr<ServerPump> pump_;
};

}  // namespace kvant
