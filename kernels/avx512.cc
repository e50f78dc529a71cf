// The portable loops in registers of 64 bytes. A region of the pragma, not a compiler flag: an
// inline function compiled with such a flag could win the link and reach CPUs without it.
#include "kernels/avx512.h"

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

#define KV_LANE_BYTES 64

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
// g++ 12 warns of its own header: an operand that a masked intrinsic ignores is left undefined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace kvant::kernels {
namespace {
#include "kernels/loops.inc"
#include "kernels/not_zero_avx512.inc"
#include "kernels/ordered_gemm_avx512.inc"
#include "kernels/ordered_gemm_loops.inc"
#include "kernels/quad_dot_avx2.inc"
#include "kernels/quad_dot_avx512.inc"
#include "kernels/rans_avx512.inc"
#include "kernels/round_levels_avx512.inc"
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
  return __builtin_cpu_supports("avx512f") != 0 && __builtin_cpu_supports("avx512bw") != 0 &&
         __builtin_cpu_supports("avx512dq") != 0 && __builtin_cpu_supports("avx512vl") != 0;
}

}  // namespace

constinit const Implementation kAvx512 =
    MakeImplementation("avx512", RunsHere, RansEncodeWide, RansDecodeWide);

}  // namespace kvant::kernels
