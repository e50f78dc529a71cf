// Linear algebra of calibration: small symmetric problems in double, and products in fp32.
// REQUIRES of all: LoadBlas() (blas.h) was ok.
#pragma once

#include <cstddef>
#include <vector>

#include "base/status.h"

namespace kvant::kernels {

// Row-major. Value.
struct Matrix {
  Matrix() = default;
  Matrix(int of_rows, int of_columns)
      : rows(of_rows),
        columns(of_columns),
        values(static_cast<size_t>(of_rows) * static_cast<size_t>(of_columns)) {}
  double* Row(int row) { return values.data() + static_cast<size_t>(row) * Width(); }
  const double* Row(int row) const { return values.data() + static_cast<size_t>(row) * Width(); }
  double& At(int row, int column) { return Row(row)[column]; }
  double At(int row, int column) const { return Row(row)[column]; }
  size_t Width() const { return static_cast<size_t>(columns); }

  int rows = 0;
  int columns = 0;
  std::vector<double> values;
};

// Eigenvalues ascending; row i of `vectors` is the unit eigenvector of values[i].
struct Eigen {
  std::vector<double> values;
  Matrix vectors;
};
// LAPACK's dsyevd. kUnsupported: OpenBLAS comes without it. kInvalidArgument: it did not converge,
// as with numbers that are not finite. REQUIRES: a is square and symmetric.
Result<Eigen> SymmetricEigen(Matrix a);
// The same in fp32, for large ones, in place: a[n][n] takes the eigenvectors (ssyevd).
Status SymmetricEigen(int n, float* a, std::vector<float>* values);

// The rows x of the result solve a x = b for the rows b of `b`; LAPACK's dposv. kUnsupported as
// above; kInvalidArgument: a is not positive definite. REQUIRES: a is symmetric.
Result<Matrix> SolvePositive(Matrix a, Matrix b);

// a * b, and a * b with b transposed.
Matrix Product(const Matrix& a, const Matrix& b);
Matrix ProductTransposed(const Matrix& a, const Matrix& b);

// out[rows][n] = x[rows][k] * weights[n][k]^T, plus what out holds if `add`.
void Multiply(const float* x, int rows, int k, const float* weights, int n, bool add, float* out);
// Adds x^T y of x[rows][n], y[rows][m] to out[n][m].
void AddProducts(const float* x, const float* y, int rows, int n, int m, Matrix* out);

}  // namespace kvant::kernels
