#include "node/klt_state_coder.h"

#include <fmt/format.h>

#include <utility>

#include "base/check.h"
#include "cache_service/manifest.h"
#include "node/klt.h"
#include "node/stored_form.h"

namespace kvant::node {
namespace {

class KltStateCoder final : public StateCoder {
 public:
  KltStateCoder(const Model* model, std::shared_ptr<const KltPack> pack)
      : model_(*model), pack_(std::move(pack)) {
    for (size_t t = 0; t < pack_->transforms.size(); ++t) {
      const int recomputed = pack_->transforms[t].recomputed;
      const std::string suffix = recomputed == 0 ? "" : fmt::format("@{}", recomputed);
      for (size_t cut = 0; cut < pack_->cuts().size(); ++cut) {
        readings_.push_back({pack_->cuts()[cut].name + suffix, coders_.size(), 1});
        coders_.emplace_back(model, pack_.get(), std::vector<size_t>{cut}, t);
      }
      for (size_t count = pack_->refining.size(); count > 1; --count) {
        const KltCut& last = pack_->cuts()[pack_->refining[count - 1]];
        readings_.push_back({last.name + "-refined" + suffix, coders_.size(), count});
      }
      if (pack_->refining.size() > 1) coders_.emplace_back(model, pack_.get(), pack_->refining, t);
    }
  }

  std::string_view name() const override { return "klt"; }
  std::vector<std::string> wires() const override {
    std::vector<std::string> names;
    for (const Reading& reading : readings_) names.push_back(reading.name);
    return names;
  }
  int recomputed_layers(size_t wire) const override {
    return coders_[readings_[wire].coder].transform().recomputed;
  }
  std::vector<int> entering_layers() const override {
    std::vector<int> layers;
    for (const KltTransform& transform : pack_->transforms) {
      if (transform.recomputed > 0) layers.push_back(transform.recomputed);
    }
    return layers;
  }
  bool blockwise() const override { return true; }
  uint64_t table_bytes() const override { return pack_->file_bytes; }

  void Code(const PrefixState& exact, const Sink& sink) const override {
    KV_CHECK(exact.tokens() % kBlockTokens == 0);
    std::vector<KltCoder::Rows> rows;
    for (int at = 0; at < exact.tokens(); at += kBlockTokens) {
      KltCoder::Rows& block = rows.emplace_back();
      for (int layer = 0; layer < exact.layers(); ++layer) {
        block.emplace_back(static_cast<size_t>(kBlockTokens * pack_->width));
        GatherState(model_, layer, exact.first_position() + at, kBlockTokens,
                    exact.keys(layer) + static_cast<size_t>(at) * exact.key_width(),
                    exact.values(layer) + static_cast<size_t>(at) * exact.value_width(),
                    block.back().data());
      }
    }
    PrefixState decoded(model_.config(), exact.token_ids(), exact.first_position());
    for (size_t wire = 0; wire < readings_.size(); ++wire) {
      const KltCoder& coder = coders_[readings_[wire].coder];
      CodedSize size;
      for (int at = 0; at < exact.tokens(); at += kBlockTokens) {
        const int position = exact.first_position() + at;
        const KltCoder::Rows& of_block = rows[static_cast<size_t>(at / kBlockTokens)];
        const std::vector<float> entering = Entering(exact, coder, static_cast<size_t>(at));
        KltCoder::Extents extents;
        const KltSide side = KltSide::OfEntering(&coder, entering);
        coder.Encode(side, position, of_block, &extents);
        size.manifest_bytes += ManifestBytes(coder, extents);
        // What is measured is what a reader gets out of the bytes, or computes.
        KltCoder::Rows made = of_block;
        KltReader reader(&coder, side, position);
        for (size_t group = 0; group < coder.groups(); ++group) {
          std::vector<std::span<const std::byte>> read;
          for (size_t cut = 0; cut < readings_[wire].cuts; ++cut) {
            read.emplace_back(extents[cut][group]);
            size.bits += 8 * read.back().size();
          }
          KV_CHECK(reader.Read(group, read, &made).ok());
        }
        for (int layer = 0; layer < exact.layers(); ++layer) {
          ScatterState(model_, layer, position, kBlockTokens,
                       made[static_cast<size_t>(layer)].data(),
                       decoded.keys(layer) + static_cast<size_t>(at) * exact.key_width(),
                       decoded.values(layer) + static_cast<size_t>(at) * exact.value_width());
        }
      }
      sink(wire, decoded, size);
    }
  }

 private:
  // Of a block that stores these extents, as KltForm makes it.
  static size_t ManifestBytes(const KltCoder& coder, const KltCoder::Extents& extents) {
    BlockManifest manifest;
    manifest.key.bytes[0] = std::byte{1};  // any
    manifest.codec = static_cast<uint32_t>(FormTag::kKlt);
    manifest.basis = coder.pack().digest;
    manifest.token_count = kBlockTokens;
    for (size_t cut = 0; cut < extents.size(); ++cut) {
      for (size_t group = 0; group < extents[cut].size(); ++group) {
        manifest.Append(static_cast<uint8_t>(Part::kState), static_cast<uint8_t>(cut),
                        static_cast<uint16_t>(group),
                        static_cast<uint8_t>(kernels::SegmentKind::kLatent), extents[cut][group],
                        coder.cut(cut).mean_kl);
      }
    }
    return EncodeManifest(manifest).size();
  }
  // Of the block of tokens from `at` on.
  static std::vector<float> Entering(const PrefixState& exact, const KltCoder& coder, size_t at) {
    const int recomputed = coder.transform().recomputed;
    if (recomputed == 0) return coder.Embeddings(exact.token_ids().subspan(at, kBlockTokens));
    const auto hidden = static_cast<size_t>(coder.pack().hidden);
    const auto entering = exact.entering(recomputed).subspan(at * hidden, kBlockTokens * hidden);
    return {entering.begin(), entering.end()};
  }

  const Model& model_;
  std::shared_ptr<const KltPack> pack_;
  // What a wire is: the first cuts of a coder.
  struct Reading {
    std::string name;
    size_t coder = 0;
    size_t cuts = 0;
  };
  std::vector<Reading> readings_;  // [wire]
  std::vector<KltCoder> coders_;
};

}  // namespace

Result<std::unique_ptr<StateCoder>> MakeKltStateCoder(const Model* model,
                                                      std::shared_ptr<const KltPack> pack) {
  KV_RETURN_IF_ERROR(pack->CheckFits(*model));
  return std::unique_ptr<StateCoder>(std::make_unique<KltStateCoder>(model, std::move(pack)));
}

}  // namespace kvant::node
