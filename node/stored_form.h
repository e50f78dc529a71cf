// How a block stands in the tier and travels. The plain form is the attended payload itself; others
// have fewer bytes, of lengths that only the block's manifest knows, and are made when a block is
// put and read when it is fetched (docs/adr/0020).
//
// A form says which rows a block's manifest has. Their `layer` is the form's own: the model's in
// plain and lossless blocks; elsewhere it may be a group of layers that are read together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "cache_service/block_key.h"
#include "cache_service/manifest.h"
#include "node/attended_payload.h"

namespace kvant::node {

// BlockManifest::codec of forms that are not plain; a plain block has its kernels::CodecId, which
// are below. docs/block-format.md lists them.
enum class FormTag : uint32_t { kLossless = 16, kKlt = 17, kKltExact = 18, kBeside = 19 };

// Ways that a form may have to be read.
inline constexpr size_t kMaxWays = 4;

// One of the ways to read a block: which rows, and what they cost. The first is what prefill
// attends; others give a payload of the same layout from other rows.
struct StoredWay {
  // Behind the names of its cuts in a choice of what is read; empty of the first way.
  std::string suffix;
  // The form's layers that it reads: from layer_begin to before layer_end.
  uint16_t layer_begin = 0;
  uint16_t layer_end = 0;
  // [cut] of a form that is whole at any cut, else empty: names, and the mean KL (nats a token)
  // that reading up to a cut was measured to cost.
  std::vector<std::string> cut_names;
  std::vector<float> cut_errors;
  // The model's first layers that a reader computes itself. With any, the next one's state follows
  // from what enters it, and what enters it is side information for reading the others.
  int recomputed = 0;
  // Whether decoding takes so long that it counts beside moving the bytes.
  bool takes_long = true;
  // Cuts of each kind, all there are.
  Cuts full;
};

// A row that every whole block of a form has.
struct StoredRow {
  uint8_t part = 0;
  uint8_t cut = 0;
  uint16_t layer = 0;
  uint8_t kind = 0;
  uint64_t min_bytes = 1;
  uint64_t max_bytes = 1;
  // About, for forecasts: beside other rows of its block. 0: as max_bytes.
  uint64_t likely_bytes = 0;
};

// A whole block that was computed.
struct BlockToStore {
  BlockKey key;
  std::span<const int32_t> tokens;    // kBlockTokens of them
  int position = 0;                   // of the first
  std::span<const float> max_errors;  // [row], as AttendedPayload::EncodeLayer set them; not lossy
  // Forms that are whole at any cut only: what a LayerSink got, [layers][kBlockTokens x width of
  // its keys or values].
  std::span<const std::vector<float>> keys;
  std::span<const std::vector<float>> values;
  // [way]: what enters the first layer that a reader of that way does not recompute,
  // [kBlockTokens][hidden]; empty of ways that recompute nothing.
  std::span<const std::vector<float>> entering;
};
struct StoredBlock {
  BlockManifest manifest;
  std::vector<std::byte> bytes;  // in the order of the manifest's rows; empty of a plain block
};

// Some rows of one stored block in memory of their own, in the order of its manifest.
class StoredRows {
 public:
  StoredRows() = default;
  // Room for the rows that are wanted (by index), none of them filled.
  StoredRows(std::shared_ptr<const BlockManifest> manifest,
             const std::function<bool(size_t row)>& wanted);
  // Of a block that is here whole.
  explicit StoredRows(StoredBlock block);

  // nullptr: there are none.
  const std::shared_ptr<const BlockManifest>& manifest() const { return manifest_; }
  bool Holds(size_t row) const { return offsets_[row] != kNone; }
  // REQUIRES: Holds(row).
  std::span<std::byte> Row(size_t row);
  std::span<const std::byte> Row(size_t row) const;
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  static constexpr uint64_t kNone = ~uint64_t{0};
  std::shared_ptr<const BlockManifest> manifest_;
  std::vector<uint64_t> offsets_;  // [rows of the manifest]
  std::vector<std::byte> bytes_;
};

// A block of which a portion is read. All is borrowed for the reader's life, but for the manifest.
struct BlockToRead {
  std::shared_ptr<const BlockManifest> manifest;  // passed BlockClass::CheckManifest
  std::span<const int32_t> tokens;                // kBlockTokens of them
  int position = 0;                               // of the first
  Portion portion{Cuts()};
  std::span<std::byte> payload;  // what will be attended
  // Rows that arrived; of a form that is whole at any cut also those held before.
  const StoredRows* stored = nullptr;
  // [row of the form]: its index in the manifest. Empty: they are the same.
  std::span<const size_t> rows{};
  std::span<const std::byte> Row(size_t of_form) const {
    return stored->Row(rows.empty() ? of_form : rows[of_form]);
  }
  // Of a portion's way that recomputes layers: what enters the next one, [kBlockTokens][hidden];
  // there before the first layer is read. nullptr: the way recomputes nothing.
  const std::vector<float>* entering = nullptr;
};

// Makes a block's attended payload out of its stored rows as they arrive. Single-owner.
class StoredReader {
 public:
  virtual ~StoredReader() = default;
  // All of the portion's rows of one of the form's layers are there and were verified: in
  // BlockToRead::stored; of a plain block in the payload, and so what was copied there of layers
  // that a block in memory had. Called once a layer, in any order. Appends the layers of the model
  // that may be attended now. kDataLoss: the bytes are not well-formed.
  virtual Status Arrived(uint16_t layer, std::vector<int>* ready) = 0;
};

// Immutable; thread-safe.
class StoredForm {
 public:
  virtual ~StoredForm() = default;
  StoredForm(const StoredForm&) = delete;
  StoredForm& operator=(const StoredForm&) = delete;

  std::string_view name() const { return facts_.name; }
  uint32_t tag() const { return facts_.tag; }
  // What a reader must have, e.g. the digest of a codec pack; part of every manifest.
  const std::optional<Digest>& basis() const { return facts_.basis; }
  // Whether what is stored is the attended payload, byte for byte.
  bool plain() const { return facts_.plain; }
  // Whether any cuts give a whole payload, those of fewer cuts a less exact one; else each cut adds
  // bytes of its own to it. Then
  // 1. a block in memory serves those who want exactly its cuts;
  // 2. blocks in memory keep their stored rows: they are what more of the block builds upon, what
  //    fewer cuts are read from, and what is published.
  bool whole_at_any_cut() const { return facts_.whole_at_any_cut; }
  // Whether all of a stored block is still less exact than what was computed. Then what is attended
  // is decoded from it, by who computed it as well, and depends on the form, so that the form is
  // part of the numerics class. Only of forms that are whole at any cut.
  bool lossy() const { return facts_.lossy; }
  // Behind the codec's name in the numerics class; empty unless lossy.
  const std::string& numerics() const { return facts_.numerics; }
  // Of a whole block, in the manifest's order.
  std::span<const StoredRow> rows() const { return facts_.rows; }
  // [the form's layers]: whether it is needed where only the model's global layers are attended.
  const std::vector<bool>& global_layers() const { return facts_.global_layers; }
  // 1..kMaxWays, more than one only of forms that are whole at any cut.
  std::span<const StoredWay> ways() const { return facts_.ways; }
  const StoredWay& WayOf(const Cuts& cuts) const {
    return facts_.ways[static_cast<size_t>(cuts.way)];
  }
  // Of the first way.
  const std::vector<std::string>& cut_names() const { return facts_.ways.front().cut_names; }
  const std::vector<float>& cut_errors() const { return facts_.ways.front().cut_errors; }
  // All there are of the first way.
  const Cuts& full_cuts() const { return facts_.ways.front().full; }
  // Cuts of each part that `cuts` names, as in a Selection; of a whole block.
  std::array<uint8_t, kMaxParts> PartCuts(const Cuts& cuts) const;
  std::array<uint8_t, kMaxParts> AllPartCuts() const;
  // [the form's layers]: those of a portion's way and scope.
  std::vector<bool> LayersOf(const Portion& portion) const;
  // Whether a row is in a portion.
  bool InPortion(const ManifestRow& row, const Portion& portion) const;

  // Makes what is stored. payload: the attended one, which a lossy form writes and others read.
  virtual void Encode(const BlockToStore& block, std::span<std::byte> payload,
                      StoredBlock* out) const = 0;
  virtual std::unique_ptr<StoredReader> MakeReader(const BlockToRead& block) const = 0;

 protected:
  struct Facts {
    std::string name;
    uint32_t tag = 0;
    std::optional<Digest> basis{};
    bool plain = false;
    bool whole_at_any_cut = false;
    bool lossy = false;
    std::string numerics;
    std::vector<StoredRow> rows;
    std::vector<bool> global_layers;
    std::vector<StoredWay> ways;  // `full` is found from the rows
  };
  explicit StoredForm(Facts facts);

 private:
  Facts facts_;
};
using StoredFormPtr = std::shared_ptr<const StoredForm>;

// A form each of whose rows is a range of the attended payload, by itself. Immutable; thread-safe.
class RowForm : public StoredForm {
 public:
  // A row as it is stored, of a whole payload; appended.
  virtual void EncodeRow(size_t row, std::span<const std::byte> payload,
                         std::vector<std::byte>* out) const = 0;
  // The range that a row stands for, into a payload that holds the layers of a scope. kDataLoss: it
  // is not well-formed.
  virtual Status DecodeRow(size_t row, std::span<const std::byte> stored, Scope scope,
                           std::span<std::byte> payload) const = 0;

 protected:
  using StoredForm::StoredForm;
};

// The manifest of a whole block stored plain. max_errors: [row], as AttendedPayload::EncodeLayer
// set them.
BlockManifest PlainManifest(const AttendedPayload& attended, const BlockKey& key,
                            std::span<const std::byte> payload, std::span<const float> max_errors);

// Any codec.
std::shared_ptr<const RowForm> MakePlainForm(const AttendedPayload& attended);
// Segments of kernels/lossless.h. REQUIRES: LosslessFits(codec).
std::shared_ptr<const RowForm> MakeLosslessForm(const AttendedPayload& attended);
bool LosslessFits(const kernels::Codec& codec);
// Whether there is a form of this name for a codec, before a model is loaded. kInvalidArgument:
// there is none (the message lists the names), or it does not fit the codec.
Status CheckStoredForm(std::string_view name, const kernels::Codec& codec);
// The form `--store` names. REQUIRES: CheckStoredForm; not klt, which needs a pack (klt_form.h).
std::shared_ptr<const RowForm> MakeStoredForm(std::string_view name,
                                              const AttendedPayload& attended);

}  // namespace kvant::node
