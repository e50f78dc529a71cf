#include "node/eval_past.h"

#include <utility>

#include "base/check.h"
#include "node/block_past.h"

namespace kvant::node {

void EncodedBlocks::Begin() {
  under_work_.payload.assign(block_class_->payload_bytes(), std::byte{0});
  under_work_.max_errors.assign(block_class_->layout().rows().size(), 0.0F);
}

void EncodedBlocks::EncodeLayer(int layer, const float* keys, const float* values) {
  block_class_->EncodeLayer(layer, keys, values, under_work_.payload.data(),
                            under_work_.max_errors.data());
}

void EncodedBlocks::Finish() { blocks_.push_back(std::exchange(under_work_, {})); }

void EncodedBlocks::AppendZeros() {
  Begin();
  Finish();
}

void EncodedBlocks::AppendState(const PrefixState& state) {
  KV_CHECK(state.tokens() % kBlockTokens == 0);
  for (int at = 0; at < state.tokens(); at += kBlockTokens) {
    const auto token = static_cast<size_t>(at);
    Begin();
    for (int layer = 0; layer < state.layers(); ++layer) {
      EncodeLayer(layer, state.keys(layer) + token * state.key_width(),
                  state.values(layer) + token * state.value_width());
    }
    Finish();
  }
}

uint64_t EncodedBlocks::ManifestBytes(std::span<const int32_t> tokens) const {
  KV_CHECK(tokens.size() == blocks_.size() * kBlockTokens);
  const std::vector<BlockKey> keys = block_class_->Keys(tokens, "tenant/");
  uint64_t bytes = 0;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    bytes += EncodeManifest(PlainManifest(block_class_->attended(), keys[i], blocks_[i].payload,
                                          blocks_[i].max_errors))
                 .size();
  }
  return bytes;
}

Status EvalPast::Layer(int block, int layer, kernels::LayerTile* out) {
  const bool of_prefix = block < prefix_.blocks();
  const EncodedBlocks& from = of_prefix ? prefix_ : *suffix_;
  const BlockClass& block_class = from.block_class();
  const Cuts cuts =
      of_prefix ? block_class.ReadCuts(static_cast<size_t>(block), read_) : block_class.FullCuts();
  *out = FillTile(block_class.layout(), layer, cuts,
                  from.payload(of_prefix ? block : block - prefix_.blocks()));
  return OkStatus();
}

Status PrefillBlocks(Decoder* decoder, std::span<const int32_t> tokens, EncodedBlocks* into,
                     std::span<EncodedBlocks* const> also, PrefixState* state) {
  KV_CHECK(tokens.size() % kBlockTokens == 0 && into->blocks() == 0);
  EvalPast past(into, into->block_class().FullCuts(), nullptr);
  const ModelConfig& config = into->block_class().model().config();
  std::vector<EncodedBlocks*> all(also.begin(), also.end());
  all.push_back(into);
  static_assert(kObservedQueries <= kBlockTokens, "they are all in the last block");
  const QuerySink observe = [&](int layer, const float* queries) {
    state->ObserveQueries(layer, queries, kBlockTokens, config.q_heads);
  };
  for (size_t at = 0; at < tokens.size(); at += kBlockTokens) {
    const EnteringSink enter = [&](int layer, const float* x) { state->SetEntering(layer, at, x); };
    for (EncodedBlocks* blocks : all) blocks->Begin();
    const bool last = at + kBlockTokens == tokens.size();
    const bool observed = state != nullptr && last && !config.latent.has_value();
    KV_RETURN_IF_ERROR(decoder->Prefill(
        {tokens.subspan(at, kBlockTokens), static_cast<int>(at), &past,
         observed ? &observe : nullptr,
         state != nullptr && state->keeps_entering() ? &enter : nullptr},
        [&](int layer, const float* keys, const float* values) {
          for (EncodedBlocks* blocks : all) blocks->EncodeLayer(layer, keys, values);
          if (state != nullptr) state->SetBlock(layer, at, keys, values);
          return OkStatus();
        },
        nullptr));
    for (EncodedBlocks* blocks : all) blocks->Finish();
  }
  return OkStatus();
}

Status PrefillCoded(Decoder* decoder, const ModelConfig& config, std::span<const int32_t> tokens,
                    const StateCoder& coder, std::span<EncodedBlocks> into) {
  KV_CHECK(coder.blockwise() && tokens.size() % kBlockTokens == 0);
  EvalPast past(&into[0], into[0].block_class().FullCuts(), nullptr);
  for (size_t at = 0; at < tokens.size(); at += kBlockTokens) {
    const auto ids = tokens.subspan(at, kBlockTokens);
    PrefixState state(config, ids, static_cast<int>(at));
    state.KeepEntering(coder.entering_layers());
    const EnteringSink enter = [&](int layer, const float* x) { state.SetEntering(layer, 0, x); };
    KV_RETURN_IF_ERROR(decoder->Prefill(
        {ids, static_cast<int>(at), &past, nullptr, &enter},
        [&](int layer, const float* keys, const float* values) {
          state.SetBlock(layer, 0, keys, values);
          return OkStatus();
        },
        nullptr));
    coder.Code(state, [&](size_t wire, const PrefixState& decoded, CodedSize) {
      into[wire].AppendState(decoded);
    });
  }
  return OkStatus();
}

}  // namespace kvant::node
