// The first layers of a prefix computed exactly, and nothing else of it: what readers do of blocks
// that are stored for those who recompute them (StoredWay::recomputed).
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/payload_layout.h"
#include "node/block_class.h"
#include "node/decoder.h"
#include "node/local_cache.h"

namespace kvant::node {

// Single-owner; borrows the class. Blocks in the caller's hands that still wait when this goes end
// as failed: nobody else computes what they lack.
class FirstLayers final : private PastBlocks {
 public:
  // recomputed: layers, below those of the model. tokens: of the prefix, copied.
  FirstLayers(const BlockClass* block_class, int recomputed, std::span<const int32_t> tokens);
  ~FirstLayers() override;
  FirstLayers(const FirstLayers&) = delete;
  FirstLayers& operator=(const FirstLayers&) = delete;

  int recomputed() const { return recomputed_; }
  // Gives a block of the sequence its first layers (those below `recomputed`, and its next one) and
  // what enters the latter, now or as soon as Next has computed them.
  void Want(size_t index, CachedBlockPtr block);
  // Whether a block waits for Next.
  bool pending() const;
  // Blocks that Next has computed.
  size_t computed() const { return blocks_.size(); }
  // Computes the sequence's next block, all of whose work is PrefillWork of `recomputed` layers.
  // poll: called between layers. Returns whether blocks were given what they waited for.
  // REQUIRES: pending().
  Result<bool> Next(Decoder* decoder, const std::function<void()>& poll);

 private:
  struct Computed {
    std::vector<std::byte> payload;  // layout_
    std::vector<float> entering;     // [kBlockTokens][hidden]
  };
  struct Waiting {
    size_t index = 0;
    CachedBlockPtr block;
  };
  // PastBlocks: exact, as they are attended.
  int tokens() const override { return blocks() * kBlockTokens; }
  int blocks() const override { return static_cast<int>(blocks_.size()); }
  Status Layer(int block, int layer, kernels::LayerTile* out) override;
  void Give(const Computed& of, CachedBlock* block) const;

  const BlockClass* block_class_;
  int recomputed_;
  std::vector<int32_t> tokens_;
  kernels::PayloadLayout layout_;  // of a whole block's layers up to `recomputed`, inclusive
  std::vector<Computed> blocks_;
  std::vector<Waiting> waiting_;
};

}  // namespace kvant::node
