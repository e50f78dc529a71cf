// The first half of every codec's check().
#pragma once

#include <span>

#include "kernels/codec.h"

namespace kvant::kernels {

// The geometry, the number of ranges and their sizes: kDataLoss when any is not what the codec
// says.
Status CheckRangeSizes(const Codec& codec, SegmentKind kind, const SegmentShape& shape,
                       const SegmentRanges& ranges, std::span<const size_t> sizes);

}  // namespace kvant::kernels
