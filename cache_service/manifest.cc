#include "cache_service/manifest.h"

#include <xxhash.h>
#if defined(KV_XXHASH_DISPATCHES)
#include <xxh_x86dispatch.h>  // makes XXH3_64bits choose the widest registers that are here
#endif

#include <algorithm>
#include <bit>
#include <cmath>
#include <tuple>

#include "base/bytes.h"
#include "base/check.h"

namespace kvant {
namespace {

// A row's first byte says what follows; what does not follow is as the row before predicts. Rows
// mostly go on to the next layer with the same length, so a row takes 9 to 13 bytes.
enum RowTag : uint8_t {
  kPositionFollows = 1,  // part, cut, kind: one byte each; layer: varint
  kLengthFollows = 2,    // varint
  kErrorFollows = 4,     // float
};
constexpr uint8_t kHasBasis = 1;
constexpr size_t kTrailerBytes = 8;
constexpr size_t kMaxVarint = 10;
constexpr size_t kMaxRowBytes = 1 + 3 + 2 + 5 + 4 + 8;  // layer < 2^14, length < 2^32
constexpr size_t kMaxHeaderBytes = 1 + 1 + kDigestBytes + 4 + kDigestBytes + 2 * kMaxVarint;

auto Position(const ManifestRow& row) {
  return std::make_tuple(row.cut, row.part, row.layer, row.kind);
}

class Writer {
 public:
  void U8(uint8_t value) { out_.push_back(static_cast<std::byte>(value)); }
  template <typename T>
  void Little(T value) {
    std::byte bytes[sizeof(T)];
    StoreLittle(bytes, value);
    Bytes(bytes);
  }
  void Bytes(std::span<const std::byte> bytes) {
    out_.insert(out_.end(), bytes.begin(), bytes.end());
  }
  void Varint(uint64_t value) {
    while (value >= 128) {
      U8(static_cast<uint8_t>(value | 128));
      value >>= 7;
    }
    U8(static_cast<uint8_t>(value));
  }
  std::vector<std::byte> Take() { return std::move(out_); }
  std::span<const std::byte> bytes() const { return out_; }

 private:
  std::vector<std::byte> out_;
};

// Reads past the end give zeros and clear ok().
class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : rest_(bytes) {}

  bool ok() const { return ok_; }
  size_t left() const { return rest_.size(); }
  uint8_t U8() {
    const auto bytes = Bytes(1);
    return bytes.empty() ? 0 : static_cast<uint8_t>(bytes[0]);
  }
  template <typename T>
  T Little() {
    const auto bytes = Bytes(sizeof(T));
    return bytes.empty() ? 0 : LoadLittle<T>(bytes.data());
  }
  std::span<const std::byte> Bytes(size_t count) {
    if (count > rest_.size()) {
      ok_ = false;
      rest_ = {};
      return {};
    }
    const auto bytes = rest_.first(count);
    rest_ = rest_.subspan(count);
    return bytes;
  }
  uint64_t Varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const uint8_t byte = U8();
      value |= static_cast<uint64_t>(byte & 127) << shift;
      if (byte < 128) return value;
    }
    ok_ = false;
    return 0;
  }

 private:
  std::span<const std::byte> rest_;
  bool ok_ = true;
};

// What a row says when its tag is 0: the next layer of the same part, cut, kind and length.
ManifestRow Predict(const ManifestRow* previous) {
  ManifestRow row;
  if (previous == nullptr) return row;
  row = *previous;
  ++row.layer;
  return row;
}

// Reads one row; offset is left to the caller. Values out of range are left to Validate, those
// that do not even fit their field are kInvalidArgument.
Status ReadRow(Reader* reader, const ManifestRow* previous, ManifestRow* row) {
  *row = Predict(previous);
  const uint8_t tag = reader->U8();
  if (tag & ~(kPositionFollows | kLengthFollows | kErrorFollows)) {
    return InvalidArgument("unknown row tag {}", tag);
  }
  if (tag & kPositionFollows) {
    row->part = reader->U8();
    row->cut = reader->U8();
    row->kind = reader->U8();
    const uint64_t layer = reader->Varint();
    if (layer >= kMaxLayers) return InvalidArgument("layer {} is too large", layer);
    row->layer = static_cast<uint16_t>(layer);
  }
  if (tag & kLengthFollows) {
    const uint64_t length = reader->Varint();
    if (length > kMaxPayloadBytes) return InvalidArgument("length {} is too large", length);
    row->length = static_cast<uint32_t>(length);
  }
  if (tag & kErrorFollows) row->declared_error = std::bit_cast<float>(reader->Little<uint32_t>());
  row->checksum = reader->Little<uint64_t>();
  return OkStatus();
}

Status ReadBody(std::span<const std::byte> body, BlockManifest* manifest) {
  Reader reader(body);
  const uint8_t version = reader.U8();
  if (version != kManifestVersion)
    return InvalidArgument("version {}, not {}", version, kManifestVersion);
  const uint8_t flags = reader.U8();
  if (flags & ~kHasBasis) return InvalidArgument("unknown flags {}", flags);
  KV_ASSIGN_OR_RETURN(manifest->key, BlockKey::FromBytes(reader.Bytes(kDigestBytes)));
  manifest->codec = reader.Little<uint32_t>();
  if (flags & kHasBasis) {
    const auto basis = reader.Bytes(kDigestBytes);
    if (!reader.ok()) return InvalidArgument("it ends in its basis");
    std::copy(basis.begin(), basis.end(), manifest->basis.emplace().begin());
  }
  const uint64_t token_count = reader.Varint();
  const uint64_t rows = reader.Varint();
  if (token_count > kMaxBlockTokenCount) return InvalidArgument("{} tokens", token_count);
  // A row has at least 9 bytes: a small message cannot make us allocate much.
  if (rows > kMaxManifestRows || rows > reader.left() / 9) return InvalidArgument("{} rows", rows);
  manifest->token_count = static_cast<uint32_t>(token_count);
  manifest->rows.resize(rows);
  uint64_t offset = 0;
  for (size_t i = 0; i < rows; ++i) {
    ManifestRow& row = manifest->rows[i];
    KV_RETURN_IF_ERROR(ReadRow(&reader, i == 0 ? nullptr : &manifest->rows[i - 1], &row));
    row.offset = offset;
    offset += row.length;
  }
  if (!reader.ok() || reader.left() != 0)
    return InvalidArgument("its length is not that of {} rows", rows);
  return OkStatus();
}

// Indices of the selected rows, layer-major.
std::vector<size_t> SelectedIndices(const BlockManifest& manifest, const Selection& selection) {
  std::vector<size_t> indices;
  for (size_t i = 0; i < manifest.rows.size(); ++i) {
    const ManifestRow& row = manifest.rows[i];
    if (selection.Takes(row.part, row.cut, row.layer)) indices.push_back(i);
  }
  std::stable_sort(indices.begin(), indices.end(), [&](size_t a, size_t b) {
    return manifest.rows[a].layer < manifest.rows[b].layer;
  });
  return indices;
}

}  // namespace

uint64_t PayloadChecksum(std::span<const std::byte> bytes) {
  return XXH3_64bits(bytes.data(), bytes.size());
}

Selection SelectAll() {
  Selection selection;
  selection.cuts.fill(255);
  return selection;
}

void Selection::SetLayers(const std::vector<bool>& wanted) {
  const auto first = std::find(wanted.begin(), wanted.end(), true);
  KV_CHECK(first != wanted.end() && wanted.size() <= kMaxLayers);
  const auto end = std::find(wanted.rbegin(), wanted.rend(), true).base();
  layer_begin = static_cast<uint16_t>(first - wanted.begin());
  layer_end = static_cast<uint16_t>(end - wanted.begin());
  layers.clear();
  if (std::find(first, end, false) != end) layers.assign(first, end);
}

Status Selection::Validate() const {
  if (layer_begin >= layer_end || layer_end > kMaxLayers) {
    return InvalidArgument("selection: layers {} to {} are not a range inside 0 to {}", layer_begin,
                           layer_end, kMaxLayers);
  }
  if (!layers.empty() &&
      (layers.size() != static_cast<size_t>(layer_end - layer_begin) || !layers.front() ||
       !layers.back() || std::find(layers.begin(), layers.end(), false) == layers.end())) {
    return InvalidArgument(
        "selection: a set of {} layers from {} to {} must begin and end with a layer that is in "
        "it, and lack one",
        layers.size(), layer_begin, layer_end);
  }
  for (size_t part = 0; part < kMaxParts; ++part) {
    if (first_cuts[part] < cuts[part] || (first_cuts[part] == 0 && cuts[part] == 0)) continue;
    return InvalidArgument("selection: of part {} the cuts from {} to below {} are none", part,
                           first_cuts[part], cuts[part]);
  }
  return OkStatus();
}

void BlockManifest::Append(uint8_t part, uint8_t cut, uint16_t layer, uint8_t kind,
                           std::span<const std::byte> bytes, float declared_error) {
  KV_CHECK(bytes.size() <= kMaxPayloadBytes);
  ManifestRow row;
  row.part = part;
  row.cut = cut;
  row.layer = layer;
  row.kind = kind;
  row.offset = payload_bytes();
  row.length = static_cast<uint32_t>(bytes.size());
  row.checksum = PayloadChecksum(bytes);
  row.declared_error = declared_error;
  rows.push_back(row);
}

Status BlockManifest::Validate() const {
  if (key.IsZero()) return InvalidArgument("manifest: the key is all zeros");
  if (token_count == 0 || token_count > kMaxBlockTokenCount) {
    return InvalidArgument("manifest: {} tokens, 1 to {} are possible", token_count,
                           kMaxBlockTokenCount);
  }
  if (rows.empty() || rows.size() > kMaxManifestRows) {
    return InvalidArgument("manifest: {} rows, 1 to {} are possible", rows.size(),
                           kMaxManifestRows);
  }
  uint64_t end = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    const ManifestRow& row = rows[i];
    if (row.part >= kMaxParts || row.cut >= kMaxCuts || row.layer >= kMaxLayers ||
        row.kind >= kMaxKinds) {
      return InvalidArgument("manifest row {}: part {}, cut {}, layer {}, kind {} is out of range",
                             i, row.part, row.cut, row.layer, row.kind);
    }
    if (i > 0 && !(Position(rows[i - 1]) < Position(row))) {
      return InvalidArgument("manifest row {}: rows are not in order of cut, part, layer, kind", i);
    }
    if (row.offset != end) {
      return InvalidArgument("manifest row {}: offset {}, but the row before ends at {}", i,
                             row.offset, end);
    }
    if (row.length == 0 || !RangeFits(row.offset, row.length, kMaxPayloadBytes)) {
      return InvalidArgument("manifest row {}: length {} at offset {} is not possible", i,
                             row.length, row.offset);
    }
    end += row.length;
    if (!std::isfinite(row.declared_error) || std::signbit(row.declared_error)) {
      return InvalidArgument("manifest row {}: declared error {} is not a finite number >= 0", i,
                             row.declared_error);
    }
    if (row.cut == 0) continue;
    ManifestRow below = row;
    --below.cut;
    const auto found = std::lower_bound(
        rows.begin(), rows.begin() + static_cast<ptrdiff_t>(i), below,
        [](const ManifestRow& a, const ManifestRow& b) { return Position(a) < Position(b); });
    if (Position(*found) != Position(below)) {
      return InvalidArgument("manifest row {}: cut {} refines cut {}, which is not there", i,
                             row.cut, below.cut);
    }
  }
  return OkStatus();
}

std::array<uint8_t, kMaxParts> BlockManifest::CutsAvailable() const {
  std::array<uint8_t, kMaxParts> cuts{};
  for (const ManifestRow& row : rows) {
    cuts[row.part] = std::max<uint8_t>(cuts[row.part], row.cut + 1);
  }
  return cuts;
}

int CutCount(const std::array<uint8_t, kMaxParts>& cuts) {
  return *std::max_element(cuts.begin(), cuts.end());
}

CutEnds BlockManifest::EndsOfCuts() const {
  CutEnds ends;
  ends.fill(payload_bytes());
  // From the last row on, so that the first row above each cut has the last word.
  for (size_t i = rows.size(); i-- > 0;) {
    for (size_t cut = 0; cut < rows[i].cut; ++cut) ends[cut] = rows[i].offset;
  }
  return ends;
}

uint16_t BlockManifest::LayerEnd() const {
  uint16_t end = 0;
  for (const ManifestRow& row : rows) end = std::max<uint16_t>(end, row.layer + 1);
  return end;
}

std::vector<SelectedRow> SelectRows(const BlockManifest& manifest, const Selection& selection) {
  std::vector<SelectedRow> selected;
  uint64_t packed = 0;
  for (const size_t i : SelectedIndices(manifest, selection)) {
    selected.push_back({i, packed});
    packed += manifest.rows[i].length;
  }
  return selected;
}

std::vector<SelectedRange> SelectRanges(const BlockManifest& manifest, const Selection& selection) {
  std::vector<SelectedRange> ranges;
  for (const SelectedRow& selected : SelectRows(manifest, selection)) {
    const ManifestRow& row = manifest.rows[selected.row];
    SelectedRange* last = ranges.empty() ? nullptr : &ranges.back();
    if (last != nullptr && last->layer == row.layer &&
        last->payload_offset + last->length == row.offset) {
      last->length += row.length;
      continue;
    }
    if (last != nullptr) last->last_of_layer = last->layer != row.layer;
    ranges.push_back({row.layer, false, row.offset, selected.packed_offset, row.length});
  }
  if (!ranges.empty()) ranges.back().last_of_layer = true;
  return ranges;
}

uint64_t SelectedBytes(const BlockManifest& manifest, const Selection& selection) {
  uint64_t bytes = 0;
  for (const size_t i : SelectedIndices(manifest, selection)) bytes += manifest.rows[i].length;
  return bytes;
}

Status VerifyRange(const BlockManifest& manifest, size_t row, std::span<const std::byte> bytes) {
  KV_CHECK(row < manifest.rows.size());
  const ManifestRow& expected = manifest.rows[row];
  if (bytes.size() == expected.length && PayloadChecksum(bytes) == expected.checksum) {
    return OkStatus();
  }
  return DataLoss(
      "block {}: part {}, cut {}, layer {}, kind {} ({} bytes) does not match its "
      "checksum; the block is treated as absent",
      manifest.key.ShortHex(), expected.part, expected.cut, expected.layer, expected.kind,
      bytes.size());
}

Status VerifyPackedLayer(const BlockManifest& manifest, const Selection& selection, uint16_t layer,
                         std::span<const std::byte> packed) {
  for (const SelectedRow& selected : SelectRows(manifest, selection)) {
    const ManifestRow& row = manifest.rows[selected.row];
    if (row.layer != layer) continue;
    if (!RangeFits(selected.packed_offset, row.length, packed.size())) {
      return DataLoss("block {}: layer {} ends past the {} bytes that arrived",
                      manifest.key.ShortHex(), layer, packed.size());
    }
    KV_RETURN_IF_ERROR(
        VerifyRange(manifest, selected.row, packed.subspan(selected.packed_offset, row.length)));
  }
  return OkStatus();
}

Status VerifyPayload(const BlockManifest& manifest, std::span<const std::byte> payload) {
  if (payload.size() != manifest.payload_bytes()) {
    return DataLoss("block {}: the payload has {} bytes, its manifest says {}",
                    manifest.key.ShortHex(), payload.size(), manifest.payload_bytes());
  }
  for (size_t i = 0; i < manifest.rows.size(); ++i) {
    const ManifestRow& row = manifest.rows[i];
    KV_RETURN_IF_ERROR(VerifyRange(manifest, i, payload.subspan(row.offset, row.length)));
  }
  return OkStatus();
}

std::vector<std::byte> EncodeManifest(const BlockManifest& manifest) {
  Writer writer;
  writer.U8(kManifestVersion);
  writer.U8(manifest.basis ? kHasBasis : 0);
  writer.Bytes(manifest.key.bytes);
  writer.Little(manifest.codec);
  if (manifest.basis) writer.Bytes(*manifest.basis);
  writer.Varint(manifest.token_count);
  writer.Varint(manifest.rows.size());
  const ManifestRow* previous = nullptr;
  for (const ManifestRow& row : manifest.rows) {
    const ManifestRow predicted = Predict(previous);
    const auto error = std::bit_cast<uint32_t>(row.declared_error);
    uint8_t tag = 0;
    if (Position(row) != Position(predicted)) tag |= kPositionFollows;
    if (row.length != predicted.length) tag |= kLengthFollows;
    if (error != std::bit_cast<uint32_t>(predicted.declared_error)) tag |= kErrorFollows;
    writer.U8(tag);
    if (tag & kPositionFollows) {
      writer.U8(row.part);
      writer.U8(row.cut);
      writer.U8(row.kind);
      writer.Varint(row.layer);
    }
    if (tag & kLengthFollows) writer.Varint(row.length);
    if (tag & kErrorFollows) writer.Little(error);
    writer.Little(row.checksum);
    previous = &row;
  }
  writer.Little(PayloadChecksum(writer.bytes()));
  return writer.Take();
}

uint64_t MaxManifestBytes(size_t rows) {
  return kMaxHeaderBytes + uint64_t{rows} * kMaxRowBytes + kTrailerBytes;
}

Result<BlockManifest> ParseManifest(std::span<const std::byte> bytes) {
  if (bytes.size() < kTrailerBytes || bytes.size() > MaxManifestBytes(kMaxManifestRows)) {
    return InvalidArgument("manifest: {} bytes is not a possible length", bytes.size());
  }
  const auto body = bytes.first(bytes.size() - kTrailerBytes);
  if (PayloadChecksum(body) != LoadLittle<uint64_t>(bytes.data() + body.size())) {
    return DataLoss("manifest: {} bytes do not match their checksum", bytes.size());
  }
  BlockManifest manifest;
  const Status read = ReadBody(body, &manifest);
  if (!read.ok()) return InvalidArgument("manifest: {}", read.message());
  KV_RETURN_IF_ERROR(manifest.Validate());
  // One manifest, one encoding: what is a choice in the format (long varints, fields that the
  // prediction would have given) is refused.
  const std::vector<std::byte> canonical = EncodeManifest(manifest);
  if (!std::equal(canonical.begin(), canonical.end(), bytes.begin(), bytes.end())) {
    return InvalidArgument("manifest: not in its canonical form");
  }
  return manifest;
}

}  // namespace kvant
