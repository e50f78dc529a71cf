// The manifest parser, on bytes as they are and with their checksum made right.
#include <xxhash.h>

#include "base/bytes.h"
#include "base/check.h"
#include "cache_service/manifest.h"
#include "cache_service/wire.h"
#include "tests/fuzz/fuzz_input.h"

namespace kvant::fuzz {
namespace {

constexpr size_t kTrailerBytes = 8;

// A selection as it may come from the wire; all of a block where it is none.
Selection TakeSelection(FuzzInput* input) {
  wire::Selection asked;
  asked.set_cuts(input->Take<uint32_t>());
  asked.set_layer_begin(input->Take<uint16_t>());
  asked.set_layer_end(input->Take<uint16_t>());
  asked.set_first_cuts(input->Take<uint16_t>());
  const uint16_t layers = input->Take<uint16_t>();
  for (int shift = 0; layers >> shift != 0; shift += 8) {
    asked.mutable_layers()->push_back(static_cast<char>(layers >> shift));
  }
  const Result<Selection> selection = FromWire(asked);
  if (!selection.ok()) return SelectAll();
  KV_CHECK(selection->Validate().ok());
  wire::Selection again;
  ToWire(*selection, &again);
  KV_CHECK(again.SerializeAsString() == asked.SerializeAsString());
  return *selection;
}

void ParseAndUse(std::span<const std::byte> bytes, const Selection& selection) {
  const Result<BlockManifest> manifest = ParseManifest(bytes);
  if (!manifest.ok()) return;
  KV_CHECK(manifest->Validate().ok());
  const Bytes again = EncodeManifest(*manifest);
  KV_CHECK(std::equal(again.begin(), again.end(), bytes.begin(), bytes.end()));
  KV_CHECK(again.size() <= MaxManifestBytes(manifest->rows.size()));
  uint64_t bytes_of_rows = 0;
  for (const SelectedRow& row : SelectRows(*manifest, selection)) {
    KV_CHECK(row.row < manifest->rows.size() && row.packed_offset == bytes_of_rows);
    const ManifestRow& taken = manifest->rows[row.row];
    KV_CHECK(selection.Takes(taken.part, taken.cut, taken.layer));
    bytes_of_rows += manifest->rows[row.row].length;
  }
  uint64_t bytes_of_ranges = 0;
  for (const SelectedRange& range : SelectRanges(*manifest, selection)) {
    KV_CHECK(range.packed_offset == bytes_of_ranges);
    KV_CHECK(RangeFits(range.payload_offset, range.length, manifest->payload_bytes()));
    bytes_of_ranges += range.length;
  }
  KV_CHECK(bytes_of_rows == bytes_of_ranges);
  KV_CHECK(bytes_of_rows == SelectedBytes(*manifest, selection));
}

}  // namespace

std::vector<Bytes> SeedInputs() {
  std::vector<Bytes> seeds;
  for (int kind = 0; kind < 3; ++kind) {
    BlockManifest manifest;
    manifest.key.bytes[0] = std::byte{1};
    manifest.codec = 2;
    manifest.token_count = 64;
    if (kind == 1) manifest.basis.emplace();
    const Bytes row(100);
    for (uint8_t cut = 0; cut < 1 + kind; ++cut) {
      for (uint8_t part = 0; part < 2; ++part) {
        for (uint16_t layer = 0; layer < 2 + kind; ++layer) {
          manifest.Append(part, cut, layer, part, std::span(row).first(50 + 10 * cut),
                          0.5F * static_cast<float>(part));
        }
      }
    }
    // Cuts, layers, first cuts, set of layers: all, refinements of keys, layers 0 and 2.
    Bytes seed(12);
    StoreLittle<uint32_t>(seed.data(), 0xFFFFFFFF);
    StoreLittle<uint16_t>(seed.data() + 6, 3);
    StoreLittle<uint16_t>(seed.data() + 8, kind == 1 ? 1 : 0);
    StoreLittle<uint16_t>(seed.data() + 10, kind == 2 ? 0b101 : 0);
    const Bytes encoded = EncodeManifest(manifest);
    seed.insert(seed.end(), encoded.begin(), encoded.end());
    seeds.push_back(std::move(seed));
  }
  return seeds;
}

}  // namespace kvant::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kvant::fuzz;
  FuzzInput input(data, size);
  const kvant::Selection selection = TakeSelection(&input);
  const auto rest = input.Rest();
  ParseAndUse(rest, selection);
  if (rest.size() < kTrailerBytes) return 0;
  Bytes fixed(rest.begin(), rest.end());
  const size_t body = fixed.size() - kTrailerBytes;
  kvant::StoreLittle<uint64_t>(fixed.data() + body, XXH3_64bits(fixed.data(), body));
  ParseAndUse(fixed, selection);
  return 0;
}
