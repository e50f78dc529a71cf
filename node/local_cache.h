// The blocks that a node holds in its own memory, under a byte limit: asked before the tier is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <unordered_map>
#include <vector>

#include "base/bytes.h"
#include "base/status.h"
#include "cache_service/block_key.h"
#include "cache_service/manifest.h"
#include "node/block_class.h"

namespace kvant::node {

// One whole block, or a portion of it, perhaps still on its way. Shared by the cache and by the
// sequences that attend it; written only by who fills it.
// Invariants: 1. bytes holds what is attended of the portion, BytesOf(portion) bytes, laid out as
// layout(portion.scope) says; those of a layer may be read once ready[layer]. 2. A ready layer was
// made of bytes that were verified against their checksums, and never changes again.
struct CachedBlock {
  BlockKey key;
  Portion portion;
  std::optional<Portion> copied;  // what of it came out of a block that was here before
  UninitializedBytes bytes;       // as they are attended: of layers that are ready, all are set
  StoredRows stored;              // the portion's rows; of forms that are whole at any cut only
  std::vector<uint8_t> ready;     // [layers of the model]; 0 for layers out of scope
  int layers_missing = 0;         // layers in scope that are not ready
  // Of a way that recomputes layers: what enters the first other one, as soon as it is known. The
  // recomputed layers are made ready by who computes them.
  std::vector<float> entering;
  bool needs_entering = false;
  Status failed;          // not ok: what is missing will never come
  bool absent = false;    // failed because the tier did not have it
  bool computed = false;  // here, and so whole; else it comes from the tier
  // Of the stored block: that in the tier, or what was put. nullptr: not known, or there is none.
  std::shared_ptr<const BlockManifest> manifest;

  CachedBlock(const BlockClass& block_class, const BlockKey& block_key,
              const Portion& block_portion);
  // Begins with what `held` has of the portion, so that only the rest need be fetched; with nothing
  // if it was read in another way. No layer is
  // ready yet: whoever fetches the rest checks that both were written as one.
  // REQUIRES: held is complete and of the same key.
  CachedBlock(const BlockClass& block_class, const CachedBlock& held, const Portion& block_portion);
  bool complete() const { return layers_missing == 0; }
  // Whether what has arrived waits for what this node computes.
  bool awaits_entering() const { return needs_entering && entering.empty() && failed.ok(); }
  uint64_t memory_bytes() const { return bytes.size() + stored.bytes().size(); }
  void MarkReady(int layer);
};
using CachedBlockPtr = std::shared_ptr<CachedBlock>;

// Least recently used blocks go first; what a sequence still holds is kept, and counts. A block on
// its way that takes the place of a complete one leaves that one usable until it is complete
// itself. Single-owner.
class LocalCache {
 public:
  // limit_bytes: 0 keeps and finds nothing.
  LocalCache(const BlockClass* block_class, uint64_t limit_bytes);

  // A block that holds, or will hold, at least `portion`; nullptr if there is none. Blocks that
  // failed are forgotten.
  CachedBlockPtr Find(const BlockKey& key, const Portion& portion);
  // The newest block of this key, however little it holds or will hold; nullptr if there is none.
  // It does not count as a use.
  CachedBlockPtr Newest(const BlockKey& key);
  // Replaces a block of the same key; a complete one only once `block` is complete. A block without
  // bytes is not kept.
  void Insert(CachedBlockPtr block);
  // Gives up what exceeds the limit and is not in use.
  void Trim();

  uint64_t bytes() const { return bytes_; }
  uint64_t limit_bytes() const { return limit_bytes_; }
  uint64_t evicted() const { return evicted_; }

 private:
  struct Entry {
    CachedBlockPtr block;
    CachedBlockPtr held;   // complete, and in use until `block` is complete; usually none
    uint64_t counted = 0;  // of both, in bytes_
  };
  using Order = std::list<Entry>;  // most recently used first
  // Drops of the two blocks the one that is not needed any more. False: neither is left, and the
  // entry is gone.
  bool Settle(Order::iterator entry);
  void Erase(Order::iterator entry);
  // Counts what an entry takes now: stored rows of a block on its way get their memory late.
  void Count(Entry* entry);

  const BlockClass* block_class_;
  uint64_t limit_bytes_;
  uint64_t bytes_ = 0;
  uint64_t evicted_ = 0;
  size_t held_ = 0;  // entries with two blocks
  Order order_;
  std::unordered_map<BlockKey, Order::iterator> entries_;
};

}  // namespace kvant::node
