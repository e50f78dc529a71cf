// `kvant eval`: what compression costs on a model, measured as the product uses it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "node/block_class.h"
#include "node/eval_measure.h"
#include "node/model.h"

namespace kvant::node {

struct EvalOptions {
  std::string model;
  std::string weights = "exact";  // WeightFormName
  std::string text;               // file; empty: the model directory's heldout.txt
  std::string texts;  // folder with a subfolder of files for each kind, in place of `text`
  std::string pack;   // file of the codec pack for klt; empty: none
  std::vector<std::string> calibration;  // files that coders with tables learn them from
  std::vector<std::string> codecs;       // empty: kDefaultEvalCodecs
  std::vector<std::string> wires;        // empty: each codec's own cuts
  int prefix = 1024;                     // tokens
  int suffix = 256;                      // tokens
  int windows = 0;          // 0: as many as the text has, at most 16; 1 of each of `texts`
  int passkey_samples = 4;  // prompts for each length and depth; 0: none
  bool no_passkey = false;
  bool no_class = false;  // leaves out prefixes computed over their own encoded form
  std::string json;       // file; empty: none
  std::string svg;        // file; empty: none
  int threads = 0;        // 0: one a core
  uint64_t seed = 1;
};

inline constexpr std::string_view kDefaultEvalCodecs[] = {"raw", "raw-fp32", "tile8", "tile4"};
inline constexpr int kMinEvalSuffix = 16;
// Pieces of the calibration texts together, each as long as a prefix; at least one of each.
// About as many tokens as a codec pack is made from.
inline constexpr int kCalibrationPieces = 96;
inline constexpr int kPasskeyLengths[] = {512, 1024, 2048};
inline constexpr double kPasskeyDepths[] = {0.05, 0.25, 0.5, 0.75, 0.95};

// Settings, and the classes and coders that they borrow.
struct EvalPlan {
  std::vector<std::unique_ptr<BlockClass>> classes;
  std::unique_ptr<BlockClass> decoded;  // where coders' states lie as they are
  std::vector<std::unique_ptr<StateCoder>> coders;
  std::vector<EvalSetting> settings;
};

// What to compare: each codec or coder at each wire, each pair of cuts once. A wire is "full" or
// "kNvM": the fewest extents with N bits of keys and M of values; codecs that have fewer bits, and
// coders that have no wire of that name, are read in full. kInvalidArgument: a codec or wire that
// does not exist (lists those that do), or a coder that cannot code this model.
// calibration: for coders that learn tables; empty: none. Their errors are those of it. pack: for
// klt.
Result<EvalPlan> MakeEvalPlan(const Model* model, const std::vector<std::string>& codecs,
                              const std::vector<std::string>& wires,
                              const Calibration& calibration = nullptr,
                              std::shared_ptr<const KltPack> pack = nullptr);

// Prints the table. Returns the exit status. Progress goes to stderr. Errors: as every part says;
// kInvalidArgument for sizes that the model or the text cannot have.
Result<int> Eval(const EvalOptions& options);

}  // namespace kvant::node
