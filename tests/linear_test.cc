// Dense layers: agreement with double precision, and bits that depend neither on the number of
// rows nor on the number of threads; the thread pool; bf16 and fp16 over all their codes. The
// products themselves are tested in ordered_gemm_test.cc.
#include "kernels/linear.h"

#include <gtest/gtest.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <thread>

#include "base/random.h"
#include "kernels/blas.h"
#include "kernels/float_formats.h"

namespace kvant::kernels {
namespace {

OrderedWeights MakeWeights(int outputs, int inputs, Random* random) {
  std::vector<uint16_t> weights(static_cast<size_t>(outputs * inputs));
  for (uint16_t& weight : weights) weight = ToBf16(static_cast<float>(random->Normal()));
  return {weights.data(), outputs, inputs};
}

std::vector<float> MakeRows(int rows, int width, Random* random) {
  std::vector<float> x(static_cast<size_t>(rows) * static_cast<size_t>(width));
  for (float& value : x) value = static_cast<float>(random->Normal());
  return x;
}

std::vector<float> RoomFor(int rows, const OrderedWeights& weights) {
  return std::vector<float>(static_cast<size_t>(rows) * static_cast<size_t>(weights.outputs()));
}

// Largest error in units of sqrt(inputs), the size of a product of standard normals.
double ErrorOf(const OrderedWeights& weights, const std::vector<float>& x, int rows,
               const std::vector<float>& y) {
  const auto inputs = static_cast<size_t>(weights.inputs());
  const auto outputs = static_cast<size_t>(weights.outputs());
  const std::vector<float> all = weights.RowMajor();
  double worst = 0.0;
  for (size_t r = 0; r < static_cast<size_t>(rows); ++r) {
    for (size_t o = 0; o < outputs; ++o) {
      double expected = 0.0;
      for (size_t i = 0; i < inputs; ++i) {
        expected +=
            static_cast<double>(all[o * inputs + i]) * static_cast<double>(x[r * inputs + i]);
      }
      worst = std::max(worst, std::fabs(static_cast<double>(y[r * outputs + o]) - expected));
    }
  }
  return worst / std::sqrt(static_cast<double>(inputs));
}

TEST(LinearTest, AgreesWithDouble) {
  Random random(31);
  for (const int inputs : {8, 40, 63, 256, 1000, 4000}) {
    for (const int outputs : {1, 7, 130}) {
      const OrderedWeights weights = MakeWeights(outputs, inputs, &random);
      for (const int rows : {1, 3, 64}) {
        const std::vector<float> x = MakeRows(rows, inputs, &random);
        std::vector<float> y = RoomFor(rows, weights);
        const LinearProduct product = {&weights, x.data(), y.data()};
        Linear({&product, 1}, rows, nullptr);
        EXPECT_LE(ErrorOf(weights, x, rows, y), 3e-5) << inputs << " to " << outputs;
      }
    }
  }
}

// Several products at once, over any number of threads, of any number of rows.
TEST(LinearTest, NeitherThreadsNorCompanyChangeABit) {
  Random random(32);
  const OrderedWeights matrices[] = {MakeWeights(3001, 128, &random), MakeWeights(1, 700, &random),
                                     MakeWeights(96, 513, &random)};
  constexpr int kRows = 70;
  std::vector<float> x[3];
  std::vector<float> alone[3];  // each row by itself
  for (size_t i = 0; i < 3; ++i) {
    x[i] = MakeRows(kRows, matrices[i].inputs(), &random);
    alone[i] = RoomFor(kRows, matrices[i]);
    for (int row = 0; row < kRows; ++row) {
      const LinearProduct product = {&matrices[i], x[i].data() + row * matrices[i].inputs(),
                                     alone[i].data() + row * matrices[i].outputs()};
      Linear({&product, 1}, 1, nullptr);
    }
  }
  for (const int threads : {1, 2, 3}) {
    ThreadPool pool(threads);
    for (const int rows : {1, 2, 5, 64, kRows}) {
      std::vector<float> y[3];
      LinearProduct products[3];
      for (size_t i = 0; i < 3; ++i) {
        y[i] = RoomFor(rows, matrices[i]);
        products[i] = {&matrices[i], x[i].data(), y[i].data()};
      }
      Linear(products, rows, &pool);
      for (size_t i = 0; i < 3; ++i) {
        EXPECT_TRUE(std::equal(y[i].begin(), y[i].end(), alone[i].begin()))
            << threads << " threads, " << rows << " rows, product " << i;
      }
    }
  }
  Linear({}, 4, nullptr);
}

TEST(BlasTest, SaysWhichKernelsItChose) {
  const Status loaded = LoadBlas();
  ASSERT_TRUE(loaded.ok()) << loaded.ToString();
  EXPECT_FALSE(BlasCoreType().empty());
  RecordProperty("blas_core_type", BlasCoreType());
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
