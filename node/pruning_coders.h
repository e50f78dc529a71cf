// Two ways to leave numbers out, as baselines of `kvant eval`: ThinK drops channels of keys,
// Mustafar the small numbers of each token. What is kept is fp16.
#pragma once

#include <memory>
#include <string>

#include "node/state_coder.h"

namespace kvant::node {

// ThinK (Xu et al., 2024, arXiv 2407.21018; scores as in NVIDIA/kvpress think_press.py):
// of each KV head of each layer the floor(percent / 100 * head_dim) channels of keys are dropped
// whose score mean(q^2) * mean(k^2) is lowest, over the last kObservedQueries queries of the
// prefix and the head's group, and over all keys. The same channels for all tokens; a head stores
// one bit for each channel to say which. Values stay. kInvalidArgument: a latent model, whose keys
// are its values. REQUIRES: 0 <= percent < 100.
Result<std::unique_ptr<StateCoder>> MakeThinkCoder(std::string name, const Model& model,
                                                   int percent);

// Mustafar (Joo et al., 2025, arXiv 2505.22913; github.com/dhjoo98/mustafar): of each
// head of each token, keys and values, the numbers whose magnitude is below the k-th smallest are
// dropped, k = max(1, floor(percent / 100 * head_dim)). Stored in tiles of 64, of tokens for keys
// and of channels for values: a bitmap of 64 bits, an offset of 32, and what is kept, padded to a
// multiple of 8 numbers. A head's last tile of values may hold fewer than 64. The paper's window of
// the newest 32 tokens is left out, because a store has no newest tokens: each block is coded by
// itself. REQUIRES: 0 <= percent < 100.
std::unique_ptr<StateCoder> MakeSparseCoder(std::string name, int percent);

}  // namespace kvant::node
