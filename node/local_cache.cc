#include "node/local_cache.h"

#include <utility>

namespace kvant::node {

CachedBlock::CachedBlock(const BlockClass& block_class, const BlockKey& block_key,
                         const Cuts& block_cuts)
    : key(block_key),
      cuts(block_cuts),
      bytes(block_class.BytesOf(block_cuts)),
      ready(static_cast<size_t>(block_class.layout().layers()), 0),
      layers_missing(block_class.layout().layers()) {}

void CachedBlock::MarkReady(int layer) {
  uint8_t& flag = ready[static_cast<size_t>(layer)];
  layers_missing -= flag == 0 ? 1 : 0;
  flag = 1;
}

LocalCache::LocalCache(const BlockClass* block_class, uint64_t limit_bytes)
    : block_class_(block_class), limit_bytes_(limit_bytes) {}

CachedBlockPtr LocalCache::Find(const BlockKey& key, const Cuts& cuts) {
  const auto found = entries_.find(key);
  if (found == entries_.end()) return nullptr;
  const CachedBlockPtr block = *found->second;
  if (!block->failed.ok()) {
    Erase(found->second);
    return nullptr;
  }
  if (!block->cuts.Covers(cuts)) return nullptr;
  order_.splice(order_.begin(), order_, found->second);
  return block;
}

void LocalCache::Insert(CachedBlockPtr block) {
  if (limit_bytes_ == 0) return;
  const auto found = entries_.find(block->key);
  if (found != entries_.end()) Erase(found->second);
  bytes_ += block->bytes.size();
  const BlockKey key = block->key;
  order_.push_front(std::move(block));
  entries_[key] = order_.begin();
  Trim();
}

void LocalCache::Trim() {
  auto entry = order_.end();
  while (bytes_ > limit_bytes_ && entry != order_.begin()) {
    --entry;
    if (entry->use_count() > 1) continue;  // a sequence attends it
    const auto victim = entry++;
    Erase(victim);
    ++evicted_;
  }
}

void LocalCache::Erase(Order::iterator entry) {
  bytes_ -= (*entry)->bytes.size();
  entries_.erase((*entry)->key);
  order_.erase(entry);
}

}  // namespace kvant::node
