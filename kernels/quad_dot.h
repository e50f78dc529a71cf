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

// out[v][i] = sum over q and j of codes[q][4 i + j] * factors[v][4 q + j]. The same bits on every
// instruction set, whatever vectors are beside one.
struct QuadDot {
  const uint8_t* codes = nullptr;  // [quads][code_stride], of which 4 * width are read
  size_t code_stride = 0;
  int quads = 0;                     // >= 1
  int width = 0;                     // a multiple of 8
  const int16_t* factors = nullptr;  // [vectors][factor_stride], 4 * quads of them; |f| <= kLargest
  size_t factor_stride = 0;
  int vectors = 0;
  float* out = nullptr;  // [vectors][out_stride]; up to the next multiple of 16 may be written
  size_t out_stride = 0;
};

}  // namespace kvant::kernels
