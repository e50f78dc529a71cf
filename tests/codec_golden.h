// The golden files of the segment formats, as tests/golden/codec/*.bin hold them. Little-endian:
//
//   "KVGOLD01"  8 bytes
//   u8 codec id, u8 kind (0 keys, 1 values), u8 ranges, u8 good (1) or bad (0)
//   u16 tokens, u16 kv_heads, u16 head_dim, u16 zero
//   u32 bytes of each range
//   the ranges
//   good files: f32 x[tokens][kv_heads][head_dim], what was encoded;
//               for each cut: f32 declared error, f32 decoded[tokens][kv_heads][head_dim]
//
// A bad file holds ranges that check() must refuse. tests/format_decoder.py reads the same files.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "kernels/codec.h"
#include "tests/kernel_fixtures.h"

namespace kvant::kernels {

inline constexpr std::string_view kGoldenMagic = "KVGOLD01";

struct GoldenFile {
  CodecId codec = CodecId::kRawBf16;
  SegmentKind kind = SegmentKind::kKey;
  bool good = true;
  SegmentShape shape;
  EncodedSegment segment;  // bytes, cuts; max_error in good files
  std::vector<float> x;
  std::vector<std::vector<float>> decoded;  // [cuts]
};

template <typename T>
void Append(T value, std::string* out) {
  std::byte bytes[sizeof(T)];
  StoreLittle(bytes, value);
  out->append(AsText(bytes));
}
inline void AppendFloats(std::span<const float> values, std::string* out) {
  out->append(AsText(std::as_bytes(values)));
}

inline std::string Serialize(const GoldenFile& file) {
  std::string out(kGoldenMagic);
  Append(static_cast<uint8_t>(file.codec), &out);
  Append(static_cast<uint8_t>(file.kind), &out);
  Append(static_cast<uint8_t>(file.segment.cuts), &out);
  Append(static_cast<uint8_t>(file.good), &out);
  for (const int field : {file.shape.tokens, file.shape.kv_heads, file.shape.head_dim, 0}) {
    Append(static_cast<uint16_t>(field), &out);
  }
  for (const size_t size : file.segment.Sizes(file.segment.cuts)) {
    Append(static_cast<uint32_t>(size), &out);
  }
  for (int cut = 0; cut < file.segment.cuts; ++cut) {
    out.append(AsText(file.segment.bytes[static_cast<size_t>(cut)]));
  }
  if (!file.good) return out;
  AppendFloats(file.x, &out);
  for (size_t cut = 0; cut < file.decoded.size(); ++cut) {
    AppendFloats({&file.segment.max_error[cut], 1}, &out);
    AppendFloats(file.decoded[cut], &out);
  }
  return out;
}

// Takes `count` bytes off the front of `in`; the test that reads the file fails when they lack.
inline std::string_view Take(size_t count, std::string_view* in) {
  KV_CHECK(RangeFits(0, count, in->size()));
  const std::string_view taken = in->substr(0, count);
  in->remove_prefix(count);
  return taken;
}
template <typename T>
T TakeInteger(std::string_view* in) {
  return LoadLittle<T>(AsBytes(Take(sizeof(T), in)).data());
}
inline std::vector<float> TakeFloats(size_t count, std::string_view* in) {
  std::vector<float> values(count);
  std::memcpy(values.data(), Take(count * sizeof(float), in).data(), count * sizeof(float));
  return values;
}

inline GoldenFile ParseGolden(std::string_view in) {
  KV_CHECK(Take(kGoldenMagic.size(), &in) == kGoldenMagic);
  GoldenFile file;
  file.codec = static_cast<CodecId>(TakeInteger<uint8_t>(&in));
  file.kind = static_cast<SegmentKind>(TakeInteger<uint8_t>(&in));
  file.segment.cuts = TakeInteger<uint8_t>(&in);
  KV_CHECK(file.segment.cuts <= kMaxCuts);
  file.good = TakeInteger<uint8_t>(&in) != 0;
  file.shape.tokens = TakeInteger<uint16_t>(&in);
  file.shape.kv_heads = TakeInteger<uint16_t>(&in);
  file.shape.head_dim = TakeInteger<uint16_t>(&in);
  KV_CHECK(TakeInteger<uint16_t>(&in) == 0);
  std::vector<uint32_t> sizes;
  for (int cut = 0; cut < file.segment.cuts; ++cut) sizes.push_back(TakeInteger<uint32_t>(&in));
  for (size_t cut = 0; cut < sizes.size(); ++cut) {
    const std::span<const std::byte> bytes = AsBytes(Take(sizes[cut], &in));
    file.segment.bytes[cut].assign(bytes.begin(), bytes.end());
  }
  if (file.good) {
    file.x = TakeFloats(Elements(file.shape), &in);
    for (size_t cut = 0; cut < sizes.size(); ++cut) {
      file.segment.max_error[cut] = TakeFloats(1, &in)[0];
      file.decoded.push_back(TakeFloats(Elements(file.shape), &in));
    }
  }
  KV_CHECK(in.empty());
  return file;
}

}  // namespace kvant::kernels
