// Levels of conditional transform coding: their places, rounding and bytes.
#include "node/klt_levels.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/bytes.h"
#include "base/random.h"

namespace kvant::node {
namespace {

using testing::HasSubstr;

constexpr float kMaxFloat = std::numeric_limits<float>::max();
constexpr float kMinFloat = std::numeric_limits<float>::denorm_min();

std::vector<int32_t> All(const KltLevelsRead& read) {
  std::vector<int32_t> levels;
  for (size_t i = 0; i < read.size(); ++i) levels.push_back(read.Level(i));
  return levels;
}

KltLevelsRead Of(const std::vector<int32_t>& levels) {
  KltLevelsRead read;
  read.Reset(levels.size());
  for (size_t i = 0; i < levels.size(); ++i) read.Set(i, levels[i]);
  return read;
}

// Of one token.
KltPlaces Coded(const std::vector<KltPlace>& places) {
  KltPlaces coded;
  for (size_t c = 0; c < places.size(); ++c) coded.Add(c, places[c]);
  coded.EndToken();
  return coded;
}

class KltLevelsTest : public testing::Test {
 protected:
  KltLevelsTest() {
    for (size_t table = 0; table < kKltTables; ++table) {
      std::array<uint32_t, kKltSymbols> counts{};
      // Some symbols have no frequency: what calibration never saw.
      for (size_t s = 0; s < kKltSymbols; ++s)
        counts[s] =
            static_cast<uint32_t>(random_.Below(5)) * (kKltSymbols - static_cast<uint32_t>(s));
      counts[kKltSymbols - 1] += 1;
      statistics_.tables.push_back(kernels::RansTable::FromCounts(counts));
      for (float& mean : statistics_.mean[table])
        mean = static_cast<float>(0.2 * (random_.Unit() - 0.5));
      if (!KltTableRefines(table)) statistics_.mean[table][0] = 0;
    }
  }
  KltPlace RandomPlace() {
    KltPlace place{static_cast<int16_t>(random_.Below(kKltTables + 10)), 0};
    if (place.table >= kKltTables) return {};
    if (place.table >= kKltRatios && place.table < kKltFirstTables)
      place.low_bits = static_cast<int16_t>(1 + random_.Below(kKltMostLowBits));
    return place;
  }
  int32_t RandomLevel() {
    const auto magnitude = static_cast<int32_t>(std::exp2(21 * random_.Unit()) - 1);
    return std::min(magnitude, kKltLargestLevel) * (random_.Chance(0.5) ? 1 : -1);
  }

  Random random_{7};
  KltStatistics statistics_;
};

TEST_F(KltLevelsTest, FirstPlacesCoverEveryDeviation) {
  for (float deviation = 0.115F; deviation < 7.3F; deviation *= 1.013F) {
    const int quarter = static_cast<int>(std::floor(4 * std::log2(deviation) + 0.5));
    EXPECT_EQ(FirstPlace(KltQuarters(deviation, 1)).table, quarter - 4 * kKltLowest) << deviation;
    EXPECT_EQ(FirstPlace(KltQuarters(deviation, 1)).low_bits, 0);
  }
  EXPECT_EQ(FirstPlace(KltQuarters(0, 1)).table, -1);
  EXPECT_EQ(FirstPlace(KltQuarters(-1, 1)).table, -1);
  EXPECT_EQ(FirstPlace(KltQuarters(0.11F, 1)).table, -1);
  for (float deviation = 0.12F; deviation < 1e5F; deviation *= 1.1F) {
    const KltPlace place = FirstPlace(KltQuarters(deviation, 1));
    ASSERT_GE(place.table, 0);
    ASSERT_LT(place.table, kKltFirstTables);
    // What is left after the low bits are cut fits the symbols with room.
    EXPECT_LT(deviation / std::exp2(static_cast<float>(place.low_bits)), 8.0F);
    EXPECT_EQ(FirstPlace(KltQuarters(8 * deviation, 8)).table, place.table)
        << "only the ratio counts";
  }
}

TEST_F(KltLevelsTest, RefinedPlacesCoverEveryDeviation) {
  for (int refinement = 1; refinement <= kKltRefinements; ++refinement) {
    for (float deviation = 0.001F; deviation < 1e5F; deviation *= 1.1F) {
      const int quarter = static_cast<int>(std::floor(4 * std::log2(deviation) + 0.5));
      const int ratio = std::clamp(quarter - 4 * kKltLowest, 0, kKltRatios - 1);
      const int first = kKltFirstTables + (refinement - 1) * 2 * kKltRatios;
      const KltPlace of_zero = RefinedPlace(refinement, false, KltQuarters(deviation, 1));
      EXPECT_EQ(of_zero.table, quarter < 4 * kKltLowest ? -1 : first + ratio) << deviation;
      EXPECT_EQ(of_zero.low_bits, 0);
      // What was not 0 goes on being said.
      const KltPlace of_other = RefinedPlace(refinement, true, KltQuarters(deviation, 1));
      EXPECT_EQ(of_other.table, first + kKltRatios + ratio) << deviation;
      EXPECT_EQ(of_other.low_bits, 0);
    }
    EXPECT_EQ(RefinedPlace(refinement, true, KltQuarters(0, 1)).table, -1);
  }
}

TEST_F(KltLevelsTest, PlacesOfExtremesExist) {
  const KltLevels levels(statistics_);
  for (const float deviation : {kMinFloat, 1e-30F, 1.0F, 1e30F, kMaxFloat}) {
    for (const float step : {kMinFloat, 1e-30F, 1.0F, 1e30F, kMaxFloat}) {
      std::vector<KltPlace> places = {FirstPlace(KltQuarters(deviation, step))};
      for (const bool significant : {false, true})
        places.push_back(RefinedPlace(kKltRefinements, significant, KltQuarters(deviation, step)));
      for (const KltPlace place : places) {
        EXPECT_GE(place.table, -1);
        EXPECT_LT(place.table, kKltTables);
        EXPECT_GE(place.low_bits, 0);
        EXPECT_LE(place.low_bits, kKltMostLowBits);
      }
      const KltPlaces coded = Coded(places);
      const std::vector<int32_t> written(coded.coded(), kKltLargestLevel);
      std::vector<std::byte> bytes;
      levels.Write(Of(written), coded, &bytes);
      KltLevelsRead read;
      ASSERT_TRUE(levels.Read(bytes, coded, &read).ok());
      EXPECT_EQ(All(read), written);
    }
  }
}

TEST_F(KltLevelsTest, FoldingIsUndone) {
  EXPECT_EQ(Folded(0), 0U);
  EXPECT_EQ(Folded(1), 1U);
  EXPECT_EQ(Folded(-1), 2U);
  EXPECT_EQ(Folded(2), 3U);
  for (int32_t level = -kKltLargestLevel; level <= kKltLargestLevel; level += 37)
    EXPECT_EQ(Unfolded(Folded(level)), level);
  for (const int32_t level : {kKltLargestLevel, -kKltLargestLevel})
    EXPECT_EQ(Unfolded(Folded(level)), level);
}

TEST_F(KltLevelsTest, ReadsWhatItWrote) {
  const KltLevels levels(statistics_);
  for (const size_t count : {0U, 1U, 5U, 1000U}) {
    std::vector<KltPlace> all;
    for (size_t i = 0; i < count; ++i) all.push_back(RandomPlace());
    const KltPlaces places = Coded(all);
    // Most are 0, often many in a row.
    std::vector<int32_t> written(places.coded());
    for (int32_t& level : written) level = random_.Chance(0.1) ? RandomLevel() : 0;
    std::vector<std::byte> bytes(3);  // Write appends
    levels.Write(Of(written), places, &bytes);
    KltLevelsRead read;
    read.Reset(7);
    read.Set(3, kKltLargestLevel);
    const Status status = levels.Read(std::span(bytes).subspan(3), places, &read);
    ASSERT_TRUE(status.ok()) << status.ToString();
    EXPECT_EQ(All(read), written);
    std::vector<uint16_t> not_zero;
    for (size_t i = 0; i < written.size(); ++i) {
      if (written[i] != 0) not_zero.push_back(static_cast<uint16_t>(i));
      EXPECT_EQ(read.NotZeroWord(i) & 1U, written[i] != 0 ? 1U : 0U);
      EXPECT_EQ(read.NotZeroWord(i / 64 * 64) >> (i % 64) & 1U, written[i] != 0 ? 1U : 0U);
      EXPECT_EQ(levels.ValueAt(i, read, places), levels.Value(written[i], places.At(i)));
    }
    std::vector<uint16_t> at(written.size() + KltLevelsRead::kPadding);
    at.resize(read.NotZero(0, written.size(), at.data()));
    EXPECT_EQ(at, not_zero);
  }
}

TEST_F(KltLevelsTest, RoundsAllAsEach) {
  for (const bool calibrated : {true, false}) {
    const KltLevels levels(calibrated ? statistics_ : KltStatistics());
    for (const size_t count : {0U, 1U, 5U, 1000U}) {
      std::vector<KltPlace> all;
      for (size_t i = 0; i < count; ++i) all.push_back(RandomPlace());
      const KltPlaces places = Coded(all);
      std::vector<float> x(places.coded());
      for (float& of : x) {
        of = static_cast<float>(random_.Normal() * (random_.Chance(0.9) ? 2 : 1000));
        if (random_.Chance(0.01)) of = NAN;
      }
      KltLevelsRead rounded;
      levels.RoundAll(x, places, &rounded);
      for (size_t i = 0; i < x.size(); ++i)
        EXPECT_EQ(rounded.Level(i), levels.Round(x[i], places.At(i)));
    }
  }
}

TEST_F(KltLevelsTest, RoundsToTheLevelThatCostsLeast) {
  const KltLevels levels(statistics_);
  for (int trial = 0; trial < 2000; ++trial) {
    const KltPlace place = RandomPlace();
    if (place.table < 0) continue;
    const auto x = static_cast<float>(20 * random_.Normal());
    const int32_t level = levels.Round(x, place);
    const float away = std::abs(x - levels.Value(level, place));
    EXPECT_LE(std::abs(x - static_cast<float>(level)), 1);
    if (place.low_bits > 0) {
      EXPECT_LE(away, 0.5F);
      continue;
    }
    // The nearest is only left for one that takes fewer bits.
    for (const int32_t other : {level - 1, level + 1}) {
      if (std::abs(x - levels.Value(other, place)) >= away) continue;
      const auto frequency = [&](int32_t of) {
        return statistics_.tables[static_cast<size_t>(place.table)].frequency(
            levels.SymbolOf(of, place));
      };
      const bool escapes = levels.SymbolOf(other, place) == kKltSymbols - 1;
      EXPECT_TRUE(escapes || frequency(other) < frequency(level));
    }
  }
}

TEST_F(KltLevelsTest, WithoutTablesRoundsToTheNearest) {
  const KltLevels levels(KltStatistics{});
  EXPECT_EQ(levels.Round(0.49F, {3, 0}), 0);
  EXPECT_EQ(levels.Round(0.51F, {3, 0}), 1);
  EXPECT_EQ(levels.Round(-7.4F, {3, 0}), -7);
  EXPECT_EQ(levels.Value(-7, {3, 0}), -7.0F);
}

TEST_F(KltLevelsTest, LargeNumbersAreClamped) {
  for (const KltStatistics& statistics : {KltStatistics{}, statistics_}) {
    const KltLevels levels(statistics);
    for (const KltPlace place : {KltPlace{3, 0}, KltPlace{kKltRatios, 4}}) {
      for (const float x : {2e6F, 1e30F, kMaxFloat, std::numeric_limits<float>::infinity()}) {
        EXPECT_NEAR(levels.Round(x, place), kKltLargestLevel, 1);
        EXPECT_NEAR(levels.Round(-x, place), -kKltLargestLevel, 1);
        EXPECT_LE(std::abs(levels.Round(x, place)), kKltLargestLevel);
      }
      EXPECT_LE(std::abs(levels.Round(NAN, place)), kKltLargestLevel);
    }
  }
}

// A stream of one escaped symbol at this place, followed by low bits of our own.
class KltEscapes : public KltLevelsTest {
 protected:
  Status ReadEscaped(KltPlace place, uint64_t low, int bits, int32_t* level) {
    const KltLevels levels(statistics_);
    std::vector<std::byte> bytes;
    const KltPlaces places = Coded({place});
    levels.Write(Of({kKltLargestLevel}), places, &bytes);
    EXPECT_EQ(levels.SymbolOf(kKltLargestLevel, place), kKltSymbols - 1);
    bytes.resize(sizeof(uint32_t) + LoadLittle<uint32_t>(bytes.data()));
    for (int bit = 0; bit < bits; bit += 8) bytes.push_back(static_cast<std::byte>(low >> bit));
    KltLevelsRead read;
    KV_RETURN_IF_ERROR(levels.Read(bytes, places, &read));
    *level = read.Level(0);
    return OkStatus();
  }
};

TEST_F(KltEscapes, LevelsThatAreTooLargeAreRefused) {
  int32_t level = 0;
  const KltPlace plain{0, 0};
  EXPECT_TRUE(ReadEscaped(plain, 2 * kKltLargestLevel, 22, &level).ok());
  EXPECT_EQ(level, -kKltLargestLevel);
  const Status status = ReadEscaped(plain, 2 * kKltLargestLevel + 1, 22, &level);
  EXPECT_EQ(status.code(), StatusCode::kDataLoss);
  EXPECT_THAT(status.message(), HasSubstr("too large"));
  EXPECT_THAT(status.message(), HasSubstr("another pack"));
  // Too large only once its low bits are there; and so large that 32 bits don't hold it.
  const KltPlace lower{kKltRatios, 15};
  EXPECT_TRUE(ReadEscaped(lower, 64, 37, &level).ok());
  EXPECT_EQ(level, -kKltLargestLevel);
  EXPECT_FALSE(ReadEscaped(lower, uint64_t{1} << 22 | 64, 37, &level).ok());
  EXPECT_FALSE(ReadEscaped(lower, 65, 37, &level).ok());
  EXPECT_FALSE(ReadEscaped(lower, 1U << 17, 37, &level).ok());
}

TEST_F(KltEscapes, BytesThatLackOrAreLeftOverAreRefused) {
  int32_t level = 0;
  EXPECT_THAT(ReadEscaped({0, 0}, 5, 16, &level).message(), HasSubstr("end too early"));
  EXPECT_THAT(ReadEscaped({0, 0}, 5, 32, &level).message(), HasSubstr("left over"));
  const KltLevels levels(statistics_);
  std::vector<std::byte> bytes(3);
  KltLevelsRead read;
  EXPECT_THAT(levels.Read(bytes, {}, &read).message(), HasSubstr("too short"));
  bytes.resize(sizeof(uint32_t));
  StoreLittle(bytes.data(), uint32_t{1});
  EXPECT_THAT(levels.Read(bytes, {}, &read).message(), HasSubstr("longer than an extent"));
}

}  // namespace
}  // namespace kvant::node
