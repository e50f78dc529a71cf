#include "kernels/tile_codec.h"

#include <cstring>

#include "kernels/check_ranges.h"
#include "kernels/float_formats.h"
#include "kernels/implementation.h"
#include "kernels/tile_format.h"

namespace kvant::kernels {
namespace {

template <const TileFormat& kFormat>
size_t RangeBytes(SegmentKind kind, const SegmentShape& shape, int cut) {
  return static_cast<size_t>(shape.kv_heads) * HeadBytes(kFormat, kind, shape, cut);
}

template <const TileFormat& kFormat>
void Encode(SegmentKind kind, const SegmentShape& shape, const float* x,
            const MutableSegmentRanges& out, float* max_error) {
  ActiveImplementation().tile_encode(kFormat, kind, shape, x, out, max_error);
}

template <const TileFormat& kFormat>
void Decode(SegmentKind kind, const SegmentShape& shape, const SegmentRanges& ranges, float* out) {
  ActiveImplementation().tile_decode(kFormat, kind, shape, ranges, out);
}

// The bounds of what an encoder writes. Within them no product of a scale and a code overflows.
bool ScaleIsValid(uint16_t bits) {
  const float scale = FromBf16(bits);
  return bits == 0 || (scale >= kTileSmallest && scale <= kTileLargest);
}
bool ZeroIsValid(uint16_t bits) {
  const float zero = FromBf16(bits);
  return zero >= -kTileLargest && zero <= kTileLargest;
}

Status Check(const Codec& codec, const TileFormat& format, SegmentKind kind,
             const SegmentShape& shape, const SegmentRanges& ranges,
             std::span<const size_t> sizes) {
  KV_RETURN_IF_ERROR(CheckRangeSizes(codec, kind, shape, ranges, sizes));
  const bool has_zeros = kind == SegmentKind::kKey && format.key_zero;
  const size_t numbers = ScaleBytes(format, kind, shape) / kScaleBytes;
  const size_t scales = has_zeros ? numbers / 2 : numbers;
  for (int head = 0; head < shape.kv_heads; ++head) {
    const std::byte* at =
        ranges.range[0] + static_cast<size_t>(head) * HeadBytes(format, kind, shape, 0);
    for (size_t i = 0; i < numbers; ++i) {
      uint16_t bits;
      std::memcpy(&bits, at + i * kScaleBytes, sizeof(bits));
      if (i < scales ? ScaleIsValid(bits) : ZeroIsValid(bits)) continue;
      return DataLoss("checking {} {}: {} {} of head {} has the impossible bits {:#06x}",
                      codec.name, kind == SegmentKind::kKey ? "keys" : "values",
                      i < scales ? "scale" : "zero point", i < scales ? i : i - scales, head, bits);
    }
  }
  return OkStatus();
}

Status CheckTile8(SegmentKind kind, const SegmentShape& shape, const SegmentRanges& ranges,
                  std::span<const size_t> sizes) {
  return Check(kTile8Codec, kTile8Format, kind, shape, ranges, sizes);
}
Status CheckTile4(SegmentKind kind, const SegmentShape& shape, const SegmentRanges& ranges,
                  std::span<const size_t> sizes) {
  return Check(kTile4Codec, kTile4Format, kind, shape, ranges, sizes);
}

}  // namespace

const Codec kTile8Codec = {CodecId::kTile8,
                           "tile8",
                           kTileCuts,
                           kTileCuts,
                           {kTile8Format.plane_bits, kTile8Format.plane_bits},
                           RangeBytes<kTile8Format>,
                           Encode<kTile8Format>,
                           CheckTile8,
                           Decode<kTile8Format>};
const Codec kTile4Codec = {CodecId::kTile4,
                           "tile4",
                           kTileCuts,
                           kTileCuts,
                           {kTile4Format.plane_bits, kTile4Format.plane_bits},
                           RangeBytes<kTile4Format>,
                           Encode<kTile4Format>,
                           CheckTile4,
                           Decode<kTile4Format>};

}  // namespace kvant::kernels
