// Functions of C's library whose last bits depend on library and CPU, of sums, products and
// quotients alone: all machines give the same bits. For tables; not fast.
#pragma once

namespace kvant::kernels {

// The natural logarithm of a normal number above 0. Errs by less than 2^-51 of it, or of 1.
double PortableLog(double x);
// e to the x. Errs by less than 2^-51 of it. REQUIRES: |x| <= 700.
double PortableExp(double x);
struct SineCosine {
  double sine;
  double cosine;
};
// Of an angle in radians, each within 2^-51 of its own up to |x| = 2^20; the same bits everywhere
// beyond, too. REQUIRES: |x| < 2^50.
SineCosine PortableSineCosine(double x);

}  // namespace kvant::kernels
