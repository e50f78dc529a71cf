#include "kernels/ordered_gemm.h"

#include <algorithm>
#include <bit>
#include <new>

#include "base/check.h"
#include "kernels/float_formats.h"
#include "kernels/implementation.h"

namespace kvant::kernels {
namespace {

// An input of which more than this share of the rows is not 0 is faster with its zeros.
constexpr double kDense = 0.55;
// Inputs that must be saved for two products to be worth it.
constexpr double kWorthwhile = 4;

bool AllBf16(const float* weights, size_t count) {
  uint32_t lost = 0;
  for (size_t i = 0; i < count; ++i) lost |= std::bit_cast<uint32_t>(weights[i]) & 0xFFFFU;
  return lost == 0;
}

// Panels begin where cache lines do.
template <typename Element>
std::shared_ptr<Element[]> Allocate(size_t count) {
  constexpr std::align_val_t kAlignment{64};
  return {static_cast<Element*>(::operator new(count * sizeof(Element), kAlignment)),
          [](Element* memory) { ::operator delete(memory, kAlignment); }};
}

// Where the weights of an output begin.
size_t BeginOf(size_t output, size_t inputs, bool bf16) {
  return output / kOrderedPanel * inputs * kOrderedPanel +
         static_cast<size_t>(OrderedPlace(static_cast<int>(output % kOrderedPanel), bf16));
}

}  // namespace

OrderedWeights::OrderedWeights(const float* weights, int outputs, int inputs)
    : outputs_(outputs), inputs_(inputs) {
  KV_CHECK(outputs >= 1 && inputs >= 1);
  const auto width = static_cast<size_t>(inputs);
  const auto panels = static_cast<size_t>((outputs + kOrderedPanel - 1) / kOrderedPanel);
  const size_t count = panels * width * kOrderedPanel;
  const bool bf16 = AllBf16(weights, static_cast<size_t>(outputs) * width);
  if (bf16) {
    bf16_ = Allocate<uint16_t>(count);
  } else {
    fp32_ = Allocate<float>(count);
  }
  for (size_t output = 0; output < panels * kOrderedPanel; ++output) {
    const bool real = output < static_cast<size_t>(outputs);
    const float* row = weights + output * width;
    size_t to = BeginOf(output, width, bf16);
    for (size_t k = 0; k < width; ++k, to += kOrderedPanel) {
      const float weight = real ? row[k] : 0.0F;
      if (bf16) {
        bf16_[to] = static_cast<uint16_t>(std::bit_cast<uint32_t>(weight) >> 16);
      } else {
        fp32_[to] = weight;
      }
    }
  }
}

std::vector<float> OrderedWeights::RowMajor() const {
  const auto width = static_cast<size_t>(inputs_);
  std::vector<float> rows;
  rows.reserve(static_cast<size_t>(outputs_) * width);
  for (size_t output = 0; output < static_cast<size_t>(outputs_); ++output) {
    size_t from = BeginOf(output, width, bf16_ != nullptr);
    for (size_t k = 0; k < width; ++k, from += kOrderedPanel) {
      rows.push_back(bf16_ != nullptr ? FromBf16(bf16_[from]) : fp32_[from]);
    }
  }
  return rows;
}

void OrderedMultiply(const OrderedWeights& weights, const float* x, int rows, const float* bias,
                     float* out) {
  OrderedMultiply(weights, x, rows, bias, weights.outputs(), out);
}

void OrderedMultiply(const OrderedWeights& weights, const float* x, int rows, const float* bias,
                     int outputs, float* out) {
  KV_DCHECK(outputs >= 0 && outputs <= weights.outputs());
  ActiveImplementation().ordered_multiply(
      {weights, x, rows, weights.inputs(), outputs, bias, 0, out});
}

void OrderedMultiply(const OrderedProduct& product) {
  ActiveImplementation().ordered_multiply(product);
}

void OrderedMultiplyAdd(const OrderedWeights& weights, const SparseRows& x, float* out) {
  thread_local std::vector<uint32_t> terms_of;  // [inputs]
  terms_of.assign(static_cast<size_t>(weights.inputs()), 0);
  for (size_t t = 0; t < x.terms(); ++t) ++terms_of[x.inputs()[t]];
  // Inputs come in order, so the first of them may be multiplied with their zeros before the others
  // are without: as many as that saves most time for.
  size_t dense = 0;
  double most = 0;
  double saved = 0;
  for (size_t input = 0; input < terms_of.size(); ++input) {
    saved += terms_of[input] - kDense * static_cast<double>(x.rows());
    if (saved <= most) continue;
    most = saved;
    dense = input + 1;
  }
  if (most < kWorthwhile * static_cast<double>(x.rows())) {
    ActiveImplementation().ordered_add_sparse(weights, x, out);
    return;
  }
  thread_local std::vector<float> first;
  thread_local SparseRows rest;
  first.assign(x.rows() * dense, 0);
  rest.Clear();
  for (size_t r = 0; r < x.rows(); ++r) {
    for (size_t t = x.begin()[r]; t < x.begin()[r + 1]; ++t) {
      const size_t input = x.inputs()[t];
      if (input < dense) {
        first[r * dense + input] = x.factors()[t];
      } else {
        rest.Add(input, x.factors()[t]);
      }
    }
    rest.EndRow();
  }
  OrderedMultiplyAdd(weights, first.data(), static_cast<int>(x.rows()), static_cast<int>(dense),
                     out);
  ActiveImplementation().ordered_add_sparse(weights, rest, out);
}

void OrderedMultiplyAdd(const OrderedWeights& weights, const float* x, int rows, float* out) {
  OrderedMultiplyAdd(weights, x, rows, weights.inputs(), out);
}

void OrderedMultiplyAdd(const OrderedWeights& weights, const float* x, int rows, int inputs,
                        float* out) {
  KV_DCHECK(inputs >= 1 && inputs <= weights.inputs());
  ActiveImplementation().ordered_multiply({weights, x, rows, inputs, weights.outputs(), out,
                                           static_cast<size_t>(weights.outputs()), out});
}

}  // namespace kvant::kernels
