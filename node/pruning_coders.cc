#include "node/pruning_coders.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "base/check.h"
#include "kernels/float_formats.h"
#include "node/decoder.h"

namespace kvant::node {
namespace {

constexpr uint64_t kHalfBits = 16;
constexpr size_t kTile = 64;  // numbers of a bitmap
constexpr uint64_t kTileBits = 64 + 32;
constexpr size_t kTilePad = 8;

float Half(float x) { return kernels::FromFp16(kernels::ToFp16(x)); }

class ThinkCoder final : public StateCoder {
 public:
  ThinkCoder(std::string name, int percent) : name_(std::move(name)), percent_(percent) {}

  std::string_view name() const override { return name_; }
  // Which channels go is known when the last queries are.
  bool blockwise() const override { return false; }

  void Code(const PrefixState& exact, const Sink& sink) const override {
    PrefixState decoded = exact;
    const auto tokens = static_cast<size_t>(exact.tokens());
    const auto head_dim = static_cast<size_t>(exact.shape().keys.head_dim);
    const size_t dropped = head_dim * static_cast<size_t>(percent_) / 100;
    uint64_t bits = 0;
    for (int layer = 0; layer < exact.layers(); ++layer) {
      const std::vector<double> scores = Scores(exact, layer);
      float* keys = decoded.keys(layer);
      std::transform(keys, keys + tokens * exact.key_width(), keys, Half);
      for (size_t head = 0; head < exact.key_width(); head += head_dim) {
        std::vector<size_t> channels(head_dim);
        std::iota(channels.begin(), channels.end(), head);
        std::stable_sort(channels.begin(), channels.end(),
                         [&](size_t a, size_t b) { return scores[a] < scores[b]; });
        for (size_t i = 0; i < dropped; ++i) {
          for (size_t token = 0; token < tokens; ++token) {
            keys[token * exact.key_width() + channels[i]] = 0;
          }
        }
        bits += head_dim + tokens * (head_dim - dropped) * kHalfBits;
      }
      float* values = decoded.values(layer);
      std::transform(values, values + tokens * exact.value_width(), values, Half);
      bits += tokens * exact.value_width() * kHalfBits;
    }
    sink(0, decoded, {.bits = bits});
  }

 private:
  // [key_width]; means over tokens are left as sums, which compare alike.
  static std::vector<double> Scores(const PrefixState& exact, int layer) {
    std::vector<double> scores(exact.key_width());
    const float* keys = exact.keys(layer);
    for (size_t token = 0; token < static_cast<size_t>(exact.tokens()); ++token) {
      for (size_t i = 0; i < scores.size(); ++i) {
        const double key = keys[token * scores.size() + i];
        scores[i] += key * key;
      }
    }
    const std::span<const float> queries = exact.query_squares(layer);
    for (size_t i = 0; i < scores.size(); ++i) scores[i] *= static_cast<double>(queries[i]);
    return scores;
  }

  std::string name_;
  int percent_;
};

class SparseCoder final : public StateCoder {
 public:
  SparseCoder(std::string name, int percent) : name_(std::move(name)), percent_(percent) {}

  std::string_view name() const override { return name_; }
  bool blockwise() const override { return true; }

  void Code(const PrefixState& exact, const Sink& sink) const override {
    static_assert(kBlockTokens % kTile == 0, "a block's keys are whole tiles");
    PrefixState decoded = exact;
    const auto tokens = static_cast<size_t>(exact.tokens());
    uint64_t bits = 0;
    for (int layer = 0; layer < exact.layers(); ++layer) {
      const size_t key_width = exact.key_width();
      float* keys = decoded.keys(layer);
      Prune(keys, tokens * key_width, static_cast<size_t>(exact.shape().keys.head_dim));
      for (size_t token = 0; token < tokens; token += kTile) {
        for (size_t channel = 0; channel < key_width; ++channel) {
          bits += TileBits(keys + token * key_width + channel, kTile, key_width);
        }
      }
      const size_t value_width = exact.value_width();
      const auto head_dim = static_cast<size_t>(exact.shape().values.head_dim);
      float* values = decoded.values(layer);
      Prune(values, tokens * value_width, head_dim);
      for (size_t head = 0; head < tokens * value_width; head += head_dim) {
        for (size_t at = 0; at < head_dim; at += kTile) {
          bits += TileBits(values + head + at, std::min(kTile, head_dim - at), 1);
        }
      }
    }
    sink(0, decoded, {.bits = bits});
  }

 private:
  void Prune(float* x, size_t count, size_t head_dim) const {
    const size_t rank = std::max<size_t>(1, head_dim * static_cast<size_t>(percent_) / 100);
    std::vector<float> magnitudes(head_dim);
    for (float* head = x; head < x + count; head += head_dim) {
      for (size_t i = 0; i < head_dim; ++i) magnitudes[i] = std::abs(head[i]);
      const auto nth = magnitudes.begin() + static_cast<std::ptrdiff_t>(rank - 1);
      std::nth_element(magnitudes.begin(), nth, magnitudes.end());
      const float least = *nth;
      for (size_t i = 0; i < head_dim; ++i)
        head[i] = std::abs(head[i]) >= least ? Half(head[i]) : 0;
    }
  }

  static uint64_t TileBits(const float* x, size_t count, size_t stride) {
    size_t kept = 0;
    for (size_t i = 0; i < count; ++i) kept += x[i * stride] != 0 ? 1 : 0;
    return kTileBits + (kept + kTilePad - 1) / kTilePad * kTilePad * kHalfBits;
  }

  std::string name_;
  int percent_;
};

}  // namespace

Result<std::unique_ptr<StateCoder>> MakeThinkCoder(std::string name, const Model& model,
                                                   int percent) {
  KV_CHECK(percent >= 0 && percent < 100);
  if (model.config().latent.has_value()) {
    return InvalidArgument(
        "codec {}: ThinK drops channels of keys, and the keys of a model with latent attention are "
        "its values as well",
        name);
  }
  return std::unique_ptr<StateCoder>(std::make_unique<ThinkCoder>(std::move(name), percent));
}

std::unique_ptr<StateCoder> MakeSparseCoder(std::string name, int percent) {
  KV_CHECK(percent >= 0 && percent < 100);
  return std::make_unique<SparseCoder>(std::move(name), percent);
}

}  // namespace kvant::node
