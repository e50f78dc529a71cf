// Coders of the KV state that are no block codecs of the product: what `kvant eval` compares it
// with, on the same texts and by the same rules (docs/fidelity.md, "Baselines").
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kernels/codec.h"
#include "node/model.h"

namespace kvant::node {

// What all layers keep of consecutive tokens of one sequence, in fp32: keys with rope applied and
// values, or rope keys and latents (ModelConfig::StateShape). Value.
class PrefixState {
 public:
  // All zeros. first_position: of tokens[0]; more than 0 where a block is coded by itself.
  PrefixState(const ModelConfig& config, std::span<const int32_t> tokens, int first_position);

  int layers() const { return layers_; }
  int tokens() const { return static_cast<int>(ids_.size()); }
  std::span<const int32_t> token_ids() const { return ids_; }
  int first_position() const { return first_position_; }
  // Of one layer and all tokens.
  const kernels::LayerShape& shape() const { return shape_; }
  const kernels::SegmentShape& shape(kernels::SegmentKind kind) const { return shape_.Of(kind); }
  size_t key_width() const { return key_width_; }  // floats of one token and layer
  size_t value_width() const { return value_width_; }
  // Numbers of all layers and tokens, keys and values.
  uint64_t elements() const { return keys_.size() + values_.size(); }

  float* keys(int layer) { return keys_.data() + Offset(layer, key_width_); }
  float* values(int layer) { return values_.data() + Offset(layer, value_width_); }
  const float* keys(int layer) const { return keys_.data() + Offset(layer, key_width_); }
  const float* values(int layer) const { return values_.data() + Offset(layer, value_width_); }

  // Layers of which it is kept what enters them. Before any of that is set.
  void KeepEntering(std::span<const int> layers);
  bool keeps_entering() const { return !entering_.empty(); }
  // [tokens][hidden]. REQUIRES: it is kept.
  std::span<const float> entering(int layer) const { return entering_.at(layer); }
  // Of the kBlockTokens tokens from `token` on, as an EnteringSink gets it; left alone if not kept.
  void SetEntering(int layer, size_t token, const float* x);

  // Takes one layer of the kBlockTokens tokens from `token` on, as a LayerSink gets them.
  void SetBlock(int layer, size_t token, const float* keys, const float* values);

  // Mean squares of the queries (rope applied) of the last kObservedQueries tokens, over tokens and
  // over the query heads of a KV head: [kv_heads][head_dim] of keys(). Zeros unless they were
  // observed.
  std::span<const float> query_squares(int layer) const {
    return std::span(query_squares_).subspan(static_cast<size_t>(layer) * key_width_, key_width_);
  }
  // q: [rows][q_heads][head_dim], the queries of consecutive tokens that end the sequence.
  // REQUIRES: not a latent model; rows >= kObservedQueries.
  void ObserveQueries(int layer, const float* q, int rows, int q_heads);

 private:
  size_t Offset(int layer, size_t width) const {
    return static_cast<size_t>(layer) * ids_.size() * width;
  }

  std::vector<int32_t> ids_;
  int layers_;
  int first_position_;
  size_t hidden_;
  std::map<int, std::vector<float>> entering_;  // [tokens][hidden]
  kernels::LayerShape shape_;
  size_t key_width_;
  size_t value_width_;
  std::vector<float> keys_;           // [layers][tokens][keys.kv_heads][keys.head_dim]
  std::vector<float> values_;         // [layers][tokens][values.kv_heads][values.head_dim]
  std::vector<float> query_squares_;  // [layers][key_width]
};
// Queries that ThinK looks at (window_size of NVIDIA/kvpress think_press.py).
inline constexpr int kObservedQueries = 32;

// What a coder stores of a state.
struct CodedSize {
  uint64_t bits = 0;            // all metadata counted but manifests
  uint64_t manifest_bytes = 0;  // of all blocks, of coders whose blocks are the tier's
};

// One baseline. Immutable; borrows nothing but what its maker says.
class StateCoder {
 public:
  // What a reader has of a prefix at one wire, and what was stored for it. `decoded` has the shape
  // of what was coded and is valid for the call.
  using Sink = std::function<void(size_t wire, const PrefixState& decoded, CodedSize size)>;

  virtual ~StateCoder() = default;
  virtual std::string_view name() const = 0;
  // Names of what can be read of a coded state, the fullest first; at least one.
  virtual std::vector<std::string> wires() const { return {"full"}; }
  // How many layers a reader of a wire computes itself; a wire's name ends in @ and that number, if
  // it isn't 0.
  virtual int recomputed_layers(size_t /*wire*/) const { return 0; }
  // Layers of which it asks PrefixState::entering.
  virtual std::vector<int> entering_layers() const { return {}; }
  // Whether a block of kBlockTokens tokens may be coded by itself. Coders that look at a whole
  // prefix, or leave its newest tokens as they are, have no class form.
  virtual bool blockwise() const = 0;
  // Bytes of tables that sender and receiver hold for all prefixes; not among the bits.
  virtual uint64_t table_bytes() const { return 0; }
  // Codes a whole prefix (or, if blockwise, a block) and calls `sink` once for each wire, in their
  // order, so that one decoded state is held at a time. Deterministic. REQUIRES: at least one
  // token; a multiple of kBlockTokens.
  virtual void Code(const PrefixState& exact, const Sink& sink) const = 0;
};

// A text that is not measured, as the states of pieces of it: calls `visit` with one after the
// other. Errors are those of computing them.
using Calibration = std::function<Status(const std::function<void(const PrefixState&)>& visit)>;

struct AquaSample;
struct KltPack;
struct KvtcPack;

// What coders are made from. Single-owner.
struct CoderContext {
  const Model* model = nullptr;                   // borrowed by the coders
  Calibration calibration;                        // empty: there is no such text
  std::shared_ptr<const KltPack> klt_pack;        // nullptr: none was given
  std::shared_ptr<const KvtcPack> kvtc_pack;      // once a coder has learnt it
  std::shared_ptr<const AquaSample> aqua_sample;  // once a coder has drawn it
};

// Names of all coders, in the order of docs/fidelity.md.
std::vector<std::string_view> StateCoderNames();
bool IsStateCoder(std::string_view name);
// kInvalidArgument: the model has no state that the coder could code, or it needs a calibration
// and there is none; says why. Other errors are those of the calibration.
// REQUIRES: IsStateCoder(name).
Result<std::unique_ptr<StateCoder>> MakeStateCoder(std::string_view name, CoderContext* context);

}  // namespace kvant::node
