// The reference implementation: portable loops, never tuned by hand, never removed.
#pragma once

#include "kernels/implementation.h"

namespace kvant::kernels {

extern const Implementation kScalar;

}  // namespace kvant::kernels
