// A codec pack: what conditional transform coding needs of a model once (docs/klt.md). Made by
// `kvant calibrate`, kept in one safetensors file.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "cache_service/block_key.h"
#include "kernels/ordered_gemm.h"
#include "node/klt_groups.h"
#include "node/klt_levels.h"
#include "node/model.h"

namespace kvant::node {

// The first tokens of a sequence, which all others attend strongly (Xiao et al. 2024, "Efficient
// streaming language models with attention sinks", section 3.1), have a finer step of their own.
inline constexpr int kKltSinks = 4;
// Coefficients of a source that help to predict a group: the first, which vary most.
inline constexpr int kKltSourceCoefficients = 384;

// One group of layers. Matrices are bf16 in the file.
struct KltBasis {
  int width = 0;                      // floats of its layers' rows, side by side
  int coefficients = 0;               // <= width; what the others would add is never coded
  int inputs = 0;                     // InputsOf
  std::vector<float> bias;            // [width]
  std::vector<float> sink_bias;       // [width]: all that predicts a sequence's first token
  std::vector<float> importance;      // [1 + 2 * layers], as FinerOf has it
  kernels::OrderedWeights predictor;  // [width][inputs]
  kernels::OrderedWeights synthesis;  // [width][coefficients]: row = prediction + synthesis * them
  kernels::OrderedWeights analysis;   // [coefficients][width], the other way; not in the file
  std::vector<float> deviation;       // [coefficients], descending
  // [coefficients] of a sequence's first token, and of the other sinks.
  std::array<std::vector<float>, 2> sink_deviation;
};

// How many of its coefficients help to predict other groups.
inline int SourceCoefficients(const KltBasis& basis) {
  return std::min(basis.coefficients, kKltSourceCoefficients);
}

// A step, and what it was found to cost where the pack was made.
struct KltCut {
  std::string name;   // letters and digits
  float step = 0;     // of the coefficients
  float mean_kl = 0;  // nats a token behind a prefix that is read at it
};

// How state is coded for readers that compute the first layers themselves (docs/klt.md,
// "Recomputed layers").
struct KltTransform {
  // Layers that a reader runs. What enters the next one is side information: it predicts, and that
  // layer's own state follows from it. 0: the embedding predicts, and all layers are coded.
  int recomputed = 0;
  std::vector<KltGroup> groups;  // KltGroups from first_layer() on
  std::vector<KltBasis> bases;   // [group]
  // The finest first; the same names in all transforms of a pack, each with a step of its own.
  std::vector<KltCut> cuts;

  // Of those that are coded.
  int first_layer() const { return recomputed > 0 ? recomputed + 1 : 0; }
};

// Value; immutable once made.
struct KltPack {
  int width = 0;  // of one layer's row
  int hidden = 0;
  int layers = 0;
  int group_width = kKltGroupWidth;      // of its groups, at most
  std::vector<KltTransform> transforms;  // the first recomputes nothing; ascending
  // [layer][width][width], bf16 numbers: an error e in a row costs about e^T weight e nats.
  std::vector<std::vector<float>> weights;
  KltStatistics statistics;
  // Of cuts, the coarsest first: those that a block may hold together.
  std::vector<size_t> refining;
  float sink_step = 0;
  std::string model;          // hex digest of the model whose state it codes
  std::string calibrated_on;  // in words
  std::string weighed_by;     // where weights are from, in words
  uint64_t file_bytes = 0;
  Digest digest{};  // SHA-256 of the file

  // Of the transform that recomputes nothing.
  const std::vector<KltCut>& cuts() const { return transforms.front().cuts; }
  // kInvalidArgument: made for another model (says both digests).
  Status CheckFits(const Model& of) const;
  // kInvalidArgument lists the names of cuts there are.
  Result<size_t> FindCut(std::string_view name) const;
  // Index of the transform for readers that recompute so many layers. kInvalidArgument lists those
  // there are.
  Result<size_t> FindTransform(int recomputed) const;
};

// Floats that predict a group: what enters, and the sources' coefficients.
// REQUIRES: the bases of its sources are there.
int InputsOf(const KltPack& pack, const KltTransform& transform, size_t group);

// File of a model's codec pack in its directory.
inline constexpr std::string_view kDefaultPack = "klt.safetensors";

// Reads the pack that --pack names, a file or the folder of kDefaultPack; by default the one beside
// the model. kInvalidArgument: there is none; else as LoadKltPack. from: where the model came from.
Result<std::shared_ptr<const KltPack>> FindKltPack(const std::string& named,
                                                   const std::filesystem::path& from,
                                                   const Model& model);
// kInvalidArgument names the file, and what is missing or malformed, or says that the pack is
// another model's.
Result<KltPack> LoadKltPack(const std::filesystem::path& file, const Model& model);
// The same from bytes, which are not needed afterwards. `name` is the file named in errors.
Result<KltPack> ParseKltPack(std::span<const std::byte> file, const std::string& name,
                             const Model& model);
// Sets the analysis of a group of a transform: synthesis is weight^-1/2 times a rotation, so its
// transpose times the weight undoes it but for the rounding to bf16, which is taken out by one step
// of Newton's method.
void SetAnalysis(const KltPack& pack, const KltGroup& group, KltBasis* basis);
// Writes it, and reads it back into `pack`: matrices are rounded in the file. Errors: as above, or
// the file cannot be written.
Status SaveKltPack(const std::filesystem::path& file, const Model& model, KltPack* pack);

}  // namespace kvant::node
