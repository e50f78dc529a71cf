// The tables of KVTC: a basis of keys and one of values over all layers, and which components of
// them get how many bits. Learnt from a text that is not measured.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/status.h"
#include "node/state_coder.h"

namespace kvant::node {

// Consecutive components of one token that share a shift and a scale.
struct KvtcGroup {
  int size = 0;
  int bits = 0;  // of each component; kKvtcPlain: fp16 as they are, without shift and scale
};
inline constexpr int kKvtcPlain = 16;
inline constexpr int kKvtcScaleBits = 32;  // of a group and token: shift and scale in fp16
// What is stored of a group for one token.
inline int KvtcGroupBits(const KvtcGroup& group) {
  return group.size * group.bits + (group.bits == kKvtcPlain ? 0 : kKvtcScaleBits);
}

// Components of a token's keys, or values, of all layers. Immutable value.
struct KvtcBasis {
  int width = 0;               // numbers of a token: layers * heads * head_dim
  int rank = 0;                // components that any allocation uses
  std::vector<float> mean;     // [width], fp16 numbers
  std::vector<float> vectors;  // [rank][width], orthonormal but for rounding to fp16
  // [ratio]: groups of the first components; what they do not reach has 0 bits.
  std::vector<std::vector<KvtcGroup>> allocations;

  uint64_t table_bytes() const;
};

struct KvtcPack {
  KvtcBasis keys;  // before rope
  KvtcBasis values;
};

// Times that 16 bits an element are more than what an allocation spends, before DEFLATE.
inline constexpr int kKvtcRatios[] = {4, 8, 16, 32};
// Tokens that are stored in 16 bits: the first ones, and the newest.
inline constexpr int kKvtcSinks = 4;
inline constexpr int kKvtcWindow = 128;

// Keys and values of all layers token by token, [tokens][width]; of keys rope is undone.
std::vector<float> KvtcRows(const Model& model, const PrefixState& state, bool of_keys, int first,
                            int end);
// The inverse: writes rows [first, end) back into `state`, rope applied.
void SetKvtcRows(const Model& model, std::span<const float> rows, bool of_keys, int first, int end,
                 PrefixState* state);

// One token's group becomes what a reader has of it. codes: nullptr, or [group.size]; what is
// stored of each component, below 2^bits. scale: nullptr, or shift and scale as fp16 bits.
void QuantizeKvtcGroup(const KvtcGroup& group, float* x, uint16_t* codes, uint16_t* scale);

// The groups of least squared error within `budget_bits` a token, by dynamic programming over
// components and bits. sample: [rows][rank] components, the strongest first.
// Groups have 16, 64, 256 or 1024 components of 1, 2, 3, 4, 6 or 8 bits, or 16 plain ones.
std::vector<KvtcGroup> AllocateKvtcBits(std::span<const float> sample, int rank, int budget_bits);

// The bases by principal component analysis of centred rows, and their allocations.
// Errors: those of the calibration; kUnsupported: OpenBLAS has no eigensolver; kInvalidArgument:
// the text is too short. REQUIRES: kernels::LoadBlas() was ok.
Result<KvtcPack> LearnKvtcPack(const Model& model, const Calibration& calibration);

}  // namespace kvant::node
