#include "cache_service/arriving_block.h"

#include <algorithm>

#include "base/bytes.h"

namespace kvant {

Status ArrivingBlock::SetManifest(std::span<const std::byte> encoded) {
  KV_ASSIGN_OR_RETURN(BlockManifest manifest, ParseManifest(encoded));
  if (manifest.key != key_) {
    return DataLoss("block {}: the shard sent the manifest of {}", key_.ShortHex(),
                    manifest.key.ShortHex());
  }
  rows_ = SelectRows(manifest, selection_);
  const uint64_t bytes =
      rows_.empty() ? 0 : rows_.back().packed_offset + manifest.rows[rows_.back().row].length;
  if (bytes > capacity_) {
    return InvalidArgument("block {}: {} bytes are selected, the destination has {}",
                           key_.ShortHex(), bytes, capacity_);
  }
  waits_.clear();
  open_layers_ = 0;
  unscanned_ = 0;
  for (const SelectedRow& selected : rows_) {
    const auto layer =
        static_cast<size_t>(manifest.rows[selected.row].layer - selection_.layer_begin);
    if (layer >= waits_.size()) waits_.resize(layer + 1);
    if (waits_[layer]) continue;
    waits_[layer] = true;
    ++open_layers_;
    unscanned_ += layer < written_.size() && written_[layer] ? 1 : 0;
  }
  manifest_ = std::make_shared<const BlockManifest>(std::move(manifest));
  return OkStatus();
}

bool ArrivingBlock::SetWritten(size_t layer_index) {
  if (layer_index >= layers_) return false;
  if (layer_index >= written_.size()) written_.resize(layer_index + 1);
  if (written_[layer_index]) return false;
  written_[layer_index] = true;
  if (layer_index < waits_.size() && waits_[layer_index]) ++unscanned_;
  return true;
}

bool ArrivingBlock::TakeComplete(uint16_t* layer) {
  if (manifest_ == nullptr || unscanned_ == 0) return false;
  for (size_t i = 0; i < std::min(written_.size(), waits_.size()); ++i) {
    if (!written_[i] || !waits_[i]) continue;
    waits_[i] = false;
    --unscanned_;
    --open_layers_;
    *layer = static_cast<uint16_t>(selection_.layer_begin + i);
    return true;
  }
  return false;
}

Status ArrivingBlock::Verify(uint16_t layer, std::span<const std::byte> destination,
                             uint64_t* bytes) const {
  *bytes = 0;
  for (const SelectedRow& selected : rows_) {
    const ManifestRow& row = manifest_->rows[selected.row];
    if (row.layer != layer) continue;
    KV_RETURN_IF_ERROR(VerifyRange(*manifest_, selected.row,
                                   destination.subspan(selected.packed_offset, row.length)));
    *bytes += row.length;
  }
  return OkStatus();
}

}  // namespace kvant
