// The raw codecs: every element as bf16, fp16 or fp32, in the order that attention reads
// (docs/block-format.md, "Raw").
#pragma once

#include "kernels/codec.h"

namespace kvant::kernels {

extern const Codec kRawBf16Codec;
extern const Codec kRawFp16Codec;
extern const Codec kRawFp32Codec;

}  // namespace kvant::kernels
