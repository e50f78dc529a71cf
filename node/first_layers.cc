#include "node/first_layers.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "node/block_past.h"

namespace kvant::node {

FirstLayers::FirstLayers(const BlockClass* block_class, int recomputed,
                         std::span<const int32_t> tokens)
    : block_class_(block_class),
      recomputed_(recomputed),
      tokens_(tokens.begin(), tokens.end()),
      layout_(block_class->codec(), block_class->model().config().StateShape(kBlockTokens),
              recomputed + 1) {
  KV_CHECK(recomputed > 0 && recomputed < block_class->model().config().layers);
}

FirstLayers::~FirstLayers() {
  for (const Waiting& waiting : waiting_) {
    if (waiting.block->failed.ok()) {
      waiting.block->failed = MakeStatus(StatusCode::kCancelled,
                                         "the sequence that computed its first layers has ended");
    }
  }
}

void FirstLayers::Want(size_t index, CachedBlockPtr block) {
  KV_CHECK((index + 1) * kBlockTokens <= tokens_.size());
  if (index < blocks_.size()) {
    Give(blocks_[index], block.get());
  } else {
    waiting_.push_back({index, std::move(block)});
  }
}

bool FirstLayers::pending() const {
  return std::any_of(waiting_.begin(), waiting_.end(),
                     [](const Waiting& waiting) { return waiting.block->failed.ok(); });
}

Status FirstLayers::Layer(int block, int layer, kernels::LayerTile* out) {
  const Cuts full = block_class_->attended().FullCuts();
  *out = FillTile(layout_, layer, full, blocks_[static_cast<size_t>(block)].payload);
  return OkStatus();
}

void FirstLayers::Give(const Computed& of, CachedBlock* block) const {
  const kernels::PayloadLayout& to = block_class_->layout(block->portion.scope);
  for (const kernels::PayloadRow& row : layout_.rows()) {
    if (!to.Holds(row.layer)) continue;
    std::memcpy(block->bytes.data() + to.Row(row.kind, row.cut, row.layer).offset,
                of.payload.data() + row.offset, row.length);
  }
  for (int layer = 0; layer <= recomputed_; ++layer) {
    if (to.Holds(layer)) block->MarkReady(layer);
  }
  block->entering = of.entering;
}

Result<bool> FirstLayers::Next(Decoder* decoder, const std::function<void()>& poll) {
  Computed made;
  made.payload.resize(layout_.total_bytes());
  const kernels::LayerShape& shape = layout_.shape();
  const LayerSink sink = [&](int layer, const float* keys, const float* values) {
    for (const kernels::SegmentKind kind : {kernels::SegmentKind::kKey, shape.value_kind()}) {
      layout_.codec().encode(kind, shape.Of(kind),
                             kind == kernels::SegmentKind::kKey ? keys : values,
                             layout_.MutableRanges(kind, layer, made.payload.data()), nullptr);
    }
    poll();
    return OkStatus();
  };
  const EnteringSink entering = [&](int layer, const float* x) {
    if (layer != recomputed_) return;
    const auto hidden = static_cast<ptrdiff_t>(block_class_->model().config().hidden);
    made.entering.assign(x, x + kBlockTokens * hidden);
  };
  PrefillBlock block;
  block.position = tokens();
  block.tokens = std::span(tokens_).subspan(static_cast<size_t>(block.position), kBlockTokens);
  block.past = this;
  block.entering = &entering;
  block.last_layer = recomputed_;
  KV_RETURN_IF_ERROR(decoder->Prefill(block, sink, nullptr));
  const size_t index = blocks_.size();
  blocks_.push_back(std::move(made));
  bool gave = false;
  for (const Waiting& waiting : waiting_) {
    if (waiting.index != index || !waiting.block->failed.ok()) continue;
    Give(blocks_[index], waiting.block.get());
    gave = true;
  }
  std::erase_if(waiting_, [&](const Waiting& waiting) { return waiting.index == index; });
  return gave;
}

}  // namespace kvant::node
