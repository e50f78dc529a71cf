#include "node/block_past.h"

namespace kvant::node {

kernels::LayerTile FillTile(const kernels::PayloadLayout& layout, int layer, const Cuts& cuts,
                            std::span<const std::byte> payload) {
  KV_DCHECK(payload.size() >= layout.BytesOfCuts(cuts.keys, cuts.values));
  kernels::LayerTile tile;
  tile.codec = &layout.codec();
  tile.shape = layout.shape();
  tile.keys = layout.Ranges(kernels::SegmentKind::kKey, layer, cuts.keys, payload.data());
  tile.values = layout.Ranges(layout.shape().value_kind(), layer, cuts.values, payload.data());
  return tile;
}

Status BlockPast::AwaitLayer(const CachedBlock& block, int layer) const {
  if (block.ready[static_cast<size_t>(layer)] != 0) return OkStatus();
  KV_CHECK(arrival_ != nullptr);
  const TimePoint deadline = arrival_->clock->Now() + arrival_->timeout;
  while (block.ready[static_cast<size_t>(layer)] == 0) {
    if (!block.failed.ok()) return block.failed;
    if (arrival_->clock->Now() >= deadline) {
      return MakeStatus(StatusCode::kDeadlineExceeded,
                        "layer {} of block {} did not arrive within {:.1f} s", layer,
                        block.key.ShortHex(), Seconds(arrival_->timeout));
    }
    if (!arrival_->poll()) arrival_->wait(std::chrono::microseconds(200));
  }
  return OkStatus();
}

Status BlockPast::Layer(int block, int layer, kernels::LayerTile* out) {
  // Puts of a process whose shard is its own must not age while it computes.
  if (block == 0 && arrival_ != nullptr) arrival_->poll();
  const CachedBlock& cached = *blocks_[static_cast<size_t>(block)];
  const kernels::PayloadLayout& layout = block_class_.layout(cached.portion.scope);
  const Cuts read = block_class_.ReadCuts(static_cast<size_t>(block), read_);
  // Of a form that is whole at any cut, a block that serves is read as it is.
  const bool whole = block_class_.form().whole_at_any_cut();
  KV_CHECK((whole || cached.portion.cuts.Covers(read)) && layout.Holds(layer));
  KV_RETURN_IF_ERROR(AwaitLayer(cached, layer));
  *out = FillTile(layout, layer, block_class_.Attended(read).cuts, cached.bytes);
  return OkStatus();
}

}  // namespace kvant::node
