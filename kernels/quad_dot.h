// Products of a tile's codes with integer factors: quads of four codes that stand side by side are
// multiplied with four factors and summed up. With keys a quad is four channels of a token and the
// factors are a query's; with values it is four tokens of a channel and the factors are weights.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvant::kernels {

// The largest magnitude of a factor: two signed parts of 7 bits, 128 high + low.
inline constexpr int kLargestFactor = 127 * 128;
// Quads whose sum is exact in 32 bits, 4 * 128 * 255 * 16256 < 2^31, and is rounded to fp32 at
// once; sums of so many are added in ascending order.
inline constexpr int kQuadChunk = 128;

// Outputs whose codes stand side by side wherever they do.
inline constexpr int kQuadBlock = 32;

// out[v][i] = sum over q and j of codes[q][4 i + j] * factors[v][4 q + j]. The same bits on every
// instruction set, whatever vectors are beside one.
struct QuadDot {
  // Of each block of outputs: [quads][code_stride], of which four for each output are read.
  const uint8_t* codes = nullptr;
  size_t code_stride = 0;
  size_t block_stride = size_t{4} * kQuadBlock;  // between blocks; this: all of them side by side
  int quads = 0;                                 // >= 1
  int width = 0;                                 // a multiple of 8
  const int16_t* factors = nullptr;  // [vectors][factor_stride], 4 * quads of them; |f| <= kLargest
  size_t factor_stride = 0;
  int vectors = 0;
  float* out = nullptr;  // [vectors][out_stride]; up to the next multiple of 16 may be written
  size_t out_stride = 0;
};

}  // namespace kvant::kernels
