#include "node/block_class.h"

#include <algorithm>

#include "node/decoder.h"

namespace kvant::node {
namespace {

using kernels::SegmentKind;

constexpr std::pair<std::string_view, Wire> kWires[] = {
    {"full", Wire::kFull}, {"k8v4", Wire::kK8V4}, {"k4v4", Wire::kK4V4}, {"auto", Wire::kAuto}};

// The fewest extents that hold `bits` bits an element, or all there are.
int CutsForBits(const kernels::Codec& codec, int available, int bits) {
  int sum = 0;
  for (int cut = 0; cut < available; ++cut) {
    sum += codec.bits_per_cut[cut];
    if (sum >= bits) return cut + 1;
  }
  return available;
}

// Whether what is attended is the state itself, rounded to the numbers of a model's own file.
bool IsRaw(kernels::CodecId id) {
  return id == kernels::CodecId::kRawBf16 || id == kernels::CodecId::kRawFp16 ||
         id == kernels::CodecId::kRawFp32;
}

}  // namespace

Result<Wire> ParseWire(std::string_view name) {
  for (const auto& [known, wire] : kWires) {
    if (known == name) return wire;
  }
  return InvalidArgument("unknown wire '{}': use full, k8v4, k4v4 or auto", name);
}

std::string_view WireName(Wire wire) {
  for (const auto& [name, known] : kWires) {
    if (known == wire) return name;
  }
  return "unknown";
}

Result<Domains> Domains::Parse(std::span<const std::string> entries) {
  Domains domains;
  for (const std::string& entry : entries) {
    const size_t equals = entry.find('=');
    if (equals == std::string::npos || equals == 0 || equals + 1 == entry.size()) {
      return InvalidArgument("domain '{}': expected DOMAIN=tenant,tenant,...", entry);
    }
    const std::string domain = entry.substr(0, equals);
    std::string_view rest = std::string_view(entry).substr(equals + 1);
    while (!rest.empty()) {
      const size_t comma = rest.find(',');
      const std::string tenant(rest.substr(0, comma));
      rest.remove_prefix(comma == std::string_view::npos ? rest.size() : comma + 1);
      for (const auto& [known, known_domain] : domains.domain_of_) {
        if (known == tenant && known_domain != domain) {
          return InvalidArgument("tenant '{}' is put into two domains, '{}' and '{}'", tenant,
                                 known_domain, domain);
        }
      }
      domains.domain_of_.emplace_back(tenant, domain);
    }
  }
  return domains;
}

std::string Domains::DomainOf(std::string_view tenant) const {
  // The prefixes keep a tenant's own domain apart from a shared one of the same name.
  for (const auto& [known, domain] : domain_of_) {
    if (known == tenant) return "domain/" + domain;
  }
  return "tenant/" + std::string(tenant);
}

BlockClass::BlockClass(const Model* model, const kernels::Codec* codec,
                       std::span<const std::byte> cluster_secret, StoredFormPtr form)
    : model_(model),
      codec_(codec),
      attended_(*codec, model->config()),
      cluster_secret_(cluster_secret.begin(), cluster_secret.end()) {
  if (form == nullptr) form = MakePlainForm(attended_);
  forms_.push_back(form);
  const auto read_too = [&](const StoredFormPtr& other) {
    if (other->tag() != form->tag()) forms_.push_back(other);
  };
  // Forms that are whole at any cut have rows of their own, so that no selection fits both.
  if (!form->whole_at_any_cut()) {
    read_too(MakePlainForm(attended_));
    if (LosslessFits(*codec)) read_too(MakeLosslessForm(attended_));
  }
  longest_rows_.assign(form->rows().begin(), form->rows().end());
  for (const StoredFormPtr& read : forms_) {
    // One selection means the same rows of each of them.
    KV_CHECK(read->rows().size() == longest_rows_.size());
    for (size_t i = 0; i < longest_rows_.size(); ++i) {
      longest_rows_[i].max_bytes = std::max(longest_rows_[i].max_bytes, read->rows()[i].max_bytes);
    }
  }
  if (form->whole_at_any_cut()) {
    for (size_t w = 0; w < form->ways().size(); ++w) {
      const StoredWay& way = form->ways()[w];
      for (size_t cut = way.cut_names.size(); cut-- > 0;) {
        const int count = static_cast<int>(cut) + 1;
        const bool all = cut + 1 == way.cut_names.size();
        const Cuts cuts = all ? way.full : Cuts{count, count, static_cast<int>(w)};
        choices_.push_back({way.cut_names[cut] + way.suffix, cuts, way.cut_errors[cut]});
      }
      if (w == 0) own_choices_ = choices_.size();
    }
  } else {
    for (const Wire wire : {Wire::kFull, Wire::kK8V4, Wire::kK4V4}) {
      const Cuts cuts = CutsOf(wire);
      if (!choices_.empty() && choices_.back().cuts == cuts) continue;
      const bool exact = IsRaw(codec->id) && cuts == FullCuts();
      choices_.push_back(
          {std::string(WireName(wire)), cuts, exact ? std::optional(0.0F) : std::nullopt});
    }
  }
  if (own_choices_ == 0) own_choices_ = choices_.size();
  KV_CHECK(own_choices_ != 0 && choices_.size() <= kMaxChoices);
}

size_t BlockClass::ChoiceOf(const Cuts& cuts) const {
  const auto found = std::find_if(choices_.begin(), choices_.end(),
                                  [&](const ReadChoice& choice) { return choice.cuts == cuts; });
  KV_CHECK(found != choices_.end());
  return static_cast<size_t>(found - choices_.begin());
}

Cuts BlockClass::CutsOf(Wire wire) const {
  KV_CHECK(wire != Wire::kAuto);
  if (form().whole_at_any_cut()) {
    // Its cuts say no bits: all, all but one, one.
    const int all = FullCuts().values;
    int cuts = wire == Wire::kFull ? all : wire == Wire::kK8V4 ? std::max(1, all - 1) : 1;
    if (wire >= Wire::kCut1)
      cuts = std::min(all, 1 + static_cast<int>(wire) - static_cast<int>(Wire::kCut1));
    return {cuts, cuts};
  }
  const int key_bits = wire == Wire::kFull ? 32 : wire == Wire::kK8V4 ? 8 : 4;
  // Latents are keys as well: they keep as many bits.
  const int value_bits = layout().shape().latent ? key_bits : wire == Wire::kFull ? 32 : 4;
  return {CutsForBits(*codec_, codec_->key_cuts, key_bits),
          CutsForBits(*codec_, codec_->value_cuts, value_bits)};
}

Scope BlockClass::ScopeAttended(size_t block, size_t position) const {
  const ModelConfig& config = model_->config();
  const size_t end = (block + 1) * kBlockTokens;
  KV_DCHECK(end <= position);
  if (config.sliding_window == 0) return Scope::kAll;
  // All sliding layers have one window.
  const auto window = static_cast<size_t>(config.sliding_window);
  return end + window > position + 1 ? Scope::kAll : Scope::kGlobal;
}

std::vector<Selection> BlockClass::Missing(const Portion* held, const Portion& wanted) const {
  std::vector<Selection> missing;
  const std::array<uint8_t, kMaxParts> wanted_cuts = form().PartCuts(wanted.cuts);
  const auto add = [&](const std::vector<bool>& layers, const Cuts& from) {
    if (std::find(layers.begin(), layers.end(), true) == layers.end()) return;
    const std::array<uint8_t, kMaxParts> have = form().PartCuts(from);
    Selection selection;
    for (size_t part = 0; part < kMaxParts; ++part) {
      if (have[part] >= wanted_cuts[part]) continue;
      selection.first_cuts[part] = have[part];
      selection.cuts[part] = wanted_cuts[part];
    }
    if (selection.cuts == Selection().cuts) return;
    selection.SetLayers(layers);
    missing.push_back(std::move(selection));
  };
  if (held != nullptr && held->cuts.way != wanted.cuts.way) held = nullptr;
  Cuts none;
  none.way = wanted.cuts.way;
  const Cuts have = held != nullptr ? held->cuts : none;
  const std::vector<bool> layers = form().LayersOf(wanted);
  if (held != nullptr && wanted.scope == Scope::kAll && held->scope == Scope::kGlobal) {
    const std::vector<bool> global = form().LayersOf({wanted.cuts, Scope::kGlobal});
    std::vector<bool> sliding = layers;
    for (size_t layer = 0; layer < layers.size(); ++layer)
      sliding[layer] = layers[layer] && !global[layer];
    add(global, have);
    add(sliding, none);
  } else {
    add(layers, have);
  }
  return missing;
}

Result<const StoredForm*> BlockClass::FormOf(const BlockManifest& manifest) const {
  for (const StoredFormPtr& form : forms_) {
    if (form->tag() == manifest.codec && form->basis() == manifest.basis) return form.get();
  }
  std::string read;
  for (const StoredFormPtr& form : forms_) {
    if (form->tag() == manifest.codec) {
      return MakeStatus(StatusCode::kUnsupported,
                        "it is stored as {} with a codec pack or cuts other than this node's; "
                        "give all nodes the same pack and cuts",
                        form->name());
    }
    read += fmt::format("{}{} (tag {})", read.empty() ? "" : ", ", form->name(), form->tag());
  }
  return MakeStatus(StatusCode::kUnsupported,
                    "it is stored in a form with codec tag {}, and this node reads {}; give all "
                    "nodes the same release and flags",
                    manifest.codec, read);
}

bool BlockClass::MayBe(const LookupBlock& found) const {
  if (found.state != LookupState::kPresent || found.cuts != form().AllPartCuts()) {
    return false;
  }
  return std::any_of(forms_.begin(), forms_.end(), [&](const StoredFormPtr& form) {
    uint64_t least = 0;
    uint64_t most = 0;
    for (const StoredRow& row : form->rows()) {
      least += row.min_bytes;
      most += row.max_bytes;
    }
    return found.payload_bytes >= least && found.payload_bytes <= most;
  });
}

uint64_t BlockClass::most_stored_bytes() const { return MostBytes(SelectAll(), {}); }

uint64_t BlockClass::MostBytes(const Selection& selection, const CutEnds& ends) const {
  std::array<uint64_t, kMaxCuts> most{};
  for (const StoredRow& row : longest_rows_) {
    if (selection.Takes(row.part, row.cut, row.layer)) most[row.cut] += row.max_bytes;
  }
  uint64_t bytes = 0;
  for (size_t cut = 0; cut < kMaxCuts; ++cut) {
    const uint64_t stored = ends[cut] - (cut == 0 ? 0 : ends[cut - 1]);
    bytes += ends.back() == 0 ? most[cut] : std::min(most[cut], stored);
  }
  return bytes;
}

uint64_t BlockClass::LikelyBytes(const Selection& selection, const CutEnds& ends) const {
  if (ends.back() == 0) return MostBytes(selection, ends);
  // Of rows whose length is not certain, all are taken to be off by the same factor.
  struct Sums {
    uint64_t certain = 0;
    uint64_t likely = 0;
  };
  std::array<Sums, kMaxCuts> taken{};
  std::array<Sums, kMaxCuts> all{};
  for (const StoredRow& row : form().rows()) {
    const bool certain = row.min_bytes == row.max_bytes;
    const uint64_t likely = row.likely_bytes != 0 ? row.likely_bytes : row.max_bytes;
    const auto add = [&](Sums* to) { (certain ? to->certain : to->likely) += likely; };
    add(&all[row.cut]);
    if (selection.Takes(row.part, row.cut, row.layer)) add(&taken[row.cut]);
  }
  uint64_t bytes = 0;
  for (size_t cut = 0; cut < kMaxCuts; ++cut) {
    const uint64_t stored = ends[cut] - (cut == 0 ? 0 : ends[cut - 1]);
    const uint64_t others = stored - std::min(stored, all[cut].certain);
    bytes += taken[cut].certain;
    if (all[cut].likely != 0) bytes += others * taken[cut].likely / all[cut].likely;
  }
  return bytes;
}

uint64_t BlockClass::Bf16BytesPerToken() const {
  const kernels::LayerShape state = model_->config().StateShape(1);
  const int elements =
      state.keys.kv_heads * state.keys.head_dim + state.values.kv_heads * state.values.head_dim;
  return uint64_t{2} * static_cast<uint64_t>(model_->config().layers) *
         static_cast<uint64_t>(elements);
}

std::vector<BlockKey> BlockClass::Keys(std::span<const int32_t> tokens,
                                       std::string_view domain) const {
  KeyChainOptions options;
  options.domain = DeriveDomainSecret(cluster_secret_, domain);
  options.model = model_->digest();
  options.layout.block_tokens = kBlockTokens;
  options.layout.layer_end = static_cast<uint32_t>(layout().layers());
  options.layout.head_end = static_cast<uint32_t>(model_->config().kv_heads);
  options.layout.state_kinds = {static_cast<uint8_t>(SegmentKind::kKey),
                                static_cast<uint8_t>(layout().shape().value_kind())};
  // Prefill attends the whole of what the codec stores, so the codec's name says the cut as well.
  options.numerics_class =
      std::string(codec_->name) + "/full" + form().numerics() + model_->numerics();
  const std::vector<uint32_t> ids(tokens.begin(), tokens.end());
  return KeyChain(options).Keys(ids);
}

size_t BlockClass::DecodedLayers(const Portion& portion) const {
  const StoredWay& way = form().WayOf(portion.cuts);
  if (!way.takes_long) return 0;
  const int recomputed = way.recomputed;
  size_t layers = 0;
  for (int layer = recomputed > 0 ? recomputed + 1 : 0; layer < layout().layers(); ++layer)
    layers += layout(portion.scope).Holds(layer) ? 1 : 0;
  return layers;
}

double BlockClass::PrefillWork(int position, int tokens) const {
  return PrefillWork(position, tokens, model_->config().layers);
}

double BlockClass::PrefillWork(int position, int tokens, int layers) const {
  const ModelConfig& config = model_->config();
  const kernels::LayerShape state = config.StateShape(1);
  // Multiplications of a token, and of a token with one that it attends.
  const double attention =
      static_cast<double>(config.hidden) *
      (config.q_width() + config.q_heads * config.value_dim() +
       state.keys.kv_heads * state.keys.head_dim + state.values.kv_heads * state.values.head_dim);
  const double attended =
      static_cast<double>(config.q_heads) * (kernels::KeyDim(state) + state.values.head_dim);
  double all_products = 0;
  double products = 0;
  double past = 0;
  for (int layer = 0; layer < config.layers; ++layer) {
    const MixtureOfExperts& experts = config.experts;
    const double width = config.IsMixture(layer)
                             ? static_cast<double>(experts.intermediate) *
                                   (experts.experts_per_token + experts.shared_experts)
                             : config.intermediate;
    all_products += attention + 3.0 * config.hidden * width;
    if (layer >= layers) continue;
    products += attention + 3.0 * config.hidden * width;
    past += attended * (position - config.FirstVisible(layer, position));
  }
  return (kBlockTokens * products + tokens * past) / all_products;
}

Status BlockClass::CheckManifest(const BlockKey& key, const BlockManifest& manifest) const {
  if (manifest.key != key) {
    return DataLoss("block {}: the manifest is of block {}", key.ShortHex(),
                    manifest.key.ShortHex());
  }
  KV_ASSIGN_OR_RETURN(const StoredForm* form, FormOf(manifest));
  if (manifest.token_count != kBlockTokens || manifest.rows.size() != form->rows().size()) {
    return DataLoss("block {}: the manifest describes {} rows of {} tokens, not {} of {}",
                    key.ShortHex(), manifest.rows.size(), manifest.token_count, form->rows().size(),
                    kBlockTokens);
  }
  uint64_t offset = 0;
  for (size_t i = 0; i < manifest.rows.size(); ++i) {
    const ManifestRow& row = manifest.rows[i];
    const StoredRow& expected = form->rows()[i];
    if (row.part != expected.part || row.cut != expected.cut || row.layer != expected.layer ||
        row.kind != expected.kind || row.offset != offset || row.length < expected.min_bytes ||
        row.length > expected.max_bytes) {
      return DataLoss("block {}: layer {} is not laid out as codec {}, stored {}, says",
                      key.ShortHex(), row.layer, codec_->name, form->name());
    }
    offset += row.length;
  }
  return OkStatus();
}

}  // namespace kvant::node
