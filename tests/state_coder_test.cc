// Baselines of `kvant eval`: what they round, what they leave exact, and how many bits they count.
#include "node/state_coder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rapidcheck.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <memory>
#include <vector>

#include "base/bytes.h"
#include "base/random.h"
#include "kernels/blas.h"
#include "kernels/float_formats.h"
#include "node/aqua_coder.h"
#include "node/ggml_coder.h"
#include "node/kivi_coder.h"
#include "node/klt_state_coder.h"
#include "node/kvtc_pack.h"
#include "tests/support/random_klt_pack.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

using Floats = std::vector<float>;
using kernels::FromFp16;
using kernels::ToFp16;
using testing::ElementsAre;
using testing::HasSubstr;

std::unique_ptr<Model> MakeModel(const ModelConfig& config) {
  const support::TemporaryDirectory directory;
  support::RandomModelOptions options;
  options.config = config;
  EXPECT_TRUE(support::WriteRandomModel(directory.path(), options).ok());
  Result<std::unique_ptr<Model>> model = Model::Load(directory.path());
  EXPECT_TRUE(model.ok()) << model.status().message();
  return *std::move(model);
}

const Model& TinyModel() {
  static const std::unique_ptr<Model> model = MakeModel(support::TinyConfig());
  return *model;
}
const Model& LatentModel() {
  static const std::unique_ptr<Model> model = MakeModel(support::TinyLatentConfig());
  return *model;
}

// Numbers as keys have them: channels of different scales, some far out.
PrefixState RandomState(const ModelConfig& config, int tokens, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> ids(static_cast<size_t>(tokens));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.Below(256));
  PrefixState state(config, ids, 0);
  const auto fill = [&](float* x, size_t width) {
    for (size_t i = 0; i < width * ids.size(); ++i) {
      const double scale = i % width % 7 == 0 ? 8 : 1;
      x[i] = static_cast<float>(scale * random.Normal());
    }
  };
  for (int layer = 0; layer < state.layers(); ++layer) {
    fill(state.keys(layer), state.key_width());
    fill(state.values(layer), state.value_width());
  }
  state.KeepEntering(std::vector<int>{1});
  for (size_t token = 0; token < ids.size(); token += kBlockTokens) {
    Floats entering(kBlockTokens * static_cast<size_t>(config.hidden));
    for (float& x : entering) x = static_cast<float>(random.Normal());
    state.SetEntering(1, token, entering.data());
  }
  return state;
}

Result<std::unique_ptr<StateCoder>> Make(std::string_view name, const Model& model) {
  EXPECT_TRUE(kernels::LoadBlas().ok());
  CoderContext context;
  context.model = &model;
  // Six pieces of 320 tokens, each another draw.
  context.calibration = [&](const auto& visit) {
    for (uint64_t seed = 100; seed < 106; ++seed) {
      visit(RandomState(model.config(), 320, seed));
    }
    return OkStatus();
  };
  Random random(61);
  context.klt_pack = std::make_shared<const KltPack>(support::RandomKltPack(model, &random));
  return MakeStateCoder(name, &context);
}

struct Coded {
  std::vector<PrefixState> decoded;
  std::vector<uint64_t> bits;
};

Coded CodeWith(const std::string& name, const Model& model, const PrefixState& state) {
  const Result<std::unique_ptr<StateCoder>> coder = Make(name, model);
  EXPECT_TRUE(coder.ok()) << coder.status().message();
  Coded coded;
  (*coder)->Code(state, [&](size_t wire, const PrefixState& decoded, CodedSize size) {
    EXPECT_EQ(wire, coded.bits.size());
    coded.decoded.push_back(decoded);
    coded.bits.push_back(size.bits);
  });
  EXPECT_EQ(coded.bits.size(), (*coder)->wires().size());
  return coded;
}

Floats Ramp() {
  Floats x;
  for (int i = 0; i < 32; ++i) x.push_back(static_cast<float>(i - 16));
  return x;
}

TEST(GgmlRounding, KnownVectors) {
  // -16 .. 15: d = -16 / -8 = 2, codes floor(x / 2 + 8.5), the last one cut to 15.
  const std::vector<std::byte> q4 = QuantizeGgml(GgmlCacheType::kQ4_0, Ramp());
  ASSERT_EQ(q4.size(), 18U);
  EXPECT_EQ(q4[0], std::byte{0x00});
  EXPECT_EQ(q4[1], std::byte{0x40});   // 2.0 in fp16
  EXPECT_EQ(q4[2], std::byte{0x80});   // -16 -> 0, 0 -> 8
  EXPECT_EQ(q4[3], std::byte{0x91});   // -15 -> 1, 1 -> 9
  EXPECT_EQ(q4[16], std::byte{0xF7});  // -2 -> 7, 14 -> 15
  EXPECT_EQ(q4[17], std::byte{0xF8});  // -1 -> 8, 15 -> 16, cut to 15

  const std::vector<std::byte> q8 = QuantizeGgml(GgmlCacheType::kQ8_0, Ramp());
  ASSERT_EQ(q8.size(), 34U);
  EXPECT_EQ(static_cast<int8_t>(q8[2]), -127);  // -16
  EXPECT_EQ(static_cast<int8_t>(q8[3]), -119);  // -15 * 127 / 16 = -119.06
  EXPECT_EQ(static_cast<int8_t>(q8[18]), 0);
  EXPECT_EQ(static_cast<int8_t>(q8[33]), 119);

  // Zeros have a scale of 0.
  const std::vector<std::byte> zeros = QuantizeGgml(GgmlCacheType::kQ8_0, Floats(32, 0.0F));
  EXPECT_TRUE(
      std::all_of(zeros.begin(), zeros.end(), [](std::byte b) { return b == std::byte{}; }));
  // All codes of zeros are 8 there, in each half of a byte.
  const std::vector<std::byte> middle = QuantizeGgml(GgmlCacheType::kQ4_0, Floats(32, 0.0F));
  EXPECT_EQ(middle[2], std::byte{0x88});
}

TEST(GgmlRounding, EqualsThePackageOfLlamaCpp) {
  // By gguf.quants.quantize of the Python package gguf 0.17, of ((37 i) mod 101 - 50) / 16.
  Floats x;
  for (int i = 0; i < 32; ++i) x.push_back(static_cast<float>((37 * i) % 101 - 50) / 16);
  EXPECT_EQ(ToHex(QuantizeGgml(GgmlCacheType::kQ8_0, x)),
            "4d2681df3d9af856b41270cd2b89e745a2005ebb1977d53390ee4caa0866c3217fdc");
  EXPECT_EQ(ToHex(QuantizeGgml(GgmlCacheType::kQ4_0, x)), "4036e046acf258bd1379df358be046acf268");
}

// A plain reading of what the format says, value by value, in its own words.
RC_GTEST_PROP(GgmlRounding, EqualsAPlainReference, ()) {
  const auto seed = *rc::gen::arbitrary<uint64_t>();
  const double scale = std::pow(10.0, *rc::gen::inRange(-6, 4));
  Random random(seed);
  Floats x(32);
  for (float& value : x) value = static_cast<float>(scale * random.Normal());
  float largest = 0;
  for (const float value : x) {
    if (std::fabs(value) > std::fabs(largest)) largest = value;
  }
  const auto scale_of = [](const std::vector<std::byte>& block) {
    return static_cast<uint16_t>(static_cast<unsigned>(block[0]) | static_cast<unsigned>(block[1])
                                                                       << 8);
  };
  const std::vector<std::byte> q8 = QuantizeGgml(GgmlCacheType::kQ8_0, x);
  const float d8 = std::fabs(largest) / 127.0F;
  RC_ASSERT(scale_of(q8) == ToFp16(d8));
  const std::vector<std::byte> q4 = QuantizeGgml(GgmlCacheType::kQ4_0, x);
  const float d4 = largest / -8.0F;
  RC_ASSERT(scale_of(q4) == ToFp16(d4));
  for (size_t i = 0; i < 32; ++i) {
    const float times8 = d8 == 0 ? 0 : 1.0F / d8;
    RC_ASSERT(static_cast<int8_t>(q8[2 + i]) == static_cast<int8_t>(std::lround(x[i] * times8)));
    const float times4 = d4 == 0 ? 0 : 1.0F / d4;
    const int code = std::min(15, static_cast<int>(x[i] * times4 + 8.5F));
    const unsigned byte = static_cast<unsigned>(q4[2 + i % 16]);
    RC_ASSERT(static_cast<int>(i < 16 ? byte & 15U : byte >> 4) == code);
  }
}

TEST(GgmlCoder, CountsItsBlocksAndBoundsItsErrors) {
  const PrefixState state = RandomState(TinyModel().config(), 128, 3);
  // 34 and 18 bytes for 32 values.
  EXPECT_EQ(CodeWith("q8_0", TinyModel(), state).bits[0], state.elements() * 34 * 8 / 32);
  EXPECT_EQ(CodeWith("q4_0", TinyModel(), state).bits[0], state.elements() * 18 * 8 / 32);
  EXPECT_EQ(CodeWith("q8_0/q4_0", TinyModel(), state).bits[0],
            state.elements() * (34 + 18) * 8 / 64);
  for (const auto& [name, steps] : {std::pair("q8_0", 127.0F), std::pair("q4_0", 8.0F)}) {
    const Coded coded = CodeWith(name, TinyModel(), state);
    for (int layer = 0; layer < state.layers(); ++layer) {
      const float* x = state.keys(layer);
      const float* y = coded.decoded[0].keys(layer);
      for (size_t block = 0; block < 128 * state.key_width(); block += 32) {
        float largest = 0;
        for (size_t i = 0; i < 32; ++i) largest = std::max(largest, std::fabs(x[block + i]));
        // Half a step, a whole one where the last code was cut; fp16 of the scale on top.
        const float bound = largest / steps * (steps < 100 ? 1.0F : 0.5F) + largest * 1e-3F;
        for (size_t i = 0; i < 32; ++i) EXPECT_LE(std::fabs(x[block + i] - y[block + i]), bound);
      }
    }
  }
}

TEST(GgmlCoder, KeysAndValuesHaveTypesOfTheirOwn) {
  const PrefixState state = RandomState(TinyModel().config(), 64, 4);
  const Coded both = CodeWith("q8_0/q4_0", TinyModel(), state);
  const Coded keys = CodeWith("q8_0", TinyModel(), state);
  const Coded values = CodeWith("q4_0", TinyModel(), state);
  const size_t count = 64 * state.key_width();
  for (int layer = 0; layer < state.layers(); ++layer) {
    EXPECT_TRUE(std::equal(both.decoded[0].keys(layer), both.decoded[0].keys(layer) + count,
                           keys.decoded[0].keys(layer)));
    EXPECT_TRUE(std::equal(both.decoded[0].values(layer), both.decoded[0].values(layer) + count,
                           values.decoded[0].values(layer)));
  }
}

// The largest error of `count` numbers from x on.
float LargestError(const float* x, const float* y, size_t count) {
  float largest = 0;
  for (size_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(x[i] - y[i]));
  return largest;
}
bool AllHalf(const float* x, const float* y, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (y[i] != FromFp16(ToFp16(x[i]))) return false;
  }
  return true;
}

TEST(KiviCoder, CountsGroupsAndTheResidual) {
  const ModelConfig& config = TinyModel().config();
  // 2 layers, 2 heads of 16: groups of 16 values, of 32 tokens of keys.
  const auto expected = [&](int tokens, int bits) {
    const int coded_keys = tokens / kKiviResidual * kKiviResidual;
    const int coded_values = std::max(0, tokens - kKiviResidual);
    const int width = config.kv_heads * config.head_dim;
    const int keys = coded_keys * width * bits + coded_keys / 32 * width * 32 +
                     (tokens - coded_keys) * width * 16;
    const int values = coded_values * width * bits + coded_values * width / 16 * 32 +
                       (tokens - coded_values) * width * 16;
    return static_cast<uint64_t>(config.layers * (keys + values));
  };
  for (const int tokens : {64, 128, 192, 512, 576}) {
    const PrefixState state = RandomState(config, tokens, 5);
    EXPECT_EQ(CodeWith("kivi4", TinyModel(), state).bits[0], expected(tokens, 4)) << tokens;
    EXPECT_EQ(CodeWith("kivi2", TinyModel(), state).bits[0], expected(tokens, 2)) << tokens;
  }
}

TEST(KiviCoder, LeavesTheNewestInFp16AndBoundsTheOthers) {
  const PrefixState state = RandomState(TinyModel().config(), 320, 6);
  const Coded coded = CodeWith("kivi4", TinyModel(), state);
  const size_t width = state.key_width();
  for (int layer = 0; layer < state.layers(); ++layer) {
    // 320 = 2 * 128 + 64: the newest 64 keys, the newest 128 values.
    const float* keys = state.keys(layer);
    const float* read = coded.decoded[0].keys(layer);
    EXPECT_TRUE(AllHalf(keys + 256 * width, read + 256 * width, 64 * width));
    EXPECT_FALSE(AllHalf(keys + 224 * width, read + 224 * width, 32 * width));
    const float* values = state.values(layer);
    const float* read_values = coded.decoded[0].values(layer);
    EXPECT_TRUE(AllHalf(values + 192 * width, read_values + 192 * width, 128 * width));
    EXPECT_FALSE(AllHalf(values + 191 * width, read_values + 191 * width, width));
    // A channel's range over 32 tokens in 15 steps, half of one lost; fp16 on top.
    for (size_t token = 0; token < 256; token += 32) {
      for (size_t channel = 0; channel < width; ++channel) {
        float low = keys[token * width + channel];
        float high = low;
        for (size_t i = 0; i < 32; ++i) {
          low = std::min(low, keys[(token + i) * width + channel]);
          high = std::max(high, keys[(token + i) * width + channel]);
        }
        for (size_t i = 0; i < 32; ++i) {
          const size_t at = (token + i) * width + channel;
          EXPECT_LE(std::fabs(keys[at] - read[at]), (high - low) / 30 + 0.02F);
        }
      }
    }
  }
}

TEST(KiviCoder, ConstantGroupsAreExact) {
  const std::vector<int32_t> ids(256);
  PrefixState state(TinyModel().config(), ids, 0);
  for (int layer = 0; layer < state.layers(); ++layer) {
    std::fill_n(state.keys(layer), 256 * state.key_width(), -1.5F);
    std::fill_n(state.values(layer), 256 * state.value_width(), 0.25F);
  }
  const Coded coded = CodeWith("kivi2", TinyModel(), state);
  EXPECT_EQ(LargestError(state.keys(1), coded.decoded[0].keys(1), 256 * state.key_width()), 0);
  EXPECT_EQ(LargestError(state.values(1), coded.decoded[0].values(1), 256 * state.value_width()),
            0);
}

TEST(ThinkCoder, DropsTheChannelsThatQueriesAndKeysUseLeast) {
  const ModelConfig& config = TinyModel().config();
  PrefixState state = RandomState(config, 128, 7);
  Random random(8);
  const auto width = static_cast<size_t>(config.q_heads * config.head_dim);
  Floats queries(64 * width);
  for (float& q : queries) q = static_cast<float>(random.Normal());
  // The oldest 32 queries are not looked at.
  for (size_t i = 0; i < 32 * width; ++i) queries[i] *= 1000;
  for (int layer = 0; layer < state.layers(); ++layer) {
    state.ObserveQueries(layer, queries.data(), 64, config.q_heads);
  }
  const Coded coded = CodeWith("think40", TinyModel(), state);
  const auto dim = static_cast<size_t>(config.head_dim);  // 16, of which 6 go
  const auto group = static_cast<size_t>(config.q_heads / config.kv_heads);
  for (int layer = 0; layer < state.layers(); ++layer) {
    for (size_t head = 0; head < static_cast<size_t>(config.kv_heads); ++head) {
      std::vector<double> scores(dim);
      std::vector<double> kept;
      std::vector<double> gone;
      for (size_t c = 0; c < dim; ++c) {
        double q = 0;
        double k = 0;
        for (size_t row = 32; row < 64; ++row) {
          for (size_t g = 0; g < group; ++g) {
            q += std::pow(queries[row * width + (head * group + g) * dim + c], 2);
          }
        }
        bool zero = true;
        for (size_t token = 0; token < 128; ++token) {
          const size_t at = token * state.key_width() + head * dim + c;
          k += std::pow(state.keys(layer)[at], 2);
          const float read = coded.decoded[0].keys(layer)[at];
          if (read != 0) zero = false;
          EXPECT_TRUE(read == 0 || read == FromFp16(ToFp16(state.keys(layer)[at])));
        }
        (zero ? gone : kept).push_back(q * k);
      }
      ASSERT_EQ(gone.size(), 6U);
      EXPECT_LT(*std::max_element(gone.begin(), gone.end()),
                *std::min_element(kept.begin(), kept.end()));
    }
    EXPECT_TRUE(
        AllHalf(state.values(layer), coded.decoded[0].values(layer), 128 * state.value_width()));
  }
  // 10 of 16 channels of keys, all of the values, and a bit for each channel.
  EXPECT_EQ(coded.bits[0], state.elements() * 16 * (10 + 16) / 32 +
                               static_cast<uint64_t>(config.layers * config.kv_heads) * dim);
}

TEST(SparseCoder, KeepsTheLargestOfEachHeadAndCountsItsTiles) {
  const PrefixState state = RandomState(TinyModel().config(), 128, 9);
  const Coded coded = CodeWith("sparse50", TinyModel(), state);
  uint64_t bits = 0;
  const auto tile = [](size_t kept) { return 64 + 32 + 16 * ((kept + 7) / 8 * 8); };
  for (int layer = 0; layer < state.layers(); ++layer) {
    const size_t width = state.key_width();
    for (const bool of_keys : {true, false}) {
      const float* x = of_keys ? state.keys(layer) : state.values(layer);
      const float* y = of_keys ? coded.decoded[0].keys(layer) : coded.decoded[0].values(layer);
      for (size_t head = 0; head < 128 * width; head += 16) {
        Floats sorted;
        for (size_t i = 0; i < 16; ++i) sorted.push_back(std::fabs(x[head + i]));
        std::sort(sorted.begin(), sorted.end());
        size_t kept = 0;
        for (size_t i = 0; i < 16; ++i) {
          // The 8th smallest is kept as well, as the published code does.
          const bool keep = std::fabs(x[head + i]) >= sorted[7];
          EXPECT_EQ(y[head + i], keep ? FromFp16(ToFp16(x[head + i])) : 0.0F);
          kept += keep ? 1 : 0;
        }
        EXPECT_EQ(kept, 9U);
        if (!of_keys) bits += tile(kept);
      }
      if (!of_keys) continue;
      for (size_t token = 0; token < 128; token += 64) {
        for (size_t channel = 0; channel < width; ++channel) {
          size_t kept = 0;
          for (size_t i = 0; i < 64; ++i) kept += y[(token + i) * width + channel] != 0 ? 1 : 0;
          bits += tile(kept);
        }
      }
    }
  }
  EXPECT_EQ(coded.bits[0], bits);
}

TEST(KvtcPack, UndoingRopeIsExactButForRounding) {
  for (const Model* model : {&TinyModel(), &LatentModel()}) {
    const PrefixState state = RandomState(model->config(), 192, 12);
    const std::vector<float> rows = KvtcRows(*model, state, true, 5, 150);
    PrefixState back = state;
    std::fill_n(back.keys(1) + 5 * state.key_width(), 145 * state.key_width(), 9.0F);
    SetKvtcRows(*model, rows, true, 5, 150, &back);
    for (int layer = 0; layer < state.layers(); ++layer) {
      EXPECT_LT(LargestError(state.keys(layer), back.keys(layer), 192 * state.key_width()), 1e-5F);
    }
  }
  // A key that is the same at every position but for rope has one row.
  const Model& model = TinyModel();
  const std::vector<int32_t> ids(64);
  PrefixState turned(model.config(), ids, 0);
  const auto dim = static_cast<size_t>(model.config().head_dim);
  for (int token = 0; token < 64; ++token) {
    float* key = turned.keys(0) + static_cast<size_t>(token) * turned.key_width();
    std::fill_n(key, turned.key_width(), 1.0F);
    model.rope(0).Apply(key, model.config().kv_heads, dim, token);
  }
  const std::vector<float> rows = KvtcRows(model, turned, true, 0, 64);
  for (size_t token = 0; token < 64; ++token) {
    EXPECT_NEAR(rows[token * rows.size() / 64 + 3], 1.0F, 1e-5F);
  }
}

TEST(KvtcPack, GroupsAreWithinHalfAStep) {
  Random random(13);
  for (const int bits : {1, 2, 3, 4, 6, 8, kKvtcPlain}) {
    const KvtcGroup group{16, bits};
    Floats x(16);
    for (float& value : x) value = static_cast<float>(random.Normal());
    Floats read = x;
    uint16_t codes[16];
    uint16_t scale[2];
    QuantizeKvtcGroup(group, read.data(), codes, scale);
    const auto [low, high] = std::minmax_element(x.begin(), x.end());
    for (size_t i = 0; i < 16; ++i) {
      EXPECT_LT(codes[i], bits == kKvtcPlain ? 1 << 16 : 1 << bits);
      const float step =
          bits == kKvtcPlain ? 0 : (*high - *low) / static_cast<float>((1 << bits) - 1);
      EXPECT_LE(std::fabs(x[i] - read[i]), 0.5F * step + 0.005F);
      // What is stored is what a reader has.
      const float stored = bits == kKvtcPlain ? FromFp16(codes[i])
                                              : static_cast<float>(codes[i]) * FromFp16(scale[1]) +
                                                    FromFp16(scale[0]);
      EXPECT_EQ(read[i], stored);
    }
  }
}

// The squared error of all rows under an allocation.
double ErrorOf(const std::vector<KvtcGroup>& groups, const Floats& sample, size_t rank) {
  double error = 0;
  for (size_t row = 0; row < sample.size(); row += rank) {
    Floats x(sample.begin() + static_cast<std::ptrdiff_t>(row),
             sample.begin() + static_cast<std::ptrdiff_t>(row + rank));
    size_t at = 0;
    for (const KvtcGroup& group : groups) {
      QuantizeKvtcGroup(group, &x[at], nullptr, nullptr);
      at += static_cast<size_t>(group.size);
    }
    std::fill(x.begin() + static_cast<std::ptrdiff_t>(at), x.end(), 0.0F);
    for (size_t i = 0; i < rank; ++i)
      error += std::pow(static_cast<double>(x[i]) - sample[row + i], 2);
  }
  return error;
}

TEST(KvtcPack, AllocationsAreTheBestThereAre) {
  constexpr int kRank = 64;
  Random random(14);
  Floats sample;
  for (int row = 0; row < 8; ++row) {
    for (int i = 0; i < kRank; ++i) {
      sample.push_back(static_cast<float>(8.0 / (1 + i) * random.Normal()));
    }
  }
  // Every way to cut 64 components into groups.
  std::vector<KvtcGroup> kinds = {{16, kKvtcPlain}};
  for (const int bits : {1, 2, 3, 4, 6, 8}) {
    kinds.push_back({16, bits});
    kinds.push_back({64, bits});
  }
  for (const int budget : {0, 64, 130, 256, 600}) {
    double least = ErrorOf({}, sample, kRank);
    std::vector<KvtcGroup> groups;
    const std::function<void(int, int)> search = [&](int reached, int spent) {
      least = std::min(least, ErrorOf(groups, sample, kRank));
      for (const KvtcGroup& kind : kinds) {
        // Bits are counted in steps of 16.
        if (reached + kind.size > kRank || spent + KvtcGroupBits(kind) > budget / 16 * 16) continue;
        groups.push_back(kind);
        search(reached + kind.size, spent + KvtcGroupBits(kind));
        groups.pop_back();
      }
    };
    search(0, 0);
    const std::vector<KvtcGroup> found = AllocateKvtcBits(sample, kRank, budget);
    int bits = 0;
    for (const KvtcGroup& group : found) bits += KvtcGroupBits(group);
    EXPECT_LE(bits, budget);
    EXPECT_NEAR(ErrorOf(found, sample, kRank), least, 1e-6 * least) << budget;
  }
}

TEST(KvtcCoder, KeepsSinksAndWindowAndSpendsLessWireByWire) {
  for (const Model* model : {&TinyModel(), &LatentModel()}) {
    const PrefixState state = RandomState(model->config(), 320, 15);
    const Coded windowed = CodeWith("kvtc", *model, state);
    const Coded all = CodeWith("kvtc-all", *model, state);
    ASSERT_EQ(all.bits.size(), std::size(kKvtcRatios));
    const size_t width = state.key_width();
    const auto to_bf16 = [&](const float* x, const float* y, size_t count) {
      for (size_t i = 0; i < count; ++i) {
        if (y[i] != kernels::FromBf16(kernels::ToBf16(x[i]))) return false;
      }
      return true;
    };
    uint64_t before = 16 * state.elements();
    for (size_t wire = 0; wire < all.bits.size(); ++wire) {
      const float* x = state.keys(1);
      const float* y = windowed.decoded[wire].keys(1);
      EXPECT_TRUE(to_bf16(x, y, 4 * width));
      EXPECT_FALSE(to_bf16(x + 4 * width, y + 4 * width, width));
      EXPECT_FALSE(to_bf16(x + 191 * width, y + 191 * width, width));
      EXPECT_TRUE(to_bf16(x + 192 * width, y + 192 * width, 128 * width));
      EXPECT_FALSE(to_bf16(x + 319 * width, all.decoded[wire].keys(1) + 319 * width, width));
      EXPECT_LT(all.bits[wire], before);
      before = all.bits[wire];
      // The window and the sinks alone are more than this.
      EXPECT_GT(windowed.bits[wire], 16 * state.elements() * 132 / 320);
      EXPECT_LT(all.bits[wire], windowed.bits[wire]);
    }
  }
  // Shorter than sinks and window: nothing is coded.
  const PrefixState few = RandomState(TinyModel().config(), 128, 16);
  EXPECT_EQ(CodeWith("kvtc", TinyModel(), few).bits[0], 16 * few.elements());
}

TEST(KvtcCoder, NeedsACalibration) {
  CoderContext context;
  context.model = &TinyModel();
  EXPECT_THAT(MakeStateCoder("kvtc", &context).status().message(), HasSubstr("--calibration"));
  context.calibration = [](const auto&) { return OkStatus(); };
  const Status few = MakeStateCoder("kvtc", &context).status();
  EXPECT_EQ(few.code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(few.message(), HasSubstr("longer"));
  context.calibration = [](const auto&) { return DataLoss("a broken text"); };
  EXPECT_THAT(MakeStateCoder("kvtc", &context).status().message(), HasSubstr("a broken text"));
}

TEST(AquaCoder, FitsWhatIsLinear) {
  ASSERT_TRUE(kernels::LoadBlas().ok());
  constexpr size_t kRows = 400;
  Random random(17);
  Floats x;
  Floats y;
  for (size_t row = 0; row < kRows; ++row) {
    for (int i = 0; i < 3; ++i) x.push_back(static_cast<float>(random.Normal()) + 2);
    const float* in = &x[row * 3];
    y.push_back(0.5F * in[0] - 2 * in[1] + 3);
    y.push_back(in[2] - 7);
  }
  const LinearPredictor fitted = *FitPredictor(x, 3, y, 2);
  EXPECT_LT(LargestError(Predict(fitted, x, kRows).data(), y.data(), y.size()), 0.02F);
  const LinearPredictor mean = *FitPredictor({}, 0, y, 2);
  EXPECT_NEAR(mean.bias[1], -5, 0.2);
  EXPECT_EQ(Predict(mean, {}, 3)[5], mean.bias[1]);
}

TEST(AquaCoder, ResidualsLoseWhatAGaussianLoses) {
  Random random(18);
  // Of unit variance: Max, 1960, table I.
  for (const auto& [bits, expected] : {std::pair(2, 0.1175), {3, 0.03454}, {4, 0.009497}}) {
    Floats x(1 << 15);
    for (float& value : x) value = static_cast<float>(random.Normal());
    Floats read = x;
    EXPECT_EQ(QuantizeResidual(bits, 64, read), 16 + x.size() * static_cast<size_t>(bits));
    double error = 0;
    for (size_t i = 0; i < x.size(); ++i) error += std::pow(x[i] - read[i], 2);
    EXPECT_NEAR(error / static_cast<double>(x.size()), expected, 0.05 * expected);
  }
  Floats zeros(48, 0.0F);
  QuantizeResidual(2, 48, zeros);
  EXPECT_EQ(zeros, Floats(48, 0.0F));
}

TEST(AquaCoder, CountsScalesSinksAndWindow) {
  for (const Model* model : {&TinyModel(), &LatentModel()}) {
    const PrefixState state = RandomState(model->config(), 320, 19);
    const Coded coded = CodeWith("aqua2", *model, state);
    const uint64_t per_token = state.elements() / 320;
    const auto layers = static_cast<uint64_t>(state.layers());
    // Of 188 tokens: a scale for keys and values of a layer, 4 bits in the first layer, 2 above.
    EXPECT_EQ(coded.bits[0],
              132 * 16 * per_token + 188 * (32 * layers + 2 * per_token + 2 * per_token / layers));
    const auto same = [&](int token) {
      const size_t at = static_cast<size_t>(token) * state.key_width();
      for (size_t i = 0; i < state.key_width(); ++i) {
        const float x = state.keys(1)[at + i];
        if (coded.decoded[0].keys(1)[at + i] != kernels::FromBf16(kernels::ToBf16(x))) return false;
      }
      return true;
    };
    EXPECT_TRUE(same(3));
    EXPECT_FALSE(same(4));
    EXPECT_FALSE(same(191));
    EXPECT_TRUE(same(192));
  }
}

TEST(KltStateCoder, ReadsEachCutAloneAndAsARefinement) {
  const auto coder = Make("klt", TinyModel());
  ASSERT_TRUE(coder.ok()) << coder.status().message();
  EXPECT_THAT((*coder)->wires(),
              ElementsAre("finest", "fine", "medium", "coarse", "finest-refined", "fine-refined"));
  for (const Model* model : {&TinyModel(), &LatentModel()}) {
    const PrefixState state = RandomState(model->config(), 128, 20);
    const Coded coded = CodeWith("klt", *model, state);
    // Of three layers a reader may recompute one, and has the second one's state from it.
    ASSERT_EQ(coded.bits.size(), model->config().layers > 2 ? 12U : 6U);
    for (size_t wire = 6; wire < coded.bits.size(); ++wire) {
      EXPECT_LT(coded.bits[wire], coded.bits[wire - 6]);
      for (const int layer : {0, 1}) {
        EXPECT_TRUE(std::equal(state.values(layer), state.values(layer) + 128 * state.value_width(),
                               coded.decoded[wire].values(layer)));
      }
    }
    // A finer cut takes more bits, and as a refinement more than the coarser ones alone.
    for (const auto& [more, less] : {std::pair(0, 1), {1, 2}, {2, 3}, {4, 5}, {5, 3}})
      EXPECT_GT(coded.bits[static_cast<size_t>(more)], coded.bits[static_cast<size_t>(less)]);
    const auto error = [&](size_t wire) {
      double sum = 0;
      for (int layer = 0; layer < state.layers(); ++layer) {
        for (size_t i = 0; i < 128 * state.value_width(); ++i)
          sum += std::pow(
              static_cast<double>(state.values(layer)[i] - coded.decoded[wire].values(layer)[i]),
              2);
      }
      return sum;
    };
    EXPECT_LT(error(0), error(1));
    EXPECT_LT(error(4), error(5));
    EXPECT_LT(error(5), error(3));
  }
}

TEST(KltStateCoder, RefusesAnotherModelsPack) {
  EXPECT_TRUE(kernels::LoadBlas().ok());
  Random random(62);
  const auto pack = std::make_shared<const KltPack>(support::RandomKltPack(LatentModel(), &random));
  const auto coder = MakeKltStateCoder(&TinyModel(), pack);
  EXPECT_EQ(coder.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(coder.status().message(), HasSubstr("kvant calibrate"));
}

TEST(StateCoders, ThatCodeBlockByBlockGiveTheSameOfEachBlock) {
  const ModelConfig& config = TinyModel().config();
  const PrefixState whole = RandomState(config, 192, 10);
  for (const std::string_view name : StateCoderNames()) {
    const auto coder = Make(name, TinyModel());
    ASSERT_TRUE(coder.ok());
    if (!(*coder)->blockwise()) continue;
    const Coded at_once = CodeWith(std::string(name), TinyModel(), whole);
    uint64_t bits = 0;
    for (size_t at = 0; at < 192; at += 64) {
      PrefixState block(config, whole.token_ids().subspan(at, 64), static_cast<int>(at));
      for (int layer = 0; layer < config.layers; ++layer) {
        block.SetBlock(layer, 0, whole.keys(layer) + at * whole.key_width(),
                       whole.values(layer) + at * whole.value_width());
      }
      const Coded alone = CodeWith(std::string(name), TinyModel(), block);
      bits += alone.bits[0];
      EXPECT_EQ(
          LargestError(alone.decoded[0].keys(1),
                       at_once.decoded[0].keys(1) + at * whole.key_width(), 64 * whole.key_width()),
          0)
          << name;
    }
    EXPECT_EQ(bits, at_once.bits[0]) << name;
  }
}

TEST(StateCoders, CodeLatents) {
  const PrefixState state = RandomState(LatentModel().config(), 192, 11);
  for (const char* name : {"kivi4", "kivi2", "sparse50"}) {
    const Coded coded = CodeWith(name, LatentModel(), state);
    EXPECT_LT(coded.bits[0], 16 * state.elements()) << name;
    EXPECT_GT(LargestError(state.values(1), coded.decoded[0].values(1), 64), 0) << name;
  }
}

TEST(StateCoders, SayWhatTheyCannotCode) {
  // A row of 8 + 32 numbers.
  const auto rows = Make("q8_0", LatentModel());
  EXPECT_EQ(rows.status().code(), StatusCode::kInvalidArgument);
  EXPECT_THAT(rows.status().message(), HasSubstr("blocks of 32"));
  const auto mixed = Make("q8_0/q4_0", LatentModel());
  EXPECT_THAT(mixed.status().message(), HasSubstr("one row"));
  const auto think = Make("think40", LatentModel());
  EXPECT_THAT(think.status().message(), HasSubstr("values as well"));
  EXPECT_FALSE(IsStateCoder("q9_0"));
  EXPECT_FALSE(IsStateCoder(""));
  EXPECT_FALSE(IsStateCoder("tile8"));
  for (const std::string_view name : StateCoderNames()) EXPECT_TRUE(IsStateCoder(name));
}

}  // namespace
}  // namespace kvant::node
