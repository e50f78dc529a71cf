// What a node attends of a block: its payload in a codec, of all layers or of the global ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "cache_service/manifest.h"
#include "kernels/codec.h"
#include "kernels/payload_layout.h"
#include "node/config.h"

namespace kvant::node {

// Extents read of each part, from the base on. All blocks of a class have the same payload order,
// so the extents that `Cuts` names are a prefix of the payload. Of a form that cuts keys and values
// as one (StoredForm::whole_at_any_cut), both numbers are its cuts.
struct Cuts {
  int keys = 0;
  int values = 0;  // or latents
  // Which of a form's ways to be read (StoredForm::ways) they are cuts of. Other ways read other
  // rows: of what one way has, another has nothing.
  int way = 0;
  bool Covers(const Cuts& other) const {
    return way == other.way && keys >= other.keys && values >= other.values;
  }
  int Of(kernels::SegmentKind kind) const {
    return kind == kernels::SegmentKind::kKey ? keys : values;
  }
  friend bool operator==(const Cuts&, const Cuts&) = default;
};

// Which layers of a block are held: all, or only the global ones, those that attend every token.
// No token attends a sliding layer of a block that lies before its window (docs/adr/0016).
enum class Scope : uint8_t { kGlobal, kAll };

// How much of a block: which extents, of which layers. Cuts alone mean those of all layers.
struct Portion {
  Portion(const Cuts& of_cuts, Scope of_scope = Scope::kAll) : cuts(of_cuts), scope(of_scope) {}

  Cuts cuts;
  Scope scope;
  bool Covers(const Portion& other) const {
    return cuts.Covers(other.cuts) && scope >= other.scope;
  }
  // What both have. REQUIRES: of one way.
  Portion Meet(const Portion& other) const;
  friend bool operator==(const Portion&, const Portion&) = default;
};

// The part that segments of a kind belong to.
Part PartOf(kernels::SegmentKind kind);

// Immutable; a value, and a pure function of its arguments.
class AttendedPayload {
 public:
  AttendedPayload(const kernels::Codec& codec, const ModelConfig& config);

  const kernels::Codec& codec() const { return all_.codec(); }
  // Of a whole block (kBlockTokens tokens) that holds the layers of a scope.
  const kernels::PayloadLayout& layout(Scope scope) const {
    return scope == Scope::kAll ? all_ : global_;
  }
  // [layers of the model]
  const std::vector<bool>& global_layers() const { return global_layers_; }
  Cuts FullCuts() const { return {codec().key_cuts, codec().value_cuts}; }
  uint64_t BytesOf(const Portion& portion) const {
    return layout(portion.scope).BytesOfCuts(portion.cuts.keys, portion.cuts.values);
  }
  // Writes one layer of a block that holds the layers of a scope. keys, values: as a LayerSink gets
  // them, kBlockTokens tokens. max_errors: nullptr, or [row], as layout(scope).rows(): those of
  // this layer are set. REQUIRES: the layer is in the scope.
  void EncodeLayer(int layer, Scope scope, const float* keys, const float* values,
                   std::byte* payload, float* max_errors) const;
  // That the bytes of one layer are well-formed in this codec (Codec::check). bytes: a block's
  // BytesOf(portion) bytes. kDataLoss otherwise. REQUIRES: the layer is in the portion's scope.
  Status CheckLayer(int layer, const Portion& portion, std::span<const std::byte> bytes) const;

 private:
  std::vector<bool> global_layers_;
  kernels::PayloadLayout all_;
  kernels::PayloadLayout global_;
};

}  // namespace kvant::node
