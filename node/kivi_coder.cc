#include "node/kivi_coder.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/check.h"
#include "kernels/float_formats.h"

namespace kvant::node {
namespace {

constexpr uint64_t kHalfBits = 16;

float Half(float x) { return kernels::FromFp16(kernels::ToFp16(x)); }

class KiviCoder final : public StateCoder {
 public:
  KiviCoder(std::string name, int bits) : name_(std::move(name)), bits_(bits) {
    KV_CHECK(bits >= 1 && bits <= 8);
  }

  std::string_view name() const override { return name_; }
  // The window moves with the sequence's end, so a block's form is not its own.
  bool blockwise() const override { return false; }

  void Code(const PrefixState& exact, const Sink& sink) const override {
    PrefixState decoded = exact;
    const auto tokens = static_cast<size_t>(exact.tokens());
    const size_t coded_keys = tokens - tokens % kKiviResidual;
    const size_t coded_values = tokens - std::min<size_t>(tokens, kKiviResidual);
    uint64_t bits = 0;
    for (int layer = 0; layer < exact.layers(); ++layer) {
      float* keys = decoded.keys(layer);
      const size_t key_width = exact.key_width();
      for (size_t token = 0; token < coded_keys; token += kKiviGroup) {
        for (size_t channel = 0; channel < key_width; ++channel) {
          bits += CodeGroup(keys + token * key_width + channel, kKiviGroup, key_width);
        }
      }
      bits += KeepHalf(keys + coded_keys * key_width, (tokens - coded_keys) * key_width);

      float* values = decoded.values(layer);
      const size_t value_width = exact.value_width();
      const auto head_dim = static_cast<size_t>(exact.shape().values.head_dim);
      for (size_t head = 0; head < coded_values * value_width; head += head_dim) {
        for (size_t at = 0; at < head_dim; at += kKiviGroup) {
          bits += CodeGroup(values + head + at, std::min<size_t>(kKiviGroup, head_dim - at), 1);
        }
      }
      bits += KeepHalf(values + coded_values * value_width, (tokens - coded_values) * value_width);
    }
    sink(0, decoded, {.bits = bits});
  }

 private:
  // `count` numbers, `stride` apart, become what a reader has of them. Returns their bits.
  uint64_t CodeGroup(float* x, size_t count, size_t stride) const {
    float low = x[0];
    float high = x[0];
    for (size_t i = 1; i < count; ++i) {
      low = std::min(low, x[i * stride]);
      high = std::max(high, x[i * stride]);
    }
    const auto levels = static_cast<float>((1 << bits_) - 1);
    // Codes are chosen against what is stored, so that its rounding costs as little as it can.
    const float minimum = Half(low);
    const float scale = Half((high - minimum) / levels);
    for (size_t i = 0; i < count; ++i) {
      const float at = scale > 0 ? (x[i * stride] - minimum) / scale : 0.0F;
      x[i * stride] = std::nearbyint(std::clamp(at, 0.0F, levels)) * scale + minimum;
    }
    return count * static_cast<uint64_t>(bits_) + 2 * kHalfBits;
  }

  static uint64_t KeepHalf(float* x, size_t count) {
    std::transform(x, x + count, x, Half);
    return count * kHalfBits;
  }

  std::string name_;
  int bits_;
};

}  // namespace

std::unique_ptr<StateCoder> MakeKiviCoder(std::string name, int bits) {
  return std::make_unique<KiviCoder>(std::move(name), bits);
}

}  // namespace kvant::node
