#include "node/aqua_coder.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/check.h"
#include "kernels/blas.h"
#include "kernels/dense_algebra.h"
#include "kernels/float_formats.h"
#include "node/kvtc_pack.h"

namespace kvant::node {
namespace {

constexpr int kFirstLayerBits = 4;
constexpr int kSinks = kKvtcSinks;
constexpr int kWindow = kKvtcWindow;
// Of the calibration, evenly; predictors have at most a few thousand inputs.
constexpr size_t kRowsOfPiece = 256;
constexpr size_t kFewestRows = 256;
constexpr double kRidge = 1e-4;

// Positive levels of the quantizer of least squared error of a unit Gaussian (Max, 1960).
constexpr float kLevels2[] = {0.4528F, 1.5104F};
constexpr float kLevels3[] = {0.2451F, 0.7560F, 1.3439F, 2.1519F};
constexpr float kLevels4[] = {0.1284F, 0.3880F, 0.6568F, 0.9423F,
                              1.2562F, 1.6180F, 2.0690F, 2.7326F};

std::span<const float> LevelsOf(int bits) {
  KV_CHECK(bits >= 2 && bits <= 4);
  if (bits == 2) return kLevels2;
  if (bits == 3) return kLevels3;
  return kLevels4;
}

float Half(float x) { return kernels::FromFp16(kernels::ToFp16(x)); }
size_t Size(int count) { return static_cast<size_t>(count); }

// Its own inverse. count: a power of two.
void Hadamard(float* x, size_t count) {
  for (size_t step = 1; step < count; step *= 2) {
    for (size_t i = 0; i < count; i += 2 * step) {
      for (size_t j = i; j < i + step; ++j) {
        const float a = x[j];
        const float b = x[j + step];
        x[j] = a + b;
        x[j + step] = a - b;
      }
    }
  }
  const float norm = 1.0F / std::sqrt(static_cast<float>(count));
  for (size_t i = 0; i < count; ++i) x[i] *= norm;
}

// Means of the columns of x[rows][width].
std::vector<double> Means(std::span<const float> x, size_t width) {
  std::vector<double> means(width);
  const size_t rows = width == 0 ? 0 : x.size() / width;
  for (size_t i = 0; i < x.size(); ++i) means[i % width] += x[i] / static_cast<double>(rows);
  return means;
}

std::vector<float> Centred(std::span<const float> x, const std::vector<double>& means) {
  std::vector<float> centred(x.begin(), x.end());
  for (size_t i = 0; i < x.size(); ++i) {
    centred[i] -= static_cast<float>(means[i % means.size()]);
  }
  return centred;
}

// Columns [from, from + count) of rows of `width`.
std::vector<float> Columns(std::span<const float> rows, size_t width, size_t from, size_t count) {
  std::vector<float> columns;
  columns.reserve(rows.size() / width * count);
  for (size_t at = from; at < rows.size(); at += width) {
    columns.insert(columns.end(), rows.begin() + static_cast<std::ptrdiff_t>(at),
                   rows.begin() + static_cast<std::ptrdiff_t>(at + count));
  }
  return columns;
}

std::vector<float> SideBySide(std::span<const float> a, size_t a_width, std::span<const float> b,
                              size_t b_width) {
  std::vector<float> joined;
  joined.reserve(a.size() + b.size());
  for (size_t row = 0; row < a.size() / a_width; ++row) {
    const auto left = a.subspan(row * a_width, a_width);
    const auto right = b.subspan(row * b_width, b_width);
    joined.insert(joined.end(), left.begin(), left.end());
    joined.insert(joined.end(), right.begin(), right.end());
  }
  return joined;
}

// The predictors of all layers, and one layer after the other with them. Immutable once learnt.
struct Predictors {
  kernels::LayerShape shape;  // of one token
  int layers = 0;
  int bits = 0;
  std::vector<LinearPredictor> keys;    // [layer]
  std::vector<LinearPredictor> values;  // [layer]

  size_t key_width() const { return Size(shape.keys.kv_heads * shape.keys.head_dim); }
  size_t value_width() const { return Size(shape.values.kv_heads * shape.values.head_dim); }

  // Quantizes y[rows][out] as its residual against what x predicts, in place. Returns the bits.
  uint64_t CodeRows(const LinearPredictor& predictor, std::span<const float> x, int layer,
                    int head_dim, std::vector<float>* y) const {
    const size_t width = Size(predictor.out);
    const std::vector<float> predicted = Predict(predictor, x, static_cast<int>(y->size() / width));
    uint64_t stored = 0;
    for (size_t at = 0; at < y->size(); at += width) {
      const std::span<float> row = std::span(*y).subspan(at, width);
      for (size_t i = 0; i < width; ++i) row[i] -= predicted[at + i];
      stored += QuantizeResidual(layer == 0 ? kFirstLayerBits : bits, head_dim, row);
      for (size_t i = 0; i < width; ++i) row[i] += predicted[at + i];
    }
    return stored;
  }

  // keys[rows][layers * key_width], values likewise: become what a reader has of them.
  // predictor_of(of_keys, layer, x, y) gives the one that predicts y[rows][out] from x[rows][in].
  template <typename PredictorOf>
  uint64_t Run(const PredictorOf& predictor_of, std::vector<float>* all_keys,
               std::vector<float>* all_values) const {
    std::vector<float> below_keys;
    std::vector<float> below_values;
    uint64_t stored = 0;
    const size_t rows = all_keys->size() / (Size(layers) * key_width());
    for (int layer = 0; layer < layers; ++layer) {
      std::vector<float> k =
          Columns(*all_keys, Size(layers) * key_width(), Size(layer) * key_width(), key_width());
      std::vector<float> v = Columns(*all_values, Size(layers) * value_width(),
                                     Size(layer) * value_width(), value_width());
      const LinearPredictor& of_keys = predictor_of(true, layer, below_keys, k);
      stored += CodeRows(of_keys, below_keys, layer, shape.keys.head_dim, &k);
      const std::vector<float> x =
          layer == 0 ? k : SideBySide(below_values, value_width(), k, key_width());
      const LinearPredictor& of_values = predictor_of(false, layer, x, v);
      stored += CodeRows(of_values, x, layer, shape.values.head_dim, &v);
      for (size_t row = 0; row < rows; ++row) {
        std::copy_n(&k[row * key_width()], key_width(),
                    &(*all_keys)[(row * Size(layers) + Size(layer)) * key_width()]);
        std::copy_n(&v[row * value_width()], value_width(),
                    &(*all_values)[(row * Size(layers) + Size(layer)) * value_width()]);
      }
      below_keys = std::move(k);
      below_values = std::move(v);
    }
    return stored;
  }

  uint64_t Code(std::vector<float>* all_keys, std::vector<float>* all_values) const {
    const auto known = [&](bool of_keys, int layer, const auto&,
                           const auto&) -> const LinearPredictor& {
      return (of_keys ? keys : values)[Size(layer)];
    };
    return Run(known, all_keys, all_values);
  }

  // Each is fitted just before it is used, on what those before it decoded.
  Status Learn(std::vector<float>* all_keys, std::vector<float>* all_values) {
    Status failed;
    const size_t rows = all_keys->size() / (Size(layers) * key_width());
    const auto fitted = [&](bool of_keys, int, const auto& x,
                            const auto& y) -> const LinearPredictor& {
      const auto in = static_cast<int>(x.size() / rows);
      const auto out = static_cast<int>(y.size() / rows);
      Result<LinearPredictor> predictor = FitPredictor(x, in, y, out);
      if (!predictor.ok()) {
        failed = predictor.status();
        predictor = LinearPredictor{0, out, {}, std::vector<float>(Size(out))};
      }
      return (of_keys ? keys : values).emplace_back(*std::move(predictor));
    };
    Run(fitted, all_keys, all_values);
    return failed;
  }
};

class AquaCoder final : public StateCoder {
 public:
  AquaCoder(std::string name, const Model* model, Predictors predictors)
      : name_(std::move(name)), model_(*model), predictors_(std::move(predictors)) {}

  std::string_view name() const override { return name_; }
  bool blockwise() const override { return false; }
  uint64_t table_bytes() const override {
    uint64_t bytes = 0;
    for (const auto* of : {&predictors_.keys, &predictors_.values}) {
      for (const LinearPredictor& p : *of) bytes += 2 * (p.weights.size() + p.bias.size());
    }
    return bytes;
  }

  void Code(const PrefixState& exact, const Sink& sink) const override {
    const int first = std::min(kSinks, exact.tokens());
    const int end = std::max(first, exact.tokens() - kWindow);
    PrefixState decoded = exact;
    const auto round = [](float x) { return kernels::FromBf16(kernels::ToBf16(x)); };
    for (int layer = 0; layer < exact.layers(); ++layer) {
      const size_t tokens = Size(exact.tokens());
      float* keys = decoded.keys(layer);
      std::transform(keys, keys + tokens * exact.key_width(), keys, round);
      float* values = decoded.values(layer);
      std::transform(values, values + tokens * exact.value_width(), values, round);
    }
    uint64_t bits =
        16 * exact.elements() / Size(exact.tokens()) * Size(exact.tokens() - (end - first));
    if (end > first) {
      std::vector<float> keys = KvtcRows(model_, exact, true, first, end);
      std::vector<float> values = KvtcRows(model_, exact, false, first, end);
      bits += predictors_.Code(&keys, &values);
      SetKvtcRows(model_, keys, true, first, end, &decoded);
      SetKvtcRows(model_, values, false, first, end, &decoded);
    }
    sink(0, decoded, {.bits = bits});
  }

 private:
  std::string name_;
  const Model& model_;
  Predictors predictors_;
};

}  // namespace

Result<LinearPredictor> FitPredictor(std::span<const float> x, int in, std::span<const float> y,
                                     int out) {
  KV_CHECK(!y.empty());
  LinearPredictor predictor;
  predictor.in = in;
  predictor.out = out;
  const std::vector<double> y_means = Means(y, Size(out));
  std::vector<double> bias = y_means;
  if (in > 0) {
    const std::vector<double> x_means = Means(x, Size(in));
    const std::vector<float> from = Centred(x, x_means);
    const std::vector<float> to = Centred(y, y_means);
    const int rows = static_cast<int>(y.size() / Size(out));
    kernels::Matrix squares(in, in);
    kernels::Matrix products(out, in);
    kernels::AddProducts(from.data(), from.data(), rows, in, in, &squares);
    kernels::AddProducts(to.data(), from.data(), rows, out, in, &products);
    double trace = 0;
    for (int i = 0; i < in; ++i) trace += squares.At(i, i);
    // Also keeps inputs that never change from dividing by 0.
    for (int i = 0; i < in; ++i) squares.At(i, i) += kRidge * trace / in + 1e-30;
    KV_ASSIGN_OR_RETURN(const kernels::Matrix weights,
                        kernels::SolvePositive(std::move(squares), std::move(products)));
    for (int i = 0; i < in; ++i) {
      for (int o = 0; o < out; ++o) {
        predictor.weights.push_back(Half(static_cast<float>(weights.At(o, i))));
        bias[Size(o)] -= x_means[Size(i)] * predictor.weights.back();
      }
    }
  }
  for (const double b : bias) predictor.bias.push_back(Half(static_cast<float>(b)));
  return predictor;
}

std::vector<float> Predict(const LinearPredictor& predictor, std::span<const float> x, int rows) {
  std::vector<float> y(Size(rows) * Size(predictor.out));
  for (size_t i = 0; i < y.size(); ++i) y[i] = predictor.bias[i % Size(predictor.out)];
  if (predictor.in == 0 || rows == 0) return y;
  kernels::LoadedSgemm()(kernels::kBlasRowMajor, kernels::kBlasNoTranspose,
                         kernels::kBlasNoTranspose, rows, predictor.out, predictor.in, 1.0F,
                         x.data(), predictor.in, predictor.weights.data(), predictor.out, 1.0F,
                         y.data(), predictor.out);
  return y;
}

uint64_t QuantizeResidual(int bits, int head_dim, std::span<float> x) {
  const std::span<const float> levels = LevelsOf(bits);
  // Heads that are no power of two are turned in parts that are.
  const size_t turned = Size(head_dim & -head_dim);
  KV_CHECK(x.size() % turned == 0);
  double squares = 0;
  for (const float value : x) squares += static_cast<double>(value) * value;
  const float scale = Half(static_cast<float>(std::sqrt(squares / static_cast<double>(x.size()))));
  for (size_t at = 0; at < x.size(); at += turned) {
    Hadamard(&x[at], turned);
    for (size_t i = at; i < at + turned; ++i) {
      const float magnitude = scale > 0 ? std::abs(x[i]) / scale : 0.0F;
      const auto nearest = std::min_element(levels.begin(), levels.end(), [&](float a, float b) {
        return std::abs(a - magnitude) < std::abs(b - magnitude);
      });
      x[i] = std::copysign(*nearest * scale, x[i]);
    }
    Hadamard(&x[at], turned);
  }
  return 16 + x.size() * static_cast<uint64_t>(bits);
}

Result<AquaSample> SampleForAqua(const Model& model, const Calibration& calibration) {
  AquaSample sample;
  size_t rows = 0;
  KV_RETURN_IF_ERROR(calibration([&](const PrefixState& state) {
    const int end = state.tokens() - kWindow;
    if (end <= kSinks) return;
    const std::vector<float> k = KvtcRows(model, state, true, kSinks, end);
    const std::vector<float> v = KvtcRows(model, state, false, kSinks, end);
    const size_t count = Size(end - kSinks);
    const size_t taken = std::min(count, kRowsOfPiece);
    for (size_t i = 0; i < taken; ++i) {
      const size_t row = i * count / taken;
      const auto take = [&](const std::vector<float>& from, std::vector<float>* to) {
        const size_t width = from.size() / count;
        to->insert(to->end(), from.begin() + static_cast<std::ptrdiff_t>(row * width),
                   from.begin() + static_cast<std::ptrdiff_t>((row + 1) * width));
      };
      take(k, &sample.keys);
      take(v, &sample.values);
    }
    rows += taken;
  }));
  if (rows < kFewestRows) {
    return InvalidArgument(
        "the calibration text gives {} rows, and predictors need {} at least: give a longer one",
        rows, kFewestRows);
  }
  return sample;
}

Result<std::unique_ptr<StateCoder>> MakeAquaCoder(std::string name, const Model* model,
                                                  AquaSample sample, int bits) {
  Predictors predictors;
  predictors.shape = model->config().StateShape(1);
  predictors.layers = model->config().layers;
  predictors.bits = bits;
  KV_RETURN_IF_ERROR(predictors.Learn(&sample.keys, &sample.values));
  return std::unique_ptr<StateCoder>(
      std::make_unique<AquaCoder>(std::move(name), model, std::move(predictors)));
}

}  // namespace kvant::node
