// kernels/kernel_bench.h measures something plausible; the numbers themselves are for people.
#include "kernels/kernel_bench.h"

#include <gtest/gtest.h>

#include <cstdio>

#include "kernels/blas.h"
#include "kernels/implementation.h"

namespace kvant::kernels {
namespace {

constexpr Duration kShort = std::chrono::milliseconds(2);
constexpr Duration kLonger = std::chrono::milliseconds(30);

TEST(KernelBenchTest, EveryRateIsPositive) {
  ThreadPool pool(2);
  const Rate read = MeasureRead(1 << 20, &pool, kShort);
  EXPECT_GT(read.per_second, 1e6);
  EXPECT_GE(read.rounds, 1);
  const Result<Rate> plain = MeasurePlainGemm({256, 200, 64}, &pool, kShort);
  ASSERT_TRUE(plain.ok());
  EXPECT_GT(plain->per_second, 1e6);
  for (const WeightForm form : {WeightForm::kExact, WeightForm::kBf16, WeightForm::kInt8}) {
    const LinearRate linear = MeasureLinear({2, 100, 64}, form, 1 << 16, &pool, kShort);
    EXPECT_GT(linear.operations, 1e6);
    EXPECT_GT(linear.weight_bytes, 1e5);
  }
  for (const int rows : {1, 2, 4, 8, 64}) {
    const GemmShape of = {rows, 2048, 1024};
    const LinearRate linear = MeasureLinear(of, WeightForm::kBf16, size_t{64} << 20, &pool);
    const Result<Rate> sgemm = MeasurePlainGemm(of, &pool);
    ASSERT_TRUE(sgemm.ok());
    std::printf(
        "linear, %d x 1024 -> 2048, 64 MiB, 2 threads: %.1f GB/s of weights, %.1f GFLOP/s; "
        "sgemm, in the caches, %.1f\n",
        rows, linear.weight_bytes * 1e-9, linear.operations * 1e-9, sgemm->per_second * 1e-9);
  }
  for (const Codec* codec : Codecs()) {
    const TileRates rates =
        MeasureTile(*codec, {64, 2, 64}, codec->key_cuts, 1, 8, 1, 1 << 16, kShort);
    EXPECT_GT(rates.encode, 1e5) << codec->name;
    EXPECT_GT(rates.decode, 1e5) << codec->name;
    EXPECT_GT(rates.attend, 1e5) << codec->name;
    EXPECT_GT(rates.attend_encoded, 0.0) << codec->name;
  }
  EXPECT_GT(MeasureCopy(1 << 20, kShort).per_second, 1e6);
  const LayerShape latent = {{64, 1, 64}, {64, 1, 512}, true};
  for (const LayerShape& shape : {KeysAndValues({64, 2, 64}), latent}) {
    for (const Codec* codec : Codecs()) {
      const AttentionRates rates = MeasureAttention({codec, shape, 8, 1024, 2}, &pool, kShort);
      EXPECT_GT(rates.steps, 1.0) << codec->name;
      EXPECT_GT(rates.steps_in_cache, 1.0) << codec->name;
      EXPECT_GT(rates.step_bytes, 2.0 * 1024 * 64) << codec->name;
    }
  }
  EXPECT_FALSE(CpuName().empty());
  EXPECT_TRUE(CompilerName().find("++") != std::string_view::npos);
  for (const SegmentShape segment : {SegmentShape{64, 2, 64}, SegmentShape{64, 8, 128}}) {
    const LosslessRates lossless = MeasureLossless(SegmentKind::kValue, segment, 1 << 16, kLonger);
    EXPECT_GT(lossless.encode, 1e6);
    EXPECT_GT(lossless.decode, 1e6);
    EXPECT_GT(lossless.copy, 1e6);
    EXPECT_GT(lossless.ratio, 1.44);
    std::printf("lossless, %d heads of %d: encode %.2f, decode %.2f, memcpy %.2f GB/s\n",
                segment.kv_heads, segment.head_dim, lossless.encode * 1e-9, lossless.decode * 1e-9,
                lossless.copy * 1e-9);
  }
  for (const GemmShape of : {GemmShape{64, 512, 1664}, GemmShape{64, 512, 512}}) {
    for (const int matrices : {1, 16}) {
      const Result<OrderedRates> ordered = MeasureOrdered(of, matrices);
      ASSERT_TRUE(ordered.ok()) << ordered.status().ToString();
      EXPECT_GT(ordered->bf16, 1e6);
      EXPECT_GT(ordered->fp32, 1e6);
      EXPECT_GT(ordered->sgemm, 1e6);
      std::printf(
          "ordered product, 64 x %d -> %d, %d matrices, %s: bf16 %.1f, fp32 %.1f, sgemm (%s) %.1f "
          "GFLOP/s\n",
          of.in_features, of.out_features, matrices, ActiveImplementation().name.data(),
          ordered->bf16 * 1e-9, ordered->fp32 * 1e-9, BlasCoreType().c_str(),
          ordered->sgemm * 1e-9);
    }
  }
  const RansRates rans = MeasureRans(1 << 14, 64, 64, kLonger);
  EXPECT_GT(rans.encode, 1e5);
  EXPECT_GT(rans.decode, 1e5);
  std::printf("rANS, 64 tables: encode %.0f, decode %.0f million symbols/s\n", rans.encode * 1e-6,
              rans.decode * 1e-6);
}

}  // namespace
}  // namespace kvant::kernels
