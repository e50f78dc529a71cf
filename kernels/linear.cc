#include "kernels/linear.h"

#include <algorithm>
#include <vector>

#include "base/check.h"
#include "kernels/blas.h"
#include "kernels/implementation.h"
#include "kernels/vector.h"

namespace kvant::kernels {
namespace {

// Output features of one product. Small enough that two threads share a layer of a small model
// evenly, large enough that sgemm packs x for something.
constexpr int kPrefillPanel = 128;
// Output features that a thread takes at a time in decode, by weight bytes: below this, waking
// another thread (tens of microseconds) costs more than it saves.
constexpr int kDecodePanelBytes = 128 << 10;

template <typename Body>
void ForPieces(ThreadPool* pool, int pieces, const Body& body) {
  if (pool != nullptr) {
    pool->ParallelFor(pieces, body);
    return;
  }
  for (int piece = 0; piece < pieces; ++piece) body(piece);
}

}  // namespace

void PrefillLinear(const Weight& weight, const float* x, float* y, ThreadPool* pool) {
  KV_CHECK(weight.bf16 != nullptr || weight.fp32 != nullptr);
  KV_CHECK(weight.out_features > 0 && weight.in_features > 0);
  SgemmFunction* const sgemm = LoadedSgemm();
  const int width = weight.in_features;
  const int pieces = (weight.out_features + kPrefillPanel - 1) / kPrefillPanel;
  ForPieces(pool, pieces, [&](int piece) {
    const int first = piece * kPrefillPanel;
    const int count = std::min(kPrefillPanel, weight.out_features - first);
    const size_t from = static_cast<size_t>(first) * static_cast<size_t>(width);
    const float* panel = nullptr;
    if (weight.bf16 != nullptr) {
      const size_t size = static_cast<size_t>(count) * static_cast<size_t>(width);
      thread_local std::vector<float> widened;  // grows to the widest layer and stays
      if (widened.size() < size) widened.resize(size);
      WidenBf16(weight.bf16 + from, widened.data(), size);
      panel = widened.data();
    } else {
      panel = weight.fp32 + from;
    }
    sgemm(kBlasRowMajor, kBlasNoTranspose, kBlasTranspose, kPrefillRows, count, width, 1.0F, x,
          width, panel, width, 0.0F, y + first, weight.out_features);
  });
}

void DecodeLinear(const Weight& weight, const float* x, int rows, float* y, ThreadPool* pool) {
  KV_CHECK(weight.bf16 != nullptr || weight.fp32 != nullptr);
  KV_CHECK(weight.out_features > 0 && weight.in_features > 0);
  if (rows <= 0) return;
  const auto width = static_cast<size_t>(weight.in_features);
  const size_t element = weight.bf16 != nullptr ? sizeof(uint16_t) : sizeof(float);
  const int panel = std::max(1, static_cast<int>(kDecodePanelBytes / (width * element)));
  const int pieces = (weight.out_features + panel - 1) / panel;
  const Implementation& implementation = ActiveImplementation();
  ForPieces(pool, pieces, [&](int piece) {
    const int first = piece * panel;
    const int count = std::min(panel, weight.out_features - first);
    const size_t from = static_cast<size_t>(first) * width;
    const auto stride = static_cast<size_t>(weight.out_features);
    if (weight.bf16 != nullptr) {
      implementation.linear(weight.bf16 + from, count, weight.in_features, x, rows, y + first,
                            stride);
    } else {
      implementation.linear_fp32(weight.fp32 + from, count, weight.in_features, x, rows, y + first,
                                 stride);
    }
  });
}

}  // namespace kvant::kernels
