// KVTC as a baseline of `kvant eval`.
#pragma once

#include <memory>
#include <string>

#include "node/kvtc_pack.h"
#include "node/state_coder.h"

namespace kvant::node {

// KVTC (Staniszewski and Lancucki, 2025, arXiv 2511.01815): the first 4 tokens and the
// newest `window` stay in bf16; of all others the keys before rope, and the values, of all layers
// are projected on the pack's bases, quantized by its allocations, and the packed codes of keys and
// of values go through DEFLATE each. Wires: the ratios of kKvtcRatios. Three orders of the codes
// are tried and the smallest stream counts, with a byte that says which. The paper's groups of one
// component are left out: their shift and scale cost more than the component in fp16.
std::unique_ptr<StateCoder> MakeKvtcCoder(std::string name, const Model* model,
                                          std::shared_ptr<const KvtcPack> pack, int window);

}  // namespace kvant::node
