// What `kvant eval` measures: against brute force, and against what is known to hold of any model.
#include "node/eval_measure.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "base/random.h"
#include "kernels/blas.h"
#include "kernels/float_formats.h"
#include "kernels/raw_codec.h"
#include "node/eval_command.h"
#include "node/eval_past.h"
#include "tests/support/random_klt_pack.h"
#include "tests/support/random_model.h"

namespace kvant::node {
namespace {

using Floats = std::vector<float>;

std::vector<int32_t> RandomTokens(size_t count, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < count; ++i) tokens.push_back(static_cast<int32_t>(random.Below(256)));
  return tokens;
}

class EvalMeasureTest : public testing::Test {
 protected:
  static constexpr size_t kPrefix = 192;
  static constexpr size_t kSuffix = 100;  // a whole block and a part of one

  static void SetUpTestSuite() {
    ASSERT_TRUE(kernels::LoadBlas().ok());
    const support::TemporaryDirectory directory;
    support::RandomModelOptions options;
    options.config = support::TinyConfig();
    ASSERT_TRUE(support::WriteRandomModel(directory.path(), options).ok());
    Result<std::unique_ptr<Model>> model = Model::Load(directory.path());
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = model->release();
    pool_ = new kernels::ThreadPool(2);
    Result<EvalPlan> plan = MakeEvalPlan(model_, {}, {});
    ASSERT_TRUE(plan.ok()) << plan.status().message();
    plan_ = new EvalPlan(*std::move(plan));
  }
  static void TearDownTestSuite() {
    delete plan_;
    delete pool_;
    delete model_;
  }

  static EvalWindow Window(uint64_t seed) {
    EvalWindow window;
    window.prefix = RandomTokens(kPrefix, seed);
    window.suffix = RandomTokens(kSuffix, seed + 100);
    window.stranger = RandomTokens(kPrefix, seed + 200);
    window.copy.assign(window.prefix.begin() + 30, window.prefix.begin() + 110);
    return window;
  }
  static size_t SettingOf(const std::string& codec, const std::string& wire) {
    for (size_t i = 0; i < plan_->settings.size(); ++i) {
      const EvalSetting& setting = plan_->settings[i];
      if (setting.block_class->codec().name == codec && setting.wire == wire) return i;
    }
    ADD_FAILURE() << codec << " " << wire << " is not measured";
    return 0;
  }
  // Mean nats of tokens[1..] behind a prefix, without anything of the Evaluator.
  static double LossBehind(const EncodedBlocks& prefix, std::span<const int32_t> tokens) {
    Decoder decoder(model_, pool_);
    const BlockClass fp32(model_, &kernels::kRawFp32Codec, {});
    EncodedBlocks own(&fp32);
    EvalPast past(&prefix, prefix.block_class().FullCuts(), &own);
    const auto vocab = static_cast<size_t>(model_->config().vocab);
    Floats logits(kBlockTokens * vocab);
    double nats = 0;
    for (size_t at = 0; at < tokens.size(); at += kBlockTokens) {
      const auto block = tokens.subspan(at, std::min<size_t>(kBlockTokens, tokens.size() - at));
      own.Begin();
      EXPECT_TRUE(decoder
                      .Prefill(
                          {block, past.tokens(), &past},
                          [&](int layer, const float* keys, const float* values) {
                            own.EncodeLayer(layer, keys, values);
                            return OkStatus();
                          },
                          logits.data())
                      .ok());
      own.Finish();
      for (size_t row = 0; row < block.size() && at + row + 1 < tokens.size(); ++row) {
        const float* x = logits.data() + row * vocab;
        double sum = 0;
        for (size_t i = 0; i < vocab; ++i) sum += std::exp(static_cast<double>(x[i]));
        nats += std::log(sum) - x[tokens[at + row + 1]];
      }
    }
    return nats / static_cast<double>(tokens.size() - 1);
  }
  static double MeanKl(const FormMeasures& form) {
    double sum = 0;
    size_t count = 0;
    for (const SuffixMeasure& window : form.windows) {
      for (const float kl : window.kl) sum += kl;
      count += window.kl.size();
    }
    return sum / static_cast<double>(count);
  }

  static Model* model_;
  static kernels::ThreadPool* pool_;
  static EvalPlan* plan_;
};
Model* EvalMeasureTest::model_ = nullptr;
kernels::ThreadPool* EvalMeasureTest::pool_ = nullptr;
EvalPlan* EvalMeasureTest::plan_ = nullptr;

TEST_F(EvalMeasureTest, KlIsTheSumOverTheVocabulary) {
  constexpr int kRows = 5;
  constexpr int kVocab = 37;
  Random random(3);
  Floats exact(kRows * kVocab);
  Floats lossy(exact.size());
  for (size_t i = 0; i < exact.size(); ++i) {
    exact[i] = static_cast<float>(4 * random.Normal());
    lossy[i] = exact[i] + static_cast<float>(0.3 * random.Normal());
  }
  for (int i = 0; i < kVocab; ++i) lossy[static_cast<size_t>(i)] = exact[static_cast<size_t>(i)];
  ReferenceRows reference;
  const auto exact_sums = LogSums(exact.data(), kRows, kVocab, pool_);
  ASSERT_TRUE(exact_sums.ok());
  reference.Set(exact.data(), *exact_sums, kVocab, pool_);
  const auto sums = LogSums(lossy.data(), kRows, kVocab, pool_);
  ASSERT_TRUE(sums.ok());
  float kl[kRows];
  uint8_t agree[kRows];
  reference.Compare(lossy.data(), *sums, pool_, kl, agree);
  for (int row = 0; row < kRows; ++row) {
    const float* p = exact.data() + row * kVocab;
    const float* q = lossy.data() + row * kVocab;
    long double sum_p = 0;
    long double sum_q = 0;
    for (int i = 0; i < kVocab; ++i) {
      sum_p += std::exp(static_cast<long double>(p[i]));
      sum_q += std::exp(static_cast<long double>(q[i]));
    }
    long double expected = 0;
    for (int i = 0; i < kVocab; ++i) {
      expected += std::exp(static_cast<long double>(p[i])) / sum_p *
                  ((p[i] - std::log(sum_p)) - (q[i] - std::log(sum_q)));
    }
    EXPECT_NEAR(kl[row], static_cast<double>(expected), 1e-7);
    EXPECT_EQ(agree[row] != 0,
              std::max_element(p, p + kVocab) - p == std::max_element(q, q + kVocab) - q);
  }
  EXPECT_EQ(kl[0], 0.0F);
}

TEST_F(EvalMeasureTest, LogitsThatAreNotFiniteAreRefused) {
  Floats logits(10, 1.0F);
  logits[7] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(LogSums(logits.data(), 2, 5, pool_).status().code(), StatusCode::kDataLoss);
}

TEST_F(EvalMeasureTest, RawLosesNothingAndFewerBitsLoseMore) {
  Evaluator evaluator(model_, pool_, plan_->settings, true);
  for (const uint64_t seed : {1, 2, 3}) ASSERT_TRUE(evaluator.AddWindow(Window(seed)).ok());
  const EvalMeasures& m = evaluator.measures();
  ASSERT_EQ(m.exact.windows.size(), 3U);
  const size_t raw = SettingOf("raw", "full");
  for (const FormMeasures* form : {&m.exact, &m.read[raw], &m.in_class[raw]}) {
    ASSERT_EQ(form->windows.size(), 3U);
    for (size_t w = 0; w < 3; ++w) {
      ASSERT_EQ(form->windows[w].kl.size(), kSuffix);
      for (const float kl : form->windows[w].kl) EXPECT_EQ(kl, 0.0F);
      EXPECT_EQ(form->windows[w].agreement, 1.0);
      EXPECT_EQ(form->windows[w].loss, m.exact.windows[w].loss);
      EXPECT_EQ(form->windows[w].copy_loss, m.exact.windows[w].copy_loss);
    }
  }
  const auto read = [&](const char* codec, const char* wire) {
    return MeanKl(m.read[SettingOf(codec, wire)]);
  };
  EXPECT_GT(read("raw-fp32", "full"), 0.0);  // bf16 rounds
  EXPECT_LT(read("raw-fp32", "full"), read("tile8", "full"));
  EXPECT_LT(read("tile8", "full"), read("tile8", "k8v4"));
  EXPECT_LT(read("tile8", "k8v4"), read("tile8", "k4v4"));
  EXPECT_LT(read("tile8", "full"), read("tile4", "full"));
  EXPECT_LT(read("tile4", "full"), read("tile4", "k2v2"));
  // Computed over its own encoded form it is another prefix, about as far away.
  const size_t tile4 = SettingOf("tile4", "full");
  const double in_class = MeanKl(m.in_class[tile4]);
  EXPECT_NE(in_class, MeanKl(m.read[tile4]));
  EXPECT_GT(in_class, 0.3 * MeanKl(m.read[tile4]));
  EXPECT_LT(in_class, 30 * MeanKl(m.read[tile4]));
}

TEST_F(EvalMeasureTest, LossesAreThoseOfAPlainForwardPass) {
  const EvalWindow window = Window(5);
  Evaluator evaluator(model_, pool_, plan_->settings, true);
  ASSERT_TRUE(evaluator.AddWindow(window).ok());
  const EvalMeasures& m = evaluator.measures();
  Decoder decoder(model_, pool_);
  const BlockClass raw(model_, &kernels::kRawBf16Codec, {});
  EncodedBlocks exact(&raw);
  ASSERT_TRUE(PrefillBlocks(&decoder, window.prefix, &exact, {}).ok());
  EXPECT_NEAR(m.exact.windows[0].loss, LossBehind(exact, window.suffix), 1e-9);

  EncodedBlocks stranger(&raw);
  ASSERT_TRUE(PrefillBlocks(&decoder, window.stranger, &stranger, {}).ok());
  ASSERT_EQ(m.stranger_loss.size(), 1U);
  ASSERT_TRUE(m.stranger_loss[0].has_value());
  EXPECT_NEAR(*m.stranger_loss[0], LossBehind(stranger, window.suffix), 1e-9);

  // Zeros that went through an encoder, in another class.
  const BlockClass fp32(model_, &kernels::kRawFp32Codec, {});
  EncodedBlocks zeros(&fp32);
  const Floats nothing(64 * 64, 0.0F);
  for (size_t block = 0; block < kPrefix / kBlockTokens; ++block) {
    zeros.Begin();
    for (int layer = 0; layer < model_->config().layers; ++layer) {
      zeros.EncodeLayer(layer, nothing.data(), nothing.data());
    }
    zeros.Finish();
  }
  ASSERT_EQ(m.zeroed_loss.size(), 1U);
  EXPECT_NEAR(m.zeroed_loss[0], LossBehind(zeros, window.suffix), 1e-9);
  EXPECT_NE(m.zeroed_loss[0], m.exact.windows[0].loss);

  // What a class computes over its own form is what a prefill of that class gives.
  const size_t tile4 = SettingOf("tile4", "full");
  EncodedBlocks own(plan_->settings[tile4].block_class);
  ASSERT_TRUE(PrefillBlocks(&decoder, window.prefix, &own, {}).ok());
  EXPECT_NEAR(m.in_class[tile4].windows[0].loss, LossBehind(own, window.suffix), 1e-9);
}

TEST_F(EvalMeasureTest, APasskeyIsRightIfGreedyDecodingGivesIt) {
  // What the exact model says after a prompt, token by token, is its right answer.
  std::vector<int32_t> tokens = RandomTokens(200, 9);
  Decoder decoder(model_, pool_);
  const BlockClass raw(model_, &kernels::kRawBf16Codec, {});
  EncodedBlocks prefix(&raw);
  ASSERT_TRUE(PrefillBlocks(&decoder, std::span(tokens).first(192), &prefix, {}).ok());
  const auto vocab = static_cast<size_t>(model_->config().vocab);
  for (int i = 0; i < 4; ++i) {
    EvalPast past(&prefix, raw.FullCuts(), nullptr);
    const auto tail = std::span(tokens).subspan(192);
    Floats logits(tail.size() * vocab);
    ASSERT_TRUE(decoder
                    .Prefill(
                        {tail, 192, &past},
                        [](int, const float*, const float*) { return OkStatus(); }, logits.data())
                    .ok());
    const float* last = logits.data() + (tail.size() - 1) * vocab;
    tokens.push_back(static_cast<int32_t>(std::max_element(last, last + vocab) - last));
  }
  PasskeyPrompt prompt;
  prompt.length = 512;
  prompt.depth = 0.25;
  prompt.tokens = tokens;
  prompt.answer_tokens = 4;
  Evaluator evaluator(model_, pool_, plan_->settings, true);
  ASSERT_TRUE(evaluator.AddPasskey(prompt).ok());
  prompt.tokens[202] = (prompt.tokens[202] + 1) % 256;  // one token of the answer is another
  ASSERT_TRUE(evaluator.AddPasskey(prompt).ok());
  const EvalMeasures& m = evaluator.measures();
  EXPECT_EQ(m.exact.passkeys, (std::vector<double>{1, 0}));
  const size_t setting = SettingOf("raw", "full");
  EXPECT_EQ(m.read[setting].passkeys, (std::vector<double>{1, 0}));
  EXPECT_EQ(m.in_class[setting].passkeys, (std::vector<double>{1, 0}));
  for (const FormMeasures& form : m.in_class) EXPECT_EQ(form.passkeys.size(), 2U);
  ASSERT_EQ(m.places.size(), 2U);
  EXPECT_EQ(m.places[0].length, 512);
  EXPECT_EQ(m.places[0].depth, 0.25);
}

// Gives back what it got, at its second wire zeros.
class EchoCoder final : public StateCoder {
 public:
  EchoCoder(bool to_bf16, bool blockwise) : to_bf16_(to_bf16), blockwise_(blockwise) {}

  std::string_view name() const override { return "echo"; }
  std::vector<std::string> wires() const override { return {"full", "zeros"}; }
  bool blockwise() const override { return blockwise_; }
  void Code(const PrefixState& exact, const Sink& sink) const override {
    PrefixState decoded = exact;
    for (int layer = 0; to_bf16_ && layer < exact.layers(); ++layer) {
      const auto tokens = static_cast<size_t>(exact.tokens());
      Round(decoded.keys(layer), tokens * exact.key_width());
      Round(decoded.values(layer), tokens * exact.value_width());
    }
    sink(0, decoded, {.bits = 16 * exact.elements()});
    for (int layer = 0; layer < exact.layers(); ++layer) {
      const auto tokens = static_cast<size_t>(exact.tokens());
      std::fill_n(decoded.keys(layer), tokens * exact.key_width(), 0.0F);
      std::fill_n(decoded.values(layer), tokens * exact.value_width(), 0.0F);
    }
    sink(1, decoded, {.bits = 64});
  }

 private:
  static void Round(float* x, size_t count) {
    for (size_t i = 0; i < count; ++i) x[i] = kernels::FromBf16(kernels::ToBf16(x[i]));
  }
  const bool to_bf16_;
  const bool blockwise_;
};

TEST_F(EvalMeasureTest, ACoderThatGivesBackItsInputCostsNothing) {
  const BlockClass fp32(model_, &kernels::kRawFp32Codec, {});
  const EchoCoder rounded(true, true);
  const EchoCoder same(false, true);
  const EchoCoder whole(false, false);
  const std::vector<EvalSetting> settings = {
      {&fp32, "full", fp32.FullCuts()},
      // The second wire first, and not the first one of this coder at all.
      {&fp32, "zeros", fp32.FullCuts(), &rounded, 1},
      {&fp32, "full", fp32.FullCuts(), &rounded, 0},
      {&fp32, "full", fp32.FullCuts(), &same, 0},
      {&fp32, "zeros", fp32.FullCuts(), &whole, 1},
  };
  Evaluator evaluator(model_, pool_, settings, true);
  ASSERT_TRUE(evaluator.AddWindow(Window(3)).ok());
  ASSERT_TRUE(evaluator.AddWindow(Window(4)).ok());
  const EvalMeasures& m = evaluator.measures();
  // What peers store is what the exact prefix is.
  EXPECT_EQ(MeanKl(m.read[2]), 0);
  EXPECT_EQ(MeanKl(m.in_class[2]), 0);
  // And what is not rounded is the class raw-fp32.
  EXPECT_GT(MeanKl(m.read[0]), 0);
  EXPECT_EQ(MeanKl(m.read[3]), MeanKl(m.read[0]));
  EXPECT_EQ(MeanKl(m.in_class[3]), MeanKl(m.in_class[0]));
  EXPECT_EQ(m.read[3].windows[1].loss, m.read[0].windows[1].loss);
  // Zeros are zeros whoever stores them, and read of a prefix that was computed at the first wire.
  for (const size_t zeros : {size_t{1}, size_t{4}}) {
    EXPECT_NEAR(m.read[zeros].windows[0].loss, m.zeroed_loss[0], 1e-9);
  }
  EXPECT_NEAR(m.in_class[1].windows[0].loss, m.zeroed_loss[0], 1e-9);
  // No form of its own where blocks are not coded by themselves.
  EXPECT_TRUE(m.in_class[4].windows.empty());
  EXPECT_EQ(m.coded_bits[0][1], 0);
  EXPECT_EQ(m.coded_bits[2][1], 16);
  EXPECT_DOUBLE_EQ(m.coded_bits[1][0],
                   64.0 / static_cast<double>(fp32.Bf16BytesPerToken() / 2 * kPrefix));
  EXPECT_EQ(m.manifest_bytes[2], 0);
}

TEST_F(EvalMeasureTest, EveryCoderIsMeasured) {
  std::vector<std::string> names;
  for (const std::string_view name : StateCoderNames()) names.emplace_back(name);
  const Calibration calibration = [&](const auto& visit) {
    for (uint64_t seed = 50; seed < 58; ++seed) {
      const std::vector<int32_t> tokens = RandomTokens(kPrefix, seed);
      const BlockClass raw(model_, &kernels::kRawBf16Codec, {});
      EncodedBlocks blocks(&raw);
      Decoder decoder(model_, pool_);
      PrefixState state(model_->config(), tokens, 0);
      KV_RETURN_IF_ERROR(PrefillBlocks(&decoder, tokens, &blocks, {}, &state));
      visit(state);
    }
    return OkStatus();
  };
  Random random(60);
  const auto pack = std::make_shared<const KltPack>(support::RandomKltPack(*model_, &random));
  const Result<EvalPlan> plan = MakeEvalPlan(model_, names, {}, calibration, pack);
  ASSERT_TRUE(plan.ok()) << plan.status().message();
  ASSERT_EQ(plan->coders.size(), names.size());
  Evaluator evaluator(model_, pool_, plan->settings, true);
  ASSERT_TRUE(evaluator.AddWindow(Window(3)).ok());
  const EvalMeasures& m = evaluator.measures();
  for (size_t i = 0; i < plan->settings.size(); ++i) {
    const EvalSetting& setting = plan->settings[i];
    EXPECT_GT(MeanKl(m.read[i]), 0) << setting.codec();
    EXPECT_GT(m.coded_bits[i].at(0), 0) << setting.codec();
    // klt's are blocks of the tier: a key, and a checksum for each group and cut.
    const bool stored = setting.codec() == "klt";
    EXPECT_GE(m.manifest_bytes[i], stored ? 32 + 8.0 : 0.0) << setting.codec();
    EXPECT_EQ(m.manifest_bytes[i] > 0, stored) << setting.codec();
    EXPECT_EQ(m.in_class[i].windows.empty(), !setting.coder->blockwise()) << setting.codec();
  }
  // A prompt whose question is all there is has no prefix to code.
  PasskeyPrompt prompt;
  prompt.tokens = RandomTokens(60, 3);
  prompt.answer_tokens = 2;
  ASSERT_TRUE(evaluator.AddPasskey(prompt).ok());
  EXPECT_EQ(m.read[0].passkeys.size(), 1U);
}

TEST_F(EvalMeasureTest, WithoutClassFormsNoneAreMade) {
  Evaluator evaluator(model_, pool_, plan_->settings, false);
  EvalWindow window = Window(1);
  window.stranger.clear();
  ASSERT_TRUE(evaluator.AddWindow(window).ok());
  EXPECT_TRUE(evaluator.measures().in_class.empty());
  ASSERT_EQ(evaluator.measures().stranger_loss.size(), 1U);
  EXPECT_FALSE(evaluator.measures().stranger_loss[0].has_value());
  EXPECT_EQ(evaluator.measures().read[0].windows.size(), 1U);
}

}  // namespace
}  // namespace kvant::node
