// base/: what every folder leans on.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <vector>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/random.h"
#include "base/status.h"

namespace kvant {
namespace {

Result<int> Half(int value) {
  if (value % 2 != 0) return InvalidArgument("{} is odd", value);
  return value / 2;
}
Status Quarter(int value, int* out) {
  KV_ASSIGN_OR_RETURN(const int half, Half(value));
  KV_ASSIGN_OR_RETURN(*out, Half(half));
  return OkStatus();
}

TEST(StatusTest, ErrorsTravelWithTheirMessage) {
  int quarter = 0;
  EXPECT_TRUE(Quarter(12, &quarter).ok());
  EXPECT_EQ(quarter, 3);
  const Status status = Quarter(6, &quarter);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.ToString(), "INVALID_ARGUMENT: 3 is odd");
}

TEST(StatusDeathTest, ValueOfAnErrorIsOurMistake) {
  const Result<int> result = Half(3);
  EXPECT_DEATH(static_cast<void>(*result), "internal error");
}

TEST(RandomTest, SequenceIsTheSameEverywhere) {
  Random random(42);
  EXPECT_EQ(random.Next(), 1546998764402558742U);
  EXPECT_EQ(random.Next(), 6990951692964543102U);
  Random again(42);
  EXPECT_EQ(again.Next(), 1546998764402558742U);
}

TEST(RandomTest, BelowIsUniform) {
  Random random(1);
  std::array<int, 7> counts{};
  for (int i = 0; i < 70'000; ++i) ++counts[random.Below(7)];
  for (const int count : counts) EXPECT_NEAR(count, 10'000, 500);
}

TEST(RandomTest, NormalHasUnitVariance) {
  Random random(2);
  double sum = 0;
  double squares = 0;
  constexpr int kDraws = 100'000;
  for (int i = 0; i < kDraws; ++i) {
    const double x = random.Normal();
    sum += x;
    squares += x * x;
  }
  EXPECT_NEAR(sum / kDraws, 0.0, 0.02);
  EXPECT_NEAR(squares / kDraws, 1.0, 0.03);
}

TEST(RandomTest, ForksDiffer) {
  const Random random(3);
  EXPECT_NE(random.Fork(1).Next(), random.Fork(2).Next());
  EXPECT_NE(SecureRandomUint64(), SecureRandomUint64());
}

TEST(ClockTest, ManualClockStandsStill) {
  ManualClock clock;
  const TimePoint start = clock.Now();
  clock.Advance(std::chrono::milliseconds(5));
  EXPECT_DOUBLE_EQ(Milliseconds(clock.Now() - start), 5.0);
  EXPECT_DEATH(clock.AdvanceTo(start), "internal error");
}

TEST(BytesTest, LittleEndianAndRanges) {
  std::array<std::byte, 4> bytes{};
  StoreLittle<uint32_t>(bytes.data(), 0x01020304);
  EXPECT_EQ(ToHex(bytes), "04030201");
  EXPECT_EQ(LoadLittle<uint32_t>(bytes.data()), 0x01020304U);
  EXPECT_TRUE(RangeFits(4, 0, 4));
  EXPECT_FALSE(RangeFits(5, 0, 4));
  EXPECT_FALSE(RangeFits(1, UINT64_MAX, 4));
}

}  // namespace
}  // namespace kvant
