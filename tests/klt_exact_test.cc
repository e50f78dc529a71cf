// What is coded of exact bf16 given what was decoded before: it comes back to the bit whatever both
// are, takes few bytes where they are alike, and nothing else is taken for it.
#include "node/klt_exact.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "base/random.h"
#include "kernels/float_formats.h"
#include "tests/klt_exact_golden.h"

namespace kvant::node {
namespace {

using kernels::SegmentKind;
using kernels::SegmentShape;

const KltExact& Coder() {
  static const KltExact coder;
  return coder;
}

// Segments and what was decoded of them.
struct Group : ExactGolden {
  uint64_t elements() const {
    uint64_t sum = 0;
    for (const auto& of : raw) sum += of.size();
    return sum;
  }
  // Sets each number: of a segment, a channel, a token.
  template <typename Decoded, typename Exact>
  void Fill(const Decoded& f, const Exact& x) {
    for (size_t s = 0; s < segments.size(); ++s) {
      const auto tokens = static_cast<size_t>(segments[s].shape.tokens);
      const size_t channels = decoded[s].size() / tokens;
      for (size_t i = 0; i < decoded[s].size(); ++i) {
        const int channel = static_cast<int>(i % channels);
        decoded[s][i] = f(channel);
        raw[s][At(s, i / channels, i % channels)] = x(decoded[s][i], channel);
      }
    }
  }
};

std::vector<std::byte> Encode(const Group& group) {
  std::vector<std::byte> bytes;
  Coder().Encode(group.Segments(), group.Raw(), &bytes);
  EXPECT_LE(bytes.size(), KltExact::Bound(group.segments.size(), group.elements()));
  return bytes;
}

Status Decode(const ExactGolden& group, std::span<const std::byte> bytes,
              std::vector<std::vector<uint16_t>>* raw) {
  // Memory of its own, so that a sanitizer sees the first byte read past the end.
  const std::vector<std::byte> own(bytes.begin(), bytes.end());
  std::vector<uint16_t*> to;
  raw->clear();
  for (const auto& of : group.raw) raw->emplace_back(of.size());
  for (auto& of : *raw) to.push_back(of.data());
  return Coder().Decode(own, group.Segments(), to);
}

void ExpectBack(const Group& group) {
  std::vector<std::vector<uint16_t>> raw;
  const Status status = Decode(group, Encode(group), &raw);
  ASSERT_TRUE(status.ok()) << status.ToString();
  EXPECT_EQ(raw, group.raw);
}

double BitsOfEach(const Group& group) {
  return 8.0 * static_cast<double>(Encode(group).size()) / static_cast<double>(group.elements());
}

constexpr SegmentShape kShape = {64, 2, 32};

Group KeysAndValues() {
  Group group;
  group.Add(SegmentKind::kKey, kShape);
  group.Add(SegmentKind::kValue, kShape);
  return group;
}

// Numbers around what was decoded, the error `ratio` times the size.
Group Near(double size, double ratio, Random* random) {
  Group group = KeysAndValues();
  group.Fill([&](int) { return static_cast<float>(size * random->Normal()); },
             [&](float f, int) {
               return kernels::ToBf16(f + static_cast<float>(size * ratio * random->Normal()));
             });
  return group;
}

TEST(KltExact, AllNumbersComeBackWhateverWasDecoded) {
  Random random(3);
  const float nothing = std::numeric_limits<float>::quiet_NaN();
  const float infinite = std::numeric_limits<float>::infinity();
  for (const float decoded :
       {0.0F, -0.0F, 1.0F, -3e38F, 1e-40F, 1e-20F, infinite, -infinite, nothing}) {
    Group group;
    group.Add(SegmentKind::kLatent, {64, 1, 1024});
    uint32_t next = 0;
    group.Fill([&](int) { return decoded; },
               [&](float, int) { return static_cast<uint16_t>(next++); });
    ExpectBack(group);
  }
  for (int round = 0; round < 20; ++round) {
    Group group = KeysAndValues();
    group.Fill(
        [&](int) {
          return kernels::FromBf16(static_cast<uint16_t>(random.Below(65536))) *
                 static_cast<float>(random.Unit());
        },
        [&](float, int) { return static_cast<uint16_t>(random.Below(65536)); });
    ExpectBack(group);
  }
}

TEST(KltExact, AllErrorsOfAllSizesComeBack) {
  Random random(4);
  for (int size = -126; size <= 126; size += 21) {
    for (int ratio = -30; ratio <= 30; ratio += 3)
      ExpectBack(Near(std::ldexp(1, size), std::ldexp(1, ratio), &random));
  }
}

// The entropy of a normal number of deviation sigma is log2(sqrt(2 pi e) sigma); that f and x are
// rounded to ordinals adds to sigma.
TEST(KltExact, TakesLittleMoreThanTheEntropyOfTheError) {
  Random random(5);
  for (int ratio = -8; ratio <= -4; ++ratio) {
    Group group = KeysAndValues();
    const double deviation = std::ldexp(1, ratio);
    group.Fill([&](int) { return static_cast<float>(1 + random.Unit()); },
               [&](float f, int) {
                 return kernels::ToBf16(f + static_cast<float>(deviation * random.Normal()));
               });
    // 2^7 ordinals from 1 to 2.
    const double entropy = 2.05 + 0.5 * std::log2(std::pow(128 * deviation, 2) + 1.0 / 6);
    const double stream = 8.0 * 128 / static_cast<double>(group.elements());
    EXPECT_LT(BitsOfEach(group), entropy + stream + 0.2) << ratio;
  }
}

TEST(KltExact, AChannelOfWhichNothingIsMissingTakesNothing) {
  Random random(6);
  Group group = KeysAndValues();
  group.Fill([&](int channel) { return channel % 4 == 0 ? 0.0F : 1.0F + channel; },
             [&](float f, int) { return kernels::ToBf16(f); });
  EXPECT_LT(Encode(group).size(), 300u);
  ExpectBack(group);
  // Scales of its own for each channel where they differ much.
  group.Fill([&](int channel) { return std::ldexp(1.5F, -channel % 8); },
             [&](float f, int) {
               return kernels::ToBf16(f * static_cast<float>(1 + 0.01 * random.Normal()));
             });
  EXPECT_LT(BitsOfEach(group), 4.2);
  ExpectBack(group);
}

// Tables are computed, and a stream in other ones would not be read: they are the same on every
// machine, and forever.
TEST(KltExact, EveryGoldenFileReadsAndWritesToTheBit) {
  int good = 0;
  int bad = 0;
  const auto directory = std::filesystem::path(KVANT_SOURCE_DIR) / "tests" / "golden" / "klt";
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    if (entry.path().extension() != ".exact") continue;
    SCOPED_TRACE(entry.path().filename().string());
    std::ifstream in(entry.path(), std::ios::binary);
    const std::string content{std::istreambuf_iterator<char>(in), {}};
    const ExactGolden file = ParseExactGolden(content);
    EXPECT_EQ(Serialize(file), content);
    std::vector<std::vector<uint16_t>> raw;
    const Status status = Decode(file, file.extent, &raw);
    if (!file.good) {
      ++bad;
      EXPECT_EQ(status.code(), StatusCode::kDataLoss);
      continue;
    }
    ++good;
    ASSERT_TRUE(status.ok()) << status.ToString();
    EXPECT_EQ(raw, file.raw);
    std::vector<std::byte> extent;
    Coder().Encode(file.Segments(), file.Raw(), &extent);
    EXPECT_EQ(extent, file.extent);
  }
  EXPECT_GE(good, 3);
  EXPECT_GE(bad, 4);
}

TEST(KltExact, OtherBytesAreRefusedOrSayTheSame) {
  Random random(8);
  const Group group = Near(1, 0.05, &random);
  const std::vector<std::byte> bytes = Encode(group);
  std::vector<std::vector<uint16_t>> raw;
  for (size_t length = 0; length < bytes.size(); length += 1 + length / 8) {
    EXPECT_EQ(Decode(group, std::span(bytes).first(length), &raw).code(), StatusCode::kDataLoss);
  }
  std::vector<std::byte> longer = bytes;
  longer.emplace_back();
  EXPECT_EQ(Decode(group, longer, &raw).code(), StatusCode::kDataLoss);
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::byte> changed = bytes;
    for (uint64_t flips = 1 + random.Below(3); flips > 0; --flips) {
      // Scales and checksums are at the front.
      const size_t at = random.Below(random.Chance(0.5) ? 100 : bytes.size());
      changed[at] ^= static_cast<std::byte>(1 + random.Below(255));
    }
    if (random.Chance(0.1)) changed.resize(random.Below(changed.size()));
    const Status status = Decode(group, changed, &raw);
    if (status.ok()) {
      EXPECT_EQ(raw, group.raw);
    } else {
      ASSERT_EQ(status.code(), StatusCode::kDataLoss);
    }
  }
}

TEST(KltExact, AMachineThatDecodesOtherNumbersRefusesThem) {
  Random random(9);
  Group group = Near(1, 0.05, &random);
  const std::vector<std::byte> bytes = Encode(group);
  std::vector<std::vector<uint16_t>> raw;
  for (int round = 0; round < 100; ++round) {
    Group other = group;
    float& changed = other.decoded[random.Below(2)][random.Below(64 * 64)];
    changed = std::nextafter(changed * (round % 2 == 0 ? 1.0F : 1.01F), 9.0F);
    const Status status = Decode(other, bytes, &raw);
    if (status.ok()) {
      EXPECT_EQ(raw, group.raw) << "most last bits are rounded away";
    } else {
      ASSERT_EQ(status.code(), StatusCode::kDataLoss);
    }
  }
}

}  // namespace
}  // namespace kvant::node
