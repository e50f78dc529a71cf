// What the decoder reads of a sequence's whole blocks, waiting for layers that are still on the
// wire.
#pragma once

#include <functional>
#include <span>

#include "base/clock.h"
#include "node/block_class.h"
#include "node/decoder.h"
#include "node/local_cache.h"

namespace kvant::node {

// How to wait for a block's bytes. `poll` makes progress on the network, `wait` sleeps a little.
struct ArrivalWait {
  const Clock* clock = nullptr;
  Duration timeout{};
  std::function<bool()> poll;
  std::function<void(Duration)> wait;
};

// Single-owner; borrows everything for its lifetime, which is a call of the Decoder.
class BlockPast final : public PastBlocks {
 public:
  // arrival: nullptr where all blocks are complete.
  BlockPast(const BlockClass& block_class, std::span<const CachedBlockPtr> blocks,
            const ArrivalWait* arrival)
      : block_class_(block_class), blocks_(blocks), arrival_(arrival) {}

  int tokens() const override { return blocks() * kBlockTokens; }
  int blocks() const override { return static_cast<int>(blocks_.size()); }
  // Waits until the layer has arrived. The block's `failed` if it never will; kDeadlineExceeded.
  Status Layer(int block, int layer, kernels::LayerTile* out) override;

 private:
  Status AwaitLayer(const CachedBlock& block, int layer) const;

  const BlockClass& block_class_;
  std::span<const CachedBlockPtr> blocks_;
  const ArrivalWait* arrival_;
};

}  // namespace kvant::node
