#include "kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "kernels/implementation.h"

namespace kvant::kernels {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

size_t VectorsOf(const QueryBlock& block) {
  return static_cast<size_t>(block.rows) * static_cast<size_t>(block.q_heads);
}

void CheckShape(const QueryBlock& block, const LayerShape& shape) {
  const int kv_heads = shape.keys.kv_heads;
  KV_CHECK(kv_heads > 0 && block.q_heads % kv_heads == 0);
  KV_CHECK(shape.values.kv_heads == kv_heads && shape.values.tokens == shape.keys.tokens);
  for (const int head_dim : {shape.keys.head_dim, shape.values.head_dim, KeyDim(shape)}) {
    KV_CHECK(head_dim > 0 && head_dim % 8 == 0 && head_dim <= kMaxHeadDim);
  }
  KV_CHECK(!shape.latent || kv_heads == 1);
}

}  // namespace

void InitPartials(const QueryBlock& block, int value_dim) {
  const size_t vectors = VectorsOf(block);
  std::fill_n(block.max, vectors, kNothing);
  std::fill_n(block.sum, vectors, 0.0F);
  std::fill_n(block.weighted, vectors * static_cast<size_t>(value_dim), 0.0F);
}

void AttendTile(const QueryBlock& block, const LayerTile& tile, const Visible& visible,
                const LayerTile* next) {
  CheckShape(block, tile.shape);
  KV_CHECK(ShapeIsValid(tile.shape.keys) && ShapeIsValid(tile.shape.values));
  ActiveImplementation().attend_tile(block, tile, visible, next);
}

void AttendRaw(const QueryBlock& block, const RawTokens& tokens, const Visible& visible) {
  CheckShape(block, tokens.shape);
  ActiveImplementation().attend_raw(block, tokens, visible);
}

void MergePartials(const QueryBlock& from, const QueryBlock& into, int value_dim) {
  KV_CHECK(from.rows == into.rows && from.q_heads == into.q_heads);
  const auto width = static_cast<size_t>(value_dim);
  for (size_t i = 0; i < VectorsOf(into); ++i) {
    if (from.max[i] == kNothing) continue;
    const float max = std::max(from.max[i], into.max[i]);
    // exp(-inf) is 0: an empty `into` takes `from` as it is.
    const float keep = std::exp(into.max[i] - max);
    const float add = std::exp(from.max[i] - max);
    into.max[i] = max;
    into.sum[i] = into.sum[i] * keep + from.sum[i] * add;
    const float* source = from.weighted + i * width;
    float* target = into.weighted + i * width;
    for (size_t c = 0; c < width; ++c) target[c] = target[c] * keep + source[c] * add;
  }
}

void FinishPartials(const QueryBlock& block, int value_dim, float* out) {
  const auto width = static_cast<size_t>(value_dim);
  for (size_t i = 0; i < VectorsOf(block); ++i) {
    // A row that attended nothing gives zeros.
    const float factor = block.sum[i] > 0.0F ? 1.0F / block.sum[i] : 0.0F;
    const float* source = block.weighted + i * width;
    for (size_t c = 0; c < width; ++c) out[i * width + c] = source[c] * factor;
  }
}

}  // namespace kvant::kernels
