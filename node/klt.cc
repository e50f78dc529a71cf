#include "node/klt.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/check.h"
#include "node/klt_importance.h"

namespace kvant::node {
namespace {

// Coefficients that tell how loud a token is: those that the first cut codes, if there are as many.
constexpr size_t kFewestLoud = 8;

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
                  float* keys, float* values, size_t stride) {
  const kernels::LayerShape state = model.config().StateShape(1);
  const int key_width = state.keys.kv_heads * state.keys.head_dim;
  const int value_width = state.values.kv_heads * state.values.head_dim;
  if (stride == 0) stride = static_cast<size_t>(key_width + value_width);
  for (int token = 0; token < tokens; ++token) {
    const float* row = rows + static_cast<size_t>(token) * stride;
    float* key = keys + static_cast<ptrdiff_t>(token) * key_width;
    std::copy_n(row, key_width, key);
    model.rope(layer).Apply(key, state.keys.kv_heads, static_cast<size_t>(state.keys.head_dim),
                            position + token);
    std::copy_n(row + key_width, value_width, values + static_cast<ptrdiff_t>(token) * value_width);
  }
}

KltSide KltSide::OfEntering(const KltCoder* coder, std::span<const float> entering) {
  return OfNormalized(coder, KltCoder::Normalized(entering, coder->pack().hidden));
}

KltSide KltSide::OfNormalized(const KltCoder* coder, std::vector<float> normalized) {
  KV_CHECK(normalized.size() == static_cast<size_t>(kBlockTokens * coder->pack().hidden));
  KltSide side;
  side.coder_ = coder;
  side.normalized_ = std::move(normalized);
  return side;
}

KltSide KltSide::OfTokens(const KltCoder* coder, std::span<const int32_t> tokens,
                          KltPredictions* kept) {
  KV_CHECK(tokens.size() == kBlockTokens && coder->transform().recomputed == 0);
  if (kept == nullptr) return OfEntering(coder, coder->Embeddings(tokens));
  KltSide side;
  side.coder_ = coder;
  side.kept_ = kept;
  side.tokens_.assign(tokens.begin(), tokens.end());
  return side;
}

void KltSide::Begin(size_t group, KltBegun* begun) const {
  begun->at.clear();
  if (kept_ != nullptr) {
    kept_->Get(*coder_, group, tokens_, &begun->kept);
    for (const KltPredictions::Row& row : begun->kept) begun->at.push_back(row->data());
    return;
  }
  const auto width = static_cast<size_t>(coder_->transform().bases[group].width);
  begun->made.resize(kBlockTokens * width);
  coder_->Begun(group, normalized_, begun->made.data());
  for (size_t token = 0; token < kBlockTokens; ++token)
    begun->at.push_back(begun->made.data() + token * width);
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
    auto& of_cut = of_.emplace_back();
    for (const KltBasis& basis : transform_.bases) {
      OfGroup& of = of_cut.emplace_back();
      for (const float deviation : basis.deviation)
        of.quarters.push_back(KltQuarters(deviation, cut(i).step));
      for (int more = kLeastMore; more <= kMostMore; ++more) {
        Prefix& prefix = of.prefixes.emplace_back();
        for (const int quarters : of.quarters) {
          // Deviations descend: what follows has no table either.
          const KltPlace place = i == 0 ? FirstPlace(quarters + more)
                                        : RefinedPlace(static_cast<int>(i), false, quarters + more);
          if (place.table < 0) break;
          prefix.table.push_back(static_cast<uint8_t>(place.table));
          prefix.with_low_bits += place.low_bits > 0 ? 1 : 0;
        }
      }
    }
  }
}

std::vector<float> KltCoder::Embeddings(std::span<const int32_t> tokens) const {
  std::vector<float> out(tokens.size() * static_cast<size_t>(pack_.hidden));
  for (size_t i = 0; i < tokens.size(); ++i) {
    model_.Embed(tokens[i], out.data() + i * static_cast<size_t>(pack_.hidden));
  }
  return out;
}

std::vector<float> KltCoder::Normalized(std::span<const float> entering, int width) {
  const auto hidden = static_cast<size_t>(width);
  KV_CHECK(entering.size() % hidden == 0);
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

void KltCoder::Begun(size_t group, std::span<const float> normalized, float* rows) const {
  const KltBasis& basis = transform_.bases[group];
  const size_t tokens = normalized.size() / static_cast<size_t>(pack_.hidden);
  kernels::OrderedMultiply({.weights = basis.predictor,
                            .x = normalized.data(),
                            .rows = static_cast<int>(tokens),
                            .inputs = pack_.hidden,
                            .end_output = basis.width,
                            .start = basis.bias.data(),
                            .out = rows});
}

void KltCoder::Predict(size_t group, const KltSide& side,
                       std::span<const kernels::SparseRows> first, int position,
                       std::vector<float>* rows) const {
  Rebuild(group, side, first, position, nullptr, rows);
}

void KltCoder::Rebuild(size_t group, const KltSide& side,
                       std::span<const kernels::SparseRows> first, int position,
                       const kernels::SparseRows* left, std::vector<float>* rows) const {
  const KltBasis& basis = transform_.bases[group];
  const auto width = static_cast<size_t>(basis.width);
  // A row is read where it begins when its first sums are made, and then stands in `rows`.
  KltBegun begun;
  side.Begin(group, &begun);
  rows->resize(kBlockTokens * width);
  const std::vector<int>& sources = transform_.groups[group].sources;
  if (!sources.empty()) {
    kernels::SparseRows terms;
    for (size_t token = 0; token < kBlockTokens; ++token) {
      auto offset = static_cast<size_t>(pack_.hidden);
      for (const int of : sources) {
        const auto source = static_cast<size_t>(of);
        const kernels::SparseRows& from = first[source];
        terms.AddFrom(from, token, from.terms_of(token), offset);
        offset += static_cast<size_t>(SourceCoefficients(transform_.bases[source]));
      }
      terms.EndRow();
    }
    kernels::OrderedMultiplyAdd(basis.predictor, terms, begun.at.data(), rows->data());
    for (size_t token = 0; token < kBlockTokens; ++token)
      begun.at[token] = rows->data() + token * width;
  }
  if (position == 0) begun.at[0] = basis.sink_bias.data();
  if (left != nullptr) {
    kernels::OrderedMultiplyAdd(basis.synthesis, *left, begun.at.data(), rows->data());
    return;
  }
  for (size_t token = 0; token < kBlockTokens; ++token) {
    float* const row = rows->data() + token * width;
    if (begun.at[token] != row) std::copy_n(begun.at[token], width, row);
  }
}

void KltCoder::PlacesOf(size_t group, size_t cut, int position, std::span<const KltToken> tokens,
                        const KltValues& values, KltPlaces* places) const {
  const KltBasis& basis = transform_.bases[group];
  const size_t sinks = Sinks(position);
  places->Clear();
  for (size_t token = 0; token < sinks; ++token) {
    // The first cut says all there is of a sink.
    const std::vector<float>& deviation = basis.sink_deviation[token == 0 ? 0 : 1];
    places->BeginToken({});
    for (size_t c = 0; c < deviation.size() && cut == 0; ++c)
      places->Add(c, FirstPlace(KltQuarters(deviation[c], pack_.sink_step)));
    places->EndToken();
  }
  const std::vector<int>& quarters = of_[cut][group].quarters;
  for (size_t token = sinks; token < kBlockTokens; ++token) {
    const Prefix& prefix = PrefixOf(group, cut, tokens[token]);
    const int more = tokens[token].quarters();
    const size_t begin = places->coded();
    places->BeginToken(prefix.table);
    for (size_t c = 0; c < prefix.with_low_bits; ++c) {
      places->low_bits[begin + c] = static_cast<uint8_t>(FirstPlace(quarters[c] + more).low_bits);
    }
    if (cut > 0) {
      // What was found is refined even where little is left of it.
      values.ForEach(token, 0, [&](size_t c, float) {
        const KltPlace place = RefinedPlace(static_cast<int>(cut), true, quarters[c] + more);
        if (c < prefix.table.size()) {
          places->table[begin + c] = static_cast<uint8_t>(place.table);
        } else {
          places->Add(c, place);
        }
      });
    }
    places->EndToken();
  }
}

void KltCoder::Refine(size_t cut, int position, std::span<const KltToken> tokens,
                      const KltPlaces& places, const KltLevelsRead& read, KltValues* values) const {
  constexpr size_t kWord = 64;
  size_t begin = 0;
  const uint16_t* other = places.other.data();
  for (size_t token = 0; token < kBlockTokens; ++token) {
    const float step = StepAt(cut, position, tokens, token);
    KltValues::Token of = values->At(token);
    const auto value_at = [&](size_t i) { return levels_.ValueAt(i, read, places) * step; };
    // Where an earlier cut found something, and where this one is the first that does, a word at a
    // time; the rest is passed over.
    const size_t first = places.first[token];
    for (size_t c = 0; c < first; c += kWord) {
      uint64_t refined = of.HereWord(c / kWord);
      uint64_t begun = read.NotZeroWord(begin + c) & ~refined;
      if (first - c < kWord) {
        refined &= (uint64_t{1} << (first - c)) - 1;
        begun &= (uint64_t{1} << (first - c)) - 1;
      }
      for (; refined != 0; refined &= refined - 1) {
        const size_t at = c + static_cast<size_t>(std::countr_zero(refined));
        of.Refine(at, value_at(begin + at));
      }
      for (; begun != 0; begun &= begun - 1) {
        const size_t at = c + static_cast<size_t>(std::countr_zero(begun));
        of.Begin(at, value_at(begin + at), read.Level(begin + at) < 0);
      }
    }
    for (size_t i = begin + first; i < places.end[token]; ++i) {
      const size_t c = *other++;
      if (of.Here(c)) {
        of.Refine(c, value_at(i));
      } else if (const int32_t level = read.Level(i); level != 0) {
        of.Begin(c, value_at(i), level < 0);
      }
    }
    begin = places.end[token];
  }
}

void KltCoder::FirstTerms(int position, std::span<const KltToken> tokens, const KltPlaces& places,
                          const KltLevelsRead& read, kernels::SparseRows* terms) const {
  terms->Clear();
  std::vector<uint16_t> at;  // of a token, less its first
  size_t begin = 0;
  const uint16_t* other = places.other.data();
  for (size_t token = 0; token < kBlockTokens; ++token) {
    const float step = StepAt(0, position, tokens, token);
    const size_t end = places.end[token];
    at.resize(std::max(at.size(), end - begin + KltLevelsRead::kPadding));
    const size_t count = read.NotZero(begin, end, at.data());
    uint16_t* input = nullptr;
    float* factor = nullptr;
    terms->Append(count, &input, &factor);
    const size_t first = places.first[token];
    for (size_t t = 0; t < count; ++t) {
      input[t] = at[t] < first ? at[t] : other[at[t] - first];
      factor[t] = levels_.ValueAt(begin + at[t], read, places) * step;
    }
    other += end - begin - first;
    terms->EndRow();
    begin = end;
  }
}

bool KltCoder::IsSource(size_t group) const {
  return std::any_of(transform_.groups.begin(), transform_.groups.end(), [&](const KltGroup& of) {
    return std::find(of.sources.begin(), of.sources.end(), static_cast<int>(group)) !=
           of.sources.end();
  });
}

kernels::SparseRows KltCoder::Leading(size_t group, const kernels::SparseRows& first) const {
  const auto count = static_cast<size_t>(SourceCoefficients(transform_.bases[group]));
  kernels::SparseRows leading;
  for (size_t token = 0; token < first.rows(); ++token) {
    const uint16_t* const inputs = first.inputs() + first.begin()[token];
    const uint16_t* const end = inputs + first.terms_of(token);
    leading.AddFrom(first, token,
                    static_cast<size_t>(std::lower_bound(inputs, end, count) - inputs), 0);
    leading.EndRow();
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
  code->tokens.assign(kBlockTokens, {});
  for (size_t token = Sinks(position); token < kBlockTokens; ++token) {
    KltToken& of = code->tokens[token];
    of.finer = finer[token];
    // Of the first cut, which has no regard to those behind it.
    const size_t counted = PrefixOf(group, 0, of).table.size();
    double squares = 0;
    for (size_t c = 0; c < counted; ++c) {
      const double ratio = static_cast<double>(code->coefficients[token * count + c]) /
                           static_cast<double>(basis.deviation[c]);
      squares += ratio * ratio;
    }
    if (counted < kFewestLoud || !(squares > 0)) continue;
    const double quarter_octaves = 2 * std::log2(squares / static_cast<double>(counted));
    of.louder = static_cast<int8_t>(
        std::lround(std::clamp(quarter_octaves, static_cast<double>(kKltLeastLouder),
                               static_cast<double>(kKltMostLouder))));
  }
}

void KltCoder::CodeGroup(size_t group, int position, std::span<const float> left,
                         std::span<const int8_t> finer, Code* code, const Watch* watch) const {
  const KltBasis& basis = transform_.bases[group];
  const size_t count = Coefficients(group);
  // Those behind the last one that is coded are not asked for.
  size_t coded = position == 0 ? count : 0;
  const KltToken most = {*std::max_element(finer.begin(), finer.end()), kKltMostLouder};
  for (size_t cut = 0; cut < cuts(); ++cut)
    coded = std::max(coded, PrefixOf(group, cut, most).table.size());
  code->coefficients.assign(kBlockTokens * count, 0);
  kernels::OrderedMultiply(basis.analysis, left.data(), kBlockTokens, nullptr,
                           static_cast<int>(coded), code->coefficients.data());
  SetTokens(group, position, finer, code);
  code->cuts.resize(cuts());
  code->values.Reset(kBlockTokens, count);
  for (size_t cut = 0; cut < cuts(); ++cut) {
    Code::OfCut& of = code->cuts[cut];
    PlacesOf(group, cut, position, code->tokens, code->values, &of.places);
    of.rounded.resize(of.places.coded());
    size_t begin = 0;
    const uint16_t* other = of.places.other.data();
    for (size_t token = 0; token < kBlockTokens; ++token) {
      const float steps = 1 / StepAt(cut, position, code->tokens, token);
      const float* exact = code->coefficients.data() + token * count;
      const KltValues::Token before = code->values.At(token);
      const auto left_of = [&](size_t c) {
        const float away = exact[c] - before.At(c);
        return before.Below(c) ? -away : away;
      };
      // The first ones as if nothing was found of them, then those of which something was.
      const size_t first = of.places.first[token];
      for (size_t c = 0; c < first; ++c) of.rounded[begin + c] = exact[c] * steps;
      if (cut > 0) {
        code->values.ForEach(token, 0, [&](size_t c, float) {
          if (c < first) of.rounded[begin + c] = left_of(c) * steps;
        });
      }
      for (size_t i = begin + first; i < of.places.end[token]; ++i) {
        const size_t c = *other++;
        of.rounded[i] = (cut > 0 && before.Here(c) ? left_of(c) : exact[c]) * steps;
      }
      begin = of.places.end[token];
    }
    levels_.RoundAll(of.rounded, of.places, &of.read);
    // Of the last one nobody else makes use.
    if (cut + 1 < cuts() || watch != nullptr)
      Refine(cut, position, code->tokens, of.places, of.read, &code->values);
    if (cut == 0) {
      kernels::SparseRows terms;
      FirstTerms(position, code->tokens, of.places, of.read, &terms);
      code->first = Leading(group, terms);
    }
    if (watch != nullptr) (*watch)(cut, *code);
  }
}

void KltCoder::Encode(const KltSide& side, int position, const Rows& exact,
                      Extents* extents) const {
  std::vector<kernels::SparseRows> first;
  extents->assign(cuts(), std::vector<std::vector<std::byte>>(groups()));
  Code code;
  std::vector<float> predicted;
  for (size_t group = 0; group < groups(); ++group) {
    std::vector<float> left = Gathered(group, exact);
    Predict(group, side, first, position, &predicted);
    const std::vector<int8_t> finer = Finer(group, left);
    for (size_t i = 0; i < left.size(); ++i) left[i] -= predicted[i];
    CodeGroup(group, position, left, finer, &code, nullptr);
    first.push_back(code.first);
    for (size_t cut = 0; cut < cuts(); ++cut) {
      std::vector<std::byte>& extent = (*extents)[cut][group];
      if (cut == 0) {
        for (const KltToken token : code.tokens) extent.push_back(ByteOf(token));
      }
      levels_.Write(code.cuts[cut].read, code.cuts[cut].places, &extent);
    }
  }
}

KltReader::KltReader(const KltCoder* coder, KltSide side, int position)
    : coder_(*coder), side_(std::move(side)), position_(position), first_(coder->groups()) {}

Result<std::span<const float>> KltReader::Read(
    size_t group, std::span<const std::span<const std::byte>> extents) {
  // Of the group under work; as large as what is made of it.
  struct Scratch {
    KltPlaces places;
    KltLevelsRead read;
    KltValues values;
    kernels::SparseRows terms;
    std::vector<float> rows;
  };
  thread_local Scratch scratch;
  auto& [places, read, values, terms, rows] = scratch;
  KV_CHECK(!extents.empty() && extents.size() <= coder_.cuts());
  if (extents[0].size() < kBlockTokens)
    return DataLoss("a klt block: the extent of a first cut is too short");
  std::vector<KltToken> tokens;
  for (const std::byte byte : extents[0].first(kBlockTokens)) tokens.push_back(TokenOf(byte));
  for (size_t token = 0; token < KltCoder::Sinks(position_); ++token) {
    if (tokens[token] != KltToken()) return DataLoss("a klt block: a sink has a step of its own");
  }
  // A first cut alone is refined by none: its levels are all there is.
  const bool alone = extents.size() == 1;
  if (!alone) values.Reset(kBlockTokens, coder_.Coefficients(group));
  const bool predicts = coder_.IsSource(group);
  for (size_t cut = 0; cut < extents.size(); ++cut) {
    coder_.PlacesOf(group, cut, position_, tokens, values, &places);
    const auto coded = cut == 0 ? extents[0].subspan(kBlockTokens) : extents[cut];
    KV_RETURN_IF_ERROR(coder_.levels_.Read(coded, places, &read));
    if (cut == 0 && (alone || predicts)) coder_.FirstTerms(position_, tokens, places, read, &terms);
    if (cut == 0 && predicts) first_[group] = coder_.Leading(group, terms);
    if (!alone) coder_.Refine(cut, position_, tokens, places, read, &values);
  }
  if (!alone) {
    terms.Clear();
    for (size_t token = 0; token < kBlockTokens; ++token) {
      values.ForEach(token, 0, [&of = terms](size_t c, float value) { of.Add(c, value); });
      terms.EndRow();
    }
  }
  coder_.Rebuild(group, side_, first_, position_, &terms, &rows);
  return std::span<const float>(rows);
}

Status KltReader::Read(size_t group, std::span<const std::span<const std::byte>> extents,
                       KltCoder::Rows* rows) {
  KV_ASSIGN_OR_RETURN(const std::span<const float> together, Read(group, extents));
  const KltPack& pack = coder_.pack();
  const KltBasis& basis = coder_.transform().bases[group];
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
