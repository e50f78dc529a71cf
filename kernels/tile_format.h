// Sizes and places in a tile segment; docs/block-format.md, "Tiles", says the same in words.
#pragma once

#include <cstddef>

#include "kernels/codec.h"

namespace kvant::kernels {

// A code has 2 * plane_bits bits; its upper half is in the base plane, its lower half in the
// refinement plane.
struct TileFormat {
  int plane_bits;  // 4 (tile8) or 2 (tile4)
  bool key_zero;   // keys carry a zero point for each channel
};
inline constexpr TileFormat kTile8Format = {4, false};
inline constexpr TileFormat kTile4Format = {2, true};

inline constexpr int kTileCuts = 2;
inline constexpr int kQuad = 4;  // codes that are multiplied and added as one, side by side
inline constexpr int kKeyTokenStep = 16;           // a quad's codes fill whole steps of tokens
inline constexpr int kValueGroup = 64;             // channels that share a value scale
inline constexpr size_t kScaleBytes = 2;           // bf16
inline constexpr float kTileLargest = 0x1p120F;    // magnitudes are clamped to it
inline constexpr float kTileSmallest = 0x1p-126F;  // the smallest scale but 0

// Bytes of one plane over `codes` codes. REQUIRES: codes a multiple of 8.
constexpr size_t PlaneBytes(const TileFormat& format, int codes) {
  return static_cast<size_t>(codes) * static_cast<size_t>(format.plane_bits) / 8;
}
constexpr int PaddedTokens(int tokens) {
  return (tokens + kKeyTokenStep - 1) / kKeyTokenStep * kKeyTokenStep;
}
constexpr int TokenQuads(int tokens) { return (tokens + kQuad - 1) / kQuad; }
// Codes of a row of a plane, and rows: a quad of channels with all tokens, or a quad of tokens with
// all channels.
constexpr int RowCodes(SegmentKind kind, const SegmentShape& shape) {
  return kQuad * (kind == SegmentKind::kKey ? PaddedTokens(shape.tokens) : shape.head_dim);
}
constexpr int CodeRows(SegmentKind kind, const SegmentShape& shape) {
  return kind == SegmentKind::kKey ? shape.head_dim / kQuad : TokenQuads(shape.tokens);
}
constexpr int ValueGroups(int head_dim) { return (head_dim + kValueGroup - 1) / kValueGroup; }

// Bytes in front of a head's base codes.
constexpr size_t ScaleBytes(const TileFormat& format, SegmentKind kind, const SegmentShape& shape) {
  if (kind == SegmentKind::kKey) {
    return static_cast<size_t>(shape.head_dim) * kScaleBytes * (format.key_zero ? 2 : 1);
  }
  return static_cast<size_t>(shape.tokens) * static_cast<size_t>(ValueGroups(shape.head_dim)) *
         kScaleBytes;
}
// Bytes of a head's codes in one plane.
constexpr size_t CodeBytes(const TileFormat& format, SegmentKind kind, const SegmentShape& shape) {
  return static_cast<size_t>(CodeRows(kind, shape)) * PlaneBytes(format, RowCodes(kind, shape));
}
// Bytes of one head in range `cut`.
constexpr size_t HeadBytes(const TileFormat& format, SegmentKind kind, const SegmentShape& shape,
                           int cut) {
  return CodeBytes(format, kind, shape) + (cut == 0 ? ScaleBytes(format, kind, shape) : 0);
}

// What is added to a code whose lower `missing` bits are absent (and zero) to give the middle of
// its interval, in units of the scale: code bits b in all, (2^missing - 2^b) / 2.
constexpr float CodeBias(const TileFormat& format, int cuts) {
  const int missing = cuts == kTileCuts ? 0 : format.plane_bits;
  return 0.5F * static_cast<float>((1 << missing) - (1 << (2 * format.plane_bits)));
}

}  // namespace kvant::kernels
