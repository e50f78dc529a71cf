// The class of a node's blocks: everything that their bytes are a function of besides their tokens.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "cache_service/block_key.h"
#include "cache_service/cache_client.h"
#include "cache_service/manifest.h"
#include "kernels/codec.h"
#include "kernels/payload_layout.h"
#include "node/attended_payload.h"
#include "node/model.h"
#include "node/stored_form.h"

namespace kvant::node {

// How much of a stored block decode reads: bits of keys and of values. A block's own bits bound it.
// kCut1..: the first cuts of a form that cuts keys and values as one; they go by the form's names.
enum class Wire : uint8_t { kFull, kK8V4, kK4V4, kAuto, kCut1, kCut2, kCut3, kCut4 };
// kInvalidArgument lists the names: full, k8v4, k4v4, auto.
Result<Wire> ParseWire(std::string_view name);
std::string_view WireName(Wire wire);

// At most so many cuts in each of so many ways.
inline constexpr size_t kMaxChoices = kMaxWays * kMaxCuts;

// One of the ways to read a class's blocks.
struct ReadChoice {
  std::string name;  // of the wire, or of the form's cut and way
  Cuts cuts;
  // Mean KL (nats a token) that reading so was measured to cost, against raw; 0 of raw itself.
  // Nothing: nobody says.
  std::optional<float> error;
};

// Which tenants share blocks: a tenant's domain is its own name unless it was put into another.
class Domains {
 public:
  // Each entry "DOMAIN=tenant,tenant,...". kInvalidArgument names the entry.
  static Result<Domains> Parse(std::span<const std::string> entries);
  // The domain of a tenant. The empty tenant is a tenant like any other.
  std::string DomainOf(std::string_view tenant) const;

 private:
  std::vector<std::pair<std::string, std::string>> domain_of_;  // tenant, domain
};

// Immutable; thread-safe. Borrows the model.
// Bytes of three kinds are told apart: those attended (the payload in the codec, of fixed sizes),
// those stored (what the tier has and wires carry; StoredForm), and bf16, with which both are
// compared.
class BlockClass {
 public:
  // form: how blocks of this class are put; nullptr: plain. It is of the same codec and model.
  // Whatever form has the same numerics (StoredForm::numerics) is read.
  BlockClass(const Model* model, const kernels::Codec* codec,
             std::span<const std::byte> cluster_secret, StoredFormPtr form = nullptr);

  const Model& model() const { return *model_; }
  const kernels::Codec& codec() const { return *codec_; }
  const AttendedPayload& attended() const { return attended_; }
  // The attended payload of a whole block (kBlockTokens tokens, all layers).
  const kernels::PayloadLayout& layout() const { return layout(Scope::kAll); }
  // Of a block that holds the layers of a scope.
  const kernels::PayloadLayout& layout(Scope scope) const { return attended_.layout(scope); }
  // Attended bytes, in memory.
  uint64_t payload_bytes() const { return layout().total_bytes(); }
  uint64_t BytesOf(const Portion& portion) const { return attended_.BytesOf(Attended(portion)); }
  // What is attended of a block of which a portion was read.
  Portion Attended(const Portion& portion) const {
    return form().whole_at_any_cut() ? Portion(attended_.FullCuts(), portion.scope) : portion;
  }
  // Whether a block in memory is what those attend who want `wanted`.
  bool Serves(const Portion& held, const Portion& wanted) const {
    return held.Covers(wanted) && (!form().whole_at_any_cut() || held.cuts == wanted.cuts);
  }
  // The layers of which a token at `position` or behind it attends anything in block `block` of
  // its sequence. REQUIRES: the block ends at `position` or before.
  Scope ScopeAttended(size_t block, size_t position) const;
  // What of a stored block makes `wanted` out of `held` (nullptr: out of nothing). Never a row that
  // `held` has, never one twice; the rows of a layer are all in one selection.
  std::vector<Selection> Missing(const Portion* held, const Portion& wanted) const;
  // How blocks are put.
  const StoredForm& form() const { return *forms_.front(); }
  // The form of a block in the tier. kUnsupported says what is missing to read it.
  Result<const StoredForm*> FormOf(const BlockManifest& manifest) const;
  // Whether a block in the tier may be one of this class, by what a lookup says of it.
  bool MayBe(const LookupBlock& found) const;
  // What a selection of a stored block moves at most and, for forecasts, about. ends: what a lookup
  // said of the block; all 0 where nobody did.
  uint64_t MostBytes(const Selection& selection, const CutEnds& ends) const;
  uint64_t LikelyBytes(const Selection& selection, const CutEnds& ends) const;
  // Of a whole stored block of any form that is read.
  uint64_t most_stored_bytes() const;

  Cuts FullCuts() const { return form().full_cuts(); }
  // REQUIRES: wire != kAuto.
  Cuts CutsOf(Wire wire) const;
  // What is read may be chosen among: each of the cuts that wires name once, all of them first,
  // then ever fewer; then those of the form's other ways, likewise. 1..kMaxChoices of them.
  std::span<const ReadChoice> choices() const { return choices_; }
  // Those of the first way.
  std::span<const ReadChoice> own_choices() const { return choices().first(own_choices_); }
  // Index of the choice that reads these cuts. REQUIRES: CutsOf gave them.
  size_t ChoiceOf(const Cuts& cuts) const;
  // What takes long to decode takes alike: kMaxCuts times the way, and how many cuts are decoded
  // of what is read, less one. Forms that are not whole at any cut decode all they read alike: 0.
  size_t DecodeDepth(const Cuts& cuts) const {
    const size_t depth = static_cast<size_t>(std::max(cuts.keys, cuts.values)) - 1;
    return form().whole_at_any_cut() ? static_cast<size_t>(cuts.way) * kMaxCuts + depth : 0;
  }
  // What is read of block `block` of a sequence where `read` is read of the others. The first one
  // is read in full: in it are the attention sinks, tokens that all others attend strongly (Xiao et
  // al. 2024, "Efficient streaming language models with attention sinks", section 3.1;
  // docs/adr/0018). Forms that are whole at any cut code those tokens finely in each.
  Cuts ReadCuts(size_t block, const Cuts& read) const {
    return block == 0 && !form().whole_at_any_cut() ? FullCuts() : read;
  }
  // What decoding so many layers of a block amounts to, in tokens of which all layers are decoded.
  double TokensOfLayers(size_t layers) const {
    return static_cast<double>(layers) * layout().shape().keys.tokens / layout().layers();
  }
  // Layers of the model that are decoded of what is read: those in scope that are not recomputed.
  size_t DecodedLayers(const Portion& portion) const;
  // What computing 1..kBlockTokens tokens behind `position` others amounts to, in tokens that
  // attend nothing before their block. The products of fewer tokens than a block's have as many
  // rows. layers: of the first so many alone.
  double PrefillWork(int position, int tokens) const;
  double PrefillWork(int position, int tokens, int layers) const;
  // Bytes of one token's state in bf16, all layers: what is moved where nothing is compressed.
  uint64_t Bf16BytesPerToken() const;

  // Keys of the whole blocks of `tokens` under `domain`.
  std::vector<BlockKey> Keys(std::span<const int32_t> tokens, std::string_view domain) const;
  // Writes one layer of a whole block into its payload, as AttendedPayload does.
  void EncodeLayer(int layer, const float* keys, const float* values, std::byte* payload,
                   float* max_errors) const {
    attended_.EncodeLayer(layer, Scope::kAll, keys, values, payload, max_errors);
  }
  // That a manifest from elsewhere describes a whole block of this class under `key`. kDataLoss
  // says what differs. kUnsupported: it may, but in a form that is not read here.
  Status CheckManifest(const BlockKey& key, const BlockManifest& manifest) const;

 private:
  const Model* model_;
  const kernels::Codec* codec_;
  AttendedPayload attended_;
  std::vector<StoredFormPtr> forms_;     // that are read; the first is written
  std::vector<StoredRow> longest_rows_;  // of all of them
  std::vector<ReadChoice> choices_;
  size_t own_choices_ = 0;
  std::vector<std::byte> cluster_secret_;
};

}  // namespace kvant::node
