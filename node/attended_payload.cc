#include "node/attended_payload.h"

#include <algorithm>

#include "base/check.h"
#include "node/decoder.h"

namespace kvant::node {
namespace {

using kernels::SegmentKind;

std::vector<bool> GlobalLayers(const ModelConfig& config) {
  std::vector<bool> global;
  for (int layer = 0; layer < config.layers; ++layer) global.push_back(config.Window(layer) == 0);
  return global;
}

}  // namespace

Portion Portion::Meet(const Portion& other) const {
  KV_DCHECK(cuts.way == other.cuts.way);
  return {
      {std::min(cuts.keys, other.cuts.keys), std::min(cuts.values, other.cuts.values), cuts.way},
      std::min(scope, other.scope)};
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

AttendedPayload::AttendedPayload(const kernels::Codec& codec, const ModelConfig& config)
    : global_layers_(GlobalLayers(config)),
      all_(codec, config.StateShape(kBlockTokens), config.layers),
      global_(codec, config.StateShape(kBlockTokens), global_layers_) {}

void AttendedPayload::EncodeLayer(int layer, Scope scope, const float* keys, const float* values,
                                  std::byte* payload, float* max_errors) const {
  const kernels::PayloadLayout& to = layout(scope);
  for (const SegmentKind kind : {SegmentKind::kKey, to.shape().value_kind()}) {
    float errors[kernels::kMaxCuts] = {};
    codec().encode(kind, to.shape().Of(kind), kind == SegmentKind::kKey ? keys : values,
                   to.MutableRanges(kind, layer, payload),
                   max_errors != nullptr ? errors : nullptr);
    if (max_errors == nullptr) continue;
    for (size_t i = 0; i < to.rows().size(); ++i) {
      const kernels::PayloadRow& row = to.rows()[i];
      if (row.kind == kind && row.layer == layer) max_errors[i] = errors[row.cut];
    }
  }
}

Status AttendedPayload::CheckLayer(int layer, const Portion& portion,
                                   std::span<const std::byte> bytes) const {
  KV_CHECK(bytes.size() >= BytesOf(portion));
  const kernels::PayloadLayout& held = layout(portion.scope);
  for (const SegmentKind kind : {SegmentKind::kKey, all_.shape().value_kind()}) {
    const int count = portion.cuts.Of(kind);
    size_t sizes[kernels::kMaxCuts] = {};
    for (int cut = 0; cut < count; ++cut) sizes[cut] = held.Row(kind, cut, layer).length;
    KV_RETURN_IF_ERROR(codec().check(kind, all_.shape().Of(kind),
                                     held.Ranges(kind, layer, count, bytes.data()),
                                     std::span(sizes, static_cast<size_t>(count))));
  }
  return OkStatus();
}

}  // namespace kvant::node
