// Weights in fewer bits: what is kept of a matrix, how far a product is from double precision and
// from the matrix that was given, and the same bits whatever the instructions, the rows beside and
// the threads.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/linear.h"
#include "tests/ordered_fixtures.h"

namespace kvant::kernels {
namespace {

constexpr double kUnit = 0x1p-24;  // of rounding in fp32

OrderedWeights Pack(const OrderedCase& of, WeightForm form) {
  return {of.weights.data(), of.outputs, of.inputs, form};
}

// The definition, step by step: codes of a scale, factors of a unit, exact sums over 512 of them.
std::vector<float> DefinedCodedProduct(const OrderedCase& of) {
  std::vector<int> codes;
  std::vector<float> scales;
  for (int n = 0; n < of.outputs; ++n) {
    float most = 0;
    for (int k = 0; k < of.inputs; ++k) most = std::max(most, std::fabs(of.Weight(n, k)));
    scales.push_back(most / 127.0F);
    for (int k = 0; k < of.inputs; ++k) {
      codes.push_back(
          most == 0 ? 0 : static_cast<int>(std::nearbyintf(of.Weight(n, k) / scales.back())));
    }
  }
  std::vector<float> out;
  for (int r = 0; r < of.rows; ++r) {
    float most = 0;
    for (int k = 0; k < of.inputs; ++k) most = std::max(most, std::fabs(of.X(r, k)));
    const bool any = most > 0x1p-100F;
    const float steps = any ? 16256.0F / most : 0.0F;
    const float unit = any ? most * (1.0F / 16256.0F) : 0.0F;
    std::vector<int> factors;
    int64_t all = 0;
    for (int k = 0; k < of.inputs; ++k) {
      // Rounded once, as a fused multiply-add with 1.5 * 2^23 does.
      factors.push_back(std::min(
          16256, std::max(-16256, static_cast<int>(std::nearbyint(static_cast<double>(of.X(r, k)) *
                                                                  static_cast<double>(steps))))));
      all += factors.back();
    }
    EXPECT_LT(std::abs(all), 1 << 24) << "else the order of that sum matters";
    for (int n = 0; n < of.outputs; ++n) {
      float sum = 0;
      for (int first = 0; first < of.inputs; first += 512) {
        int64_t chunk = 0;
        for (int k = first; k < std::min(first + 512, of.inputs); ++k) {
          chunk += int64_t{codes[static_cast<size_t>(n * of.inputs + k)] + kCodeOfZero} *
                   factors[static_cast<size_t>(k)];
        }
        sum += static_cast<float>(chunk);
      }
      out.push_back((sum - 128.0F * static_cast<float>(all)) * unit *
                    scales[static_cast<size_t>(n)]);
    }
  }
  return out;
}

std::vector<float> CodedRowsBy(const Implementation& kernels, const OrderedWeights& weights,
                               const OrderedCase& of, int rows) {
  std::vector<float> out(static_cast<size_t>(rows * of.outputs));
  CodedMultiply(kernels, {.weights = weights,
                          .x = of.x.data(),
                          .rows = rows,
                          .inputs = of.inputs,
                          .end_output = of.outputs,
                          .out = out.data()});
  return out;
}

TEST(WeightFormsTest, EveryImplementationGivesTheDefinedBits) {
  Random random(61);
  const auto expect = [&](int rows, int inputs, int outputs, int exponent) {
    const OrderedCase made =
        MakeOrderedCase(rows, inputs, outputs, rows % 2 == 0, exponent, &random);
    const OrderedWeights weights = Pack(made, WeightForm::kInt8);
    const std::vector<float> expected = DefinedCodedProduct(made);
    for (const Implementation* implementation : Implementations()) {
      if (!implementation->runs_here()) continue;
      EXPECT_TRUE(SameBits(CodedRowsBy(*implementation, weights, made, rows), expected))
          << implementation->name << ": " << rows << " x " << inputs << " -> " << outputs;
    }
  };
  for (int rows = 1; rows <= 66; ++rows) expect(rows, 1 + rows % 19, 30 + rows % 5, 0);
  for (const int outputs : {1, 7, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200})
    for (const int rows : {1, 2, 3, 5}) expect(rows, 40, outputs, 0);
  for (const int inputs : {1, 15, 16, 17, 511, 512, 513, 529, 1024, 1025, 1664})
    for (const int rows : {1, 14}) expect(rows, inputs, 34, 0);
  for (const int exponent : {-149, -126, -98, -60, 100}) expect(7, 65, 50, exponent);
}

// A part of the outputs leaves the others as they are.
TEST(WeightFormsTest, SomeOutputsMayBeLeftOut) {
  Random random(66);
  const OrderedCase made = MakeOrderedCase(3, 70, 203, false, 0, &random);
  const OrderedWeights weights = Pack(made, WeightForm::kInt8);
  const std::vector<float> all = CodedRowsBy(ActiveImplementation(), weights, made, made.rows);
  const std::pair<int, int> kRanges[] = {{0, 1}, {32, 33}, {64, 75}, {32, 170}, {160, 203}};
  for (const auto& [first, end] : kRanges) {
    std::vector<float> out = made.held;
    OrderedMultiply({.weights = weights,
                     .x = made.x.data(),
                     .rows = made.rows,
                     .inputs = made.inputs,
                     .first_output = first,
                     .end_output = end,
                     .out = out.data()});
    std::vector<float> expected = made.held;
    for (size_t i = 0; i < all.size(); ++i) {
      const int output = static_cast<int>(i) % made.outputs;
      if (output >= first && output < end) expected[i] = all[i];
    }
    EXPECT_TRUE(SameBits(out, expected)) << first << " to " << end;
  }
}

TEST(WeightFormsTest, ARowDependsNeitherOnCompanyNorOnThreads) {
  Random random(62);
  for (const WeightForm form : {WeightForm::kExact, WeightForm::kBf16, WeightForm::kInt8}) {
    constexpr int kRows = 16;
    const OrderedCase made = MakeOrderedCase(kRows, 700, 1100, false, 0, &random);
    const OrderedWeights weights = Pack(made, form);
    std::vector<float> alone(made.held.size());
    for (int row = 0; row < kRows; ++row) {
      const LinearProduct product = {&weights, made.x.data() + row * made.inputs,
                                     alone.data() + row * made.outputs};
      Linear({&product, 1}, 1, nullptr);
    }
    for (const int threads : {1, 2, 3}) {
      ThreadPool pool(threads);
      for (int rows = 1; rows <= kRows; ++rows) {
        std::vector<float> y(static_cast<size_t>(rows * made.outputs));
        const LinearProduct product = {&weights, made.x.data(), y.data()};
        Linear({&product, 1}, rows, &pool);
        EXPECT_TRUE(SameBits(y, {alone.begin(), alone.begin() + rows * made.outputs}))
            << rows << " rows, " << threads << " threads";
      }
    }
  }
}

// Against double precision, of the weights as they are kept and as they were given, to first order.
TEST(WeightFormsTest, ErrorsAreWhatIsStated) {
  Random random(63);
  for (const WeightForm form : {WeightForm::kExact, WeightForm::kBf16, WeightForm::kInt8}) {
    for (const int inputs : {1, 8, 63, 640, 2048}) {
      const OrderedCase made = MakeOrderedCase(3, inputs, 70, false, 0, &random);
      const OrderedWeights weights = Pack(made, form);
      const std::vector<float> kept = weights.RowMajor();
      std::vector<float> y(made.held.size());
      const LinearProduct product = {&weights, made.x.data(), y.data()};
      Linear({&product, 1}, made.rows, nullptr);
      const bool coded = form == WeightForm::kInt8;
      for (int r = 0; r < made.rows; ++r) {
        double largest = 0;
        for (int k = 0; k < inputs; ++k)
          largest = std::max(largest, std::fabs(static_cast<double>(made.X(r, k))));
        for (int n = 0; n < made.outputs; ++n) {
          double of_kept = 0;
          double of_given = 0;
          double rounding = 0;
          double off = 0;  // what the form may cost
          const double scale = coded ? static_cast<double>(weights.scales()[n]) : 0.0;
          for (int k = 0; k < inputs; ++k) {
            const double x = made.X(r, k);
            const double weight = kept[static_cast<size_t>(n * inputs + k)];
            const double given = made.Weight(n, k);
            of_kept += x * weight;
            of_given += x * given;
            if (coded) {
              // Half a unit of x; of the sums of each 512, whose codes have 128 added and are at
              // most 255, two roundings each and some at the end.
              rounding += std::fabs(weight) * largest / 32512 +
                          (2 * (inputs / 512 + 1) + 8) * kUnit * 255 * scale * std::fabs(x);
              off += std::fabs(x) * scale * (0.5 + 128 * kUnit);
              EXPECT_LE(std::fabs(given - weight), scale * (0.5 + 128 * kUnit));
            } else {
              // A sum of fused multiply-adds in one order.
              rounding += (inputs + 1) * kUnit * std::fabs(x * weight);
              if (form == WeightForm::kBf16) off += std::fabs(x * given) * 0x1p-8;
            }
          }
          const double got = y[static_cast<size_t>(r * made.outputs + n)];
          EXPECT_LE(std::fabs(got - of_kept), 1.01 * rounding);
          EXPECT_LE(std::fabs(got - of_given), 1.01 * rounding + off);
        }
      }
    }
  }
}

TEST(WeightFormsTest, CodesAreTheNearestOfTheLargestWeight) {
  // Two outputs of five inputs. The scale of the first is 2^-6; its last two lie between codes.
  const float given[] = {127.0F / 64, -127.0F / 64, 3.0F / 64, 2.5F / 64, -3.5F / 64,
                         0.0F,        0.0F,         -0.0F,     0.0F,      0.0F};
  const OrderedWeights weights(given, 2, 5, WeightForm::kInt8);
  EXPECT_FALSE(weights.exact());
  EXPECT_EQ(weights.bf16(), nullptr);
  EXPECT_EQ(weights.fp32(), nullptr);
  EXPECT_EQ(weights.scales()[0], 0x1p-6F);
  EXPECT_EQ(weights.scales()[1], 0.0F);
  // Two quads of inputs, of which the last three are none.
  EXPECT_EQ(weights.quads(), 2);
  EXPECT_EQ(weights.bytes(), 8U * kOrderedPanel + kOrderedPanel * sizeof(float));
  const int codes[] = {127, -127, 3, 2, -4, 0, 0, 0};
  for (size_t k = 0; k < 8; ++k) {
    for (size_t n = 0; n < kOrderedPanel; ++n) {
      EXPECT_EQ(weights.codes()[(k / 4 * kOrderedPanel + n) * 4 + k % 4],
                kCodeOfZero + (n == 0 ? codes[k] : 0));
    }
  }
  EXPECT_EQ(weights.RowMajor(), (std::vector<float>{127.0F / 64, -127.0F / 64, 3.0F / 64, 2.0F / 64,
                                                    -4.0F / 64, 0, 0, 0, 0, 0}));
}

// Weights that are codes already come back as they were, from fp32 as from bf16.
TEST(WeightFormsTest, CodesComeBack) {
  Random random(64);
  constexpr int kOutputs = 37;
  constexpr int kInputs = 90;
  std::vector<float> given(size_t{kOutputs} * kInputs);
  std::vector<uint16_t> halves(given.size());
  for (size_t i = 0; i < given.size(); ++i) {
    const int code = i % kInputs == 5 ? kMostCode : static_cast<int>(random.Below(255)) - kMostCode;
    given[i] = std::ldexp(static_cast<float>(code), static_cast<int>(i / kInputs) - 20);
    halves[i] = ToBf16(given[i]);
  }
  EXPECT_EQ(OrderedWeights(given.data(), kOutputs, kInputs, WeightForm::kInt8).RowMajor(), given);
  EXPECT_EQ(OrderedWeights(halves.data(), kOutputs, kInputs, WeightForm::kInt8).RowMajor(), given);
}

TEST(WeightFormsTest, Bf16IsExactWhereItLosesNothing) {
  Random random(65);
  const OrderedCase narrow = MakeOrderedCase(2, 50, 40, true, 0, &random);
  EXPECT_TRUE(Pack(narrow, WeightForm::kExact).exact());
  const OrderedWeights kept = Pack(narrow, WeightForm::kBf16);
  EXPECT_TRUE(kept.exact());
  EXPECT_EQ(kept.RowMajor(), narrow.weights);
  EXPECT_EQ(kept.bytes(), 2U * 64 * 50);

  const OrderedCase wide = MakeOrderedCase(2, 50, 40, false, 0, &random);
  EXPECT_TRUE(Pack(wide, WeightForm::kExact).exact());
  EXPECT_EQ(Pack(wide, WeightForm::kExact).bytes(), 4U * 64 * 50);
  const OrderedWeights rounded = Pack(wide, WeightForm::kBf16);
  EXPECT_FALSE(rounded.exact());
  ASSERT_NE(rounded.bf16(), nullptr);
  const std::vector<float> all = rounded.RowMajor();
  for (size_t i = 0; i < all.size(); ++i) EXPECT_EQ(all[i], FromBf16(ToBf16(wide.weights[i])));
}

TEST(WeightFormsTest, ExtremesKeepToTheirOutput) {
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  // Rows: an infinity, a NaN, numbers so small that their scale is 0 or coarse, a large one.
  const float given[] = {infinity, 1, nan, 1, 0x1p-149F, 0, 0x1.8p-143F, 0x1p-149F, 0x1p127F, 1};
  const OrderedWeights weights(given, 5, 2, WeightForm::kInt8);
  const float x[] = {1.0F, 1.0F};
  for (const Implementation* implementation : Implementations()) {
    if (!implementation->runs_here()) continue;
    float y[5];
    CodedMultiply(*implementation,
                  {.weights = weights, .x = x, .rows = 1, .inputs = 2, .end_output = 5, .out = y});
    EXPECT_FALSE(std::isfinite(y[0]));
    EXPECT_FALSE(std::isfinite(y[1]));
    EXPECT_EQ(y[2], 0.0F);
    EXPECT_NEAR(y[3], 0x1.8p-143F, 0x1p-143F);
    EXPECT_NEAR(y[4], 0x1p127F, 0x1p112F);
  }
}

TEST(WeightFormsDeathTest, SumsOfCodesBeginAtNothing) {
  const float given[] = {1.0F};
  const OrderedWeights weights(given, 1, 1, WeightForm::kInt8);
  float out = 1.0F;
  EXPECT_DEATH(OrderedMultiplyAdd(weights, given, 1, &out), "internal error");
}

}  // namespace
}  // namespace kvant::kernels
