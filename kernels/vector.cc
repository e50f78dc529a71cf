#include "kernels/vector.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/check.h"
#include "kernels/codec.h"
#include "kernels/float_formats.h"
#include "kernels/implementation.h"
#include "kernels/portable_math.h"

namespace kvant::kernels {

void RmsNorm(const float* x, const float* weight, int rows, int width, float epsilon, float* out) {
  ActiveImplementation().rms_norm(x, weight, rows, width, epsilon, out);
}

void SiluMultiply(float* gate, const float* up, size_t count) {
  ActiveImplementation().silu_multiply(gate, up, count);
}

void GeluTanhMultiply(float* gate, const float* up, size_t count) {
  ActiveImplementation().gelu_multiply(gate, up, count);
}

void AddInPlace(float* x, const float* y, size_t count) {
  for (size_t i = 0; i < count; ++i) x[i] += y[i];
}

void AddBias(float* x, const float* bias, int rows, int width) {
  for (int row = 0; row < rows; ++row) {
    AddInPlace(x + static_cast<size_t>(row) * static_cast<size_t>(width), bias,
               static_cast<size_t>(width));
  }
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

namespace {

// The frequency of a channel under Llama 3's scaling: channels that turn often in the original
// context keep theirs, those that turn rarely are stretched by the factor, those between blended.
double Llama3Frequency(double frequency, const RopeScaling& scaling) {
  const double context = scaling.original_max_position_embeddings;
  const double turns = context * frequency / (2.0 * std::numbers::pi);
  if (turns < scaling.low_freq_factor) return frequency / scaling.factor;
  if (turns > scaling.high_freq_factor) return frequency;
  const double smooth =
      (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
  return (1.0 - smooth) * frequency / scaling.factor + smooth * frequency;
}

// Stretches frequencies as YaRN does: the fast ones are kept, the slow ones divided by the factor,
// those between them in part.
void StretchYarn(int head_dim, double theta, const RopeScaling& scaling,
                 std::vector<double>* frequencies) {
  // The channel that makes so many turns in the original context.
  const auto channel = [&](double turns) {
    return head_dim *
           PortableLog(scaling.original_max_position_embeddings /
                       (turns * 2.0 * std::numbers::pi)) /
           (2.0 * PortableLog(theta));
  };
  double low = channel(scaling.beta_fast);
  double high = channel(scaling.beta_slow);
  if (scaling.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, head_dim - 1.0);
  if (low == high) high += 0.001;
  for (size_t i = 0; i < frequencies->size(); ++i) {
    const double divided = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    (*frequencies)[i] *= (1.0 - divided) + divided / scaling.factor;
  }
}

}  // namespace

std::vector<double> RopeFrequencies(int head_dim, double theta, const RopeScaling& scaling) {
  KV_CHECK(head_dim > 0 && head_dim % 2 == 0 && theta > 0.0);
  std::vector<double> frequencies(static_cast<size_t>(head_dim / 2));
  for (size_t i = 0; i < frequencies.size(); ++i) {
    double& frequency = frequencies[i];
    frequency = PortableExp(-2.0 * static_cast<double>(i) / head_dim * PortableLog(theta));
    switch (scaling.kind) {
      case RopeScaling::Kind::kNone:
      case RopeScaling::Kind::kYarn:
        break;
      case RopeScaling::Kind::kLinear:
        frequency /= scaling.factor;
        break;
      case RopeScaling::Kind::kLlama3:
        frequency = Llama3Frequency(frequency, scaling);
        break;
    }
  }
  if (scaling.kind == RopeScaling::Kind::kYarn) {
    StretchYarn(head_dim, theta, scaling, &frequencies);
  }
  return frequencies;
}

RopeTable::RopeTable(int head_dim, double theta, const RopeScaling& scaling, int max_positions)
    : half_(head_dim / 2), max_positions_(max_positions) {
  KV_CHECK(max_positions > 0);
  const std::vector<double> frequencies = RopeFrequencies(head_dim, theta, scaling);
  const size_t size = static_cast<size_t>(max_positions) * frequencies.size();
  const double scale = scaling.kind == RopeScaling::Kind::kYarn ? scaling.attention_factor : 1.0;
  cos_.reserve(size);
  sin_.reserve(size);
  for (int position = 0; position < max_positions; ++position) {
    for (const double frequency : frequencies) {
      const SineCosine of = PortableSineCosine(position * frequency);
      cos_.push_back(static_cast<float>(of.cosine * scale));
      sin_.push_back(static_cast<float>(of.sine * scale));
    }
  }
}

size_t RopeTable::Of(int position) const {
  KV_CHECK(position >= 0 && position < max_positions_);
  return static_cast<size_t>(position) * static_cast<size_t>(half_);
}

void RopeTable::Apply(float* x, int heads, size_t stride, int position) const {
  const size_t at = Of(position);
  ActiveImplementation().rotate(x, heads, stride, half_, cos_.data() + at, sin_.data() + at);
}

void RopeTable::Undo(float* x, int heads, size_t stride, int position) const {
  const size_t at = Of(position);
  ActiveImplementation().rotate_back(x, heads, stride, half_, cos_.data() + at, sin_.data() + at);
}

void RopeTable::ApplyInterleaved(float* x, int heads, size_t stride, int position) const {
  KV_CHECK(2 * half_ <= kMaxHeadDim);
  float apart[kMaxHeadDim];
  const auto half = static_cast<size_t>(half_);
  for (int h = 0; h < heads; ++h) {
    float* vector = x + static_cast<size_t>(h) * stride;
    for (size_t i = 0; i < 2 * half; ++i) apart[i / 2 + (i % 2) * half] = vector[i];
    std::copy_n(apart, 2 * half, vector);
  }
  Apply(x, heads, stride, position);
}

}  // namespace kvant::kernels
