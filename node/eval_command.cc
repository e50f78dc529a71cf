#include "node/eval_command.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>
#include <utility>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/random.h"
#include "kernels/blas.h"
#include "kernels/implementation.h"
#include "kernels/raw_codec.h"
#include "node/eval_plot.h"
#include "node/eval_report.h"
#include "node/eval_set.h"
#include "node/eval_text.h"
#include "node/klt_pack.h"
#include "node/requests.h"

namespace kvant::node {
namespace {

using kernels::Codec;

int SumOfBits(const Codec& codec, int cuts) {
  int sum = 0;
  for (int cut = 0; cut < cuts; ++cut) sum += codec.bits_per_cut[cut];
  return sum;
}

// The fewest of `available` extents that hold `bits` bits an element, or all there are.
int CutsForBits(const Codec& codec, int available, int bits) {
  for (int cuts = 1; cuts < available; ++cuts) {
    if (SumOfBits(codec, cuts) >= bits) return cuts;
  }
  return available;
}

// "kNvM" as bits of keys and values.
std::optional<std::pair<int, int>> ParseBits(const std::string& wire) {
  int keys = 0;
  int values = 0;
  int read = 0;
  if (wire.size() > 6 || std::sscanf(wire.c_str(), "k%2dv%2d%n", &keys, &values, &read) != 2 ||
      read != static_cast<int>(wire.size()) || keys < 1 || values < 1) {
    return std::nullopt;
  }
  return std::pair(keys, values);
}

Result<Cuts> CutsOfWire(const BlockClass& block_class, const std::string& wire) {
  const Result<Wire> known = ParseWire(wire);
  if (known.ok() && *known != Wire::kAuto) return block_class.CutsOf(*known);
  const auto bits = ParseBits(wire);
  if (!bits.has_value()) {
    return InvalidArgument(
        "unknown wire '{}' for eval: use full, the name of a cut of klt or of a baseline's wire, "
        "or kNvM with bits of keys and values, e.g. k8v4, "
        "k4v4, k2v2",
        wire);
  }
  const Codec& codec = block_class.codec();
  return Cuts{CutsForBits(codec, block_class.FullCuts().keys, bits->first),
              CutsForBits(codec, block_class.FullCuts().values, bits->second)};
}

// The names of a codec's own cuts: in full, then fewer. Keys need more bits than values, so values
// are never read at a higher cut, nor at one that is far lower.
std::vector<std::string> OwnWires(const Codec& codec) {
  std::vector<std::string> wires = {std::string(WireName(Wire::kFull))};
  for (int keys = codec.key_cuts; keys >= 1; --keys) {
    for (int values = std::min(keys, codec.value_cuts); values >= std::max(keys - 1, 1); --values) {
      wires.push_back(fmt::format("k{}v{}", SumOfBits(codec, keys), SumOfBits(codec, values)));
    }
  }
  return wires;
}

Status UnknownCodec(const std::string& name) {
  std::string codecs;
  for (const Codec* codec : kernels::Codecs()) codecs += fmt::format("{}, ", codec->name);
  return InvalidArgument("unknown codec '{}': use {}or a baseline: {}", name, codecs,
                         fmt::join(StateCoderNames(), ", "));
}

Status AddCodec(const Model* model, const Codec* codec, const std::vector<std::string>& wires,
                EvalPlan* plan) {
  const bool known = std::any_of(plan->classes.begin(), plan->classes.end(),
                                 [&](const auto& other) { return &other->codec() == codec; });
  if (known) return OkStatus();
  const BlockClass& block_class =
      *plan->classes.emplace_back(std::make_unique<BlockClass>(model, codec, AsBytes("")));
  std::vector<Cuts> there;
  for (const std::string& wire : wires.empty() ? OwnWires(*codec) : wires) {
    KV_ASSIGN_OR_RETURN(const Cuts cuts, CutsOfWire(block_class, wire));
    if (std::find(there.begin(), there.end(), cuts) != there.end()) continue;
    there.push_back(cuts);
    plan->settings.push_back({&block_class, wire, cuts});
  }
  return OkStatus();
}

Status AddCoder(CoderContext* context, const std::string& name,
                const std::vector<std::string>& wires, const BlockClass* decoded, EvalPlan* plan) {
  const bool known = std::any_of(plan->coders.begin(), plan->coders.end(),
                                 [&](const auto& other) { return other->name() == name; });
  if (known) return OkStatus();
  KV_ASSIGN_OR_RETURN(std::unique_ptr<StateCoder> made, MakeStateCoder(name, context));
  const StateCoder& coder = *plan->coders.emplace_back(std::move(made));
  const std::vector<std::string> own = coder.wires();
  std::vector<bool> there(own.size(), wires.empty());
  for (const std::string& wire : wires) {
    const auto found = std::find(own.begin(), own.end(), wire);
    // Also says whether it is a wire at all.
    if (found == own.end()) KV_RETURN_IF_ERROR(CutsOfWire(*decoded, wire).status());
    there[found == own.end() ? 0 : static_cast<size_t>(found - own.begin())] = true;
  }
  for (size_t wire = 0; wire < own.size(); ++wire) {
    if (!there[wire]) continue;
    plan->settings.push_back({decoded, own[wire].substr(0, own[wire].find('@')),
                              decoded->FullCuts(), &coder, wire, coder.recomputed_layers(wire)});
  }
  return OkStatus();
}

// The file, or the folder of files, that is measured.
Result<std::filesystem::path> TextOf(const EvalOptions& options) {
  namespace fs = std::filesystem;
  if (!options.text.empty() && !options.texts.empty()) {
    return InvalidArgument("--text is one file and --texts a folder of them: give one of the two");
  }
  if (!options.texts.empty()) return fs::path(options.texts);
  if (!options.text.empty()) return fs::path(options.text);
  const fs::path model = options.model;
  std::error_code ignored;
  const fs::path held_out = model / "heldout.txt";
  if (fs::is_regular_file(held_out, ignored)) return held_out;
  if (fs::is_directory(model, ignored)) {
    return InvalidArgument(
        "{} has no heldout.txt: give a text that the model was not trained on with --text FILE",
        model.string());
  }
  return InvalidArgument(
      "a model file brings no text along: give one that the model was not trained on with --text "
      "FILE");
}

Status CheckSizes(const EvalOptions& options, const ModelConfig& config) {
  if (options.prefix < kBlockTokens || options.prefix % kBlockTokens != 0) {
    return InvalidArgument("--prefix {}: a prefix is whole blocks, so a multiple of {}",
                           options.prefix, kBlockTokens);
  }
  if (options.suffix < kMinEvalSuffix) {
    return InvalidArgument("--suffix {}: at least {} tokens are needed to measure anything",
                           options.suffix, kMinEvalSuffix);
  }
  const int positions = config.max_positions;
  if (options.prefix <= positions && options.suffix <= positions - options.prefix) {
    return OkStatus();
  }
  const int suffix = std::min(256, positions / 4);
  const int prefix = (positions - suffix) / kBlockTokens * kBlockTokens;
  if (prefix < kBlockTokens || suffix < kMinEvalSuffix) {
    return InvalidArgument("{}: a context of {} tokens is too short to have a prefix of {}",
                           options.model, positions, kBlockTokens);
  }
  return InvalidArgument(
      "{}: its context is {} tokens, --prefix {} and --suffix {} need {}; --prefix {} --suffix {} "
      "would fit",
      options.model, positions, options.prefix, options.suffix,
      int64_t{options.prefix} + options.suffix, prefix, suffix);
}

// One line on stderr for each step done, with the time that is left at this rate.
class Progress {
 public:
  void Start(const char* what, size_t steps) {
    what_ = what;
    steps_ = steps;
    done_ = 0;
    started_ = SteadyClock().Now();
  }
  void Step() {
    ++done_;
    const double taken = Seconds(SteadyClock().Now() - started_);
    std::fprintf(stderr, "kvant: %s %zu of %zu, %.0f s so far, about %.0f s to go\n", what_, done_,
                 steps_, taken,
                 taken / static_cast<double>(done_) * static_cast<double>(steps_ - done_));
  }

 private:
  const char* what_ = "";
  size_t steps_ = 0;
  size_t done_ = 0;
  TimePoint started_{};
};

// Computes pieces of the calibration texts exactly, as prefixes are.
Status VisitCalibration(const EvalOptions& options, const Model* model, kernels::ThreadPool* pool,
                        const std::function<void(const PrefixState&)>& visit) {
  const int suffix = kMinEvalSuffix;
  const int share = std::max(1, kCalibrationPieces / static_cast<int>(options.calibration.size()));
  std::vector<EvalWindow> windows;
  for (const std::string& file : options.calibration) {
    KV_ASSIGN_OR_RETURN(const EvalText text, EvalText::Load(file, &model->tokenizer()));
    const int pieces = std::clamp(text.tokens() / (options.prefix + suffix), 1, share);
    KV_ASSIGN_OR_RETURN(const std::vector<EvalWindow> of_file,
                        text.Windows({options.prefix, suffix, pieces, options.seed}));
    windows.insert(windows.end(), of_file.begin(), of_file.end());
  }
  const BlockClass exact(model, &kernels::kRawBf16Codec, {});
  Decoder decoder(model, pool);
  Progress progress;
  progress.Start("calibration piece", windows.size());
  for (const EvalWindow& window : windows) {
    EncodedBlocks blocks(&exact);
    PrefixState state(model->config(), window.prefix, 0);
    KV_RETURN_IF_ERROR(PrefillBlocks(&decoder, window.prefix, &blocks, {}, &state));
    visit(state);
    progress.Step();
  }
  return OkStatus();
}

Status RunPasskeys(const EvalOptions& options, const EvalSet& texts, int max_positions,
                   Progress* progress, Evaluator* evaluator) {
  std::vector<int> lengths;
  for (const int length : kPasskeyLengths) {
    if (length <= max_positions && length <= texts.longest()) lengths.push_back(length);
  }
  progress->Start("passkey length and depth", lengths.size() * std::size(kPasskeyDepths));
  uint64_t place = 0;
  size_t turn = 0;
  for (const int length : lengths) {
    for (const double depth : kPasskeyDepths) {
      // A generator for each place, so that more samples or lengths do not change the others.
      Random random = Random(options.seed).Fork(++place);
      for (int sample = 0; sample < options.passkey_samples; ++sample) {
        KV_ASSIGN_OR_RETURN(const PasskeyPrompt prompt,
                            texts.Passkey(length, depth, turn++, &random));
        KV_RETURN_IF_ERROR(evaluator->AddPasskey(prompt));
      }
      progress->Step();
    }
  }
  return OkStatus();
}

}  // namespace

Result<EvalPlan> MakeEvalPlan(const Model* model, const std::vector<std::string>& codecs,
                              const std::vector<std::string>& wires, const Calibration& calibration,
                              std::shared_ptr<const KltPack> pack) {
  CoderContext context;
  context.model = model;
  context.calibration = calibration;
  context.klt_pack = std::move(pack);
  std::vector<std::string> names = codecs;
  if (names.empty()) names.assign(std::begin(kDefaultEvalCodecs), std::end(kDefaultEvalCodecs));
  EvalPlan plan;
  plan.decoded = std::make_unique<BlockClass>(model, &kernels::kRawFp32Codec, AsBytes(""));
  for (const std::string& name : names) {
    if (IsStateCoder(name)) {
      KV_RETURN_IF_ERROR(AddCoder(&context, name, wires, plan.decoded.get(), &plan));
      continue;
    }
    const Result<const Codec*> codec = kernels::FindCodec(name);
    if (!codec.ok()) return UnknownCodec(name);
    KV_RETURN_IF_ERROR(AddCodec(model, *codec, wires, &plan));
  }
  return plan;
}

Result<int> Eval(const EvalOptions& options) {
  KV_ASSIGN_OR_RETURN(const std::filesystem::path place, TextOf(options));
  KV_ASSIGN_OR_RETURN(const kernels::WeightForm form, ParseWeightForm(options.weights));
  KV_RETURN_IF_ERROR(CheckWritable(options.json));
  KV_RETURN_IF_ERROR(CheckWritable(options.svg));
  KV_RETURN_IF_ERROR(kernels::ChooseImplementation());
  KV_RETURN_IF_ERROR(kernels::LoadBlas());
  const int cores = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  kernels::ThreadPool pool(options.threads > 0 ? options.threads : cores);
  KV_ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Load(options.model, form));
  KV_RETURN_IF_ERROR(CheckSizes(options, model->config()));
  std::shared_ptr<const KltPack> pack;
  const auto& codecs = options.codecs;
  if (!options.pack.empty() || std::find(codecs.begin(), codecs.end(), "klt") != codecs.end()) {
    KV_ASSIGN_OR_RETURN(pack, FindKltPack(options.pack, options.model, *model));
  }
  Calibration calibration;
  if (!options.calibration.empty()) {
    calibration = [&](const auto& visit) {
      return VisitCalibration(options, model.get(), &pool, visit);
    };
  }
  KV_ASSIGN_OR_RETURN(const EvalPlan plan,
                      MakeEvalPlan(model.get(), options.codecs, options.wires, calibration, pack));
  KV_ASSIGN_OR_RETURN(const EvalSet texts, options.texts.empty()
                                               ? EvalSet::OfFile(place, &model->tokenizer())
                                               : EvalSet::OfFolder(place, &model->tokenizer()));
  KV_ASSIGN_OR_RETURN(const EvalWindows measured, texts.Windows({options.prefix, options.suffix,
                                                                 options.windows, options.seed}));

  Evaluator evaluator(model.get(), &pool, plan.settings, !options.no_class);
  Progress progress;
  progress.Start("window", measured.windows.size());
  for (const EvalWindow& window : measured.windows) {
    KV_RETURN_IF_ERROR(evaluator.AddWindow(window));
    progress.Step();
  }
  if (!options.no_passkey && options.passkey_samples > 0) {
    KV_RETURN_IF_ERROR(
        RunPasskeys(options, texts, model->config().max_positions, &progress, &evaluator));
  }

  EvalSetup setup;
  setup.model = options.model;
  setup.weights = WeightFormName(form);
  setup.digest = ToHex(model->digest());
  setup.text = place.string();
  setup.prefix = options.prefix;
  setup.suffix = options.suffix;
  setup.windows = static_cast<int>(measured.windows.size());
  setup.kinds = measured.kinds;
  setup.threads = pool.threads();
  setup.seed = options.seed;
  setup.blas_core_type = kernels::BlasCoreType();
  setup.kernels = kernels::ActiveImplementation().name;
  const EvalSummary summary = Summarize(std::move(setup), plan.settings, evaluator.measures());
  std::fputs(EvalTable(summary).c_str(), stdout);
  if (!options.json.empty()) {
    KV_RETURN_IF_ERROR(WriteFile(options.json, EvalJson(summary).dump(2) + "\n"));
  }
  if (!options.svg.empty()) KV_RETURN_IF_ERROR(WriteFile(options.svg, EvalPlot(summary)));
  return 0;
}

}  // namespace kvant::node
