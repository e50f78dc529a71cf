// The golden files of klt blocks, in tests/golden/klt: MODEL.pack is a codec pack, MODEL-*.klt a
// block coded with it. Little-endian:
//
//   "KVKLT001"  8 bytes
//   u8 good (1) or bad (0), u8 cuts, u8 layers, u8 zero, u16 width, u16 hidden, u32 position
//   u8 of each layer: whether it slides; u8 of each cut: which one of the pack's it is
//   i32 token[64], f32 embedding[64][hidden]
//   u32 bytes of each extent [cut][group], the extents
//   good files: f32 x[layers][64][width], what was encoded;
//               of each cut: SHA-256 of its levels, i32 by group, token, coefficient, and
//               f32 decoded[layers][64][width] of all cuts up to it
//
// A bad file holds what a reader of all its cuts must refuse. tests/klt_decoder.py reads the same.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "node/klt.h"
#include "tests/codec_golden.h"
#include "tests/support/random_model.h"

namespace kvant::node {

inline constexpr std::string_view kKltMagic = "KVKLT001";
inline constexpr const char* kKltGoldenModels[] = {"heads", "sliding", "latent", "narrow"};

// Models of 16 floats a layer and token. The pack of "narrow" takes each layer by itself.
inline support::RandomModelOptions KltGoldenModel(std::string_view name) {
  support::RandomModelOptions options;
  ModelConfig& config = options.config;
  config = name == "heads" || name == "narrow" ? support::TinyConfig()
           : name == "sliding"                 ? support::TinySlidingConfig()
                                               : support::TinyLatentConfig();
  config.hidden = 16;
  config.q_heads = 2;
  config.kv_heads = 1;
  config.head_dim = 8;
  if (name == "sliding") config.embedding_scale = 4;  // the root of `hidden`
  if (name == "latent") config.latent->kv_rank = 8;
  return options;
}

struct KltGolden {
  bool good = true;
  int layers = 0;
  int width = 0;
  int hidden = 0;
  int position = 0;
  std::vector<uint8_t> slides;   // [layer]
  std::vector<uint8_t> cuts;     // of the pack's
  std::vector<int32_t> tokens;   // [kBlockTokens]
  std::vector<float> embedding;  // [kBlockTokens][hidden]
  KltCoder::Extents extents;
  KltCoder::Rows x;                     // [layer]
  std::vector<Digest> levels;           // [cut]
  std::vector<KltCoder::Rows> decoded;  // [cut]
};

inline std::string Serialize(const KltGolden& file) {
  using kernels::Append;
  using kernels::AppendFloats;
  std::string out(kKltMagic);
  Append(static_cast<uint8_t>(file.good), &out);
  Append(static_cast<uint8_t>(file.cuts.size()), &out);
  Append(static_cast<uint8_t>(file.layers), &out);
  Append(uint8_t{0}, &out);
  Append(static_cast<uint16_t>(file.width), &out);
  Append(static_cast<uint16_t>(file.hidden), &out);
  Append(static_cast<uint32_t>(file.position), &out);
  out.append(AsText(std::as_bytes(std::span(file.slides))));
  out.append(AsText(std::as_bytes(std::span(file.cuts))));
  out.append(AsText(std::as_bytes(std::span(file.tokens))));
  AppendFloats(file.embedding, &out);
  for (const auto& of_cut : file.extents) {
    for (const auto& extent : of_cut) Append(static_cast<uint32_t>(extent.size()), &out);
  }
  for (const auto& of_cut : file.extents) {
    for (const auto& extent : of_cut) out.append(AsText(extent));
  }
  if (!file.good) return out;
  for (const std::vector<float>& of_layer : file.x) AppendFloats(of_layer, &out);
  for (size_t cut = 0; cut < file.cuts.size(); ++cut) {
    out.append(AsText(std::as_bytes(std::span(file.levels[cut]))));
    for (const std::vector<float>& of_layer : file.decoded[cut]) AppendFloats(of_layer, &out);
  }
  return out;
}

// groups: of the model.
inline KltGolden ParseKltGolden(std::string_view in, size_t groups) {
  using kernels::Take;
  using kernels::TakeFloats;
  using kernels::TakeInteger;
  KV_CHECK(Take(kKltMagic.size(), &in) == kKltMagic);
  KltGolden file;
  file.good = TakeInteger<uint8_t>(&in) != 0;
  file.cuts.resize(TakeInteger<uint8_t>(&in));
  file.layers = TakeInteger<uint8_t>(&in);
  KV_CHECK(TakeInteger<uint8_t>(&in) == 0);
  file.width = TakeInteger<uint16_t>(&in);
  file.hidden = TakeInteger<uint16_t>(&in);
  file.position = static_cast<int>(TakeInteger<uint32_t>(&in));
  for (int layer = 0; layer < file.layers; ++layer)
    file.slides.push_back(TakeInteger<uint8_t>(&in));
  for (uint8_t& cut : file.cuts) cut = TakeInteger<uint8_t>(&in);
  for (int i = 0; i < kBlockTokens; ++i)
    file.tokens.push_back(static_cast<int32_t>(TakeInteger<uint32_t>(&in)));
  file.embedding = TakeFloats(static_cast<size_t>(kBlockTokens * file.hidden), &in);
  file.extents.assign(file.cuts.size(), std::vector<std::vector<std::byte>>(groups));
  for (auto& of_cut : file.extents) {
    for (auto& extent : of_cut) extent.resize(TakeInteger<uint32_t>(&in));
  }
  for (auto& of_cut : file.extents) {
    for (auto& extent : of_cut) {
      const std::span<const std::byte> bytes = AsBytes(Take(extent.size(), &in));
      extent.assign(bytes.begin(), bytes.end());
    }
  }
  const auto take_rows = [&] {
    KltCoder::Rows rows;
    for (int layer = 0; layer < file.layers; ++layer)
      rows.push_back(TakeFloats(static_cast<size_t>(kBlockTokens * file.width), &in));
    return rows;
  };
  if (file.good) {
    file.x = take_rows();
    for (size_t cut = 0; cut < file.cuts.size(); ++cut) {
      const std::span<const std::byte> digest = AsBytes(Take(sizeof(Digest), &in));
      std::memcpy(&file.levels.emplace_back(), digest.data(), digest.size());
      file.decoded.push_back(take_rows());
    }
  }
  KV_CHECK(in.empty());
  return file;
}

// The digest of each cut's levels of a block, 0 where none is coded.
inline std::vector<Digest> KltLevelDigests(const KltCoder& coder, std::span<const int32_t> tokens,
                                           int position, const KltCoder::Rows& rows) {
  const KltSide side = KltSide::OfTokens(&coder, tokens, nullptr);
  std::vector<kernels::SparseRows> first;
  std::vector<std::vector<int32_t>> levels(coder.cuts());
  KltCoder::Code code;
  for (size_t group = 0; group < coder.groups(); ++group) {
    std::vector<float> left = coder.Gathered(group, rows);
    const std::vector<int8_t> finer = coder.Finer(group, left);
    std::vector<float> predicted;
    coder.Predict(group, side, first, position, &predicted);
    for (size_t i = 0; i < left.size(); ++i) left[i] -= predicted[i];
    coder.CodeGroup(group, position, left, finer, &code, nullptr);
    first.push_back(code.first);
    for (size_t cut = 0; cut < coder.cuts(); ++cut) {
      const KltCoder::Code::OfCut& of = code.cuts[cut];
      const size_t count = code.values.coefficients();
      std::vector<int32_t> all(kBlockTokens * count);
      size_t i = 0;
      auto other = of.places.other.begin();
      for (size_t token = 0; token < kBlockTokens; ++token) {
        for (const size_t begin = i; i < of.places.end[token]; ++i) {
          const size_t c = i - begin < of.places.first[token] ? i - begin : *other++;
          all[token * count + c] = of.read.Level(i);
        }
      }
      levels[cut].insert(levels[cut].end(), all.begin(), all.end());
    }
  }
  std::vector<Digest> digests;
  for (const std::vector<int32_t>& of_cut : levels)
    digests.push_back(Sha256(std::as_bytes(std::span(of_cut))));
  return digests;
}

// Reads all groups at the first `cuts` cuts.
inline Status ReadKlt(const KltCoder& coder, std::span<const int32_t> tokens, int position,
                      const KltCoder::Extents& extents, size_t cuts, KltCoder::Rows* rows) {
  KltReader reader(&coder, KltSide::OfTokens(&coder, tokens, nullptr), position);
  for (size_t group = 0; group < coder.groups(); ++group) {
    std::vector<std::span<const std::byte>> of_group;
    for (size_t cut = 0; cut < cuts; ++cut) of_group.emplace_back(extents[cut][group]);
    KV_RETURN_IF_ERROR(reader.Read(group, of_group, rows));
  }
  return OkStatus();
}

}  // namespace kvant::node
