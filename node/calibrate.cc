#include "node/calibrate.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <iterator>
#include <optional>
#include <string_view>
#include <thread>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/random.h"
#include "kernels/blas.h"
#include "kernels/dense_algebra.h"
#include "kernels/float_formats.h"
#include "kernels/implementation.h"
#include "kernels/raw_codec.h"
#include "kernels/thread_pool.h"
#include "node/attention_weights.h"
#include "node/eval_measure.h"
#include "node/eval_past.h"
#include "node/eval_text.h"
#include "node/klt.h"
#include "node/klt_fit.h"
#include "node/klt_importance.h"
#include "node/klt_pack.h"
#include "node/klt_weights.h"
#include "node/requests.h"

namespace kvant::node {
namespace {

using kernels::Matrix;

constexpr double kFloor = 0.03;  // of a weight's mean, added to all directions: none is free
constexpr size_t kWeighed =
    32;                     // texts of which attention is looked at, about; every other at most
constexpr int kProbes = 3;  // texts that noise is put into, or one more
constexpr int kProbeSuffix = 64;      // tokens behind them, whose KL is measured
constexpr double kProbeNoise = 0.01;  // of the state's square
constexpr size_t kMinWindows = 8;
// Steps that are measured, in that which a pack is fitted at.
constexpr float kTried[] = {0.125F, 0.25F, 0.5F, 1.0F, 2.0F, 4.0F, 8.0F};
constexpr float kSinkStep = 2.0F;    // of sinks, in that step
constexpr float kSourceStep = 2.0F;  // at which sources are coded for the fit of what they predict
constexpr float kLeast = 1.0F / 64;  // deviation of a coefficient that is kept
// Names of cuts, and the mean KL that each aims at.
constexpr std::pair<std::string_view, double> kCuts[] = {
    {"finest", 1e-4}, {"fine", 1e-3}, {"medium", 5e-3}, {"coarse", 1.5e-2}};
// What a step costs grows about with its square. Those found too dear are aimed a little lower, at
// most so many times.
constexpr double kStepPower = 0.5;
constexpr double kFinerStill = 0.98;
constexpr int kMostFinishes = 3;
// Those that a block may hold together.
constexpr std::string_view kRefining[] = {"coarse", "fine", "finest"};

// Rows of a sequence's whole blocks.
using Sequence = std::vector<KltCoder::Rows>;
// What enters the first layer that is not recomputed, of those blocks: [block][transform].
using Entering = std::vector<std::vector<std::vector<float>>>;

class Calibrator {
 public:
  Calibrator(const Model* model, kernels::ThreadPool* pool, const CalibrateOptions& options)
      : model_(*model),
        config_(model->config()),
        pool_(pool),
        options_(options),
        state_(config_.StateShape(1)),
        width_(StateWidth(config_)),
        key_width_(state_.keys.kv_heads * state_.keys.head_dim),
        // Were every coefficient rounded to the nearest, it would cost 2.5e-3 nats; most are 0.
        step_(static_cast<float>(std::sqrt(0.03 / (width_ * config_.layers)))),
        exact_class_(model, &kernels::kRawBf16Codec, {}),
        suffix_class_(model, &kernels::kRawFp32Codec, {}),
        decoder_(model, pool),
        random_(options.seed),
        attention_(model, options.seed) {}

  // Once.
  Result<KltPack> Run();
  int tokens() const { return static_cast<int>(fit_.blocks()) * kBlockTokens; }

 private:
  // A text that only the scales of layers are taken from, to measure on.
  struct Probe {
    std::vector<int32_t> prefix;
    std::vector<int32_t> suffix;
    Sequence exact;
    Entering entering;
  };
  // What a prefix costs at some cuts.
  struct Point {
    double bits = 0;  // an element
    double mean_kl = 0;
  };

  // Computes a sequence of whole blocks; its rows, and, if `weigh`, what weights are made of.
  Result<Sequence> Capture(std::span<const int32_t> tokens, bool weigh, Entering* entering);
  // Of the sequence that attention_ has.
  void NoteImportance(const Sequence& rows);
  Status FitImportances();
  Status SetTransforms();
  Status Collect();
  // Mean KL of a suffix behind each of `forms` of a prefix, against its exact one.
  Result<std::vector<double>> Kl(std::span<const int32_t> suffix, const Sequence& exact,
                                 std::span<const Sequence> forms);
  EncodedBlocks Encoded(const Sequence& rows);
  std::vector<int8_t> Finer(const Sequence& rows, int layer) const;
  Status ScaleWeights();
  Status ReadWeights();
  void AddFloors();
  // Of cuts of a transform, as of KltCoder.
  Result<std::vector<Point>> Measure(size_t transform, std::span<const std::vector<size_t>> cuts);
  Status ChooseCuts(size_t transform);
  Status FinishCuts(size_t transform);
  // Encodes a probe and decodes it; adds to *bytes.
  Result<Sequence> Coded(const KltCoder& coder, const Probe& probe, double* bytes) const;
  static void Tell(const std::string& what, const Point& point) {
    std::fprintf(stderr, "kvant: %s: %.3f bits an element, mean KL %.2e\n", what.c_str(),
                 point.bits, point.mean_kl);
  }
  void Say(const char* what) {
    std::fprintf(stderr, "kvant: %s, %.0f s so far\n", what, Seconds(SteadyClock().Now() - begun_));
  }

  const Model& model_;
  const ModelConfig& config_;
  kernels::ThreadPool* pool_;
  const CalibrateOptions& options_;
  kernels::LayerShape state_;
  int width_;
  int key_width_;
  float step_;  // that the pack is made at
  BlockClass exact_class_;
  BlockClass suffix_class_;
  Decoder decoder_;
  Random random_;
  TimePoint begun_ = SteadyClock().Now();

  std::vector<Probe> probes_;
  AttentionWeights attention_;
  // [layer][width][width]: an error x in every row costs x^T weight x nats a token behind them,
  // once ScaleWeights was called.
  std::vector<Matrix> weights_;
  KltPack pack_;
  // Of tokens whose attention was looked at.
  std::vector<float> features_;                              // [tokens][layers][2]
  std::vector<float> felt_;                                  // [tokens][layers]
  std::vector<std::vector<std::vector<float>>> importance_;  // [transform][group], as in KltBasis
  KltFit fit_{&model_, pool_, &pack_};
};

Result<Sequence> Calibrator::Capture(std::span<const int32_t> tokens, bool weigh,
                                     Entering* entering) {
  const auto layers = static_cast<size_t>(config_.layers);
  Sequence rows;
  if (weigh) attention_.Begin();
  EncodedBlocks exact(&exact_class_);
  EvalPast past(&exact, exact_class_.FullCuts(), nullptr);
  for (size_t at = 0; at < tokens.size(); at += kBlockTokens) {
    const int position = static_cast<int>(at);
    KltCoder::Rows& block =
        rows.emplace_back(layers, std::vector<float>(static_cast<size_t>(kBlockTokens * width_)));
    exact.Begin();
    const QuerySink queries = [&](int layer, const float* q) {
      if (weigh) attention_.AddQueries(layer, q);
    };
    auto& of_block = entering->emplace_back();
    const EnteringSink enter = [&](int layer, const float* x) {
      for (const KltTransform& transform : pack_.transforms) {
        if (transform.recomputed == layer)
          of_block.emplace_back(x, x + static_cast<ptrdiff_t>(kBlockTokens) * config_.hidden);
      }
    };
    KV_RETURN_IF_ERROR(decoder_.Prefill(
        {tokens.subspan(at, kBlockTokens), position, &past, &queries, &enter},
        [&](int layer, const float* keys, const float* values) {
          const auto l = static_cast<size_t>(layer);
          exact.EncodeLayer(layer, keys, values);
          GatherState(model_, layer, position, kBlockTokens, keys, values, block[l].data());
          if (weigh) attention_.AddState(layer, keys, values);
          return OkStatus();
        },
        nullptr));
    exact.Finish();
  }
  if (weigh) {
    attention_.End();
    NoteImportance(rows);
  }
  return rows;
}

void Calibrator::NoteImportance(const Sequence& rows) {
  const auto layers = static_cast<size_t>(config_.layers);
  for (size_t token = 0; token < rows.size() * kBlockTokens; ++token) {
    const KltCoder::Rows& block = rows[token / kBlockTokens];
    const size_t at = token % kBlockTokens * static_cast<size_t>(width_);
    for (size_t l = 0; l < layers; ++l) {
      const std::vector<float> features =
          ImportanceFeatures(config_, std::span(block[l]).subspan(at, static_cast<size_t>(width_)));
      features_.insert(features_.end(), features.begin(), features.end());
      felt_.push_back(attention_.importance(static_cast<int>(l))[token]);
    }
  }
}

Status Calibrator::FitImportances() {
  const auto layers = static_cast<size_t>(config_.layers);
  for (const KltTransform& transform : pack_.transforms) {
    std::vector<std::vector<float>>& of_transform = importance_.emplace_back();
    for (const KltGroup& group : transform.groups) {
      ImportanceSamples samples;
      samples.features = 2 * group.layers.size();
      for (size_t at = 0; at < felt_.size(); at += layers) {
        float sum = 0;
        bool known = true;
        for (const int layer : group.layers) {
          const float felt = felt_[at + static_cast<size_t>(layer)];
          known = known && felt > 0;
          sum += felt;
        }
        if (!known) continue;
        samples.y.push_back(sum / static_cast<float>(group.layers.size()));
        for (const int layer : group.layers) {
          for (size_t part = 0; part < 2; ++part)
            samples.x.push_back(features_[2 * (at + static_cast<size_t>(layer)) + part]);
        }
      }
      KV_ASSIGN_OR_RETURN(of_transform.emplace_back(), FitImportance(samples));
    }
  }
  return OkStatus();
}

EncodedBlocks Calibrator::Encoded(const Sequence& rows) {
  EncodedBlocks blocks(&suffix_class_);
  std::vector<float> keys(static_cast<size_t>(kBlockTokens * key_width_));
  std::vector<float> values(static_cast<size_t>(kBlockTokens * (width_ - key_width_)));
  for (size_t block = 0; block < rows.size(); ++block) {
    blocks.Begin();
    for (int layer = 0; layer < config_.layers; ++layer) {
      ScatterState(model_, layer, static_cast<int>(block) * kBlockTokens, kBlockTokens,
                   rows[block][static_cast<size_t>(layer)].data(), keys.data(), values.data());
      blocks.EncodeLayer(layer, keys.data(), values.data());
    }
    blocks.Finish();
  }
  return blocks;
}

Result<std::vector<double>> Calibrator::Kl(std::span<const int32_t> suffix, const Sequence& exact,
                                           std::span<const Sequence> forms) {
  const int vocab = config_.vocab;
  std::vector<double> sums(forms.size());
  std::vector<EncodedBlocks> lanes;
  lanes.push_back(Encoded(exact));
  for (const Sequence& form : forms) lanes.push_back(Encoded(form));
  std::vector<EncodedBlocks> own(lanes.size(), EncodedBlocks(&suffix_class_));
  std::vector<float> exact_logits(static_cast<size_t>(kBlockTokens) * static_cast<size_t>(vocab));
  std::vector<float> logits(exact_logits.size());
  ReferenceRows reference;
  for (size_t at = 0; at < suffix.size(); at += kBlockTokens) {
    const auto block = suffix.subspan(at, std::min<size_t>(kBlockTokens, suffix.size() - at));
    const bool keep = at + block.size() < suffix.size();
    for (size_t lane = 0; lane < lanes.size(); ++lane) {
      EvalPast past(&lanes[lane], suffix_class_.FullCuts(), &own[lane]);
      if (keep) own[lane].Begin();
      float* to = lane == 0 ? exact_logits.data() : logits.data();
      KV_RETURN_IF_ERROR(decoder_.Prefill(
          {block, past.tokens(), &past},
          [&](int layer, const float* keys, const float* values) {
            if (keep) own[lane].EncodeLayer(layer, keys, values);
            return OkStatus();
          },
          to));
      if (keep) own[lane].Finish();
      const int rows = static_cast<int>(block.size());
      KV_ASSIGN_OR_RETURN(const std::vector<double> log_sums, LogSums(to, rows, vocab, pool_));
      if (lane == 0) {
        reference.Set(to, log_sums, vocab, pool_);
        continue;
      }
      float kl[kBlockTokens];
      uint8_t agree[kBlockTokens];
      reference.Compare(to, log_sums, pool_, kl, agree);
      for (int row = 0; row < rows; ++row) sums[lane - 1] += static_cast<double>(kl[row]);
    }
  }
  for (double& sum : sums) sum /= static_cast<double>(suffix.size());
  return sums;
}

Status Calibrator::Collect() {
  const int room = std::min(options_.length, config_.max_positions) / kBlockTokens * kBlockTokens;
  std::vector<EvalWindow> windows;
  for (const std::string& file : options_.texts) {
    KV_ASSIGN_OR_RETURN(const EvalText text, EvalText::Load(file, &model_.tokenizer()));
    const int share = options_.tokens / static_cast<int>(options_.texts.size());
    const int count = std::min(std::max(1, share / room), text.tokens() / (room + kProbeSuffix));
    if (count == 0) continue;
    KV_ASSIGN_OR_RETURN(std::vector<EvalWindow> cut,
                        text.Windows({room, kProbeSuffix, count, options_.seed}));
    std::move(cut.begin(), cut.end(), std::back_inserter(windows));
  }
  if (windows.size() < kMinWindows) {
    return InvalidArgument(
        "the texts give {} sequences of {} tokens, calibration needs {} at least: give more text, "
        "or a smaller --length",
        windows.size(), room, kMinWindows);
  }
  const size_t probe_every = windows.size() / kProbes;
  const size_t weigh_every = std::max<size_t>(2, windows.size() / kWeighed);
  for (size_t i = 0; i < windows.size(); ++i) {
    EvalWindow& window = windows[i];
    const bool probe = i % probe_every == probe_every / 2;
    const bool weigh = !probe && i % weigh_every == 0;
    Entering entering;
    KV_ASSIGN_OR_RETURN(Sequence rows, Capture(window.prefix, weigh, &entering));
    if (probe) {
      probes_.push_back({std::move(window.prefix), std::move(window.suffix), std::move(rows),
                         std::move(entering)});
      continue;
    }
    for (size_t b = 0; b < rows.size(); ++b)
      fit_.Add(static_cast<int>(b) * kBlockTokens, entering[b], rows[b]);
    if (i % 10 == 9) Say(fmt::format("{} of {} texts computed", i + 1, windows.size()).c_str());
  }
  return OkStatus();
}

// So that no direction is free: a share of the mean weight of keys, or of values.
void Calibrator::AddFloors() {
  const int parts[] = {0, key_width_, width_};
  for (Matrix& weight : weights_) {
    for (int part = 0; part < 2; ++part) {
      double trace = 0;
      const int size = parts[part + 1] - parts[part];
      for (int c = parts[part]; c < parts[part + 1]; ++c) trace += weight.At(c, c);
      for (int c = parts[part]; c < parts[part + 1]; ++c) weight.At(c, c) += kFloor * trace / size;
    }
  }
}

Status Calibrator::ReadWeights() {
  KV_ASSIGN_OR_RETURN(KltWeights read, LoadKltWeights(options_.weights, config_.layers, width_));
  weights_ = std::move(read.layers);
  AddFloors();
  pack_.weighed_by = fmt::format(
      "{}, made on {}", std::filesystem::path(options_.weights).filename().string(), read.made_on);
  return OkStatus();
}

// Of each token, in a layer's group.
std::vector<int8_t> Calibrator::Finer(const Sequence& rows, int layer) const {
  const std::vector<KltGroup>& groups = pack_.transforms[0].groups;
  size_t g = 0;
  while (std::find(groups[g].layers.begin(), groups[g].layers.end(), layer) ==
         groups[g].layers.end())
    ++g;
  std::vector<int8_t> finer;
  const auto width = static_cast<size_t>(width_);
  for (const KltCoder::Rows& block : rows) {
    for (size_t at = 0; at < kBlockTokens * width; at += width) {
      std::vector<float> together;
      for (const int of : groups[g].layers) {
        const auto from = block[static_cast<size_t>(of)].begin() + static_cast<ptrdiff_t>(at);
        together.insert(together.end(), from, from + width_);
      }
      finer.push_back(FinerOf(importance_[0][g], ImportanceFeatures(config_, together)));
    }
  }
  return finer;
}

Status Calibrator::ScaleWeights() {
  const auto layers = static_cast<size_t>(config_.layers);
  const int parts[] = {0, key_width_, width_};
  std::vector<std::array<double, 2>> kl(layers, {0, 0});
  std::vector<std::array<double, 2>> noise(layers, {0, 0});  // weighted square of what was added
  for (size_t probe = 0; probe < probes_.size(); ++probe) {
    const Sequence& exact = probes_[probe].exact;
    for (size_t l = 0; l < layers; ++l) {
      const std::vector<int8_t> finer_of = Finer(exact, static_cast<int>(l));
      std::vector<Sequence> forms(2, exact);
      for (int part = 0; part < 2; ++part) {
        const int first = parts[part];
        const int size = parts[part + 1] - first;
        Matrix block(size, size);
        for (int a = 0; a < size; ++a) {
          for (int b = 0; b < size; ++b) block.At(a, b) = weights_[l].At(first + a, first + b);
        }
        KV_ASSIGN_OR_RETURN(const kernels::Eigen eigen, kernels::SymmetricEigen(block));
        // Noise of about one percent of the state's own square.
        double own = 0;
        for (const KltCoder::Rows& rows : exact) {
          for (int i = first; i < kBlockTokens * width_; i += width_) {
            for (int c = 0; c < size; ++c) own += std::pow(rows[l][static_cast<size_t>(i + c)], 2);
          }
        }
        double inverse = 0;
        for (const double value : eigen.values) inverse += 1 / std::max(value, 1e-30);
        const double step = std::sqrt(kProbeNoise * own /
                                      static_cast<double>(exact.size() * kBlockTokens) / inverse);
        Sequence& form = forms[static_cast<size_t>(part)];
        for (size_t b = 0; b < form.size(); ++b) {
          for (int token = b == 0 ? kKltSinks : 0; token < kBlockTokens; ++token) {
            float* row = form[b][l].data() + static_cast<ptrdiff_t>(token) * width_ + first;
            const auto finer = finer_of[b * kBlockTokens + static_cast<size_t>(token)];
            const double own_step = step * std::exp2(-0.5 * finer);
            for (int i = 0; i < size; ++i) {
              const double by = own_step * random_.Normal() /
                                std::sqrt(std::max(eigen.values[static_cast<size_t>(i)], 1e-30));
              for (int c = 0; c < size; ++c)
                row[c] += static_cast<float>(by * eigen.vectors.At(i, c));
            }
          }
        }
        noise[l][static_cast<size_t>(part)] += step * step * size;
      }
      KV_ASSIGN_OR_RETURN(const std::vector<double> found, Kl(probes_[probe].suffix, exact, forms));
      for (size_t part = 0; part < 2; ++part) kl[l][part] += found[part];
    }
    Say("probed");
  }
  for (size_t l = 0; l < layers; ++l) {
    double scale[2];
    for (size_t part = 0; part < 2; ++part) {
      scale[part] = std::sqrt(std::max(kl[l][part], 1e-12) / noise[l][part]);
    }
    spdlog::debug("layer {}: noise of {:.2e} and {:.2e} costs {:.2e} and {:.2e} nats", l,
                  noise[l][0], noise[l][1], kl[l][0], kl[l][1]);
    for (int a = 0; a < width_; ++a) {
      for (int b = 0; b < width_; ++b) {
        weights_[l].At(a, b) *= scale[a < key_width_ ? 0 : 1] * scale[b < key_width_ ? 0 : 1];
      }
    }
  }
  return OkStatus();
}

Result<Sequence> Calibrator::Coded(const KltCoder& coder, const Probe& probe, double* bytes) const {
  const Sequence& exact = probe.exact;
  const auto transform = static_cast<size_t>(&coder.transform() - pack_.transforms.data());
  Sequence made = exact;  // of the layers that are not coded
  std::vector<Status> status(exact.size());
  std::vector<size_t> size(exact.size());
  pool_->ParallelFor(static_cast<int>(exact.size()), [&](int piece) {
    const auto b = static_cast<size_t>(piece);
    const KltSide side = KltSide::OfEntering(&coder, probe.entering[b][transform]);
    const int position = piece * kBlockTokens;
    KltCoder::Extents extents;
    coder.Encode(side, position, exact[b], &extents);
    KltReader reader(&coder, side, position);
    for (size_t group = 0; group < coder.groups() && status[b].ok(); ++group) {
      std::vector<std::span<const std::byte>> of_group;
      for (const auto& of_cut : extents) {
        of_group.emplace_back(of_cut[group]);
        size[b] += of_cut[group].size();
      }
      status[b] = reader.Read(group, of_group, &made[b]);
    }
  });
  for (size_t b = 0; b < exact.size(); ++b) {
    KV_RETURN_IF_ERROR(status[b]);
    *bytes += static_cast<double>(size[b]);
  }
  return made;
}

Result<std::vector<Calibrator::Point>> Calibrator::Measure(
    size_t transform, std::span<const std::vector<size_t>> cuts) {
  std::vector<Point> points(cuts.size());
  double elements = 0;
  for (const Probe& probe : probes_) {
    std::vector<Sequence> forms;
    for (size_t i = 0; i < cuts.size(); ++i) {
      const KltCoder coder(&model_, &pack_, cuts[i], transform);
      KV_ASSIGN_OR_RETURN(Sequence form, Coded(coder, probe, &points[i].bits));
      forms.push_back(std::move(form));
    }
    KV_ASSIGN_OR_RETURN(const std::vector<double> found, Kl(probe.suffix, probe.exact, forms));
    for (size_t i = 0; i < cuts.size(); ++i)
      points[i].mean_kl += found[i] / static_cast<double>(probes_.size());
    elements += static_cast<double>(probe.prefix.size()) * config_.layers * width_;
  }
  for (Point& point : points) point.bits *= 8 / elements;
  return points;
}

// Measures steps around the one that the pack was made at, and takes those that cost what is aimed
// at, between them as powers of each other.
Status Calibrator::ChooseCuts(size_t transform) {
  std::vector<KltCut>& tried = pack_.transforms[transform].cuts;
  std::vector<std::vector<size_t>> each;
  for (size_t i = 0; i < tried.size(); ++i) each.push_back({i});
  KV_ASSIGN_OR_RETURN(const std::vector<Point> points, Measure(transform, each));
  for (size_t i = 0; i < points.size(); ++i)
    Tell(fmt::format("step {:.4g}", tried[i].step), points[i]);
  const auto step_for = [&](double aim) -> std::optional<float> {
    // What was not measured on both sides is not said.
    if (aim < points.front().mean_kl || aim > points.back().mean_kl) return std::nullopt;
    size_t i = 1;
    while (points[i].mean_kl < aim) ++i;
    const double low = std::log(std::max(points[i - 1].mean_kl, 1e-12));
    const double high = std::log(std::max(points[i].mean_kl, 1e-12));
    const double share = high > low ? (std::log(aim) - low) / (high - low) : 0.5;
    return static_cast<float>(std::pow(tried[i - 1].step, 1 - share) *
                              std::pow(tried[i].step, share));
  };
  std::vector<KltCut> cuts;
  for (const auto& [name, aim] : kCuts) {
    std::optional<float> step = step_for(aim);
    if (transform > 0) {
      // The same cuts as of the first one; with a step of its own, if that was found.
      const Result<size_t> first = pack_.FindCut(name);
      if (!first.ok()) continue;
      step = step.value_or(pack_.cuts()[*first].step);
      if (!cuts.empty()) step = std::max(*step, 1.01F * cuts.back().step);
    }
    if (!step.has_value() || (!cuts.empty() && *step <= cuts.back().step)) continue;
    cuts.push_back({std::string(name), *step, static_cast<float>(aim)});
  }
  if (cuts.empty()) {
    return InvalidArgument(
        "{}: no step between {:.2g} and {:.2g} costs from {} to {} nats: is this a trained model?",
        options_.model, tried.front().step, tried.back().step, kCuts[0].second,
        kCuts[std::size(kCuts) - 1].second);
  }
  tried = std::move(cuts);
  return OkStatus();
}

// Makes steps that cost more than what they were made for finer. Returns whether there were any.
bool MakeFiner(std::vector<KltCut>* cuts) {
  bool any = false;
  for (size_t i = 0; i < cuts->size(); ++i) {
    KltCut& cut = (*cuts)[i];
    for (const auto& [name, aim] : kCuts) {
      if (name != cut.name || static_cast<double>(cut.mean_kl) <= aim) continue;
      const double by = kFinerStill * std::pow(aim / static_cast<double>(cut.mean_kl), kStepPower);
      const float least = i == 0 ? 0.0F : 1.01F * (*cuts)[i - 1].step;
      const float step = std::max(static_cast<float>(by) * cut.step, least);
      any = any || step < cut.step;
      cut.step = std::min(cut.step, step);
    }
  }
  return any;
}

// What the cuts cost in the end, each alone and as refinements. What costs more than it should is
// made finer, and all is measured again.
Status Calibrator::FinishCuts(size_t transform) {
  std::vector<KltCut>& cuts = pack_.transforms[transform].cuts;
  std::vector<std::vector<size_t>> chains;
  for (size_t cut = 0; cut < cuts.size(); ++cut) chains.push_back({cut});
  for (size_t count = 2; count <= pack_.refining.size(); ++count)
    chains.emplace_back(pack_.refining.begin(),
                        pack_.refining.begin() + static_cast<ptrdiff_t>(count));
  for (int round = 0;; ++round) {
    KV_ASSIGN_OR_RETURN(const std::vector<Point> points, Measure(transform, chains));
    for (size_t i = 0; i < chains.size(); ++i) {
      KltCut& cut = cuts[chains[i].back()];
      Tell(chains[i].size() == 1 ? cut.name : cut.name + ", refined", points[i]);
      // What is declared holds for both.
      const auto found = static_cast<float>(points[i].mean_kl);
      cut.mean_kl = chains[i].size() == 1 ? found : std::max(cut.mean_kl, found);
    }
    if (round == kMostFinishes || !MakeFiner(&cuts)) return OkStatus();
  }
}

Status Calibrator::SetTransforms() {
  pack_.transforms.push_back({0, KltGroups(config_, 0, pack_.group_width), {}, {}});
  std::vector<int> recompute = options_.recompute;
  if (recompute == std::vector<int>{-1}) recompute = {config_.layers / 3};
  for (const int layers : recompute) {
    if (layers == 0 && recompute.size() == 1) break;
    if (layers <= pack_.transforms.back().recomputed || layers >= config_.layers - 1) {
      return InvalidArgument(
          "--recompute {}: give ascending numbers of layers from 1 to {}, or 0 for none",
          fmt::join(recompute, ","), config_.layers - 2);
    }
    pack_.transforms.push_back({layers, KltGroups(config_, layers + 1, pack_.group_width), {}, {}});
  }
  return OkStatus();
}

Result<KltPack> Calibrator::Run() {
  pack_.width = width_;
  pack_.hidden = config_.hidden;
  pack_.layers = config_.layers;
  pack_.group_width = options_.group_width;
  KV_RETURN_IF_ERROR(SetTransforms());
  pack_.model = ToHex(model_.digest());
  // First, so that a wrong file of weights is found before the work.
  if (!options_.weights.empty()) KV_RETURN_IF_ERROR(ReadWeights());
  KV_RETURN_IF_ERROR(Collect());
  Say("collected");
  KV_RETURN_IF_ERROR(FitImportances());
  if (options_.weights.empty()) {
    for (int l = 0; l < config_.layers; ++l) weights_.push_back(attention_.sum(l));
    AddFloors();
    pack_.weighed_by = "attention";
  }
  KV_RETURN_IF_ERROR(ScaleWeights());
  std::vector<std::string> names;
  for (const std::string& file : options_.texts)
    names.push_back(std::filesystem::path(file).filename().string());
  pack_.calibrated_on = fmt::format("{} tokens of {}", tokens(), fmt::join(names, ", "));
  for (const Matrix& weight : weights_) {
    std::vector<float>& rounded = pack_.weights.emplace_back();
    for (const double value : weight.values)
      rounded.push_back(kernels::FromBf16(kernels::ToBf16(static_cast<float>(value))));
  }
  pack_.sink_step = kSinkStep * step_;
  KV_RETURN_IF_ERROR(fit_.FitBases(importance_, kSourceStep * step_, kLeast * step_));
  Say("fitted the transforms");
  std::vector<KltCut> tried;
  std::vector<std::vector<size_t>> each;
  for (const float by : kTried) {
    each.push_back({tried.size()});
    tried.push_back({"", step_ * by, 0});
  }
  for (KltTransform& transform : pack_.transforms) transform.cuts = tried;
  fit_.Count(each, 0, kKltFirstTables);
  Say("counted levels");
  for (size_t t = 0; t < pack_.transforms.size(); ++t) {
    Say(fmt::format("trying steps with {} layers recomputed", pack_.transforms[t].recomputed)
            .c_str());
    KV_RETURN_IF_ERROR(ChooseCuts(t));
  }
  for (const std::string_view name : kRefining) {
    const Result<size_t> cut = pack_.FindCut(name);
    if (cut.ok()) pack_.refining.push_back(*cut);
  }
  if (pack_.refining.size() > 1) {
    const std::vector<std::vector<size_t>> whole = {pack_.refining};
    fit_.Count(whole, kKltFirstTables, kKltTables - kKltFirstTables);
  }
  for (size_t t = 0; t < pack_.transforms.size(); ++t) KV_RETURN_IF_ERROR(FinishCuts(t));
  Say("chose the cuts");
  KV_RETURN_IF_ERROR(SaveKltPack(options_.out, model_, &pack_));
  return std::move(pack_);
}

}  // namespace

Result<int> Calibrate(const CalibrateOptions& options) {
  KV_RETURN_IF_ERROR(CheckWritable(options.out));
  KV_RETURN_IF_ERROR(kernels::ChooseImplementation());
  KV_RETURN_IF_ERROR(kernels::LoadBlas());
  const int cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  kernels::ThreadPool pool(options.threads > 0 ? options.threads : cores);
  KV_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Load(options.model));
  Calibrator calibrator(model.get(), &pool, options);
  KV_ASSIGN_OR_RETURN(const KltPack pack, calibrator.Run());
  std::printf("%s: %.1f MB, made of %d tokens\n", options.out.c_str(),
              static_cast<double>(pack.file_bytes) / 1e6, calibrator.tokens());
  for (const KltTransform& transform : pack.transforms) {
    for (const KltCut& cut : transform.cuts) {
      std::printf("  %d layers recomputed, cut %-6s  step %.4g, mean KL %.1e\n",
                  transform.recomputed, cut.name.c_str(), static_cast<double>(cut.step),
                  static_cast<double>(cut.mean_kl));
    }
  }
  return 0;
}

}  // namespace kvant::node
