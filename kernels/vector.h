// What a decoder computes besides products and attention: norms, gates, rotary positions, softmax.
// Sums have one fixed order on every machine, so a row's bits never depend on its company.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvant::kernels {

// out[r] = x[r] / sqrt(mean(x[r]^2) + epsilon) * weight. x, out: [rows][width]; weight: [width].
// out may be x. A row's result does not depend on the other rows.
void RmsNorm(const float* x, const float* weight, int rows, int width, float epsilon, float* out);

// gate = silu(gate) * up, element by element; silu(g) = g / (1 + exp(-g)).
void SiluMultiply(float* gate, const float* up, size_t count);

// gate = gelu(gate) * up with the tanh approximation of gelu (Hendrycks and Gimpel, 2016).
void GeluTanhMultiply(float* gate, const float* up, size_t count);

// x += y, element by element (the residual stream).
void AddInPlace(float* x, const float* y, size_t count);
// x[row] += bias for every row. x: [rows][width].
void AddBias(float* x, const float* bias, int rows, int width);

// x = exp(x - max) / sum, in place. REQUIRES: count > 0 and at least one finite element.
void Softmax(float* x, size_t count);

// Checkpoint formats to fp32 and back, many at a time; rounding as ToBf16 and ToFp16 (linear.h).
void WidenBf16(const uint16_t* in, float* out, size_t count);
void WidenFp16(const uint16_t* in, float* out, size_t count);
void NarrowBf16(const float* in, uint16_t* out, size_t count);

// How rotary frequencies are stretched beyond the trained context; config.json's "rope_scaling".
struct RopeScaling {
  enum class Kind : uint8_t { kNone, kLinear, kLlama3, kYarn };
  Kind kind = Kind::kNone;
  double factor = 1.0;                          // all but kNone
  double low_freq_factor = 1.0;                 // kLlama3
  double high_freq_factor = 4.0;                // kLlama3
  int original_max_position_embeddings = 8192;  // kLlama3, kYarn
  double beta_fast = 32.0;                      // kYarn: turns from which on a frequency is kept
  double beta_slow = 1.0;                       // kYarn: turns up to which it is divided by factor
  bool truncate = true;                         // kYarn: ramp from a whole channel to a whole one
  double attention_factor = 1.0;                // kYarn: cosines and sines are multiplied by it
};

// The angular frequencies of rotary embedding [head_dim / 2], radians per position (Su et al.,
// 2021; Llama 3's and YaRN's scaling (Peng et al., 2023, section 3.2) as in transformers'
// modeling_rope_utils.py).
std::vector<double> RopeFrequencies(int head_dim, double theta, const RopeScaling& scaling);

// Cosines and sines of every position, computed in double and kept in fp32: the same bits on every
// machine. Immutable.
class RopeTable {
 public:
  // REQUIRES: head_dim even; max_positions > 0.
  RopeTable(int head_dim, double theta, const RopeScaling& scaling, int max_positions);

  // Rotates x: [heads][head_dim], vectors `stride` floats apart, at `position`, in the
  // "rotate_half" layout of Hugging Face checkpoints: channel i pairs with channel i + head_dim
  // / 2. REQUIRES: 0 <= position < max_positions().
  void Apply(float* x, int heads, size_t stride, int position) const;
  // The same for the layout of DeepSeek's checkpoints: channel 2i pairs with channel 2i + 1, and
  // comes out as channel i, the other as channel i + head_dim / 2. Vectors stand `stride` floats
  // apart.
  void ApplyInterleaved(float* x, int heads, size_t stride, int position) const;
  // Takes back what Apply did, but for rounding.
  void Undo(float* x, int heads, size_t stride, int position) const;
  int max_positions() const { return max_positions_; }

 private:
  // Where a position's cosines and sines begin.
  size_t Of(int position) const;

  int half_;
  int max_positions_;
  std::vector<float> cos_;  // [max_positions][head_dim / 2]
  std::vector<float> sin_;
};

}  // namespace kvant::kernels
