#include "kernels/vector.h"

#include <cmath>
#include <numbers>

#include "base/check.h"
#include "kernels/float_formats.h"
#include "kernels/implementation.h"

namespace kvant::kernels {

void RmsNorm(const float* x, const float* weight, int rows, int width, float epsilon, float* out) {
  ActiveImplementation().rms_norm(x, weight, rows, width, epsilon, out);
}

void SiluMultiply(float* gate, const float* up, size_t count) {
  ActiveImplementation().silu_multiply(gate, up, count);
}

void AddInPlace(float* x, const float* y, size_t count) {
  for (size_t i = 0; i < count; ++i) x[i] += y[i];
}

void Softmax(float* x, size_t count) {
  KV_CHECK(count > 0);
  ActiveImplementation().softmax(x, count);
}

void WidenBf16(const uint16_t* in, float* out, size_t count) {
  for (size_t i = 0; i < count; ++i) out[i] = FromBf16(in[i]);
}
void WidenFp16(const uint16_t* in, float* out, size_t count) {
  for (size_t i = 0; i < count; ++i) out[i] = FromFp16(in[i]);
}
void NarrowBf16(const float* in, uint16_t* out, size_t count) {
  for (size_t i = 0; i < count; ++i) out[i] = ToBf16(in[i]);
}

std::vector<double> RopeFrequencies(int head_dim, double theta, const RopeScaling& scaling) {
  KV_CHECK(head_dim > 0 && head_dim % 2 == 0 && theta > 0.0);
  std::vector<double> frequencies(static_cast<size_t>(head_dim / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    double frequency = std::pow(theta, -2.0 * static_cast<double>(i) / head_dim);
    if (scaling.kind == RopeScaling::Kind::kLinear) frequency /= scaling.factor;
    if (scaling.kind == RopeScaling::Kind::kLlama3) {
      const double context = scaling.original_max_position_embeddings;
      const double turns = context * frequency / (2.0 * std::numbers::pi);
      // Channels that turn often keep their frequency, those that turn rarely are stretched by the
      // factor, those between are blended.
      if (turns < scaling.low_freq_factor) {
        frequency /= scaling.factor;
      } else if (turns <= scaling.high_freq_factor) {
        const double smooth = (turns - scaling.low_freq_factor) /
                              (scaling.high_freq_factor - scaling.low_freq_factor);
        frequency = (1.0 - smooth) * frequency / scaling.factor + smooth * frequency;
      }
    }
    frequencies[i] = frequency;
  }
  return frequencies;
}

RopeTable::RopeTable(int head_dim, double theta, const RopeScaling& scaling, int max_positions)
    : half_(head_dim / 2), max_positions_(max_positions) {
  KV_CHECK(max_positions > 0);
  const std::vector<double> frequencies = RopeFrequencies(head_dim, theta, scaling);
  const size_t size = static_cast<size_t>(max_positions) * frequencies.size();
  cos_.reserve(size);
  sin_.reserve(size);
  for (int position = 0; position < max_positions; ++position) {
    for (const double frequency : frequencies) {
      cos_.push_back(static_cast<float>(std::cos(position * frequency)));
      sin_.push_back(static_cast<float>(std::sin(position * frequency)));
    }
  }
}

void RopeTable::Apply(float* x, int heads, int position) const {
  KV_CHECK(position >= 0 && position < max_positions_);
  const size_t at = static_cast<size_t>(position) * static_cast<size_t>(half_);
  const float* cosines = cos_.data() + at;
  const float* sines = sin_.data() + at;
  for (int h = 0; h < heads; ++h) {
    float* low = x + static_cast<size_t>(h) * static_cast<size_t>(2 * half_);
    float* high = low + half_;
    for (int i = 0; i < half_; ++i) {
      const float a = low[i];
      const float b = high[i];
      low[i] = a * cosines[i] - b * sines[i];
      high[i] = b * cosines[i] + a * sines[i];
    }
  }
}

}  // namespace kvant::kernels
