#include "tests/simulator/oracle.h"

#include <algorithm>

#include "base/bytes.h"
#include "base/random.h"

namespace kvant::sim {

std::vector<ExpectedRow> ExpectedRows(const BlockManifest& manifest, const Selection& selection) {
  std::vector<ExpectedRow> rows;
  uint64_t packed = 0;
  for (uint32_t layer = selection.layer_begin; layer < selection.layer_end; ++layer) {
    if (layer >= manifest.LayerEnd()) break;
    if (!selection.layers.empty() && !selection.layers[layer - selection.layer_begin]) continue;
    for (const ManifestRow& row : manifest.rows) {
      if (row.layer != layer || row.cut < selection.first_cuts[row.part] ||
          row.cut >= selection.cuts[row.part]) {
        continue;
      }
      rows.push_back({row.layer, row.offset, packed, row.length});
      packed += row.length;
    }
  }
  return rows;
}

const OracleBlock& Oracle::Block(const BlockKey& key) {
  std::unique_ptr<OracleBlock>& slot = blocks_[key];
  if (slot != nullptr) return *slot;
  slot = std::make_unique<OracleBlock>();
  Random random(LoadLittle<uint64_t>(key.bytes.data()) ^
                LoadLittle<uint64_t>(key.bytes.data() + 8));
  const auto layers = static_cast<uint16_t>(1 + random.Below(shape_.max_layers));
  const auto key_cuts = static_cast<uint8_t>(1 + random.Below(3));
  const auto value_cuts = static_cast<uint8_t>(1 + random.Below(2));
  const size_t row_bytes = 16 + random.Below(shape_.max_row_bytes);
  slot->manifest.key = key;
  slot->manifest.codec = 7;
  slot->manifest.token_count = shape_.block_tokens;
  std::vector<std::byte> row;
  for (uint8_t cut = 0; cut < std::max(key_cuts, value_cuts); ++cut) {
    for (uint8_t part = 0; part < 2; ++part) {
      if (cut >= (part == 0 ? key_cuts : value_cuts)) continue;
      for (uint16_t layer = 0; layer < layers; ++layer) {
        row.resize(row_bytes + random.Below(16));
        for (std::byte& byte : row) byte = static_cast<std::byte>(random.Next() >> 56);
        slot->manifest.Append(part, cut, layer, part, row, 0.0F);
        slot->payload.insert(slot->payload.end(), row.begin(), row.end());
      }
    }
  }
  return *slot;
}

}  // namespace kvant::sim
