// The manifest parser, on bytes as they are and with their checksum made right.
#include <xxhash.h>

#include "base/bytes.h"
#include "base/check.h"
#include "cache_service/manifest.h"
#include "tests/fuzz/fuzz_input.h"

namespace kvant::fuzz {
namespace {

constexpr size_t kTrailerBytes = 8;

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
    Bytes seed(12, std::byte{0xFF});
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
  kvant::Selection selection = kvant::SelectAll();
  for (uint8_t& cuts : selection.cuts) cuts = input.Take<uint8_t>();
  selection.layer_begin = input.Take<uint16_t>();
  selection.layer_end = input.Take<uint16_t>();
  input.Take<uint32_t>();
  const auto rest = input.Rest();
  ParseAndUse(rest, selection);
  if (rest.size() < kTrailerBytes) return 0;
  Bytes fixed(rest.begin(), rest.end());
  const size_t body = fixed.size() - kTrailerBytes;
  kvant::StoreLittle<uint64_t>(fixed.data() + body, XXH3_64bits(fixed.data(), body));
  ParseAndUse(fixed, selection);
  return 0;
}
