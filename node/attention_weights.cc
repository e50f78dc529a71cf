#include "node/attention_weights.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/float_formats.h"
#include "kernels/vector.h"
#include "node/klt.h"

namespace kvant::node {

using kernels::Matrix;

namespace {

// Numbers [from, from + count) of a weight.
void CopyWeights(const kernels::Weight& weight, size_t from, size_t count, float* to) {
  if (weight.fp32 != nullptr) {
    std::copy_n(weight.fp32 + from, count, to);
  } else {
    kernels::WidenBf16(weight.bf16 + from, to, count);
  }
}

}  // namespace

AttentionWeights::AttentionWeights(const Model* model, uint64_t seed)
    : model_(*model),
      config_(model->config()),
      state_(config_.StateShape(1)),
      width_(StateWidth(config_)),
      key_width_(state_.keys.kv_heads * state_.keys.head_dim),
      random_(seed),
      sums_(static_cast<size_t>(config_.layers), Matrix(width_, width_)) {
  MakeValueMetrics();
  Begin();
}

void AttentionWeights::Begin() {
  keys_.assign(sums_.size(), {});
  values_.assign(sums_.size(), {});
}

void AttentionWeights::AddState(int layer, const float* keys, const float* values) {
  const auto l = static_cast<size_t>(layer);
  keys_[l].insert(keys_[l].end(), keys, keys + kBlockTokens * key_width_);
  values_[l].insert(values_[l].end(), values, values + kBlockTokens * (width_ - key_width_));
}

void AttentionWeights::MakeValueMetrics() {
  const int heads = config_.q_heads;
  metrics_.resize(static_cast<size_t>(config_.layers));
  for (int layer = 0; layer < config_.layers; ++layer) {
    const LayerWeights& weights = model_.layer(layer);
    const kernels::Weight& output = weights.output;
    const int out_dim = config_.value_dim();
    const auto in = static_cast<size_t>(output.in_features);
    std::vector<Matrix> of(static_cast<size_t>(heads), Matrix(out_dim, out_dim));
    std::vector<float> all(static_cast<size_t>(output.out_features) * in);
    for (int i = 0; i < output.out_features; ++i) {
      float* to = all.data() + static_cast<size_t>(i) * in;
      CopyWeights(output, static_cast<size_t>(i) * in, in, to);
      if (weights.post_attention_norm != nullptr) {
        for (size_t k = 0; k < in; ++k) to[k] *= weights.post_attention_norm[i];
      }
    }
    std::vector<float> part(static_cast<size_t>(output.out_features) *
                            static_cast<size_t>(out_dim));
    for (int head = 0; head < heads; ++head) {
      for (int i = 0; i < output.out_features; ++i) {
        std::copy_n(all.data() + static_cast<size_t>(i) * in + static_cast<size_t>(head * out_dim),
                    out_dim, part.data() + static_cast<ptrdiff_t>(i) * out_dim);
      }
      kernels::AddProducts(part.data(), part.data(), output.out_features, out_dim, out_dim,
                           &of[static_cast<size_t>(head)]);
    }
    if (config_.latent) {
      // What is summed are latents, from which a head's value is made.
      for (int head = 0; head < heads; ++head) {
        const kernels::Weight& up = weights.latent.value_up[static_cast<size_t>(head)];
        Matrix made(up.out_features, up.in_features);
        std::vector<float> wide(made.values.size());
        CopyWeights(up, 0, wide.size(), wide.data());
        made.values.assign(wide.begin(), wide.end());
        const Matrix half = kernels::Product(of[static_cast<size_t>(head)], made);
        Matrix whole(up.in_features, up.in_features);
        for (int k = 0; k < up.out_features; ++k) {
          for (int i = 0; i < up.in_features; ++i) {
            for (int j = 0; j < up.in_features; ++j)
              whole.At(i, j) += made.At(k, i) * half.At(k, j);
          }
        }
        of[static_cast<size_t>(head)] = std::move(whole);
      }
    }
    metrics_[static_cast<size_t>(layer)] = std::move(of);
  }
}

// What the queries of one block feel of errors in what they attend. An error e in a key changes
// what a head sums by p (q . e) (v - o): p the attention, v the value, o what it sums; an error in
// a value by p e. Squares are those of the metric, and of the first by its mean over all
// directions.
void AttentionWeights::AddQueries(int layer, int position, const float* queries) {
  const auto l = static_cast<size_t>(layer);
  const int own_dim = state_.keys.head_dim;
  const int key_dim = kernels::KeyDim(state_);
  const int value_dim = state_.values.head_dim;
  const int value_width = width_ - key_width_;
  const int group = config_.q_heads / state_.values.kv_heads;
  const int end = position + kBlockTokens;
  const int first = config_.FirstVisible(layer, position);
  const int count = end - first;
  std::vector<float> keys(static_cast<size_t>(count * key_dim));
  std::vector<float> values(static_cast<size_t>(count * value_dim));
  std::vector<float> turned_values(values.size());  // [value_dim][count]
  std::vector<float> value_squares(static_cast<size_t>(count));
  std::vector<float> q(static_cast<size_t>(kBlockTokens * key_dim));
  std::vector<float> p(static_cast<size_t>(kBlockTokens * count));
  std::vector<float> sums(static_cast<size_t>(kBlockTokens * value_dim));
  std::vector<float> meets(p.size());  // v . o
  std::vector<float> felt(static_cast<size_t>(count));
  for (int kv = 0; kv < state_.values.kv_heads; ++kv) {
    for (int j = 0; j < count; ++j) {
      const float* value =
          values_[l].data() + static_cast<ptrdiff_t>(first + j) * value_width + kv * value_dim;
      float* key = keys.data() + static_cast<ptrdiff_t>(j) * key_dim;
      key = std::copy_n(
          keys_[l].data() + static_cast<ptrdiff_t>(first + j) * key_width_ + kv * own_dim, own_dim,
          key);
      if (state_.latent) std::copy_n(value, value_dim, key);
      std::copy_n(value, value_dim, values.data() + static_cast<ptrdiff_t>(j) * value_dim);
      float square = 0;
      for (int c = 0; c < value_dim; ++c) {
        square += value[c] * value[c];
        turned_values[static_cast<size_t>(c * count + j)] = value[c];
      }
      value_squares[static_cast<size_t>(j)] = square;
    }
    // Where a query's channels meet a row's.
    const auto place = [&](int c) {
      return c < own_dim ? kv * own_dim + c : key_width_ + kv * value_dim + c - own_dim;
    };
    std::vector<float> samples;
    for (int head = kv * group; head < (kv + 1) * group; ++head) {
      for (int row = 0; row < kBlockTokens; ++row) {
        std::copy_n(queries + static_cast<ptrdiff_t>(row * config_.q_heads + head) * key_dim,
                    key_dim, q.data() + static_cast<ptrdiff_t>(row) * key_dim);
      }
      kernels::Multiply(q.data(), kBlockTokens, key_dim, keys.data(), count, false, p.data());
      const auto scale = static_cast<float>(config_.attention_scale);
      for (int row = 0; row < kBlockTokens; ++row) {
        float* of_row = p.data() + static_cast<ptrdiff_t>(row) * count;
        const int from = config_.FirstVisible(layer, position + row) - first;
        const int to = position + row + 1 - first;
        const float max = *std::max_element(of_row + from, of_row + to);
        float total = 0;
        for (int j = 0; j < count; ++j) {
          of_row[j] = j < from || j >= to ? 0 : std::exp((of_row[j] - max) * scale);
          total += of_row[j];
        }
        for (int j = from; j < to; ++j) of_row[j] /= total;
      }
      kernels::Multiply(p.data(), kBlockTokens, count, turned_values.data(), value_dim, false,
                        sums.data());
      kernels::Multiply(sums.data(), kBlockTokens, value_dim, values.data(), count, false,
                        meets.data());
      const Matrix& metric = metrics_[l][static_cast<size_t>(head)];
      double trace = 0;
      for (int c = 0; c < value_dim; ++c) trace += metric.At(c, c);
      double squares = 0;
      const int sinks_end = kKltSinks - first;
      for (int row = 0; row < kBlockTokens; ++row) {
        const float* of_row = p.data() + static_cast<ptrdiff_t>(row) * count;
        const float* sum = sums.data() + static_cast<ptrdiff_t>(row) * value_dim;
        float sum_square = 0;
        for (int c = 0; c < value_dim; ++c) sum_square += sum[c] * sum[c];
        double felt_total = 0;
        for (int j = 0; j < count; ++j) {
          // Sinks are coded finer.
          const float square = j < sinks_end ? 0 : of_row[j] * of_row[j];
          const float away = value_squares[static_cast<size_t>(j)] + sum_square -
                             2 * meets[static_cast<size_t>(row * count + j)];
          squares += static_cast<double>(square);
          felt[static_cast<size_t>(j)] = square * std::max(away, 0.0F);
          felt_total += static_cast<double>(felt[static_cast<size_t>(j)]);
        }
        if (!(felt_total > 0)) continue;
        double left = random_.Unit() * felt_total;
        int j = 0;
        while (j + 1 < count && (left -= static_cast<double>(felt[static_cast<size_t>(j)])) > 0)
          ++j;
        std::vector<float> sample(q.begin() + static_cast<ptrdiff_t>(row) * key_dim,
                                  q.begin() + static_cast<ptrdiff_t>(row + 1) * key_dim);
        model_.rope(layer).Undo(sample.data(), 1, static_cast<size_t>(own_dim), first + j);
        const auto by =
            static_cast<float>(std::sqrt(felt_total * trace / value_dim) * config_.attention_scale);
        for (float& x : sample) samples.push_back(x * by);
      }
      const int at = key_width_ + kv * value_dim;
      for (int a = 0; a < value_dim; ++a) {
        for (int b = 0; b < value_dim; ++b)
          sums_[l].At(at + a, at + b) += squares * metric.At(a, b);
      }
    }
    Matrix moments(key_dim, key_dim);
    kernels::AddProducts(samples.data(), samples.data(), static_cast<int>(samples.size()) / key_dim,
                         key_dim, key_dim, &moments);
    for (int a = 0; a < key_dim; ++a) {
      for (int b = 0; b < key_dim; ++b) sums_[l].At(place(a), place(b)) += moments.At(a, b);
    }
  }
}

}  // namespace kvant::node
