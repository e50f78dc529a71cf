// Who holds which run of blocks: weighted rendezvous hashing over an immutable list of shards.
//
// A chain of blocks is placed by runs of kRunBlocks consecutive blocks, so that fetching a prefix
// asks few shards and a long prefix still spreads. A run is named by 64 bits of the key of its
// first block (cache_service/block_key.h: RunOf), which are uniform because keys are SHA-256
// digests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"

namespace kvant {

// Consecutive blocks that live on one shard. Part of the placement, so the same for everybody.
inline constexpr size_t kRunBlocks = 8;
// The epoch of a map that never changes (addresses from flags, MPI ranks).
inline constexpr uint64_t kStaticEpoch = 1;
inline constexpr size_t kMaxShards = 4096;

// A shard is its address, spelled as the clients spell it: placement hashes that spelling, so all
// clients of one cluster must use the same.
struct Shard {
  std::string address;  // "tcp://10.0.0.1:7070", "mpi:2"
  double weight = 1.0;  // share of the runs, relative to the others; > 0, finite
};

// Which shard owns which run, in one epoch. Immutable value: copy it freely, use it from any
// thread. Invariants: 1. shards() is sorted by address, so that the order in which they were named
// does not matter. 2. Adding or removing one shard moves only runs to or from that shard.
class ShardMap {
 public:
  // kInvalidArgument: no shard, more than kMaxShards, an address named twice or empty, a weight
  // that is not positive.
  static Result<ShardMap> Make(uint64_t epoch, std::vector<Shard> shards);

  uint64_t epoch() const { return epoch_; }
  size_t size() const { return shards_.size(); }
  std::span<const Shard> shards() const { return shards_; }
  // Index into shards() of the run's owner.
  size_t Owner(uint64_t run) const;
  // The first min(n, size()) owners in order of preference; the first is Owner(run).
  std::vector<size_t> Owners(uint64_t run, size_t n) const;

 private:
  ShardMap(uint64_t epoch, std::vector<Shard> shards);
  // Larger wins. Weighted rendezvous: weight / -ln(u), u uniform in (0, 1) from shard and run.
  double Score(size_t shard, uint64_t run) const;

  uint64_t epoch_;
  std::vector<Shard> shards_;
  std::vector<uint64_t> identity_;  // [shards] hash of the address
};

}  // namespace kvant
