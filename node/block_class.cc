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

Part PartOf(SegmentKind kind) {
  switch (kind) {
    case SegmentKind::kKey:
      return Part::kKeys;
    case SegmentKind::kValue:
      return Part::kValues;
    case SegmentKind::kLatent:
      return Part::kState;
  }
  return Part::kState;
}

std::vector<bool> GlobalLayers(const ModelConfig& config) {
  std::vector<bool> global;
  for (int layer = 0; layer < config.layers; ++layer) global.push_back(config.Window(layer) == 0);
  return global;
}

}  // namespace

Portion Portion::Meet(const Portion& other) const {
  return {{std::min(cuts.keys, other.cuts.keys), std::min(cuts.values, other.cuts.values)},
          std::min(scope, other.scope)};
}

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
                       std::span<const std::byte> cluster_secret)
    : model_(model),
      codec_(codec),
      global_layers_(GlobalLayers(model->config())),
      layout_(*codec, model->config().StateShape(kBlockTokens), model->config().layers),
      global_layout_(*codec, model->config().StateShape(kBlockTokens), global_layers_),
      cluster_secret_(cluster_secret.begin(), cluster_secret.end()) {}

Cuts BlockClass::CutsOf(Wire wire) const {
  KV_CHECK(wire != Wire::kAuto);
  const int key_bits = wire == Wire::kFull ? 32 : wire == Wire::kK8V4 ? 8 : 4;
  // Latents are keys as well: they keep as many bits.
  const int value_bits = layout_.shape().latent ? key_bits : wire == Wire::kFull ? 32 : 4;
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
  const auto add = [&](const std::vector<bool>& layers, const Cuts& from) {
    if (std::find(layers.begin(), layers.end(), true) == layers.end()) return;
    Selection selection;
    for (const SegmentKind kind : {SegmentKind::kKey, layout_.shape().value_kind()}) {
      if (from.Of(kind) >= wanted.cuts.Of(kind)) continue;
      const auto part = static_cast<size_t>(PartOf(kind));
      selection.first_cuts[part] = static_cast<uint8_t>(from.Of(kind));
      selection.cuts[part] = static_cast<uint8_t>(wanted.cuts.Of(kind));
    }
    if (selection.cuts == Selection().cuts) return;
    selection.SetLayers(layers);
    missing.push_back(std::move(selection));
  };
  const Cuts have = held != nullptr ? held->cuts : Cuts();
  const bool all = wanted.scope == Scope::kAll;
  if (held != nullptr && all && held->scope == Scope::kGlobal) {
    add(global_layers_, have);
    std::vector<bool> sliding = global_layers_;
    sliding.flip();
    add(sliding, Cuts());
  } else {
    add(all ? std::vector<bool>(global_layers_.size(), true) : global_layers_, have);
  }
  return missing;
}

uint64_t BlockClass::SelectedBytes(const Selection& selection) const {
  uint64_t bytes = 0;
  for (const kernels::PayloadRow& row : layout_.rows()) {
    const bool takes =
        selection.Takes(static_cast<uint8_t>(PartOf(row.kind)), static_cast<uint8_t>(row.cut),
                        static_cast<uint16_t>(row.layer));
    bytes += takes ? row.length : 0;
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
  options.layout.layer_end = static_cast<uint32_t>(layout_.layers());
  options.layout.head_end = static_cast<uint32_t>(model_->config().kv_heads);
  options.layout.state_kinds = {static_cast<uint8_t>(SegmentKind::kKey),
                                static_cast<uint8_t>(layout_.shape().value_kind())};
  // Prefill attends the whole of what the codec stores, so the codec's name says the cut as well.
  options.numerics_class = std::string(codec_->name) + "/full";
  const std::vector<uint32_t> ids(tokens.begin(), tokens.end());
  return KeyChain(options).Keys(ids);
}

void BlockClass::EncodeLayer(int layer, const float* keys, const float* values, std::byte* payload,
                             float* max_errors) const {
  for (const SegmentKind kind : {SegmentKind::kKey, layout_.shape().value_kind()}) {
    float errors[kernels::kMaxCuts] = {};
    codec_->encode(kind, layout_.shape().Of(kind), kind == SegmentKind::kKey ? keys : values,
                   layout_.MutableRanges(kind, layer, payload), errors);
    if (max_errors == nullptr) continue;
    for (size_t i = 0; i < layout_.rows().size(); ++i) {
      const kernels::PayloadRow& row = layout_.rows()[i];
      if (row.kind == kind && row.layer == layer) max_errors[i] = errors[row.cut];
    }
  }
}

BlockManifest BlockClass::MakeManifest(const BlockKey& key, std::span<const std::byte> payload,
                                       std::span<const float> max_errors) const {
  KV_CHECK(payload.size() == payload_bytes() && max_errors.size() == layout_.rows().size());
  BlockManifest manifest;
  manifest.key = key;
  manifest.codec = static_cast<uint32_t>(codec_->id);
  manifest.token_count = kBlockTokens;
  for (size_t i = 0; i < layout_.rows().size(); ++i) {
    const kernels::PayloadRow& row = layout_.rows()[i];
    manifest.Append(static_cast<uint8_t>(PartOf(row.kind)), static_cast<uint8_t>(row.cut),
                    static_cast<uint16_t>(row.layer), static_cast<uint8_t>(row.kind),
                    payload.subspan(row.offset, row.length), max_errors[i]);
  }
  return manifest;
}

Status BlockClass::CheckManifest(const BlockKey& key, const BlockManifest& manifest) const {
  if (manifest.key != key) {
    return DataLoss("block {}: the manifest is of block {}", key.ShortHex(),
                    manifest.key.ShortHex());
  }
  if (manifest.codec != static_cast<uint32_t>(codec_->id) || manifest.token_count != kBlockTokens ||
      manifest.rows.size() != layout_.rows().size()) {
    return DataLoss("block {}: the manifest describes codec {} with {} tokens, not {} with {}",
                    key.ShortHex(), manifest.codec, manifest.token_count, codec_->name,
                    kBlockTokens);
  }
  for (const kernels::PayloadRow& row : layout_.rows()) {
    const bool there =
        std::any_of(manifest.rows.begin(), manifest.rows.end(), [&](const ManifestRow& other) {
          return other.part == static_cast<uint8_t>(PartOf(row.kind)) && other.cut == row.cut &&
                 other.layer == row.layer && other.kind == static_cast<uint8_t>(row.kind) &&
                 other.offset == row.offset && other.length == row.length;
        });
    if (!there) {
      return DataLoss("block {}: layer {} is not laid out as {} says", key.ShortHex(), row.layer,
                      codec_->name);
    }
  }
  return OkStatus();
}

Status BlockClass::CheckLayer(int layer, const Portion& portion,
                              std::span<const std::byte> bytes) const {
  KV_CHECK(bytes.size() >= BytesOf(portion));
  const kernels::PayloadLayout& held = layout(portion.scope);
  for (const SegmentKind kind : {SegmentKind::kKey, layout_.shape().value_kind()}) {
    const int count = portion.cuts.Of(kind);
    size_t sizes[kernels::kMaxCuts] = {};
    for (int cut = 0; cut < count; ++cut) sizes[cut] = held.Row(kind, cut, layer).length;
    KV_RETURN_IF_ERROR(codec_->check(kind, layout_.shape().Of(kind),
                                     held.Ranges(kind, layer, count, bytes.data()),
                                     std::span(sizes, static_cast<size_t>(count))));
  }
  return OkStatus();
}

}  // namespace kvant::node
