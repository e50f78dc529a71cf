#include "kernels/scalar.h"

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "base/check.h"
#include "kernels/float_formats.h"
#include "kernels/quad_dot.h"
#include "kernels/tile_format.h"

#define KV_LANE_BYTES 16

namespace kvant::kernels {
namespace {
#include "kernels/loops.inc"
#include "kernels/not_zero.inc"
#include "kernels/ordered_gemm_scalar.inc"
#include "kernels/quad_dot_scalar.inc"
#include "kernels/round_levels.inc"
#include "kernels/table.inc"
}  // namespace

constinit const Implementation kScalar = MakeImplementation(
    "scalar", [] { return true; }, RansEncodeAll, RansDecodeAll);

}  // namespace kvant::kernels
