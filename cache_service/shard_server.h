// One shard as a state machine: messages and transport events in, actions out. It serves a
// BlockStore to many clients, and it alone moves bulk bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "cache_service/actions.h"
#include "cache_service/block_store.h"

namespace kvant {

// TESTS ONLY. Deliberate bugs that the simulator must be able to find; all off in production.
struct ServerFaults {
  bool skip_checksum_verification = false;  // Seal publishes what landed, right or wrong
  bool seal_before_landed = false;          // Seal does not wait for the bytes, nor verifies them
  bool ignore_lease_in_eviction = false;    // pinned blocks are evicted too
};

// What one client may ask for at once. More is answered with kResourceExhausted.
struct ServerLimits {
  size_t max_clients = 1024;
  size_t max_requests_per_client = 256;  // fetches in progress
  size_t max_puts_per_client = 512;      // open reservations
  size_t max_transfers_per_client =
      64;  // submitted and not done; at most the transport's own limit
  size_t max_leases_per_client = 16384;  // blocks that Lookups asked to keep
  size_t max_queued_ranges = 1 << 20;    // of all fetches of all clients
};

struct ShardServerOptions {
  BlockStoreOptions store;  // its fault switches are set from `faults`
  uint64_t epoch = kStaticEpoch;
  ServerLimits limits{};
  ServerFaults faults{};
};

// Counters since start. Plain numbers, so that a report can add shards up.
struct ServerStats {
  StoreStats store;
  uint64_t clients = 0;
  uint64_t lookup_blocks = 0;         // keys asked for in Lookups
  uint64_t hits = 0;                  // blocks served by Fetch
  uint64_t misses = 0;                // blocks asked for by Fetch and absent
  uint64_t payload_bytes_served = 0;  // put on the wire by completed transfers
  uint64_t payload_bytes_stored = 0;  // read from clients
  uint64_t puts_sealed = 0;
  uint64_t puts_refused = 0;  // already there or in progress
  uint64_t dedup_bytes = 0;   // payload of puts refused because the block was there
  uint64_t data_loss = 0;     // bad bytes found, at seal or by a client's report
  uint64_t malformed_messages = 0;
  uint64_t stale_epoch = 0;
  uint64_t transfers_failed = 0;
  uint64_t refused_busy = 0;  // kResourceExhausted answers

  // One JSON object, keys as above, the store's with the prefix "store_".
  std::string ToJson() const;
};

// Single-owner. Invariants: 1. A block is pinned as long as a transfer reads it. 2. What a client
// may make the server remember is bounded by ServerLimits and the protocol's limits.
class ShardServer {
 public:
  explicit ShardServer(const ShardServerOptions& options);
  ~ShardServer();

  // Takes any event of the transport; those of unknown endpoints are ignored.
  void OnEvent(const Event& event, TimePoint now);
  // Ends what is overdue. Call at least every 100 ms or so.
  void Tick(TimePoint now);
  // Appends what is to be done, in order, and forgets it.
  void TakeActions(std::vector<Action>* out);

  ServerStats stats() const;
  // For checkers and tests (flipping stored bytes). Not for readers of blocks.
  BlockStore& store();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvant
