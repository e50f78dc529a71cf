#include "node/local_cache.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace kvant::node {

CachedBlock::CachedBlock(const BlockClass& block_class, const BlockKey& block_key,
                         const Portion& block_portion)
    : key(block_key),
      portion(block_portion),
      bytes(block_class.BytesOf(block_portion)),
      ready(static_cast<size_t>(block_class.layout().layers()), 0),
      layers_missing(block_class.layout(block_portion.scope).held_layers()),
      needs_entering(block_class.form().WayOf(block_portion.cuts).recomputed > 0) {}

CachedBlock::CachedBlock(const BlockClass& block_class, const CachedBlock& held,
                         const Portion& block_portion)
    : CachedBlock(block_class, held.key, block_portion) {
  KV_CHECK(held.complete());
  if (held.portion.cuts.way != portion.cuts.way) return;
  copied = held.portion.Meet(portion);
  manifest = held.manifest;
  if (block_class.form().whole_at_any_cut()) {
    if (manifest == nullptr) return;  // it held nothing
    const StoredForm& form = block_class.form();
    const std::vector<ManifestRow>& rows = held.manifest->rows;
    stored = StoredRows(held.manifest, [&](size_t i) { return form.InPortion(rows[i], portion); });
    for (size_t i = 0; i < rows.size(); ++i) {
      if (!form.InPortion(rows[i], *copied)) continue;
      const std::span<const std::byte> from = held.stored.Row(i);
      std::copy(from.begin(), from.end(), stored.Row(i).begin());
    }
    return;
  }
  const kernels::PayloadLayout& from = block_class.layout(held.portion.scope);
  const kernels::PayloadLayout& to = block_class.layout(portion.scope);
  for (const kernels::PayloadRow& row : block_class.layout(copied->scope).rows()) {
    if (row.cut >= copied->cuts.Of(row.kind)) continue;
    std::memcpy(bytes.data() + to.Row(row.kind, row.cut, row.layer).offset,
                held.bytes.data() + from.Row(row.kind, row.cut, row.layer).offset, row.length);
  }
}

void CachedBlock::MarkReady(int layer) {
  uint8_t& flag = ready[static_cast<size_t>(layer)];
  layers_missing -= flag == 0 ? 1 : 0;
  flag = 1;
}

LocalCache::LocalCache(const BlockClass* block_class, uint64_t limit_bytes)
    : block_class_(block_class), limit_bytes_(limit_bytes) {}

CachedBlockPtr LocalCache::Find(const BlockKey& key, const Portion& portion) {
  const auto found = entries_.find(key);
  if (found == entries_.end()) return nullptr;
  const Order::iterator entry = found->second;
  if (!Settle(entry)) return nullptr;
  // What is complete serves sooner than what is on its way.
  const CachedBlockPtr& block =
      entry->held != nullptr && entry->held->portion.Covers(portion) ? entry->held : entry->block;
  if (!block->portion.Covers(portion)) return nullptr;
  order_.splice(order_.begin(), order_, entry);
  return block;
}

CachedBlockPtr LocalCache::Newest(const BlockKey& key) {
  const auto found = entries_.find(key);
  if (found == entries_.end()) return nullptr;
  const Order::iterator entry = found->second;
  return Settle(entry) ? entry->block : nullptr;
}

void LocalCache::Insert(CachedBlockPtr block) {
  if (limit_bytes_ == 0 || block->bytes.empty()) return;
  Entry entry{std::move(block), nullptr, 0};
  const auto found = entries_.find(entry.block->key);
  if (found != entries_.end() && Settle(found->second)) {
    const Entry& before = *found->second;
    if (!entry.block->complete()) {
      entry.held = before.block->complete() ? before.block : before.held;
    }
    Erase(found->second);
  }
  Count(&entry);
  if (entry.held != nullptr) ++held_;
  order_.push_front(std::move(entry));
  entries_[order_.front().block->key] = order_.begin();
  Trim();
}

void LocalCache::Trim() {
  if (block_class_->form().whole_at_any_cut()) {
    for (Entry& entry : order_) Count(&entry);
  }
  if (bytes_ > limit_bytes_ && held_ != 0) {
    for (auto entry = order_.begin(); entry != order_.end();) Settle(entry++);
  }
  auto entry = order_.end();
  while (bytes_ > limit_bytes_ && entry != order_.begin()) {
    --entry;
    // A sequence attends it, or it is on its way.
    if (entry->block.use_count() > 1 || entry->held.use_count() > 1) continue;
    const auto victim = entry++;
    Erase(victim);
    ++evicted_;
  }
}

bool LocalCache::Settle(Order::iterator entry) {
  const bool failed = !entry->block->failed.ok();
  if (failed && entry->held == nullptr) {
    Erase(entry);
    return false;
  }
  if (entry->held != nullptr && (failed || entry->block->complete())) {
    if (failed) std::swap(entry->block, entry->held);
    entry->held = nullptr;
    --held_;
    Count(&*entry);
  }
  return true;
}

void LocalCache::Count(Entry* entry) {
  const uint64_t counted =
      entry->block->memory_bytes() + (entry->held != nullptr ? entry->held->memory_bytes() : 0);
  bytes_ += counted - entry->counted;
  entry->counted = counted;
}

void LocalCache::Erase(Order::iterator entry) {
  bytes_ -= entry->counted;
  if (entry->held != nullptr) --held_;
  entries_.erase(entry->block->key);
  order_.erase(entry);
}

}  // namespace kvant::node
