// The node's side of the cache as a state machine: lookups, fetches and puts over all shards.
//
// Every operation ends with exactly one done event, whatever becomes of shards and wires. Its
// buffer is a lease that caller and client share: the client drops its share with the done event,
// and the memory goes back to the arena when the caller has dropped it too and no byte can land in
// it any more.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "cache_service/actions.h"
#include "cache_service/block_key.h"
#include "cache_service/manifest.h"
#include "cluster/shard_map.h"
#include "transport/arena.h"

namespace kvant {

// Names an operation of one client; never reused, 0 is none.
using OpId = uint64_t;

enum class LookupState : uint8_t {
  kAbsent,
  kReserved,  // somebody is writing it
  kPresent,
  kUnreachable,  // its shard did not answer in time, or not with kOk
};
struct LookupBlock {
  LookupState state = LookupState::kAbsent;
  std::array<uint8_t, kMaxParts> cuts{};  // there are, per part
  uint64_t payload_bytes = 0;
  CutEnds cut_ends{};
};

struct FetchItem {
  BlockKey key;
  uint64_t run = 0;  // RunOf(chain, index)
  Selection selection;
  uint64_t offset = 0;    // from the start of the lease
  uint64_t capacity = 0;  // bytes there for this item; the selection must fit (SelectedBytes)
};
struct FetchRequest {
  std::vector<FetchItem> items;   // a key may stand in several, with other layers
  std::shared_ptr<Lease> buffer;  // items' places must not overlap
  TimePoint deadline{};
};

struct PutRequest {
  BlockKey key;
  BlockKey parent;
  uint64_t run = 0;
  uint64_t payload_bytes = 0;
  size_t manifest_rows = 0;       // the most that Seal will bring
  std::shared_ptr<Lease> buffer;  // payload at offset 0; at least payload_bytes long
  TimePoint deadline{};
};

struct ClientEvent {
  enum class Kind : uint8_t {
    kLookupDone,  // blocks, prefix_blocks; ok even if shards were unreachable; kStaleEpoch: map is
                  // old
    kLayerArrived,  // item, layer, manifest: verified in the buffer
    kItemDone,      // item, status, present, manifest: all its layers arrived, or none more will
    kFetchDone,  // status: ok if every item ended ok (absent counts as ok), else the first that did
                 // not
    kPutDone,    // status, already_there: ok and already_there when somebody else put it first
    kPinDone,    // status
    kStatsDone,  // status, text: JSON of one shard
  };
  Kind kind = Kind::kLookupDone;
  OpId op = 0;
  size_t item = 0;
  uint16_t layer = 0;
  bool present = false;
  bool already_there = false;
  Status status;
  std::shared_ptr<const BlockManifest> manifest;
  std::vector<LookupBlock> blocks;
  size_t prefix_blocks = 0;  // leading blocks that are kPresent
  std::string text;
};

struct CacheClientOptions {
  std::string name = "client";  // said to the shards, for their logs
  // Check each layer in the arrival buffer before it is reported. Without it the caller must verify
  // its private copy with VerifyPackedLayer and call ReportCorrupt itself.
  bool verify = true;
};

struct ClientStats {
  uint64_t lookups = 0;
  uint64_t items_fetched = 0;
  uint64_t items_absent = 0;
  uint64_t items_failed = 0;
  uint64_t payload_bytes_fetched = 0;  // of layers that arrived and were verified
  uint64_t puts_sealed = 0;
  uint64_t puts_already_there = 0;
  uint64_t puts_failed = 0;
  uint64_t payload_bytes_put = 0;  // of sealed puts
  uint64_t data_loss = 0;          // bad bytes found by this client
  uint64_t malformed_messages = 0;
  uint64_t deadlines_missed = 0;
};

// Single-owner. Talks to all shards of one map. Buffers are leases of one registered arena, of
// which each operation exposes only its own, only to the shards it asks, only until it is done.
class CacheClient {
 public:
  // arena: outlives the client; all buffers are its leases.
  CacheClient(ShardMap map, RegisteredArena* arena, CacheClientOptions options = {});
  ~CacheClient();

  // The pump says that a shard is reached through this endpoint now. Its kClosed ends that.
  void BindShard(size_t shard, EndpointId endpoint, TimePoint now);
  bool Reachable(size_t shard) const;
  const ShardMap& map() const;

  // Asks which blocks of a chain are there, in one round trip a shard. lease > 0 keeps the present
  // ones that long, or until this client fetched them.
  OpId Lookup(std::span<const BlockKey> chain, Duration lease, TimePoint deadline, TimePoint now);
  OpId Fetch(FetchRequest request, TimePoint now);
  // Reserves a block. Its bytes are announced by PutReady as they are computed, in any order; they
  // must not change until kPutDone.
  OpId BeginPut(const PutRequest& request, TimePoint now);
  // [payload_offset, + length) stands in the buffer: the shard may read it. An unknown or ended op
  // is ignored, here and below.
  void PutReady(OpId op, uint64_t payload_offset, uint64_t length, TimePoint now);
  // The whole payload stands in the buffer, and this is what it is. Leads to kPutDone. A manifest
  // that is invalid, or not of this key and size, ends the put with kInvalidArgument.
  void SealPut(OpId op, const BlockManifest& manifest, TimePoint now);
  // Ends an operation early: its done event follows with kCancelled.
  void Cancel(OpId op, TimePoint now);
  // Keeps a block for `duration` whatever the eviction thinks (0: takes that back).
  OpId Pin(const BlockKey& key, uint64_t run, Duration duration, TimePoint deadline, TimePoint now);
  OpId Stats(size_t shard, TimePoint deadline, TimePoint now);
  // Tells the shard that verified bytes of a block were bad.
  void ReportCorrupt(const BlockKey& key, uint64_t run, TimePoint now);

  // Takes any event of the transport. False: it concerns nothing of this client.
  bool OnEvent(const Event& event, TimePoint now);
  // Ends what is overdue. Call at least every 10 ms or so while operations are open.
  void Tick(TimePoint now);
  // Appends what is to be done, in order, and forgets it.
  void TakeActions(std::vector<Action>* out);
  // Appends what happened, in order, and forgets it.
  void TakeEvents(std::vector<ClientEvent>* out);
  // Operations whose done event has not been given yet.
  size_t open_operations() const;
  const ClientStats& stats() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvant
