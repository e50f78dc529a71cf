// Conditional transform coding: what comes out, whatever pack and bytes go in.
#include "node/klt.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <string>

#include "base/bytes.h"
#include "base/random.h"
#include "kernels/blas.h"
#include "tests/support/random_klt_pack.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

using support::KltBlock;
using support::RandomKltBlock;
using support::RandomKltPack;
using testing::ElementsAre;
using testing::IsEmpty;

constexpr size_t kCutsOfPack = 4;
const std::vector<size_t> kRefining = {3, 1, 0};
constexpr int kPositions[] = {0, kBlockTokens};  // with sinks, and without

// A layer that slides and one that doesn't, of more coefficients than other groups are predicted
// from.
ModelConfig WideConfig() {
  ModelConfig config = support::TinySlidingConfig();
  config.layers = 2;
  config.sliding = {true, false};
  config.q_heads = 4;
  config.kv_heads = 4;
  config.head_dim = 56;
  return config;
}

const Model& ModelOf(const std::string& kind) {
  static std::map<std::string, std::unique_ptr<Model>> models;
  std::unique_ptr<Model>& model = models[kind];
  if (model == nullptr) {
    const support::TemporaryDirectory directory;
    support::RandomModelOptions options;
    options.config = kind == "heads" || kind == "narrow" ? support::TinyConfig()
                     : kind == "sliding"                 ? support::TinySlidingConfig()
                     : kind == "latent"                  ? support::TinyLatentConfig()
                                                         : WideConfig();
    EXPECT_TRUE(support::WriteRandomModel(directory.path(), options).ok());
    Result<std::unique_ptr<Model>> loaded = Model::Load(directory.path());
    EXPECT_TRUE(loaded.ok()) << loaded.status().ToString();
    model = *std::move(loaded);
  }
  return *model;
}

const KltPack& PackOf(const std::string& kind) {
  static std::map<std::string, KltPack> packs;
  Random random(12);
  const bool narrow = kind == "narrow";
  if (!packs.contains(kind)) {
    packs[kind] = RandomKltPack(
        ModelOf(kind), &random,
        {.group_width = narrow ? StateWidth(ModelOf(kind).config()) : kKltGroupWidth});
  }
  return packs[kind];
}

std::string NameOf(const testing::TestParamInfo<const char*>& of) { return of.param; }

KltCoder::Extents Encode(const KltCoder& coder, const KltBlock& block, int position) {
  KltCoder::Extents extents;
  coder.Encode(KltSide::OfTokens(&coder, block.tokens, nullptr), position, block.rows, &extents);
  return extents;
}

// Reads a group at its first `cuts` cuts.
Status ReadGroup(KltReader* reader, const KltCoder::Extents& extents, size_t group, size_t cuts,
                 KltCoder::Rows* rows) {
  std::vector<std::span<const std::byte>> of_group;
  for (size_t cut = 0; cut < cuts; ++cut) of_group.emplace_back(extents[cut][group]);
  return reader->Read(group, of_group, rows);
}

// All groups, at the first `cuts` cuts.
Status Read(const KltCoder& coder, const KltBlock& block, int position,
            const KltCoder::Extents& extents, size_t cuts, KltCoder::Rows* rows) {
  KltReader reader(&coder, KltSide::OfTokens(&coder, block.tokens, nullptr), position);
  for (size_t group = 0; group < coder.groups(); ++group)
    KV_RETURN_IF_ERROR(ReadGroup(&reader, extents, group, cuts, rows));
  return OkStatus();
}

// One group as an encoder takes it.
struct Seen {
  KltCoder::Code code;
  std::vector<float> predicted;
  std::vector<std::vector<float>> values;  // after each cut, as Code's
};
std::vector<Seen> Look(const KltCoder& coder, const KltBlock& block, int position) {
  const KltSide side = KltSide::OfTokens(&coder, block.tokens, nullptr);
  std::vector<kernels::SparseRows> first;
  std::vector<Seen> seen(coder.groups());
  for (size_t group = 0; group < coder.groups(); ++group) {
    Seen& of = seen[group];
    coder.Predict(group, side, first, position, &of.predicted);
    std::vector<float> left = coder.Gathered(group, block.rows);
    const std::vector<int8_t> finer = coder.Finer(group, left);
    for (size_t i = 0; i < left.size(); ++i) left[i] -= of.predicted[i];
    const KltCoder::Watch watch = [&](size_t, const KltCoder::Code& code) {
      of.values.push_back(code.values.Dense());
    };
    coder.CodeGroup(group, position, left, finer, &of.code, &watch);
    first.push_back(of.code.first);
  }
  return seen;
}

// What a reader must have of a block at so many cuts.
KltCoder::Rows Expected(const KltCoder& coder, const std::vector<Seen>& seen, size_t cuts) {
  const KltPack& pack = coder.pack();
  KltCoder::Rows rows(static_cast<size_t>(pack.layers));
  for (size_t group = 0; group < seen.size(); ++group) {
    std::vector<float> together = seen[group].predicted;
    kernels::OrderedMultiplyAdd(coder.transform().bases[group].synthesis,
                                seen[group].values[cuts - 1].data(), kBlockTokens, together.data());
    auto at = together.begin();
    for (int token = 0; token < kBlockTokens; ++token) {
      for (const int layer : coder.transform().groups[group].layers) {
        std::vector<float>& of_layer = rows[static_cast<size_t>(layer)];
        of_layer.insert(of_layer.end(), at, at + pack.width);
        at += pack.width;
      }
    }
  }
  return rows;
}

double SquaredError(const std::vector<float>& a, const std::vector<float>& b, size_t begin,
                    size_t end) {
  double sum = 0;
  for (size_t i = begin; i < end; ++i) sum += std::pow(static_cast<double>(a[i] - b[i]), 2);
  return sum / static_cast<double>(end - begin);
}

class Klt : public testing::TestWithParam<const char*> {
 protected:
  static void SetUpTestSuite() { ASSERT_TRUE(kernels::LoadBlas().ok()); }
  // All deviations such that every coefficient is coded at every cut, and at none with low bits.
  void CodeAll() {
    for (KltBasis& basis : pack_.transforms[0].bases) {
      std::fill(basis.importance.begin(), basis.importance.end(), 0.0F);
      std::fill(basis.deviation.begin(), basis.deviation.end(), 0.5F);
      for (auto& deviation : basis.sink_deviation)
        std::fill(deviation.begin(), deviation.end(), 0.25F);
    }
  }

  Random random_{11};
  const Model& model_ = ModelOf(GetParam());
  KltPack pack_ = PackOf(GetParam());
  // Far from what the pack predicts: many levels are large.
  KltBlock block_ = RandomKltBlock(model_, 3, &random_);
};
INSTANTIATE_TEST_SUITE_P(Models, Klt,
                         testing::Values("heads", "sliding", "latent", "wide", "narrow"), NameOf);

TEST_P(Klt, DecodesWhatItEncodedAtEveryCut) {
  for (size_t cut = 0; cut < kCutsOfPack; ++cut) {
    const KltCoder coder(&model_, &pack_, {cut});
    for (const int position : kPositions) {
      const KltCoder::Extents extents = Encode(coder, block_, position);
      ASSERT_EQ(extents.size(), 1U);
      ASSERT_EQ(extents[0].size(), pack_.transforms[0].groups.size());
      KltCoder::Rows rows;
      const Status status = Read(coder, block_, position, extents, 1, &rows);
      ASSERT_TRUE(status.ok()) << status.ToString();
      EXPECT_EQ(rows, Expected(coder, Look(coder, block_, position), 1)) << "cut " << cut;
    }
  }
}

TEST_P(Klt, RefiningCutsAreReadAtAnyNumberOfThem) {
  for (size_t count = 2; count <= kRefining.size(); ++count) {
    const KltCoder coder(&model_, &pack_, {kRefining.begin(), kRefining.begin() + count});
    for (const int position : kPositions) {
      const KltCoder::Extents extents = Encode(coder, block_, position);
      const std::vector<Seen> seen = Look(coder, block_, position);
      for (size_t cuts = 1; cuts <= count; ++cuts) {
        KltCoder::Rows rows;
        const Status status = Read(coder, block_, position, extents, cuts, &rows);
        ASSERT_TRUE(status.ok()) << status.ToString();
        EXPECT_EQ(rows, Expected(coder, seen, cuts)) << cuts << " of " << count;
      }
    }
  }
}

// The bytes of a cut depend on those before it, never on those behind it.
TEST_P(Klt, CutsArePrefixesOfEachOther) {
  for (const int position : kPositions) {
    const KltCoder::Extents all = Encode(KltCoder(&model_, &pack_, kRefining), block_, position);
    const KltCoder::Extents two =
        Encode(KltCoder(&model_, &pack_, {kRefining[0], kRefining[1]}), block_, position);
    EXPECT_EQ(all[0], two[0]);
    EXPECT_EQ(all[1], two[1]);
    for (size_t i = 0; i < kRefining.size(); ++i) {
      const KltCoder alone(&model_, &pack_, {kRefining[i]});
      const KltCoder::Extents extents = Encode(alone, block_, position);
      if (i > 0) {
        EXPECT_NE(extents[0], all[i]);  // it doesn't refine
        continue;
      }
      EXPECT_EQ(extents[0], all[0]);
      KltCoder::Rows one_of_three;
      KltCoder::Rows one;
      const KltCoder coder(&model_, &pack_, kRefining);
      ASSERT_TRUE(Read(coder, block_, position, all, 1, &one_of_three).ok());
      ASSERT_TRUE(Read(alone, block_, position, extents, 1, &one).ok());
      EXPECT_EQ(one_of_three, one);
    }
  }
}

TEST_P(Klt, ErrorsAreBoundedByTheStep) {
  CodeAll();
  std::vector<std::vector<size_t>> chains = {kRefining};
  for (size_t cut = 0; cut < kCutsOfPack; ++cut) chains.push_back({cut});
  // The farther of the two levels around a coefficient, and what their mean lies beside it.
  constexpr float kMost = 1.06F;
  for (const std::vector<size_t>& cuts : chains) {
    const KltCoder coder(&model_, &pack_, cuts);
    for (const int position : kPositions) {
      const std::vector<Seen> seen = Look(coder, block_, position);
      for (size_t group = 0; group < seen.size(); ++group) {
        const std::vector<float>& exact = seen[group].code.coefficients;
        const size_t sinks_end =
            position == 0
                ? kKltSinks * static_cast<size_t>(pack_.transforms[0].bases[group].coefficients)
                : 0;
        for (size_t cut = 0; cut < cuts.size(); ++cut) {
          for (size_t i = 0; i < exact.size(); ++i) {
            const KltToken token = seen[group].code.tokens[i * kBlockTokens / exact.size()];
            const float step = i < sinks_end ? pack_.sink_step : StepOf(token, coder.cut(cut).step);
            ASSERT_LE(std::abs(exact[i] - seen[group].values[cut][i]), kMost * step)
                << "coefficient " << i << " of group " << group << " at cut " << cut;
          }
        }
      }
    }
  }
}

// The same in what a reader has: all the coefficients of the first group say all of its rows.
TEST_P(Klt, ErrorsOfRowsAreBoundedByTheStep) {
  CodeAll();
  const KltCoder coder(&model_, &pack_, kRefining);
  const KltCoder::Extents extents = Encode(coder, block_, 0);
  for (size_t cuts = 1; cuts <= kRefining.size(); ++cuts) {
    KltCoder::Rows rows;
    ASSERT_TRUE(Read(coder, block_, 0, extents, cuts, &rows).ok());
    std::vector<float> error = coder.Gathered(0, block_.rows);
    std::vector<float> read = coder.Gathered(0, rows);
    for (size_t i = 0; i < error.size(); ++i) error[i] -= read[i];
    const KltBasis& basis = pack_.transforms[0].bases[0];
    std::vector<float> coefficients(kBlockTokens * static_cast<size_t>(basis.coefficients));
    kernels::OrderedMultiply(basis.analysis, error.data(), kBlockTokens, nullptr,
                             coefficients.data());
    // The pack's matrices are rounded to bf16, 2^-9 of coefficients up to some 20.
    for (const float c : coefficients)
      ASSERT_LE(std::abs(c), 1.06F * coder.cut(cuts - 1).step + 0.1F);
  }
}

TEST_P(Klt, SinksAreFiner) {
  CodeAll();
  const KltCoder coder(&model_, &pack_, kRefining);
  for (const int position : kPositions) {
    const std::vector<Seen> seen = Look(coder, block_, position);
    for (size_t group = 0; group < seen.size(); ++group) {
      const auto& [code, predicted, values] = seen[group];
      const size_t size = code.coefficients.size();
      const size_t sinks_end = kKltSinks * size / kBlockTokens;
      for (size_t cut = 0; cut < values.size(); ++cut) {
        const double of_sinks = SquaredError(code.coefficients, values[cut], 0, sinks_end);
        const double of_others = SquaredError(code.coefficients, values[cut], sinks_end, size);
        if (position == 0) {
          EXPECT_LT(3 * of_sinks, of_others) << "cut " << cut;
          EXPECT_TRUE(std::equal(values[0].begin(),
                                 values[0].begin() + static_cast<ptrdiff_t>(sinks_end),
                                 values[cut].begin()))
              << "the first cut says all of them";
        } else {
          EXPECT_LT(of_others, 1.5 * of_sinks) << "cut " << cut;
        }
      }
    }
  }
}

TEST_P(Klt, ASequencesFirstTokenHasAPredictionOfItsOwn) {
  const KltCoder coder(&model_, &pack_, {0});
  const std::vector<Seen> first = Look(coder, block_, 0);
  const std::vector<Seen> later = Look(coder, block_, kBlockTokens);
  for (size_t group = 0; group < first.size(); ++group) {
    const KltBasis& basis = pack_.transforms[0].bases[group];
    const auto width = static_cast<ptrdiff_t>(basis.width);
    const std::vector<float>& predicted = first[group].predicted;
    EXPECT_TRUE(std::equal(basis.sink_bias.begin(), basis.sink_bias.end(), predicted.begin()));
    EXPECT_FALSE(
        std::equal(predicted.begin(), predicted.begin() + width, later[group].predicted.begin()));
    if (group > 0) continue;  // the others are predicted from sinks, too
    EXPECT_TRUE(std::equal(predicted.begin() + width, predicted.end(),
                           later[group].predicted.begin() + width));
  }
}

TEST_P(Klt, AFinerStepTakesMoreBytes) {
  size_t last = 0;
  for (const float step : {4.0F, 1.0F, 0.25F, 0.0625F}) {
    pack_.transforms[0].cuts[0].step = step;
    size_t bytes = 0;
    const KltCoder::Extents extents = Encode(KltCoder(&model_, &pack_, {0}), block_, kBlockTokens);
    for (const auto& extent : extents[0]) bytes += extent.size();
    EXPECT_GT(bytes, last);
    last = bytes;
  }
}

TEST_P(Klt, GroupsMayBeReadAtCutsOfTheirOwn) {
  const KltCoder coder(&model_, &pack_, kRefining);
  const KltCoder::Extents extents = Encode(coder, block_, 0);
  std::vector<KltCoder::Rows> at(kRefining.size() + 1);
  for (size_t cuts = 1; cuts <= kRefining.size(); ++cuts)
    ASSERT_TRUE(Read(coder, block_, 0, extents, cuts, &at[cuts]).ok());
  KltReader reader(&coder, KltSide::OfTokens(&coder, block_.tokens, nullptr), 0);
  KltCoder::Rows rows;
  for (size_t group = 0; group < coder.groups(); ++group) {
    const size_t cuts = 1 + (group + 1) % kRefining.size();
    ASSERT_TRUE(ReadGroup(&reader, extents, group, cuts, &rows).ok());
    for (const int layer : pack_.transforms[0].groups[group].layers) {
      const auto l = static_cast<size_t>(layer);
      EXPECT_EQ(rows[l], at[cuts][l]) << "layer " << layer;
    }
  }
}

TEST_P(Klt, GlobalGroupsAreReadWithoutSlidingOnes) {
  const KltCoder coder(&model_, &pack_, kRefining);
  const KltCoder::Extents extents = Encode(coder, block_, kBlockTokens);
  KltCoder::Rows all;
  ASSERT_TRUE(Read(coder, block_, kBlockTokens, extents, 2, &all).ok());
  KltReader reader(&coder, KltSide::OfTokens(&coder, block_.tokens, nullptr), kBlockTokens);
  KltCoder::Rows rows;
  for (size_t group = 0; group < coder.groups(); ++group) {
    if (!pack_.transforms[0].groups[group].global) continue;
    ASSERT_TRUE(ReadGroup(&reader, extents, group, 2, &rows).ok());
  }
  ASSERT_EQ(rows.size(), all.size());
  for (int layer = 0; layer < pack_.layers; ++layer) {
    const auto l = static_cast<size_t>(layer);
    if (model_.config().Window(layer) == 0) {
      EXPECT_EQ(rows[l], all[l]) << "layer " << layer;
    } else {
      EXPECT_THAT(rows[l], IsEmpty()) << "layer " << layer;
    }
  }
}

TEST_P(Klt, WhatHasNoTableIsNotThere) {
  for (KltBasis& basis : pack_.transforms[0].bases) {
    std::fill(basis.deviation.begin(), basis.deviation.end(), 0.0F);
    for (auto& deviation : basis.sink_deviation)
      std::fill(deviation.begin(), deviation.end(), 0.0F);
  }
  const KltCoder coder(&model_, &pack_, kRefining);
  const KltCoder::Extents extents = Encode(coder, block_, 0);
  const std::vector<Seen> seen = Look(coder, block_, 0);
  for (size_t cut = 0; cut < extents.size(); ++cut) {
    const size_t tokens = cut == 0 ? kBlockTokens : 0;
    for (const auto& extent : extents[cut])
      EXPECT_EQ(extent.size(), tokens + sizeof(uint32_t) + kernels::RansBound(0));
  }
  KltCoder::Rows rows;
  ASSERT_TRUE(Read(coder, block_, 0, extents, 3, &rows).ok());
  for (size_t group = 0; group < seen.size(); ++group)
    EXPECT_EQ(coder.Gathered(group, rows), seen[group].predicted);
}

// A token whose values are nearly 0, as an attention sink's are, where the pack says that this
// makes it matter.
TEST_P(Klt, TokensThatMatterMoreAreFiner) {
  CodeAll();
  const KltCoder coder(&model_, &pack_, kRefining);
  const size_t group = coder.groups() - 1;
  KltBasis& basis = pack_.transforms[0].bases[group];
  constexpr size_t kSink = 9;
  const auto width = static_cast<size_t>(pack_.width);
  const int layer = coder.transform().groups[group].layers[0];
  float* row = block_.rows[static_cast<size_t>(layer)].data() + kSink * width;
  for (size_t c = 0; c < width; ++c) row[c] *= 1.0F / 1024;
  basis.importance[2] = -1;
  basis.importance[0] = 3;  // log2 of the others' mean square
  const std::vector<Seen> seen = Look(coder, block_, kBlockTokens);
  const auto& [code, predicted, values] = seen[group];
  const size_t count = code.coefficients.size() / kBlockTokens;
  for (size_t t = 0; t < kBlockTokens; ++t) {
    if (t == kSink) {
      EXPECT_EQ(code.tokens[t].finer, kKltMostFiner);
    } else {
      EXPECT_LE(code.tokens[t].finer, 5);
    }
  }
  for (size_t cut = 0; cut < kRefining.size(); ++cut) {
    const double of_sink =
        SquaredError(code.coefficients, values[cut], kSink * count, (kSink + 1) * count);
    const double of_all = SquaredError(code.coefficients, values[cut], 0, kBlockTokens * count);
    EXPECT_LT(100 * of_sink, of_all);
  }
}

// A coefficient that a coarse cut has no table for begins at a finer one.
TEST_P(Klt, WhatACutLeavesOutALaterOneMayHold) {
  for (KltBasis& basis : pack_.transforms[0].bases)
    std::fill(basis.deviation.begin(), basis.deviation.end(), 0.125F);  // 1/16 of the coarse step
  for (KltBasis& basis : pack_.transforms[0].bases)
    std::fill(basis.importance.begin(), basis.importance.end(), 0.0F);
  const KltCoder coder(&model_, &pack_, kRefining);
  const std::vector<Seen> seen = Look(coder, block_, kBlockTokens);
  for (const Seen& of : seen) {
    for (size_t i = 0; i < of.code.coefficients.size(); ++i) {
      EXPECT_EQ(of.values[0][i], 0);
      ASSERT_LE(std::abs(of.values[2][i] - of.code.coefficients[i]), 1.2F * pack_.cuts()[0].step);
    }
  }
}

TEST_P(Klt, LargeLevelsEscapeAndTheLargestAreClamped) {
  for (const double deviation : {1e3, 1e6, 1e30}) {
    const KltBlock block = RandomKltBlock(model_, deviation, &random_);
    const KltCoder coder(&model_, &pack_, kRefining);
    const KltCoder::Extents extents = Encode(coder, block, 0);
    const std::vector<Seen> seen = Look(coder, block, 0);
    int32_t largest = 0;
    for (const Seen& of : seen) {
      for (const KltCoder::Code::OfCut& cut : of.code.cuts) {
        for (size_t i = 0; i < cut.read.size(); ++i)
          largest = std::max(largest, std::abs(cut.read.Level(i)));
      }
    }
    if (deviation > 1e5) {
      EXPECT_GE(largest, kKltLargestLevel - 1);
    }
    EXPECT_LE(largest, kKltLargestLevel);
    KltCoder::Rows rows;
    for (size_t cuts = 1; cuts <= kRefining.size(); ++cuts) {
      const Status status = Read(coder, block, 0, extents, cuts, &rows);
      ASSERT_TRUE(status.ok()) << status.ToString();
      EXPECT_EQ(rows, Expected(coder, seen, cuts));
    }
  }
}

// Bytes that nobody vouches for, in place of one extent.
class KltHostile : public Klt {
 protected:
  // Reads all groups at all cuts; what comes out is finite.
  Status Try(const KltCoder& coder, int position, const KltCoder::Extents& extents) {
    KltCoder::Rows rows;
    const Status status = Read(coder, block_, position, extents, coder.cuts(), &rows);
    if (!status.ok()) {
      EXPECT_EQ(status.code(), StatusCode::kDataLoss) << status.ToString();
      return status;
    }
    for (const std::vector<float>& of_layer : rows) {
      EXPECT_EQ(of_layer.size(), kBlockTokens * static_cast<size_t>(pack_.width));
      EXPECT_TRUE(
          std::all_of(of_layer.begin(), of_layer.end(), [](float x) { return std::isfinite(x); }));
    }
    return status;
  }
};
INSTANTIATE_TEST_SUITE_P(Models, KltHostile,
                         testing::Values("heads", "sliding", "latent", "narrow"), NameOf);

TEST_P(KltHostile, TruncatedAndProlongedExtentsAreRefused) {
  const KltCoder coder(&model_, &pack_, kRefining);
  const KltCoder::Extents extents = Encode(coder, block_, 0);
  for (size_t cut = 0; cut < extents.size(); ++cut) {
    for (size_t group = 0; group < coder.groups(); ++group) {
      const size_t size = extents[cut][group].size();
      for (size_t length = 0; length < size; length += 1 + length / 8) {
        KltCoder::Extents shorter = extents;
        // A copy of its own, so that a sanitizer sees the first byte read past the end.
        shorter[cut][group] = {extents[cut][group].begin(),
                               extents[cut][group].begin() + static_cast<ptrdiff_t>(length)};
        EXPECT_FALSE(Try(coder, 0, shorter).ok()) << length << " of " << size;
      }
      KltCoder::Extents longer = extents;
      longer[cut][group].push_back({});
      EXPECT_FALSE(Try(coder, 0, longer).ok());
    }
  }
}

TEST_P(KltHostile, ChangedBytesAreRefusedOrAnotherBlock) {
  const KltCoder coder(&model_, &pack_, kRefining);
  for (const int position : kPositions) {
    const KltCoder::Extents extents = Encode(coder, block_, position);
    for (int trial = 0; trial < 200; ++trial) {
      KltCoder::Extents changed = extents;
      auto& extent = changed[random_.Below(extents.size())][random_.Below(coder.groups())];
      for (uint64_t times = 1 + random_.Below(3); times > 0; --times)
        extent[random_.Below(extent.size())] ^= static_cast<std::byte>(1 + random_.Below(255));
      // The checksum finds it; here nothing may break.
      static_cast<void>(Try(coder, position, changed));
    }
  }
}

TEST_P(KltHostile, RandomBytesAreRefused) {
  const KltCoder coder(&model_, &pack_, kRefining);
  const KltCoder::Extents extents = Encode(coder, block_, 0);
  for (int trial = 0; trial < 100; ++trial) {
    KltCoder::Extents changed = extents;
    auto& extent = changed[random_.Below(extents.size())][random_.Below(coder.groups())];
    extent.resize(random_.Below(2 * extent.size()));
    for (std::byte& byte : extent) byte = static_cast<std::byte>(random_.Next());
    // Half of them have a length of symbols that fits.
    if (extent.size() > sizeof(uint32_t) && random_.Chance(0.5))
      StoreLittle(extent.data(),
                  static_cast<uint32_t>(random_.Below(extent.size() - sizeof(uint32_t))));
    EXPECT_FALSE(Try(coder, 0, changed).ok());
  }
}

TEST_P(KltHostile, ExtentsOfAnotherPlaceAreRefusedOrAnotherBlock) {
  const KltCoder coder(&model_, &pack_, kRefining);
  const KltCoder::Extents extents = Encode(coder, block_, 0);
  // Sinks have other places.
  EXPECT_FALSE(Try(coder, kBlockTokens, extents).ok());
  KltCoder::Extents swapped = extents;
  std::swap(swapped[0], swapped[1]);
  EXPECT_FALSE(Try(coder, 0, swapped).ok());
  for (size_t group = 1; group < coder.groups(); ++group) {
    swapped = extents;
    std::swap(swapped[0][0], swapped[0][group]);
    EXPECT_FALSE(Try(coder, 0, swapped).ok());
  }
  // What refines another block of the same tokens has the same places only where that one's levels
  // are 0 at the same coefficients.
  const KltBlock other = RandomKltBlock(model_, 1, &random_);
  KltCoder::Extents mixed = extents;
  mixed[1] = Encode(coder, {block_.tokens, other.rows}, 0)[1];
  static_cast<void>(Try(coder, 0, mixed));
}

using KltState = Klt;
INSTANTIATE_TEST_SUITE_P(Models, KltState, testing::Values("heads", "sliding", "latent", "narrow"),
                         NameOf);

TEST_P(KltState, RowsAreTheStateWithItsRopeTakenBack) {
  const kernels::LayerShape state = model_.config().StateShape(1);
  const int key_width = state.keys.kv_heads * state.keys.head_dim;
  for (int layer = 0; layer < pack_.layers; ++layer) {
    const std::vector<float>& exact = block_.rows[static_cast<size_t>(layer)];
    std::vector<float> keys(static_cast<size_t>(kBlockTokens * key_width));
    std::vector<float> values(static_cast<size_t>(kBlockTokens * (pack_.width - key_width)));
    ScatterState(model_, layer, 64, kBlockTokens, exact.data(), keys.data(), values.data());
    EXPECT_GT(std::abs(keys[0] - exact[0]), 1e-3F);
    EXPECT_EQ(values[0], exact[static_cast<size_t>(key_width)]);
    std::vector<float> rows(exact.size());
    GatherState(model_, layer, 64, kBlockTokens, keys.data(), values.data(), rows.data());
    for (size_t i = 0; i < rows.size(); ++i) EXPECT_NEAR(rows[i], exact[i], 1e-5);
  }
}

// A reader that computes the first layers itself: what enters the next one predicts the others, and
// nothing is said of its own layers.
TEST_P(Klt, LayersMayBeRecomputed) {
  for (size_t t = 1; t < pack_.transforms.size(); ++t) {
    const KltTransform& transform = pack_.transforms[t];
    const KltCoder coder(&model_, &pack_, kRefining, t);
    ASSERT_EQ(coder.transform().recomputed, transform.recomputed);
    std::vector<float> entering = coder.Embeddings(block_.tokens);
    for (float& x : entering) x += static_cast<float>(random_.Normal());
    const KltSide side = KltSide::OfEntering(&coder, entering);
    for (const int position : kPositions) {
      KltCoder::Extents extents;
      coder.Encode(side, position, block_.rows, &extents);
      ASSERT_EQ(extents[0].size(), transform.groups.size());
      std::vector<double> errors;
      for (size_t cuts = 1; cuts <= kRefining.size(); ++cuts) {
        KltReader reader(&coder, side, position);
        KltCoder::Rows rows(static_cast<size_t>(pack_.layers));
        for (int layer = 0; layer < transform.first_layer(); ++layer)
          rows[static_cast<size_t>(layer)] = {7};
        for (size_t group = 0; group < coder.groups(); ++group)
          ASSERT_TRUE(ReadGroup(&reader, extents, group, cuts, &rows).ok());
        double error = 0;
        for (int layer = 0; layer < pack_.layers; ++layer) {
          const auto l = static_cast<size_t>(layer);
          if (layer < transform.first_layer()) {
            EXPECT_THAT(rows[l], testing::ElementsAre(7)) << "layer " << layer;
          } else {
            error += SquaredError(rows[l], block_.rows[l], 0, rows[l].size());
          }
        }
        errors.push_back(error);
      }
      EXPECT_GT(errors[0], errors[1]);
      EXPECT_GT(errors[1], errors[2]);
      // Another prediction reads other rows.
      KltReader other(&coder, KltSide::OfEntering(&coder, coder.Embeddings(block_.tokens)),
                      position);
      KltCoder::Rows rows(static_cast<size_t>(pack_.layers));
      ASSERT_TRUE(ReadGroup(&other, extents, 0, 1, &rows).ok());
      KltReader reader(&coder, side, position);
      KltCoder::Rows right(static_cast<size_t>(pack_.layers));
      ASSERT_TRUE(ReadGroup(&reader, extents, 0, 1, &right).ok());
      EXPECT_NE(rows, right);
    }
  }
}

TEST(KltGroupsTest, GlobalLayersComeFirstAndAloneAmongTheirSources) {
  ModelConfig config = support::TinyConfig();  // 64 floats a layer: 48 of them make a group
  config.layers = 100;
  std::vector<KltGroup> groups = KltGroups(config, 0, kKltGroupWidth);
  ASSERT_EQ(groups.size(), 3U);
  for (size_t group = 0; group < groups.size(); ++group) {
    EXPECT_TRUE(groups[group].global);
    EXPECT_EQ(groups[group].layers.front(), static_cast<int>(group * 100 / 3));
    EXPECT_EQ(groups[group].layers.back(), static_cast<int>((group + 1) * 100 / 3) - 1);
  }
  EXPECT_THAT(groups[0].sources, IsEmpty());
  EXPECT_THAT(groups[1].sources, ElementsAre(0));
  EXPECT_THAT(groups[2].sources, ElementsAre(1));

  config.sliding_window = 100;
  config.sliding.assign(100, true);
  for (const size_t layer : {5U, 50U, 98U}) config.sliding[layer] = false;
  groups = KltGroups(config, 0, kKltGroupWidth);
  ASSERT_EQ(groups.size(), 4U);
  EXPECT_TRUE(groups[0].global);
  EXPECT_THAT(groups[0].layers, ElementsAre(5, 50, 98));
  size_t sliding = 0;
  for (size_t group = 1; group < groups.size(); ++group) {
    EXPECT_FALSE(groups[group].global);
    EXPECT_TRUE(std::is_sorted(groups[group].layers.begin(), groups[group].layers.end()));
    sliding += groups[group].layers.size();
  }
  EXPECT_EQ(sliding, 97U);
  EXPECT_THAT(groups[1].sources, ElementsAre(0));
  EXPECT_THAT(groups[2].sources, ElementsAre(1, 0));
  EXPECT_THAT(groups[3].sources, ElementsAre(2, 0));

  config.sliding.assign(100, true);
  groups = KltGroups(config, 0, kKltGroupWidth);
  ASSERT_EQ(groups.size(), 3U);
  EXPECT_THAT(groups[0].sources, IsEmpty());
  EXPECT_THAT(groups[2].sources, ElementsAre(1));
}

TEST(KltGroupsTest, AreAsWideAsThePackSays) {
  ModelConfig config = support::TinyConfig();
  config.layers = 7;
  const int width = StateWidth(config);
  for (const auto& [most, count] :
       {std::pair{1, 7U}, {width, 7U}, {2 * width, 4U}, {4 * width, 2U}})
    EXPECT_EQ(KltGroups(config, 0, most).size(), count) << most;
}

TEST(KltGroupsTest, AWideLayerIsAGroupOfItsOwn) {
  ModelConfig config = support::TinyConfig();
  config.kv_heads = 32;
  config.head_dim = 128;
  const std::vector<KltGroup> groups = KltGroups(config, 0, kKltGroupWidth);
  ASSERT_EQ(groups.size(), 2U);
  EXPECT_THAT(groups[1].layers, ElementsAre(1));
}

TEST(KltGroupsTest, OnlyTheFirstCoefficientsPredictOtherGroups) {
  ASSERT_TRUE(kernels::LoadBlas().ok());
  const KltPack& pack = PackOf("wide");
  ASSERT_EQ(pack.transforms[0].bases.size(), 2U);
  ASSERT_GT(pack.transforms[0].bases[0].coefficients, kKltSourceCoefficients);
  EXPECT_EQ(pack.transforms[0].bases[1].inputs, pack.hidden + kKltSourceCoefficients);
}

}  // namespace
}  // namespace kvant::node
