// The manifest of a block: which bytes of its payload are which part, cut, layer and kind, and the
// checksum of each of them. docs/wire-protocol.md specifies the encoded form.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/status.h"
#include "cache_service/block_key.h"

namespace kvant {

inline constexpr size_t kMaxParts = 4;
inline constexpr size_t kMaxCuts = 4;
inline constexpr size_t kMaxKinds = 16;
inline constexpr size_t kMaxLayers = 1024;
inline constexpr size_t kMaxManifestRows = 8192;
inline constexpr uint64_t kMaxPayloadBytes = uint64_t{1} << 30;
inline constexpr uint32_t kMaxBlockTokenCount = 65536;
inline constexpr uint8_t kManifestVersion = 1;

// Parts of the payload that are cut as one. Opaque to the cache; named here so that all agree.
enum class Part : uint8_t { kKeys = 0, kValues = 1, kState = 2 };

// XXH3-64 with seed 0: the checksum of every payload range.
uint64_t PayloadChecksum(std::span<const std::byte> bytes);

// One contiguous range of the payload.
struct ManifestRow {
  uint8_t part = 0;     // < kMaxParts
  uint8_t cut = 0;      // < kMaxCuts; 0 is the base, c refines c - 1
  uint16_t layer = 0;   // < kMaxLayers
  uint8_t kind = 0;     // < kMaxKinds, segment kind
  uint64_t offset = 0;  // bytes from the payload's start
  uint32_t length = 0;  // bytes, > 0
  uint64_t checksum = 0;
  float declared_error = 0;  // largest absolute error up to this cut; finite, >= 0
  friend bool operator==(const ManifestRow&, const ManifestRow&) = default;
};

// Payload bytes up to the end of each cut, of all parts together; from the last cut on, of the
// whole payload. All 0: not known.
using CutEnds = std::array<uint64_t, kMaxCuts>;

// Cuts of the part that has the most.
int CutCount(const std::array<uint8_t, kMaxParts>& cuts);

// What of a block is wanted: which cuts of each part, in which layers. A value; Validate() says
// whether it has the one form that its meaning has:
// 1. layer_begin < layer_end <= kMaxLayers.
// 2. layers is empty, or has layer_end - layer_begin elements, of which the first and the last are
// set and not all are.
// 3. Of each part, first_cuts < cuts, or both are 0.
struct Selection {
  std::array<uint8_t, kMaxParts> cuts{};  // past the last; 0: nothing of this part; 255: all
  // What is below, the reader has already.
  std::array<uint8_t, kMaxParts> first_cuts{};
  uint16_t layer_begin = 0;
  uint16_t layer_end = kMaxLayers;  // past the last
  std::vector<bool> layers;         // of those between: whether it is wanted; empty: all are

  // Wants the layers l with wanted[l], and no others.
  // REQUIRES: 1 to kMaxLayers elements, one of them set.
  void SetLayers(const std::vector<bool>& wanted);
  // Whether a row is wanted. REQUIRES: Validate().ok(), part < kMaxParts.
  bool Takes(uint8_t part, uint8_t cut, uint16_t layer) const {
    return cut < cuts[part] && cut >= first_cuts[part] && layer >= layer_begin &&
           layer < layer_end && (layers.empty() || layers[layer - layer_begin]);
  }
  // kInvalidArgument names the rule.
  Status Validate() const;
  friend bool operator==(const Selection&, const Selection&) = default;
};
// Everything of every layer.
Selection SelectAll();

// A stretch of the payload that travels as one transfer.
struct SelectedRange {
  uint16_t layer = 0;
  bool last_of_layer = false;
  uint64_t payload_offset = 0;
  uint64_t packed_offset = 0;  // place in the destination, see SelectRanges
  uint64_t length = 0;
};
// A row and its place in the destination.
struct SelectedRow {
  size_t row = 0;  // index into rows
  uint64_t packed_offset = 0;
};

// Value; Validate() says whether the invariants hold:
// 1. Rows are strictly increasing in (cut, part, layer, kind) and stand in the payload in that
// order without gap or overlap, from offset 0. So offsets follow from lengths, and a prefix of the
// payload is the block at a lower cut.
// 2. If cut c > 0 of a (part, layer, kind) is there, so is cut c - 1.
// 3. Limits above hold.
struct BlockManifest {
  BlockKey key;
  uint32_t codec = 0;             // opaque tag
  std::optional<Digest> basis{};  // what the receiver must have to decode, e.g. a codec pack
  uint32_t token_count = 0;       // 1..kMaxBlockTokenCount
  std::vector<ManifestRow> rows;

  // Appends a row behind those that are there, with offset and checksum filled in. Rows are added
  // in the order of invariant 1. bytes: the row's payload.
  void Append(uint8_t part, uint8_t cut, uint16_t layer, uint8_t kind,
              std::span<const std::byte> bytes, float declared_error);
  // kInvalidArgument names the row and the invariant.
  Status Validate() const;
  uint64_t payload_bytes() const {
    return rows.empty() ? 0 : rows.back().offset + rows.back().length;
  }
  // Cuts there are of each part (0: part absent).
  std::array<uint8_t, kMaxParts> CutsAvailable() const;
  CutEnds EndsOfCuts() const;
  uint16_t LayerEnd() const;  // past the highest layer

  friend bool operator==(const BlockManifest&, const BlockManifest&) = default;
};

// The transfers of a selection (a valid one, here and below), layer-major: all of the lowest layer
// first, and inside a layer in the order of rows; neighbours in the payload of one layer are
// merged. The destination is packed: the ranges stand there in this order without gaps, so each
// layer is contiguous in it.
std::vector<SelectedRange> SelectRanges(const BlockManifest& manifest, const Selection& selection);
// The same, row by row.
std::vector<SelectedRow> SelectRows(const BlockManifest& manifest, const Selection& selection);
// Bytes of a selection: the size of its destination.
uint64_t SelectedBytes(const BlockManifest& manifest, const Selection& selection);

// Checks `bytes` (the whole row) against the row's length and checksum. kDataLoss: they differ.
Status VerifyRange(const BlockManifest& manifest, size_t row, std::span<const std::byte> bytes);
// Checks one layer of a packed destination. kDataLoss: a range differs, or lies outside `packed`.
Status VerifyPackedLayer(const BlockManifest& manifest, const Selection& selection, uint16_t layer,
                         std::span<const std::byte> packed);
// Checks a whole payload. kDataLoss: a range differs, or the size does.
Status VerifyPayload(const BlockManifest& manifest, std::span<const std::byte> payload);

// The canonical encoded form: equal manifests give equal bytes, and a checksum at its end detects
// a flipped byte. REQUIRES: Validate().ok().
std::vector<std::byte> EncodeManifest(const BlockManifest& manifest);
// No manifest of `rows` rows encodes to more: what a put reserves before it knows its checksums.
uint64_t MaxManifestBytes(size_t rows);
// The strict reverse, for bytes that nobody vouches for: what it accepts is valid and encodes to
// the same bytes again. kDataLoss: the checksum differs. kInvalidArgument: malformed.
Result<BlockManifest> ParseManifest(std::span<const std::byte> bytes);

}  // namespace kvant
