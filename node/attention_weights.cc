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

constexpr int kFewestQueries = 64;  // that tell how much a token matters
// What is said of a token's importance, in that of the middle one.
constexpr double kLeastTimes = 1.0 / 16;
constexpr double kMostTimes = 1 << 14;

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
  queries_.assign(sums_.size(), {});
  importance_.assign(sums_.size(), {});
}

void AttentionWeights::AddQueries(int layer, const float* queries) {
  std::vector<float>& of_layer = queries_[static_cast<size_t>(layer)];
  of_layer.insert(
      of_layer.end(), queries,
      queries + static_cast<ptrdiff_t>(kBlockTokens) * config_.q_heads * kernels::KeyDim(state_));
}

void AttentionWeights::End() {
  for (int layer = 0; layer < config_.layers; ++layer) {
    SetImportance(layer);
    Weigh(layer);
  }
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
    const int outputs = weights.output.outputs();
    const int out_dim = config_.value_dim();
    const auto in = static_cast<size_t>(weights.output.inputs());
    std::vector<Matrix> of(static_cast<size_t>(heads), Matrix(out_dim, out_dim));
    std::vector<float> all = weights.output.RowMajor();
    if (weights.post_attention_norm != nullptr) {
      for (size_t i = 0; i < all.size(); ++i) all[i] *= weights.post_attention_norm[i / in];
    }
    std::vector<float> part(static_cast<size_t>(outputs) * static_cast<size_t>(out_dim));
    for (int head = 0; head < heads; ++head) {
      for (int i = 0; i < outputs; ++i) {
        std::copy_n(all.data() + static_cast<size_t>(i) * in + static_cast<size_t>(head * out_dim),
                    out_dim, part.data() + static_cast<ptrdiff_t>(i) * out_dim);
      }
      kernels::AddProducts(part.data(), part.data(), outputs, out_dim, out_dim,
                           &of[static_cast<size_t>(head)]);
    }
    if (config_.latent) {
      // What is summed are latents, from which a head's value is made.
      for (int head = 0; head < heads; ++head) {
        const kernels::OrderedWeights& up = weights.latent.value_up[static_cast<size_t>(head)];
        Matrix made(up.outputs(), up.inputs());
        const std::vector<float> wide = up.RowMajor();
        made.values.assign(wide.begin(), wide.end());
        const Matrix half = kernels::Product(of[static_cast<size_t>(head)], made);
        Matrix whole(up.inputs(), up.inputs());
        for (int k = 0; k < up.outputs(); ++k) {
          for (int i = 0; i < up.inputs(); ++i) {
            for (int j = 0; j < up.inputs(); ++j) whole.At(i, j) += made.At(k, i) * half.At(k, j);
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
void AttentionWeights::VisitBlock(int layer, int position, const Visit& visit) const {
  const auto l = static_cast<size_t>(layer);
  const int own_dim = state_.keys.head_dim;
  const int key_dim = kernels::KeyDim(state_);
  const int value_dim = state_.values.head_dim;
  const int value_width = width_ - key_width_;
  const int group = config_.q_heads / state_.values.kv_heads;
  const int end = position + kBlockTokens;
  const int first = config_.FirstVisible(layer, position);
  const int count = end - first;
  const int earlier = position - first;
  if (earlier <= 0) return;
  const float* queries =
      queries_[l].data() + static_cast<ptrdiff_t>(position) * config_.q_heads * key_dim;
  std::vector<float> keys(static_cast<size_t>(count * key_dim));
  std::vector<float> values(static_cast<size_t>(count * value_dim));
  std::vector<float> turned_values(values.size());  // [value_dim][count]
  std::vector<float> value_squares(static_cast<size_t>(count));
  std::vector<float> q(static_cast<size_t>(kBlockTokens * key_dim));
  std::vector<float> p(static_cast<size_t>(kBlockTokens * count));
  std::vector<float> sums(static_cast<size_t>(kBlockTokens * value_dim));
  std::vector<float> meets(p.size());  // v . o
  std::vector<float> of_keys(static_cast<size_t>(kBlockTokens * earlier));
  std::vector<float> of_values(of_keys.size());
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
      const int sinks_end = kKltSinks - first;
      for (int row = 0; row < kBlockTokens; ++row) {
        const float* of_row = p.data() + static_cast<ptrdiff_t>(row) * count;
        const float* sum = sums.data() + static_cast<ptrdiff_t>(row) * value_dim;
        float sum_square = 0;
        for (int c = 0; c < value_dim; ++c) sum_square += sum[c] * sum[c];
        for (int j = 0; j < earlier; ++j) {
          // Sinks are coded finer.
          const float square = j < sinks_end ? 0 : of_row[j] * of_row[j];
          const float away = value_squares[static_cast<size_t>(j)] + sum_square -
                             2 * meets[static_cast<size_t>(row * count + j)];
          of_values[static_cast<size_t>(row * earlier + j)] = square;
          of_keys[static_cast<size_t>(row * earlier + j)] = square * std::max(away, 0.0F);
        }
      }
      visit({kv, head, first, earlier, q.data(), of_keys.data(), of_values.data()});
    }
  }
}

double AttentionWeights::MeanOfMetric(int layer, int head) const {
  const Matrix& metric = metrics_[static_cast<size_t>(layer)][static_cast<size_t>(head)];
  double trace = 0;
  for (int c = 0; c < metric.rows; ++c) trace += metric.At(c, c);
  return trace / metric.rows;
}

void AttentionWeights::SetImportance(int layer) {
  const auto l = static_cast<size_t>(layer);
  const int tokens = static_cast<int>(keys_[l].size()) / key_width_;
  const int key_dim = kernels::KeyDim(state_);
  // Keys' and values'; and queries that could attend a token.
  std::vector<double> felt[2];
  for (auto& of_part : felt) of_part.resize(static_cast<size_t>(tokens));
  std::vector<int> queries(static_cast<size_t>(tokens));
  for (int position = 0; position < tokens; position += kBlockTokens) {
    for (int row = 0; row < kBlockTokens; ++row) {
      for (int j = config_.FirstVisible(layer, position + row); j < position; ++j)
        ++queries[static_cast<size_t>(j)];
    }
    VisitBlock(layer, position, [&](const Felt& of) {
      const double metric = MeanOfMetric(layer, of.head);
      for (int row = 0; row < kBlockTokens; ++row) {
        double q_square = 0;
        const float* q = of.q + static_cast<ptrdiff_t>(row) * key_dim;
        for (int c = 0; c < key_dim; ++c) q_square += static_cast<double>(q[c]) * q[c];
        for (int j = 0; j < of.count; ++j) {
          const ptrdiff_t at = static_cast<ptrdiff_t>(row) * of.count + j;
          const auto token = static_cast<size_t>(of.first + j);
          felt[0][token] += metric * q_square * static_cast<double>(of.of_keys[at]);
          felt[1][token] += metric * static_cast<double>(of.of_values[at]);
        }
      }
    });
  }
  std::vector<float>& importance = importance_[l];
  importance.assign(static_cast<size_t>(tokens), 0);
  for (auto& of_part : felt) {
    std::vector<double> known;
    for (size_t t = kKltSinks; t < of_part.size(); ++t) {
      if (queries[t] < kFewestQueries) continue;
      of_part[t] /= queries[t];
      known.push_back(of_part[t]);
    }
    if (known.empty()) continue;
    const auto middle = known.begin() + static_cast<ptrdiff_t>(known.size() / 2);
    std::nth_element(known.begin(), middle, known.end());
    for (size_t t = kKltSinks; t < of_part.size() && *middle > 0; ++t) {
      if (queries[t] < kFewestQueries) continue;
      const double times = std::clamp(of_part[t] / *middle, kLeastTimes, kMostTimes);
      importance[t] += static_cast<float>(0.5 * times);
    }
  }
}

void AttentionWeights::Weigh(int layer) {
  const auto l = static_cast<size_t>(layer);
  const int own_dim = state_.keys.head_dim;
  const int key_dim = kernels::KeyDim(state_);
  const int value_dim = state_.values.head_dim;
  const int group = config_.q_heads / state_.values.kv_heads;
  const int tokens = static_cast<int>(keys_[l].size()) / key_width_;
  std::vector<float> samples;
  std::vector<double> felt;
  for (int position = 0; position < tokens; position += kBlockTokens) {
    VisitBlock(layer, position, [&](const Felt& of) {
      const double metric_mean = MeanOfMetric(layer, of.head);
      const Matrix& metric = metrics_[l][static_cast<size_t>(of.head)];
      double squares = 0;
      felt.resize(static_cast<size_t>(of.count));
      for (int row = 0; row < kBlockTokens; ++row) {
        double felt_total = 0;
        for (int j = 0; j < of.count; ++j) {
          const ptrdiff_t at = static_cast<ptrdiff_t>(row) * of.count + j;
          const auto times = static_cast<double>(importance_[l][static_cast<size_t>(of.first + j)]);
          const double by = times > 0 ? 1 / times : 0;
          squares += by * static_cast<double>(of.of_values[at]);
          felt[static_cast<size_t>(j)] = by * static_cast<double>(of.of_keys[at]);
          felt_total += felt[static_cast<size_t>(j)];
        }
        if (!(felt_total > 0)) continue;
        double left = random_.Unit() * felt_total;
        int j = 0;
        while (j + 1 < of.count && (left -= felt[static_cast<size_t>(j)]) > 0) ++j;
        const float* q = of.q + static_cast<ptrdiff_t>(row) * key_dim;
        std::vector<float> sample(q, q + key_dim);
        model_.rope(layer).Undo(sample.data(), 1, static_cast<size_t>(own_dim), of.first + j);
        const auto by =
            static_cast<float>(std::sqrt(felt_total * metric_mean) * config_.attention_scale);
        for (float& x : sample) samples.push_back(x * by);
      }
      const int at = key_width_ + of.kv * value_dim;
      for (int a = 0; a < value_dim; ++a) {
        for (int b = 0; b < value_dim; ++b)
          sums_[l].At(at + a, at + b) += squares * metric.At(a, b);
      }
      if ((of.head + 1) % group != 0) return;  // more heads of these keys follow
      // Where a query's channels meet a row's.
      const auto place = [&](int c) {
        return c < own_dim ? of.kv * own_dim + c : key_width_ + of.kv * value_dim + c - own_dim;
      };
      Matrix moments(key_dim, key_dim);
      kernels::AddProducts(samples.data(), samples.data(),
                           static_cast<int>(samples.size()) / key_dim, key_dim, key_dim, &moments);
      samples.clear();
      for (int a = 0; a < key_dim; ++a) {
        for (int b = 0; b < key_dim; ++b) sums_[l].At(place(a), place(b)) += moments.At(a, b);
      }
    });
  }
}

}  // namespace kvant::node
