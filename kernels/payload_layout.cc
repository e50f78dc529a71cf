#include "kernels/payload_layout.h"

#include <algorithm>

#include "base/check.h"

namespace kvant::kernels {

PayloadLayout::PayloadLayout(const Codec& codec, const SegmentShape& shape, int layers)
    : codec_(&codec), shape_(shape), layers_(layers) {
  KV_CHECK(ShapeIsValid(shape) && layers >= 1);
  for (int cut = 0; cut < std::max(codec.key_cuts, codec.value_cuts); ++cut) {
    for (const SegmentKind kind : {SegmentKind::kKey, SegmentKind::kValue}) {
      if (cut >= codec.cuts(kind)) continue;
      first_row_[static_cast<int>(kind)][cut] = static_cast<int>(rows_.size());
      const uint64_t length = codec.range_bytes(kind, shape, cut);
      for (int layer = 0; layer < layers; ++layer) {
        rows_.push_back({kind, cut, layer, total_bytes_, length});
        total_bytes_ += length;
      }
    }
  }
}

const PayloadRow& PayloadLayout::Row(SegmentKind kind, int cut, int layer) const {
  KV_CHECK(cut >= 0 && cut < codec_->cuts(kind) && layer >= 0 && layer < layers_);
  return rows_[static_cast<size_t>(first_row_[static_cast<int>(kind)][cut] + layer)];
}

uint64_t PayloadLayout::BytesOfCuts(int key_cuts, int value_cuts) const {
  uint64_t bytes = 0;
  for (const PayloadRow& row : rows_) {
    if (row.cut < (row.kind == SegmentKind::kKey ? key_cuts : value_cuts)) bytes += row.length;
  }
  return bytes;
}

SegmentRanges PayloadLayout::Ranges(SegmentKind kind, int layer, int cuts,
                                    const std::byte* payload) const {
  KV_CHECK(cuts >= 1 && cuts <= codec_->cuts(kind));
  SegmentRanges ranges;
  ranges.cuts = cuts;
  for (int cut = 0; cut < cuts; ++cut) ranges.range[cut] = payload + Row(kind, cut, layer).offset;
  return ranges;
}

MutableSegmentRanges PayloadLayout::MutableRanges(SegmentKind kind, int layer,
                                                  std::byte* payload) const {
  MutableSegmentRanges ranges;
  for (int cut = 0; cut < codec_->cuts(kind); ++cut) {
    ranges.range[cut] = payload + Row(kind, cut, layer).offset;
  }
  return ranges;
}

}  // namespace kvant::kernels
