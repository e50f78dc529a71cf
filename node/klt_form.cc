#include "node/klt_form.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "node/klt.h"

namespace kvant::node {
namespace {

// 2 bytes a symbol and 6 of what follows it, with the states of rANS and a length before them.
constexpr uint64_t kMostOfLevel = 8;
constexpr uint64_t kOfExtent = sizeof(uint32_t) + kernels::RansBound(0);

class KltForm final : public StoredForm {
 public:
  KltForm(const Model* model, std::shared_ptr<const KltPack> pack, std::vector<size_t> cuts,
          const AttendedPayload& attended)
      : StoredForm(FactsOf(*pack, cuts)),
        model_(*model),
        attended_(attended),
        pack_(std::move(pack)),
        coder_(model, pack_.get(), std::move(cuts)) {}

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
    const std::vector<float> embeddings = coder_.Embeddings(block.tokens);
    coder_.Encode(embeddings, block.position, rows, &extents);
    out->manifest = {};
    out->manifest.key = block.key;
    out->manifest.codec = tag();
    out->manifest.basis = basis();
    out->manifest.token_count = kBlockTokens;
    out->bytes.clear();
    for (size_t cut = 0; cut < coder_.cuts(); ++cut) {
      for (size_t group = 0; group < coder_.groups(); ++group) {
        const std::vector<std::byte>& extent = extents[cut][group];
        const StoredRow& row = this->rows()[cut * coder_.groups() + group];
        out->manifest.Append(row.part, row.cut, row.layer, row.kind, extent,
                             coder_.cut(cut).mean_kl);
        out->bytes.insert(out->bytes.end(), extent.begin(), extent.end());
      }
    }
    // Attended is what a reader gets, by whoever computed it as well.
    KltReader reader(&coder_, embeddings, block.position);
    for (size_t group = 0; group < coder_.groups(); ++group) {
      std::vector<std::span<const std::byte>> of_group;
      for (const auto& of_cut : extents) of_group.emplace_back(of_cut[group]);
      KV_CHECK(reader.Read(group, of_group, &rows).ok());
      WritePayload(group, block.position, Scope::kAll, rows, payload.data());
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
          reader_(&form.coder_, form.coder_.Embeddings(block.tokens), block.position),
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
      KV_RETURN_IF_ERROR(reader_.Read(group, extents, &rows_));
      form_.WritePayload(group, block_.position, block_.portion.scope, rows_,
                         block_.payload.data());
      return OkStatus();
    }

    const KltForm& form_;
    BlockToRead block_;
    KltReader reader_;
    std::vector<bool> arrived_;  // [group]
    std::vector<bool> read_;     // [group]
    KltCoder::Rows rows_;
  };

  static Facts FactsOf(const KltPack& pack, std::span<const size_t> cuts) {
    Facts facts;
    facts.name = "klt";
    facts.tag = static_cast<uint32_t>(FormTag::kKlt);
    facts.basis = pack.digest;
    facts.whole_at_any_cut = true;
    facts.lossy = true;
    facts.numerics = fmt::format("/klt-{:.16}", ToHex(pack.digest));
    for (size_t cut = 0; cut < cuts.size(); ++cut) {
      facts.numerics += "-" + pack.cuts()[cuts[cut]].name;
      facts.cut_names.push_back(pack.cuts()[cuts[cut]].name);
      facts.cut_errors.push_back(pack.cuts()[cuts[cut]].mean_kl);
      for (size_t group = 0; group < pack.transforms[0].groups.size(); ++group) {
        StoredRow row;
        row.part = static_cast<uint8_t>(Part::kState);
        row.cut = static_cast<uint8_t>(cut);
        row.layer = static_cast<uint16_t>(group);
        row.kind = static_cast<uint8_t>(kernels::SegmentKind::kLatent);
        row.min_bytes = kOfExtent;
        row.max_bytes =
            kOfExtent +
            kMostOfLevel * static_cast<uint64_t>(kBlockTokens * pack.transforms[0].bases[group].coefficients);
        facts.rows.push_back(row);
      }
    }
    for (const KltGroup& group : pack.transforms[0].groups) facts.global_layers.push_back(group.global);
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
};

}  // namespace

Result<StoredFormPtr> MakeKltForm(const Model* model, std::shared_ptr<const KltPack> pack,
                                  std::string_view cuts, const AttendedPayload& attended) {
  std::vector<size_t> held;
  for (std::string_view rest = cuts; !rest.empty();) {
    const size_t comma = rest.find(',');
    KV_ASSIGN_OR_RETURN(held.emplace_back(), pack->FindCut(rest.substr(0, comma)));
    rest.remove_prefix(comma == std::string_view::npos ? rest.size() : comma + 1);
  }
  const bool beginning = held.size() <= pack->refining.size() &&
                         std::equal(held.begin(), held.end(), pack->refining.begin());
  if (held.empty() || (held.size() > 1 && !beginning)) {
    std::vector<std::string> names;
    for (const size_t cut : pack->refining) names.push_back(pack->cuts()[cut].name);
    return InvalidArgument(
        "a block can't hold the cuts '{}': name one, or several from the beginning of {}", cuts,
        fmt::join(names, ","));
  }
  return StoredFormPtr(
      std::make_shared<KltForm>(model, std::move(pack), std::move(held), attended));
}

}  // namespace kvant::node
