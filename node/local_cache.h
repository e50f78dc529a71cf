// The blocks that a node holds in its own memory, under a byte limit: asked before the tier is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "cache_service/block_key.h"
#include "cache_service/manifest.h"
#include "node/block_class.h"

namespace kvant::node {

// One whole block, or its first extents, perhaps still on its way. Shared by the cache and by the
// sequences that attend it; written only by who fills it.
// Invariants: 1. bytes holds the payload's first BytesOf(cuts) bytes; those of a layer may be read
// once ready[layer]. 2. A ready layer was verified against its checksums and never changes again.
struct CachedBlock {
  BlockKey key;
  Cuts cuts;
  std::vector<std::byte> bytes;
  std::vector<uint8_t> ready;  // [layers]
  int layers_missing = 0;      // layers that are not ready
  Status failed;               // not ok: what is missing will never come
  bool absent = false;         // failed because the tier did not have it
  BlockManifest manifest;      // with rows only where the whole block was computed here

  CachedBlock(const BlockClass& block_class, const BlockKey& block_key, const Cuts& block_cuts);
  bool complete() const { return layers_missing == 0; }
  void MarkReady(int layer);
};
using CachedBlockPtr = std::shared_ptr<CachedBlock>;

// Least recently used blocks go first; what a sequence still holds is kept, and counts.
// Single-owner.
class LocalCache {
 public:
  // limit_bytes: 0 keeps and finds nothing.
  LocalCache(const BlockClass* block_class, uint64_t limit_bytes);

  // A block that holds, or will hold, at least `cuts`; nullptr if there is none. Blocks that failed
  // are forgotten.
  CachedBlockPtr Find(const BlockKey& key, const Cuts& cuts);
  // Replaces a block of the same key.
  void Insert(CachedBlockPtr block);
  // Gives up what exceeds the limit and is not in use.
  void Trim();

  uint64_t bytes() const { return bytes_; }
  uint64_t limit_bytes() const { return limit_bytes_; }
  uint64_t evicted() const { return evicted_; }

 private:
  using Order = std::list<CachedBlockPtr>;  // most recently used first
  void Erase(Order::iterator entry);

  const BlockClass* block_class_;
  uint64_t limit_bytes_;
  uint64_t bytes_ = 0;
  uint64_t evicted_ = 0;
  Order order_;
  std::unordered_map<BlockKey, Order::iterator> entries_;
};

}  // namespace kvant::node
