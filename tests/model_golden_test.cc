// Every architecture against transformers: the model directories of tests/golden/models and their
// logits, both made by scripts/golden/models.py, in prefill, token by token and in a batch, each
// over blocks that are encoded as raw fp32.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "base/bytes.h"
#include "kernels/codec.h"
#include "node/block_class.h"
#include "node/block_past.h"
#include "node/decoder.h"
#include "node/local_cache.h"
#include "node/safetensors.h"

namespace kvant::node {
namespace {

using Floats = std::vector<float>;

// Relative to the row's largest logit.
constexpr double kTolerance = 1e-4;

std::filesystem::path GoldenDirectory() {
  return std::filesystem::path(KVANT_SOURCE_DIR) / "tests/golden/models";
}

std::vector<std::string> Cases() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(GoldenDirectory())) {
    names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  return names;
}

// A sequence as a node without a cache keeps one: whole blocks encoded, the tokens behind them raw.
class Sequence {
 public:
  explicit Sequence(const BlockClass* block_class)
      : block_class_(*block_class), open_(block_class->model().config()) {}

  int position() const { return static_cast<int>(blocks_.size()) * kBlockTokens + open_.tokens(); }

  // Computes tokens from the last whole block's end on; whole blocks are kept. logits: nullptr, or
  // [tokens][vocab].
  Status Prefill(Decoder* decoder, std::span<const int32_t> tokens, float* logits) {
    const auto vocab = static_cast<size_t>(block_class_.model().config().vocab);
    for (size_t at = 0; at < tokens.size(); at += kBlockTokens) {
      const auto part = tokens.subspan(at, std::min<size_t>(kBlockTokens, tokens.size() - at));
      const bool whole = part.size() == kBlockTokens;
      const CachedBlockPtr block = whole ? NewBlock() : nullptr;
      const auto sink = [&](int layer, const float* keys, const float* values) {
        if (whole) Encode(layer, keys, values, block.get());
        return OkStatus();
      };
      BlockPast past = Past();
      const PrefillBlock prefill{part, past.tokens(), &past};
      float* out = logits == nullptr ? nullptr : logits + at * vocab;
      KV_RETURN_IF_ERROR(decoder->Prefill(prefill, sink, out));
      if (whole) blocks_.push_back(block);
    }
    return OkStatus();
  }

  // Computes a prompt's last tokens behind its whole blocks. logits: [vocab], of the last one.
  Status PrefillTail(Decoder* decoder, std::span<const int32_t> tokens, float* logits) {
    BlockPast past = Past();
    KV_RETURN_IF_ERROR(decoder->PrefillTail({tokens, past.tokens(), &past}, &open_, logits));
    Close();
    return OkStatus();
  }

  // The row of one more token; Close follows the step.
  DecodeRow Row(int32_t token) {
    past_ = std::make_unique<BlockPast>(Past());
    return {token, position(), past_.get(), &open_, OkStatus()};
  }
  void Close() {
    if (!open_.full()) return;
    const CachedBlockPtr block = NewBlock();
    for (int layer = 0; layer < block_class_.layout().layers(); ++layer) {
      Encode(layer, open_.keys(layer), open_.values(layer), block.get());
    }
    blocks_.push_back(block);
    open_.Clear();
  }

 private:
  BlockPast Past() const { return {block_class_, blocks_, block_class_.FullCuts(), nullptr}; }
  CachedBlockPtr NewBlock() const {
    return std::make_shared<CachedBlock>(block_class_, BlockKey{}, block_class_.FullCuts());
  }
  void Encode(int layer, const float* keys, const float* values, CachedBlock* block) const {
    block_class_.EncodeLayer(layer, keys, values, block->bytes.data(), nullptr);
    block->MarkReady(layer);
  }

  const BlockClass& block_class_;
  std::vector<CachedBlockPtr> blocks_;
  std::unique_ptr<BlockPast> past_;  // of the row under way
  OpenTile open_;
};

class ModelGolden : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const auto directory = GoldenDirectory() / GetParam();
    auto model = Model::Load(directory);
    ASSERT_TRUE(model.ok()) << model.status().ToString();
    model_ = *std::move(model);
    class_ = std::make_unique<BlockClass>(
        model_.get(), kernels::FindCodec(kernels::CodecId::kRawFp32), std::span<const std::byte>());
    decoder_ = std::make_unique<Decoder>(model_.get(), &pool_);
    ASSERT_NO_FATAL_FAILURE(ReadGolden(directory / "golden.safetensors"));
  }
  void TearDown() override {
    std::printf("%s: %zu rows compared, largest relative error %.1e\n", GetParam().c_str(),
                compared_, worst_);
    RecordProperty("largest_relative_error", std::to_string(worst_));
  }

  void ReadGolden(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(file)), {});
    const auto tensors = ParseSafetensors(AsBytes(text), path.string());
    ASSERT_TRUE(tensors.ok()) << tensors.status().ToString();
    const auto copy = [&](const char* name, auto* out) {
      const auto bytes = tensors->at(name).bytes;
      out->resize(bytes.size() / sizeof(*out->data()));
      std::memcpy(out->data(), bytes.data(), bytes.size());
    };
    copy("tokens", &tokens_);
    copy("rows", &rows_);
    copy("logits", &golden_);
    ASSERT_EQ(golden_.size(), rows_.size() * vocab());
  }

  size_t vocab() const { return static_cast<size_t>(model_->config().vocab); }
  std::span<const int32_t> Tokens(size_t first, size_t count) const {
    return std::span(tokens_).subspan(first, count);
  }

  // Compares the logits of position `position`, if there are golden ones.
  void Compare(int position, const float* logits, const char* how) {
    const auto found = std::find(rows_.begin(), rows_.end(), position);
    if (found == rows_.end()) return;
    ++compared_;
    const float* golden = golden_.data() + static_cast<size_t>(found - rows_.begin()) * vocab();
    double scale = 0.0;
    double error = 0.0;
    for (size_t i = 0; i < vocab(); ++i) {
      scale = std::max(scale, std::abs(static_cast<double>(golden[i])));
      error = std::max(error, std::abs(static_cast<double>(logits[i]) - golden[i]));
    }
    // A difference that is no number passes no comparison, so it must not reach std::max unseen.
    EXPECT_TRUE(std::all_of(logits, logits + vocab(), [](float x) { return std::isfinite(x); }))
        << how << ", position " << position;
    EXPECT_LT(error / scale, kTolerance) << how << ", position " << position;
    worst_ = std::max(worst_, error / scale);
  }

  // One token for every sequence, each the one that its position asks for.
  void Step(std::deque<Sequence>* sequences, const char* how) {
    std::vector<DecodeRow> rows;
    for (Sequence& sequence : *sequences) {
      rows.push_back(sequence.Row(tokens_[static_cast<size_t>(sequence.position())]));
    }
    Floats logits(rows.size() * vocab());
    decoder_->DecodeStep(rows, logits.data());
    for (size_t i = 0; i < rows.size(); ++i) {
      ASSERT_TRUE(rows[i].status.ok()) << rows[i].status.ToString();
      Compare(rows[i].position, logits.data() + i * vocab(), how);
      (*sequences)[i].Close();
    }
  }

  kernels::ThreadPool pool_{2};
  std::unique_ptr<Model> model_;
  std::unique_ptr<BlockClass> class_;
  std::unique_ptr<Decoder> decoder_;
  std::vector<int32_t> tokens_;
  std::vector<int32_t> rows_;
  Floats golden_;  // [rows][vocab]
  size_t compared_ = 0;
  double worst_ = 0.0;
};

TEST_P(ModelGolden, Prefill) {
  Sequence sequence(class_.get());
  Floats logits(tokens_.size() * vocab());
  const Status status = sequence.Prefill(decoder_.get(), tokens_, logits.data());
  ASSERT_TRUE(status.ok()) << status.ToString();
  for (size_t i = 0; i < tokens_.size(); ++i) {
    Compare(static_cast<int>(i), logits.data() + i * vocab(), "prefill");
  }
  EXPECT_EQ(compared_, rows_.size());
}

TEST_P(ModelGolden, TokenByToken) {
  std::deque<Sequence> alone;
  alone.emplace_back(class_.get());
  for (size_t i = 0; i < tokens_.size(); ++i) {
    ASSERT_NO_FATAL_FAILURE(Step(&alone, "decode"));
  }
  EXPECT_EQ(compared_, rows_.size());
}

// A prompt as the scheduler computes one: whole blocks, the tail raw, then decode.
TEST_P(ModelGolden, TailThenDecode) {
  Floats logits(vocab());
  for (const size_t prompt : {1U, 63U, 64U, 65U, 101U, 128U, 129U, 149U}) {
    std::deque<Sequence> alone;
    Sequence& sequence = alone.emplace_back(class_.get());
    const size_t whole = (prompt - 1) / kBlockTokens * kBlockTokens;
    Status status = sequence.Prefill(decoder_.get(), Tokens(0, whole), nullptr);
    ASSERT_TRUE(status.ok()) << status.ToString();
    status = sequence.PrefillTail(decoder_.get(), Tokens(whole, prompt - whole), logits.data());
    ASSERT_TRUE(status.ok()) << status.ToString();
    ASSERT_EQ(sequence.position(), static_cast<int>(prompt));
    Compare(sequence.position() - 1, logits.data(), "tail");
    for (size_t i = prompt; i < std::min(prompt + 3, tokens_.size()); ++i) {
      ASSERT_NO_FATAL_FAILURE(Step(&alone, "decode after the tail"));
    }
  }
  EXPECT_GT(compared_, 10U);
}

// Four sequences of the same tokens at different places, one step for all.
TEST_P(ModelGolden, Batch) {
  Floats logits(vocab());
  std::deque<Sequence> batch;
  for (const size_t prefilled : {0U, 64U, 128U, 100U}) {
    Sequence& sequence = batch.emplace_back(class_.get());
    const size_t whole = prefilled / kBlockTokens * kBlockTokens;
    Status status = sequence.Prefill(decoder_.get(), Tokens(0, whole), nullptr);
    ASSERT_TRUE(status.ok()) << status.ToString();
    if (whole == prefilled) continue;
    status = sequence.PrefillTail(decoder_.get(), Tokens(whole, prefilled - whole), logits.data());
    ASSERT_TRUE(status.ok()) << status.ToString();
  }
  for (int step = 0; step < 20; ++step) ASSERT_NO_FATAL_FAILURE(Step(&batch, "batch"));
  EXPECT_GT(compared_, 10U);
}

TEST(ModelGoldenCases, CoverEveryArchitecture) {
  std::set<Architecture> covered;
  for (const std::string& name : Cases()) {
    const auto config = LoadConfig(GoldenDirectory() / name);
    ASSERT_TRUE(config.ok()) << config.status().ToString();
    covered.insert(config->architecture);
  }
  EXPECT_EQ(covered.size(), static_cast<size_t>(Architecture::kDeepseekV3) + 1);
}

INSTANTIATE_TEST_SUITE_P(All, ModelGolden, testing::ValuesIn(Cases()),
                         [](const auto& golden) { return golden.param; });

}  // namespace
}  // namespace kvant::node
