// The implementation for CPUs with AVX2 and FMA.
#pragma once

#include "kernels/implementation.h"

namespace kvant::kernels {

extern const Implementation kAvx2;

}  // namespace kvant::kernels
