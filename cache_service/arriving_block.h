// One block on its way to a client: which of its layers arrived.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "cache_service/manifest.h"

namespace kvant {

// Bytes may arrive before the manifest does. Single-owner.
class ArrivingBlock {
 public:
  ArrivingBlock() = default;
  // capacity: bytes of its destination.
  ArrivingBlock(const BlockKey& key, const Selection& selection, uint64_t capacity)
      : key_(key),
        selection_(selection),
        capacity_(capacity),
        layers_(static_cast<size_t>(selection.layer_end - selection.layer_begin)) {}

  const BlockKey& key() const { return key_; }
  size_t layers() const { return layers_; }
  const std::shared_ptr<const BlockManifest>& manifest() const { return manifest_; }
  // The shard's description of the block. kInvalidArgument, kDataLoss: not one, or not of this
  // block, or what is selected of it is larger than the destination.
  Status SetManifest(std::span<const std::byte> encoded);
  // The bytes of this layer have landed. False: they had already, or there is no such layer.
  bool SetWritten(size_t layer_index);
  // Takes one layer that is complete and was not taken before; false if there is none now. Layers
  // of which nothing is selected are never taken.
  bool TakeComplete(uint16_t* layer);
  // Every layer of which something is selected was taken.
  bool complete() const { return manifest_ != nullptr && open_layers_ == 0; }
  // Checks one layer in the destination. Returns its bytes in `bytes`.
  Status Verify(uint16_t layer, std::span<const std::byte> destination, uint64_t* bytes) const;

 private:
  BlockKey key_;
  Selection selection_;
  uint64_t capacity_ = 0;
  std::shared_ptr<const BlockManifest> manifest_;
  std::vector<SelectedRow> rows_;  // layer-major
  size_t layers_ = 0;              // that may be selected: far more than there are, for SelectAll
  std::vector<bool> written_;      // by layer - layer_begin; false behind its end
  std::vector<bool> waits_;        // likewise: of the manifest, and not taken yet
  size_t open_layers_ = 0;
  size_t unscanned_ = 0;  // written layers that were not taken yet
};

}  // namespace kvant
