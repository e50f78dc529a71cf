// The forward pass against a plain double-precision oracle (model_golden_test has transformers);
// and what the tier stands on: bits that depend on nothing but a block's tokens, and steps that
// fail without effect.
#include "node/decoder.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>

#include "base/random.h"
#include "kernels/codec.h"
#include "tests/support/random_model.h"
#include "tests/support/reference_decoder.h"

namespace kvant::node {
namespace {

using kernels::Codec;
using kernels::CodecId;
using kernels::FindCodec;
using kernels::SegmentKind;
using Floats = std::vector<float>;

// The blocks of one sequence, encoded as they are appended.
class EncodedPast final : public PastBlocks {
 public:
  EncodedPast(const ModelConfig& config, const Codec* codec) : config_(config), codec_(codec) {}

  int tokens() const override { return tokens_; }
  int blocks() const override { return static_cast<int>(blocks_.size()); }
  Status Layer(int block, int layer, kernels::LayerTile* out) override {
    if (block == failing_block && layer == failing_layer) {
      return Unavailable("block {} of the test", block);
    }
    const Block& from = blocks_[static_cast<size_t>(block)];
    out->codec = codec_;
    out->shape = from.shape;
    out->keys = Ranges(SegmentKind::kKey, from.keys[static_cast<size_t>(layer)]);
    out->values = Ranges(from.shape.value_kind(), from.values[static_cast<size_t>(layer)]);
    return OkStatus();
  }

  // Begins a block of which Append then brings one layer after the other.
  void BeginBlock(int tokens) { blocks_.push_back({config_.StateShape(tokens), {}, {}}); }
  void Append(const float* keys, const float* values) {
    Block& block = blocks_.back();
    block.keys.push_back(Encode(SegmentKind::kKey, block.shape.keys, keys));
    block.values.push_back(Encode(block.shape.value_kind(), block.shape.values, values));
    if (static_cast<int>(block.keys.size()) == config_.layers) tokens_ += block.shape.keys.tokens;
  }

  // All bytes of the last block.
  std::vector<std::byte> LastBytes() const {
    std::vector<std::byte> all;
    for (const auto* segments : {&blocks_.back().keys, &blocks_.back().values}) {
      for (const Segment& segment : *segments) {
        for (const auto& range : segment) all.insert(all.end(), range.begin(), range.end());
      }
    }
    return all;
  }

  int failing_block = -1;
  int failing_layer = -1;

 private:
  using Segment = std::vector<std::vector<std::byte>>;  // [cut][bytes]
  struct Block {
    kernels::LayerShape shape;
    std::vector<Segment> keys;    // [layer]
    std::vector<Segment> values;  // [layer]
  };

  int Cuts(SegmentKind kind) const {
    return kind == SegmentKind::kKey ? codec_->key_cuts : codec_->value_cuts;
  }
  Segment Encode(SegmentKind kind, const kernels::SegmentShape& shape, const float* x) const {
    Segment segment;
    kernels::MutableSegmentRanges ranges;
    for (int cut = 0; cut < Cuts(kind); ++cut) {
      segment.emplace_back(codec_->range_bytes(kind, shape, cut));
      ranges.range[cut] = segment.back().data();
    }
    float max_error[kernels::kMaxCuts];
    codec_->encode(kind, shape, x, ranges, max_error);
    return segment;
  }
  kernels::SegmentRanges Ranges(SegmentKind kind, const Segment& segment) const {
    kernels::SegmentRanges ranges;
    ranges.cuts = Cuts(kind);
    for (int cut = 0; cut < ranges.cuts; ++cut) {
      ranges.range[cut] = segment[static_cast<size_t>(cut)].data();
    }
    return ranges;
  }

  const ModelConfig& config_;
  const Codec* codec_;
  int tokens_ = 0;
  std::deque<Block> blocks_;
};

// A sequence as the scheduler keeps one.
struct Sequence {
  Sequence(const ModelConfig& for_config, const Codec* codec)
      : config(for_config), past(for_config, codec), open(for_config) {}

  // Prefills tokens from position tokens-so-far on, whole blocks and a tail. Returns the logits.
  Floats Prefill(Decoder* decoder, std::span<const int32_t> tokens, bool want_logits = true) {
    Floats logits(want_logits ? tokens.size() * static_cast<size_t>(config.vocab) : 0);
    for (size_t at = 0; at < tokens.size(); at += kBlockTokens) {
      const auto block = tokens.subspan(at, std::min<size_t>(kBlockTokens, tokens.size() - at));
      float* out = want_logits ? logits.data() + at * static_cast<size_t>(config.vocab) : nullptr;
      const PrefillBlock prefill{block, past.tokens(), &past};
      // The block under work is no part of its own past until it is whole.
      std::vector<std::pair<Floats, Floats>> layers;
      const Status status = decoder->Prefill(
          prefill,
          [&](int layer, const float* keys, const float* values) {
            EXPECT_EQ(layer, static_cast<int>(layers.size()));
            const kernels::LayerShape state = config.StateShape(static_cast<int>(block.size()));
            const auto copy = [](const kernels::SegmentShape& shape, const float* from) {
              return Floats(from, from + shape.tokens * shape.kv_heads * shape.head_dim);
            };
            layers.emplace_back(copy(state.keys, keys), copy(state.values, values));
            return OkStatus();
          },
          out);
      EXPECT_TRUE(status.ok()) << status.ToString();
      past.BeginBlock(static_cast<int>(block.size()));
      for (const auto& [keys, values] : layers) past.Append(keys.data(), values.data());
    }
    return logits;
  }

  int position() const { return past.tokens() + open.tokens(); }
  DecodeRow Row(int32_t token) { return {token, position(), &past, &open, OkStatus()}; }
  // Encodes the open tile when it is full.
  void Close() {
    if (!open.full()) return;
    past.BeginBlock(open.tokens());
    for (int layer = 0; layer < config.layers; ++layer) {
      past.Append(open.keys(layer), open.values(layer));
    }
    open.Clear();
  }

  const ModelConfig& config;
  EncodedPast past;
  OpenTile open;
};

std::unique_ptr<Model> LoadModel(const std::filesystem::path& directory) {
  auto model = Model::Load(directory);
  EXPECT_TRUE(model.ok()) << model.status().ToString();
  return model.ok() ? *std::move(model) : nullptr;
}

std::vector<int32_t> RandomTokens(const ModelConfig& config, size_t count, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) {
    token = static_cast<int32_t>(random.Below(static_cast<uint64_t>(config.vocab)));
  }
  return tokens;
}

// Largest difference, relative to the row's largest logit.
template <typename T>
double RelativeError(std::span<const float> logits, std::span<const T> golden) {
  double scale = 0.0;
  double error = 0.0;
  for (size_t i = 0; i < golden.size(); ++i) {
    scale = std::max(scale, std::abs(static_cast<double>(golden[i])));
    error = std::max(error, std::abs(static_cast<double>(logits[i] - golden[i])));
  }
  return error / scale;
}

std::span<const float> RowOf(const Floats& logits, size_t row, int vocab) {
  return std::span(logits).subspan(row * static_cast<size_t>(vocab), static_cast<size_t>(vocab));
}

constexpr double kTolerance = 1e-4;

// What differs between architectures, each part for itself and in random sizes.
enum class Kind { kPlain, kBiases, kQkNorm, kSliding, kLatent, kCount };

ModelConfig RandomConfig(Kind kind, Random* random) {
  const auto below = [&](uint64_t count) { return static_cast<int>(random->Below(count)); };
  ModelConfig config = support::TinyConfig();
  if (kind == Kind::kSliding) config = support::TinySlidingConfig();
  if (kind == Kind::kLatent) config = support::TinyLatentConfig();
  config.layers = 1 + below(3);
  config.hidden = 8 * (1 + below(9));
  config.intermediate = 1 + below(90);
  if (kind == Kind::kLatent) {
    config.q_heads = 1 + below(5);
    config.latent = {below(2) * 24,      8 * (1 + below(5)), 1 + below(20),
                     8 * (1 + below(3)), 1 + below(30),      random->Chance(0.5)};
    config.head_dim = config.latent->rope_dim;
    config.attention_scale = 1.0 / std::sqrt(static_cast<double>(config.query_dim()));
    config.experts.dense_layers = below(2);
    if (config.experts.dense_layers >= config.layers) config.experts = {};
    return config;
  }
  config.kv_heads = 1 + below(3);
  config.q_heads = config.kv_heads * (1 + below(4));
  config.head_dim = 8 * (1 + below(8));
  config.attention_scale = 1.0 / std::sqrt(static_cast<double>(config.head_dim));
  if (kind == Kind::kBiases) {
    config.architecture = random->Chance(0.5) ? Architecture::kQwen2 : Architecture::kLlama;
    config.qkv_bias = true;
    config.output_bias = config.architecture == Architecture::kLlama;
  }
  if (kind == Kind::kQkNorm) {
    config.architecture = Architecture::kQwen3;
    config.qk_norm = true;
  }
  if (kind == Kind::kSliding) {
    config.embedding_scale = std::sqrt(static_cast<float>(config.hidden));
    config.sliding_window = 1 + below(100);
    config.sliding.assign(static_cast<size_t>(config.layers), true);
    config.sliding[0] = random->Chance(0.5) && config.layers > 1 ? false : true;
  }
  return config;
}

// Random shapes against the oracle, which makes keys and values of latents for every head and
// token.
TEST(DecoderProperty, AgreesWithPlainDoublePrecision) {
  for (uint64_t seed = 0; seed < 25; ++seed) {
    const auto kind = static_cast<Kind>(seed % static_cast<uint64_t>(Kind::kCount));
    Random random(seed);
    support::RandomModelOptions options;
    options.seed = seed;
    options.type = std::vector{DataType::kBf16, DataType::kFp16, DataType::kFp32}[seed % 3];
    ModelConfig& config = options.config;
    config = RandomConfig(kind, &random);
    config.tied_output = random.Chance(0.5);
    support::TemporaryDirectory directory;
    ASSERT_TRUE(support::WriteRandomModel(directory.path(), options).ok());
    const auto model = LoadModel(directory.path());
    ASSERT_NE(model, nullptr);
    const auto tokens = RandomTokens(config, 40 + random.Below(120), seed);
    const auto golden = support::ReferenceLogits(*model, tokens);

    kernels::ThreadPool pool(2);
    Decoder decoder(model.get(), &pool);
    Sequence sequence(config, FindCodec(CodecId::kRawFp32));
    const size_t prefilled = tokens.size() - 1 - random.Below(30);
    Floats logits = sequence.Prefill(&decoder, std::span(tokens).first(prefilled));
    logits.resize(tokens.size() * static_cast<size_t>(config.vocab));
    for (size_t i = prefilled; i < tokens.size(); ++i) {
      DecodeRow row = sequence.Row(tokens[i]);
      decoder.DecodeStep({&row, 1}, logits.data() + i * static_cast<size_t>(config.vocab));
      ASSERT_TRUE(row.status.ok());
      sequence.Close();
    }
    for (size_t i = 0; i < tokens.size(); ++i) {
      ASSERT_LT(RelativeError(RowOf(logits, i, config.vocab), std::span<const double>(golden[i])),
                kTolerance)
          << "seed " << seed << ", position " << i << ", prefilled " << prefilled;
    }
  }
}

class BitsTest : public testing::TestWithParam<CodecId> {
 protected:
  void SetUp() override {
    support::RandomModelOptions options;
    options.config = support::TinyConfig();
    options.config.q_heads = 6;
    options.config.head_dim = 24;
    options.config.layers = 3;
    ASSERT_TRUE(support::WriteRandomModel(directory_.path(), options).ok());
    model_ = LoadModel(directory_.path());
    ASSERT_NE(model_, nullptr);
    tokens_ = RandomTokens(model_->config(), 700, 9);
  }
  const Codec* codec() const { return FindCodec(GetParam()); }
  std::span<const int32_t> Tokens(size_t first, size_t count) const {
    return std::span(tokens_).subspan(first, count);
  }
  // Logits of one decode step after `prompt`.
  Floats StepAlone(int threads, std::span<const int32_t> prompt, int32_t token) {
    kernels::ThreadPool pool(threads);
    Decoder decoder(model_.get(), &pool);
    Sequence sequence(model_->config(), codec());
    sequence.Prefill(&decoder, prompt, false);
    Floats logits(static_cast<size_t>(model_->config().vocab));
    DecodeRow row = sequence.Row(token);
    decoder.DecodeStep({&row, 1}, logits.data());
    EXPECT_TRUE(row.status.ok());
    return logits;
  }

  support::TemporaryDirectory directory_;
  std::unique_ptr<Model> model_;
  std::vector<int32_t> tokens_;
};

TEST_P(BitsTest, RowDoesNotDependOnItsCompany) {
  const int vocab = model_->config().vocab;
  const size_t lengths[] = {1, 600, 64, 130, 513};  // of the prompts
  kernels::ThreadPool pool(2);
  Decoder decoder(model_.get(), &pool);
  std::deque<Sequence> batch;
  std::vector<DecodeRow> rows;
  for (const size_t length : lengths) {
    Sequence& sequence = batch.emplace_back(model_->config(), codec());
    sequence.Prefill(&decoder, Tokens(0, length), false);
    rows.push_back(sequence.Row(tokens_[length]));
  }
  Floats logits(rows.size() * static_cast<size_t>(vocab));
  decoder.DecodeStep(rows, logits.data());
  for (size_t i = 0; i < rows.size(); ++i) {
    ASSERT_TRUE(rows[i].status.ok());
    const Floats alone = StepAlone(1, Tokens(0, lengths[i]), tokens_[lengths[i]]);
    const auto row = RowOf(logits, i, vocab);
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), row.begin())) << "prompt " << lengths[i];
  }
}

TEST_P(BitsTest, ThreadsChangeNothing) {
  const auto run = [&](int threads) {
    kernels::ThreadPool pool(threads);
    Decoder decoder(model_.get(), &pool);
    Sequence sequence(model_->config(), codec());
    Floats logits = sequence.Prefill(&decoder, Tokens(0, 300));
    const auto bytes = sequence.past.LastBytes();
    return std::pair(std::move(logits), bytes);
  };
  const auto one = run(1);
  for (const int threads : {2, 3}) EXPECT_EQ(run(threads), one) << threads << " threads";
}

// A block's bytes are the same whatever the decoder computed before, with logits or without, and
// behind a past that came from elsewhere.
TEST_P(BitsTest, BlockDependsOnItsTokensAlone) {
  kernels::ThreadPool pool(2);
  Decoder fresh(model_.get(), &pool);
  Sequence first(model_->config(), codec());
  first.Prefill(&fresh, Tokens(0, 128), false);
  first.Prefill(&fresh, Tokens(128, 40), false);

  Decoder used(model_.get(), &pool);
  Sequence other(model_->config(), codec());
  other.Prefill(&used, Tokens(300, 200), true);
  std::vector<DecodeRow> rows = {other.Row(3)};
  Floats logits(static_cast<size_t>(model_->config().vocab));
  used.DecodeStep(rows, logits.data());
  Sequence second(model_->config(), codec());
  second.Prefill(&used, Tokens(0, 64), true);
  second.Prefill(&used, Tokens(64, 64), false);
  second.Prefill(&used, Tokens(128, 40), true);
  EXPECT_EQ(first.past.LastBytes(), second.past.LastBytes());
}

TEST_P(BitsTest, FailedRowHasNoEffect) {
  const int vocab = model_->config().vocab;
  kernels::ThreadPool pool(2);
  Decoder decoder(model_.get(), &pool);
  std::deque<Sequence> batch;
  for (const size_t length : {100U, 200U, 300U}) {
    Sequence& sequence = batch.emplace_back(model_->config(), codec());
    sequence.Prefill(&decoder, Tokens(0, length), false);
  }
  const auto step = [&] {
    std::vector<DecodeRow> rows;
    for (Sequence& sequence : batch) rows.push_back(sequence.Row(7));
    Floats logits(rows.size() * static_cast<size_t>(vocab));
    decoder.DecodeStep(rows, logits.data());
    return std::pair(std::move(rows), std::move(logits));
  };
  for (int failing_layer = 0; failing_layer < model_->config().layers; ++failing_layer) {
    batch[1].past.failing_block = 2;
    batch[1].past.failing_layer = failing_layer;
    const int before = batch[1].open.tokens();
    const auto [rows, logits] = step();
    EXPECT_TRUE(rows[0].status.ok());
    EXPECT_EQ(rows[1].status.code(), StatusCode::kUnavailable);
    EXPECT_TRUE(rows[2].status.ok());
    EXPECT_EQ(batch[1].open.tokens(), before);
    EXPECT_EQ(batch[0].open.tokens(), failing_layer + 1);
    if (failing_layer > 0) continue;
    for (const size_t healthy : {0U, 2U}) {
      const Floats alone = StepAlone(1, Tokens(0, 100 * (healthy + 1)), 7);
      const auto row = RowOf(logits, healthy, vocab);
      EXPECT_TRUE(std::equal(alone.begin(), alone.end(), row.begin()));
    }
  }
  batch[1].past.failing_block = -1;
  const auto [rows, logits] = step();
  EXPECT_TRUE(rows[1].status.ok());
  const Floats alone = StepAlone(1, Tokens(0, 200), 7);
  const auto row = RowOf(logits, 1, vocab);
  EXPECT_TRUE(std::equal(alone.begin(), alone.end(), row.begin())) << "the retry differs";
}

TEST_P(BitsTest, PrefillEndsWithTheErrorOfItsPastOrSink) {
  kernels::ThreadPool pool(1);
  Decoder decoder(model_.get(), &pool);
  Sequence sequence(model_->config(), codec());
  sequence.Prefill(&decoder, Tokens(0, 64), false);
  int layers_seen = 0;
  const PrefillBlock block{Tokens(64, 10), 64, &sequence.past};
  const auto sink = [&](int, const float*, const float*) {
    return ++layers_seen == 2 ? DataLoss("the sink is full") : OkStatus();
  };
  EXPECT_EQ(decoder.Prefill(block, sink, nullptr).code(), StatusCode::kDataLoss);
  layers_seen = 10;
  sequence.past.failing_block = 0;
  sequence.past.failing_layer = 1;
  EXPECT_EQ(decoder.Prefill(block, sink, nullptr).code(), StatusCode::kUnavailable);
  Floats logits(static_cast<size_t>(model_->config().vocab));
  EXPECT_EQ(decoder.PrefillTail(block, &sequence.open, logits.data()).code(),
            StatusCode::kUnavailable);
  EXPECT_EQ(sequence.open.tokens(), 0);
}

// A tail computes less of its last layer.
TEST_P(BitsTest, ATailEndsWithTheLogitsOfItsLastToken) {
  kernels::ThreadPool pool(2);
  Decoder decoder(model_.get(), &pool);
  const int vocab = model_->config().vocab;
  for (const int tail : {1, 2, 7, 64}) {
    Sequence sequence(model_->config(), codec());
    sequence.Prefill(&decoder, Tokens(0, 128), false);
    Floats logits(static_cast<size_t>(vocab));
    const PrefillBlock block{Tokens(128, tail), 128, &sequence.past};
    ASSERT_TRUE(decoder.PrefillTail(block, &sequence.open, logits.data()).ok());
    const Floats all = sequence.Prefill(&decoder, Tokens(128, tail));
    const auto last = RowOf(all, tail - 1, vocab);
    EXPECT_TRUE(std::equal(logits.begin(), logits.end(), last.begin())) << tail << " tokens";
  }
}

INSTANTIATE_TEST_SUITE_P(Codecs, BitsTest,
                         testing::Values(CodecId::kRawBf16, CodecId::kTile8, CodecId::kTile4));

}  // namespace
}  // namespace kvant::node
