// Measures what bounds a node on this machine, so that a program can print what it reaches as a
// share: streaming reads bound decode, sgemm bounds prefill.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/status.h"
#include "kernels/codec.h"
#include "kernels/ordered_gemm.h"
#include "kernels/thread_pool.h"

namespace kvant::kernels {

// Work done over the time it took.
struct Rate {
  double per_second = 0.0;  // bytes or floating-point operations
  int64_t rounds = 0;
};

// How long a measurement runs at least, after one round that is not counted.
inline constexpr Duration kBenchTime = std::chrono::milliseconds(200);

// Bytes a second that `pool` reads from a buffer of this size, over and over.
Rate MeasureRead(size_t buffer_bytes, ThreadPool* pool, Duration at_least = kBenchTime);

// The same of copying such a buffer, on this thread.
Rate MeasureCopy(size_t buffer_bytes, Duration at_least = kBenchTime);

// The shape y[rows][out] = x[rows][in] * W^T.
struct GemmShape {
  int rows = 0;
  int out_features = 0;
  int in_features = 0;
};
// Linear with weights of a form, drawn at random; matrices of at least `weight_bytes` are cycled,
// so that a size beyond the caches measures memory.
struct LinearRate {
  double operations = 0.0;    // a second, 2 * rows * out * in each round
  double weight_bytes = 0.0;  // a second
};
LinearRate MeasureLinear(const GemmShape& shape, WeightForm form, size_t weight_bytes,
                         ThreadPool* pool, Duration at_least = kBenchTime);
// The same of one plain sgemm for each thread, the output features split evenly. kUnsupported
// without OpenBLAS.
Result<Rate> MeasurePlainGemm(const GemmShape& shape, ThreadPool* pool,
                              Duration at_least = kBenchTime);

// Operations a second, on one thread, of OrderedMultiply with weights in bf16 and in fp32, and of
// one sgemm with the same numbers; the fastest of alternating rounds. `matrices` of the shape are
// cycled: those of a model's layers do not stay in the caches. kUnsupported without OpenBLAS.
struct OrderedRates {
  double bf16 = 0.0;
  double fp32 = 0.0;
  double sgemm = 0.0;
};
Result<OrderedRates> MeasureOrdered(const GemmShape& shape, int matrices,
                                    Duration at_least = kBenchTime);

// One codec on one thread, over blocks of one layer that fill `working_set_bytes` when encoded.
// Rates in bytes of bf16 that the segment would take; attend also in bytes that were read.
struct TileRates {
  double encode = 0.0;
  double decode = 0.0;
  double attend = 0.0;
  double attend_encoded = 0.0;
};
TileRates MeasureTile(const Codec& codec, const SegmentShape& shape, int key_cuts, int value_cuts,
                      int q_heads, int rows, size_t working_set_bytes,
                      Duration at_least = kBenchTime);

// Attention of one decoding step, as a node computes it: every layer's tokens in pieces on the
// threads of a pool, partial softmaxes merged.
struct AttentionWork {
  const Codec* codec = nullptr;
  LayerShape shape;  // of a block of one layer
  int q_heads = 0;
  int context = 0;  // tokens, whole blocks
  int layers = 0;
};
struct AttentionRates {
  double steps = 0.0;           // a second
  double steps_in_cache = 0.0;  // the same where every block is one and the same: arithmetic alone
  double step_bytes = 0.0;      // that a step reads
};
AttentionRates MeasureAttention(const AttentionWork& work, ThreadPool* pool,
                                Duration at_least = kBenchTime);

// What rows of a benchmark name: "Intel(R) Xeon(R) ..." as the system says it, "g++ 12.2.0".
std::string CpuName();
std::string_view CompilerName();

// The lossless coder on one thread, over segments of one shape that fill `working_set_bytes` as
// bf16, with a plain copy of the same bytes beside it. Rates in bytes of bf16, of the fastest of
// alternating rounds.
struct LosslessRates {
  double encode = 0.0;
  double decode = 0.0;
  double copy = 0.0;
  double ratio = 0.0;  // bf16 bytes over encoded bytes
};
LosslessRates MeasureLossless(SegmentKind kind, const SegmentShape& shape, size_t working_set_bytes,
                              Duration at_least = kBenchTime);

// rANS on one thread: `symbols` of them, each coded by one of `tables` tables. Symbols a
// second, of the fastest of alternating rounds.
struct RansRates {
  double encode = 0.0;
  double decode = 0.0;
};
RansRates MeasureRans(size_t symbols, int alphabet, int tables, Duration at_least = kBenchTime);

}  // namespace kvant::kernels
