// What `kvant eval` found: numbers with their intervals, as JSON and as a table for people.
#pragma once

#include <cstdint>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "node/eval_measure.h"
#include "node/eval_set.h"
#include "node/eval_statistics.h"

namespace kvant::node {

// What was measured, and on what.
struct EvalSetup {
  std::string model;    // name shown
  std::string weights;  // WeightFormName
  std::string digest;   // hexadecimal, of the model
  std::string text;     // file, or folder with one for each kind
  int prefix = 0;
  int suffix = 0;
  int windows = 0;              // of all kinds
  std::vector<EvalKind> kinds;  // empty where texts have none
  int threads = 0;
  uint64_t seed = 0;
  std::string blas_core_type;
  std::string kernels;  // instruction set
};

// One form of prefixes, over all windows and prompts.
struct FormSummary {
  Estimate mean_kl;                 // nats a position
  Estimate p99_kl;                  // of all positions together
  Estimate top1;                    // share of positions
  Estimate loss;                    // nats a token
  Estimate perplexity;              // exp(loss)
  Estimate copy_loss;               // nats a token
  std::optional<Estimate> passkey;  // share of prompts; none without prompts
  std::map<int, double> passkey_by_length;
  std::map<double, double> passkey_by_depth;
  std::map<std::pair<int, double>, double> passkey_by_place;  // length and depth
};

struct SettingSummary {
  std::string codec;
  std::string wire;
  int recomputed_layers = 0;    // by the reader
  double payload_bits = 0;      // an element: what is read of payloads
  double bits_per_element = 0;  // with manifests and keys
  double ratio = 0;             // 16 / bits_per_element
  uint64_t table_bytes = 0;     // StateCoder::table_bytes, not among the bits
  FormSummary read;
  std::optional<FormSummary> in_class;
};

// As a StateCoder names it.
std::string WireName(const SettingSummary& setting);

// Over some windows.
struct WindowsSummary {
  std::string kind;  // empty: all windows
  size_t windows = 0;
  FormSummary exact;
  Estimate zeroed_loss;                   // nats a token
  std::optional<Estimate> stranger_loss;  // none where the text has no second prefix
  std::vector<SettingSummary> settings;
};

struct EvalSummary {
  EvalSetup setup;
  int passkey_prompts = 0;
  WindowsSummary all;
  std::vector<WindowsSummary> kinds;  // without passkeys; empty where texts have no kinds
};

// REQUIRES: at least one window; those of the setup's kinds are among them.
EvalSummary Summarize(EvalSetup setup, std::span<const EvalSetting> settings,
                      const EvalMeasures& measures);

// One object a setting; docs/fidelity.md has the fields.
nlohmann::json EvalJson(const EvalSummary& summary);
// At most 100 columns wide.
std::string EvalTable(const EvalSummary& summary);

// A KL in few characters: "0", "4.8e-05".
std::string FormatKl(double kl);

}  // namespace kvant::node
