#include "node/eval_measure.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>

#include "base/check.h"
#include "kernels/raw_codec.h"

namespace kvant::node {
namespace {

size_t ArgMax(const float* x, size_t count) {
  return static_cast<size_t>(std::max_element(x, x + count) - x);
}

// In double: an error here is one of every KL of the row, and the noise floor lies near 1e-7.
double LogSum(const float* x, size_t count) {
  const double max = *std::max_element(x, x + count);
  double sum = 0;
  for (size_t i = 0; i < count; ++i) sum += std::exp(static_cast<double>(x[i]) - max);
  return max + std::log(sum);
}

double Mean(double sum, size_t count) { return sum / static_cast<double>(count); }

}  // namespace

Result<std::vector<double>> LogSums(const float* logits, int rows, int vocab,
                                    kernels::ThreadPool* pool) {
  const auto width = static_cast<size_t>(vocab);
  std::vector<double> sums(static_cast<size_t>(rows));
  pool->ParallelFor(rows, [&](int row) {
    const auto r = static_cast<size_t>(row);
    sums[r] = LogSum(logits + r * width, width);
  });
  for (const double sum : sums) {
    if (!std::isfinite(sum)) {
      return DataLoss("the model gives logits that are not finite: is the checkpoint whole?");
    }
  }
  return sums;
}

void ReferenceRows::Set(const float* logits, std::span<const double> log_sums, int vocab,
                        kernels::ThreadPool* pool) {
  log_sums_.assign(log_sums.begin(), log_sums.end());
  rows_ = static_cast<int>(log_sums.size());
  vocab_ = static_cast<size_t>(vocab);
  logits_ = logits;
  probabilities_.resize(log_sums.size() * vocab_);
  best_.resize(log_sums.size());
  pool->ParallelFor(rows_, [&](int row) {
    const auto r = static_cast<size_t>(row);
    const float* x = logits + r * vocab_;
    float* p = probabilities_.data() + r * vocab_;
    for (size_t i = 0; i < vocab_; ++i) {
      p[i] = static_cast<float>(std::exp(static_cast<double>(x[i]) - log_sums_[r]));
    }
    best_[r] = ArgMax(x, vocab_);
  });
}

void ReferenceRows::Compare(const float* logits, std::span<const double> log_sums,
                            kernels::ThreadPool* pool, float* kl, uint8_t* agree) const {
  KV_CHECK(log_sums.size() == static_cast<size_t>(rows_));
  pool->ParallelFor(rows_, [&](int row) {
    const auto r = static_cast<size_t>(row);
    const float* exact = logits_ + r * vocab_;
    const float* lossy = logits + r * vocab_;
    const float* p = probabilities_.data() + r * vocab_;
    double sum = log_sums[r] - log_sums_[r];
    for (size_t i = 0; i < vocab_; ++i) {
      sum += static_cast<double>(p[i]) * (static_cast<double>(exact[i]) - lossy[i]);
    }
    // It is never negative but for rounding.
    kl[r] = static_cast<float>(std::max(sum, 0.0));
    agree[r] = ArgMax(lossy, vocab_) == best_[r] ? 1 : 0;
  });
}

Evaluator::Evaluator(const Model* model, kernels::ThreadPool* pool,
                     std::vector<EvalSetting> settings, bool in_class)
    : model_(*model),
      pool_(pool),
      settings_(std::move(settings)),
      in_class_(in_class),
      exact_class_(model, &kernels::kRawBf16Codec, {}),
      suffix_class_(model, &kernels::kRawFp32Codec, {}),
      decoder_(model, pool),
      exact_logits_(kBlockTokens * static_cast<size_t>(model->config().vocab)),
      logits_(exact_logits_.size()) {
  for (const EvalSetting& setting : settings_) source_of_.push_back(SourceOf(setting));
  measures_.coded_bits.resize(settings_.size());
  measures_.read.resize(settings_.size());
  if (in_class_) measures_.in_class.resize(settings_.size());
}

size_t Evaluator::SourceOf(const EvalSetting& setting) {
  for (size_t i = 0; i < sources_.size(); ++i) {
    const Source& known = sources_[i];
    if (setting.coder != nullptr && known.coder == setting.coder) return i + setting.coder_wire;
    if (setting.coder == nullptr && known.coder == nullptr &&
        known.block_class == setting.block_class) {
      return i;
    }
  }
  const size_t first = sources_.size();
  const size_t wires = setting.coder != nullptr ? setting.coder->wires().size() : 1;
  KV_CHECK(setting.coder_wire < wires);
  for (size_t wire = 0; wire < wires; ++wire) {
    sources_.push_back({setting.block_class, setting.coder, wire});
  }
  return first + setting.coder_wire;
}

bool Evaluator::IsExact(size_t source) const {
  return sources_[source].coder == nullptr &&
         sources_[source].block_class->codec().id == exact_class_.codec().id;
}

bool Evaluator::HasClassForm(size_t source) const {
  const StateCoder* coder = sources_[source].coder;
  return !IsExact(source) && (coder == nullptr || coder->blockwise());
}

Result<Evaluator::Forms> Evaluator::ComputeForms(std::span<const int32_t> prefix) {
  const std::vector<double> none(sources_.size());
  Forms forms{EncodedBlocks(&exact_class_), {}, {}, none, none};
  std::vector<EncodedBlocks*> lossy;
  forms.read.reserve(sources_.size());  // pointers into it are kept
  std::optional<PrefixState> state;
  for (size_t i = 0; i < sources_.size(); ++i) {
    EncodedBlocks& made = forms.read.emplace_back(sources_[i].block_class);
    if (sources_[i].coder == nullptr && !IsExact(i)) lossy.push_back(&made);
    // Kept only where somebody codes it.
    if (sources_[i].coder != nullptr && !state.has_value()) {
      state.emplace(model_.config(), prefix, 0);
    }
    if (sources_[i].coder != nullptr) state->KeepEntering(sources_[i].coder->entering_layers());
  }
  KV_RETURN_IF_ERROR(
      PrefillBlocks(&decoder_, prefix, &forms.exact, lossy, state.has_value() ? &*state : nullptr));
  for (size_t i = 0; i < sources_.size() && !prefix.empty(); ++i) {
    if (sources_[i].coder == nullptr || sources_[i].wire != 0) continue;
    sources_[i].coder->Code(*state, [&](size_t wire, const PrefixState& decoded, CodedSize size) {
      forms.read[i + wire].AppendState(decoded);
      forms.coded_bits[i + wire] =
          static_cast<double>(size.bits) / static_cast<double>(decoded.elements());
      forms.coded_manifest_bytes[i + wire] = static_cast<double>(size.manifest_bytes);
    });
  }
  state.reset();
  if (!in_class_) return forms;
  for (const Source& source : sources_) forms.in_class.emplace_back(source.block_class);
  for (size_t i = 0; i < sources_.size(); ++i) {
    if (!HasClassForm(i) || sources_[i].wire != 0) continue;
    const StateCoder* coder = sources_[i].coder;
    if (coder == nullptr) {
      KV_RETURN_IF_ERROR(PrefillBlocks(&decoder_, prefix, &forms.in_class[i], {}));
    } else {
      KV_RETURN_IF_ERROR(PrefillCoded(&decoder_, model_.config(), prefix, *coder,
                                      std::span(forms.in_class).subspan(i, coder->wires().size())));
    }
  }
  return forms;
}

std::vector<Evaluator::Lane> Evaluator::LanesOf(const Forms& forms) const {
  std::vector<Lane> lanes = {{&forms.exact, exact_class_.FullCuts()}};
  for (size_t i = 0; i < settings_.size(); ++i) {
    const size_t of = source_of_[i];
    lanes.push_back({IsExact(of) ? &forms.exact : &forms.read[of], settings_[i].read});
  }
  if (!in_class_) return lanes;
  for (size_t i = 0; i < settings_.size(); ++i) {
    const size_t of = source_of_[i];
    if (HasClassForm(of)) lanes.push_back({&forms.in_class[of], settings_[i].read});
  }
  return lanes;
}

std::vector<FormMeasures*> Evaluator::MeasuresOfLanes() {
  std::vector<FormMeasures*> measures = {&measures_.exact};
  for (FormMeasures& of_setting : measures_.read) measures.push_back(&of_setting);
  for (size_t i = 0; i < measures_.in_class.size(); ++i) {
    if (HasClassForm(source_of_[i])) measures.push_back(&measures_.in_class[i]);
  }
  return measures;
}

template <typename Copy>
void Evaluator::CopyExactClasses(const Copy& copy) {
  for (size_t i = 0; i < measures_.in_class.size(); ++i) {
    if (IsExact(source_of_[i])) copy(measures_.read[i], &measures_.in_class[i]);
  }
}

Status Evaluator::RunSuffix(std::span<const Lane> lanes, std::span<const int32_t> tokens,
                            const LogitsVisitor& visit) {
  std::vector<EncodedBlocks> own(lanes.size(), EncodedBlocks(&suffix_class_));
  for (size_t at = 0; at < tokens.size(); at += kBlockTokens) {
    const auto block = tokens.subspan(at, std::min<size_t>(kBlockTokens, tokens.size() - at));
    for (size_t lane = 0; lane < lanes.size(); ++lane) {
      EvalPast past(lanes[lane].prefix, lanes[lane].read, &own[lane]);
      float* logits = lane == 0 ? exact_logits_.data() : logits_.data();
      // The last block is nobody's past, and may be too short for one.
      const bool keep = at + block.size() < tokens.size();
      if (keep) own[lane].Begin();
      KV_RETURN_IF_ERROR(decoder_.Prefill(
          {block, past.tokens(), &past},
          [&](int layer, const float* keys, const float* values) {
            if (keep) own[lane].EncodeLayer(layer, keys, values);
            return OkStatus();
          },
          logits));
      if (keep) own[lane].Finish();
      KV_RETURN_IF_ERROR(visit(lane, at, static_cast<int>(block.size()), logits));
    }
  }
  return OkStatus();
}

Status Evaluator::MeasureSuffix(std::span<const Lane> lanes, std::span<const int32_t> suffix,
                                std::vector<SuffixMeasure>* out) {
  const int vocab = model_.config().vocab;
  for (SuffixMeasure& measure : *out) measure.kl.resize(suffix.size());
  ReferenceRows reference;
  const auto visit = [&](size_t lane, size_t at, int rows, const float* logits) -> Status {
    KV_ASSIGN_OR_RETURN(const std::vector<double> log_sums, LogSums(logits, rows, vocab, pool_));
    if (lane == 0) reference.Set(logits, log_sums, vocab, pool_);
    SuffixMeasure& measure = (*out)[lane];
    uint8_t agree[kBlockTokens] = {};
    reference.Compare(logits, log_sums, pool_, measure.kl.data() + at, agree);
    for (size_t row = 0; row < log_sums.size(); ++row) {
      measure.agreement += agree[row];
      const size_t target = at + row + 1;
      if (target == suffix.size()) break;
      const size_t token = static_cast<size_t>(suffix[target]);
      measure.loss += log_sums[row] - logits[row * static_cast<size_t>(vocab) + token];
    }
    return OkStatus();
  };
  KV_RETURN_IF_ERROR(RunSuffix(lanes, suffix, visit));
  for (SuffixMeasure& measure : *out) {
    measure.agreement = Mean(measure.agreement, suffix.size());
    measure.loss = Mean(measure.loss, suffix.size() - 1);
  }
  return OkStatus();
}

Status Evaluator::MeasureCopy(std::span<const Lane> lanes, std::span<const int32_t> copy,
                              std::vector<SuffixMeasure>* out) {
  const int vocab = model_.config().vocab;
  const auto visit = [&](size_t lane, size_t at, int rows, const float* logits) -> Status {
    KV_ASSIGN_OR_RETURN(const std::vector<double> log_sums, LogSums(logits, rows, vocab, pool_));
    for (size_t row = 0; row < log_sums.size(); ++row) {
      const size_t target = at + row + 1;
      if (target < kCopyUncounted || target >= copy.size()) continue;
      const size_t token = static_cast<size_t>(copy[target]);
      (*out)[lane].copy_loss += log_sums[row] - logits[row * static_cast<size_t>(vocab) + token];
    }
    return OkStatus();
  };
  KV_RETURN_IF_ERROR(RunSuffix(lanes, copy, visit));
  for (size_t lane = 0; lane < lanes.size(); ++lane) {
    (*out)[lane].copy_loss = Mean((*out)[lane].copy_loss, copy.size() - kCopyUncounted);
  }
  return OkStatus();
}

Status Evaluator::AddWindow(const EvalWindow& window) {
  KV_CHECK(window.copy.size() > kCopyUncounted && window.suffix.size() >= 2);
  KV_ASSIGN_OR_RETURN(const Forms forms, ComputeForms(window.prefix));
  std::vector<Lane> lanes = LanesOf(forms);
  const std::vector<FormMeasures*> measures = MeasuresOfLanes();
  const size_t compared = lanes.size();

  EncodedBlocks zeroed(&exact_class_);
  for (int block = 0; block < forms.exact.blocks(); ++block) zeroed.AppendZeros();
  lanes.push_back({&zeroed, exact_class_.FullCuts()});
  EncodedBlocks stranger(&exact_class_);
  if (!window.stranger.empty()) {
    KV_RETURN_IF_ERROR(PrefillBlocks(&decoder_, window.stranger, &stranger, {}));
    lanes.push_back({&stranger, exact_class_.FullCuts()});
  }

  std::vector<SuffixMeasure> made(lanes.size());
  KV_RETURN_IF_ERROR(MeasureSuffix(lanes, window.suffix, &made));
  KV_RETURN_IF_ERROR(MeasureCopy(std::span(lanes).first(compared), window.copy, &made));
  for (size_t lane = 0; lane < compared; ++lane) {
    measures[lane]->windows.push_back(std::move(made[lane]));
  }
  CopyExactClasses([](const FormMeasures& from, FormMeasures* to) {
    to->windows.push_back(from.windows.back());
  });
  measures_.zeroed_loss.push_back(made[compared].loss);
  auto& stranger_loss = measures_.stranger_loss.emplace_back();
  if (!window.stranger.empty()) stranger_loss = made[compared + 1].loss;

  for (size_t i = 0; i < settings_.size(); ++i) {
    measures_.coded_bits[i].push_back(forms.coded_bits[source_of_[i]]);
  }
  if (measures_.manifest_bytes.empty()) {
    for (const size_t of : source_of_) {
      const EncodedBlocks& blocks = IsExact(of) ? forms.exact : forms.read[of];
      const double bytes = sources_[of].coder != nullptr
                               ? forms.coded_manifest_bytes[of]
                               : static_cast<double>(blocks.ManifestBytes(window.prefix));
      measures_.manifest_bytes.push_back(bytes / blocks.blocks());
    }
  }
  return OkStatus();
}

Status Evaluator::AddPasskey(const PasskeyPrompt& prompt) {
  const std::span<const int32_t> tokens(prompt.tokens);
  const size_t asked = tokens.size() - static_cast<size_t>(prompt.answer_tokens);
  KV_CHECK(prompt.answer_tokens > 0 && asked > 0);
  // As every prompt is cut: whole blocks but for the last 1 to 64 tokens of the question.
  const size_t shared = (asked - 1) / kBlockTokens * kBlockTokens;
  KV_ASSIGN_OR_RETURN(const Forms forms, ComputeForms(tokens.first(shared)));
  const std::vector<Lane> lanes = LanesOf(forms);
  const auto vocab = static_cast<size_t>(model_.config().vocab);
  std::vector<double> right(lanes.size(), 1.0);
  // Right if each token of the answer is the most likely one after those before it, so that greedy
  // decoding would give it.
  KV_RETURN_IF_ERROR(RunSuffix(
      lanes, tokens.subspan(shared), [&](size_t lane, size_t at, int rows, const float* logits) {
        for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
          const size_t target = shared + at + row + 1;
          if (target < asked || target >= tokens.size()) continue;
          if (ArgMax(logits + row * vocab, vocab) != static_cast<size_t>(tokens[target])) {
            right[lane] = 0.0;
          }
        }
        return OkStatus();
      }));
  const std::vector<FormMeasures*> measures = MeasuresOfLanes();
  for (size_t lane = 0; lane < lanes.size(); ++lane) {
    measures[lane]->passkeys.push_back(right[lane]);
  }
  CopyExactClasses([](const FormMeasures& from, FormMeasures* to) {
    to->passkeys.push_back(from.passkeys.back());
  });
  measures_.places.push_back({prompt.length, prompt.depth});
  return OkStatus();
}

}  // namespace kvant::node
