// What is taken from OpenBLAS, for calibration and baselines (dense_algebra.h) and to be measured
// against: one product and a little of LAPACK.
#pragma once

#include <string>

#include "base/status.h"

namespace kvant::kernels {

// OpenBLAS is looked up at run time, after its core type was chosen: SkylakeX where the CPU has
// AVX-512 and the environment does not set OPENBLAS_CORETYPE. It always runs with one thread; the
// pool splits the work. Call once from main() before any product; later calls return the first
// result. kUnsupported: the library was not found (names the package to install).
Status LoadBlas();
// What OpenBLAS reports, e.g. "SkylakeX". REQUIRES: LoadBlas() was ok.
std::string BlasCoreType();

// cblas_sgemm; enums are ints in its C interface.
inline constexpr int kBlasRowMajor = 101;
inline constexpr int kBlasNoTranspose = 111;
inline constexpr int kBlasTranspose = 112;
using SgemmFunction = void(int order, int transpose_a, int transpose_b, int m, int n, int k,
                           float alpha, const float* a, int lda, const float* b, int ldb,
                           float beta, float* c, int ldc);

// REQUIRES: LoadBlas() was ok.
SgemmFunction* LoadedSgemm();

// LAPACK's eigenvectors of symmetric matrices, and solution of positive definite systems, in
// Fortran's interface.
template <typename Real>
using SyevdFunction = void(const char* job, const char* part, const int* n, Real* a, const int* lda,
                           Real* values, Real* work, const int* work_size, int* int_work,
                           const int* int_work_size, int* info);
using DposvFunction = void(const char* part, const int* n, const int* columns, double* a,
                           const int* lda, double* b, const int* ldb, int* info);
struct LapackFunctions {
  SyevdFunction<float>* ssyevd = nullptr;
  SyevdFunction<double>* dsyevd = nullptr;
  DposvFunction* dposv = nullptr;
};
// REQUIRES: LoadBlas() was ok. All are nullptr where OpenBLAS was built without LAPACK, which only
// calibration needs.
LapackFunctions LoadedLapack();

}  // namespace kvant::kernels
