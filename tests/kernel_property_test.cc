// Properties of codecs, attention and ordered products over random geometries, numbers and splits.
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <cmath>
#include <cstring>

#include "kernels/attention.h"
#include "kernels/payload_layout.h"
#include "tests/kernel_differential.h"
#include "tests/lossless_fixtures.h"

namespace kvant::kernels {
namespace {

const Codec& AnyCodec() {
  const auto index = *rc::gen::inRange<size_t>(0, Codecs().size()).as("codec");
  return *Codecs()[index];
}

SegmentShape AnyShape() {
  return {*rc::gen::inRange(1, kMaxBlockTokens + 1).as("tokens"),
          *rc::gen::inRange(1, 4).as("kv_heads"), 8 * *rc::gen::inRange(1, 33).as("head_dim / 8")};
}

SegmentKind AnyKind() {
  return *rc::gen::element(SegmentKind::kKey, SegmentKind::kValue).as("kind");
}

// Numbers of every magnitude, by way of their exponent.
std::vector<float> AnySegment(const SegmentShape& shape) {
  Random random(*rc::gen::arbitrary<uint64_t>().as("seed"));
  std::vector<float> x = MakeSegment(shape, &random);
  const int exponent = *rc::gen::inRange(-130, 120).as("exponent");
  const bool sparse = *rc::gen::arbitrary<bool>().as("sparse");
  for (float& value : x) {
    value = std::ldexp(value, exponent);
    if (sparse && random.Chance(0.5)) value = 0.0F;
  }
  return x;
}

RC_GTEST_PROP(CodecProperty, RoundTripStaysWithinTheDeclaredErrorAndRefinesIt, ()) {
  const Codec& codec = AnyCodec();
  const SegmentKind kind = AnyKind();
  const SegmentShape shape = AnyShape();
  const std::vector<float> x = AnySegment(shape);
  const EncodedSegment segment = Encode(codec, kind, shape, x.data());
  RC_ASSERT(
      codec.check(kind, shape, segment.Ranges(segment.cuts), segment.Sizes(segment.cuts)).ok());
  for (int cuts = 1; cuts <= segment.cuts; ++cuts) {
    const auto cut = static_cast<size_t>(cuts - 1);
    const std::vector<float> decoded = Decode(codec, kind, shape, segment, cuts);
    for (size_t i = 0; i < x.size(); ++i) {
      RC_ASSERT(std::fabs(static_cast<double>(decoded[i]) - static_cast<double>(x[i])) <=
                static_cast<double>(segment.max_error[cut]));
    }
    if (cut > 0) RC_ASSERT(segment.max_error[cut] <= segment.max_error[cut - 1]);
  }
  // The base alone passes, too.
  RC_ASSERT(codec.check(kind, shape, segment.Ranges(1), segment.Sizes(1)).ok());
}

RC_GTEST_PROP(CodecProperty, ErrorIsAtMostHalfAStep, ()) {
  const bool fine = *rc::gen::arbitrary<bool>();
  const Codec& codec = **FindCodec(fine ? "tile8" : "tile4");
  const SegmentKind kind = AnyKind();
  const SegmentShape shape = AnyShape();
  Random random(*rc::gen::arbitrary<uint64_t>());
  const std::vector<float> x = MakeSegment(shape, &random);
  float largest = 0.0F;
  for (const float value : x) largest = std::max(largest, std::fabs(value));
  const EncodedSegment segment = Encode(codec, kind, shape, x.data());
  // A scale is at most 1 + 1/128 of what it must be; zero points are rounded to 8 bits.
  const float bound = largest * (1.0F + 1.0F / 64.0F);
  RC_ASSERT(segment.max_error[0] <= bound / (fine ? 16.0F : 4.0F));
  RC_ASSERT(segment.max_error[1] <= bound / (fine ? 256.0F : 16.0F));
}

RC_GTEST_PROP(CodecProperty, CheckedBytesDecodeToFiniteNumbers, ()) {
  const Codec& codec = AnyCodec();
  const SegmentKind kind = AnyKind();
  const SegmentShape shape = AnyShape();
  Random random(*rc::gen::arbitrary<uint64_t>());
  EncodedSegment segment;
  segment.cuts = codec.cuts(kind);
  for (int cut = 0; cut < segment.cuts; ++cut) {
    segment.bytes[static_cast<size_t>(cut)].resize(codec.range_bytes(kind, shape, cut));
    for (std::byte& byte : segment.bytes[static_cast<size_t>(cut)]) {
      // Below 0x7B a bf16 scale may pass, so that both answers of check() are met.
      byte = static_cast<std::byte>(random.Below(random.Chance(0.999) ? 0x7B : 256));
    }
  }
  const Status status =
      codec.check(kind, shape, segment.Ranges(segment.cuts), segment.Sizes(segment.cuts));
  RC_CLASSIFY(status.ok(), "accepted");
  if (!status.ok()) {
    RC_ASSERT(status.code() == StatusCode::kDataLoss);
    return;
  }
  for (const float value : Decode(codec, kind, shape, segment, segment.cuts)) {
    RC_ASSERT(std::isfinite(value));
  }
}

RC_GTEST_PROP(RansProperty, SymbolsComeBackFromEveryTable, ()) {
  Random random(*rc::gen::arbitrary<uint64_t>().as("seed"));
  const RansCase made =
      MakeRansCase(*rc::gen::inRange<size_t>(0, 3000).as("symbols"),
                   *rc::gen::inRange(1, kRansSymbols + 1).as("alphabet"),
                   *rc::gen::inRange(1, kRansMaxTables + 1).as("tables"), &random);
  const std::vector<std::byte> bytes = EncodeRans(ActiveImplementation(), made);
  RC_ASSERT(bytes.size() <= RansBound(made.symbols.size()));
  RansDecodeTables tables;
  tables.Assign(made.tables);
  std::vector<uint8_t> symbols(made.symbols.size());
  RC_ASSERT(RansDecode(ActiveImplementation(), tables, made.choice(), bytes, symbols).ok());
  RC_ASSERT(symbols == made.symbols);
}

RC_GTEST_PROP(LosslessProperty, EveryBitComesBack, ()) {
  const SegmentKind kind = AnyKind();
  const SegmentShape shape = AnyShape();
  const int exponent = *rc::gen::inRange(-140, 130).as("exponent");
  const double strange = *rc::gen::element(0.0, 0.01, 0.3).as("share of noise");
  Random random(*rc::gen::arbitrary<uint64_t>().as("seed"));
  std::vector<uint16_t> raw = MakeRaw(kind, shape, &random);
  for (uint16_t& element : raw) {
    element = random.Chance(strange) ? static_cast<uint16_t>(random.Next())
                                     : ToBf16(std::ldexp(FromBf16(element), exponent));
  }
  const std::vector<std::byte> bytes = EncodeLossless(ActiveImplementation(), kind, shape, raw);
  RC_ASSERT(bytes.size() <= LosslessBound(raw.size()));
  std::vector<uint16_t> decoded(raw.size());
  RC_ASSERT(LosslessCoder().Decode(kind, shape, bytes, decoded.data()).ok());
  RC_ASSERT(decoded == raw);
}

RC_GTEST_PROP(DifferentialProperty, EveryImplementationGivesTheSameBitsNearTheOracle, ()) {
  const auto bytes = *rc::gen::arbitrary<std::vector<uint8_t>>().as("case");
  for (int kernel = 0; kernel < kDifferentialKernels; ++kernel) {
    const std::string difference =
        FindDifference(static_cast<DifferentialKernel>(kernel), bytes.data(), bytes.size());
    if (!difference.empty()) RC_FAIL(difference);
  }
}

TEST(DifferentialTest, EveryHeadSizeAndGroupOfEveryCodec) {
  for (int codec = 0; codec < static_cast<int>(Codecs().size()); ++codec) {
    for (int head_dim = 0; head_dim < static_cast<int>(std::size(kDifferentialHeadDims));
         ++head_dim) {
      for (int group = 1; group <= kMaxGroup; ++group) {
        const std::vector<uint8_t> bytes = AttendTileCase(codec, head_dim, group);
        EXPECT_EQ(FindDifference(DifferentialKernel::kAttendTile, bytes.data(), bytes.size()), "")
            << Codecs()[static_cast<size_t>(codec)]->name << ", head size "
            << kDifferentialHeadDims[head_dim] << ", group " << group;
      }
    }
  }
}

RC_GTEST_PROP(LayoutProperty, RangesCoverThePayloadOnce, ()) {
  const Codec& codec = AnyCodec();
  const int layers = *rc::gen::inRange(1, 9);
  const SegmentShape keys = AnyShape();
  const SegmentShape values = AnyShape();
  const PayloadLayout layout(codec, {keys, values, *rc::gen::arbitrary<bool>()}, layers);
  uint64_t end = 0;
  for (const PayloadRow& row : layout.rows()) {
    RC_ASSERT(row.offset == end);
    RC_ASSERT(row.length > 0U);
    end += row.length;
  }
  RC_ASSERT(end == layout.total_bytes());
  RC_ASSERT(layout.BytesOfCuts(codec.key_cuts, codec.value_cuts) == end);
  uint64_t sum = 0;
  for (int cut = 0; cut < codec.key_cuts; ++cut) {
    sum += layout.BytesOfCuts(cut + 1, 0) - layout.BytesOfCuts(cut, 0);
  }
  for (int cut = 0; cut < codec.value_cuts; ++cut) {
    sum += layout.BytesOfCuts(0, cut + 1) - layout.BytesOfCuts(0, cut);
  }
  RC_ASSERT(sum == end);
}

// One query block with its partials.
struct Partials {
  Partials(int rows, int heads, int width, const std::vector<float>& q)
      : max(static_cast<size_t>(rows * heads)),
        sum(max.size()),
        weighted(q.size()),
        block{rows,       heads,      q.data(),       1.0F / std::sqrt(static_cast<float>(width)),
              max.data(), sum.data(), weighted.data()} {
    InitPartials(block, width);
  }
  Partials(const Partials&) = delete;
  Partials& operator=(const Partials&) = delete;

  std::vector<float> max;
  std::vector<float> sum;
  std::vector<float> weighted;
  QueryBlock block;
};

RC_GTEST_PROP(AttentionProperty, AnySplitMergesToTheWhole, ()) {
  const int head_dim = *rc::gen::element(64, 96, 128, 256).as("head_dim");
  const int kv_heads = *rc::gen::inRange(1, 4).as("kv_heads");
  const int group = *rc::gen::inRange(1, 17).as("group");
  const int rows = *rc::gen::inRange(1, 4).as("rows");
  const int tiles = *rc::gen::inRange(1, 7).as("tiles");
  const Codec& codec = AnyCodec();
  const int key_cuts = *rc::gen::inRange(1, codec.key_cuts + 1).as("key cuts");
  const int value_cuts = *rc::gen::inRange(1, codec.value_cuts + 1).as("value cuts");
  Random random(*rc::gen::arbitrary<uint64_t>().as("seed"));
  std::vector<float> q(static_cast<size_t>(rows * kv_heads * group * head_dim));
  for (float& value : q) value = static_cast<float>(random.Normal());

  Partials whole(rows, kv_heads * group, head_dim, q);
  Partials left(rows, kv_heads * group, head_dim, q);
  Partials right(rows, kv_heads * group, head_dim, q);
  for (int i = 0; i < tiles; ++i) {
    const SegmentShape shape = {1 + static_cast<int>(random.Below(64)), kv_heads, head_dim};
    const EncodedSegment keys =
        Encode(codec, SegmentKind::kKey, shape, MakeSegment(shape, &random).data());
    const EncodedSegment values =
        Encode(codec, SegmentKind::kValue, shape, MakeSegment(shape, &random).data());
    const LayerTile tile = {&codec, KeysAndValues(shape), keys.Ranges(key_cuts),
                            values.Ranges(value_cuts)};
    AttendTile(whole.block, tile);
    AttendTile(random.Chance(0.5) ? left.block : right.block, tile);
  }
  MergePartials(left.block, right.block, head_dim);
  std::vector<float> expected(q.size());
  std::vector<float> merged(q.size());
  FinishPartials(whole.block, head_dim, expected.data());
  FinishPartials(right.block, head_dim, merged.data());
  float largest = 0.0F;
  for (const float value : expected) largest = std::max(largest, std::fabs(value));
  for (size_t i = 0; i < expected.size(); ++i) {
    RC_ASSERT(std::fabs(expected[i] - merged[i]) <= 1e-5F * largest);
  }
}

}  // namespace
}  // namespace kvant::kernels
