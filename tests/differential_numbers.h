// What every case of kernel_differential.h is made of: numbers taken out of bytes, and the
// comparison of what implementations make of them, with each other and with double precision.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/random.h"
#include "kernels/implementation.h"
#include "tests/fuzz/fuzz_input.h"

namespace kvant::kernels::differential {

using fuzz::FuzzInput;

inline int Pick(FuzzInput* input, int count) { return input->Take<uint8_t>() % count; }

// Numbers to compute with.
struct Numbers {
  std::vector<float> x;
  bool ordinary = true;  // normal ones, of about 1: the errors that are stated for those hold
};

// Of all magnitudes, down to subnormal ones, or up to 2^largest_exponent; some are taken from the
// input as they are, but for what is not finite.
inline Numbers TakeNumbers(FuzzInput* input, size_t count, int largest_exponent = 127) {
  const int style = Pick(input, 5);
  const int exponent = input->Take<int8_t>();
  const int patches = Pick(input, 9);
  Random random(input->Take<uint16_t>());
  Numbers numbers;
  numbers.ordinary = style == 0 && patches == 0;
  const float limit = std::ldexp(1.0F, largest_exponent);
  const auto add = [&](double value) {
    numbers.x.push_back(std::clamp(static_cast<float>(value), -limit, limit));
  };
  for (size_t i = 0; i < count; ++i) {
    switch (style) {
      case 0:
        add(random.Normal());
        break;
      case 1:  // one magnitude
        add(std::ldexp(random.Normal(), exponent));
        break;
      case 2:  // all of them
        add(std::ldexp(random.Normal(), static_cast<int>(random.Below(255)) - 149));
        break;
      case 3:  // mostly zeros of both signs
        add(random.Chance(0.1) ? std::ldexp(random.Normal(), exponent)
                               : (random.Chance(0.5) ? 0.0 : -0.0));
        break;
      default:  // all the same
        add(std::ldexp(1.0 + exponent / 256.0, exponent / 2));
    }
  }
  for (int i = 0; i < patches; ++i) {
    const size_t at = input->Take<uint16_t>() % count;
    const auto value = input->Take<float>();
    if (std::isfinite(value)) numbers.x[at] = std::clamp(value, -limit, limit);
  }
  return numbers;
}

// What differs, in words; empty: nothing does.
using Difference = std::string;

// == but of floats, where a zero's sign counts and one NaN is like another.
inline Difference Compare(std::string_view what, const Implementation& implementation,
                          std::span<const float> found, std::span<const float> expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::memcmp(&found[i], &expected[i], sizeof(float)) == 0) continue;
    if (std::isnan(found[i]) && std::isnan(expected[i])) continue;
    return fmt::format("{} of {}: {} at {}, the reference has {}", what, implementation.name,
                       found[i], i, expected[i]);
  }
  return {};
}

// compute(implementation) gives what it found; the reference's is left in *reference.
template <typename Compute>
Difference CompareAll(std::string_view what, const Compute& compute,
                      std::vector<float>* reference) {
  *reference = compute(*Implementations().back());
  for (const Implementation* implementation : Implementations()) {
    if (!implementation->runs_here()) continue;
    const std::vector<float> found = compute(*implementation);
    if (Difference difference = Compare(what, *implementation, found, *reference);
        !difference.empty())
      return difference;
  }
  return {};
}

// error: of each element, how far from `expected` it may be; not finite: any distance.
template <typename Error>
Difference CompareWithOracle(std::string_view what, std::span<const float> found,
                             std::span<const double> expected, const Error& error) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const double most = error(i);
    const double off = std::fabs(static_cast<double>(found[i]) - expected[i]);
    if (std::isfinite(most) && !(off <= most)) {
      return fmt::format("{}: {} at {}, in double precision {}: off by {}, {} allowed", what,
                         found[i], i, expected[i], off, most);
    }
  }
  return {};
}

}  // namespace kvant::kernels::differential
