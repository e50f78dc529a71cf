// Attention over encoded tiles and raw tokens against a double-precision oracle, and what must hold
// bit for bit: a row does not know its company.
#include "kernels/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/implementation.h"
#include "tests/attention_oracle.h"
#include "tests/kernel_fixtures.h"

namespace kvant::kernels {
namespace {

// Query rows with their partials.
struct Queries {
  Queries(int rows, int heads, int width, Random* random)
      : head_dim(width),
        q(static_cast<size_t>(rows * heads * width)),
        max(static_cast<size_t>(rows * heads)),
        sum(max.size()),
        weighted(q.size()) {
    for (float& value : q) value = static_cast<float>(random->Normal());
    block = {rows,       heads,      q.data(),       1.0F / std::sqrt(static_cast<float>(width)),
             max.data(), sum.data(), weighted.data()};
    InitPartials(block, width);
  }
  Queries(const Queries&) = delete;
  Queries& operator=(const Queries&) = delete;

  std::vector<float> Finish() const {
    std::vector<float> out(q.size());
    FinishPartials(block, head_dim, out.data());
    return out;
  }
  // The rows from `first` on, as a block of their own over the same memory.
  QueryBlock Rows(int first, int rows) const {
    QueryBlock part = block;
    const size_t vectors = static_cast<size_t>(first) * static_cast<size_t>(block.q_heads);
    const size_t floats = vectors * static_cast<size_t>(head_dim);
    part.rows = rows;
    part.q += floats;
    part.max += vectors;
    part.sum += vectors;
    part.weighted += floats;
    return part;
  }

  int head_dim;
  std::vector<float> q;
  std::vector<float> max;
  std::vector<float> sum;
  std::vector<float> weighted;
  QueryBlock block;
};

// fp32 tokens of one shape for keys and values.
RawTokens Raw(const std::vector<float>& keys, const std::vector<float>& values,
              const SegmentShape& shape) {
  return {keys.data(), values.data(), KeysAndValues(shape)};
}

// Largest difference in units of the largest expected magnitude.
double RelativeError(const std::vector<float>& found, const std::vector<double>& expected) {
  double error = 0.0;
  double largest = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error = std::max(error, std::fabs(static_cast<double>(found[i]) - expected[i]));
    largest = std::max(largest, std::fabs(expected[i]));
  }
  return error / largest;
}

// Keys and values of one layer of one block, encoded and decoded.
struct Block {
  Block(const Codec& which, const SegmentShape& of, Random* random)
      : codec(&which),
        shape(of),
        x_keys(MakeSegment(of, random)),
        x_values(MakeSegment(of, random)) {
    keys = Encode(*codec, SegmentKind::kKey, shape, x_keys.data());
    values = Encode(*codec, SegmentKind::kValue, shape, x_values.data());
  }
  LayerTile Tile(int key_cuts, int value_cuts) const {
    return {codec, KeysAndValues(shape), keys.Ranges(key_cuts), values.Ranges(value_cuts)};
  }
  std::vector<float> Keys(int cuts) const {
    return Decode(*codec, SegmentKind::kKey, shape, keys, cuts);
  }
  std::vector<float> Values(int cuts) const {
    return Decode(*codec, SegmentKind::kValue, shape, values, cuts);
  }

  const Codec* codec;
  SegmentShape shape;
  std::vector<float> x_keys;
  std::vector<float> x_values;
  EncodedSegment keys;
  EncodedSegment values;
};

constexpr double kTolerance = 1e-5;
// Of tiles: queries and weights are rounded to 15 bits (attention.h).
double ToleranceOf(const Codec& codec) {
  return codec.id == CodecId::kTile8 || codec.id == CodecId::kTile4 ? kTileAttentionError
                                                                    : kTolerance;
}

TEST(AttendTileTest, AgreesWithTheOracleForEveryCodecCutAndShape) {
  Random random(11);
  double worst = 0.0;
  for (const Codec* codec : Codecs()) {
    for (const int head_dim : {64, 96, 128, 192, 256}) {
      for (const int group : {1, 2, 3, 8, 16}) {
        const SegmentShape shape = {1 + static_cast<int>(random.Below(64)), group == 1 ? 3 : 1,
                                    head_dim};
        const Block block(*codec, shape, &random);
        for (int key_cuts = 1; key_cuts <= codec->key_cuts; ++key_cuts) {
          for (int value_cuts = 1; value_cuts <= codec->value_cuts; ++value_cuts) {
            Queries queries(2, shape.kv_heads * group, head_dim, &random);
            AttendTile(queries.block, block.Tile(key_cuts, value_cuts));
            const double error = RelativeError(
                queries.Finish(),
                AttentionOracle(queries.block,
                                Raw(block.Keys(key_cuts), block.Values(value_cuts), shape), {}));
            EXPECT_LE(error, ToleranceOf(*codec)) << codec->name << " " << head_dim << " tokens "
                                                  << shape.tokens << " group " << group;
            worst = std::max(worst, error);
          }
        }
      }
    }
  }
  RecordProperty("worst_relative_error", std::to_string(worst));
}

TEST(AttendTileTest, EveryTailAgreesWithTheOracle) {
  Random random(12);
  for (const Codec* codec : Codecs()) {
    for (int tokens = 1; tokens <= kMaxBlockTokens; ++tokens) {
      const SegmentShape shape = {tokens, 2, 72};
      const Block block(*codec, shape, &random);
      Queries queries(1, 6, 72, &random);
      AttendTile(queries.block, block.Tile(codec->key_cuts, codec->value_cuts));
      EXPECT_LE(RelativeError(queries.Finish(),
                              AttentionOracle(queries.block,
                                              Raw(block.Keys(codec->key_cuts),
                                                  block.Values(codec->value_cuts), shape),
                                              {})),
                ToleranceOf(*codec))
          << codec->name << " " << tokens;
    }
  }
}

TEST(AttendRawTest, CausalRowsAgreeWithTheOracle) {
  Random random(13);
  const SegmentShape shape = {64, 2, 64};
  const std::vector<float> keys = MakeSegment(shape, &random);
  const std::vector<float> values = MakeSegment(shape, &random);
  std::vector<int> visible;
  for (int r = 0; r < 64; ++r) visible.push_back(r + 1);
  Queries queries(64, 8, 64, &random);
  AttendRaw(queries.block, Raw(keys, values, shape), {nullptr, visible.data()});
  EXPECT_LE(RelativeError(queries.Finish(), AttentionOracle(queries.block, Raw(keys, values, shape),
                                                            {nullptr, visible.data()})),
            kTolerance);
}

TEST(AttendRawTest, InvisibleTokensAreNeverRead) {
  Random random(14);
  constexpr int kTokens = 100;
  const SegmentShape shape = {kTokens, 1, 64};
  std::vector<float> keys = MakeSegment(shape, &random);
  std::vector<float> values = MakeSegment(shape, &random);
  for (const int visible : {0, 1, 7, 16, 63, 64, 65, 99}) {
    const int seen[] = {visible};
    Queries some(1, 4, 64, &random);
    Random again(15);
    Queries masked(1, 4, 64, &again);
    Random same(15);
    Queries alone(1, 4, 64, &same);
    std::vector<float> poisoned_keys = keys;
    std::vector<float> poisoned_values = values;
    for (size_t i = static_cast<size_t>(visible) * 64; i < keys.size(); ++i) {
      poisoned_keys[i] = std::numeric_limits<float>::quiet_NaN();
      poisoned_values[i] = std::numeric_limits<float>::infinity();
    }
    AttendRaw(masked.block, Raw(poisoned_keys, poisoned_values, shape), {nullptr, seen});
    if (visible > 0) AttendRaw(alone.block, Raw(keys, values, {visible, 1, 64}));
    EXPECT_EQ(masked.weighted, alone.weighted) << visible;
    EXPECT_EQ(masked.max, alone.max);
    EXPECT_EQ(masked.sum, alone.sum);
  }
}

TEST(AttendRawTest, RawTokensAndRawFp32TilesAgreeToTheBit) {
  Random random(16);
  const SegmentShape shape = {50, 2, 64};
  const Block block(**FindCodec("raw-fp32"), shape, &random);
  Random one(17);
  Queries tile(3, 4, 64, &one);
  Random two(17);
  Queries raw(3, 4, 64, &two);
  AttendTile(tile.block, block.Tile(1, 1));
  AttendRaw(raw.block, Raw(block.x_keys, block.x_values, shape));
  EXPECT_EQ(tile.weighted, raw.weighted);
  EXPECT_EQ(tile.sum, raw.sum);
}

// A window: what stands before its first token counts for nothing, in a tile and raw.
TEST(AttentionTest, ARowSeesItsWindowAndNoMore) {
  Random random(26);
  const SegmentShape shape = {64, 2, 64};
  for (const Codec* codec : Codecs()) {
    const Block block(*codec, shape, &random);
    const int begin[] = {-5, 0, 1, 17, 63, 64, 200};
    const int end[] = {64, 40, 2, 18, 64, 64, 64};
    constexpr int kRows = 7;
    Random one(27);
    Queries tile(kRows, 4, 64, &one);
    AttendTile(tile.block, block.Tile(codec->key_cuts, codec->value_cuts), {begin, end});
    const std::vector<float> keys = block.Keys(codec->key_cuts);
    const std::vector<float> values = block.Values(codec->value_cuts);
    Random two(27);
    Queries raw(kRows, 4, 64, &two);
    AttendRaw(raw.block, Raw(keys, values, shape), {begin, end});
    for (int row = 0; row < kRows; ++row) {
      const int first = std::clamp(begin[row], 0, 64);
      const int count = std::max(0, end[row] - first);
      Random three(27);
      Queries whole(kRows, 4, 64, &three);
      const QueryBlock alone = whole.Rows(row, 1);
      if (count > 0) {
        const auto skipped = static_cast<size_t>(first) * 128;
        AttendRaw(alone,
                  {keys.data() + skipped, values.data() + skipped, KeysAndValues({count, 2, 64})});
      }
      std::vector<float> expected(4 * 64);
      FinishPartials(alone, 64, expected.data());
      for (Queries* found : {&tile, &raw}) {
        std::vector<float> out(4 * 64);
        FinishPartials(found->Rows(row, 1), 64, out.data());
        for (size_t i = 0; i < out.size(); ++i) {
          ASSERT_NEAR(out[i], expected[i], 2 * ToleranceOf(*codec))
              << codec->name << " row " << row;
        }
      }
    }
  }
}

// Latents against keys and values made of them by hand: key = rope key and latent, value = latent.
TEST(AttentionTest, LatentsAreKeysAndValues) {
  Random random(28);
  constexpr int kTokens = 50;
  constexpr int kRope = 16;
  constexpr int kRank = 72;
  const LayerShape shape = {{kTokens, 1, kRope}, {kTokens, 1, kRank}, true};
  const std::vector<float> x_keys = MakeSegment(shape.keys, &random);
  const std::vector<float> x_latents = MakeSegment(shape.values, &random);
  for (const Codec* codec : Codecs()) {
    const EncodedSegment keys = Encode(*codec, SegmentKind::kKey, shape.keys, x_keys.data());
    const EncodedSegment latents =
        Encode(*codec, SegmentKind::kLatent, shape.values, x_latents.data());
    const std::vector<float> rope =
        Decode(*codec, SegmentKind::kKey, shape.keys, keys, codec->key_cuts);
    const std::vector<float> latent =
        Decode(*codec, SegmentKind::kLatent, shape.values, latents, codec->value_cuts);
    std::vector<float> wide_keys;
    std::vector<float> wide_values;
    for (int t = 0; t < kTokens; ++t) {
      wide_keys.insert(wide_keys.end(), rope.begin() + t * kRope, rope.begin() + (t + 1) * kRope);
      wide_keys.insert(wide_keys.end(), latent.begin() + t * kRank,
                       latent.begin() + (t + 1) * kRank);
      wide_values.insert(wide_values.end(), latent.begin() + t * kRank,
                         latent.begin() + (t + 1) * kRank);
      wide_values.insert(wide_values.end(), kRope, 0.0F);
    }
    Random one(29);
    Queries found(3, 5, kRope + kRank, &one);
    AttendTile(found.block,
               {codec, shape, keys.Ranges(codec->key_cuts), latents.Ranges(codec->value_cuts)});
    Random two(29);
    Queries raw(3, 5, kRope + kRank, &two);
    AttendRaw(raw.block, {rope.data(), latent.data(), shape});
    Random three(29);
    Queries expected(3, 5, kRope + kRank, &three);
    AttendRaw(expected.block, Raw(wide_keys, wide_values, {kTokens, 1, kRope + kRank}));
    const std::vector<float> wide = expected.Finish();
    std::vector<float> narrow(3 * 5 * kRank);
    std::vector<float> narrow_raw(narrow.size());
    FinishPartials(found.block, kRank, narrow.data());
    FinishPartials(raw.block, kRank, narrow_raw.data());
    for (size_t v = 0; v < 15; ++v) {
      for (size_t c = 0; c < kRank; ++c) {
        ASSERT_NEAR(narrow[v * kRank + c], wide[v * (kRope + kRank) + c], 4 * ToleranceOf(*codec))
            << codec->name;
        ASSERT_NEAR(narrow_raw[v * kRank + c], wide[v * (kRope + kRank) + c], 2e-5);
      }
    }
  }
}

TEST(AttentionTest, ARowDoesNotKnowItsCompany) {
  Random random(18);
  constexpr int kRows = 37;
  for (const Codec* codec : Codecs()) {
    const SegmentShape shape = {64, 2, 96};
    const Block first(*codec, shape, &random);
    const Block second(*codec, {29, 2, 96}, &random);
    const auto attend = [&](const QueryBlock& part) {
      AttendTile(part, first.Tile(codec->key_cuts, 1));
      AttendTile(part, second.Tile(codec->key_cuts, 1));
      AttendRaw(part, Raw(first.x_keys, first.x_values, {20, 2, 96}));
    };
    Random one(19);
    Queries together(kRows, 6, 96, &one);
    Random two(19);
    Queries apart(kRows, 6, 96, &two);
    attend(together.block);
    for (int r = 0; r < kRows;) {
      const int rows = std::min(kRows - r, 1 + r % 5);
      attend(apart.Rows(r, rows));
      r += rows;
    }
    EXPECT_EQ(together.max, apart.max) << codec->name;
    EXPECT_EQ(together.sum, apart.sum) << codec->name;
    EXPECT_EQ(together.weighted, apart.weighted) << codec->name;
  }
}

TEST(AttentionTest, EveryImplementationGivesTheBitsOfTheReference) {
  Random random(23);
  for (const Codec* codec : Codecs()) {
    for (const int head_dim : {64, 72, 256}) {
      const SegmentShape shape = {1 + static_cast<int>(random.Below(64)), 2, head_dim};
      const Block block(*codec, shape, &random);
      const RawTokens raw = Raw(block.x_keys, block.x_values, shape);
      const int end[] = {shape.tokens, shape.tokens / 2};
      const Visible visible = {nullptr, end};
      Random one(24);
      Queries expected(2, 6, head_dim, &one);
      Implementations().back()->attend_tile(expected.block, block.Tile(1, 1), {}, nullptr);
      Implementations().back()->attend_raw(expected.block, raw, visible);
      for (const Implementation* implementation : Implementations()) {
        if (!implementation->runs_here()) continue;
        Random two(24);
        Queries found(2, 6, head_dim, &two);
        const LayerTile next = block.Tile(1, 1);  // is fetched ahead, and changes nothing
        implementation->attend_tile(found.block, block.Tile(1, 1), {}, &next);
        implementation->attend_raw(found.block, raw, visible);
        EXPECT_EQ(found.max, expected.max) << implementation->name << " " << codec->name;
        EXPECT_EQ(found.sum, expected.sum) << implementation->name << " " << codec->name;
        EXPECT_EQ(found.weighted, expected.weighted) << implementation->name << " " << codec->name;
      }
    }
  }
}

TEST(AttentionTest, EmptyPartialsAreNeutral) {
  Random random(20);
  const Block block(**FindCodec("tile8"), {64, 1, 64}, &random);
  Random one(21);
  Queries full(2, 4, 64, &one);
  AttendTile(full.block, block.Tile(2, 2));
  const std::vector<float> expected = full.Finish();

  Random two(21);
  Queries empty(2, 4, 64, &two);
  MergePartials(empty.block, full.block, 64);
  EXPECT_EQ(full.Finish(), expected);
  MergePartials(full.block, empty.block, 64);
  EXPECT_EQ(empty.Finish(), expected);

  Random three(21);
  Queries nothing(2, 4, 64, &three);
  Random four(21);
  const Queries also_nothing(2, 4, 64, &four);
  MergePartials(also_nothing.block, nothing.block, 64);
  EXPECT_EQ(nothing.max[0], -std::numeric_limits<float>::infinity());
  for (const float value : nothing.Finish()) EXPECT_EQ(value, 0.0F);
}

TEST(AttentionTest, ScoresFarApartStayFinite) {
  Random random(22);
  const SegmentShape shape = {64, 1, 64};
  std::vector<float> keys = MakeSegment(shape, &random);
  for (float& key : keys) key *= 300.0F;
  const std::vector<float> values = MakeSegment(shape, &random);
  Queries queries(4, 4, 64, &random);
  AttendRaw(queries.block, Raw(keys, values, shape));
  EXPECT_LE(
      RelativeError(queries.Finish(), AttentionOracle(queries.block, Raw(keys, values, shape), {})),
      1e-4);
}

}  // namespace
}  // namespace kvant::kernels
