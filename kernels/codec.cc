#include "kernels/codec.h"

#include <string>

#include "kernels/check_ranges.h"
#include "kernels/raw_codec.h"
#include "kernels/tile_codec.h"

namespace kvant::kernels {
namespace {

const Codec* const kCodecs[] = {&kRawBf16Codec, &kTile8Codec, &kTile4Codec, &kRawFp16Codec,
                                &kRawFp32Codec};

}  // namespace

bool ShapeIsValid(const SegmentShape& shape) {
  return shape.tokens >= 1 && shape.tokens <= kMaxBlockTokens && shape.kv_heads >= 1 &&
         shape.kv_heads <= kMaxKvHeads && shape.head_dim >= 8 && shape.head_dim <= kMaxHeadDim &&
         shape.head_dim % 8 == 0;
}

std::span<const Codec* const> Codecs() { return kCodecs; }

const Codec* FindCodec(CodecId id) {
  for (const Codec* codec : kCodecs) {
    if (codec->id == id) return codec;
  }
  return nullptr;
}

Result<const Codec*> FindCodec(std::string_view name) {
  std::string known;
  for (const Codec* codec : kCodecs) {
    if (codec->name == name) return codec;
    known += known.empty() ? "" : ", ";
    known += codec->name;
  }
  return InvalidArgument("choosing a codec: '{}' is unknown; there are: {}", name, known);
}

Status CheckRangeSizes(const Codec& codec, SegmentKind kind, const SegmentShape& shape,
                       const SegmentRanges& ranges, std::span<const size_t> sizes) {
  const char* part = kind == SegmentKind::kKey ? "keys" : "values";
  if (!ShapeIsValid(shape)) {
    return DataLoss("checking {} {}: impossible geometry of {} tokens, {} heads of {}", codec.name,
                    part, shape.tokens, shape.kv_heads, shape.head_dim);
  }
  if (ranges.cuts < 1 || ranges.cuts > codec.cuts(kind) ||
      sizes.size() != static_cast<size_t>(ranges.cuts)) {
    return DataLoss("checking {} {}: {} ranges with {} sizes, the codec has 1 to {}", codec.name,
                    part, ranges.cuts, sizes.size(), codec.cuts(kind));
  }
  for (int cut = 0; cut < ranges.cuts; ++cut) {
    const size_t expected = codec.range_bytes(kind, shape, cut);
    const size_t found = sizes[static_cast<size_t>(cut)];
    if (found != expected) {
      return DataLoss("checking {} {}: range {} has {} bytes, {} tokens of {} heads of {} take {}",
                      codec.name, part, cut, found, shape.tokens, shape.kv_heads, shape.head_dim,
                      expected);
    }
  }
  return OkStatus();
}

}  // namespace kvant::kernels
