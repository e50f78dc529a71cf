// Manifests: selections, verification, and an encoded form that accepts nothing but itself.
#include "cache_service/manifest.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <array>
#include <limits>

#include "base/bytes.h"
#include "tests/block_maker.h"

namespace kvant {
namespace {

void FixChecksum(std::vector<std::byte>* bytes) {
  const auto body = std::span(*bytes).first(bytes->size() - 8);
  StoreLittle(bytes->data() + body.size(), PayloadChecksum(body));
}

// Any valid manifest.
BlockManifest AnyManifest() {
  BlockManifest manifest;
  manifest.key = TestKey(*rc::gen::inRange<uint64_t>(0, 1000));
  manifest.codec = *rc::gen::arbitrary<uint32_t>();
  manifest.token_count = *rc::gen::inRange<uint32_t>(1, kMaxBlockTokenCount + 1);
  if (*rc::gen::arbitrary<bool>()) manifest.basis = TestKey(5).bytes;
  const int layers = *rc::gen::inRange(1, 5);
  Random random(*rc::gen::arbitrary<uint64_t>());
  std::array<int, kMaxParts> cuts_of{1};
  for (size_t part = 1; part < kMaxParts; ++part) cuts_of[part] = *rc::gen::inRange(0, 4);
  for (uint8_t cut = 0; cut < kMaxCuts; ++cut) {
    for (uint8_t part = 0; part < kMaxParts; ++part) {
      for (int layer = 0; layer < layers && cut < cuts_of[part]; ++layer) {
        // A part's layers may have holes, which are the same in every cut.
        if (part == 1 && layer == 1) continue;
        for (uint8_t kind = 0; kind < (part == 2 ? 2 : 1); ++kind) {
          std::vector<std::byte> row(1 + random.Below(random.Chance(0.5) ? 1 : 300));
          manifest.Append(part, cut, static_cast<uint16_t>(layer * 3), kind, row,
                          random.Chance(0.5) ? 0.25F : random.UnitFloat());
          manifest.rows.back().checksum = random.Next();
        }
      }
    }
  }
  return manifest;
}

TEST(Manifest, EncodesToWhatItParsesTo) {
  EXPECT_TRUE(rc::check([] {
    const BlockManifest manifest = AnyManifest();
    RC_ASSERT(manifest.Validate().ok());
    const std::vector<std::byte> bytes = EncodeManifest(manifest);
    RC_ASSERT(bytes.size() <= MaxManifestBytes(manifest.rows.size()));
    const Result<BlockManifest> parsed = ParseManifest(bytes);
    RC_ASSERT(parsed.ok());
    RC_ASSERT(*parsed == manifest);
  }));
}

TEST(Manifest, EveryFlippedBitIsDetected) {
  const std::vector<std::byte> bytes =
      EncodeManifest(MakeBlock(TestKey(1), TestKey(0), 1).manifest);
  for (size_t i = 0; i < bytes.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::vector<std::byte> bad = bytes;
      bad[i] ^= std::byte{1} << bit;
      EXPECT_EQ(ParseManifest(bad).status().code(), StatusCode::kDataLoss) << i;
    }
  }
  for (size_t length = 0; length < bytes.size(); ++length) {
    EXPECT_FALSE(ParseManifest(std::span(bytes).first(length)).ok());
  }
}

// A liar may fix the checksum: then what is accepted must still be valid, and the one encoding of
// it.
TEST(Manifest, MutantsAreRefusedOrCanonical) {
  EXPECT_TRUE(rc::check([] {
    std::vector<std::byte> bytes = EncodeManifest(AnyManifest());
    const int edits = *rc::gen::inRange(1, 4);
    for (int i = 0; i < edits; ++i) {
      const size_t at = *rc::gen::inRange<size_t>(0, bytes.size() - 8);
      switch (*rc::gen::inRange(0, 3)) {
        case 0:
          bytes[at] = static_cast<std::byte>(*rc::gen::arbitrary<uint8_t>());
          break;
        case 1:
          bytes.insert(bytes.begin() + static_cast<ptrdiff_t>(at), std::byte{0x80});
          break;
        default:
          if (bytes.size() > 16) bytes.erase(bytes.begin() + static_cast<ptrdiff_t>(at));
      }
    }
    FixChecksum(&bytes);
    const Result<BlockManifest> parsed = ParseManifest(bytes);
    if (!parsed.ok()) return;
    RC_ASSERT(parsed->Validate().ok());
    RC_ASSERT(EncodeManifest(*parsed) == bytes);
  }));
}

TEST(Manifest, RowsAreSmallOnTheWire) {
  const TestBlock block = MakeBlock(TestKey(1), {}, 1, 32, 64);
  const size_t rows = block.manifest.rows.size();
  ASSERT_EQ(rows, 96U);
  EXPECT_LE(EncodeManifest(block.manifest).size(), 60 + rows * 10);
  // Even with an error of its own in every row, and two kinds in turn.
  BlockManifest manifest = block.manifest;
  manifest.rows.clear();
  std::vector<std::byte> row(5000);
  for (uint16_t layer = 0; layer < 32; ++layer) {
    for (uint8_t kind = 0; kind < 2; ++kind) {
      row.resize(5000 + layer);
      manifest.Append(0, 0, layer, kind, row, 1.0F + layer);
    }
  }
  EXPECT_LE(EncodeManifest(manifest).size(), 60 + 64 * 20);
}

TEST(Manifest, ValidateNamesWhatIsWrong) {
  const BlockManifest good = MakeBlock(TestKey(1), {}, 1).manifest;
  ASSERT_TRUE(good.Validate().ok());
  const auto bad = [&](auto&& change) {
    BlockManifest manifest = good;
    change(manifest);
    const Status status = manifest.Validate();
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
    return status.message();
  };
  bad([](BlockManifest& m) { m.key = {}; });
  bad([](BlockManifest& m) { m.token_count = 0; });
  bad([](BlockManifest& m) { m.rows.clear(); });
  EXPECT_NE(
      bad([](BlockManifest& m) { std::swap(m.rows[1].layer, m.rows[2].layer); }).find("order"),
      std::string::npos);
  EXPECT_NE(bad([](BlockManifest& m) { m.rows[4].offset += 1; }).find("row 4"), std::string::npos);
  bad([](BlockManifest& m) { m.rows.back().length = 0; });
  bad([](BlockManifest& m) { m.rows[0].declared_error = std::numeric_limits<float>::quiet_NaN(); });
  bad([](BlockManifest& m) { m.rows[0].declared_error = -1; });
  bad([](BlockManifest& m) { m.rows.back().part = kMaxParts; });
  EXPECT_NE(bad([](BlockManifest& m) { m.rows.back().cut = 2; }).find("refines"),
            std::string::npos);
}

TEST(Manifest, SelectionsAreLayerMajorAndPacked) {
  // Two cuts of keys, one of values, three layers of 100 bytes.
  const TestBlock block = MakeBlock(TestKey(1), {}, 1);
  const auto all = SelectRanges(block.manifest, SelectAll());
  ASSERT_EQ(all.size(), 9U);
  for (size_t i = 0; i < all.size(); ++i) {
    EXPECT_EQ(all[i].layer, i / 3);
    EXPECT_EQ(all[i].last_of_layer, i % 3 == 2);
    EXPECT_EQ(all[i].packed_offset, i * 100);
    EXPECT_EQ(all[i].payload_offset, (i % 3) * 300 + (i / 3) * 100);
  }
  Selection base;
  base.cuts = {1, 0, 0, 0};
  base.layer_begin = 1;
  base.layer_end = 3;
  EXPECT_EQ(SelectRanges(block.manifest, base).size(), 2U);
  EXPECT_EQ(SelectedBytes(block.manifest, base), 200U);
  Selection nothing;
  EXPECT_TRUE(SelectRanges(block.manifest, nothing).empty());

  // Kinds of one part and layer stand side by side, and travel as one.
  BlockManifest kinds;
  kinds.key = TestKey(2);
  kinds.token_count = 1;
  const std::vector<std::byte> row(10);
  for (uint16_t layer = 0; layer < 2; ++layer) {
    for (uint8_t kind = 0; kind < 2; ++kind) kinds.Append(0, 0, layer, kind, row, 0);
  }
  const auto merged = SelectRanges(kinds, SelectAll());
  ASSERT_EQ(merged.size(), 2U);
  EXPECT_EQ(merged[1].length, 20U);
}

TEST(Manifest, VerificationFindsEveryFlippedByte) {
  TestBlock block = MakeBlock(TestKey(1), {}, 1, 2, 8);
  ASSERT_TRUE(VerifyPayload(block.manifest, block.payload).ok());
  for (size_t i = 0; i < block.payload.size(); ++i) {
    block.payload[i] ^= std::byte{1};
    EXPECT_EQ(VerifyPayload(block.manifest, block.payload).code(), StatusCode::kDataLoss);
    block.payload[i] ^= std::byte{1};
  }
  EXPECT_FALSE(VerifyPayload(block.manifest, std::span(block.payload).first(3)).ok());
  std::vector<std::byte> packed;
  for (const SelectedRow& selected : SelectRows(block.manifest, SelectAll())) {
    const ManifestRow& row = block.manifest.rows[selected.row];
    packed.insert(packed.end(), block.payload.begin() + static_cast<ptrdiff_t>(row.offset),
                  block.payload.begin() + static_cast<ptrdiff_t>(row.offset + row.length));
  }
  EXPECT_TRUE(VerifyPackedLayer(block.manifest, SelectAll(), 1, packed).ok());
  EXPECT_FALSE(VerifyPackedLayer(block.manifest, SelectAll(), 1, std::span(packed).first(30)).ok());
}

}  // namespace
}  // namespace kvant
