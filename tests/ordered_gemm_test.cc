// Ordered products: every implementation gives the defined sums to the bit, whatever the shape, the
// rows beside, and the form of the weights.
#include "kernels/ordered_gemm.h"

#include <gtest/gtest.h>

#include <thread>

#include "tests/ordered_fixtures.h"

namespace kvant::kernels {
namespace {

std::vector<const Implementation*> All() {
  std::vector<const Implementation*> all;
  for (const Implementation* implementation : Implementations()) {
    if (implementation->runs_here()) all.push_back(implementation);
  }
  return all;
}

void ExpectDefinedBits(const OrderedCase& made) {
  const OrderedWeights weights(made.weights.data(), made.outputs, made.inputs);
  for (const OrderedStart start : {OrderedStart::kZero, OrderedStart::kBias, OrderedStart::kHeld}) {
    const std::vector<float> expected = DefinedProduct(made, start);
    for (const Implementation* implementation : All()) {
      EXPECT_TRUE(
          SameBits(OrderedRowsBy(*implementation, weights, made, start, 0, made.rows), expected))
          << implementation->name << ": " << made.rows << " x " << made.inputs << " -> "
          << made.outputs << ", start " << static_cast<int>(start);
    }
  }
}

TEST(OrderedGemmTest, EveryNumberOfRowsAndEveryTail) {
  Random random(41);
  for (int rows = 1; rows <= 66; ++rows) {
    for (const bool bf16 : {false, true}) {
      ExpectDefinedBits(MakeOrderedCase(rows, 1 + rows % 19, 30 + rows % 5, bf16, 0, &random));
    }
  }
  for (const int outputs : {1, 7, 31, 32, 33, 63, 64, 65, 200}) {
    for (const bool bf16 : {false, true}) {
      ExpectDefinedBits(MakeOrderedCase(5, 40, outputs, bf16, 0, &random));
    }
  }
  for (const int inputs : {1, 15, 16, 17, 511, 512, 513, 528, 529, 1024, 1025, 1664}) {
    for (const bool bf16 : {false, true}) {
      ExpectDefinedBits(MakeOrderedCase(14, inputs, 34, bf16, 0, &random));
    }
  }
  ExpectDefinedBits(MakeOrderedCase(130, 20, 40, true, 0, &random));
}

TEST(OrderedGemmTest, SubnormalNumbersCount) {
  Random random(42);
  for (const int exponent : {-149, -140, -130, -126, 100}) {
    for (const bool bf16 : {false, true}) {
      ExpectDefinedBits(MakeOrderedCase(7, 65, 50, bf16, exponent, &random));
    }
  }
  const float weight = 0x1p-40F;
  const float x = 0x1p-100F;
  const OrderedWeights weights(&weight, 1, 1);
  for (const Implementation* implementation : All()) {
    float out = 1.0F;
    implementation->ordered_multiply(
        {.weights = weights, .x = &x, .rows = 1, .inputs = 1, .end_output = 1, .out = &out});
    EXPECT_EQ(out, 0x1p-140F) << implementation->name;
  }
}

TEST(OrderedGemmTest, ARowDoesNotKnowItsCompany) {
  Random random(43);
  for (const bool bf16 : {false, true}) {
    const OrderedCase made = MakeOrderedCase(64, 600, 70, bf16, 0, &random);
    const OrderedWeights weights(made.weights.data(), made.outputs, made.inputs);
    for (const Implementation* implementation : All()) {
      const std::vector<float> all =
          OrderedRowsBy(*implementation, weights, made, OrderedStart::kHeld, 0, made.rows);
      for (const int rows : {1, 2, 5, 6, 13, 14, 40}) {
        const int first = static_cast<int>(random.Below(static_cast<uint64_t>(65 - rows)));
        const auto at = all.begin() + static_cast<ptrdiff_t>(first) * made.outputs;
        EXPECT_TRUE(SameBits(
            OrderedRowsBy(*implementation, weights, made, OrderedStart::kHeld, first, rows),
            {at, at + static_cast<ptrdiff_t>(rows) * made.outputs}))
            << implementation->name << ", rows " << first << " to " << first + rows;
      }
    }
  }
}

TEST(OrderedGemmTest, WeightsAreHalvedWhereNoBitIsLost) {
  Random random(44);
  OrderedCase made = MakeOrderedCase(9, 100, 45, true, 0, &random);
  const OrderedWeights narrow(made.weights.data(), made.outputs, made.inputs);
  EXPECT_NE(narrow.bf16(), nullptr);
  EXPECT_EQ(narrow.fp32(), nullptr);
  EXPECT_EQ(narrow.outputs(), 45);
  EXPECT_EQ(narrow.inputs(), 100);
  EXPECT_TRUE(SameBits(narrow.RowMajor(), made.weights));
  // One output's weight more than bf16 holds: the others keep their bits.
  made.weights.back() = 0x1.000002p0F;
  const OrderedWeights wide(made.weights.data(), made.outputs, made.inputs);
  EXPECT_EQ(wide.bf16(), nullptr);
  EXPECT_NE(wide.fp32(), nullptr);
  EXPECT_TRUE(SameBits(wide.RowMajor(), made.weights));
  const OrderedWeights copy = wide;
  EXPECT_EQ(copy.fp32(), wide.fp32());
  for (const Implementation* implementation : All()) {
    const auto product = [&](const OrderedWeights& weights) {
      return OrderedRowsBy(*implementation, weights, made, OrderedStart::kZero, 0, made.rows);
    };
    std::vector<float> a = product(narrow);
    std::vector<float> b = product(wide);
    for (size_t r = 0; r < 9; ++r) a[r * 45 + 44] = b[r * 45 + 44] = 0.0F;
    EXPECT_TRUE(SameBits(a, b)) << implementation->name;
  }
}

// Where each row of numbers[rows][width] begins.
std::vector<const float*> RowsIn(const std::vector<float>& numbers, int width) {
  std::vector<const float*> rows;
  for (size_t at = 0; at < numbers.size(); at += static_cast<size_t>(width))
    rows.push_back(numbers.data() + at);
  return rows;
}

TEST(OrderedGemmTest, SomeInputsMayBeLeftOut) {
  Random random(46);
  constexpr int kInputs = 1100;
  const std::pair<int, int> kRanges[] = {{0, 1},    {0, 15},    {0, 16},   {0, 17},
                                         {0, 512},  {0, 513},   {0, 1099}, {0, 1100},
                                         {1, 1099}, {640, 460}, {33, 17},  {1099, 1}};
  for (const auto& [first, inputs] : kRanges) {
    for (const bool bf16 : {false, true}) {
      const OrderedCase whole = MakeOrderedCase(15, kInputs, 70, bf16, 0, &random);
      const OrderedWeights weights(whole.weights.data(), whole.outputs, kInputs);
      OrderedCase part = whole;
      part.inputs = inputs;
      part.x.resize(static_cast<size_t>(part.rows * inputs));
      part.weights.clear();
      for (int n = 0; n < whole.outputs; ++n) {
        const auto row = whole.weights.begin() + static_cast<ptrdiff_t>(n) * kInputs;
        part.weights.insert(part.weights.end(), row + first, row + first + inputs);
      }
      // A copy of its own, so that a sanitizer sees the first number read past the end.
      const std::vector<float> x(part.x.begin(), part.x.end());
      const std::vector<float> expected = DefinedProduct(part, OrderedStart::kHeld);
      for (const Implementation* implementation : All()) {
        std::vector<float> out = part.held;
        implementation->ordered_multiply({.weights = weights,
                                          .x = x.data(),
                                          .rows = part.rows,
                                          .first_input = first,
                                          .inputs = inputs,
                                          .end_output = part.outputs,
                                          .start = out.data(),
                                          .start_stride = static_cast<size_t>(part.outputs),
                                          .out = out.data()});
        EXPECT_TRUE(SameBits(out, expected))
            << implementation->name << ": " << inputs << " from " << first;
      }
      const std::vector<const float*> starts = RowsIn(part.held, part.outputs);
      for (const Implementation* implementation : All()) {
        std::vector<float> out(part.held.size(), NAN);
        implementation->ordered_multiply({.weights = weights,
                                          .x = x.data(),
                                          .rows = part.rows,
                                          .first_input = first,
                                          .inputs = inputs,
                                          .end_output = part.outputs,
                                          .start = out.data(),
                                          .start_stride = static_cast<size_t>(part.outputs),
                                          .starts = starts.data(),
                                          .out = out.data()});
        EXPECT_TRUE(SameBits(out, expected)) << implementation->name << ", begun elsewhere";
      }
    }
  }
}

TEST(OrderedGemmTest, SomeOutputsMayBeLeftOut) {
  Random random(47);
  constexpr int kOutputs = 203;
  const std::pair<int, int> kRanges[] = {{0, 0},  {0, 1},   {0, 16},  {0, 31},   {0, 32},
                                         {0, 33}, {32, 33}, {64, 75}, {32, 170}, {32, kOutputs}};
  for (const auto& [first, end] : kRanges) {
    for (const bool bf16 : {false, true}) {
      for (const int rows : {1, 2, 3, 5, 7, 15}) {
        const OrderedCase whole = MakeOrderedCase(rows, 513, kOutputs, bf16, 0, &random);
        const OrderedWeights weights(whole.weights.data(), kOutputs, whole.inputs);
        std::vector<float> expected = DefinedProduct(whole, OrderedStart::kBias);
        for (size_t i = 0; i < expected.size(); ++i) {
          const int output = static_cast<int>(i % kOutputs);
          if (output < first || output >= end) expected[i] = whole.held[i];
        }
        for (const Implementation* implementation : All()) {
          std::vector<float> out = whole.held;
          implementation->ordered_multiply({.weights = weights,
                                            .x = whole.x.data(),
                                            .rows = whole.rows,
                                            .inputs = whole.inputs,
                                            .first_output = first,
                                            .end_output = end,
                                            .start = whole.bias.data(),
                                            .out = out.data()});
          EXPECT_TRUE(SameBits(out, expected))
              << implementation->name << ": " << first << " to " << end << " of " << rows;
        }
      }
    }
  }
}

// Rows of which a share of the inputs is not 0, some of them none at all.
struct SparseCase {
  OrderedCase dense;
  SparseRows x;
};
SparseCase MakeSparseCase(int rows, int inputs, int outputs, bool bf16, int exponent, double share,
                          Random* random) {
  SparseCase made{MakeOrderedCase(rows, inputs, outputs, bf16, exponent, random), {}};
  for (int r = 0; r < rows; ++r) {
    for (int k = 0; k < inputs; ++k) {
      float& x = made.dense.x[static_cast<size_t>(r * inputs + k)];
      if (r % 5 == 3 || !random->Chance(share)) x = 0;
      if (x != 0) made.x.Add(static_cast<size_t>(k), x);
    }
    made.x.EndRow();
  }
  return made;
}

TEST(OrderedGemmTest, ZerosMayBeLeftOut) {
  Random random(48);
  for (const int outputs : {1, 31, 32, 33, 64, 96, 100, 128, 160, 257}) {
    for (const int inputs : {1, 40, 700}) {
      for (const bool bf16 : {false, true}) {
        for (const int exponent : {0, -140, 100}) {
          SparseCase made = MakeSparseCase(11, inputs, outputs, bf16, exponent, 0.2, &random);
          // Of what begins at -0, dense rows make 0.
          for (float& held : made.dense.held) held = held == 0 ? 1 : held;
          const OrderedWeights weights(made.dense.weights.data(), outputs, inputs);
          const std::vector<float> expected = DefinedProduct(made.dense, OrderedStart::kHeld);
          for (const Implementation* implementation : All()) {
            std::vector<float> out = made.dense.held;
            implementation->ordered_add_sparse(weights, SparseTerms(made.x), out.data());
            EXPECT_TRUE(SameBits(out, expected))
                << implementation->name << ": " << inputs << " -> " << outputs;
            // Begun elsewhere.
            std::vector<float> elsewhere(out.size(), NAN);
            const std::vector<const float*> start = RowsIn(made.dense.held, outputs);
            SparseTerms terms(made.x);
            terms.start = start.data();
            implementation->ordered_add_sparse(weights, terms, elsewhere.data());
            EXPECT_TRUE(SameBits(elsewhere, expected))
                << implementation->name << ": " << inputs << " -> " << outputs;
          }
          std::vector<float> out = made.dense.held;
          OrderedMultiplyAdd(weights, made.x, out.data());
          EXPECT_TRUE(SameBits(out, expected));
        }
      }
    }
  }
}

TEST(OrderedGemmTest, WhetherManyOrFewAreLeftOut) {
  Random random(49);
  for (const double share : {0.0, 0.01, 0.45, 0.6, 1.0}) {
    SparseCase made = MakeSparseCase(64, 300, 200, true, 0, share, &random);
    for (float& held : made.dense.held) held = held == 0 ? 1 : held;
    const OrderedWeights weights(made.dense.weights.data(), 200, 300);
    std::vector<float> out = made.dense.held;
    OrderedMultiplyAdd(weights, made.x, out.data());
    const std::vector<float> expected = DefinedProduct(made.dense, OrderedStart::kHeld);
    EXPECT_TRUE(SameBits(out, expected)) << share;
    // Some rows begun elsewhere, and some where they are.
    std::vector<const float*> start = RowsIn(made.dense.held, 200);
    std::vector<float> elsewhere(out.size(), NAN);
    for (size_t r = 0; r < start.size(); r += 3) {
      float* const here = elsewhere.data() + r * 200;
      std::copy_n(start[r], 200, here);
      start[r] = here;
    }
    OrderedMultiplyAdd(weights, made.x, start.data(), elsewhere.data());
    EXPECT_TRUE(SameBits(elsewhere, expected)) << share;
  }
}

// Inputs that most rows have, between some that few have.
TEST(OrderedGemmTest, WhereverThoseAreThatAreNotLeftOut) {
  Random random(50);
  constexpr int kInputs = 300;
  constexpr int kOutputs = 200;
  using Range = std::pair<int, int>;
  for (const Range& many : {Range{0, 100}, Range{1, 100}, Range{100, 180}, Range{200, kInputs}}) {
    for (const double few : {0.0, 0.02, 0.2}) {
      SparseCase made = MakeSparseCase(64, kInputs, kOutputs, true, 0, 0, &random);
      made.x.Clear();
      for (int r = 0; r < 64; ++r) {
        for (int k = 0; k < kInputs; ++k) {
          const bool here = random.Unit() < (k >= many.first && k < many.second ? 0.9 : few);
          const auto x = here ? static_cast<float>(random.Unit() + 0.1) : 0.0F;
          made.dense.x[static_cast<size_t>(r * kInputs + k)] = x;
          if (here) made.x.Add(static_cast<size_t>(k), x);
        }
        made.x.EndRow();
      }
      for (float& held : made.dense.held) held = held == 0 ? 1 : held;
      const OrderedWeights weights(made.dense.weights.data(), kOutputs, kInputs);
      const std::vector<float> expected = DefinedProduct(made.dense, OrderedStart::kHeld);
      std::vector<float> out = made.dense.held;
      OrderedMultiplyAdd(weights, made.x, out.data());
      EXPECT_TRUE(SameBits(out, expected)) << many.first << " to " << many.second << ", " << few;
      const std::vector<const float*> start = RowsIn(made.dense.held, kOutputs);
      std::vector<float> elsewhere(out.size(), NAN);
      OrderedMultiplyAdd(weights, made.x, start.data(), elsewhere.data());
      EXPECT_TRUE(SameBits(elsewhere, expected)) << many.first << " to " << many.second;
    }
  }
}

TEST(OrderedGemmTest, WhatIsLeftOutLeavesSumsAsTheyAre) {
  const float weight[] = {1, 1};
  const OrderedWeights weights(weight, 1, 2);
  SparseRows x;
  x.EndRow();
  for (const Implementation* implementation : All()) {
    std::vector<float> out = {-0.0F};
    implementation->ordered_add_sparse(weights, SparseTerms(x), out.data());
    EXPECT_TRUE(SameBits(out, {-0.0F})) << implementation->name;
  }
  x.Clear();
  EXPECT_EQ(x.rows(), 0U);
  EXPECT_EQ(x.terms(), 0U);
}

TEST(OrderedGemmTest, TheActiveOneIsUsedOnAnyThread) {
  Random random(45);
  const OrderedCase made = MakeOrderedCase(20, 530, 90, true, 0, &random);
  const OrderedWeights weights(made.weights.data(), made.outputs, made.inputs);
  std::vector<float> out(made.held.size(), NAN);
  OrderedMultiply(weights, made.x.data(), made.rows, nullptr, out.data());
  EXPECT_TRUE(SameBits(out, DefinedProduct(made, OrderedStart::kZero)));
  OrderedMultiply(weights, made.x.data(), made.rows, made.bias.data(), out.data());
  EXPECT_TRUE(SameBits(out, DefinedProduct(made, OrderedStart::kBias)));
  std::vector<float> held = made.held;
  std::thread([&] { OrderedMultiplyAdd(weights, made.x.data(), made.rows, held.data()); }).join();
  EXPECT_TRUE(SameBits(held, DefinedProduct(made, OrderedStart::kHeld)));
}

}  // namespace
}  // namespace kvant::kernels
