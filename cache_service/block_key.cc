#include "cache_service/block_key.h"

#include <openssl/evp.h>
#include <openssl/hmac.h>

#include <algorithm>

#include "base/bytes.h"
#include "base/check.h"

namespace kvant {
namespace {

// Domain separation: no other use of SHA-256 in Kvant hashes bytes that begin like these.
constexpr std::string_view kKeyTag = "kvant.block-key.v1";
constexpr std::string_view kDomainTag = "kvant.domain.v1";

// Appends fields so that different field lists never give the same bytes: integers are fixed-width
// little-endian, and everything of variable length is preceded by its length.
class FieldWriter {
 public:
  explicit FieldWriter(std::vector<std::byte>* out) : out_(out) {}

  void U32(uint32_t value) {
    std::byte bytes[4];
    StoreLittle(bytes, value);
    Fixed(bytes);
  }
  void Fixed(std::span<const std::byte> bytes) {
    out_->insert(out_->end(), bytes.begin(), bytes.end());
  }
  void Sized(std::span<const std::byte> bytes) {
    KV_CHECK(bytes.size() <= UINT32_MAX);
    U32(static_cast<uint32_t>(bytes.size()));
    Fixed(bytes);
  }

 private:
  std::vector<std::byte>* out_;
};

int HexDigit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

Digest Sha256(std::span<const std::byte> bytes) {
  Digest digest;
  unsigned int length = 0;
  KV_CHECK(EVP_Digest(bytes.data(), bytes.size(), reinterpret_cast<unsigned char*>(digest.data()),
                      &length, EVP_sha256(), nullptr) == 1 &&
           length == kDigestBytes);
  return digest;
}

std::string BlockKey::ToHex() const { return kvant::ToHex(bytes); }

Result<BlockKey> BlockKey::FromHex(std::string_view hex) {
  BlockKey key;
  if (hex.size() != 2 * kDigestBytes) {
    return InvalidArgument("a block key has {} hexadecimal digits, not {}", 2 * kDigestBytes,
                           hex.size());
  }
  for (size_t i = 0; i < kDigestBytes; ++i) {
    const int high = HexDigit(hex[2 * i]);
    const int low = HexDigit(hex[2 * i + 1]);
    if (high < 0 || low < 0) {
      return InvalidArgument("block key '{}' has a digit that is not hexadecimal", hex);
    }
    key.bytes[i] = static_cast<std::byte>(high * 16 + low);
  }
  return key;
}

Result<BlockKey> BlockKey::FromBytes(std::span<const std::byte> bytes) {
  if (bytes.size() != kDigestBytes) {
    return InvalidArgument("a block key has {} bytes, not {}", kDigestBytes, bytes.size());
  }
  BlockKey key;
  std::copy(bytes.begin(), bytes.end(), key.bytes.begin());
  if (key.IsZero()) return InvalidArgument("a block key is not all zeros");
  return key;
}

DomainSecret DeriveDomainSecret(std::span<const std::byte> cluster_secret,
                                std::string_view domain) {
  std::vector<std::byte> text;
  FieldWriter writer(&text);
  writer.Sized(AsBytes(kDomainTag));
  writer.Sized(AsBytes(domain));
  DomainSecret secret;
  unsigned int length = 0;
  KV_CHECK(cluster_secret.size() <= INT32_MAX);
  // HMAC with a null key means "the key of the last call", so an empty secret needs a pointer.
  const std::byte none{};
  KV_CHECK(HMAC(EVP_sha256(), cluster_secret.empty() ? &none : cluster_secret.data(),
                static_cast<int>(cluster_secret.size()),
                reinterpret_cast<const unsigned char*>(text.data()), text.size(),
                reinterpret_cast<unsigned char*>(secret.bytes.data()), &length) != nullptr &&
           length == kDigestBytes);
  return secret;
}

KeyChain::KeyChain(const KeyChainOptions& options)
    : block_tokens_(options.layout.block_tokens), extra_(options.extra) {
  KV_CHECK(block_tokens_ > 0);
  FieldWriter writer(&preamble_);
  writer.Sized(AsBytes(kKeyTag));
  writer.Fixed(options.domain.bytes);
  writer.Fixed(options.model);
  const BlockLayout& layout = options.layout;
  writer.U32(layout.block_tokens);
  writer.U32(layout.layer_begin);
  writer.U32(layout.layer_end);
  writer.U32(layout.head_begin);
  writer.U32(layout.head_end);
  writer.Sized(std::as_bytes(std::span(layout.state_kinds)));
  writer.Sized(AsBytes(options.numerics_class));
}

BlockKey KeyChain::Next(const BlockKey& parent, std::span<const uint32_t> tokens) const {
  KV_CHECK(!tokens.empty() && tokens.size() <= block_tokens_);
  std::vector<std::byte> text;
  text.reserve(preamble_.size() + kDigestBytes + 8 + 4 * tokens.size() + extra_.size());
  FieldWriter writer(&text);
  writer.Fixed(preamble_);
  writer.Fixed(parent.bytes);
  writer.U32(static_cast<uint32_t>(tokens.size()));
  for (const uint32_t token : tokens) writer.U32(token);
  writer.Sized(extra_);
  return {Sha256(text)};
}

std::vector<BlockKey> KeyChain::Keys(std::span<const uint32_t> tokens, bool with_tail) const {
  std::vector<BlockKey> keys;
  keys.reserve(tokens.size() / block_tokens_ + 1);
  BlockKey parent;
  while (tokens.size() >= block_tokens_ || (with_tail && !tokens.empty())) {
    const size_t length = std::min<size_t>(tokens.size(), block_tokens_);
    parent = Next(parent, tokens.first(length));
    keys.push_back(parent);
    tokens = tokens.subspan(length);
  }
  return keys;
}

}  // namespace kvant
