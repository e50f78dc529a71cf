// Softmax attention in double precision, over keys and values as they are decoded.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "kernels/attention.h"

namespace kvant::kernels {

// What one query row of one head makes of the tokens it sees.
struct OracleVector {
  size_t index = 0;  // row * q_heads + head
  int kv_head = 0;
  int begin = 0;                    // first token seen
  std::vector<double> probability;  // of the tokens from `begin` on; empty: none is seen
  double largest_magnitude = 0.0;   // of a score, its terms taken without their signs
  double probability_sum = 0.0;     // before division, the largest being 1
};

// A channel of a token's key or value.
inline double KeyAt(const RawTokens& tokens, int token, int kv_head, int channel) {
  const SegmentShape& keys = tokens.shape.keys;
  if (channel < keys.head_dim) {
    return tokens
        .keys[static_cast<size_t>((token * keys.kv_heads + kv_head) * keys.head_dim + channel)];
  }
  return tokens
      .values[static_cast<size_t>(token * tokens.shape.values.head_dim + channel - keys.head_dim)];
}
inline double ValueAt(const RawTokens& tokens, int token, int kv_head, int channel) {
  const SegmentShape& values = tokens.shape.values;
  return tokens
      .values[static_cast<size_t>((token * values.kv_heads + kv_head) * values.head_dim + channel)];
}

// each(vector) for all rows and heads of a block; `visible` as AttendRaw takes it.
template <typename Each>
void ForEachOracleVector(const QueryBlock& block, const RawTokens& tokens, const Visible& visible,
                         const Each& each) {
  const int group = block.q_heads / tokens.shape.keys.kv_heads;
  const int width = KeyDim(tokens.shape);
  const int count = tokens.shape.keys.tokens;
  for (int row = 0; row < block.rows; ++row) {
    for (int head = 0; head < block.q_heads; ++head) {
      OracleVector vector;
      vector.index = static_cast<size_t>(row * block.q_heads + head);
      vector.kv_head = head / group;
      vector.begin = visible.begin == nullptr ? 0 : std::clamp(visible.begin[row], 0, count);
      const int end = visible.end == nullptr ? count : std::clamp(visible.end[row], 0, count);
      const float* q = block.q + vector.index * static_cast<size_t>(width);
      std::vector<double>& p = vector.probability;
      for (int token = vector.begin; token < end; ++token) {
        double score = 0.0;
        double magnitude = 0.0;
        for (int c = 0; c < width; ++c) {
          const double term = static_cast<double>(q[c]) * KeyAt(tokens, token, vector.kv_head, c);
          score += term;
          magnitude += std::fabs(term);
        }
        p.push_back(score * static_cast<double>(block.scale));
        vector.largest_magnitude = std::max(
            vector.largest_magnitude, magnitude * std::fabs(static_cast<double>(block.scale)));
      }
      const double max = p.empty() ? 0.0 : *std::max_element(p.begin(), p.end());
      for (double& weight : p) {
        weight = std::exp(weight - max);
        vector.probability_sum += weight;
      }
      for (double& weight : p) weight /= vector.probability_sum;
      each(vector);
    }
  }
}

// [rows][q_heads][value_dim]; zeros for rows that see nothing.
inline std::vector<double> AttentionOracle(const QueryBlock& block, const RawTokens& tokens,
                                           const Visible& visible) {
  const auto width = static_cast<size_t>(tokens.shape.values.head_dim);
  std::vector<double> out(static_cast<size_t>(block.rows * block.q_heads) * width, 0.0);
  ForEachOracleVector(block, tokens, visible, [&](const OracleVector& vector) {
    for (size_t i = 0; i < vector.probability.size(); ++i) {
      const int token = vector.begin + static_cast<int>(i);
      for (size_t c = 0; c < width; ++c) {
        out[vector.index * width + c] +=
            vector.probability[i] * ValueAt(tokens, token, vector.kv_head, static_cast<int>(c));
      }
    }
  });
  return out;
}

}  // namespace kvant::kernels
