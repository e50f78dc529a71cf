// The implementation for CPUs with AVX-512 (F, BW, DQ, VL).
#pragma once

#include "kernels/implementation.h"

namespace kvant::kernels {

extern const Implementation kAvx512;

}  // namespace kvant::kernels
