#include "node/klt.h"

#include <algorithm>
#include <array>
#include <utility>

#include "base/check.h"

namespace kvant::node {

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

KltCoder::KltCoder(const Model* model, const KltPack* pack, std::vector<size_t> cuts)
    : model_(*model), pack_(*pack), cuts_(std::move(cuts)), levels_(pack->statistics) {
  KV_CHECK(!cuts_.empty());
  for (size_t i = 0; i < cuts_.size(); ++i) {
    KV_CHECK(cuts_[i] < pack_.cuts.size());
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

std::vector<float> KltCoder::Inputs(size_t group, std::span<const float> embeddings,
                                    std::span<const std::vector<float>> first) const {
  const auto hidden = static_cast<size_t>(pack_.hidden);
  std::vector<float> inputs;
  inputs.reserve(static_cast<size_t>(kBlockTokens * pack_.bases[group].inputs));
  for (size_t token = 0; token < kBlockTokens; ++token) {
    const auto add = [&](std::span<const float> from, size_t stride, size_t count) {
      const auto at = from.begin() + static_cast<ptrdiff_t>(token * stride);
      inputs.insert(inputs.end(), at, at + static_cast<ptrdiff_t>(count));
    };
    add(embeddings, hidden, hidden);
    for (const int of : pack_.groups[group].sources) {
      const auto source = static_cast<size_t>(of);
      const auto count = static_cast<size_t>(SourceCoefficients(pack_.bases[source]));
      add(first[source], count, count);
    }
  }
  return inputs;
}

std::vector<float> KltCoder::Predict(size_t group, std::span<const float> inputs,
                                     int position) const {
  const KltBasis& basis = pack_.bases[group];
  std::vector<float> rows(static_cast<size_t>(kBlockTokens * basis.width));
  kernels::OrderedMultiply(basis.predictor, inputs.data(), kBlockTokens, basis.bias.data(),
                           rows.data());
  if (position == 0) std::copy(basis.sink_bias.begin(), basis.sink_bias.end(), rows.begin());
  return rows;
}

void KltCoder::PlacesOf(size_t group, size_t cut, int position, std::span<const int8_t> signs,
                        std::vector<KltPlace>* places) const {
  const KltBasis& basis = pack_.bases[group];
  const size_t count = Coefficients(group);
  const float step = this->cut(cut).step;
  // Of one token, by whether earlier cuts found something.
  std::array<std::vector<KltPlace>, 2> of_token;
  for (const bool significant : {false, true}) {
    for (const float deviation : basis.deviation) {
      of_token[significant ? 1 : 0].push_back(
          cut == 0 ? FirstPlace(deviation, step)
                   : RefinedPlace(static_cast<int>(cut), significant, deviation, step));
    }
  }
  places->clear();
  for (size_t token = 0; token < Sinks(position); ++token) {
    // The first cut says all there is of a sink.
    for (const float deviation : basis.sink_deviation[token == 0 ? 0 : 1])
      places->push_back(cut == 0 ? FirstPlace(deviation, pack_.sink_step) : KltPlace{});
  }
  while (places->size() < kBlockTokens * count) {
    if (cut == 0) {
      places->insert(places->end(), of_token[0].begin(), of_token[0].end());
      continue;
    }
    for (size_t c = 0; c < count; ++c)
      places->push_back(of_token[signs[places->size()] != 0 ? 1 : 0][c]);
  }
}

void KltCoder::Refine(size_t group, size_t cut, int position, std::span<const KltPlace> places,
                      std::span<const int32_t> levels, std::vector<float>* values,
                      std::vector<int8_t>* signs) const {
  const float step = this->cut(cut).step;
  const size_t sinks_end = Sinks(position) * Coefficients(group);
  for (size_t i = 0; i < places.size(); ++i) {
    if (places[i].table < 0) continue;
    const float value =
        levels_.Value(levels[i], places[i]) * (i < sinks_end ? pack_.sink_step : step);
    int8_t& sign = (*signs)[i];
    // What refines a level counts away from zero.
    (*values)[i] += sign < 0 ? -value : value;
    if (sign == 0) sign = static_cast<int8_t>((levels[i] > 0 ? 1 : 0) - (levels[i] < 0 ? 1 : 0));
  }
}

std::vector<float> KltCoder::Leading(size_t group, std::span<const float> values) const {
  const auto count = static_cast<size_t>(SourceCoefficients(pack_.bases[group]));
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
  together.reserve(static_cast<size_t>(kBlockTokens * pack_.bases[group].width));
  for (size_t token = 0; token < kBlockTokens; ++token) {
    for (const int layer : pack_.groups[group].layers) {
      const auto at =
          rows[static_cast<size_t>(layer)].begin() + static_cast<ptrdiff_t>(token * width);
      together.insert(together.end(), at, at + static_cast<ptrdiff_t>(width));
    }
  }
  return together;
}

void KltCoder::CodeGroup(size_t group, int position, std::span<const float> left, Code* code,
                         const Watch* watch) const {
  const KltBasis& basis = pack_.bases[group];
  const size_t count = Coefficients(group);
  const size_t size = kBlockTokens * count;
  const size_t sinks_end = Sinks(position) * count;
  // Those behind the last one that is coded are not asked for.
  size_t coded = position == 0 ? count : 0;
  for (size_t cut = 0; cut < cuts(); ++cut) {
    while (coded < count && FirstPlace(basis.deviation[coded], this->cut(cut).step).table >= 0)
      ++coded;
  }
  code->coefficients.assign(size, 0);
  kernels::OrderedMultiply(basis.analysis, left.data(), kBlockTokens, nullptr,
                           static_cast<int>(coded), code->coefficients.data());
  code->places.resize(cuts());
  code->levels.resize(cuts());
  code->values.assign(size, 0);
  std::vector<int8_t> signs(size);
  for (size_t cut = 0; cut < cuts(); ++cut) {
    const float step = this->cut(cut).step;
    std::vector<KltPlace>& places = code->places[cut];
    std::vector<int32_t>& levels = code->levels[cut];
    PlacesOf(group, cut, position, signs, &places);
    levels.assign(size, 0);
    code->rounded.assign(size, 0);
    for (size_t i = 0; i < size; ++i) {
      const float away = code->coefficients[i] - code->values[i];
      code->rounded[i] = (signs[i] < 0 ? -away : away) / (i < sinks_end ? pack_.sink_step : step);
      if (places[i].table >= 0) levels[i] = levels_.Round(code->rounded[i], places[i]);
    }
    if (watch != nullptr) (*watch)(cut, *code);
    Refine(group, cut, position, places, levels, &code->values, &signs);
    if (cut == 0) code->first = Leading(group, code->values);
  }
}

void KltCoder::Encode(std::span<const int32_t> tokens, int position, const Rows& exact,
                      Extents* extents) const {
  const std::vector<float> embeddings = Embeddings(tokens);
  std::vector<std::vector<float>> first;
  extents->assign(cuts(), std::vector<std::vector<std::byte>>(groups()));
  Code code;
  for (size_t group = 0; group < groups(); ++group) {
    std::vector<float> left = Gathered(group, exact);
    const std::vector<float> predicted = Predict(group, Inputs(group, embeddings, first), position);
    for (size_t i = 0; i < left.size(); ++i) left[i] -= predicted[i];
    CodeGroup(group, position, left, &code, nullptr);
    first.push_back(std::move(code.first));
    for (size_t cut = 0; cut < cuts(); ++cut)
      levels_.Write(code.levels[cut], code.places[cut], &(*extents)[cut][group]);
  }
}

KltReader::KltReader(const KltCoder* coder, std::span<const int32_t> tokens, int position)
    : coder_(*coder),
      position_(position),
      embeddings_(coder->Embeddings(tokens)),
      first_(coder->groups()) {}

Status KltReader::Read(size_t group, std::span<const std::span<const std::byte>> extents,
                       KltCoder::Rows* rows) {
  KV_CHECK(!extents.empty() && extents.size() <= coder_.cuts());
  const KltPack& pack = coder_.pack();
  const KltBasis& basis = pack.bases[group];
  const size_t count = coder_.Coefficients(group);
  const size_t size = kBlockTokens * count;
  std::vector<KltPlace> places;
  std::vector<int32_t> levels(size);
  std::vector<float> values(size);
  std::vector<int8_t> signs(size);
  for (size_t cut = 0; cut < extents.size(); ++cut) {
    coder_.PlacesOf(group, cut, position_, signs, &places);
    KV_RETURN_IF_ERROR(coder_.levels_.Read(extents[cut], places, levels));
    coder_.Refine(group, cut, position_, places, levels, &values, &signs);
    if (cut == 0) first_[group] = coder_.Leading(group, values);
  }
  std::vector<float> together =
      coder_.Predict(group, coder_.Inputs(group, embeddings_, first_), position_);
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
  const auto& layers = pack.groups[group].layers;
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
