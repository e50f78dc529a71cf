// Ordered products for tests, and the sum of each output as it is defined.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstring>
#include <vector>

#include "base/random.h"
#include "kernels/float_formats.h"
#include "kernels/implementation.h"
#include "kernels/ordered_gemm.h"

namespace kvant::kernels {

struct OrderedCase {
  int rows = 0;
  int inputs = 0;
  int outputs = 0;
  std::vector<float> x;        // [rows][inputs]
  std::vector<float> weights;  // [outputs][inputs]
  std::vector<float> bias;     // [outputs]
  std::vector<float> held;     // [rows][outputs]

  float X(int r, int k) const { return x[static_cast<size_t>(r * inputs + k)]; }
  float Weight(int n, int k) const { return weights[static_cast<size_t>(n * inputs + k)]; }
};

// Normal numbers times 2^exponent, with zeros of both signs among them.
inline std::vector<float> MakeNormals(int count, int exponent, Random* random) {
  std::vector<float> all(static_cast<size_t>(count));
  for (float& value : all) {
    value = std::ldexp(static_cast<float>(random->Normal()), exponent);
    if (random->Chance(0.03)) value = random->Chance(0.5) ? 0.0F : -0.0F;
  }
  return all;
}

// x and what outputs begin at are about 2^exponent.
inline OrderedCase MakeOrderedCase(int rows, int inputs, int outputs, bool bf16, int exponent,
                                   Random* random) {
  OrderedCase made{rows, inputs, outputs, {}, {}, {}, {}};
  made.x = MakeNormals(rows * inputs, exponent, random);
  made.weights = MakeNormals(outputs * inputs, 0, random);
  if (bf16) {
    for (float& weight : made.weights) weight = FromBf16(ToBf16(weight));
  } else {
    made.weights[0] = 0x1.000002p0F;  // no bf16 number
  }
  made.bias = MakeNormals(outputs, exponent, random);
  made.held = MakeNormals(rows * outputs, exponent, random);
  return made;
}

enum class OrderedStart { kZero, kBias, kHeld };

inline float StartOf(const OrderedCase& of, OrderedStart start, int r, int n) {
  if (start == OrderedStart::kZero) return 0.0F;
  return start == OrderedStart::kBias ? of.bias[static_cast<size_t>(n)]
                                      : of.held[static_cast<size_t>(r * of.outputs + n)];
}

inline std::vector<float> DefinedProduct(const OrderedCase& of, OrderedStart start) {
  std::vector<float> out;
  for (int r = 0; r < of.rows; ++r) {
    for (int n = 0; n < of.outputs; ++n) {
      float sum = StartOf(of, start, r, n);
      for (int k = 0; k < of.inputs; ++k) sum = std::fma(of.X(r, k), of.Weight(n, k), sum);
      out.push_back(sum);
    }
  }
  return out;
}

// The product of the rows [first, first + rows).
inline std::vector<float> OrderedRowsBy(const Implementation& kernels,
                                        const OrderedWeights& weights, const OrderedCase& of,
                                        OrderedStart start, int first, int rows) {
  const auto width = static_cast<size_t>(of.outputs);
  const auto at = of.held.begin() + static_cast<ptrdiff_t>(first) * of.outputs;
  std::vector<float> out(at, at + static_cast<ptrdiff_t>(rows) * of.outputs);
  const float* x = of.x.data() + static_cast<ptrdiff_t>(first) * of.inputs;
  OrderedProduct product{.weights = weights,
                         .x = x,
                         .rows = rows,
                         .inputs = weights.inputs(),
                         .end_output = weights.outputs(),
                         .out = out.data()};
  if (start == OrderedStart::kBias) product.start = of.bias.data();
  if (start == OrderedStart::kHeld) {
    product.start = out.data();
    product.start_stride = width;
  }
  kernels.ordered_multiply(product);
  return out;
}

// == of floats takes 0 for -0.
inline bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace kvant::kernels
