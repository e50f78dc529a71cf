// bf16 and fp16 to fp32 and back, one number at a time: integer arithmetic only, so that every
// machine gives the same bits.
#pragma once

#include <bit>
#include <cstdint>

namespace kvant::kernels {

// Rounds to nearest, ties to even; NaN stays a (quiet) NaN, what is too large becomes infinity.
inline uint16_t ToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40U;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFU) > 0x7F800000U ? nan : rounded);
}

inline float FromBf16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Rounds to nearest, ties to even; NaN stays a (quiet) NaN, what is too large becomes infinity.
inline uint16_t ToFp16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
  const uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) {
    return static_cast<uint16_t>(sign | 0x7E00U | ((magnitude >> 13) & 0x3FFU));
  }
  // 65520 is the midpoint between the largest fp16 and the next power of two.
  if (magnitude >= 0x477FF000U) return static_cast<uint16_t>(sign | 0x7C00U);
  if (magnitude >= 0x38800000U) {  // normal in fp16: from 2^-14 on
    const uint32_t rebased = magnitude - (112U << 23);
    return static_cast<uint16_t>(sign | ((rebased + 0xFFFU + ((rebased >> 13) & 1U)) >> 13));
  }
  if (magnitude < 0x33000000U) return sign;  // below half of the smallest subnormal, 2^-25
  const uint32_t exponent = magnitude >> 23;
  const uint32_t mantissa = (magnitude & 0x7FFFFFU) | 0x800000U;
  const uint32_t shift = 126U - exponent;  // 14..24: units of 2^-24
  const uint32_t kept = mantissa >> shift;
  const uint32_t rest = mantissa & ((1U << shift) - 1U);
  const uint32_t half = 1U << (shift - 1U);
  const uint32_t up = (rest > half || (rest == half && (kept & 1U) != 0)) ? 1U : 0U;
  return static_cast<uint16_t>(sign | (kept + up));
}

inline float FromFp16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16;
  const uint32_t shifted = static_cast<uint32_t>(bits & 0x7FFFU) << 13;
  if (shifted >= (0x7C00U << 13)) return std::bit_cast<float>(sign | shifted | 0x7F800000U);
  // Multiplying by 2^112 rebases the exponent and is exact for subnormals, too.
  const float magnitude = std::bit_cast<float>(shifted) * 0x1p112F;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

}  // namespace kvant::kernels
