#include "kernels/linear.h"

#include <algorithm>
#include <cstdint>

#include "base/check.h"

namespace kvant::kernels {
namespace {

// What waking another thread for a piece must save: weights met by one row, which come from memory,
// or as much work where each is met by several.
constexpr int64_t kPieceWork = int64_t{48} << 10;
constexpr int kWorkOfMemory = 8;  // rows whose products with a weight cost as much as reading it
// Pieces for each thread, so that one that is held up leaves little to wait for.
constexpr int64_t kPiecesPerThread = 3;

int64_t Panels(const OrderedWeights& weights) {
  return (weights.outputs() + kOrderedPanel - 1) / kOrderedPanel;
}

// Panels [first, end) of a product.
void ComputePanels(const LinearProduct& product, int rows, int64_t first, int64_t end) {
  const int64_t outputs = std::min<int64_t>(end * kOrderedPanel, product.weights->outputs());
  OrderedMultiply({.weights = *product.weights,
                   .x = product.x,
                   .rows = rows,
                   .inputs = product.weights->inputs(),
                   .first_output = static_cast<int>(first * kOrderedPanel),
                   .end_output = static_cast<int>(outputs),
                   .out = product.y});
}

}  // namespace

void Linear(std::span<const LinearProduct> products, int rows, ThreadPool* pool) {
  if (rows <= 0) return;
  if (pool == nullptr || pool->threads() == 1) {
    for (const LinearProduct& product : products) {
      ComputePanels(product, rows, 0, Panels(*product.weights));
    }
    return;
  }
  int64_t weights = 0;
  for (const LinearProduct& product : products) {
    weights += Panels(*product.weights) * kOrderedPanel * product.weights->inputs();
  }
  const int64_t least = kPieceWork * (1 + kWorkOfMemory) / (rows + kWorkOfMemory);
  const int64_t wanted = std::max(least, weights / (kPiecesPerThread * pool->threads()));
  const auto panels_of_piece = [&](const LinearProduct& product) {
    const int64_t panel = int64_t{kOrderedPanel} * product.weights->inputs();
    return std::max<int64_t>(1, (wanted + panel / 2) / panel);
  };
  const auto pieces_of = [&](const LinearProduct& product) {
    const int64_t each = panels_of_piece(product);
    return static_cast<int>((Panels(*product.weights) + each - 1) / each);
  };
  int pieces = 0;
  for (const LinearProduct& product : products) pieces += pieces_of(product);
  pool->ParallelFor(pieces, [&](int piece) {
    const LinearProduct* product = products.data();
    for (; piece >= pieces_of(*product); ++product) piece -= pieces_of(*product);
    const int64_t each = panels_of_piece(*product);
    ComputePanels(*product, rows, piece * each,
                  std::min((piece + 1) * each, Panels(*product->weights)));
  });
}

}  // namespace kvant::kernels
