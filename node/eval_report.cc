#include "node/eval_report.h"

#include <fmt/format.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "kernels/raw_codec.h"

namespace kvant::node {
namespace {

using Json = nlohmann::json;

// The mean over windows of what `of` takes from each.
template <typename Of>
Estimate OverWindows(std::span<const SuffixMeasure> windows, uint64_t seed, const Of& of) {
  std::vector<double> samples;
  for (const SuffixMeasure& window : windows) samples.push_back(of(window));
  return BootstrapMean(samples, seed);
}

double MeanKl(const SuffixMeasure& window) {
  double sum = 0;
  for (const float kl : window.kl) sum += kl;
  return sum / static_cast<double>(window.kl.size());
}

// exp is monotonous, so the interval's ends go with the number.
Estimate Exp(const Estimate& e) {
  return {std::exp(e.value), std::exp(e.low), std::exp(e.high), e.known};
}

// Means of right answers by what `key` says of a place.
template <typename Key>
auto ByPlace(const FormMeasures& form, std::span<const PasskeyPlace> places, const Key& key) {
  std::map<decltype(key(places[0])), std::pair<double, int>> sums;
  for (size_t i = 0; i < places.size(); ++i) {
    auto& [right, count] = sums[key(places[i])];
    right += form.passkeys[i];
    ++count;
  }
  std::map<decltype(key(places[0])), double> means;
  for (const auto& [at, sum] : sums) means[at] = sum.first / sum.second;
  return means;
}

FormSummary SummarizeForm(const FormMeasures& form, const EvalKind& kind,
                          std::span<const PasskeyPlace> places, uint64_t seed) {
  const auto windows = std::span(form.windows).subspan(kind.first, kind.windows);
  FormSummary summary;
  summary.mean_kl = OverWindows(windows, seed, MeanKl);
  std::vector<std::vector<float>> kls;
  for (const SuffixMeasure& window : windows) kls.push_back(window.kl);
  summary.p99_kl = BootstrapQuantile(kls, 0.99, seed);
  summary.top1 = OverWindows(windows, seed, [](const SuffixMeasure& w) { return w.agreement; });
  summary.loss = OverWindows(windows, seed, [](const SuffixMeasure& w) { return w.loss; });
  summary.perplexity = Exp(summary.loss);
  summary.copy_loss =
      OverWindows(windows, seed, [](const SuffixMeasure& w) { return w.copy_loss; });
  if (places.empty()) return summary;
  summary.passkey = BootstrapMean(form.passkeys, seed);
  summary.passkey_by_length =
      ByPlace(form, places, [](const PasskeyPlace& place) { return place.length; });
  summary.passkey_by_depth =
      ByPlace(form, places, [](const PasskeyPlace& place) { return place.depth; });
  summary.passkey_by_place = ByPlace(
      form, places, [](const PasskeyPlace& place) { return std::pair(place.length, place.depth); });
  return summary;
}

std::string DepthName(double depth) { return fmt::format("{:.2f}", depth); }

// null where one sample says nothing about others.
Json IntervalJson(const Estimate& estimate) {
  if (!estimate.known) return nullptr;
  return Json::array({estimate.low, estimate.high});
}

void AddEstimate(Json* object, const std::string& name, const Estimate& estimate) {
  (*object)[name] = estimate.value;
  (*object)[name + "_ci"] = IntervalJson(estimate);
}

Json FormJson(const FormSummary& form) {
  Json json;
  AddEstimate(&json, "mean_kl", form.mean_kl);
  AddEstimate(&json, "p99_kl", form.p99_kl);
  AddEstimate(&json, "top1", form.top1);
  AddEstimate(&json, "loss", form.loss);
  AddEstimate(&json, "ppl", form.perplexity);
  AddEstimate(&json, "copy_loss", form.copy_loss);
  return json;
}

void AddPasskeys(Json* json, const FormSummary& form) {
  Json& object = *json;
  object["passkey"] = nullptr;
  if (!form.passkey.has_value()) return;
  AddEstimate(json, "passkey", *form.passkey);
  for (const auto& [length, share] : form.passkey_by_length) {
    object["passkey_by_length"][std::to_string(length)] = share;
  }
  for (const auto& [depth, share] : form.passkey_by_depth) {
    object["passkey_by_depth"][DepthName(depth)] = share;
  }
  for (const auto& [place, share] : form.passkey_by_place) {
    object["passkey_by_length_and_depth"][std::to_string(place.first)][DepthName(place.second)] =
        share;
  }
}

// What the exact prefix, and none, are worth.
void AddControls(Json* json, const WindowsSummary& summary) {
  AddEstimate(json, "exact_loss", summary.exact.loss);
  AddEstimate(json, "exact_ppl", summary.exact.perplexity);
  AddEstimate(json, "exact_copy_loss", summary.exact.copy_loss);
  AddEstimate(json, "zeroed_prefix_loss", summary.zeroed_loss);
  (*json)["shuffled_prefix_loss"] = nullptr;
  if (summary.stranger_loss.has_value()) {
    AddEstimate(json, "shuffled_prefix_loss", *summary.stranger_loss);
  }
}

Json SettingJson(const SettingSummary& setting) {
  Json json = FormJson(setting.read);
  json["payload_bits_per_element"] = setting.payload_bits;
  json["bits_per_element"] = setting.bits_per_element;
  json["ratio_to_bf16"] = setting.ratio;
  json["class"] = setting.in_class.has_value() ? FormJson(*setting.in_class) : Json(nullptr);
  return json;
}

std::string FormLine(const std::string& codec, const std::string& wire, const std::string& form,
                     const std::string& bits, const std::string& ratio, const FormSummary& f) {
  const std::string interval =
      f.mean_kl.known ? fmt::format("[{}, {}]", FormatKl(f.mean_kl.low), FormatKl(f.mean_kl.high))
                      : "";
  const std::string passkey =
      f.passkey.has_value() ? fmt::format("{:.0f}%", 100 * f.passkey->value) : "-";
  return fmt::format(
      "{:<9} {:<4} {:<5} {:>6} {:>5} {:>7} {:<18} {:>7} {:>6.4f} {:>8.3f} {:>6.3f} {:>5}\n", codec,
      wire, form, bits, ratio, FormatKl(f.mean_kl.value), interval, FormatKl(f.p99_kl.value),
      f.top1.value, f.perplexity.value, f.copy_loss.value, passkey);
}

std::string PasskeyLine(const std::string& codec, const std::string& wire, const std::string& form,
                        const FormSummary& f) {
  std::string line = fmt::format("{:<9} {:<4} {:<5} ", codec, wire, form);
  for (const auto& [length, share] : f.passkey_by_length) {
    line += fmt::format(" {:>5.0f}%", 100 * share);
  }
  line += "  |";
  for (const auto& [depth, share] : f.passkey_by_depth) {
    line += fmt::format(" {:>5.0f}%", 100 * share);
  }
  return line + "\n";
}

std::string PasskeyTable(const EvalSummary& summary) {
  const FormSummary& exact = summary.all.exact;
  std::string head = fmt::format("{:<21}", "passkey");
  for (const auto& [length, share] : exact.passkey_by_length) head += fmt::format(" {:>6}", length);
  head += "  |";
  for (const auto& [depth, share] : exact.passkey_by_depth) head += fmt::format(" {:>6.2f}", depth);
  std::string table =
      fmt::format("\nPasskey: right answers of {} prompts, by length in tokens and by depth\n",
                  summary.passkey_prompts) +
      head + "\n" + PasskeyLine("exact", "", "", exact);
  for (const SettingSummary& setting : summary.all.settings) {
    table += PasskeyLine(setting.codec, WireName(setting), "read", setting.read);
    if (!setting.in_class.has_value()) continue;
    table += PasskeyLine(setting.codec, WireName(setting), "class", *setting.in_class);
  }
  return table;
}

std::string LossLine(const std::string& what, const Estimate& loss, double exact) {
  const std::string interval =
      loss.known ? fmt::format(" [{:.3f}, {:.3f}]", loss.low, loss.high) : "";
  return fmt::format("  {:<36} {:.3f}{} nats a token ({:+.3f})\n", what, loss.value, interval,
                     loss.value - exact);
}

WindowsSummary SummarizeWindows(const EvalKind& kind, std::span<const EvalSetting> settings,
                                const EvalMeasures& measures, int prefix, uint64_t seed) {
  // A kind has no passkeys of its own.
  const std::span<const PasskeyPlace> places =
      kind.name.empty() ? std::span(measures.places) : std::span<const PasskeyPlace>();
  const auto of_kind = [&](const auto& of_windows) {
    return std::span(of_windows).subspan(kind.first, kind.windows);
  };
  WindowsSummary summary;
  summary.kind = kind.name;
  summary.windows = kind.windows;
  summary.exact = SummarizeForm(measures.exact, kind, places, seed);
  summary.zeroed_loss = BootstrapMean(of_kind(measures.zeroed_loss), seed);
  std::vector<double> strangers;
  for (const std::optional<double>& loss : of_kind(measures.stranger_loss)) {
    if (loss.has_value()) strangers.push_back(*loss);
  }
  if (!strangers.empty()) summary.stranger_loss = BootstrapMean(strangers, seed);
  const size_t blocks = static_cast<size_t>(prefix / kBlockTokens);
  for (size_t i = 0; i < settings.size(); ++i) {
    const BlockClass& block_class = *settings[i].block_class;
    SettingSummary& setting = summary.settings.emplace_back();
    setting.codec = settings[i].codec();
    setting.wire = settings[i].wire;
    setting.recomputed_layers = settings[i].recomputed_layers;
    // bf16 has 2 bytes an element.
    const double elements = static_cast<double>(block_class.Bf16BytesPerToken()) / 2 * kBlockTokens;
    if (settings[i].coder != nullptr) {
      const auto bits = of_kind(measures.coded_bits[i]);
      setting.payload_bits =
          std::accumulate(bits.begin(), bits.end(), 0.0) / static_cast<double>(bits.size());
      setting.table_bytes = settings[i].coder->table_bytes();
    } else {
      uint64_t bytes = 0;
      for (size_t block = 0; block < blocks; ++block) {
        bytes += block_class.BytesOf(block_class.ReadCuts(block, settings[i].read));
      }
      setting.payload_bits =
          8 * static_cast<double>(bytes) / static_cast<double>(blocks) / elements;
    }
    setting.bits_per_element = setting.payload_bits + 8 * measures.manifest_bytes[i] / elements;
    setting.ratio = 16 / setting.bits_per_element;
    setting.read = SummarizeForm(measures.read[i], kind, places, seed);
    if (measures.in_class.empty() || measures.in_class[i].windows.empty()) continue;
    setting.in_class = SummarizeForm(measures.in_class[i], kind, places, seed);
  }
  return summary;
}

std::string FormsTable(const WindowsSummary& summary) {
  std::string table = fmt::format(
      "{:<9} {:<4} {:<5} {:>6} {:>5} {:>7} {:<18} {:>7} {:>6} {:>8} {:>6} {:>5}\n", "codec", "wire",
      "", "bits", "ratio", "mean KL", "", "p99 KL", "top-1", "perplex.", "copy", "pass");
  table += FormLine("exact", "", "", "", "", summary.exact);
  for (const SettingSummary& setting : summary.settings) {
    table += FormLine(setting.codec, WireName(setting), "read",
                      fmt::format("{:.2f}", setting.bits_per_element),
                      fmt::format("{:.2f}", setting.ratio), setting.read);
    if (!setting.in_class.has_value()) continue;
    table += FormLine("", "", "class", "", "", *setting.in_class);
  }
  return table;
}

std::string WorthTable(const WindowsSummary& summary) {
  const double exact = summary.exact.loss.value;
  std::string table = "\nWhat the prefix is worth (loss of the suffix):\n";
  table += LossLine("exact prefix", summary.exact.loss, exact);
  table += LossLine("its keys and values set to zero", summary.zeroed_loss, exact);
  if (summary.stranger_loss.has_value()) {
    table += LossLine("another place's prefix (shuffled)", *summary.stranger_loss, exact);
  }
  return table;
}

const SettingSummary* NoiseFloor(const WindowsSummary& summary) {
  for (const SettingSummary& setting : summary.settings) {
    if (setting.codec == kernels::kRawFp32Codec.name) return &setting;
  }
  return nullptr;
}

}  // namespace

std::string FormatKl(double kl) { return kl == 0 ? "0" : fmt::format("{:.1e}", kl); }

EvalSummary Summarize(EvalSetup setup, std::span<const EvalSetting> settings,
                      const EvalMeasures& measures) {
  EvalSummary summary;
  summary.setup = std::move(setup);
  summary.passkey_prompts = static_cast<int>(measures.places.size());
  const auto summarize = [&](const EvalKind& kind) {
    return SummarizeWindows(kind, settings, measures, summary.setup.prefix, summary.setup.seed);
  };
  summary.all = summarize({"", 0, measures.exact.windows.size()});
  for (const EvalKind& kind : summary.setup.kinds) summary.kinds.push_back(summarize(kind));
  return summary;
}

nlohmann::json EvalJson(const EvalSummary& summary) {
  const EvalSetup& setup = summary.setup;
  Json common = {{"model", setup.model},
                 {"weights", setup.weights},
                 {"model_digest", setup.digest},
                 {"text", setup.text},
                 {"prefix", setup.prefix},
                 {"suffix", setup.suffix},
                 {"windows", setup.windows},
                 {"passkey_prompts", summary.passkey_prompts},
                 {"seed", setup.seed},
                 {"threads", setup.threads},
                 {"openblas_core_type", setup.blas_core_type},
                 {"kernels", setup.kernels}};
  AddControls(&common, summary.all);
  common["exact_passkey"] = nullptr;
  if (summary.all.exact.passkey.has_value()) {
    AddEstimate(&common, "exact_passkey", *summary.all.exact.passkey);
  }
  common["noise_floor_kl"] = nullptr;
  if (const SettingSummary* floor = NoiseFloor(summary.all)) {
    common["noise_floor_kl"] = floor->read.mean_kl.value;
  }

  Json list = Json::array();
  for (size_t i = 0; i < summary.all.settings.size(); ++i) {
    const SettingSummary& setting = summary.all.settings[i];
    Json object = common;
    object.update(SettingJson(setting));
    AddPasskeys(&object, setting.read);
    if (setting.in_class.has_value()) AddPasskeys(&object["class"], *setting.in_class);
    object["codec"] = setting.codec;
    object["wire"] = setting.wire;
    object["recomputed_layers"] = setting.recomputed_layers;
    object["mode"] = "read";
    object["table_bytes"] = setting.table_bytes;
    object["kinds"] = nullptr;
    for (const WindowsSummary& kind : summary.kinds) {
      Json& of_kind = object["kinds"][kind.kind];
      of_kind = SettingJson(kind.settings[i]);
      of_kind["windows"] = kind.windows;
      AddControls(&of_kind, kind);
    }
    list.push_back(std::move(object));
  }
  return list;
}

std::string WireName(const SettingSummary& setting) {
  return setting.recomputed_layers == 0
             ? setting.wire
             : fmt::format("{}@{}", setting.wire, setting.recomputed_layers);
}

std::string EvalTable(const EvalSummary& summary) {
  const EvalSetup& setup = summary.setup;
  std::string page = fmt::format(
      "{}: prefix {}, suffix {}, {} windows of {}\n"
      "OpenBLAS core type {}, kernels {}, {} threads, weights {}, model {}\n\n",
      setup.model, setup.prefix, setup.suffix, setup.windows, setup.text, setup.blas_core_type,
      setup.kernels, setup.threads, setup.weights, setup.digest.substr(0, 16));
  page +=
      "Exact: the prefix computed and read in the class raw (bf16, as every peer stores it), all\n"
      "arithmetic in fp32. read: the same prefix, encoded, and read at the wire's cuts. class: "
      "each\n"
      "block computed over the encoded form of those before it, as Kvant does, then read "
      "likewise.\n"
      "Bits are those of an element of the KV state, scales, manifests and keys counted; KL(exact "
      "||\n"
      "lossy) and losses in nats; in brackets 95 % intervals over windows.\n\n";
  page += FormsTable(summary.all);
  if (const SettingSummary* floor = NoiseFloor(summary.all)) {
    page += fmt::format(
        "\nNoise floor: {} is what rounding to bf16 alone changes (raw-fp32 against raw).\n",
        FormatKl(floor->read.mean_kl.value));
  }
  page += WorthTable(summary.all);
  if (summary.passkey_prompts > 0) page += PasskeyTable(summary);
  for (const WindowsSummary& kind : summary.kinds) {
    page += fmt::format("\n{}: {} windows\n\n", kind.kind, kind.windows);
    page += FormsTable(kind) + WorthTable(kind);
  }
  return page;
}

}  // namespace kvant::node
