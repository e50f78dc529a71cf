#include "kernels/ordered_gemm.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <new>

#include "base/check.h"
#include "kernels/float_formats.h"
#include "kernels/implementation.h"
#include "kernels/tile_format.h"

namespace kvant::kernels {
namespace {

// An input of which more than this share of the rows is not 0 is faster with its zeros.
constexpr double kDense = 0.55;
// Inputs that must be saved for two products to be worth it.
constexpr double kWorthwhile = 4;
// Terms to an input from which on its weights are worth fetching ahead.
constexpr double kFetched = 2;

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

OrderedWeights::OrderedWeights(const float* weights, int outputs, int inputs, WeightForm form)
    : outputs_(outputs), inputs_(inputs) {
  KV_CHECK(outputs >= 1 && inputs >= 1);
  if (form == WeightForm::kInt8) {
    Quantize(weights, [](float weight) { return weight; });
    return;
  }
  const auto count = static_cast<size_t>(outputs);
  const auto width = static_cast<size_t>(inputs);
  const bool all_bf16 = AllBf16(weights, count * width);
  if (all_bf16 || form == WeightForm::kBf16) {
    exact_ = all_bf16;
    bf16_ =
        Pack<uint16_t>(weights, count, width, true, [](float weight) { return ToBf16(weight); });
  } else {
    fp32_ = Pack<float>(weights, count, width, false, [](float weight) { return weight; });
  }
}

OrderedWeights::OrderedWeights(const uint16_t* weights, int outputs, int inputs, WeightForm form)
    : outputs_(outputs), inputs_(inputs) {
  KV_CHECK(outputs >= 1 && inputs >= 1);
  if (form == WeightForm::kInt8) {
    Quantize(weights, FromBf16);
    return;
  }
  bf16_ = Pack<uint16_t>(weights, static_cast<size_t>(outputs), static_cast<size_t>(inputs), true,
                         [](uint16_t weight) { return weight; });
}

size_t OrderedWeights::CodeAt(size_t output, size_t input) const {
  const size_t quad = output / kOrderedPanel * static_cast<size_t>(quads()) + input / kQuad;
  return (quad * kOrderedPanel + output % kOrderedPanel) * kQuad + input % kQuad;
}

template <typename From, typename Widen>
void OrderedWeights::Quantize(const From* weights, const Widen& widen) {
  exact_ = false;
  const auto width = static_cast<size_t>(inputs_);
  const size_t count = padded() * static_cast<size_t>(quads()) * kQuad;
  scales_ = Allocate<float>(padded());
  codes_ = Allocate<uint8_t>(count);
  std::fill_n(scales_.get(), padded(), 0.0F);
  std::fill_n(codes_.get(), count, static_cast<uint8_t>(kCodeOfZero));
  for (size_t output = 0; output < static_cast<size_t>(outputs_); ++output) {
    const From* row = weights + output * width;
    // Of magnitudes the bits have the same order, in which NaN comes last.
    uint32_t most = 0;
    for (size_t k = 0; k < width; ++k)
      most = std::max(most, std::bit_cast<uint32_t>(widen(row[k])) & 0x7FFFFFFFU);
    const float scale = std::bit_cast<float>(most) / static_cast<float>(kMostCode);
    scales_[output] = scale;
    if (scale == 0.0F || !std::isfinite(scale)) continue;
    for (size_t k = 0; k < width; ++k) {
      // A subnormal scale may be less than a code's share.
      const float code = std::clamp<float>(widen(row[k]) / scale, -kMostCode, kMostCode);
      codes_[CodeAt(output, k)] = static_cast<uint8_t>(kCodeOfZero + std::lrint(code));
    }
  }
}

size_t OrderedWeights::padded() const {
  const auto panel = static_cast<size_t>(kOrderedPanel);
  return (static_cast<size_t>(outputs_) + panel - 1) / panel * panel;
}

size_t OrderedWeights::bytes() const {
  if (codes_ != nullptr) return padded() * (static_cast<size_t>(quads()) * kQuad + sizeof(float));
  return padded() * static_cast<size_t>(inputs_) *
         (bf16_ != nullptr ? sizeof(uint16_t) : sizeof(float));
}

void OrderedWeights::CopyRow(int output, float* to) const {
  KV_DCHECK(output >= 0 && output < outputs_);
  const auto width = static_cast<size_t>(inputs_);
  if (codes_ != nullptr) {
    const float scale = scales_[static_cast<size_t>(output)];
    for (size_t k = 0; k < width; ++k) {
      const int code = codes_[CodeAt(static_cast<size_t>(output), k)] - kCodeOfZero;
      to[k] = scale * static_cast<float>(code);
    }
    return;
  }
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
  if (product.weights.codes() != nullptr) {
    CodedMultiply(ActiveImplementation(), product);
  } else {
    ActiveImplementation().ordered_multiply(product);
  }
}

void CodedMultiply(const Implementation& kernels, const OrderedProduct& product) {
  const OrderedWeights& weights = product.weights;
  KV_CHECK(product.start == nullptr && product.starts == nullptr && product.first_input == 0 &&
           product.inputs == weights.inputs());
  const auto rows = static_cast<size_t>(product.rows);
  // Factors are written 16 at a time.
  const size_t stride = (static_cast<size_t>(product.inputs) + 15) / 16 * 16;
  thread_local std::vector<int16_t> factors;  // [rows][stride]
  thread_local std::vector<float> of_rows;    // units, then sums
  factors.resize(std::max(factors.size(), rows * stride));
  of_rows.resize(std::max(of_rows.size(), 2 * rows));
  const CodedRows in{factors.data(), stride, of_rows.data(), of_rows.data() + rows};
  kernels.factor_rows(product.x, product.rows, product.inputs, in);
  const auto first = static_cast<size_t>(product.first_output);
  const size_t row_codes = static_cast<size_t>(weights.quads()) * kQuad;
  kernels.coded_multiply({.codes = weights.codes() + first * row_codes,
                          .scales = weights.scales() + first,
                          .quads = weights.quads(),
                          .outputs = product.end_output - product.first_output,
                          .in = in,
                          .rows = product.rows,
                          .out = product.out + first,
                          .out_stride = static_cast<size_t>(weights.outputs())});
}

void OrderedMultiplyAdd(const OrderedWeights& weights, const SparseRows& x, float* out) {
  OrderedMultiplyAdd(weights, x, nullptr, out);
}

void OrderedMultiplyAdd(const OrderedWeights& weights, const SparseRows& x,
                        const float* const* start, float* out) {
  KV_CHECK(weights.codes() == nullptr);
  thread_local std::vector<uint32_t> terms_of;  // [inputs]
  terms_of.assign(static_cast<size_t>(weights.inputs()), 0);
  for (size_t t = 0; t < x.terms(); ++t) ++terms_of[x.inputs()[t]];
  // Inputs come in order, so between those that are multiplied without zeros may be some that are
  // with them, because most rows have them: the run of them that saves most time.
  size_t dense = 0;
  size_t dense_end = 0;
  double most = 0;
  double saved = 0;
  size_t from = 0;
  size_t begin = terms_of.size();  // the first one that a row has
  size_t end = 0;                  // behind the last one
  for (size_t input = 0; input < terms_of.size(); ++input) {
    if (terms_of[input] != 0) {
      begin = std::min(begin, input);
      end = input + 1;
    }
    if (saved <= 0) {
      saved = 0;
      from = input;
    }
    saved += terms_of[input] - kDense * static_cast<double>(x.rows());
    if (saved <= most) continue;
    most = saved;
    dense = from;
    dense_end = input + 1;
  }
  const bool worthwhile = most >= kWorthwhile * static_cast<double>(x.rows());
  SparseTerms terms(x);
  terms.start = start;
  const auto add = [&](size_t count, size_t first_input, size_t end_input) {
    if (count >= kFetched * static_cast<double>(end_input - first_input)) {
      terms.near_first = first_input;
      terms.near_end = end_input;
    }
    ActiveImplementation().ordered_add_sparse(weights, terms, out);
  };
  if (!worthwhile) return add(x.terms(), 0, end);

  const size_t run = dense_end - dense;
  thread_local std::vector<float> dense_x;      // [rows][run]
  thread_local std::vector<uint32_t> in_front;  // [rows], the first term that is in it or behind it
  thread_local std::vector<uint32_t> behind;    // [rows], the first term that is behind it
  dense_x.resize(std::max(dense_x.size(), x.rows() * run));
  in_front.resize(x.rows());
  behind.resize(x.rows());
  size_t front_terms = 0;
  size_t dense_terms = 0;
  for (size_t r = 0; r < x.rows(); ++r) {
    uint32_t t = x.begin()[r];
    while (t < x.begin()[r + 1] && x.inputs()[t] < dense) ++t;
    in_front[r] = t;
    front_terms += t - x.begin()[r];
    float* const row = dense_x.data() + r * run;
    size_t filled = 0;
    for (; t < x.begin()[r + 1] && x.inputs()[t] < dense_end; ++t) {
      const size_t at = x.inputs()[t] - dense;
      while (filled < at) row[filled++] = 0;
      row[filled++] = x.factors()[t];
    }
    std::fill(row + filled, row + run, 0.0F);
    behind[r] = t;
    dense_terms += t - in_front[r];
  }
  if (front_terms > 0) {
    terms.end = in_front.data();
    add(front_terms, begin, dense);
    start = nullptr;
  }
  OrderedMultiply({.weights = weights,
                   .x = dense_x.data(),
                   .rows = static_cast<int>(x.rows()),
                   .first_input = static_cast<int>(dense),
                   .inputs = static_cast<int>(run),
                   .end_output = weights.outputs(),
                   .start = out,
                   .start_stride = static_cast<size_t>(weights.outputs()),
                   .starts = start,
                   .out = out});
  if (dense_end == end) return;
  terms = SparseTerms(x);
  terms.first = behind.data();
  add(x.terms() - front_terms - dense_terms, dense_end, end);
}

void OrderedMultiplyAdd(const OrderedWeights& weights, const float* x, int rows, float* out) {
  OrderedMultiply({.weights = weights,
                   .x = x,
                   .rows = rows,
                   .inputs = weights.inputs(),
                   .end_output = weights.outputs(),
                   .start = out,
                   .start_stride = static_cast<size_t>(weights.outputs()),
                   .out = out});
}

}  // namespace kvant::kernels
