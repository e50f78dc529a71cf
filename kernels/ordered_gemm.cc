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

// weights[outputs][inputs] in panels.
template <typename Element, typename Convert, typename From>
std::shared_ptr<Element[]> Pack(const From* weights, size_t outputs, size_t inputs, bool bf16,
                                const Convert& convert) {
  const size_t panels = (outputs + kOrderedPanel - 1) / kOrderedPanel;
  std::shared_ptr<Element[]> packed = Allocate<Element>(panels * inputs * kOrderedPanel);
  // Several inputs at a time, of which all outputs go to lines that stay near.
  constexpr size_t kRun = 32;
  for (size_t panel = 0; panel < panels; ++panel) {
    Element* to = packed.get() + panel * inputs * kOrderedPanel;
    for (size_t first = 0; first < inputs; first += kRun) {
      const size_t end = std::min(first + kRun, inputs);
      for (int column = 0; column < kOrderedPanel; ++column) {
        const size_t output = panel * kOrderedPanel + static_cast<size_t>(column);
        const auto place = static_cast<size_t>(OrderedPlace(column, bf16));
        for (size_t k = first; k < end; ++k) {
          to[k * kOrderedPanel + place] =
              output < outputs ? convert(weights[output * inputs + k]) : Element{};
        }
      }
    }
  }
  return packed;
}

}  // namespace

OrderedWeights::OrderedWeights(const float* weights, int outputs, int inputs)
    : outputs_(outputs), inputs_(inputs) {
  KV_CHECK(outputs >= 1 && inputs >= 1);
  const auto count = static_cast<size_t>(outputs);
  const auto width = static_cast<size_t>(inputs);
  if (AllBf16(weights, count * width)) {
    bf16_ = Pack<uint16_t>(weights, count, width, true, [](float weight) {
      return static_cast<uint16_t>(std::bit_cast<uint32_t>(weight) >> 16);
    });
  } else {
    fp32_ = Pack<float>(weights, count, width, false, [](float weight) { return weight; });
  }
}

OrderedWeights::OrderedWeights(const uint16_t* weights, int outputs, int inputs)
    : outputs_(outputs), inputs_(inputs) {
  KV_CHECK(outputs >= 1 && inputs >= 1);
  bf16_ = Pack<uint16_t>(weights, static_cast<size_t>(outputs), static_cast<size_t>(inputs), true,
                         [](uint16_t weight) { return weight; });
}

void OrderedWeights::CopyRow(int output, float* to) const {
  KV_DCHECK(output >= 0 && output < outputs_);
  const auto width = static_cast<size_t>(inputs_);
  const bool bf16 = bf16_ != nullptr;
  const int column = output % kOrderedPanel;
  size_t from = static_cast<size_t>(output / kOrderedPanel) * width * kOrderedPanel +
                static_cast<size_t>(OrderedPlace(column, bf16));
  for (size_t k = 0; k < width; ++k, from += kOrderedPanel) {
    to[k] = bf16 ? FromBf16(bf16_[from]) : fp32_[from];
  }
}

std::vector<float> OrderedWeights::RowMajor() const {
  const auto width = static_cast<size_t>(inputs_);
  std::vector<float> rows(static_cast<size_t>(outputs_) * width);
  for (int output = 0; output < outputs_; ++output) {
    CopyRow(output, rows.data() + static_cast<size_t>(output) * width);
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
  OrderedMultiply({.weights = weights,
                   .x = x,
                   .rows = rows,
                   .inputs = weights.inputs(),
                   .end_output = outputs,
                   .start = bias,
                   .out = out});
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
  OrderedMultiply({.weights = weights,
                   .x = x,
                   .rows = rows,
                   .inputs = inputs,
                   .end_output = weights.outputs(),
                   .start = out,
                   .start_stride = static_cast<size_t>(weights.outputs()),
                   .out = out});
}

}  // namespace kvant::kernels
