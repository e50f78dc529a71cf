#include "node/klt_form.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <optional>
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

// Bits that a symbol of each table takes in the mean.
std::vector<double> BitsOfTables(const KltStatistics& statistics) {
  std::vector<double> bits;
  for (const kernels::RansTable& table : statistics.tables) {
    double sum = 0;
    for (int symbol = 0; symbol < table.symbols(); ++symbol) {
      const double share = static_cast<double>(table.frequency(symbol)) / kernels::kRansTotal;
      if (share > 0) sum -= share * std::log2(share);
    }
    bits.push_back(sum);
  }
  return bits;
}

// Bytes of a group at a cut of a block, about: of tokens like most, without what was found before.
uint64_t LikelyBytes(const std::vector<double>& bits_of_tables, const KltBasis& basis, size_t cut,
                     float step) {
  double bits = 0;
  for (const float deviation : basis.deviation) {
    const int quarters = KltQuarters(deviation, step);
    const KltPlace place =
        cut == 0 ? FirstPlace(quarters) : RefinedPlace(static_cast<int>(cut), false, quarters);
    if (place.table < 0) break;
    bits += bits_of_tables[static_cast<size_t>(place.table)] + place.low_bits;
  }
  return static_cast<uint64_t>(bits * kBlockTokens / 8);
}

// Of raw bytes, what an exact cut takes of them.
constexpr double kExactShare = 0.35;

class KltForm final : public StoredForm {
 public:
  // exact: behind the pack's cuts stands the exact one. transforms: of the pack's, [way], the first
  // recomputes nothing.
  KltForm(const Model* model, std::shared_ptr<const KltPack> pack, const std::vector<size_t>& cuts,
          bool exact, const std::vector<size_t>& transforms, const AttendedPayload& attended)
      : StoredForm(FactsOf(*pack, cuts, exact, transforms)),
        model_(*model),
        attended_(attended),
        pack_(std::move(pack)),
        kept_(pack_->transforms[0], kKltKeptBytes) {
    for (const size_t transform : transforms)
      coders_.emplace_back(model, pack_.get(), cuts, transform);
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
    // [way][cut][group]
    std::vector<KltCoder::Extents> extents(coders_.size());
    for (size_t way = 0; way < coders_.size(); ++way) {
      const KltSide side =
          SideOf(way, block.tokens, way == 0 ? std::span<const float>() : block.entering[way]);
      coders_[way].Encode(side, block.position, rows, &extents[way]);
    }
    EncodeAttended(block, payload, &extents[0]);
    out->manifest = {};
    out->manifest.key = block.key;
    out->manifest.codec = tag();
    out->manifest.basis = basis();
    out->manifest.token_count = kBlockTokens;
    out->bytes.clear();
    for (const StoredRow& row : this->rows()) {
      const size_t way = WayOfLayer(row.layer);
      const std::vector<std::byte>& extent =
          extents[way][row.cut][row.layer - ways()[way].layer_begin];
      out->manifest.Append(row.part, row.cut, row.layer, row.kind, extent,
                           ways()[way].cut_errors[row.cut]);
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
          way_(static_cast<size_t>(block.portion.cuts.way)),
          coder_(form.coders_[way_]),
          tokens_(block.tokens.begin(), block.tokens.end()),
          arrived_(coder_.groups()),
          read_(coder_.groups()) {}

    Status Arrived(uint16_t layer, std::vector<int>* ready) override {
      const StoredWay& way = form_.ways()[way_];
      if (layer < way.layer_begin || layer >= way.layer_end)
        return DataLoss("a klt block: there is no group {} to be read", layer);
      if (!reader_.has_value()) {
        const std::span<const float> entering =
            block_.entering != nullptr ? *block_.entering : std::span<const float>();
        reader_.emplace(&coder_, form_.SideOf(way_, tokens_, entering), block_.position);
      }
      arrived_[layer - way.layer_begin] = true;
      // Sources come before those they predict, in the order of groups.
      for (size_t group = 0; group < arrived_.size(); ++group) {
        const KltGroup& of = coder_.transform().groups[group];
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
      for (int cut = 0; cut < block_.portion.cuts.values; ++cut)
        extents.emplace_back(block_.Row(form_.RowOf(way_, cut, group)));
      const auto& layers = coder_.transform().groups[group].layers;
      const bool exact = extents.size() > coder_.cuts();
      KV_ASSIGN_OR_RETURN(
          const std::span<const float> rows,
          reader_->Read(group, std::span(extents).first(std::min(extents.size(), coder_.cuts()))));
      if (exact) {
        const Decoded decoded(form_, layers, block_.position, rows);
        KV_RETURN_IF_ERROR(form_.exact_->Decode(
            extents.back(), decoded.segments,
            decoded.Raw<uint16_t>(block_.portion.scope, block_.payload.data())));
        // As of a payload that is stored plain, in which bytes could say anything.
        const Portion attended(form_.attended_.FullCuts(), block_.portion.scope);
        for (const int layer : layers)
          KV_RETURN_IF_ERROR(form_.attended_.CheckLayer(layer, attended, block_.payload));
      } else {
        form_.WritePayload(layers, block_.position, block_.portion.scope, rows,
                           block_.payload.data());
      }
      return OkStatus();
    }

    const KltForm& form_;
    BlockToRead block_;
    size_t way_;
    const KltCoder& coder_;
    std::vector<int32_t> tokens_;
    std::optional<KltReader> reader_;
    std::vector<bool> arrived_;  // [group]
    std::vector<bool> read_;     // [group]
  };

  // What a reader of a way knows of a block. entering: as of BlockToStore.
  KltSide SideOf(size_t way, std::span<const int32_t> tokens,
                 std::span<const float> entering) const {
    return coders_[way].transform().recomputed == 0
               ? KltSide::OfTokens(&coders_[way], tokens, &kept_)
               : KltSide::OfEntering(&coders_[way], entering);
  }
  size_t WayOfLayer(uint16_t layer) const {
    size_t way = 0;
    while (layer >= ways()[way].layer_end) ++way;
    return way;
  }
  // Index of a row.
  size_t RowOf(size_t way, int cut, size_t group) const {
    const size_t layer = ways()[way].layer_begin + group;
    const auto found = std::find_if(rows().begin(), rows().end(), [&](const StoredRow& row) {
      return row.cut == cut && row.layer == layer;
    });
    KV_CHECK(found != rows().end());
    return static_cast<size_t>(found - rows().begin());
  }
  // What the first way gives its readers: as it is attended, by whoever computed it as well; or,
  // with an exact cut, what the cuts before lack of the attended payload. extents: [cut][group].
  void EncodeAttended(const BlockToStore& block, std::span<std::byte> payload,
                      KltCoder::Extents* extents) const {
    const KltCoder& coder = coders_[0];
    KltReader reader(&coder, SideOf(0, block.tokens, {}), block.position);
    if (exact_ != nullptr) extents->emplace_back(coder.groups());
    for (size_t group = 0; group < coder.groups(); ++group) {
      std::vector<std::span<const std::byte>> of_group;
      for (size_t cut = 0; cut < coder.cuts(); ++cut) of_group.emplace_back((*extents)[cut][group]);
      const Result<std::span<const float>> rows = reader.Read(group, of_group);
      KV_CHECK(rows.ok());
      const auto& layers = coder.transform().groups[group].layers;
      if (exact_ != nullptr) {
        const Decoded decoded(*this, layers, block.position, *rows);
        exact_->Encode(decoded.segments, decoded.Raw<const uint16_t>(Scope::kAll, payload.data()),
                       &extents->back()[group]);
      } else {
        WritePayload(layers, block.position, Scope::kAll, *rows, payload.data());
      }
    }
  }

  // What was decoded of a group, as it is attended. rows: as KltReader::Read.
  struct Decoded {
    Decoded(const KltForm& of_form, const std::vector<int>& of_layers, int position,
            std::span<const float> rows)
        : form(of_form), layers(of_layers) {
      const kernels::LayerShape& shape = form.attended_.layout(Scope::kAll).shape();
      for (size_t i = 0; i < 2 * layers.size(); ++i) {
        const kernels::SegmentShape& of = shape.Of(KindOf(i));
        segments.push_back({KindOf(i), of, floats.emplace_back(ElementsOf(of)).data()});
      }
      for (size_t i = 0; i < layers.size(); ++i) {
        const auto width = static_cast<size_t>(form.pack_->width);
        ScatterState(form.model_, layers[i], position, kBlockTokens, rows.data() + i * width,
                     floats[2 * i].data(), floats[2 * i + 1].data(), layers.size() * width);
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

  static Facts FactsOf(const KltPack& pack, std::span<const size_t> cuts, bool exact,
                       std::span<const size_t> transforms) {
    Facts facts;
    facts.name = "klt";
    facts.whole_at_any_cut = true;
    facts.lossy = !exact;
    std::string recomputed;
    for (const size_t t : transforms) {
      const KltTransform& transform = pack.transforms[t];
      StoredWay& way = facts.ways.emplace_back();
      way.recomputed = transform.recomputed;
      if (way.recomputed > 0) way.suffix = fmt::format("@{}", way.recomputed);
      recomputed += way.suffix;
      for (const size_t cut : cuts) {
        way.cut_names.push_back(transform.cuts[cut].name);
        way.cut_errors.push_back(transform.cuts[cut].mean_kl);
      }
      if (exact && way.recomputed == 0) {
        way.cut_names.emplace_back(kExactCut);
        way.cut_errors.push_back(0);
      }
      way.layer_begin = static_cast<uint16_t>(facts.global_layers.size());
      for (const KltGroup& group : transform.groups) facts.global_layers.push_back(group.global);
      way.layer_end = static_cast<uint16_t>(facts.global_layers.size());
    }
    const std::vector<std::string>& names = facts.ways[0].cut_names;
    KV_CHECK(names.size() <= kMaxCuts);
    facts.tag = static_cast<uint32_t>(exact ? FormTag::kKltExact : FormTag::kKlt);
    facts.basis = pack.digest;
    // Blocks of one class may hold different rows, so each says which.
    if (exact || !recomputed.empty()) {
      facts.basis = Sha256(AsBytes(
          fmt::format("klt {} {}{}", ToHex(pack.digest), fmt::join(names, ","), recomputed)));
    }
    if (!exact) {
      facts.numerics =
          fmt::format("/klt-{:.16}-{}{}", ToHex(pack.digest), fmt::join(names, "-"), recomputed);
    }
    const std::vector<double> bits = BitsOfTables(pack.statistics);
    for (size_t cut = 0; cut < names.size(); ++cut) {
      for (size_t w = 0; w < facts.ways.size(); ++w) {
        const StoredWay& way = facts.ways[w];
        if (cut >= way.cut_names.size()) continue;
        const KltTransform& transform = pack.transforms[transforms[w]];
        for (size_t group = 0; group < transform.groups.size(); ++group) {
          StoredRow row;
          row.part = static_cast<uint8_t>(Part::kState);
          row.cut = static_cast<uint8_t>(cut);
          row.layer = static_cast<uint16_t>(way.layer_begin + group);
          row.kind = static_cast<uint8_t>(kernels::SegmentKind::kLatent);
          const KltBasis& basis = transform.bases[group];
          row.min_bytes = kOfExtent + (cut == 0 ? kBlockTokens : 0);  // a byte of each token
          row.max_bytes = row.min_bytes +
                          kMostOfLevel * static_cast<uint64_t>(kBlockTokens * basis.coefficients);
          if (cut < cuts.size()) {
            const float step = transform.cuts[cuts[cut]].step;
            row.likely_bytes = row.min_bytes + LikelyBytes(bits, basis, cut, step);
          } else {
            row.likely_bytes = static_cast<uint64_t>(kExactShare * 2 * kBlockTokens * basis.width);
            row.max_bytes = KltExact::Bound(2 * transform.groups[group].layers.size(),
                                            static_cast<uint64_t>(kBlockTokens * basis.width));
          }
          facts.rows.push_back(row);
        }
      }
    }
    return facts;
  }

  // Writes a group's layers as they are attended. rows: as KltReader::Read.
  void WritePayload(const std::vector<int>& layers, int position, Scope scope,
                    std::span<const float> rows, std::byte* payload) const {
    const kernels::LayerShape& shape = attended_.layout(Scope::kAll).shape();
    const auto width = static_cast<size_t>(pack_->width);
    thread_local std::vector<float> keys;
    thread_local std::vector<float> values;
    keys.resize(ElementsOf(shape.keys));
    values.resize(ElementsOf(shape.values));
    for (size_t i = 0; i < layers.size(); ++i) {
      ScatterState(model_, layers[i], position, kBlockTokens, rows.data() + i * width, keys.data(),
                   values.data(), layers.size() * width);
      attended_.EncodeLayer(layers[i], scope, keys.data(), values.data(), payload, nullptr);
    }
  }
  static size_t ElementsOf(const kernels::SegmentShape& shape) {
    return static_cast<size_t>(shape.tokens) * static_cast<size_t>(shape.kv_heads * shape.head_dim);
  }

  const Model& model_;
  AttendedPayload attended_;
  std::shared_ptr<const KltPack> pack_;
  std::vector<KltCoder> coders_;  // [way]
  mutable KltPredictions kept_;
  std::unique_ptr<const KltExact> exact_;  // nullptr: there is no exact cut
};

}  // namespace

Result<StoredFormPtr> MakeKltForm(const Model* model, std::shared_ptr<const KltPack> pack,
                                  std::string_view cuts, std::span<const int> recompute,
                                  const AttendedPayload& attended) {
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
    const Result<size_t> cut = pack->FindCut(name);
    if (!cut.ok()) {
      return InvalidArgument("--cuts {}: {}; '{}' may stand last, with --codec raw", cuts,
                             cut.status().message(), kExactCut);
    }
    held.push_back(*cut);
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
  std::vector<size_t> transforms = {0};
  for (const int layers : recompute) {
    KV_ASSIGN_OR_RETURN(const size_t transform, pack->FindTransform(layers));
    if (transform <= transforms.back() || transforms.size() == kMaxWays) {
      return InvalidArgument("--recompute {}: give at most {} ascending numbers of layers",
                             fmt::join(recompute, ","), kMaxWays - 1);
    }
    transforms.push_back(transform);
  }
  return StoredFormPtr(
      std::make_shared<KltForm>(model, std::move(pack), held, exact, transforms, attended));
}

}  // namespace kvant::node
