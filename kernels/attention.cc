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

}  // namespace

void InitPartials(const QueryBlock& block, int head_dim) {
  const size_t vectors = VectorsOf(block);
  std::fill_n(block.max, vectors, kNothing);
  std::fill_n(block.sum, vectors, 0.0F);
  std::fill_n(block.weighted, vectors * static_cast<size_t>(head_dim), 0.0F);
}

void AttendTile(const QueryBlock& block, const LayerTile& tile) {
  KV_CHECK(ShapeIsValid(tile.shape) && block.q_heads % tile.shape.kv_heads == 0);
  ActiveImplementation().attend_tile(block, tile);
}

void AttendRaw(const QueryBlock& block, const float* keys, const float* values, int tokens,
               int kv_heads, int head_dim, const int* visible) {
  KV_CHECK(kv_heads > 0 && block.q_heads % kv_heads == 0);
  KV_CHECK(head_dim > 0 && head_dim % 8 == 0 && head_dim <= kMaxHeadDim);
  ActiveImplementation().attend_raw(block, {keys, values, {tokens, kv_heads, head_dim}}, visible);
}

void MergePartials(const QueryBlock& from, const QueryBlock& into, int head_dim) {
  KV_CHECK(from.rows == into.rows && from.q_heads == into.q_heads);
  const auto width = static_cast<size_t>(head_dim);
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

void FinishPartials(const QueryBlock& block, int head_dim, float* out) {
  const auto width = static_cast<size_t>(head_dim);
  for (size_t i = 0; i < VectorsOf(block); ++i) {
    // A row that attended nothing gives zeros.
    const float factor = block.sum[i] > 0.0F ? 1.0F / block.sum[i] : 0.0F;
    const float* source = block.weighted + i * width;
    for (size_t c = 0; c < width; ++c) out[i * width + c] = source[c] * factor;
  }
}

}  // namespace kvant::kernels
