// The one product that is taken from OpenBLAS.
#pragma once

namespace kvant::kernels {

// cblas_sgemm; enums are ints in its C interface.
inline constexpr int kBlasRowMajor = 101;
inline constexpr int kBlasNoTranspose = 111;
inline constexpr int kBlasTranspose = 112;
using SgemmFunction = void(int order, int transpose_a, int transpose_b, int m, int n, int k,
                           float alpha, const float* a, int lda, const float* b, int ldb,
                           float beta, float* c, int ldc);

// REQUIRES: LoadBlas() (linear.h) was ok.
SgemmFunction* LoadedSgemm();

}  // namespace kvant::kernels
