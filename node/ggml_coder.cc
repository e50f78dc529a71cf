#include "node/ggml_coder.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "kernels/float_formats.h"
#include "kernels/ggml_blocks.h"

namespace kvant::node {
namespace {

using Row = std::span<const float>;

// Ids of ggml.h.
constexpr uint32_t kQ4_0Id = 2;
constexpr uint32_t kQ8_0Id = 8;

const kernels::GgmlType& TypeOf(GgmlCacheType type) {
  return *kernels::FindGgmlType(type == GgmlCacheType::kQ8_0 ? kQ8_0Id : kQ4_0Id);
}

void QuantizeQ8(Row x, std::byte* to) {
  float largest = 0;
  for (const float value : x) largest = std::max(largest, std::abs(value));
  const float scale = largest / 127.0F;
  const float inverse = scale != 0 ? 1.0F / scale : 0.0F;
  StoreLittle(to, kernels::ToFp16(scale));
  for (size_t i = 0; i < x.size(); ++i) {
    to[2 + i] = static_cast<std::byte>(static_cast<int8_t>(std::round(x[i] * inverse)));
  }
}

void QuantizeQ4(Row x, std::byte* to) {
  float largest = 0;  // in magnitude, with its sign
  for (const float value : x) {
    if (std::abs(value) > std::abs(largest)) largest = value;
  }
  const float scale = largest / -8.0F;
  const float inverse = scale != 0 ? 1.0F / scale : 0.0F;
  StoreLittle(to, kernels::ToFp16(scale));
  const auto code = [&](float value) {
    const float shifted = value * inverse + 8.5F;
    return static_cast<uint8_t>(std::min<int>(15, static_cast<int8_t>(shifted)));
  };
  const size_t half = x.size() / 2;
  for (size_t i = 0; i < half; ++i) {
    to[2 + i] = static_cast<std::byte>(code(x[i]) | (code(x[i + half]) << 4));
  }
}

// x -> what is stored -> out. Returns the bits.
uint64_t RoundTrip(GgmlCacheType type, Row x, float* out) {
  const std::vector<std::byte> bytes = QuantizeGgml(type, x);
  kernels::DequantizeBlocks(TypeOf(type), bytes, std::span(out, x.size()));
  return 8 * bytes.size();
}

class GgmlCoder final : public StateCoder {
 public:
  GgmlCoder(std::string name, GgmlCacheType keys, GgmlCacheType values)
      : name_(std::move(name)), keys_(keys), values_(values) {}

  std::string_view name() const override { return name_; }
  bool blockwise() const override { return true; }

  void Code(const PrefixState& exact, const Sink& sink) const override {
    PrefixState decoded = exact;
    uint64_t bits = 0;
    for (int layer = 0; layer < exact.layers(); ++layer) {
      if (exact.shape().latent) {
        bits += CodeJoined(exact, layer, &decoded);
        continue;
      }
      // Rows are whole blocks, so that all tokens of a layer are as well.
      const auto tokens = static_cast<size_t>(exact.tokens());
      bits +=
          RoundTrip(keys_, Row(exact.keys(layer), tokens * exact.key_width()), decoded.keys(layer));
      bits += RoundTrip(values_, Row(exact.values(layer), tokens * exact.value_width()),
                        decoded.values(layer));
    }
    sink(0, decoded, {.bits = bits});
  }

 private:
  uint64_t CodeJoined(const PrefixState& exact, int layer, PrefixState* decoded) const {
    const size_t rope = exact.key_width();
    const size_t rank = exact.value_width();
    std::vector<float> row(rope + rank);
    uint64_t bits = 0;
    for (size_t token = 0; token < static_cast<size_t>(exact.tokens()); ++token) {
      std::copy_n(exact.keys(layer) + token * rope, rope, row.begin());
      std::copy_n(exact.values(layer) + token * rank, rank, row.data() + rope);
      bits += RoundTrip(keys_, std::vector<float>(row), row.data());
      std::copy_n(row.begin(), rope, decoded->keys(layer) + token * rope);
      std::copy_n(row.data() + rope, rank, decoded->values(layer) + token * rank);
    }
    return bits;
  }

  std::string name_;
  GgmlCacheType keys_;
  GgmlCacheType values_;
};

}  // namespace

std::vector<std::byte> QuantizeGgml(GgmlCacheType type, std::span<const float> x) {
  KV_CHECK(x.size() % kGgmlBlockValues == 0);
  const size_t block_bytes = TypeOf(type).block_bytes;
  std::vector<std::byte> bytes(x.size() / kGgmlBlockValues * block_bytes);
  for (size_t block = 0; block * kGgmlBlockValues < x.size(); ++block) {
    const Row values = x.subspan(block * kGgmlBlockValues, kGgmlBlockValues);
    std::byte* to = bytes.data() + block * block_bytes;
    type == GgmlCacheType::kQ8_0 ? QuantizeQ8(values, to) : QuantizeQ4(values, to);
  }
  return bytes;
}

Result<std::unique_ptr<StateCoder>> MakeGgmlCoder(std::string name, const Model& model,
                                                  GgmlCacheType keys, GgmlCacheType values) {
  const kernels::LayerShape shape = model.config().StateShape(1);
  const int key_width = shape.keys.kv_heads * shape.keys.head_dim;
  const int value_width = shape.values.kv_heads * shape.values.head_dim;
  if (shape.latent && keys != values) {
    return InvalidArgument(
        "codec {}: llama.cpp keeps rope key and latent of a model with latent attention in one "
        "row, which has one type: use q8_0 or q4_0",
        name);
  }
  const auto blocks = static_cast<int>(kGgmlBlockValues);
  const bool whole = shape.latent ? (key_width + value_width) % blocks == 0
                                  : key_width % blocks == 0 && value_width % blocks == 0;
  if (!whole) {
    return InvalidArgument(
        "codec {}: rows of {} and {} numbers are not whole blocks of {}, and llama.cpp does not "
        "quantize such a model's cache either",
        name, key_width, value_width, kGgmlBlockValues);
  }
  return std::unique_ptr<StateCoder>(std::make_unique<GgmlCoder>(std::move(name), keys, values));
}

}  // namespace kvant::node
