// Conditional transform coding of a block's state (docs/klt.md). What a reader knows anyway, the
// tokens, and layers decoded before, predict the keys (before rope) and values of a group of
// layers; what is left goes through one transform of all of them together, whose coefficients are
// all rounded with one step: an error of one step in any of them costs the model about as much as
// in any other. Finer cuts refine the coefficients of coarser ones, so that cuts of one block are
// prefixes of each other.
//
// A layer's state of a token is one row of `width` floats: its keys of all heads with the rope
// taken back, then its values; of a model with latent attention its rope key, then its latent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "base/status.h"
#include "node/decoder.h"
#include "node/klt_pack.h"
#include "node/model.h"

namespace kvant::node {

// A layer's state as rows, and back. keys, values: as a LayerSink gets them, of tokens that begin
// at `position`.
void GatherState(const Model& model, int layer, int position, int tokens, const float* keys,
                 const float* values, float* rows);
void ScatterState(const Model& model, int layer, int position, int tokens, const float* rows,
                  float* keys, float* values);

// One model's coder. Immutable after its making, Thread-safe; borrows model and pack.
class KltCoder {
 public:
  // cuts: of pack->cuts(), those that a block holds: any one, or a beginning of pack->refining.
  // transform: of pack->transforms. REQUIRES: the pack fits the model (KltPack::CheckFits).
  KltCoder(const Model* model, const KltPack* pack, std::vector<size_t> cuts, size_t transform = 0);

  // A block's rows, [layer][kBlockTokens][width]. Layers that are not coded are left alone, and may
  // be empty.
  using Rows = std::vector<std::vector<float>>;
  // Bytes, [cut][group]. What one group has at the cuts from the first on is read together.
  using Extents = std::vector<std::vector<std::vector<std::byte>>>;
  // One group as it is coded. Tokens in rows, coefficients in columns.
  struct Code {
    std::vector<KltToken> tokens;               // [kBlockTokens]
    std::vector<float> coefficients;            // [kBlockTokens][coefficients]
    std::vector<std::vector<KltPlace>> places;  // [cut], as coefficients
    std::vector<std::vector<int32_t>> levels;   // [cut]
    std::vector<float> rounded;                 // in steps of the cut under work, before rounding
    std::vector<float> first;   // what the first cut says: [kBlockTokens][SourceCoefficients]
    std::vector<float> values;  // what all cuts say
  };

  size_t cuts() const { return cuts_.size(); }
  size_t groups() const { return transform_.groups.size(); }
  const KltPack& pack() const { return pack_; }
  const KltTransform& transform() const { return transform_; }
  const KltCut& cut(size_t index) const { return transform_.cuts[cuts_[index]]; }

  // What enters the first layer, [kBlockTokens][hidden]. tokens: kBlockTokens.
  std::vector<float> Embeddings(std::span<const int32_t> tokens) const;
  // entering: what enters the first layer that is not recomputed, [kBlockTokens][hidden], so the
  // embeddings if none is. position: of the first token.
  void Encode(std::span<const float> entering, int position, const Rows& exact,
              Extents* extents) const;

  // The parts of it, for readers and calibration.
  // What is made of it for predicting: each token's numbers over their root mean square, for every
  // layer begins with that.
  static std::vector<float> Normalized(std::span<const float> entering, int hidden);
  // What predicts a group, [kBlockTokens][KltBasis::inputs]. first: [group] of those before it, as
  // in Code.
  std::vector<float> Inputs(size_t group, std::span<const float> normalized,
                            std::span<const std::vector<float>> first) const;
  // Predictions of a group's rows, side by side: [kBlockTokens][KltBasis::width].
  std::vector<float> Predict(size_t group, std::span<const float> inputs, int position) const;
  // How many half octaves finer than others a token's step is. rows: of the group, side by side.
  std::vector<int8_t> Finer(size_t group, std::span<const float> rows) const;
  // Codes what is left of a group: exact rows, side by side, less their predictions. finer: of each
  // token. watch: sees each cut's `rounded` and levels; may be nullptr.
  using Watch = std::function<void(size_t cut, const Code& code)>;
  void CodeGroup(size_t group, int position, std::span<const float> left,
                 std::span<const int8_t> finer, Code* code, const Watch* watch) const;
  // A group's rows side by side. rows: [layer].
  std::vector<float> Gathered(size_t group, const Rows& rows) const;

 private:
  friend class KltReader;
  // Of a coefficient of most tokens at a cut.
  std::vector<int> Quarters(size_t group, size_t cut) const;
  // What coefficients are at a cut; signs: of what the cuts before it found, 0 for nothing.
  void PlacesOf(size_t group, size_t cut, int position, std::span<const KltToken> tokens,
                std::span<const int8_t> signs, std::vector<KltPlace>* places) const;
  void SetTokens(size_t group, int position, std::span<const int8_t> finer, Code* code) const;
  // The coefficients that predict other groups.
  std::vector<float> Leading(size_t group, std::span<const float> values) const;
  // Adds a cut's levels to values and signs.
  void Refine(size_t group, size_t cut, int position, std::span<const KltToken> tokens,
              std::span<const KltPlace> places, std::span<const int32_t> levels,
              std::vector<float>* values, std::vector<int8_t>* signs) const;
  size_t Coefficients(size_t group) const {
    return static_cast<size_t>(transform_.bases[group].coefficients);
  }
  // Of tokens that begin at `position`, sinks are the first so many.
  static size_t Sinks(int position) { return position == 0 ? kKltSinks : 0; }

  const Model& model_;
  const KltPack& pack_;
  const KltTransform& transform_;
  std::vector<size_t> cuts_;
  KltLevels levels_;
};

// One block under reading. Single-owner; borrows the coder.
class KltReader {
 public:
  // As of KltCoder::Encode.
  KltReader(const KltCoder* coder, std::span<const float> entering, int position);
  // Reads a group at as many cuts as there are extents, and sets the rows of its layers. The rows
  // are the same to the bit on every machine that has the same entering. kDataLoss: the bytes are
  // not of this model and these cuts; rows are undefined then. REQUIRES: the group's sources were
  // read; 1..coder->cuts() extents.
  Status Read(size_t group, std::span<const std::span<const std::byte>> extents,
              KltCoder::Rows* rows);

 private:
  const KltCoder& coder_;
  int position_;
  std::vector<float> normalized_;
  std::vector<std::vector<float>> first_;  // [group]
};

}  // namespace kvant::node
