#include "node/klt.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "base/check.h"
#include "node/klt_importance.h"

namespace kvant::node {
namespace {

// Coefficients that tell how loud a token is: those that the first cut codes, if there are as many.
constexpr int kFewestLoud = 8;

}  // namespace

void GatherState(const Model& model, int layer, int position, int tokens, const float* keys,
                 const float* values, float* rows) {
  const kernels::LayerShape state = model.config().StateShape(1);
  const int key_width = state.keys.kv_heads * state.keys.head_dim;
  const int value_width = state.values.kv_heads * state.values.head_dim;
  const int width = key_width + value_width;
  for (int token = 0; token < tokens; ++token) {
    float* row = rows + static_cast<ptrdiff_t>(token) * width;
    std::copy_n(keys + static_cast<ptrdiff_t>(token) * key_width, key_width, row);
    model.rope(layer).Undo(row, state.keys.kv_heads, static_cast<size_t>(state.keys.head_dim),
                           position + token);
    std::copy_n(values + static_cast<ptrdiff_t>(token) * value_width, value_width, row + key_width);
  }
}

void ScatterState(const Model& model, int layer, int position, int tokens, const float* rows,
                  float* keys, float* values) {
  const kernels::LayerShape state = model.config().StateShape(1);
  const int key_width = state.keys.kv_heads * state.keys.head_dim;
  const int value_width = state.values.kv_heads * state.values.head_dim;
  const int width = key_width + value_width;
  for (int token = 0; token < tokens; ++token) {
    const float* row = rows + static_cast<ptrdiff_t>(token) * width;
    float* key = keys + static_cast<ptrdiff_t>(token) * key_width;
    std::copy_n(row, key_width, key);
    model.rope(layer).Apply(key, state.keys.kv_heads, static_cast<size_t>(state.keys.head_dim),
                            position + token);
    std::copy_n(row + key_width, value_width, values + static_cast<ptrdiff_t>(token) * value_width);
  }
}

KltCoder::KltCoder(const Model* model, const KltPack* pack, std::vector<size_t> cuts,
                   size_t transform)
    : model_(*model),
      pack_(*pack),
      transform_(pack->transforms[transform]),
      cuts_(std::move(cuts)),
      levels_(pack->statistics) {
  KV_CHECK(!cuts_.empty());
  for (size_t i = 0; i < cuts_.size(); ++i) {
    KV_CHECK(cuts_[i] < transform_.cuts.size());
    KV_CHECK(cuts_.size() == 1 || (i < pack_.refining.size() && cuts_[i] == pack_.refining[i]));
  }
}

std::vector<float> KltCoder::Embeddings(std::span<const int32_t> tokens) const {
  KV_CHECK(tokens.size() == kBlockTokens);
  std::vector<float> out(tokens.size() * static_cast<size_t>(pack_.hidden));
  for (size_t i = 0; i < tokens.size(); ++i) {
    model_.Embed(tokens[i], out.data() + i * static_cast<size_t>(pack_.hidden));
  }
  return out;
}

std::vector<float> KltCoder::Normalized(std::span<const float> entering, int width) {
  const auto hidden = static_cast<size_t>(width);
  KV_CHECK(entering.size() == kBlockTokens * hidden);
  std::vector<float> normalized;
  normalized.reserve(entering.size());
  for (size_t at = 0; at < entering.size(); at += hidden) {
    // One after the other, so that the sum is the same everywhere.
    double squares = 0;
    for (const float x : entering.subspan(at, hidden)) squares += static_cast<double>(x) * x;
    const double scale = squares > 0 ? 1 / std::sqrt(squares / static_cast<double>(hidden)) : 0;
    for (const float x : entering.subspan(at, hidden))
      normalized.push_back(static_cast<float>(x * scale));
  }
  return normalized;
}

std::vector<float> KltCoder::Inputs(size_t group, std::span<const float> normalized,
                                    std::span<const std::vector<float>> first) const {
  const auto hidden = static_cast<size_t>(pack_.hidden);
  std::vector<float> inputs;
  inputs.reserve(static_cast<size_t>(kBlockTokens * transform_.bases[group].inputs));
  for (size_t token = 0; token < kBlockTokens; ++token) {
    const auto add = [&](std::span<const float> from, size_t stride, size_t count) {
      const auto at = from.begin() + static_cast<ptrdiff_t>(token * stride);
      inputs.insert(inputs.end(), at, at + static_cast<ptrdiff_t>(count));
    };
    add(normalized, hidden, hidden);
    for (const int of : transform_.groups[group].sources) {
      const auto source = static_cast<size_t>(of);
      const auto count = static_cast<size_t>(SourceCoefficients(transform_.bases[source]));
      add(first[source], count, count);
    }
  }
  return inputs;
}

std::vector<float> KltCoder::Predict(size_t group, std::span<const float> inputs,
                                     int position) const {
  const KltBasis& basis = transform_.bases[group];
  std::vector<float> rows(static_cast<size_t>(kBlockTokens * basis.width));
  kernels::OrderedMultiply(basis.predictor, inputs.data(), kBlockTokens, basis.bias.data(),
                           rows.data());
  if (position == 0) std::copy(basis.sink_bias.begin(), basis.sink_bias.end(), rows.begin());
  return rows;
}

std::vector<int> KltCoder::Quarters(size_t group, size_t cut) const {
  std::vector<int> quarters;
  for (const float deviation : transform_.bases[group].deviation)
    quarters.push_back(KltQuarters(deviation, this->cut(cut).step));
  return quarters;
}

void KltCoder::PlacesOf(size_t group, size_t cut, int position, std::span<const KltToken> tokens,
                        std::span<const int8_t> signs, std::vector<KltPlace>* places) const {
  const KltBasis& basis = transform_.bases[group];
  const size_t count = Coefficients(group);
  const size_t sinks = Sinks(position);
  places->clear();
  places->reserve(kBlockTokens * count);
  for (size_t token = 0; token < sinks; ++token) {
    // The first cut says all there is of a sink.
    for (const float deviation : basis.sink_deviation[token == 0 ? 0 : 1]) {
      places->push_back(cut == 0 ? FirstPlace(KltQuarters(deviation, pack_.sink_step))
                                 : KltPlace{});
    }
  }
  // Places of all quarters that there are between nothing and the most low bits.
  constexpr int kLeast = 4 * kKltLowest - 1;
  constexpr int kMost = 4 * (kKltHighest + kKltMostLowBits);
  std::array<std::array<KltPlace, kMost - kLeast + 1>, 2> of_quarters;
  for (const bool significant : {false, true}) {
    for (int quarters = kLeast; quarters <= kMost; ++quarters) {
      of_quarters[significant ? 1 : 0][static_cast<size_t>(quarters - kLeast)] =
          cut == 0 ? FirstPlace(quarters)
                   : RefinedPlace(static_cast<int>(cut), significant, quarters);
    }
  }
  const std::vector<int> quarters = Quarters(group, cut);
  for (size_t token = sinks; token < kBlockTokens; ++token) {
    const int more = tokens[token].quarters();
    const int8_t* sign = signs.data() + token * count;
    for (size_t c = 0; c < count; ++c) {
      const int at = std::clamp(quarters[c] + more, kLeast, kMost) - kLeast;
      // What was found is refined even where little is left of it.
      const bool significant = cut > 0 && sign[c] != 0;
      places->push_back(of_quarters[significant ? 1 : 0][static_cast<size_t>(at)]);
    }
  }
}

void KltCoder::Refine(size_t group, size_t cut, int position, std::span<const KltToken> tokens,
                      std::span<const KltPlace> places, std::span<const int32_t> levels,
                      std::vector<float>* values, std::vector<int8_t>* signs) const {
  const size_t count = Coefficients(group);
  const size_t sinks = Sinks(position);
  for (size_t token = 0; token < kBlockTokens; ++token) {
    const float step = token < sinks ? pack_.sink_step : StepOf(tokens[token], this->cut(cut).step);
    for (size_t i = token * count; i < (token + 1) * count; ++i) {
      if (places[i].table < 0) continue;
      const float value = levels_.Value(levels[i], places[i]) * step;
      int8_t& sign = (*signs)[i];
      // What refines a level counts away from zero.
      (*values)[i] += sign < 0 ? -value : value;
      if (sign == 0) sign = static_cast<int8_t>((levels[i] > 0 ? 1 : 0) - (levels[i] < 0 ? 1 : 0));
    }
  }
}

std::vector<float> KltCoder::Leading(size_t group, std::span<const float> values) const {
  const auto count = static_cast<size_t>(SourceCoefficients(transform_.bases[group]));
  std::vector<float> leading;
  leading.reserve(kBlockTokens * count);
  for (size_t i = 0; i < values.size(); i += Coefficients(group)) {
    const auto at = values.begin() + static_cast<ptrdiff_t>(i);
    leading.insert(leading.end(), at, at + static_cast<ptrdiff_t>(count));
  }
  return leading;
}

std::vector<float> KltCoder::Gathered(size_t group, const Rows& rows) const {
  const auto width = static_cast<size_t>(pack_.width);
  std::vector<float> together;
  together.reserve(static_cast<size_t>(kBlockTokens * transform_.bases[group].width));
  for (size_t token = 0; token < kBlockTokens; ++token) {
    for (const int layer : transform_.groups[group].layers) {
      const auto at =
          rows[static_cast<size_t>(layer)].begin() + static_cast<ptrdiff_t>(token * width);
      together.insert(together.end(), at, at + static_cast<ptrdiff_t>(width));
    }
  }
  return together;
}

std::vector<int8_t> KltCoder::Finer(size_t group, std::span<const float> rows) const {
  const KltBasis& basis = transform_.bases[group];
  const auto width = static_cast<size_t>(basis.width);
  std::vector<int8_t> finer;
  for (size_t at = 0; at < rows.size(); at += width) {
    finer.push_back(
        FinerOf(basis.importance, ImportanceFeatures(model_.config(), rows.subspan(at, width))));
  }
  return finer;
}

void KltCoder::SetTokens(size_t group, int position, std::span<const int8_t> finer,
                         Code* code) const {
  const KltBasis& basis = transform_.bases[group];
  const size_t count = Coefficients(group);
  // Of the first cut, which has no regard to those behind it.
  const std::vector<int> quarters = Quarters(group, 0);
  code->tokens.assign(kBlockTokens, {});
  for (size_t token = Sinks(position); token < kBlockTokens; ++token) {
    KltToken& of = code->tokens[token];
    of.finer = finer[token];
    double squares = 0;
    int counted = 0;
    for (size_t c = 0; c < count && FirstPlace(quarters[c] + of.quarters()).table >= 0; ++c) {
      const double ratio = static_cast<double>(code->coefficients[token * count + c]) /
                           static_cast<double>(basis.deviation[c]);
      squares += ratio * ratio;
      ++counted;
    }
    if (counted < kFewestLoud || !(squares > 0)) continue;
    const double quarter_octaves = 2 * std::log2(squares / counted);
    of.louder = static_cast<int8_t>(
        std::lround(std::clamp(quarter_octaves, static_cast<double>(kKltLeastLouder),
                               static_cast<double>(kKltMostLouder))));
  }
}

void KltCoder::CodeGroup(size_t group, int position, std::span<const float> left,
                         std::span<const int8_t> finer, Code* code, const Watch* watch) const {
  const KltBasis& basis = transform_.bases[group];
  const size_t count = Coefficients(group);
  const size_t size = kBlockTokens * count;
  const size_t sinks = Sinks(position);
  // Those behind the last one that is coded are not asked for.
  size_t coded = position == 0 ? count : 0;
  const int most = *std::max_element(finer.begin(), finer.end()) * 2 + kKltMostLouder;
  for (size_t cut = 0; cut < cuts(); ++cut) {
    const std::vector<int> quarters = Quarters(group, cut);
    while (coded < count && FirstPlace(quarters[coded] + most).table >= 0) ++coded;
  }
  code->coefficients.assign(size, 0);
  kernels::OrderedMultiply(basis.analysis, left.data(), kBlockTokens, nullptr,
                           static_cast<int>(coded), code->coefficients.data());
  SetTokens(group, position, finer, code);
  code->places.resize(cuts());
  code->levels.resize(cuts());
  code->values.assign(size, 0);
  std::vector<int8_t> signs(size);
  for (size_t cut = 0; cut < cuts(); ++cut) {
    std::vector<KltPlace>& places = code->places[cut];
    std::vector<int32_t>& levels = code->levels[cut];
    PlacesOf(group, cut, position, code->tokens, signs, &places);
    levels.assign(size, 0);
    code->rounded.assign(size, 0);
    for (size_t token = 0; token < kBlockTokens; ++token) {
      const float step =
          token < sinks ? pack_.sink_step : StepOf(code->tokens[token], this->cut(cut).step);
      for (size_t i = token * count; i < (token + 1) * count; ++i) {
        if (places[i].table < 0) continue;
        const float away = code->coefficients[i] - code->values[i];
        code->rounded[i] = (signs[i] < 0 ? -away : away) / step;
        levels[i] = levels_.Round(code->rounded[i], places[i]);
      }
    }
    if (watch != nullptr) (*watch)(cut, *code);
    Refine(group, cut, position, code->tokens, places, levels, &code->values, &signs);
    if (cut == 0) code->first = Leading(group, code->values);
  }
}

void KltCoder::Encode(std::span<const float> entering, int position, const Rows& exact,
                      Extents* extents) const {
  const std::vector<float> normalized = Normalized(entering, pack_.hidden);
  std::vector<std::vector<float>> first;
  extents->assign(cuts(), std::vector<std::vector<std::byte>>(groups()));
  Code code;
  for (size_t group = 0; group < groups(); ++group) {
    std::vector<float> left = Gathered(group, exact);
    const std::vector<float> predicted = Predict(group, Inputs(group, normalized, first), position);
    const std::vector<int8_t> finer = Finer(group, left);
    for (size_t i = 0; i < left.size(); ++i) left[i] -= predicted[i];
    CodeGroup(group, position, left, finer, &code, nullptr);
    first.push_back(std::move(code.first));
    for (size_t cut = 0; cut < cuts(); ++cut) {
      std::vector<std::byte>& extent = (*extents)[cut][group];
      if (cut == 0) {
        for (const KltToken token : code.tokens) extent.push_back(ByteOf(token));
      }
      levels_.Write(code.levels[cut], code.places[cut], &extent);
    }
  }
}

KltReader::KltReader(const KltCoder* coder, std::span<const float> entering, int position)
    : coder_(*coder),
      position_(position),
      normalized_(KltCoder::Normalized(entering, coder->pack().hidden)),
      first_(coder->groups()) {}

Status KltReader::Read(size_t group, std::span<const std::span<const std::byte>> extents,
                       KltCoder::Rows* rows) {
  KV_CHECK(!extents.empty() && extents.size() <= coder_.cuts());
  const KltPack& pack = coder_.pack();
  const KltBasis& basis = coder_.transform().bases[group];
  const size_t count = coder_.Coefficients(group);
  const size_t size = kBlockTokens * count;
  if (extents[0].size() < kBlockTokens)
    return DataLoss("a klt block: the extent of a first cut is too short");
  std::vector<KltToken> tokens;
  for (const std::byte byte : extents[0].first(kBlockTokens)) tokens.push_back(TokenOf(byte));
  for (size_t token = 0; token < KltCoder::Sinks(position_); ++token) {
    if (tokens[token] != KltToken()) return DataLoss("a klt block: a sink has a step of its own");
  }
  std::vector<KltPlace> places;
  std::vector<int32_t> levels(size);
  std::vector<float> values(size);
  std::vector<int8_t> signs(size);
  for (size_t cut = 0; cut < extents.size(); ++cut) {
    coder_.PlacesOf(group, cut, position_, tokens, signs, &places);
    const auto coded = cut == 0 ? extents[0].subspan(kBlockTokens) : extents[cut];
    KV_RETURN_IF_ERROR(coder_.levels_.Read(coded, places, levels));
    coder_.Refine(group, cut, position_, tokens, places, levels, &values, &signs);
    if (cut == 0) first_[group] = coder_.Leading(group, values);
  }
  std::vector<float> together =
      coder_.Predict(group, coder_.Inputs(group, normalized_, first_), position_);
  // The last coefficients, which vary least, are all 0 at most cuts.
  size_t used = count;
  const auto is_unused = [&](size_t c) {
    for (size_t i = c; i < size; i += count) {
      if (values[i] != 0) return false;
    }
    return true;
  };
  while (used > 0 && is_unused(used - 1)) --used;
  if (used > 0) {
    std::vector<float> packed;
    packed.reserve(kBlockTokens * used);
    for (size_t i = 0; i < size; i += count) {
      packed.insert(packed.end(), values.begin() + static_cast<ptrdiff_t>(i),
                    values.begin() + static_cast<ptrdiff_t>(i + used));
    }
    kernels::OrderedMultiplyAdd(basis.synthesis, packed.data(), kBlockTokens,
                                static_cast<int>(used), together.data());
  }
  rows->resize(static_cast<size_t>(pack.layers));
  const auto width = static_cast<size_t>(pack.width);
  const auto& layers = coder_.transform().groups[group].layers;
  for (size_t i = 0; i < layers.size(); ++i) {
    std::vector<float>& of_layer = (*rows)[static_cast<size_t>(layers[i])];
    of_layer.resize(kBlockTokens * width);
    for (size_t token = 0; token < kBlockTokens; ++token) {
      std::copy_n(together.data() + token * static_cast<size_t>(basis.width) + i * width, width,
                  of_layer.data() + token * width);
    }
  }
  return OkStatus();
}

}  // namespace kvant::node
