// Block keys: the test vectors of docs/block-key.md, and that no two inputs meet under one key.
#include "cache_service/block_key.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <fstream>
#include <map>
#include <set>
#include <sstream>
#include <tuple>

#include "base/bytes.h"

namespace kvant {
namespace {

KeyChainOptions VectorOptions() {
  KeyChainOptions options;
  options.domain = DeriveDomainSecret(AsBytes("cluster"), "alice");
  options.model = Sha256(AsBytes("model"));
  options.layout = {4, 0, 2, 0, 1, {0, 1}};
  options.numerics_class = "raw/bf16";
  return options;
}

std::map<std::string, std::string> VectorsOfThePage() {
  std::ifstream page(std::string(KVANT_SOURCE_DIR) + "/docs/block-key.md");
  std::map<std::string, std::string> vectors;
  for (std::string line; std::getline(page, line);) {
    const size_t tick = line.find("| `");
    if (tick == std::string::npos || line.size() < tick + 68) continue;
    vectors[line.substr(2, tick - 3)] = line.substr(tick + 3, 64);
  }
  return vectors;
}

TEST(BlockKey, MatchesTheVectorsOfThePage) {
  const auto vectors = VectorsOfThePage();
  ASSERT_EQ(vectors.size(), 9U);
  const std::vector<uint32_t> head = {1, 2, 3, 4};
  const KeyChain chain(VectorOptions());
  const auto bob = DeriveDomainSecret(AsBytes("cluster"), "bob");
  EXPECT_EQ(ToHex(VectorOptions().domain.bytes), vectors.at("domain secret of alice"));
  EXPECT_EQ(ToHex(bob.bytes), vectors.at("domain secret of bob"));
  EXPECT_EQ(ToHex(DeriveDomainSecret({}, "alice").bytes),
            vectors.at("domain secret of alice, empty cluster secret"));
  const BlockKey first = chain.Next({}, head);
  EXPECT_EQ(first.ToHex(), vectors.at("block 1 2 3 4, first of its chain"));
  EXPECT_EQ(chain.Next(first, std::vector<uint32_t>{5, 6, 7, 8}).ToHex(),
            vectors.at("block 5 6 7 8 after it"));
  EXPECT_EQ(chain.Next(first, std::vector<uint32_t>{5, 6}).ToHex(),
            vectors.at("tail 5 6 after it"));
  KeyChainOptions options = VectorOptions();
  options.numerics_class = "tile8";
  EXPECT_EQ(KeyChain(options).Next({}, head).ToHex(),
            vectors.at("block 1 2 3 4, numerics class tile8"));
  options = VectorOptions();
  options.extra = {std::byte{'l'}, std::byte{'o'}, std::byte{'r'}, std::byte{'a'}};
  EXPECT_EQ(KeyChain(options).Next({}, head).ToHex(), vectors.at("block 1 2 3 4, extra \"lora\""));
  options = VectorOptions();
  options.domain = bob;
  EXPECT_EQ(KeyChain(options).Next({}, head).ToHex(), vectors.at("block 1 2 3 4, domain bob"));
}

TEST(BlockKey, KeysOfASequence) {
  const KeyChain chain(VectorOptions());
  const std::vector<uint32_t> tokens = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10};
  const std::vector<BlockKey> full = chain.Keys(tokens);
  const std::vector<BlockKey> with_tail = chain.Keys(tokens, true);
  ASSERT_EQ(full.size(), 2U);
  ASSERT_EQ(with_tail.size(), 3U);
  EXPECT_EQ(with_tail[1], full[1]);
  EXPECT_EQ(with_tail[2], chain.Next(full[1], std::span(tokens).subspan(8)));
  EXPECT_TRUE(chain.Keys({}, true).empty());
}

TEST(BlockKey, HexGoesBothWays) {
  const BlockKey key = KeyChain(VectorOptions()).Next({}, std::vector<uint32_t>{1});
  EXPECT_EQ(*BlockKey::FromHex(key.ToHex()), key);
  EXPECT_FALSE(BlockKey::FromHex("12").ok());
  EXPECT_FALSE(BlockKey::FromHex(std::string(64, 'g')).ok());
  EXPECT_FALSE(BlockKey::FromBytes(std::vector<std::byte>(32)).ok());
  EXPECT_FALSE(BlockKey::FromBytes(std::vector<std::byte>(31, std::byte{1})).ok());
}

// Everything that goes into a key, from so few values that equal inputs do occur.
struct Inputs {
  std::string domain, numerics, extra;
  std::vector<uint8_t> kinds;
  uint32_t layer_end = 0, head_end = 0;
  std::vector<uint32_t> tokens;
  auto Tie() const { return std::tie(domain, numerics, extra, kinds, layer_end, head_end, tokens); }
};

BlockKey KeyOf(const Inputs& in) {
  KeyChainOptions options;
  options.domain = DeriveDomainSecret(AsBytes("s"), in.domain);
  options.layout = {8, 0, in.layer_end, 0, in.head_end, in.kinds};
  options.numerics_class = in.numerics;
  const auto extra = AsBytes(in.extra);
  options.extra.assign(extra.begin(), extra.end());
  return KeyChain(options).Next({}, in.tokens);
}

TEST(BlockKey, DifferentInputsNeverShareAKey) {
  EXPECT_TRUE(rc::check([] {
    const auto text = [] {
      return *rc::gen::container<std::string>(rc::gen::element('a', 'b', '\0')).as("text");
    };
    const auto make = [&] {
      Inputs in;
      in.domain = text().substr(0, 2);
      in.numerics = text().substr(0, 2);
      in.extra = text().substr(0, 2);
      in.kinds = *rc::gen::container<std::vector<uint8_t>>(rc::gen::inRange<uint8_t>(0, 2));
      in.layer_end = *rc::gen::inRange<uint32_t>(0, 3);
      in.head_end = *rc::gen::inRange<uint32_t>(0, 3);
      in.tokens = *rc::gen::resize(3, rc::gen::nonEmpty(rc::gen::container<std::vector<uint32_t>>(
                                          rc::gen::inRange<uint32_t>(0, 3))));
      in.tokens.resize(std::min<size_t>(in.tokens.size(), 8));
      return in;
    };
    const Inputs a = make();
    const Inputs b = *rc::gen::element(0, 1) == 0 ? a : make();
    RC_ASSERT((a.Tie() == b.Tie()) == (KeyOf(a) == KeyOf(b)));
  }));
}

}  // namespace
}  // namespace kvant
