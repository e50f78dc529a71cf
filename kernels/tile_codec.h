// The tile codecs: embedded fixed-rate integers that attention reads as they are
// (docs/block-format.md, "Tiles").
#pragma once

#include "kernels/codec.h"

namespace kvant::kernels {

extern const Codec kTile8Codec;  // 4 bits, refined to 8
extern const Codec kTile4Codec;  // 2 bits, refined to 4

}  // namespace kvant::kernels
