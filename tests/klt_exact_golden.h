// The golden files of exact extents (docs/klt.md, "Exact"), in tests/golden/klt: NAME.exact is one
// extent and what it is coded given. Little-endian:
//
//   "KVEXA001"  8 bytes
//   u8 good (1) or bad (0), u8 segments
//   of each segment: u8 kind, as in the block format, u8 zero, u16 tokens, u16 heads, u16 head_dim,
//                    f32 decoded[tokens][heads][head_dim]
//   u32 bytes of the extent, the extent
//   good files: of each segment, u16 raw[tokens * heads * head_dim], in the order of `raw`
//
// A bad file holds what a reader must refuse. tests/klt_decoder.py reads the same.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "node/klt_exact.h"
#include "tests/codec_golden.h"

namespace kvant::node {

inline constexpr std::string_view kExactMagic = "KVEXA001";

struct ExactGolden {
  bool good = true;
  std::vector<ExactSegment> segments;       // `decoded` is not set
  std::vector<std::vector<float>> decoded;  // [segment]
  std::vector<std::vector<uint16_t>> raw;   // [segment]
  std::vector<std::byte> extent;

  void Add(kernels::SegmentKind kind, const kernels::SegmentShape& shape) {
    const auto elements = static_cast<size_t>(shape.tokens * shape.kv_heads * shape.head_dim);
    segments.push_back({kind, shape, nullptr});
    decoded.emplace_back(elements);
    raw.emplace_back(elements);
  }
  // Where token, channel of all heads stands in raw.
  size_t At(size_t segment, size_t token, size_t channel) const {
    const auto& [kind, shape, unused] = segments[segment];
    const auto tokens = static_cast<size_t>(shape.tokens);
    const auto head_dim = static_cast<size_t>(shape.head_dim);
    if (kind == kernels::SegmentKind::kKey) return channel * tokens + token;
    return (channel / head_dim * tokens + token) * head_dim + channel % head_dim;
  }
  std::vector<ExactSegment> Segments() const {
    std::vector<ExactSegment> made = segments;
    for (size_t i = 0; i < made.size(); ++i) made[i].decoded = decoded[i].data();
    return made;
  }
  std::vector<const uint16_t*> Raw() const {
    std::vector<const uint16_t*> pointers;
    for (const auto& of : raw) pointers.push_back(of.data());
    return pointers;
  }
};

inline std::string Serialize(const ExactGolden& file) {
  using kernels::Append;
  std::string out(kExactMagic);
  Append(static_cast<uint8_t>(file.good), &out);
  Append(static_cast<uint8_t>(file.segments.size()), &out);
  for (size_t s = 0; s < file.segments.size(); ++s) {
    const auto& [kind, shape, unused] = file.segments[s];
    Append(static_cast<uint8_t>(kind), &out);
    Append(uint8_t{0}, &out);
    for (const int field : {shape.tokens, shape.kv_heads, shape.head_dim})
      Append(static_cast<uint16_t>(field), &out);
    kernels::AppendFloats(file.decoded[s], &out);
  }
  Append(static_cast<uint32_t>(file.extent.size()), &out);
  out.append(AsText(file.extent));
  if (!file.good) return out;
  for (const auto& of : file.raw) out.append(AsText(std::as_bytes(std::span(of))));
  return out;
}

inline ExactGolden ParseExactGolden(std::string_view in) {
  using kernels::Take;
  using kernels::TakeInteger;
  KV_CHECK(Take(kExactMagic.size(), &in) == kExactMagic);
  ExactGolden file;
  file.good = TakeInteger<uint8_t>(&in) != 0;
  for (size_t left = TakeInteger<uint8_t>(&in); left > 0; --left) {
    const auto kind = static_cast<kernels::SegmentKind>(TakeInteger<uint8_t>(&in));
    Take(1, &in);
    kernels::SegmentShape shape;
    shape.tokens = TakeInteger<uint16_t>(&in);
    shape.kv_heads = TakeInteger<uint16_t>(&in);
    shape.head_dim = TakeInteger<uint16_t>(&in);
    file.Add(kind, shape);
    file.decoded.back() = kernels::TakeFloats(file.decoded.back().size(), &in);
  }
  const std::string_view extent = Take(TakeInteger<uint32_t>(&in), &in);
  file.extent.assign(AsBytes(extent).begin(), AsBytes(extent).end());
  if (file.good) {
    for (auto& of : file.raw) {
      const std::string_view bytes = Take(of.size() * sizeof(uint16_t), &in);
      std::memcpy(of.data(), bytes.data(), bytes.size());
    }
  }
  KV_CHECK(in.empty());
  return file;
}

}  // namespace kvant::node
