// Manifests: selections, verification, and an encoded form that accepts nothing but itself.
#include "cache_service/manifest.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <array>
#include <limits>

#include "base/bytes.h"
#include "cache_service/wire.h"
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

// Any selection in its one form.
Selection AnySelection() {
  Selection selection;
  for (size_t part = 0; part < kMaxParts; ++part) {
    selection.cuts[part] = *rc::gen::element<uint8_t>(0, 1, 2, 3, 4, 255);
    if (selection.cuts[part] == 0) continue;
    selection.first_cuts[part] =
        static_cast<uint8_t>(*rc::gen::inRange(0, std::min<int>(selection.cuts[part], 4)));
  }
  if (*rc::gen::arbitrary<bool>()) {
    auto wanted = *rc::gen::container<std::vector<bool>>(rc::gen::arbitrary<bool>());
    wanted.push_back(true);
    wanted.resize(std::min<size_t>(wanted.size() + 2, kMaxLayers));
    selection.SetLayers(wanted);
  } else {
    selection.layer_begin = *rc::gen::inRange<uint16_t>(0, 12);
    selection.layer_end = *rc::gen::inRange<uint16_t>(selection.layer_begin + 1, 14);
  }
  return selection;
}

// Against a loop that knows nothing of masks: every layer, every row.
TEST(Manifest, SelectionsTakeWhatTheySay) {
  EXPECT_TRUE(rc::check([] {
    const BlockManifest manifest = AnyManifest();
    const Selection selection = AnySelection();
    RC_ASSERT(selection.Validate().ok());
    std::vector<size_t> rows;
    for (size_t layer = selection.layer_begin; layer < selection.layer_end; ++layer) {
      if (!selection.layers.empty() && !selection.layers[layer - selection.layer_begin]) continue;
      for (size_t i = 0; i < manifest.rows.size(); ++i) {
        const ManifestRow& row = manifest.rows[i];
        if (row.layer == layer && row.cut >= selection.first_cuts[row.part] &&
            row.cut < selection.cuts[row.part]) {
          rows.push_back(i);
        }
      }
    }
    uint64_t packed = 0;
    const std::vector<SelectedRow> selected = SelectRows(manifest, selection);
    RC_ASSERT(selected.size() == rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      RC_ASSERT(selected[i].row == rows[i]);
      RC_ASSERT(selected[i].packed_offset == packed);
      packed += manifest.rows[rows[i]].length;
    }
    RC_ASSERT(SelectedBytes(manifest, selection) == packed);
    uint64_t bytes_of_ranges = 0;
    for (const SelectedRange& range : SelectRanges(manifest, selection)) {
      RC_ASSERT(range.packed_offset == bytes_of_ranges);
      bytes_of_ranges += range.length;
    }
    RC_ASSERT(bytes_of_ranges == packed);
  }));
}

// A block in two halves, of layers or of cuts, is the block: nothing is moved twice.
TEST(Manifest, WhatIsHeldAndWhatIsMissingAreTheWhole) {
  EXPECT_TRUE(rc::check([] {
    const BlockManifest manifest = AnyManifest();
    std::vector<bool> layers(manifest.LayerEnd() + 1U);
    for (size_t i = 0; i < layers.size(); ++i) layers[i] = *rc::gen::arbitrary<bool>();
    layers.front() = true;
    layers.back() = false;
    Selection some = SelectAll();
    some.SetLayers(layers);
    layers.flip();
    Selection others = SelectAll();
    others.SetLayers(layers);
    RC_ASSERT(SelectedBytes(manifest, some) + SelectedBytes(manifest, others) ==
              manifest.payload_bytes());
    const auto cut = *rc::gen::inRange<uint8_t>(1, kMaxCuts);
    Selection bases = SelectAll();
    bases.cuts.fill(cut);
    Selection refinements = SelectAll();
    refinements.first_cuts.fill(cut);
    RC_ASSERT(SelectedBytes(manifest, bases) + SelectedBytes(manifest, refinements) ==
              manifest.payload_bytes());
  }));
}

TEST(Manifest, SelectionsHaveOneFormOnTheWire) {
  EXPECT_TRUE(rc::check([] {
    const Selection selection = AnySelection();
    wire::Selection sent;
    ToWire(selection, &sent);
    const Result<Selection> read = FromWire(sent);
    RC_ASSERT(read.ok());
    RC_ASSERT(*read == selection);
    // A liar: what is accepted says the same again.
    wire::Selection mutant = sent;
    std::string* layers = mutant.mutable_layers();
    switch (*rc::gen::inRange(0, 5)) {
      case 0:
        layers->push_back(static_cast<char>(*rc::gen::arbitrary<uint8_t>()));
        break;
      case 1:
        if (!layers->empty()) layers->back() = static_cast<char>(*rc::gen::arbitrary<uint8_t>());
        break;
      case 2:
        mutant.set_layer_end(*rc::gen::inRange<uint32_t>(0, 2000));
        break;
      case 3:
        mutant.set_layer_begin(*rc::gen::arbitrary<uint32_t>());
        break;
      default:
        mutant.set_first_cuts(*rc::gen::arbitrary<uint32_t>());
    }
    const Result<Selection> accepted = FromWire(mutant);
    if (!accepted.ok()) {
      RC_ASSERT(accepted.status().code() == StatusCode::kInvalidArgument);
      return;
    }
    wire::Selection again;
    ToWire(*accepted, &again);
    RC_ASSERT(again.SerializeAsString() == mutant.SerializeAsString());
  }));
}

TEST(Manifest, HostileSelectionsAreNamed) {
  const auto refused = [](auto&& spoil) {
    Selection selection = SelectAll();
    selection.SetLayers({true, false, true});
    wire::Selection sent;
    ToWire(selection, &sent);
    spoil(&sent);
    const Result<Selection> read = FromWire(sent);
    EXPECT_EQ(read.status().code(), StatusCode::kInvalidArgument);
    return read.status().message();
  };
  using Wire = wire::Selection;
  const auto has = [](const std::string& message, const std::string& word) {
    EXPECT_NE(message.find(word), std::string::npos) << message;
  };
  has(refused([](Wire* sent) { sent->set_first_cuts(255); }), "part 0");
  has(refused([](Wire* sent) { sent->set_cuts(0), sent->set_first_cuts(0x0100); }), "part 1");
  has(refused([](Wire* sent) { sent->set_layers(std::string(1, '\0')); }), "begin and end");
  has(refused([](Wire* sent) { sent->set_layers("\4"); }), "begin and end");
  has(refused([](Wire* sent) { sent->set_layers("\7"); }), "lack one");
  has(refused([](Wire* sent) { sent->set_layers("\15"); }), "behind");
  has(refused([](Wire* sent) { sent->set_layers(std::string("\5\0", 2)); }), "2");
  has(refused([](Wire* sent) { sent->set_layers(std::string(1 << 20, '\5')); }), "1048576");
  has(refused([](Wire* sent) { sent->set_layer_end(kMaxLayers + 1); }), "1025");
  has(refused([](Wire* sent) { sent->set_layer_begin(3); }), "range");
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
