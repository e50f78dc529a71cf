// Products of fp32 rows with a matrix of weights, out = x W^T, whose bits are the same on every
// machine. For a model's dense layers: what one machine stored, another continues. And for
// decoders: what they decode may be refined by differences that were taken elsewhere.
//
// Each output is the sum over the inputs k = 0, 1, 2, ... of fma(x[r][k], w[n][k], sum), each
// rounded once, in one accumulator. Speed comes from other outputs and rows beside it alone, never
// from a second sum over k, so that an output depends neither on the instruction set, nor on the
// other rows and how many there are, nor on the thread. Subnormal numbers count as such.
// REQUIRES: no NaN goes in or comes out (which of its bits remain differs), and the thread neither
// flushes subnormals nor rounds otherwise than to nearest.
//
// Weights of 8 bits are codes, whole numbers of at most kMostCode times the scale of their output.
// A row becomes whole numbers as well, of 15 bits, times a unit of its own, so that products and
// sums are exact over 512 inputs at a time (quad_dot.h); these sums are added in ascending order,
// and what comes out is multiplied by the unit and then by the scale. x is off by at most half a
// unit, 1/32512 of the row's largest, that is less than the weights in all but a few sums; a row
// whose largest is below 2^-100 counts as zeros. The bits depend on as little as those above.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace kvant::kernels {

// Outputs of a panel, in which weights are stored: [panel][k][kOrderedPanel]. Zeros fill the last
// panel.
inline constexpr int kOrderedPanel = 32;

// Where output `column` of a panel stands among its weights of one k. In bf16 outputs i and i + 16
// share a 32-bit word, the first in its lower half: a shift and a mask widen a register of pairs
// into two registers of floats, whatever its width.
constexpr int OrderedPlace(int column, bool bf16) {
  constexpr int kHalf = kOrderedPanel / 2;
  return bf16 ? column % kHalf * 2 + column / kHalf : column;
}

// What weights are kept as.
//   kExact  bf16 where all of a matrix are bf16 numbers, which changes no bit of a product, else
//   fp32 kBf16   16 bits, rounded to nearest even kInt8   8 bits: codes of the scale at which an
//   output's largest weight has the code kMostCode,
//           rounded to nearest even, so that a weight is off by half a scale at most. Of an output
//           with weights that are not finite, all that is made is not finite.
enum class WeightForm : uint8_t { kExact, kBf16, kInt8 };
inline constexpr int kMostCode = 127;
inline constexpr int kCodeOfZero = 128;

// A weight matrix in panels. Value; copies share the weights. Immutable, Thread-safe.
class OrderedWeights {
 public:
  OrderedWeights() = default;
  // weights: [outputs][inputs], row-major, not needed afterwards. REQUIRES: outputs, inputs >= 1.
  OrderedWeights(const float* weights, int outputs, int inputs,
                 WeightForm form = WeightForm::kExact);
  // The same of bf16 numbers.
  OrderedWeights(const uint16_t* weights, int outputs, int inputs,
                 WeightForm form = WeightForm::kExact);

  int outputs() const { return outputs_; }
  int inputs() const { return inputs_; }
  // Whether they are kept as they were given.
  bool exact() const { return exact_; }
  // Of memory that they take.
  size_t bytes() const;
  // to[inputs] = the weights of one output, as they are kept.
  void CopyRow(int output, float* to) const;
  // [outputs][inputs], row-major, as they are kept.
  std::vector<float> RowMajor() const;
  // Exactly one of them is set, unless made by default.
  const uint16_t* bf16() const { return bf16_.get(); }
  const float* fp32() const { return fp32_.get(); }
  // [panel][quads()][kOrderedPanel][4 inputs], each code with kCodeOfZero added.
  const uint8_t* codes() const { return codes_.get(); }
  // Of codes(), each output's, then zeros for the rest of the last panel.
  const float* scales() const { return scales_.get(); }
  int quads() const { return (inputs_ + 3) / 4; }

 private:
  size_t padded() const;  // outputs of all panels
  size_t CodeAt(size_t output, size_t input) const;
  template <typename From, typename Widen>
  void Quantize(const From* weights, const Widen& widen);

  int outputs_ = 0;
  int inputs_ = 0;
  bool exact_ = true;
  std::shared_ptr<uint16_t[]> bf16_;
  std::shared_ptr<float[]> fp32_;
  std::shared_ptr<uint8_t[]> codes_;
  std::shared_ptr<float[]> scales_;
};

// out[rows][outputs] = x[rows][inputs] * W^T, begun at bias[outputs] or, with nullptr, at 0. What a
// sum begins at would be scaled with it: weights of 8 bits have no bias, and none of the products
// below that add.
// REQUIRES: out overlaps neither x nor bias.
void OrderedMultiply(const OrderedWeights& weights, const float* x, int rows, const float* bias,
                     float* out);
// The first `outputs` of each row alone; the others of out[rows][weights.outputs()] stay as they
// are.
void OrderedMultiply(const OrderedWeights& weights, const float* x, int rows, const float* bias,
                     int outputs, float* out);
// The same, begun at what out holds.
void OrderedMultiplyAdd(const OrderedWeights& weights, const float* x, int rows, float* out);
// Rows of which most numbers are 0: those that are not. Value; what a row holds is appended before
// the next one begins.
class SparseRows {
 public:
  void Clear() {
    begin_.assign(1, 0);
    inputs_.clear();
    factors_.clear();
  }
  // To the row under work. REQUIRES: inputs ascend within a row.
  void Add(size_t input, float factor) {
    inputs_.push_back(static_cast<uint16_t>(input));
    factors_.push_back(factor);
  }
  // The same of several, which the caller writes to where this says.
  void Append(size_t count, uint16_t** inputs, float** factors) {
    const size_t held = inputs_.size();
    inputs_.resize(held + count);
    factors_.resize(held + count);
    *inputs = inputs_.data() + held;
    *factors = factors_.data() + held;
  }
  // The first `count` terms of another one's row, whose inputs are as many more here.
  void AddFrom(const SparseRows& other, size_t row, size_t count, size_t more) {
    const size_t from = other.begin_[row];
    uint16_t* inputs = nullptr;
    float* factors = nullptr;
    Append(count, &inputs, &factors);
    for (size_t t = 0; t < count; ++t)
      inputs[t] = static_cast<uint16_t>(other.inputs_[from + t] + more);
    std::copy_n(other.factors_.data() + from, count, factors);
  }
  void EndRow() { begin_.push_back(static_cast<uint32_t>(inputs_.size())); }

  size_t rows() const { return begin_.size() - 1; }
  // All rows' terms; those of row r are [begin()[r], begin()[r + 1]).
  size_t terms() const { return inputs_.size(); }
  size_t terms_of(size_t row) const { return begin_[row + 1] - begin_[row]; }
  const uint32_t* begin() const { return begin_.data(); }
  const uint16_t* inputs() const { return inputs_.data(); }
  const float* factors() const { return factors_.data(); }

 private:
  std::vector<uint32_t> begin_ = {0};
  std::vector<uint16_t> inputs_;
  std::vector<float> factors_;
};
inline constexpr int kMostSparseInputs = 1 << 16;
// Terms of rows as an implementation takes them: of row r those of [first[r], end[r]).
struct SparseTerms {
  explicit SparseTerms(const SparseRows& x)
      : rows(x.rows()),
        first(x.begin()),
        end(x.begin() + 1),
        inputs(x.inputs()),
        factors(x.factors()) {}
  size_t rows;
  const uint32_t* first;
  const uint32_t* end;
  const uint16_t* inputs;
  const float* factors;
  // [rows], the outputs that each row begins at; nullptr: what out holds.
  const float* const* start = nullptr;
  // Weights of the inputs [near_first, near_end) are fetched before their use: enough terms have
  // them.
  size_t near_first = 0;
  size_t near_end = 0;
};

// out[x.rows()][outputs] += x W^T, as OrderedMultiplyAdd of rows with zeros in all other places, at
// the cost of the other terms alone. Only where all of a sum's terms are zeros, the sign of a zero
// that it begins at may remain, and does so on every machine or on none.
// REQUIRES: out does not overlap x; x's inputs are the weights'.
void OrderedMultiplyAdd(const OrderedWeights& weights, const SparseRows& x, float* out);
// The same, with row r begun at start[r][outputs].
// REQUIRES: each start[r] is row r of out, or overlaps none of it.
void OrderedMultiplyAdd(const OrderedWeights& weights, const SparseRows& x,
                        const float* const* start, float* out);

// One product as an implementation takes it.
struct OrderedProduct {
  const OrderedWeights& weights;
  const float* x = nullptr;  // [rows][inputs]
  int rows = 0;
  int first_input = 0;   // of the weights', x's first
  int inputs = 0;        // of the weights', from there on
  int first_output = 0;  // that is set; a multiple of kOrderedPanel
  int end_output = 0;    // behind the last that is set
  // Row r begins at start[r * start_stride], with a stride of 0 all of them at the same; nullptr
  // and 0: at zeros. May be `out`.
  const float* start = nullptr;
  size_t start_stride = 0;
  // nullptr, or where each row begins instead, [rows]: at row r of out, or what overlaps none of
  // it. Then start is `out`.
  const float* const* starts = nullptr;
  float* out = nullptr;  // [rows][weights.outputs()]
};
void OrderedMultiply(const OrderedProduct& product);

// Rows as whole numbers.
struct CodedRows {
  int16_t* factors = nullptr;  // [rows][stride]; of a row's inputs, then of up to 15 more
  size_t stride = 0;
  float* unit = nullptr;  // [rows], what a factor of 1 stands for
  float* sum = nullptr;   // [rows], of all of a row's factors
};
// A product with weights of 8 bits as an implementation takes it.
struct CodedProduct {
  const uint8_t* codes = nullptr;  // from the first panel that is set on
  const float* scales = nullptr;   // likewise
  int quads = 0;
  int outputs = 0;  // that are set
  CodedRows in;
  int rows = 0;
  float* out = nullptr;  // likewise, [rows][out_stride]
  size_t out_stride = 0;
};
struct Implementation;
// An OrderedMultiply with weights of 8 bits. REQUIRES: the product has no start and all inputs.
void CodedMultiply(const Implementation& kernels, const OrderedProduct& product);

}  // namespace kvant::kernels
