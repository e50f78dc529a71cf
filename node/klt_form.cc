#include "node/klt_form.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "node/klt.h"
#include "node/klt_exact.h"

namespace kvant::node {
namespace {

// 2 bytes a symbol and 6 of what follows it, with the states of rANS and a length before them.
constexpr uint64_t kMostOfLevel = 8;
constexpr uint64_t kOfExtent = sizeof(uint32_t) + kernels::RansBound(0);

class KltForm final : public StoredForm {
 public:
  // exact: behind the pack's cuts stands the exact one.
  KltForm(const Model* model, std::shared_ptr<const KltPack> pack, std::vector<size_t> cuts,
          bool exact, const AttendedPayload& attended)
      : StoredForm(FactsOf(*pack, cuts, exact)),
        model_(*model),
        attended_(attended),
        pack_(std::move(pack)),
        coder_(model, pack_.get(), std::move(cuts)),
        kept_(pack_->transforms[0], kKltKeptBytes) {
    if (exact) exact_ = std::make_unique<const KltExact>();
  }

  void Encode(const BlockToStore& block, std::span<std::byte> payload,
              StoredBlock* out) const override {
    KltCoder::Rows rows;
    for (int layer = 0; layer < pack_->layers; ++layer) {
      const auto l = static_cast<size_t>(layer);
      std::vector<float>& row = rows.emplace_back(static_cast<size_t>(kBlockTokens * pack_->width));
      GatherState(model_, layer, block.position, kBlockTokens, block.keys[l].data(),
                  block.values[l].data(), row.data());
    }
    KltCoder::Extents extents;
    const KltSide side = KltSide::OfTokens(&coder_, block.tokens, &kept_);
    coder_.Encode(side, block.position, rows, &extents);
    if (exact_ != nullptr) extents.emplace_back(coder_.groups());
    KltReader reader(&coder_, side, block.position);
    for (size_t group = 0; group < coder_.groups(); ++group) {
      std::vector<std::span<const std::byte>> of_group;
      for (size_t cut = 0; cut < coder_.cuts(); ++cut) of_group.emplace_back(extents[cut][group]);
      KV_CHECK(reader.Read(group, of_group, &rows).ok());
      if (exact_ != nullptr) {
        const Decoded decoded(*this, group, block.position, rows);
        exact_->Encode(decoded.segments, decoded.Raw<const uint16_t>(Scope::kAll, payload.data()),
                       &extents.back()[group]);
      } else {
        // Attended is what a reader gets, by whoever computed it as well.
        WritePayload(group, block.position, Scope::kAll, rows, payload.data());
      }
    }
    out->manifest = {};
    out->manifest.key = block.key;
    out->manifest.codec = tag();
    out->manifest.basis = basis();
    out->manifest.token_count = kBlockTokens;
    out->bytes.clear();
    for (const StoredRow& row : this->rows()) {
      const std::vector<std::byte>& extent = extents[row.cut][row.layer];
      out->manifest.Append(row.part, row.cut, row.layer, row.kind, extent, cut_errors()[row.cut]);
      out->bytes.insert(out->bytes.end(), extent.begin(), extent.end());
    }
  }

  std::unique_ptr<StoredReader> MakeReader(const BlockToRead& block) const override {
    return std::make_unique<Reader>(*this, block);
  }

 private:
  class Reader final : public StoredReader {
   public:
    Reader(const KltForm& form, const BlockToRead& block)
        : form_(form),
          block_(block),
          reader_(&form.coder_, KltSide::OfTokens(&form.coder_, block.tokens, &form.kept_),
                  block.position),
          arrived_(form.coder_.groups()),
          read_(form.coder_.groups()) {}

    Status Arrived(uint16_t layer, std::vector<int>* ready) override {
      if (layer >= arrived_.size()) return DataLoss("a klt block: there is no group {}", layer);
      arrived_[layer] = true;
      // Sources come before those they predict, in the order of groups.
      for (size_t group = 0; group < arrived_.size(); ++group) {
        const KltGroup& of = form_.pack_->transforms[0].groups[group];
        const bool can = std::all_of(of.sources.begin(), of.sources.end(), [&](int source) {
          return read_[static_cast<size_t>(source)];
        });
        if (!arrived_[group] || read_[group] || !can) continue;
        KV_RETURN_IF_ERROR(Read(group));
        read_[group] = true;
        ready->insert(ready->end(), of.layers.begin(), of.layers.end());
      }
      return OkStatus();
    }

   private:
    Status Read(size_t group) {
      std::vector<std::span<const std::byte>> extents;
      for (int cut = 0; cut < block_.portion.cuts.values; ++cut) {
        const size_t row = static_cast<size_t>(cut) * form_.coder_.groups() + group;
        extents.emplace_back(block_.stored->Row(row));
      }
      const auto& layers = form_.pack_->transforms[0].groups[group].layers;
      const bool exact = extents.size() > form_.coder_.cuts();
      KV_RETURN_IF_ERROR(reader_.Read(
          group, std::span(extents).first(std::min(extents.size(), form_.coder_.cuts())), &rows_));
      if (exact) {
        const Decoded decoded(form_, group, block_.position, rows_);
        KV_RETURN_IF_ERROR(form_.exact_->Decode(
            extents.back(), decoded.segments,
            decoded.Raw<uint16_t>(block_.portion.scope, block_.payload.data())));
        // As of a payload that is stored plain, in which bytes could say anything.
        const Portion attended(form_.attended_.FullCuts(), block_.portion.scope);
        for (const int layer : layers)
          KV_RETURN_IF_ERROR(form_.attended_.CheckLayer(layer, attended, block_.payload));
      } else {
        form_.WritePayload(group, block_.position, block_.portion.scope, rows_,
                           block_.payload.data());
      }
      for (const int layer : layers) rows_[static_cast<size_t>(layer)] = {};
      return OkStatus();
    }

    const KltForm& form_;
    BlockToRead block_;
    KltReader reader_;
    std::vector<bool> arrived_;  // [group]
    std::vector<bool> read_;     // [group]
    KltCoder::Rows rows_;
  };

  // What was decoded of a group, as it is attended.
  struct Decoded {
    Decoded(const KltForm& of_form, size_t group, int position, const KltCoder::Rows& rows)
        : form(of_form), layers(of_form.pack_->transforms[0].groups[group].layers) {
      const kernels::LayerShape& shape = form.attended_.layout(Scope::kAll).shape();
      for (size_t i = 0; i < 2 * layers.size(); ++i) {
        const kernels::SegmentShape& of = shape.Of(KindOf(i));
        segments.push_back({KindOf(i), of, floats.emplace_back(ElementsOf(of)).data()});
      }
      for (size_t i = 0; i < layers.size(); ++i) {
        ScatterState(form.model_, layers[i], position, kBlockTokens,
                     rows[static_cast<size_t>(layers[i])].data(), floats[2 * i].data(),
                     floats[2 * i + 1].data());
      }
    }
    kernels::SegmentKind KindOf(size_t segment) const {
      return segment % 2 == 0 ? kernels::SegmentKind::kKey
                              : form.attended_.layout(Scope::kAll).shape().value_kind();
    }
    // Where each segment stands in a payload of codec raw.
    template <typename Element, typename Byte>
    std::vector<Element*> Raw(Scope scope, Byte* payload) const {
      std::vector<Element*> raw;
      for (size_t i = 0; i < segments.size(); ++i) {
        const auto& row = form.attended_.layout(scope).Row(KindOf(i), 0, layers[i / 2]);
        raw.push_back(reinterpret_cast<Element*>(payload + row.offset));
      }
      return raw;
    }

    const KltForm& form;
    const std::vector<int>& layers;
    std::vector<std::vector<float>> floats;  // [layer][keys, values]
    std::vector<ExactSegment> segments;      // as floats
  };

  static Facts FactsOf(const KltPack& pack, std::span<const size_t> cuts, bool exact) {
    Facts facts;
    facts.name = "klt";
    facts.whole_at_any_cut = true;
    facts.lossy = !exact;
    for (const size_t cut : cuts) {
      facts.cut_names.push_back(pack.cuts()[cut].name);
      facts.cut_errors.push_back(pack.cuts()[cut].mean_kl);
    }
    if (exact) {
      facts.cut_names.emplace_back(kExactCut);
      facts.cut_errors.push_back(0);
      facts.tag = static_cast<uint32_t>(FormTag::kKltExact);
      // Blocks of all cuts are of one class, so each says which it holds.
      facts.basis = Sha256(
          AsBytes(fmt::format("klt {} {}", ToHex(pack.digest), fmt::join(facts.cut_names, ","))));
    } else {
      facts.tag = static_cast<uint32_t>(FormTag::kKlt);
      facts.basis = pack.digest;
      facts.numerics =
          fmt::format("/klt-{:.16}-{}", ToHex(pack.digest), fmt::join(facts.cut_names, "-"));
    }
    KV_CHECK(facts.cut_names.size() <= kMaxCuts);
    for (size_t cut = 0; cut < facts.cut_names.size(); ++cut) {
      for (size_t group = 0; group < pack.transforms[0].groups.size(); ++group) {
        StoredRow row;
        row.part = static_cast<uint8_t>(Part::kState);
        row.cut = static_cast<uint8_t>(cut);
        row.layer = static_cast<uint16_t>(group);
        row.kind = static_cast<uint8_t>(kernels::SegmentKind::kLatent);
        const KltBasis& basis = pack.transforms[0].bases[group];
        row.min_bytes = kOfExtent + (cut == 0 ? kBlockTokens : 0);  // a byte of each token
        row.max_bytes =
            row.min_bytes + kMostOfLevel * static_cast<uint64_t>(kBlockTokens * basis.coefficients);
        if (cut == cuts.size()) {
          row.max_bytes = KltExact::Bound(2 * pack.transforms[0].groups[group].layers.size(),
                                          static_cast<uint64_t>(kBlockTokens * basis.width));
        }
        facts.rows.push_back(row);
      }
    }
    for (const KltGroup& group : pack.transforms[0].groups)
      facts.global_layers.push_back(group.global);
    return facts;
  }

  // Writes a group's layers as they are attended.
  void WritePayload(size_t group, int position, Scope scope, const KltCoder::Rows& rows,
                    std::byte* payload) const {
    const kernels::LayerShape& shape = attended_.layout(Scope::kAll).shape();
    std::vector<float> keys(ElementsOf(shape.keys));
    std::vector<float> values(ElementsOf(shape.values));
    for (const int layer : pack_->transforms[0].groups[group].layers) {
      ScatterState(model_, layer, position, kBlockTokens, rows[static_cast<size_t>(layer)].data(),
                   keys.data(), values.data());
      attended_.EncodeLayer(layer, scope, keys.data(), values.data(), payload, nullptr);
    }
  }
  static size_t ElementsOf(const kernels::SegmentShape& shape) {
    return static_cast<size_t>(shape.tokens) * static_cast<size_t>(shape.kv_heads * shape.head_dim);
  }

  const Model& model_;
  AttendedPayload attended_;
  std::shared_ptr<const KltPack> pack_;
  KltCoder coder_;
  mutable KltPredictions kept_;
  std::unique_ptr<const KltExact> exact_;  // nullptr: there is no exact cut
};

}  // namespace

Result<StoredFormPtr> MakeKltForm(const Model* model, std::shared_ptr<const KltPack> pack,
                                  std::string_view cuts, const AttendedPayload& attended) {
  std::vector<std::string_view> named;
  for (std::string_view rest = cuts; !rest.empty();) {
    const size_t comma = rest.find(',');
    named.push_back(rest.substr(0, comma));
    rest.remove_prefix(comma == std::string_view::npos ? rest.size() : comma + 1);
  }
  const bool exact = !named.empty() && named.back() == kExactCut;
  if (exact) {
    named.pop_back();
    if (attended.codec().id != kernels::CodecId::kRawBf16) {
      return InvalidArgument(
          "the cut '{}' is for the bf16 numbers of codec raw, not for {}; use --codec raw",
          kExactCut, attended.codec().name);
    }
  }
  std::vector<size_t> held;
  for (const std::string_view name : named) {
    KV_ASSIGN_OR_RETURN(held.emplace_back(), pack->FindCut(name));
  }
  const bool beginning = held.size() <= pack->refining.size() &&
                         std::equal(held.begin(), held.end(), pack->refining.begin());
  if (held.empty() || (held.size() > 1 && !beginning)) {
    std::vector<std::string> names;
    for (const size_t cut : pack->refining) names.push_back(pack->cuts()[cut].name);
    return InvalidArgument(
        "a block can't hold the cuts '{}': name one, or several from the beginning of {}; with "
        "codec raw, '{}' may stand behind them",
        cuts, fmt::join(names, ","), kExactCut);
  }
  return StoredFormPtr(
      std::make_shared<KltForm>(model, std::move(pack), std::move(held), exact, attended));
}

}  // namespace kvant::node
