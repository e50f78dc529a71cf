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
#include "node/klt_predictions.h"
#include "node/klt_values.h"
#include "node/model.h"

namespace kvant::node {

// A layer's state as rows, and back. keys, values: as a LayerSink gets them, of tokens that begin
// at `position`. stride: of rows, in floats; 0: `width`.
void GatherState(const Model& model, int layer, int position, int tokens, const float* keys,
                 const float* values, float* rows);
void ScatterState(const Model& model, int layer, int position, int tokens, const float* rows,
                  float* keys, float* values, size_t stride = 0);

class KltCoder;

// Where predictions of a group's rows begin, and what holds them.
struct KltBegun {
  std::vector<const float*> at;  // [kBlockTokens], each [KltBasis::width]
  std::vector<KltPredictions::Row> kept;
  std::vector<float> made;
};

// What a reader of a block knows before any byte of it. Value; borrows what it is made of.
class KltSide {
 public:
  // entering: what enters the first layer that is not recomputed, [kBlockTokens][hidden]; not
  // needed afterwards.
  static KltSide OfEntering(const KltCoder* coder, std::span<const float> entering);
  // The same over its root mean square, for every layer begins with that.
  static KltSide OfNormalized(const KltCoder* coder, std::vector<float> normalized);
  // Of a coder that recomputes nothing: kBlockTokens tokens, whose embeddings are what enters.
  // kept: nullptr, or where predictions are kept; borrowed.
  static KltSide OfTokens(const KltCoder* coder, std::span<const int32_t> tokens,
                          KltPredictions* kept);

  // What it alone predicts of a group's rows.
  void Begin(size_t group, KltBegun* begun) const;

 private:
  const KltCoder* coder_ = nullptr;
  KltPredictions* kept_ = nullptr;
  std::vector<int32_t> tokens_;    // if predictions are kept
  std::vector<float> normalized_;  // otherwise
};

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
  // One group as it is coded.
  struct Code {
    struct OfCut {
      KltPlaces places;
      std::vector<float> rounded;  // [coded], in steps, before rounding
      KltLevelsRead read;          // as a reader has it
    };
    std::vector<KltToken> tokens;     // [kBlockTokens]
    std::vector<float> coefficients;  // [kBlockTokens][coefficients]
    std::vector<OfCut> cuts;
    kernels::SparseRows first;  // what the first cut says that predicts other groups
    KltValues values;           // what all cuts say; without those of the last, unless watched
  };

  size_t cuts() const { return cuts_.size(); }
  size_t groups() const { return transform_.groups.size(); }
  const Model& model() const { return model_; }
  const KltPack& pack() const { return pack_; }
  const KltTransform& transform() const { return transform_; }
  const KltCut& cut(size_t index) const { return transform_.cuts[cuts_[index]]; }

  // What enters the first layer, [tokens][hidden].
  std::vector<float> Embeddings(std::span<const int32_t> tokens) const;
  // position: of the first token.
  void Encode(const KltSide& side, int position, const Rows& exact, Extents* extents) const;

  // The parts of it, for readers and calibration.
  // Each token's numbers over their root mean square, [tokens][hidden].
  static std::vector<float> Normalized(std::span<const float> entering, int hidden);
  // What they predict of a group, [tokens][KltBasis::width].
  void Begun(size_t group, std::span<const float> normalized, float* rows) const;
  // Predictions of a group's rows, side by side: [kBlockTokens][KltBasis::width]. first: [group] of
  // those before it, as in Code.
  void Predict(size_t group, const KltSide& side, std::span<const kernels::SparseRows> first,
               int position, std::vector<float>* rows) const;
  // How many half octaves finer than others a token's step is. rows: of the group, side by side.
  std::vector<int8_t> Finer(size_t group, std::span<const float> rows) const;
  // Codes what is left of a group: exact rows, side by side, less their predictions. finer: of each
  // token. watch: sees `values` behind each cut; may be nullptr.
  using Watch = std::function<void(size_t cut, const Code& code)>;
  void CodeGroup(size_t group, int position, std::span<const float> left,
                 std::span<const int8_t> finer, Code* code, const Watch* watch) const;
  // A group's rows side by side. rows: [layer].
  std::vector<float> Gathered(size_t group, const Rows& rows) const;

 private:
  friend class KltReader;
  // Predict, and to each row what its coefficients stand for, of `left` unless nullptr.
  void Rebuild(size_t group, const KltSide& side, std::span<const kernels::SparseRows> first,
               int position, const kernels::SparseRows* left, std::vector<float>* rows) const;
  // What a token codes at a cut where it has coefficients so many quarters of an octave above the
  // pack's: the first table.size(), of which the first with_low_bits have low bits.
  struct Prefix {
    std::vector<uint8_t> table;
    size_t with_low_bits = 0;
  };
  struct OfGroup {
    std::vector<int> quarters;     // [coefficients], of most tokens
    std::vector<Prefix> prefixes;  // [quarters more - kLeastMore]
  };
  static constexpr int kLeastMore = kKltLeastLouder + 2 * kKltLeastFiner;
  static constexpr int kMostMore = kKltMostLouder + 2 * kKltMostFiner;

  const Prefix& PrefixOf(size_t group, size_t cut, KltToken token) const {
    return of_[cut][group].prefixes[static_cast<size_t>(token.quarters() - kLeastMore)];
  }
  // What is coded at a cut. values: what the cuts before it say.
  void PlacesOf(size_t group, size_t cut, int position, std::span<const KltToken> tokens,
                const KltValues& values, KltPlaces* places) const;
  void SetTokens(size_t group, int position, std::span<const int8_t> finer, Code* code) const;
  // Of what a first cut says those that predict other groups.
  kernels::SparseRows Leading(size_t group, const kernels::SparseRows& first) const;
  // What a first cut says: the values that Refine would begin at.
  void FirstTerms(int position, std::span<const KltToken> tokens, const KltPlaces& places,
                  const KltLevelsRead& read, kernels::SparseRows* terms) const;
  // Adds a cut's levels.
  void Refine(size_t cut, int position, std::span<const KltToken> tokens, const KltPlaces& places,
              const KltLevelsRead& read, KltValues* values) const;
  float StepAt(size_t cut, int position, std::span<const KltToken> tokens, size_t token) const {
    return token < Sinks(position) ? pack_.sink_step : StepOf(tokens[token], this->cut(cut).step);
  }
  // Whether it helps to predict others.
  bool IsSource(size_t group) const;
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
  std::vector<std::vector<OfGroup>> of_;  // [cut][group]
};

// One block under reading. Single-owner; borrows the coder.
class KltReader {
 public:
  KltReader(const KltCoder* coder, KltSide side, int position);
  // Reads a group at as many cuts as there are extents: its layers' rows side by side,
  // [kBlockTokens][KltBasis::width], until the next read on this thread, by any reader. The rows
  // are the same to the bit on every machine that has the same entering. kDataLoss: the bytes are
  // not of this model and these cuts. REQUIRES: the group's sources were read; 1..coder->cuts()
  // extents.
  Result<std::span<const float>> Read(size_t group,
                                      std::span<const std::span<const std::byte>> extents);
  // The same, and sets the rows of its layers; on an error they are undefined.
  Status Read(size_t group, std::span<const std::span<const std::byte>> extents,
              KltCoder::Rows* rows);

 private:
  const KltCoder& coder_;
  KltSide side_;
  int position_;
  std::vector<kernels::SparseRows> first_;  // [group]
};

}  // namespace kvant::node
