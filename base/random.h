// Random numbers with a seed: the same seed gives the same numbers on every machine, which
// <random>'s distributions do not promise.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace kvant {

// xoshiro256** seeded through splitmix64 (Blackman and Vigna, 2018). Single-owner; copyable, a copy
// continues the same sequence. Not for secrets: those come from SecureRandomBytes.
class Random {
 public:
  explicit Random(uint64_t seed);

  uint64_t Next();
  // Uniform in [0, bound). REQUIRES: bound > 0.
  uint64_t Below(uint64_t bound);
  // Uniform in [0, 1), 53 bits.
  double Unit();
  // Uniform in [0, 1), 24 bits.
  float UnitFloat() { return static_cast<float>(Next() >> 40) * 0x1p-24F; }
  // Standard normal (Box-Muller).
  double Normal();
  // True with this probability.
  bool Chance(double probability) { return Unit() < probability; }
  // A generator of its own for a named purpose; does not advance this one.
  Random Fork(uint64_t purpose) const;

 private:
  uint64_t state_[4];
};

// Fills `out` with bytes of the operating system's generator; ends the process if it has none.
void SecureRandomBytes(std::span<std::byte> out);
uint64_t SecureRandomUint64();

}  // namespace kvant
