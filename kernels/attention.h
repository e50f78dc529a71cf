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
  SegmentShape shape;
  SegmentRanges keys;    // keys.cuts of them are read
  SegmentRanges values;  // values.cuts of them are read
};

// The running state of one query row of one head. Partials over disjoint sets of tokens merge.
//   max: largest score so far; sum: sum of exp(score - max); weighted: [head_dim] sum of
//   exp(score - max) * value.
struct PartialSoftmax {
  float* max = nullptr;
  float* sum = nullptr;
  float* weighted = nullptr;
};

// rows query rows, each with q_heads heads, attend the same tokens.
struct QueryBlock {
  int rows = 0;
  int q_heads = 0;            // multiple of kv_heads
  const float* q = nullptr;   // [rows][q_heads][head_dim], rope applied
  float scale = 1.0F;         // usually 1/sqrt(head_dim)
  float* max = nullptr;       // [rows][q_heads]
  float* sum = nullptr;       // [rows][q_heads]
  float* weighted = nullptr;  // [rows][q_heads][head_dim]
};

// Sets max = -inf, sum = 0, weighted = 0.
void InitPartials(const QueryBlock& block, int head_dim);
// Adds all tokens of the tile to every row's partials. The result for a row does not depend on the
// other rows.
void AttendTile(const QueryBlock& block, const LayerTile& tile);
// Adds raw fp32 tokens: keys, values [tokens][kv_heads][head_dim]. Row r attends tokens
// [0, visible[r]); visible == nullptr: all of them.
void AttendRaw(const QueryBlock& block, const float* keys, const float* values, int tokens,
               int kv_heads, int head_dim, const int* visible);
// Adds `from` to `into`: the softmax over the union of both token sets.
void MergePartials(const QueryBlock& from, const QueryBlock& into, int head_dim);
// out[rows][q_heads][head_dim] = weighted / sum.
void FinishPartials(const QueryBlock& block, int head_dim, float* out);

}  // namespace kvant::kernels
