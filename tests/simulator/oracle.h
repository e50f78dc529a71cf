// What every block must be: shape and payload are a function of the key alone, so that whatever
// mix-up of blocks, domains, layers or offsets there is shows as a wrong byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "cache_service/block_key.h"
#include "cache_service/manifest.h"

namespace kvant::sim {

struct OracleBlock {
  BlockManifest manifest;
  std::vector<std::byte> payload;
};

// A row that a selection covers and its place in the destination: worked out here once more, not
// by the code under test.
struct ExpectedRow {
  uint16_t layer = 0;
  uint64_t payload_offset = 0;
  uint64_t packed_offset = 0;
  uint64_t length = 0;
};
std::vector<ExpectedRow> ExpectedRows(const BlockManifest& manifest, const Selection& selection);

struct OracleShape {
  uint32_t block_tokens = 4;
  uint32_t max_layers = 4;
  uint32_t max_row_bytes = 512;
};

// Single-owner. Blocks are made on first use and kept.
class Oracle {
 public:
  explicit Oracle(const OracleShape& shape) : shape_(shape) {}
  const OracleBlock& Block(const BlockKey& key);
  const OracleShape& shape() const { return shape_; }

 private:
  OracleShape shape_;
  std::unordered_map<BlockKey, std::unique_ptr<OracleBlock>> blocks_;
};

}  // namespace kvant::sim
