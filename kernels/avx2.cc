// The portable loops in registers of 32 bytes. A region of the pragma, not a compiler flag: an
// inline function compiled with such a flag could win the link and reach CPUs without it.
#include "kernels/avx2.h"

#include <immintrin.h>

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "base/check.h"
#include "kernels/float_formats.h"
#include "kernels/quad_dot.h"
#include "kernels/tile_format.h"

#define KV_LANE_BYTES 32

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace kvant::kernels {
namespace {
#include "kernels/loops.inc"
#include "kernels/not_zero.inc"
#include "kernels/ordered_gemm_avx2.inc"
#include "kernels/ordered_gemm_loops.inc"
#include "kernels/quad_dot_avx2.inc"
#include "kernels/rans_avx2.inc"
#include "kernels/round_levels.inc"
void QuadDotAll(const QuadDot& dot) { QuadDotPairs(dot); }
}  // namespace
}  // namespace kvant::kernels

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace kvant::kernels {
namespace {
#include "kernels/table.inc"

bool RunsHere() {
  return __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0;
}

}  // namespace

constinit const Implementation kAvx2 =
    MakeImplementation("avx2", RunsHere, RansEncodeAll, RansDecodeWide);

}  // namespace kvant::kernels
