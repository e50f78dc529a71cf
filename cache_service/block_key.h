// Block keys: 256 bits that say everything a block's bytes depend on. docs/block-key.md specifies
// the hashed bytes and has test vectors.
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "cluster/shard_map.h"

namespace kvant {

inline constexpr size_t kDigestBytes = 32;
using Digest = std::array<std::byte, kDigestBytes>;

// SHA-256 of `bytes`. Ends the process if OpenSSL cannot provide SHA-256.
Digest Sha256(std::span<const std::byte> bytes);

// The name of a block. Immutable value. All zeros is the parent of a chain's first block and names
// no block.
struct BlockKey {
  Digest bytes{};

  bool IsZero() const { return *this == BlockKey{}; }
  // 64 lower-case hexadecimal digits.
  std::string ToHex() const;
  // The first 12 digits, for logs.
  std::string ShortHex() const { return ToHex().substr(0, 12); }
  // kInvalidArgument: not 64 hexadecimal digits.
  static Result<BlockKey> FromHex(std::string_view hex);
  // kInvalidArgument: not 32 bytes, or all zeros.
  static Result<BlockKey> FromBytes(std::span<const std::byte> bytes);
  // 64 uniform bits of the key (little-endian bytes 0..7).
  uint64_t Prefix64() const {
    uint64_t value;
    std::memcpy(&value, bytes.data(), sizeof(value));
    return value;
  }
  friend auto operator<=>(const BlockKey&, const BlockKey&) = default;
};

// The name of the run (cluster/shard_map.h) that block `index` of a chain belongs to: 64 bits of
// the key of the run's first block. REQUIRES: index < chain.size().
inline uint64_t RunOf(std::span<const BlockKey> chain, size_t index) {
  return chain[index / kRunBlocks * kRunBlocks].Prefix64();
}

// Blocks under one secret are invisible under another: without the secret nobody can compute a key.
struct DomainSecret {
  Digest bytes{};
  friend bool operator==(const DomainSecret&, const DomainSecret&) = default;
};
// HMAC-SHA256 over the domain's name, keyed with the cluster secret. Tenants that share a domain
// name share blocks. The cluster secret may be empty where nobody is kept out.
DomainSecret DeriveDomainSecret(std::span<const std::byte> cluster_secret, std::string_view domain);

// The share of a model's state that a block holds, so that no two geometries meet under one key.
struct BlockLayout {
  uint32_t block_tokens = 64;  // tokens of a full block
  uint32_t layer_begin = 0;
  uint32_t layer_end = 0;  // past the last
  uint32_t head_begin = 0;
  uint32_t head_end = 0;               // past the last kv head
  std::vector<uint8_t> state_kinds{};  // segment kinds in the block, e.g. {0, 1}: keys, values
};

struct KeyChainOptions {
  DomainSecret domain;
  Digest model{};  // digest of weights and config
  BlockLayout layout;
  std::string numerics_class;      // "raw/bf16", "tile8": what the bytes are a function of
  std::vector<std::byte> extra{};  // whatever else they depend on, e.g. an adapter's digest
};

// Computes the keys of token sequences. Immutable after construction; thread-safe.
class KeyChain {
 public:
  // REQUIRES: block_tokens > 0.
  explicit KeyChain(const KeyChainOptions& options);

  uint32_t block_tokens() const { return block_tokens_; }
  // The key of the block of `tokens` (1..block_tokens of them) that follows the block `parent`; a
  // zero parent starts a chain.
  BlockKey Next(const BlockKey& parent, std::span<const uint32_t> tokens) const;
  // The keys of all blocks of a sequence from its start: full blocks, then the shorter tail block
  // if `with_tail` and tokens are left over.
  std::vector<BlockKey> Keys(std::span<const uint32_t> tokens, bool with_tail = false) const;

 private:
  uint32_t block_tokens_;
  std::vector<std::byte>
      preamble_;  // the hashed bytes before the parent key, the same for all blocks
  std::vector<std::byte> extra_;
};

}  // namespace kvant

template <>
struct std::hash<kvant::BlockKey> {
  size_t operator()(const kvant::BlockKey& key) const noexcept { return key.Prefix64(); }
};
