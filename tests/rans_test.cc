// rANS: tables, round trips with one table and with one a symbol, every implementation beside the
// reference, and what a decoder refuses.
#include "kernels/rans.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "tests/lossless_fixtures.h"

namespace kvant::kernels {
namespace {

const Implementation& Reference() { return *Implementations().back(); }

std::vector<const Implementation*> All() {
  std::vector<const Implementation*> all;
  for (const Implementation* implementation : Implementations()) {
    if (implementation->runs_here()) all.push_back(implementation);
  }
  return all;
}

int Sum(const RansTable& table) {
  int sum = 0;
  for (int s = 0; s < kRansSymbols; ++s) sum += table.frequency(s);
  return sum;
}

TEST(RansTableTest, FrequenciesSumUpAndKeepEverySymbolThatCounts) {
  Random random(1);
  for (int round = 0; round < 2000; ++round) {
    std::vector<uint32_t> counts(1 + random.Below(kRansSymbols));
    for (uint32_t& count : counts) {
      if (random.Chance(0.8)) count = static_cast<uint32_t>(random.Next() >> random.Below(64));
    }
    counts[random.Below(counts.size())] += 1 + (round % 2 == 0 ? 0U : 0xFFFF0000U);
    const RansTable table = RansTable::FromCounts(counts);
    EXPECT_EQ(Sum(table), kRansTotal);
    for (size_t s = 0; s < counts.size(); ++s) {
      EXPECT_EQ(table.frequency(static_cast<int>(s)) > 0, counts[s] > 0);
    }
  }
}

TEST(RansTableTest, CountsThatFitStayAsTheyAre) {
  const std::vector<uint32_t> counts = {2048, 0, 1024, 1023, 1};
  const RansTable table = RansTable::FromCounts(counts);
  for (int s = 0; s < 5; ++s) EXPECT_EQ(table.frequency(s), counts[static_cast<size_t>(s)]);
  EXPECT_EQ(table.symbols(), 5);
}

TEST(RansTableTest, PairsAreProducts) {
  const RansTable table = RansTable::FromCounts(std::vector<uint32_t>{2048, 1024, 0, 1024});
  const RansTable pairs = RansTable::OfPairs(table);
  EXPECT_EQ(pairs.frequency(0), 1024);
  EXPECT_EQ(pairs.frequency(1), 512);
  EXPECT_EQ(pairs.frequency(16), 512);
  EXPECT_EQ(pairs.frequency(2), 0);
  EXPECT_EQ(pairs.frequency(16 * 3 + 3), 256);
  EXPECT_EQ(pairs.symbols(), 16 * 3 + 4);
}

TEST(RansTableTest, SurvivesItsBytes) {
  Random random(2);
  for (int alphabet = 1; alphabet <= kRansSymbols; alphabet += 5) {
    const RansTable table = MakeRansCase(300, alphabet, 1, &random).tables[0];
    std::vector<std::byte> bytes;
    table.AppendTo(&bytes);
    EXPECT_LE(bytes.size(), kRansSymbols * 2 + 1U);
    bytes.push_back(std::byte{7});
    std::span<const std::byte> in = bytes;
    const Result<RansTable> read = RansTable::Parse(&in);
    ASSERT_TRUE(read.ok()) << read.status().ToString();
    EXPECT_EQ(in.size(), 1U);
    for (int s = 0; s < kRansSymbols; ++s) EXPECT_EQ(read->frequency(s), table.frequency(s));
    for (size_t length = 0; length + 1 < bytes.size(); ++length) {
      in = std::span(bytes).first(length);
      EXPECT_EQ(RansTable::Parse(&in).status().code(), StatusCode::kDataLoss);
    }
  }
}

TEST(RansTest, EveryImplementationFindsWhatIsNotZero) {
  Random random(9);
  for (int round = 0; round < 4000; ++round) {
    const size_t before = random.Below(20);
    std::vector<uint8_t> bytes(before + random.Below(round % 100 == 0 ? 66'000 : 130));
    if (bytes.size() > before + 65'536) bytes.resize(before + 65'536);
    const double share = random.Chance(0.2) ? 1 : random.Chance(0.2) ? 0 : 0.2;
    for (uint8_t& byte : bytes) {
      if (random.Chance(share)) byte = static_cast<uint8_t>(1 + random.Below(255));
    }
    std::vector<uint16_t> expected;
    for (size_t i = before; i < bytes.size(); ++i) {
      if (bytes[i] != 0) expected.push_back(static_cast<uint16_t>(i - before));
    }
    for (const Implementation* implementation : All()) {
      // At their size, so that a sanitizer sees what is read or written beyond.
      std::vector<uint16_t> found(expected.size() + 32);
      found.resize(
          implementation->not_zero(bytes.data() + before, bytes.size() - before, found.data()));
      EXPECT_EQ(found, expected) << implementation->name << ": of " << bytes.size() - before;
    }
  }
}

TEST(RansTest, EveryImplementationRoundsTheSame) {
  constexpr size_t kTables = 7;
  Random random(10);
  std::vector<float> parted(kTables * kRoundedLevels);
  for (size_t i = 0; i < parted.size(); ++i) {
    const auto below = static_cast<int>(i % kRoundedLevels) - kRoundedLevels / 2;
    parted[i] = static_cast<float>(below + 1.2 * random.Unit() - 0.1);
  }
  for (int round = 0; round < 3000; ++round) {
    const size_t count = random.Below(100);
    std::vector<float> x(count);
    std::vector<uint8_t> table(count);
    bool near = true;
    std::vector<int32_t> expected(count);
    for (size_t i = 0; i < count; ++i) {
      table[i] = static_cast<uint8_t>(random.Below(kTables));
      x[i] = static_cast<float>(random.Normal() * (random.Chance(0.9) ? 2 : 8));
      if (random.Chance(0.1)) x[i] = std::round(x[i]);
      if (random.Chance(0.002)) x[i] = random.Chance(0.5) ? NAN : -INFINITY;
      const bool here = std::abs(x[i]) < kRoundedLevels / 2 - 1;
      near = near && here;
      const float value = here ? x[i] : 0;
      const auto below = static_cast<int>(std::floor(value));
      const auto at = static_cast<size_t>(table[i] * kRoundedLevels + below + kRoundedLevels / 2);
      expected[i] = value < parted[at] ? below : below + 1;
    }
    for (const Implementation* implementation : All()) {
      std::vector<uint8_t> folded(count);
      EXPECT_EQ(
          implementation->round_levels(x.data(), table.data(), count, parted.data(), folded.data()),
          near);
      for (size_t i = 0; i < count; ++i) {
        EXPECT_EQ(folded[i], expected[i] > 0 ? 2 * expected[i] - 1 : -2 * expected[i])
            << implementation->name;
      }
    }
  }
}

TEST(RansTest, EveryImplementationWritesAndReadsTheSame) {
  Random random(3);
  for (const size_t count : {0, 1, 31, 32, 33, 63, 64, 1000, 4096, 5003}) {
    for (const int alphabet : {1, 2, 15, 16, 17, 256}) {
      for (const int tables : {1, 3, kRansMaxTables}) {
        const RansCase made = MakeRansCase(count, alphabet, tables, &random);
        const std::vector<std::byte> expected = EncodeRans(Reference(), made);
        EXPECT_LE(expected.size(), RansBound(count));
        RansDecodeTables decode;
        decode.Assign(made.tables);
        EXPECT_EQ(decode.tables(), tables);
        for (const Implementation* implementation : All()) {
          EXPECT_EQ(EncodeRans(*implementation, made), expected) << implementation->name;
          std::vector<uint8_t> symbols(count, 0x55);
          const Status status =
              RansDecode(*implementation, decode, made.choice(), expected, symbols);
          EXPECT_TRUE(status.ok()) << implementation->name << " " << status.ToString();
          EXPECT_EQ(symbols, made.symbols) << implementation->name;
        }
      }
    }
  }
}

TEST(RansTest, TakesLittleMoreThanTheEntropy) {
  // P(k) = 2^-(k + 1): exact in 1/4096, 2 bits a symbol.
  Random random(4);
  RansCase made;
  std::vector<uint32_t> counts;
  for (uint32_t k = 0; k < 11; ++k) counts.push_back(1U << (11 - k));
  ++counts.back();
  made.tables.push_back(RansTable::FromCounts(counts));
  double bits = 0.0;
  for (int i = 0; i < 100000; ++i) {
    const auto symbol = static_cast<uint8_t>(std::min(10, std::countl_zero(random.Next() | 1)));
    made.symbols.push_back(symbol);
    bits += 12.0 - std::log2(made.tables[0].frequency(symbol));
  }
  const double found = 8.0 * static_cast<double>(EncodeRans(ActiveImplementation(), made).size());
  EXPECT_LT(found, 1.0005 * bits + 8 * 128);
}

TEST(RansTest, RefusesWhatDoesNotEndWhereItMust) {
  Random random(5);
  const RansCase made = MakeRansCase(500, 40, 1, &random);
  const std::vector<std::byte> good = EncodeRans(Reference(), made);
  RansDecodeTables decode;
  decode.Assign(made.tables);
  for (const Implementation* implementation : All()) {
    std::vector<uint8_t> symbols(made.symbols.size());
    const auto code = [&](std::span<const std::byte> bytes, size_t count) {
      return RansDecode(*implementation, decode, nullptr, bytes, std::span(symbols).first(count))
          .code();
    };
    EXPECT_EQ(code(good, symbols.size()), StatusCode::kOk);
    for (size_t length = 0; length < good.size(); ++length) {
      const std::vector<std::byte> cut(good.begin(), good.begin() + static_cast<ptrdiff_t>(length));
      EXPECT_EQ(code(cut, symbols.size()), StatusCode::kDataLoss);
    }
    std::vector<std::byte> longer = good;
    longer.push_back(std::byte{0});
    EXPECT_EQ(code(longer, symbols.size()), StatusCode::kDataLoss);
    longer.push_back(std::byte{0});
    EXPECT_EQ(code(longer, symbols.size()), StatusCode::kDataLoss);
    EXPECT_EQ(code(good, symbols.size() - 1), StatusCode::kDataLoss);
  }
}

TEST(RansTest, FlippedBytesGiveTheSameAnswerEverywhere) {
  Random random(6);
  for (const int tables : {1, 4}) {
    const RansCase made = MakeRansCase(400, 20, tables, &random);
    const std::vector<std::byte> good = EncodeRans(Reference(), made);
    RansDecodeTables decode;
    decode.Assign(made.tables);
    for (size_t at = 0; at < good.size(); ++at) {
      std::vector<std::byte> bad = good;
      bad[at] ^= static_cast<std::byte>(1 + random.Below(255));
      std::vector<uint8_t> expected(made.symbols.size());
      const Status status = RansDecode(Reference(), decode, made.choice(), bad, expected);
      for (const Implementation* implementation : All()) {
        std::vector<uint8_t> symbols(made.symbols.size());
        EXPECT_EQ(RansDecode(*implementation, decode, made.choice(), bad, symbols), status);
        EXPECT_EQ(symbols, expected) << implementation->name;
      }
    }
  }
}

}  // namespace
}  // namespace kvant::kernels
