// Attention of queries over encoded tiles, with partial softmaxes that merge exactly: online
// softmax (Milakov and Gimelshein, 2018; FlashAttention, section 3.1). No decoded copy of a block
// is made.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/codec.h"

namespace kvant::kernels {

// One layer of one block, as the attention reads it.
struct LayerTile {
  const Codec* codec = nullptr;
  LayerShape shape;
  SegmentRanges keys;    // keys.cuts of them are read
  SegmentRanges values;  // values or latents; values.cuts of them are read
};

// fp32 tokens, not encoded. With latent shape the keys are rope keys, the values latents.
struct RawTokens {
  const float* keys = nullptr;    // [tokens][kv_heads][shape.keys.head_dim]
  const float* values = nullptr;  // [tokens][kv_heads][shape.values.head_dim]
  LayerShape shape;               // tokens: any number, the same in both
};

// Which tokens of a tile each query row attends: [begin[row], end[row]), counted from the tile's
// first token and cut to what there is. nullptr: from the first, to the last.
struct Visible {
  const int* begin = nullptr;  // [rows]
  const int* end = nullptr;    // [rows]
};

// The running state of one query row of one head. Partials over disjoint sets of tokens merge.
//   max: largest score so far; sum: sum of exp(score - max); weighted: [value_dim] sum of
//   exp(score - max) * value.
struct PartialSoftmax {
  float* max = nullptr;
  float* sum = nullptr;
  float* weighted = nullptr;
};

// rows query rows, each with q_heads heads, attend the same tokens. key_dim is the keys' head_dim,
// value_dim the values'. Latents are both: there key_dim = rope key's head_dim + rank, value_dim =
// rank, and a key's channels are those of the rope key, then those of the latent.
struct QueryBlock {
  int rows = 0;
  int q_heads = 0;            // multiple of kv_heads
  const float* q = nullptr;   // [rows][q_heads][key_dim], rope applied
  float scale = 1.0F;         // usually 1/sqrt(head_dim)
  float* max = nullptr;       // [rows][q_heads]
  float* sum = nullptr;       // [rows][q_heads]
  float* weighted = nullptr;  // [rows][q_heads][value_dim]
};

// Channels of a query vector over such tokens.
inline int KeyDim(const LayerShape& shape) {
  return shape.keys.head_dim + (shape.latent ? shape.values.head_dim : 0);
}

// Sets max = -inf, sum = 0, weighted = 0.
void InitPartials(const QueryBlock& block, int value_dim);
// Adds the visible tokens of the tile to every row's partials. The result for a row does not depend
// on the other rows, and is the same to the bit on every instruction set.
//
// Codes of tiles are multiplied with integers of 15 bits (quad_dot.h). With s = the largest
// |query * key scale| of a vector's channels and w = the largest weight times value scale of a
// tile's tokens, each channel's factor is off by at most s / 32512, each weight by w / 32512. Of
// queries and keys of normal numbers, results are off by less than kTileAttentionError of the
// largest one.
inline constexpr double kTileAttentionError = 0x1p-11;
// `next`: the tile that is attended after this one, brought nearer meanwhile; nullptr: not known.
void AttendTile(const QueryBlock& block, const LayerTile& tile, const Visible& visible = {},
                const LayerTile* next = nullptr);
// The same for raw tokens.
void AttendRaw(const QueryBlock& block, const RawTokens& tokens, const Visible& visible = {});
// Adds `from` to `into`: the softmax over the union of both token sets.
void MergePartials(const QueryBlock& from, const QueryBlock& into, int value_dim);
// out[rows][q_heads][value_dim] = weighted / sum.
void FinishPartials(const QueryBlock& block, int value_dim, float* out);

}  // namespace kvant::kernels
