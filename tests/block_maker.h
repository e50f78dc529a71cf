// Blocks for tests of the cache service: payloads of random bytes with a manifest that describes
// them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/random.h"
#include "cache_service/block_key.h"
#include "cache_service/manifest.h"

namespace kvant {

struct TestBlock {
  BlockKey key;
  BlockKey parent;
  BlockManifest manifest;
  std::vector<std::byte> payload;
};

inline BlockKey TestKey(uint64_t n) {
  BlockKey key;
  Random random(n ^ 0x6b65790000000000U);
  for (std::byte& byte : key.bytes) byte = static_cast<std::byte>(random.Next());
  return key;
}

// Two parts (keys with `key_cuts` cuts, values with one), `layers` layers, rows of `row_bytes`.
inline TestBlock MakeBlock(const BlockKey& key, const BlockKey& parent, uint64_t seed,
                           int layers = 3, size_t row_bytes = 100, int key_cuts = 2) {
  TestBlock block;
  block.key = key;
  block.parent = parent;
  block.manifest.key = key;
  block.manifest.codec = 2;
  block.manifest.token_count = 64;
  Random random(seed);
  std::vector<std::byte> row(row_bytes);
  const auto append = [&](uint8_t part, uint8_t cut) {
    for (int layer = 0; layer < layers; ++layer) {
      for (std::byte& byte : row) byte = static_cast<std::byte>(random.Next());
      block.manifest.Append(part, cut, static_cast<uint16_t>(layer), part, row, 0.5F / (cut + 1));
      block.payload.insert(block.payload.end(), row.begin(), row.end());
    }
  };
  for (int cut = 0; cut < key_cuts; ++cut) {
    append(0, static_cast<uint8_t>(cut));
    if (cut == 0) append(1, 0);
  }
  return block;
}

// A chain of `count` keys of which the first has no parent.
inline std::vector<BlockKey> TestChain(uint64_t n, size_t count) {
  std::vector<BlockKey> chain;
  for (size_t i = 0; i < count; ++i) chain.push_back(TestKey(n * 1000003 + i));
  return chain;
}

}  // namespace kvant
