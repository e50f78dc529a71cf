#include "kernels/payload_layout.h"

#include <algorithm>

#include "base/check.h"

namespace kvant::kernels {
namespace {

int RowIndex(SegmentKind kind) { return kind == SegmentKind::kKey ? 0 : 1; }

}  // namespace

PayloadLayout::PayloadLayout(const Codec& codec, const LayerShape& shape, int layers)
    : PayloadLayout(codec, shape, std::vector<bool>(static_cast<size_t>(layers), true)) {}

PayloadLayout::PayloadLayout(const Codec& codec, const LayerShape& shape,
                             const std::vector<bool>& held)
    : codec_(&codec), shape_(shape) {
  KV_CHECK(ShapeIsValid(shape.keys) && ShapeIsValid(shape.values) && !held.empty());
  for (const bool holds : held) place_.push_back(holds ? held_layers_++ : -1);
  for (int cut = 0; cut < std::max(codec.key_cuts, codec.value_cuts); ++cut) {
    for (const SegmentKind kind : {SegmentKind::kKey, shape.value_kind()}) {
      if (cut >= codec.cuts(kind)) continue;
      first_row_[RowIndex(kind)][cut] = static_cast<int>(rows_.size());
      const uint64_t length = codec.range_bytes(kind, shape.Of(kind), cut);
      for (int layer = 0; layer < layers(); ++layer) {
        if (!Holds(layer)) continue;
        rows_.push_back({kind, cut, layer, total_bytes_, length});
        total_bytes_ += length;
      }
    }
  }
}

const PayloadRow& PayloadLayout::Row(SegmentKind kind, int cut, int layer) const {
  KV_CHECK(kind == SegmentKind::kKey || kind == shape_.value_kind());
  KV_CHECK(cut >= 0 && cut < codec_->cuts(kind) && layer >= 0 && layer < layers() && Holds(layer));
  const int place = place_[static_cast<size_t>(layer)];
  return rows_[static_cast<size_t>(first_row_[RowIndex(kind)][cut] + place)];
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
