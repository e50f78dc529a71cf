// Codecs: sizes, declared errors, embedding, what check() refuses, extreme inputs.
#include "kernels/codec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "kernels/implementation.h"
#include "kernels/payload_layout.h"
#include "tests/kernel_fixtures.h"

namespace kvant::kernels {
namespace {

constexpr SegmentKind kKinds[] = {SegmentKind::kKey, SegmentKind::kValue};

double MaxError(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    error = std::max(error, std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  }
  return error;
}

TEST(CodecTest, TableIsFoundByIdAndByName) {
  for (const Codec* codec : Codecs()) {
    EXPECT_EQ(FindCodec(codec->id), codec);
    const Result<const Codec*> found = FindCodec(codec->name);
    ASSERT_TRUE(found.ok());
    EXPECT_EQ(*found, codec);
  }
  EXPECT_EQ(FindCodec(static_cast<CodecId>(99)), nullptr);
  const Status unknown = FindCodec("zip").status();
  EXPECT_EQ(unknown.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(unknown.message().find("raw, tile8, tile4"), std::string::npos) << unknown.message();
}

TEST(CodecTest, ErrorIsAsDeclaredForEveryTailAndShape) {
  Random random(1);
  for (const Codec* codec : Codecs()) {
    for (const int head_dim : {8, 24, 64, 72, 96, 128, 256}) {
      for (int tokens = 1; tokens <= kMaxBlockTokens; tokens += head_dim > 64 ? 9 : 1) {
        const SegmentShape shape = {tokens, 2, head_dim};
        const std::vector<float> x = MakeSegment(shape, &random);
        for (const SegmentKind kind : kKinds) {
          const EncodedSegment segment = Encode(*codec, kind, shape, x.data());
          ASSERT_TRUE(
              codec->check(kind, shape, segment.Ranges(segment.cuts), segment.Sizes(segment.cuts))
                  .ok());
          double before = std::numeric_limits<double>::infinity();
          for (int cuts = 1; cuts <= segment.cuts; ++cuts) {
            const double error = MaxError(x, Decode(*codec, kind, shape, segment, cuts));
            const double declared = segment.max_error[static_cast<size_t>(cuts - 1)];
            ASSERT_LE(error, declared) << codec->name << " " << tokens << "x" << head_dim;
            ASSERT_GE(error, declared * 0.999999);
            ASSERT_LE(error, before);
            before = error;
          }
        }
      }
    }
  }
}

TEST(CodecTest, BitsPerElementAreAsDocumented) {
  const SegmentShape shape = {64, 4, 64};
  const auto bits = [&](const char* name, SegmentKind kind, int cuts) {
    const Codec& codec = **FindCodec(name);
    size_t bytes = 0;
    for (int cut = 0; cut < cuts; ++cut) bytes += codec.range_bytes(kind, shape, cut);
    return 8.0 * static_cast<double>(bytes) / static_cast<double>(Elements(shape));
  };
  EXPECT_EQ(bits("raw", SegmentKind::kKey, 1), 16.0);
  EXPECT_EQ(bits("raw-fp32", SegmentKind::kValue, 1), 32.0);
  EXPECT_EQ(bits("tile8", SegmentKind::kKey, 1), 4.25);
  EXPECT_EQ(bits("tile8", SegmentKind::kKey, 2), 8.25);
  EXPECT_EQ(bits("tile8", SegmentKind::kValue, 1), 4.25);
  EXPECT_EQ(bits("tile8", SegmentKind::kValue, 2), 8.25);
  EXPECT_EQ(bits("tile4", SegmentKind::kKey, 1), 2.5);
  EXPECT_EQ(bits("tile4", SegmentKind::kKey, 2), 4.5);
  EXPECT_EQ(bits("tile4", SegmentKind::kValue, 2), 4.25);
}

TEST(CodecTest, RawKeepsWhatItsTypeHolds) {
  const SegmentShape shape = {3, 2, 8};
  std::vector<float> x(Elements(shape));
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i) - 20.0F;
  for (const char* name : {"raw", "raw-fp16", "raw-fp32"}) {
    const Codec& codec = **FindCodec(name);
    for (const SegmentKind kind : kKinds) {
      const EncodedSegment segment = Encode(codec, kind, shape, x.data());
      EXPECT_EQ(Decode(codec, kind, shape, segment, 1), x) << name;
      EXPECT_EQ(segment.max_error[0], 0.0F);
    }
  }
}

TEST(CodecTest, ExtremeInputsStayFinite) {
  constexpr float kMax = std::numeric_limits<float>::max();
  constexpr float kTiny = std::numeric_limits<float>::denorm_min();
  const SegmentShape shape = {5, 1, 72};
  const std::vector<float> pattern = {0.0F, -0.0F,  kTiny,     -kTiny, kMax, -kMax,
                                      1.0F, 1e-30F, 0x1p-126F, 1e30F,  3.0F, 65520.0F};
  for (size_t kinds_of_values = 1; kinds_of_values <= pattern.size(); ++kinds_of_values) {
    std::vector<float> x(Elements(shape));
    for (size_t i = 0; i < x.size(); ++i) x[i] = pattern[(i * 7) % kinds_of_values];
    for (const Codec* codec : Codecs()) {
      for (const SegmentKind kind : kKinds) {
        const EncodedSegment segment = Encode(*codec, kind, shape, x.data());
        const Status checked =
            codec->check(kind, shape, segment.Ranges(segment.cuts), segment.Sizes(segment.cuts));
        EXPECT_TRUE(checked.ok()) << checked.ToString();
        for (int cuts = 1; cuts <= segment.cuts; ++cuts) {
          const std::vector<float> decoded = Decode(*codec, kind, shape, segment, cuts);
          for (const float value : decoded) ASSERT_TRUE(std::isfinite(value)) << codec->name;
          EXPECT_LE(MaxError(x, decoded), segment.max_error[static_cast<size_t>(cuts - 1)])
              << codec->name;
        }
      }
    }
  }
}

TEST(CodecTest, ZerosDecodeToZerosAtEveryCut) {
  const SegmentShape shape = {17, 2, 64};
  const std::vector<float> x(Elements(shape), 0.0F);
  for (const Codec* codec : Codecs()) {
    for (const SegmentKind kind : kKinds) {
      const EncodedSegment segment = Encode(*codec, kind, shape, x.data());
      for (int cuts = 1; cuts <= segment.cuts; ++cuts) {
        EXPECT_EQ(Decode(*codec, kind, shape, segment, cuts), x) << codec->name;
      }
    }
  }
}

TEST(CodecTest, CheckRefusesWrongSizesAndCounts) {
  Random random(2);
  const SegmentShape shape = {20, 2, 64};
  const std::vector<float> x = MakeSegment(shape, &random);
  for (const Codec* codec : Codecs()) {
    for (const SegmentKind kind : kKinds) {
      const EncodedSegment segment = Encode(*codec, kind, shape, x.data());
      const SegmentRanges all = segment.Ranges(segment.cuts);
      for (int cut = 0; cut < segment.cuts; ++cut) {
        for (const int change : {-1, 1}) {
          std::vector<size_t> sizes = segment.Sizes(segment.cuts);
          sizes[static_cast<size_t>(cut)] += static_cast<size_t>(change);
          EXPECT_EQ(codec->check(kind, shape, all, sizes).code(), StatusCode::kDataLoss);
        }
      }
      EXPECT_EQ(codec->check(kind, shape, all, {}).code(), StatusCode::kDataLoss);
      SegmentRanges none = all;
      none.cuts = 0;
      EXPECT_EQ(codec->check(kind, shape, none, {}).code(), StatusCode::kDataLoss);
      SegmentRanges many = all;
      many.cuts = segment.cuts + 1;
      EXPECT_EQ(codec->check(kind, shape, many, segment.Sizes(segment.cuts)).code(),
                StatusCode::kDataLoss);
      for (const SegmentShape bad :
           {SegmentShape{0, 2, 64}, SegmentShape{65, 2, 64}, SegmentShape{20, 0, 64},
            SegmentShape{20, 2, 63}, SegmentShape{20, 2, 1032}, SegmentShape{20, 2000, 64}}) {
        EXPECT_EQ(codec->check(kind, bad, all, segment.Sizes(segment.cuts)).code(),
                  StatusCode::kDataLoss);
      }
    }
  }
}

TEST(CodecTest, CheckRefusesImpossibleScales) {
  Random random(3);
  const SegmentShape shape = {20, 2, 72};
  const std::vector<float> x = MakeSegment(shape, &random);
  for (const char* name : {"tile8", "tile4"}) {
    const Codec& codec = **FindCodec(name);
    for (const SegmentKind kind : kKinds) {
      EncodedSegment segment = Encode(codec, kind, shape, x.data());
      const size_t head_bytes = segment.bytes[0].size() / 2;
      const size_t scales = kind == SegmentKind::kKey ? 72 : 40;
      // +inf, NaN, -0, negative, subnormal, above 2^120
      for (const uint16_t bits : {0x7F80, 0x7FC1, 0x8000, 0xBF80, 0x0001, 0x7B81}) {
        for (const size_t at : {size_t{0}, head_bytes, head_bytes + 2 * (scales - 1)}) {
          uint16_t good;
          std::memcpy(&good, segment.bytes[0].data() + at, 2);
          std::memcpy(segment.bytes[0].data() + at, &bits, 2);
          EXPECT_EQ(codec.check(kind, shape, segment.Ranges(1), segment.Sizes(1)).code(),
                    StatusCode::kDataLoss)
              << name << " " << std::hex << bits;
          std::memcpy(segment.bytes[0].data() + at, &good, 2);
        }
      }
      EXPECT_TRUE(codec.check(kind, shape, segment.Ranges(2), segment.Sizes(2)).ok());
    }
  }
  // A zero point may be negative, but not infinite.
  const Codec& tile4 = **FindCodec("tile4");
  EncodedSegment keys = Encode(tile4, SegmentKind::kKey, shape, x.data());
  const uint16_t infinite = 0xFF80;
  std::memcpy(keys.bytes[0].data() + 2 * 72, &infinite, 2);
  EXPECT_EQ(tile4.check(SegmentKind::kKey, shape, keys.Ranges(2), keys.Sizes(2)).code(),
            StatusCode::kDataLoss);
}

TEST(CodecTest, CheckRefusesRawElementsThatAreNotFinite) {
  const SegmentShape shape = {2, 1, 8};
  std::vector<float> x(Elements(shape), 1.0F);
  for (const char* name : {"raw", "raw-fp16", "raw-fp32"}) {
    const Codec& codec = **FindCodec(name);
    EncodedSegment segment = Encode(codec, SegmentKind::kKey, shape, x.data());
    std::memset(segment.bytes[0].data() + segment.bytes[0].size() - 4, 0xFF, 4);
    EXPECT_EQ(codec.check(SegmentKind::kKey, shape, segment.Ranges(1), segment.Sizes(1)).code(),
              StatusCode::kDataLoss);
  }
}

TEST(ImplementationTest, EveryOneGivesTheBytesOfTheReference) {
  Random random(4);
  const Implementation& reference = *Implementations().back();
  EXPECT_EQ(reference.name, "scalar");
  for (const Implementation* implementation : Implementations()) {
    if (!implementation->runs_here()) continue;
    for (const TileFormat& format : {kTile8Format, kTile4Format}) {
      for (const SegmentShape shape : {SegmentShape{64, 2, 64}, SegmentShape{33, 1, 72},
                                       SegmentShape{1, 3, 128}, SegmentShape{50, 1, 24}}) {
        const std::vector<float> x = MakeSegment(shape, &random);
        const CodecId id = format.plane_bits == 4 ? CodecId::kTile8 : CodecId::kTile4;
        const Codec& codec = *FindCodec(id);
        for (const SegmentKind kind : kKinds) {
          EncodedSegment expected = Encode(codec, kind, shape, x.data());
          EncodedSegment found = expected;
          const auto encode = [&](const Implementation& which, EncodedSegment* segment) {
            MutableSegmentRanges ranges;
            for (int cut = 0; cut < 2; ++cut) {
              ranges.range[cut] = segment->bytes[static_cast<size_t>(cut)].data();
            }
            which.tile_encode(format, kind, shape, x.data(), ranges, segment->max_error.data());
          };
          encode(reference, &expected);
          encode(*implementation, &found);
          EXPECT_EQ(found.bytes, expected.bytes) << implementation->name;
          EXPECT_EQ(found.max_error, expected.max_error) << implementation->name;
          for (int cuts = 1; cuts <= 2; ++cuts) {
            std::vector<float> a(x.size());
            std::vector<float> b(x.size());
            reference.tile_decode(format, kind, shape, expected.Ranges(cuts), a.data());
            implementation->tile_decode(format, kind, shape, expected.Ranges(cuts), b.data());
            EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0);
          }
        }
      }
    }
  }
}

TEST(ImplementationTest, UnknownNameListsTheNames) {
  const Status status = FindImplementation("mmx").status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("scalar"), std::string::npos);
  EXPECT_EQ((*FindImplementation("scalar"))->name, "scalar");
  EXPECT_TRUE(FindImplementation("").ok());
}

TEST(ImplementationDeathTest, EnvironmentIsHonouredAndWrongNamesEndTheProcess) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        setenv("KVANT_ISA", "scalar", 1);
        std::exit(ChooseImplementation().ok() && ActiveImplementation().name == "scalar" ? 0 : 1);
      },
      testing::ExitedWithCode(0), "");
  EXPECT_EXIT(
      {
        setenv("KVANT_ISA", "mmx", 1);
        static_cast<void>(ActiveImplementation());
      },
      testing::ExitedWithCode(2), "KVANT_ISA=mmx is unknown; there are: .*scalar");
}

TEST(PayloadLayoutTest, BasesStandBeforeRefinements) {
  const Codec& tile8 = **FindCodec("tile8");
  const SegmentShape shape = {64, 2, 64};
  const PayloadLayout layout(tile8, KeysAndValues(shape), 3);
  ASSERT_EQ(layout.rows().size(), 12U);
  uint64_t offset = 0;
  for (size_t i = 0; i < layout.rows().size(); ++i) {
    const PayloadRow& row = layout.rows()[i];
    EXPECT_EQ(row.offset, offset);
    EXPECT_EQ(row.layer, static_cast<int>(i % 3));
    EXPECT_EQ(row.kind, i / 3 % 2 == 0 ? SegmentKind::kKey : SegmentKind::kValue);
    EXPECT_EQ(row.cut, static_cast<int>(i / 6));
    EXPECT_EQ(row.length, tile8.range_bytes(row.kind, shape, row.cut));
    EXPECT_EQ(layout.Row(row.kind, row.cut, row.layer).offset, offset);
    offset += row.length;
  }
  EXPECT_EQ(layout.total_bytes(), offset);
  EXPECT_EQ(layout.BytesOfCuts(2, 2), offset);
  // K8V4 is a prefix of the payload.
  EXPECT_EQ(layout.BytesOfCuts(2, 1), layout.Row(SegmentKind::kValue, 1, 0).offset);
  EXPECT_EQ(layout.BytesOfCuts(1, 1), layout.Row(SegmentKind::kKey, 1, 0).offset);
}

}  // namespace
}  // namespace kvant::kernels
