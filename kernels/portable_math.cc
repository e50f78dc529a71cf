#include "kernels/portable_math.h"

#include <cmath>
#include <cstdint>
#include <numbers>

#include "base/check.h"

namespace kvant::kernels {
namespace {

// Whole numbers of at most 20 bits times these are exact.
constexpr double kLn2High = 0x1.62e42fee00000p-1;
constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
constexpr double kHalfPiHigh = 0x1.921fb54400000p+0;
constexpr double kHalfPiMiddle = 0x1.0b4611a600000p-34;
constexpr double kHalfPiLow = 0x1.3198a2e037073p-69;

}  // namespace

double PortableLog(double x) {
  KV_CHECK(std::isnormal(x) && x > 0);
  int exponent = 0;
  double mantissa = std::frexp(x, &exponent);
  if (mantissa < std::numbers::sqrt2 / 2) {
    mantissa *= 2;
    --exponent;
  }
  // log((1 + s) / (1 - s)) = 2 (s + s^3 / 3 + s^5 / 5 + ...), and |s| < 0.172.
  const double s = (mantissa - 1) / (mantissa + 1);
  double sum = 0;
  for (int n = 21; n >= 3; n -= 2) sum = (sum + 1.0 / n) * (s * s);
  return exponent * kLn2High + (2 * s + (2 * s * sum + exponent * kLn2Low));
}

double PortableExp(double x) {
  KV_CHECK(std::fabs(x) <= 700);
  const double k = std::floor(x / std::numbers::ln2 + 0.5);
  const double r = (x - k * kLn2High) - k * kLn2Low;
  double sum = 1;
  for (int n = 15; n >= 1; --n) sum = 1 + sum * r / n;
  return std::ldexp(sum, static_cast<int>(k));
}

SineCosine PortableSineCosine(double x) {
  KV_CHECK(std::fabs(x) < 0x1p50);
  const double k = std::floor(x / (std::numbers::pi / 2) + 0.5);
  const double r = ((x - k * kHalfPiHigh) - k * kHalfPiMiddle) - k * kHalfPiLow;
  const double square = r * r;
  // Of r up to 0.79: what is left out is below 2^-60.
  double sine = 0;
  for (int n = 18; n >= 2; n -= 2) sine = (1 + sine) * -square / (n * (n + 1));
  sine = r + r * sine;
  double cosine = 0;
  for (int n = 19; n >= 1; n -= 2) cosine = (1 + cosine) * -square / (n * (n + 1));
  cosine = 1 + cosine;
  switch (static_cast<int64_t>(k) & 3) {
    case 0:
      return {sine, cosine};
    case 1:
      return {cosine, -sine};
    case 2:
      return {-sine, -cosine};
    default:
      return {-cosine, sine};
  }
}

}  // namespace kvant::kernels
