// KIVI as a baseline of `kvant eval`: keys per channel, values per token, the newest in fp16.
#pragma once

#include <memory>
#include <string>

#include "node/state_coder.h"

namespace kvant::node {

inline constexpr int kKiviGroup = 32;      // numbers that share a scale and a minimum
inline constexpr int kKiviResidual = 128;  // tokens

// KIVI (Liu et al., 2024, arXiv 2402.02750, algorithm 1, with the group and the residual that
// github.com/jy-yuan/KIVI runs its experiments with): asymmetric codes of `bits` bits. Keys:
// groups of 32 tokens of one channel. Values: groups of 32 channels of one head of a token; a
// head's last group may be shorter. Each group stores its minimum and scale = (max - min) / (2^bits
// - 1) in fp16. Of T tokens the newest T mod 128 keys and the newest 128 values are fp16. Latents
// are coded as values, rope keys as keys. REQUIRES: 1 <= bits <= 8.
std::unique_ptr<StateCoder> MakeKiviCoder(std::string name, int bits);

}  // namespace kvant::node
