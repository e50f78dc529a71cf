// Dense layers: agreement with double precision, and bits that depend neither on the number of
// rows nor on the number of threads; the thread pool; bf16 and fp16 over all their codes.
#include "kernels/linear.h"

#include <gtest/gtest.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <thread>

#include "base/random.h"
#include "kernels/implementation.h"

namespace kvant::kernels {
namespace {

struct Matrix {
  Matrix(int out, int in, Random* random) {
    const auto size = static_cast<size_t>(out) * static_cast<size_t>(in);
    bf16.resize(size);
    fp32.resize(size);
    for (size_t i = 0; i < size; ++i) {
      bf16[i] = ToBf16(static_cast<float>(random->Normal()));
      fp32[i] = FromBf16(bf16[i]);
    }
    weight = {bf16.data(), nullptr, out, in};
  }
  std::vector<uint16_t> bf16;
  std::vector<float> fp32;
  Weight weight;
};

std::vector<float> MakeRows(int rows, int width, Random* random) {
  std::vector<float> x(static_cast<size_t>(rows) * static_cast<size_t>(width));
  for (float& value : x) value = static_cast<float>(random->Normal());
  return x;
}

// Largest error in units of sqrt(in), the size of a product of standard normals.
double ErrorOf(const Matrix& matrix, const std::vector<float>& x, int rows,
               const std::vector<float>& y) {
  const auto in = static_cast<size_t>(matrix.weight.in_features);
  const auto out = static_cast<size_t>(matrix.weight.out_features);
  double worst = 0.0;
  for (size_t r = 0; r < static_cast<size_t>(rows); ++r) {
    for (size_t o = 0; o < out; ++o) {
      double expected = 0.0;
      for (size_t c = 0; c < in; ++c) {
        expected +=
            static_cast<double>(matrix.fp32[o * in + c]) * static_cast<double>(x[r * in + c]);
      }
      worst = std::max(worst, std::fabs(static_cast<double>(y[r * out + o]) - expected));
    }
  }
  return worst / std::sqrt(static_cast<double>(in));
}

TEST(DecodeLinearTest, AgreesWithDoubleAndARowDoesNotKnowItsCompany) {
  Random random(31);
  for (const Implementation* implementation : Implementations()) {
    if (!implementation->runs_here()) continue;
    for (const int in : {8, 16, 40, 63, 256, 1000}) {
      for (const int out : {1, 2, 7, 130}) {
        const Matrix matrix(out, in, &random);
        const std::vector<float> x = MakeRows(9, in, &random);
        const auto stride = static_cast<size_t>(out);
        std::vector<float> all(9 * stride);
        implementation->linear(matrix.bf16.data(), out, in, x.data(), 9, all.data(), stride);
        EXPECT_LE(ErrorOf(matrix, x, 9, all), 1e-5);
        for (int rows = 1; rows < 9; ++rows) {
          for (int first = 0; first + rows <= 9; ++first) {
            std::vector<float> some(static_cast<size_t>(rows) * stride);
            implementation->linear(matrix.bf16.data(), out, in,
                                   x.data() + static_cast<size_t>(first * in), rows, some.data(),
                                   stride);
            ASSERT_EQ(std::memcmp(some.data(), all.data() + static_cast<size_t>(first) * stride,
                                  some.size() * sizeof(float)),
                      0)
                << implementation->name << " " << in << " " << out << " " << rows;
          }
        }
        std::vector<float> wide(all.size());
        implementation->linear_fp32(matrix.fp32.data(), out, in, x.data(), 9, wide.data(), stride);
        EXPECT_EQ(wide, all) << implementation->name << ", the same weights as fp32";
        std::vector<float> reference(all.size());
        Implementations().back()->linear(matrix.bf16.data(), out, in, x.data(), 9, reference.data(),
                                         stride);
        EXPECT_EQ(all, reference) << implementation->name;
      }
    }
  }
}

TEST(DecodeLinearTest, ThreadsChangeNoBit) {
  Random random(32);
  const Matrix matrix(3001, 128, &random);
  const std::vector<float> x = MakeRows(3, 128, &random);
  std::vector<float> alone(3 * 3001);
  DecodeLinear(matrix.weight, x.data(), 3, alone.data(), nullptr);
  EXPECT_LE(ErrorOf(matrix, x, 3, alone), 1e-5);
  for (const int threads : {1, 2, 3}) {
    ThreadPool pool(threads);
    std::vector<float> y(alone.size());
    DecodeLinear(matrix.weight, x.data(), 3, y.data(), &pool);
    EXPECT_EQ(y, alone) << threads;
  }
}

TEST(PrefillLinearTest, ThreadsChangeNoBit) {
  const Status loaded = LoadBlas();
  ASSERT_TRUE(loaded.ok()) << loaded.ToString();
  EXPECT_FALSE(BlasCoreType().empty());
  RecordProperty("blas_core_type", BlasCoreType());
  Random random(33);
  for (const int out : {64, 128, 500}) {
    const Matrix matrix(out, 200, &random);
    const std::vector<float> x = MakeRows(kPrefillRows, 200, &random);
    std::vector<float> alone(static_cast<size_t>(kPrefillRows * out));
    PrefillLinear(matrix.weight, x.data(), alone.data(), nullptr);
    EXPECT_LE(ErrorOf(matrix, x, kPrefillRows, alone), 1e-5);
    std::vector<float> wide(alone.size());
    PrefillLinear({nullptr, matrix.fp32.data(), out, 200}, x.data(), wide.data(), nullptr);
    EXPECT_EQ(wide, alone) << "the same weights as fp32";
    for (const int threads : {1, 2, 3}) {
      ThreadPool pool(threads);
      std::vector<float> y(alone.size());
      PrefillLinear(matrix.weight, x.data(), y.data(), &pool);
      EXPECT_EQ(y, alone) << threads;
    }
  }
}

TEST(PrefillLinearTest, ARowDoesNotKnowWhatTheOthersHold) {
  ASSERT_TRUE(LoadBlas().ok());
  Random random(34);
  const Matrix matrix(200, 96, &random);
  std::vector<float> x = MakeRows(kPrefillRows, 96, &random);
  std::vector<float> before(static_cast<size_t>(kPrefillRows) * 200);
  PrefillLinear(matrix.weight, x.data(), before.data(), nullptr);
  for (size_t i = 20 * 96; i < x.size(); ++i) x[i] = 0.0F;  // as a padded block
  std::vector<float> after(before.size());
  PrefillLinear(matrix.weight, x.data(), after.data(), nullptr);
  EXPECT_EQ(std::memcmp(before.data(), after.data(), 20 * 200 * sizeof(float)), 0);
}

TEST(ThreadPoolTest, EveryPieceRunsOnce) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (int round = 0; round < 300; ++round) {
      const int pieces = round % 40;
      std::vector<std::atomic<int>> runs(static_cast<size_t>(pieces));
      pool.ParallelFor(pieces, [&](int piece) { ++runs[static_cast<size_t>(piece)]; });
      for (const std::atomic<int>& count : runs) ASSERT_EQ(count.load(), 1);
    }
  }
}

TEST(ThreadPoolTest, CallersTakeTurns) {
  ThreadPool pool(2);
  std::atomic<int> total = 0;
  const auto caller = [&] {
    for (int i = 0; i < 200; ++i) pool.ParallelFor(10, [&](int) { ++total; });
  };
  std::thread other(caller);
  caller();
  other.join();
  EXPECT_EQ(total.load(), 4000);
}

TEST(ThreadPoolTest, TasksRunOnceBesidePieces) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    constexpr int kTasks = 500;
    std::vector<std::atomic<int>> runs(kTasks);
    std::atomic<int> done = 0;
    std::atomic<int> pieces = 0;
    for (int i = 0; i < kTasks; ++i) {
      pool.Post([&, i] {
        ++runs[static_cast<size_t>(i)];
        // A task may leave more to do.
        if (i % 5 == 0) pool.Post([&] { ++done; });
        ++done;
      });
      if (i % 7 == 0) pool.ParallelFor(3, [&](int) { ++pieces; });
      if (i % 11 == 0) pool.DoTask();
    }
    while (done.load() < kTasks + kTasks / 5) {
      if (!pool.DoTask()) std::this_thread::yield();
    }
    EXPECT_FALSE(pool.DoTask());
    for (const std::atomic<int>& count : runs) ASSERT_EQ(count.load(), 1);
    EXPECT_EQ(pieces.load(), (kTasks + 6) / 7 * 3);
  }
}

TEST(ThreadPoolTest, TasksBeginInOrderAndEndWithThePool) {
  std::vector<int> order;
  const auto held = std::make_shared<int>(0);
  {
    ThreadPool pool(1);
    for (int i = 0; i < 4; ++i) pool.Post([&order, held, i] { order.push_back(i); });
    EXPECT_TRUE(pool.DoTask());
    EXPECT_TRUE(pool.DoTask());
    EXPECT_EQ(held.use_count(), 3) << "a task that ran holds nothing any more";
  }
  EXPECT_EQ(order, (std::vector<int>{0, 1}));
  EXPECT_EQ(held.use_count(), 1);
}

double ExactBf16(uint16_t bits) {
  const int exponent = (bits >> 7) & 0xFF;
  const int mantissa = bits & 0x7F;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -133) : std::ldexp(128 + mantissa, exponent - 134);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}
double ExactFp16(uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1F;
  const int mantissa = bits & 0x3FF;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

// Every finite code, both ways, and the midpoints between neighbours with one step to either side.
template <typename Narrow, typename Widen, typename Exact>
void TestAllCodes(uint16_t infinity, const Narrow& narrow, const Widen& widen, const Exact& exact) {
  for (uint32_t code = 0; code <= 0xFFFF; ++code) {
    const auto bits = static_cast<uint16_t>(code);
    const auto magnitude = static_cast<uint16_t>(bits & 0x7FFF);
    const float value = widen(bits);
    if (magnitude > infinity) {
      ASSERT_TRUE(std::isnan(value)) << code;
      const uint16_t back = narrow(value);
      ASSERT_GT(back & 0x7FFF, infinity);
      ASSERT_EQ(back & 0x8000, bits & 0x8000);
      continue;
    }
    ASSERT_EQ(narrow(value), bits) << code;
    if (magnitude == infinity) {
      ASSERT_TRUE(std::isinf(value));
      continue;
    }
    ASSERT_EQ(static_cast<double>(value), exact(bits)) << code;
    if (magnitude + 1 == infinity || (bits & 0x8000) != 0) continue;
    const double middle = (exact(bits) + exact(static_cast<uint16_t>(bits + 1))) / 2.0;
    const auto tie = static_cast<float>(middle);
    ASSERT_EQ(static_cast<double>(tie), middle);
    const auto even = static_cast<uint16_t>(bits + (bits & 1));
    ASSERT_EQ(narrow(tie), even) << code;
    ASSERT_EQ(narrow(-tie), even | 0x8000) << code;
    ASSERT_EQ(narrow(std::nextafter(tie, 0.0F)), bits) << code;
    ASSERT_EQ(narrow(std::nextafter(tie, INFINITY)), bits + 1) << code;
  }
}

TEST(FloatFormatsTest, AllCodesOfBf16) { TestAllCodes(0x7F80, ToBf16, FromBf16, ExactBf16); }
TEST(FloatFormatsTest, AllCodesOfFp16) { TestAllCodes(0x7C00, ToFp16, FromFp16, ExactFp16); }

TEST(FloatFormatsTest, TooLargeBecomesInfinity) {
  EXPECT_EQ(ToBf16(std::numeric_limits<float>::max()), 0x7F80);
  EXPECT_EQ(ToFp16(65519.996F), 0x7BFF);
  EXPECT_EQ(ToFp16(65520.0F), 0x7C00);
  EXPECT_EQ(ToFp16(-std::numeric_limits<float>::max()), 0xFC00);
  // A NaN whose payload lies in the bits that are dropped stays a NaN.
  EXPECT_TRUE(std::isnan(FromBf16(ToBf16(std::bit_cast<float>(0x7F800001U)))));
  EXPECT_TRUE(std::isnan(FromFp16(ToFp16(std::bit_cast<float>(0x7F800001U)))));
}

}  // namespace
}  // namespace kvant::kernels
