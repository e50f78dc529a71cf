// The dense layers of a model.
#pragma once

#include <span>

#include "kernels/ordered_gemm.h"
#include "kernels/thread_pool.h"

namespace kvant::kernels {

// y[rows][outputs] = x[rows][inputs] * W^T. Borrowed.
struct LinearProduct {
  const OrderedWeights* weights = nullptr;
  const float* x = nullptr;
  float* y = nullptr;
};

// Computes all of them, which do not wait for each other. A row's bits depend on its x and the
// weights alone (ordered_gemm.h): not on `rows`, nor on `pool`, which may be nullptr.
void Linear(std::span<const LinearProduct> products, int rows, ThreadPool* pool);

}  // namespace kvant::kernels
