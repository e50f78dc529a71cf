// Codecs: a layer's keys or values of one block to bytes and back.
//
// A segment is one layer's keys or one layer's values of one block: x[tokens][kv_heads][head_dim].
// A codec writes a segment as one byte range per cut: range 0 is the base, range c refines cut c-1
// to c. Reading the ranges 0..c gives the segment at cut c. Sizes are a function of the geometry.
// The bytes are specified in docs/block-format.md and are the same on every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "base/status.h"

namespace kvant::kernels {

inline constexpr int kMaxCuts = 4;
inline constexpr int kMaxBlockTokens = 64;
inline constexpr int kMaxHeadDim = 1024;
inline constexpr int kMaxKvHeads = 1024;

// kLatent: what multi-head latent attention keeps in place of keys and values (DeepSeek-V2, section
// 2.1); one head of head_dim = latent rank, coded like values.
enum class SegmentKind : uint8_t { kKey = 0, kValue = 1, kLatent = 2 };

enum class CodecId : uint8_t { kRawBf16 = 1, kTile8 = 2, kTile4 = 3, kRawFp16 = 4, kRawFp32 = 5 };

struct SegmentShape {
  int tokens = 0;    // 1..kMaxBlockTokens
  int kv_heads = 0;  // 1..kMaxKvHeads
  int head_dim = 0;  // multiple of 8, <= kMaxHeadDim
  friend bool operator==(const SegmentShape&, const SegmentShape&) = default;
};
// A geometry from outside is asked here before anything is computed with it.
bool ShapeIsValid(const SegmentShape& shape);

// The two segments that a layer keeps of a block: keys and values, or rope keys and latents.
struct LayerShape {
  SegmentShape keys;
  SegmentShape values;
  bool latent = false;  // `values` are latents, which are keys as well

  SegmentKind value_kind() const { return latent ? SegmentKind::kLatent : SegmentKind::kValue; }
  const SegmentShape& Of(SegmentKind kind) const {
    return kind == SegmentKind::kKey ? keys : values;
  }
  friend bool operator==(const LayerShape&, const LayerShape&) = default;
};
// Keys and values of one shape.
inline LayerShape KeysAndValues(const SegmentShape& shape) { return {shape, shape, false}; }

// The ranges of one segment, from the base on; `cuts` of them are present.
struct SegmentRanges {
  const std::byte* range[kMaxCuts] = {};
  int cuts = 0;
};
struct MutableSegmentRanges {
  std::byte* range[kMaxCuts] = {};
};

// One row of the constant table of codecs. Thread-safe: all functions are pure.
struct Codec {
  CodecId id;
  std::string_view name;  // "raw", "tile8", "tile4"
  int key_cuts;           // ranges a key segment has
  int value_cuts;
  int bits_per_cut[kMaxCuts];  // bits per element that each cut adds, scales not counted

  // Cuts of this kind of segment.
  int cuts(SegmentKind kind) const { return kind == SegmentKind::kKey ? key_cuts : value_cuts; }

  // All functions REQUIRE a shape that ShapeIsValid.
  // Bytes of range `cut` of a segment.
  size_t (*range_bytes)(SegmentKind, const SegmentShape&, int cut);
  // Writes all ranges. x: [tokens][kv_heads][head_dim], finite; magnitudes that a format can't hold
  // are clamped to its largest. max_error: nullptr, or [cuts], which takes a bound on the absolute
  // reconstruction error at each cut, at most one unit in the last place above the largest error.
  void (*encode)(SegmentKind, const SegmentShape&, const float* x, const MutableSegmentRanges& out,
                 float* max_error);
  // The only entry for bytes that nobody vouches for: kDataLoss when they are not well-formed (a
  // scale that is not finite). Integers can't be malformed. sizes[cut]: bytes present.
  Status (*check)(SegmentKind, const SegmentShape&, const SegmentRanges&,
                  std::span<const size_t> sizes);
  // REQUIRES: check() passed. out: [tokens][kv_heads][head_dim].
  void (*decode)(SegmentKind, const SegmentShape&, const SegmentRanges&, float* out);
};

// All codecs, in a fixed order.
std::span<const Codec* const> Codecs();
// nullptr when unknown.
const Codec* FindCodec(CodecId id);
// kInvalidArgument lists the names there are.
Result<const Codec*> FindCodec(std::string_view name);

}  // namespace kvant::kernels
