#include "node/state_coder.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/check.h"
#include "node/aqua_coder.h"
#include "node/decoder.h"
#include "node/ggml_coder.h"
#include "node/kivi_coder.h"
#include "node/klt_state_coder.h"
#include "node/kvtc_coder.h"
#include "node/kvtc_pack.h"
#include "node/pruning_coders.h"

namespace kvant::node {
namespace {

using Made = Result<std::unique_ptr<StateCoder>>;

struct Entry {
  std::string_view name;
  Made (*make)(std::string_view name, CoderContext* context);
};

template <GgmlCacheType kKeys, GgmlCacheType kValues>
Made MakeGgml(std::string_view name, CoderContext* context) {
  return MakeGgmlCoder(std::string(name), *context->model, kKeys, kValues);
}

template <int kBits>
Made MakeKivi(std::string_view name, CoderContext*) {
  return MakeKiviCoder(std::string(name), kBits);
}

template <int kPercent>
Made MakeThink(std::string_view name, CoderContext* context) {
  return MakeThinkCoder(std::string(name), *context->model, kPercent);
}

template <int kPercent>
Made MakeSparse(std::string_view name, CoderContext*) {
  return MakeSparseCoder(std::string(name), kPercent);
}

Status NeedCalibration(std::string_view name, const CoderContext& context) {
  if (context.calibration) return OkStatus();
  return InvalidArgument(
      "codec {}: its tables are learnt from a text; give one that is not measured with "
      "--calibration FILE",
      name);
}

template <int kWindow>
Made MakeKvtc(std::string_view name, CoderContext* context) {
  KV_RETURN_IF_ERROR(NeedCalibration(name, *context));
  if (context->kvtc_pack == nullptr) {
    KV_ASSIGN_OR_RETURN(KvtcPack pack, LearnKvtcPack(*context->model, context->calibration));
    context->kvtc_pack = std::make_shared<const KvtcPack>(std::move(pack));
  }
  return MakeKvtcCoder(std::string(name), context->model, context->kvtc_pack, kWindow);
}

template <int kBits>
Made MakeAqua(std::string_view name, CoderContext* context) {
  KV_RETURN_IF_ERROR(NeedCalibration(name, *context));
  if (context->aqua_sample == nullptr) {
    KV_ASSIGN_OR_RETURN(AquaSample sample, SampleForAqua(*context->model, context->calibration));
    context->aqua_sample = std::make_shared<const AquaSample>(std::move(sample));
  }
  return MakeAquaCoder(std::string(name), context->model, *context->aqua_sample, kBits);
}

Made MakeKlt(std::string_view name, CoderContext* context) {
  if (context->klt_pack == nullptr) {
    return InvalidArgument(
        "codec {}: it needs the model's codec pack; make one with kvant calibrate and give it with "
        "--pack FILE",
        name);
  }
  return MakeKltStateCoder(context->model, context->klt_pack);
}

constexpr GgmlCacheType kQ8 = GgmlCacheType::kQ8_0;
constexpr GgmlCacheType kQ4 = GgmlCacheType::kQ4_0;
constexpr Entry kCoders[] = {
    {"klt", MakeKlt},
    {"q8_0", MakeGgml<kQ8, kQ8>},
    {"q8_0/q4_0", MakeGgml<kQ8, kQ4>},
    {"q4_0/q8_0", MakeGgml<kQ4, kQ8>},
    {"q4_0", MakeGgml<kQ4, kQ4>},
    {"kivi4", MakeKivi<4>},
    {"kivi2", MakeKivi<2>},
    {"think40", MakeThink<40>},
    {"think60", MakeThink<60>},
    {"sparse50", MakeSparse<50>},
    {"sparse70", MakeSparse<70>},
    {"kvtc", MakeKvtc<kKvtcWindow>},
    {"kvtc-all", MakeKvtc<0>},
    {"aqua4", MakeAqua<4>},
    {"aqua3", MakeAqua<3>},
    {"aqua2", MakeAqua<2>},
};

const Entry* Find(std::string_view name) {
  const auto found = std::find_if(std::begin(kCoders), std::end(kCoders),
                                  [&](const Entry& entry) { return entry.name == name; });
  return found == std::end(kCoders) ? nullptr : found;
}

size_t Width(const kernels::SegmentShape& shape) {
  return static_cast<size_t>(shape.kv_heads) * static_cast<size_t>(shape.head_dim);
}

}  // namespace

PrefixState::PrefixState(const ModelConfig& config, std::span<const int32_t> tokens,
                         int first_position)
    : ids_(tokens.begin(), tokens.end()),
      layers_(config.layers),
      first_position_(first_position),
      hidden_(static_cast<size_t>(config.hidden)),
      shape_(config.StateShape(static_cast<int>(tokens.size()))),
      key_width_(Width(shape_.keys)),
      value_width_(Width(shape_.values)),
      keys_(Offset(layers_, key_width_)),
      values_(Offset(layers_, value_width_)),
      query_squares_(static_cast<size_t>(layers_) * key_width_) {}

void PrefixState::KeepEntering(std::span<const int> layers) {
  for (const int layer : layers) entering_[layer].resize(ids_.size() * hidden_);
}

void PrefixState::SetEntering(int layer, size_t token, const float* x) {
  const auto kept = entering_.find(layer);
  if (kept == entering_.end()) return;
  KV_CHECK(token + kBlockTokens <= ids_.size());
  std::copy_n(x, kBlockTokens * hidden_, kept->second.data() + token * hidden_);
}

void PrefixState::SetBlock(int layer, size_t token, const float* keys, const float* values) {
  KV_CHECK(token + kBlockTokens <= ids_.size());
  std::copy_n(keys, kBlockTokens * key_width_, this->keys(layer) + token * key_width_);
  std::copy_n(values, kBlockTokens * value_width_, this->values(layer) + token * value_width_);
}

void PrefixState::ObserveQueries(int layer, const float* q, int rows, int q_heads) {
  KV_CHECK(!shape_.latent && rows >= kObservedQueries);
  const auto dim = static_cast<size_t>(shape_.keys.head_dim);
  const int group = q_heads / shape_.keys.kv_heads;
  const auto width = static_cast<size_t>(q_heads) * dim;
  float* into = query_squares_.data() + static_cast<size_t>(layer) * key_width_;
  std::fill_n(into, key_width_, 0.0F);
  for (int row = rows - kObservedQueries; row < rows; ++row) {
    for (int head = 0; head < q_heads; ++head) {
      const float* query = q + static_cast<size_t>(row) * width + static_cast<size_t>(head) * dim;
      float* sums = into + static_cast<size_t>(head / group) * dim;
      for (size_t i = 0; i < dim; ++i) sums[i] += query[i] * query[i];
    }
  }
  const auto count = static_cast<float>(kObservedQueries * group);
  for (size_t i = 0; i < key_width_; ++i) into[i] /= count;
}

std::vector<std::string_view> StateCoderNames() {
  std::vector<std::string_view> names;
  for (const Entry& entry : kCoders) names.push_back(entry.name);
  return names;
}

bool IsStateCoder(std::string_view name) { return Find(name) != nullptr; }

Result<std::unique_ptr<StateCoder>> MakeStateCoder(std::string_view name, CoderContext* context) {
  const Entry* entry = Find(name);
  KV_CHECK(entry != nullptr);
  return entry->make(name, context);
}

}  // namespace kvant::node
