#include "kernels/raw_codec.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/check_ranges.h"
#include "kernels/float_formats.h"

namespace kvant::kernels {
namespace {

struct Bf16 {
  using Element = uint16_t;
  static constexpr float kLargest = 0x1.FEp127F;
  static Element Narrow(float value) { return ToBf16(value); }
  static float Widen(Element element) { return FromBf16(element); }
  static bool Finite(Element element) { return (element & 0x7F80U) != 0x7F80U; }
};
struct Fp16 {
  using Element = uint16_t;
  static constexpr float kLargest = 65504.0F;
  static Element Narrow(float value) { return ToFp16(value); }
  static float Widen(Element element) { return FromFp16(element); }
  static bool Finite(Element element) { return (element & 0x7C00U) != 0x7C00U; }
};
struct Fp32 {
  using Element = float;
  static constexpr float kLargest = std::numeric_limits<float>::max();
  static Element Narrow(float value) { return value; }
  static float Widen(Element element) { return element; }
  static bool Finite(Element element) { return std::isfinite(element); }
};

size_t Elements(const SegmentShape& shape) {
  return static_cast<size_t>(shape.tokens) * static_cast<size_t>(shape.kv_heads) *
         static_cast<size_t>(shape.head_dim);
}

// Where element (token, head, channel) stands: keys [head][channel][token], values
// [head][token][channel].
struct Order {
  size_t token;
  size_t head;
  size_t channel;
};
Order OrderOf(SegmentKind kind, const SegmentShape& shape) {
  const auto tokens = static_cast<size_t>(shape.tokens);
  const auto width = static_cast<size_t>(shape.head_dim);
  if (kind == SegmentKind::kKey) return {1, tokens * width, tokens};
  return {width, tokens * width, 1};
}

template <typename Format>
size_t RangeBytes(SegmentKind, const SegmentShape& shape, int) {
  return Elements(shape) * sizeof(typename Format::Element);
}

template <typename Format>
void Encode(SegmentKind kind, const SegmentShape& shape, const float* x,
            const MutableSegmentRanges& out, float* max_error) {
  const Order order = OrderOf(kind, shape);
  float error = 0.0F;
  for (int t = 0; t < shape.tokens; ++t) {
    for (int h = 0; h < shape.kv_heads; ++h) {
      std::byte* to = out.range[0] +
                      (static_cast<size_t>(t) * order.token + static_cast<size_t>(h) * order.head) *
                          sizeof(typename Format::Element);
      for (int c = 0; c < shape.head_dim; ++c) {
        const float lower = *x < Format::kLargest ? *x : Format::kLargest;
        const auto element = Format::Narrow(lower > -Format::kLargest ? lower : -Format::kLargest);
        std::memcpy(to + static_cast<size_t>(c) * order.channel * sizeof(element), &element,
                    sizeof(element));
        const float e = std::fabs(*x - Format::Widen(element));
        error = e > error ? e : error;
        ++x;
      }
    }
  }
  // The difference was rounded; one step up makes it a bound. 0 means exact.
  if (max_error == nullptr) return;
  max_error[0] = error == 0.0F ? 0.0F : std::nextafter(error, std::numeric_limits<float>::max());
}

template <typename Format>
void Decode(SegmentKind kind, const SegmentShape& shape, const SegmentRanges& ranges, float* out) {
  const Order order = OrderOf(kind, shape);
  for (int t = 0; t < shape.tokens; ++t) {
    for (int h = 0; h < shape.kv_heads; ++h) {
      const std::byte* from = ranges.range[0] + (static_cast<size_t>(t) * order.token +
                                                 static_cast<size_t>(h) * order.head) *
                                                    sizeof(typename Format::Element);
      for (int c = 0; c < shape.head_dim; ++c) {
        typename Format::Element element;
        std::memcpy(&element, from + static_cast<size_t>(c) * order.channel * sizeof(element),
                    sizeof(element));
        *out++ = Format::Widen(element);
      }
    }
  }
}

template <typename Format>
Status CheckFinite(const Codec& codec, SegmentKind kind, const SegmentShape& shape,
                   const SegmentRanges& ranges, std::span<const size_t> sizes) {
  KV_RETURN_IF_ERROR(CheckRangeSizes(codec, kind, shape, ranges, sizes));
  const size_t count = Elements(shape);
  bool finite = true;
  for (size_t i = 0; i < count; ++i) {
    typename Format::Element element;
    std::memcpy(&element, ranges.range[0] + i * sizeof(element), sizeof(element));
    finite &= Format::Finite(element);
  }
  if (!finite) return DataLoss("checking {}: an element is not finite", codec.name);
  return OkStatus();
}

Status CheckBf16(SegmentKind kind, const SegmentShape& shape, const SegmentRanges& ranges,
                 std::span<const size_t> sizes) {
  return CheckFinite<Bf16>(kRawBf16Codec, kind, shape, ranges, sizes);
}
Status CheckFp16(SegmentKind kind, const SegmentShape& shape, const SegmentRanges& ranges,
                 std::span<const size_t> sizes) {
  return CheckFinite<Fp16>(kRawFp16Codec, kind, shape, ranges, sizes);
}
Status CheckFp32(SegmentKind kind, const SegmentShape& shape, const SegmentRanges& ranges,
                 std::span<const size_t> sizes) {
  return CheckFinite<Fp32>(kRawFp32Codec, kind, shape, ranges, sizes);
}

}  // namespace

const Codec kRawBf16Codec = {CodecId::kRawBf16, "raw",        1,         1,           {16},
                             RangeBytes<Bf16>,  Encode<Bf16>, CheckBf16, Decode<Bf16>};
const Codec kRawFp16Codec = {CodecId::kRawFp16, "raw-fp16",   1,         1,           {16},
                             RangeBytes<Fp16>,  Encode<Fp16>, CheckFp16, Decode<Fp16>};
const Codec kRawFp32Codec = {CodecId::kRawFp32, "raw-fp32",   1,         1,           {32},
                             RangeBytes<Fp32>,  Encode<Fp32>, CheckFp32, Decode<Fp32>};

}  // namespace kvant::kernels
