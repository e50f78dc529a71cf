#include "node/beside_form.h"

#include <fmt/format.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"

namespace kvant::node {
namespace {

// A row of the result: of which form, and which there.
struct Origin {
  bool of_payload = false;
  size_t row = 0;
};

// Rows of both in the order of a manifest; the payload's layers behind those of main.
std::vector<std::pair<StoredRow, Origin>> Merged(const StoredForm& main, const RowForm& payload) {
  std::vector<std::pair<StoredRow, Origin>> rows;
  for (size_t i = 0; i < main.rows().size(); ++i) rows.push_back({main.rows()[i], {false, i}});
  for (size_t i = 0; i < payload.rows().size(); ++i) {
    StoredRow row = payload.rows()[i];
    row.layer = static_cast<uint16_t>(row.layer + main.global_layers().size());
    rows.push_back({row, {true, i}});
  }
  std::sort(rows.begin(), rows.end(), [](const auto& a, const auto& b) {
    const auto order = [](const StoredRow& row) {
      return std::tuple(row.cut, row.part, row.layer, row.kind);
    };
    return order(a.first) < order(b.first);
  });
  return rows;
}

class BesideForm final : public StoredForm {
 public:
  BesideForm(StoredFormPtr main, std::shared_ptr<const RowForm> payload,
             const AttendedPayload& attended)
      : StoredForm(FactsOf(*main, *payload)),
        main_(std::move(main)),
        payload_(std::move(payload)),
        attended_(attended),
        main_rows_(main_->rows().size()),
        payload_rows_(payload_->rows().size()) {
    const auto merged = Merged(*main_, *payload_);
    for (size_t i = 0; i < merged.size(); ++i) {
      const Origin& origin = merged[i].second;
      (origin.of_payload ? payload_rows_ : main_rows_)[origin.row] = i;
      origins_.push_back(origin);
    }
  }

  void Encode(const BlockToStore& block, std::span<std::byte> payload,
              StoredBlock* out) const override {
    StoredBlock of_main;
    main_->Encode(block, payload, &of_main);
    out->manifest = {};
    out->manifest.key = block.key;
    out->manifest.codec = tag();
    out->manifest.basis = basis();
    out->manifest.token_count = of_main.manifest.token_count;
    out->bytes.clear();
    std::vector<std::byte> row;
    for (size_t i = 0; i < origins_.size(); ++i) {
      const Origin& origin = origins_[i];
      const StoredRow& as = rows()[i];
      std::span<const std::byte> bytes;
      float error = ways().back().cut_errors.back();
      if (origin.of_payload) {
        row.clear();
        payload_->EncodeRow(origin.row, payload, &row);
        bytes = row;
      } else {
        const ManifestRow& from = of_main.manifest.rows[origin.row];
        bytes = std::span(of_main.bytes).subspan(from.offset, from.length);
        error = from.declared_error;
      }
      out->manifest.Append(as.part, as.cut, as.layer, as.kind, bytes, error);
      out->bytes.insert(out->bytes.end(), bytes.begin(), bytes.end());
    }
  }

  std::unique_ptr<StoredReader> MakeReader(const BlockToRead& block) const override {
    if (static_cast<size_t>(block.portion.cuts.way) + 1 == ways().size())
      return std::make_unique<PayloadReader>(*this, block);
    BlockToRead of_main = block;
    of_main.rows = main_rows_;
    return main_->MakeReader(of_main);
  }

 private:
  class PayloadReader final : public StoredReader {
   public:
    PayloadReader(const BesideForm& form, const BlockToRead& block) : form_(form), block_(block) {}

    Status Arrived(uint16_t layer, std::vector<int>* ready) override {
      const StoredWay& way = form_.ways().back();
      if (layer < way.layer_begin || layer >= way.layer_end)
        return DataLoss("a block's payload: there is no layer {} to be read", layer);
      const int of_model = layer - way.layer_begin;
      for (size_t i = 0; i < form_.payload_rows_.size(); ++i) {
        if (form_.payload_->rows()[i].layer != of_model) continue;
        KV_RETURN_IF_ERROR(form_.payload_->DecodeRow(i, block_.stored->Row(form_.payload_rows_[i]),
                                                     block_.portion.scope, block_.payload));
      }
      const Portion attended(form_.attended_.FullCuts(), block_.portion.scope);
      KV_RETURN_IF_ERROR(form_.attended_.CheckLayer(of_model, attended, block_.payload));
      ready->push_back(of_model);
      return OkStatus();
    }

   private:
    const BesideForm& form_;
    BlockToRead block_;
  };

  static Facts FactsOf(const StoredForm& main, const RowForm& payload) {
    KV_CHECK(main.whole_at_any_cut() && main.ways().size() < kMaxWays);
    Facts facts;
    facts.name = main.name();
    facts.tag = static_cast<uint32_t>(FormTag::kBeside);
    facts.basis = Sha256(AsBytes(
        fmt::format("beside {} {} {}", main.tag(), ToHex(main.basis().value()), payload.tag())));
    facts.whole_at_any_cut = true;
    facts.lossy = main.lossy();
    if (facts.lossy) facts.numerics = fmt::format("{}+{}", main.numerics(), payload.name());
    for (const auto& [row, origin] : Merged(main, payload)) facts.rows.push_back(row);
    facts.global_layers = main.global_layers();
    facts.ways.assign(main.ways().begin(), main.ways().end());
    StoredWay& way = facts.ways.emplace_back();
    way.layer_begin = static_cast<uint16_t>(facts.global_layers.size());
    facts.global_layers.insert(facts.global_layers.end(), payload.global_layers().begin(),
                               payload.global_layers().end());
    way.layer_end = static_cast<uint16_t>(facts.global_layers.size());
    way.cut_names = {std::string(payload.name())};
    way.cut_errors = {main.cut_errors().back()};
    way.takes_long = false;
    return facts;
  }

  StoredFormPtr main_;
  std::shared_ptr<const RowForm> payload_;
  AttendedPayload attended_;
  // [row of the form]: its index among the rows here.
  std::vector<size_t> main_rows_;
  std::vector<size_t> payload_rows_;
  std::vector<Origin> origins_;  // [row]
};

}  // namespace

Result<StoredFormPtr> MakeBesideForm(StoredFormPtr main, std::shared_ptr<const RowForm> payload,
                                     const AttendedPayload& attended) {
  if (main->ways().size() == kMaxWays) {
    return InvalidArgument(
        "blocks are read in {} ways at most: leave out --also, or one of --recompute", kMaxWays);
  }
  return StoredFormPtr(std::make_shared<BesideForm>(std::move(main), std::move(payload), attended));
}

}  // namespace kvant::node
