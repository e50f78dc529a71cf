// Segments and payloads for the tests of kernels/.
#pragma once

#include <array>
#include <cstddef>
#include <vector>

#include "base/random.h"
#include "kernels/codec.h"

namespace kvant::kernels {

// One encoded segment and where it came from.
struct EncodedSegment {
  std::array<std::vector<std::byte>, kMaxCuts> bytes;
  std::array<float, kMaxCuts> max_error{};
  int cuts = 0;

  SegmentRanges Ranges(int count) const {
    SegmentRanges ranges;
    ranges.cuts = count;
    for (int cut = 0; cut < count; ++cut) {
      ranges.range[cut] = bytes[static_cast<size_t>(cut)].data();
    }
    return ranges;
  }
  std::vector<size_t> Sizes(int count) const {
    std::vector<size_t> sizes;
    for (int cut = 0; cut < count; ++cut) sizes.push_back(bytes[static_cast<size_t>(cut)].size());
    return sizes;
  }
};

inline size_t Elements(const SegmentShape& shape) {
  return static_cast<size_t>(shape.tokens) * static_cast<size_t>(shape.kv_heads) *
         static_cast<size_t>(shape.head_dim);
}

// encode(ranges, max_error) writes the segment.
template <typename EncodeRanges>
EncodedSegment EncodeBy(const Codec& codec, SegmentKind kind, const SegmentShape& shape,
                        const EncodeRanges& encode) {
  EncodedSegment segment;
  segment.cuts = codec.cuts(kind);
  MutableSegmentRanges ranges;
  for (int cut = 0; cut < segment.cuts; ++cut) {
    std::vector<std::byte>& bytes = segment.bytes[static_cast<size_t>(cut)];
    bytes.assign(codec.range_bytes(kind, shape, cut), std::byte{0xAA});
    ranges.range[cut] = bytes.data();
  }
  encode(ranges, segment.max_error.data());
  return segment;
}

inline EncodedSegment Encode(const Codec& codec, SegmentKind kind, const SegmentShape& shape,
                             const float* x) {
  return EncodeBy(codec, kind, shape, [&](const MutableSegmentRanges& ranges, float* max_error) {
    codec.encode(kind, shape, x, ranges, max_error);
  });
}

inline std::vector<float> Decode(const Codec& codec, SegmentKind kind, const SegmentShape& shape,
                                 const EncodedSegment& segment, int cuts) {
  std::vector<float> out(Elements(shape));
  codec.decode(kind, shape, segment.Ranges(cuts), out.data());
  return out;
}

// Like keys and values of a model: channels of different size, some with a mean far from zero.
inline std::vector<float> MakeSegment(const SegmentShape& shape, Random* random) {
  const auto channels = static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(shape.head_dim);
  std::vector<float> size(channels);
  std::vector<float> mean(channels);
  for (size_t c = 0; c < channels; ++c) {
    size[c] = static_cast<float>(0.2 + random->Unit());
    mean[c] = random->Chance(0.2) ? static_cast<float>(3.0 * random->Normal()) : 0.0F;
  }
  std::vector<float> x(Elements(shape));
  for (size_t i = 0; i < x.size(); ++i) {
    const size_t c = i % channels;
    x[i] = mean[c] + size[c] * static_cast<float>(random->Normal());
  }
  return x;
}

}  // namespace kvant::kernels
