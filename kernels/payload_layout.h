// Where the segments of all layers stand in a block's payload (docs/block-format.md, "Payload").
//
// An extent is one part (keys, values or latents) at one cut; inside it the layers stand in order.
// Extents stand as keys cut 0, values cut 0, keys cut 1, values cut 1, ... (latents in the place of
// values): all bases before any
// refinement, so that a prefix of the payload is a block at a lower cut. Nothing is padded or
// aligned between ranges.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/codec.h"

namespace kvant::kernels {

// One range of a payload: one layer of one extent.
struct PayloadRow {
  SegmentKind kind = SegmentKind::kKey;
  int cut = 0;
  int layer = 0;
  uint64_t offset = 0;  // from the payload's first byte
  uint64_t length = 0;  // bytes
};

// Immutable; a pure function of its arguments, the same on every machine.
class PayloadLayout {
 public:
  // REQUIRES: shapes that ShapeIsValid (codec.h); layers >= 1.
  PayloadLayout(const Codec& codec, const LayerShape& shape, int layers);
  // Of some layers only, as a reader keeps a block of which it needs no others: the same order
  // without the other layers' ranges. held: [layers]; none set gives a payload without bytes.
  PayloadLayout(const Codec& codec, const LayerShape& shape, const std::vector<bool>& held);

  // All ranges in payload order.
  std::span<const PayloadRow> rows() const { return rows_; }
  // REQUIRES: the codec has this cut of this kind, and Holds(layer).
  const PayloadRow& Row(SegmentKind kind, int cut, int layer) const;
  uint64_t total_bytes() const { return total_bytes_; }
  // Bytes of the first key_cuts extents of the keys and the first value_cuts of the values or
  // latents.
  uint64_t BytesOfCuts(int key_cuts, int value_cuts) const;
  // The first `cuts` ranges of one layer's segment inside a payload that lies at `payload` whole.
  SegmentRanges Ranges(SegmentKind kind, int layer, int cuts, const std::byte* payload) const;
  MutableSegmentRanges MutableRanges(SegmentKind kind, int layer, std::byte* payload) const;

  const Codec& codec() const { return *codec_; }
  const LayerShape& shape() const { return shape_; }
  // Of the model, held or not.
  int layers() const { return static_cast<int>(place_.size()); }
  int held_layers() const { return held_layers_; }
  // REQUIRES: 0 <= layer < layers().
  bool Holds(int layer) const { return place_[static_cast<size_t>(layer)] >= 0; }

 private:
  const Codec* codec_;
  LayerShape shape_;
  std::vector<int> place_;  // [layers]: among those held, or -1
  int held_layers_ = 0;
  uint64_t total_bytes_ = 0;
  std::vector<PayloadRow> rows_;
  int first_row_[2][kMaxCuts] = {};  // [keys, others][cut]: index into rows_ of the first layer
};

}  // namespace kvant::kernels
