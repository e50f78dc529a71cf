#include "node/stored_form.h"

#include <algorithm>
#include <utility>

#include "kernels/lossless.h"
#include "node/decoder.h"

namespace kvant::node {
namespace {

constexpr std::string_view kPlain = "plain";
constexpr std::string_view kLossless = "lossless";
constexpr std::string_view kKlt = "klt";

// Those of the attended payload.
std::vector<StoredRow> RowsOf(const AttendedPayload& attended) {
  std::vector<StoredRow> rows;
  for (const kernels::PayloadRow& row : attended.layout(Scope::kAll).rows()) {
    rows.push_back({static_cast<uint8_t>(PartOf(row.kind)), static_cast<uint8_t>(row.cut),
                    static_cast<uint16_t>(row.layer), static_cast<uint8_t>(row.kind), row.length,
                    row.length});
  }
  return rows;
}

// The one way of forms whose layers are the model's.
StoredWay WayOfLayers(const AttendedPayload& attended) {
  StoredWay way;
  way.layer_end = static_cast<uint16_t>(attended.global_layers().size());
  return way;
}

class PlainForm final : public RowForm {
 public:
  explicit PlainForm(const AttendedPayload& attended)
      : RowForm(FactsOf(attended)), attended_(attended) {}

  void Encode(const BlockToStore& block, std::span<std::byte> payload,
              StoredBlock* out) const override {
    out->manifest = PlainManifest(attended_, block.key, payload, block.max_errors);
    out->bytes.clear();
  }

  void EncodeRow(size_t row, std::span<const std::byte> payload,
                 std::vector<std::byte>* out) const override {
    const kernels::PayloadRow& from = attended_.layout(Scope::kAll).rows()[row];
    const auto bytes = payload.subspan(from.offset, from.length);
    out->insert(out->end(), bytes.begin(), bytes.end());
  }
  Status DecodeRow(size_t row, std::span<const std::byte> stored, Scope scope,
                   std::span<std::byte> payload) const override {
    const kernels::PayloadRow& of = attended_.layout(Scope::kAll).rows()[row];
    const kernels::PayloadRow& to = attended_.layout(scope).Row(of.kind, of.cut, of.layer);
    if (stored.size() != to.length) {
      return DataLoss("layer {} of a payload has {} bytes, not {}", of.layer, stored.size(),
                      to.length);
    }
    std::copy(stored.begin(), stored.end(), payload.begin() + static_cast<ptrdiff_t>(to.offset));
    return OkStatus();
  }

  std::unique_ptr<StoredReader> MakeReader(const BlockToRead& block) const override {
    return std::make_unique<Reader>(attended_, block);
  }

 private:
  class Reader final : public StoredReader {
   public:
    Reader(const AttendedPayload& attended, const BlockToRead& block)
        : attended_(attended), block_(block) {}

    Status Arrived(uint16_t layer, std::vector<int>* ready) override {
      KV_RETURN_IF_ERROR(attended_.CheckLayer(layer, block_.portion, block_.payload));
      ready->push_back(layer);
      return OkStatus();
    }

   private:
    const AttendedPayload& attended_;
    BlockToRead block_;
  };

  static Facts FactsOf(const AttendedPayload& attended) {
    Facts facts;
    facts.name = kPlain;
    facts.tag = static_cast<uint32_t>(attended.codec().id);
    facts.plain = true;
    facts.rows = RowsOf(attended);
    facts.global_layers = attended.global_layers();
    facts.ways = {WayOfLayers(attended)};
    return facts;
  }

  AttendedPayload attended_;
};

// The rows of `raw` (bf16), each as one lossless segment.
class LosslessForm final : public RowForm {
 public:
  explicit LosslessForm(const AttendedPayload& attended)
      : RowForm(FactsOf(attended)), attended_(attended) {
    KV_CHECK(LosslessFits(attended.codec()));
  }

  void Encode(const BlockToStore& block, std::span<std::byte> payload,
              StoredBlock* out) const override {
    const kernels::PayloadLayout& layout = attended_.layout(Scope::kAll);
    KV_CHECK(payload.size() == layout.total_bytes() &&
             block.max_errors.size() == layout.rows().size());
    out->manifest = {};
    out->manifest.key = block.key;
    out->manifest.codec = tag();
    out->manifest.token_count = kBlockTokens;
    out->bytes.clear();
    for (size_t i = 0; i < layout.rows().size(); ++i) {
      const StoredRow& row = rows()[i];
      const size_t begin = out->bytes.size();
      EncodeRow(i, payload, &out->bytes);
      out->manifest.Append(row.part, row.cut, row.layer, row.kind,
                           std::span(out->bytes).subspan(begin), block.max_errors[i]);
    }
  }

  void EncodeRow(size_t row, std::span<const std::byte> payload,
                 std::vector<std::byte>* out) const override {
    const kernels::PayloadLayout& layout = attended_.layout(Scope::kAll);
    const kernels::PayloadRow& from = layout.rows()[row];
    thread_local kernels::LosslessCoder coder;  // for its buffers
    coder.Encode(from.kind, layout.shape().Of(from.kind),
                 reinterpret_cast<const uint16_t*>(payload.data() + from.offset), out);
  }
  Status DecodeRow(size_t row, std::span<const std::byte> stored, Scope scope,
                   std::span<std::byte> payload) const override {
    const kernels::PayloadRow& of = attended_.layout(Scope::kAll).rows()[row];
    const kernels::PayloadRow& to = attended_.layout(scope).Row(of.kind, of.cut, of.layer);
    thread_local kernels::LosslessCoder coder;  // for its buffers
    return coder.Decode(of.kind, attended_.layout(scope).shape().Of(of.kind), stored,
                        reinterpret_cast<uint16_t*>(payload.data() + to.offset));
  }

  std::unique_ptr<StoredReader> MakeReader(const BlockToRead& block) const override {
    return std::make_unique<Reader>(*this, block);
  }

 private:
  class Reader final : public StoredReader {
   public:
    Reader(const LosslessForm& form, const BlockToRead& block) : form_(form), block_(block) {}

    Status Arrived(uint16_t layer, std::vector<int>* ready) override {
      for (size_t i = 0; i < block_.manifest->rows.size(); ++i) {
        // What was copied out of a block in memory stands decoded in the payload.
        if (block_.manifest->rows[i].layer != layer || !block_.stored->Holds(i)) continue;
        KV_RETURN_IF_ERROR(
            form_.DecodeRow(i, block_.stored->Row(i), block_.portion.scope, block_.payload));
      }
      KV_RETURN_IF_ERROR(form_.attended_.CheckLayer(layer, block_.portion, block_.payload));
      ready->push_back(layer);
      return OkStatus();
    }

   private:
    const LosslessForm& form_;
    BlockToRead block_;
  };

  static Facts FactsOf(const AttendedPayload& attended) {
    Facts facts;
    facts.name = kLossless;
    facts.tag = static_cast<uint32_t>(FormTag::kLossless);
    facts.rows = RowsOf(attended);
    for (StoredRow& row : facts.rows) {
      row.min_bytes = 1;
      row.likely_bytes = row.max_bytes * 2 / 3;
      row.max_bytes = kernels::LosslessBound(row.max_bytes / sizeof(uint16_t));
    }
    facts.global_layers = attended.global_layers();
    facts.ways = {WayOfLayers(attended)};
    return facts;
  }

  AttendedPayload attended_;
};

}  // namespace

BlockManifest PlainManifest(const AttendedPayload& attended, const BlockKey& key,
                            std::span<const std::byte> payload, std::span<const float> max_errors) {
  const auto rows = attended.layout(Scope::kAll).rows();
  KV_CHECK(max_errors.size() == rows.size());
  BlockManifest manifest;
  manifest.key = key;
  manifest.codec = static_cast<uint32_t>(attended.codec().id);
  manifest.token_count = kBlockTokens;
  for (size_t i = 0; i < rows.size(); ++i) {
    const kernels::PayloadRow& row = rows[i];
    manifest.Append(static_cast<uint8_t>(PartOf(row.kind)), static_cast<uint8_t>(row.cut),
                    static_cast<uint16_t>(row.layer), static_cast<uint8_t>(row.kind),
                    payload.subspan(row.offset, row.length), max_errors[i]);
  }
  return manifest;
}

StoredRows::StoredRows(std::shared_ptr<const BlockManifest> manifest,
                       const std::function<bool(size_t row)>& wanted)
    : manifest_(std::move(manifest)), offsets_(manifest_->rows.size(), kNone) {
  uint64_t bytes = 0;
  for (size_t row = 0; row < offsets_.size(); ++row) {
    if (!wanted(row)) continue;
    offsets_[row] = bytes;
    bytes += manifest_->rows[row].length;
  }
  bytes_.resize(bytes);
}

StoredRows::StoredRows(StoredBlock block)
    : manifest_(std::make_shared<const BlockManifest>(std::move(block.manifest))),
      bytes_(std::move(block.bytes)) {
  KV_CHECK(bytes_.size() == manifest_->payload_bytes());
  for (const ManifestRow& row : manifest_->rows) offsets_.push_back(row.offset);
}

std::span<std::byte> StoredRows::Row(size_t row) {
  KV_CHECK(Holds(row));
  return std::span(bytes_).subspan(offsets_[row], manifest_->rows[row].length);
}

std::span<const std::byte> StoredRows::Row(size_t row) const {
  KV_CHECK(Holds(row));
  return std::span(bytes_).subspan(offsets_[row], manifest_->rows[row].length);
}

StoredForm::StoredForm(Facts facts) : facts_(std::move(facts)) {
  KV_CHECK(!facts_.rows.empty() && facts_.lossy == !facts_.numerics.empty());
  KV_CHECK(facts_.whole_at_any_cut || !facts_.lossy);
  KV_CHECK(!facts_.ways.empty() && facts_.ways.size() <= kMaxWays);
  KV_CHECK(facts_.whole_at_any_cut || facts_.ways.size() == 1);
  for (const StoredRow& row : facts_.rows)
    KV_CHECK(row.layer < facts_.global_layers.size() && row.min_bytes <= row.max_bytes);
  for (size_t w = 0; w < facts_.ways.size(); ++w) {
    StoredWay& way = facts_.ways[w];
    way.full = {0, 0, static_cast<int>(w)};
    bool keys = false;
    for (const StoredRow& row : facts_.rows) {
      if (row.layer < way.layer_begin || row.layer >= way.layer_end) continue;
      const bool of_keys = row.part == static_cast<uint8_t>(Part::kKeys);
      int& cuts = of_keys ? way.full.keys : way.full.values;
      cuts = std::max(cuts, row.cut + 1);
      keys = keys || of_keys;
    }
    if (!keys) way.full.keys = way.full.values;
  }
}

std::array<uint8_t, kMaxParts> StoredForm::PartCuts(const Cuts& cuts) const {
  const StoredWay& way = WayOf(cuts);
  std::array<uint8_t, kMaxParts> part_cuts{};
  for (const StoredRow& row : facts_.rows) {
    if (row.layer < way.layer_begin || row.layer >= way.layer_end) continue;
    part_cuts[row.part] = static_cast<uint8_t>(
        row.part == static_cast<uint8_t>(Part::kKeys) ? cuts.keys : cuts.values);
  }
  return part_cuts;
}

std::array<uint8_t, kMaxParts> StoredForm::AllPartCuts() const {
  std::array<uint8_t, kMaxParts> part_cuts{};
  for (const StoredRow& row : facts_.rows)
    part_cuts[row.part] = std::max(part_cuts[row.part], static_cast<uint8_t>(row.cut + 1));
  return part_cuts;
}

std::vector<bool> StoredForm::LayersOf(const Portion& portion) const {
  const StoredWay& way = WayOf(portion.cuts);
  std::vector<bool> layers(facts_.global_layers.size());
  for (size_t layer = way.layer_begin; layer < way.layer_end; ++layer)
    layers[layer] = portion.scope == Scope::kAll || facts_.global_layers[layer];
  return layers;
}

bool StoredForm::InPortion(const ManifestRow& row, const Portion& portion) const {
  const StoredWay& way = WayOf(portion.cuts);
  return row.layer >= way.layer_begin && row.layer < way.layer_end &&
         row.cut < PartCuts(portion.cuts)[row.part] &&
         (portion.scope == Scope::kAll || facts_.global_layers[row.layer]);
}

std::shared_ptr<const RowForm> MakePlainForm(const AttendedPayload& attended) {
  return std::make_shared<PlainForm>(attended);
}

bool LosslessFits(const kernels::Codec& codec) { return codec.id == kernels::CodecId::kRawBf16; }

std::shared_ptr<const RowForm> MakeLosslessForm(const AttendedPayload& attended) {
  return std::make_shared<LosslessForm>(attended);
}

Status CheckStoredForm(std::string_view name, const kernels::Codec& codec) {
  if (name != kPlain && name != kLossless && name != kKlt) {
    return InvalidArgument("unknown store '{}': use {}, {} or {}", name, kPlain, kLossless, kKlt);
  }
  if (name == kLossless && !LosslessFits(codec)) {
    return InvalidArgument(
        "store '{}' is for the bf16 numbers of codec raw, not for {}; use --codec raw", name,
        codec.name);
  }
  return OkStatus();
}

std::shared_ptr<const RowForm> MakeStoredForm(std::string_view name,
                                              const AttendedPayload& attended) {
  KV_CHECK(CheckStoredForm(name, attended.codec()).ok() && name != kKlt);
  return name == kPlain ? MakePlainForm(attended) : MakeLosslessForm(attended);
}

}  // namespace kvant::node
