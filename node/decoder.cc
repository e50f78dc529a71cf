#include "node/decoder.h"

#include <algorithm>

#include "base/check.h"

namespace kvant::node {
namespace {

using kernels::LayerTile;
using kernels::QueryBlock;

// Query rows that share one read of a tile: each has a softmax of its own, so any number will do.
constexpr int kFewestRowsPerPiece = 4;
constexpr int kMostRowsPerPiece = 16;
// Blocks whose partial softmax is one piece: fixed, so that neither the number of threads nor the
// batch decides how they are merged. 8 blocks are 512 tokens, enough work to be worth a piece.
constexpr int kBlocksPerPiece = 8;

}  // namespace

OpenTile::OpenTile(const ModelConfig& config) {
  const kernels::LayerShape state = config.StateShape(1);
  key_width_ = static_cast<size_t>(state.keys.kv_heads * state.keys.head_dim);
  value_width_ = static_cast<size_t>(state.values.kv_heads * state.values.head_dim);
  const size_t tokens = static_cast<size_t>(config.layers) * kBlockTokens;
  keys_.resize(tokens * key_width_);
  values_.resize(tokens * value_width_);
}

float* OpenTile::Keys(int layer, int token) {
  return keys_.data() + static_cast<size_t>(layer * kBlockTokens + token) * key_width_;
}
float* OpenTile::Values(int layer, int token) {
  return values_.data() + static_cast<size_t>(layer * kBlockTokens + token) * value_width_;
}
const float* OpenTile::keys(int layer) const {
  return keys_.data() + static_cast<size_t>(layer * kBlockTokens) * key_width_;
}
const float* OpenTile::values(int layer) const {
  return values_.data() + static_cast<size_t>(layer * kBlockTokens) * value_width_;
}

Decoder::Decoder(const Model* model, kernels::ThreadPool* pool)
    : model_(model), pool_(pool), a_(model, pool) {}

Status Decoder::CollectTiles(PastBlocks* past, int layer, int first) {
  for (int block = first; block < past->blocks(); ++block) {
    LayerTile& tile = tiles_.emplace_back();
    KV_RETURN_IF_ERROR(past->Layer(block, layer, &tile));
    KV_DCHECK(tile.shape == model_->config().StateShape(tile.shape.keys.tokens));
  }
  return OkStatus();
}

void Decoder::AttendBlock(const PrefillBlock& block, int layer, int first_block, int first_row) {
  const ModelConfig& config = model_->config();
  const int tokens = static_cast<int>(block.tokens.size());
  const int value_dim = a_.state().values.head_dim;
  const bool window = config.Window(layer) != 0;
  // Two pieces for each thread, as long as each row's tiles are loaded for some others too.
  const int all = tokens - first_row;
  const int rows = std::clamp((all + 2 * pool_->threads() - 1) / (2 * pool_->threads()),
                              kFewestRowsPerPiece, kMostRowsPerPiece);
  const int pieces = (all + rows - 1) / rows;
  pool_->ParallelFor(pieces, [&](int piece) {
    const int first = first_row + piece * rows;
    const int end = std::min(first + rows, tokens);
    const QueryBlock queries = a_.Queries(first, end - first, static_cast<size_t>(first));
    kernels::InitPartials(queries, value_dim);
    // What each row sees of tokens that begin at `position`.
    int seen_from[kMostRowsPerPiece];
    const auto see_from = [&](int position) {
      for (int row = first; row < end; ++row) {
        seen_from[row - first] = config.FirstVisible(layer, block.position + row) - position;
      }
      return window ? seen_from : nullptr;
    };
    for (size_t i = 0; i < tiles_.size(); ++i) {
      const int position = (first_block + static_cast<int>(i)) * kBlockTokens;
      kernels::AttendTile(queries, tiles_[i], {see_from(position), nullptr},
                          i + 1 < tiles_.size() ? &tiles_[i + 1] : nullptr);
    }
    int seen_to[kMostRowsPerPiece];  // causal: a token sees itself and what stands before it
    for (int row = first; row < end; ++row) seen_to[row - first] = row + 1;
    kernels::AttendRaw(queries, {a_.k.data(), a_.v.data(), config.StateShape(end)},
                       {see_from(block.position), seen_to});
    kernels::FinishPartials(queries, value_dim, a_.Row(a_.attended, first, a_.attended_width()));
  });
}

Status Decoder::ForwardBlock(const PrefillBlock& block, const LayerSink& sink, Outputs outputs) {
  const ModelConfig& config = model_->config();
  const int tokens = static_cast<int>(block.tokens.size());
  KV_CHECK(tokens >= 1 && tokens <= kBlockTokens);
  KV_CHECK(block.position % kBlockTokens == 0 && block.past->tokens() == block.position);
  KV_CHECK(block.position + tokens <= config.max_positions);
  int positions[kBlockTokens];
  for (int row = 0; row < tokens; ++row) {
    positions[row] = block.position + row;
    model_->Embed(block.tokens[static_cast<size_t>(row)], a_.Row(a_.x, row, config.hidden));
  }
  const int last = block.last_layer >= 0 ? block.last_layer : config.layers - 1;
  KV_CHECK(last + 1 == config.layers || (last < config.layers && outputs == Outputs::kNone));
  for (int layer = 0; layer <= last; ++layer) {
    if (block.entering != nullptr) (*block.entering)(layer, a_.x.data());
    a_.ProjectState(layer, std::span(positions, block.tokens.size()));
    KV_RETURN_IF_ERROR(sink(layer, a_.k.data(), a_.v.data()));
    if (block.queries != nullptr) (*block.queries)(layer, a_.q.data());
    // Nobody reads what the last layer would add to the stream, unless for logits.
    if (layer == last && outputs == Outputs::kNone) break;

    const int first_block = config.FirstVisible(layer, block.position) / kBlockTokens;
    tiles_.clear();
    KV_RETURN_IF_ERROR(CollectTiles(block.past, layer, first_block));
    const bool alone = layer == last && outputs == Outputs::kLastRow;
    AttendBlock(block, layer, first_block, alone ? tokens - 1 : 0);
    if (alone) {
      for (const auto& [numbers, width] :
           {std::pair(&a_.x, a_.hidden()), std::pair(&a_.attended, a_.attended_width())})
        std::copy_n(a_.Row(*numbers, tokens - 1, width), width, numbers->data());
    }
    a_.FinishAttention(layer, alone ? 1 : tokens);
    a_.Mlp(layer, alone ? 1 : tokens);
  }
  return OkStatus();
}

Status Decoder::Prefill(const PrefillBlock& block, const LayerSink& sink, float* logits) {
  KV_RETURN_IF_ERROR(
      ForwardBlock(block, sink, logits != nullptr ? Outputs::kAllRows : Outputs::kNone));
  if (logits != nullptr) a_.Logits(static_cast<int>(block.tokens.size()), logits);
  return OkStatus();
}

Status Decoder::PrefillTail(const PrefillBlock& block, OpenTile* open, float* logits) {
  KV_CHECK(open->tokens() == 0);
  const size_t tokens = block.tokens.size();
  const LayerSink sink = [&](int layer, const float* keys, const float* values) {
    std::copy_n(keys, tokens * open->key_width_, open->Keys(layer, 0));
    std::copy_n(values, tokens * open->value_width_, open->Values(layer, 0));
    return OkStatus();
  };
  KV_RETURN_IF_ERROR(ForwardBlock(block, sink, Outputs::kLastRow));
  open->tokens_ = static_cast<int>(tokens);
  a_.Logits(1, logits);
  return OkStatus();
}

Status Decoder::CutPieces(int row, const DecodeRow& from, int layer) {
  const size_t first_tile = tiles_.size();
  const int first_block = model_->config().FirstVisible(layer, from.position) / kBlockTokens;
  KV_RETURN_IF_ERROR(CollectTiles(from.past, layer, first_block));
  int position = first_block * kBlockTokens;
  for (size_t tile = first_tile; tile < tiles_.size(); tile += kBlocksPerPiece) {
    const auto count = static_cast<int>(std::min<size_t>(tiles_.size() - tile, kBlocksPerPiece));
    pieces_.push_back({row, tile, count, position});
    position += count * kBlockTokens;
  }
  pieces_.push_back({row, 0, 0, from.past->tokens()});
  return OkStatus();
}

void Decoder::AttendPieces(std::span<const DecodeRow> rows, int layer) {
  const ModelConfig& config = model_->config();
  const int value_dim = a_.state().values.head_dim;
  a_.ReservePartials(pieces_.size());
  pool_->ParallelFor(static_cast<int>(pieces_.size()), [&](int index) {
    const DecodePiece& piece = pieces_[static_cast<size_t>(index)];
    const DecodeRow& row = rows[static_cast<size_t>(piece.row)];
    const QueryBlock query = a_.Queries(piece.row, 1, static_cast<size_t>(index));
    kernels::InitPartials(query, value_dim);
    int seen_from = config.FirstVisible(layer, row.position) - piece.position;
    const kernels::LayerTile* tiles = tiles_.data() + piece.first_tile;
    for (int tile = 0; tile < piece.tiles; ++tile) {
      kernels::AttendTile(query, tiles[tile], {&seen_from, nullptr},
                          tile + 1 < piece.tiles ? &tiles[tile + 1] : nullptr);
      seen_from -= kBlockTokens;
    }
    if (piece.tiles > 0) return;
    const OpenTile& open = *row.open;
    kernels::AttendRaw(query,
                       {open.keys(layer), open.values(layer), config.StateShape(open.tokens() + 1)},
                       {&seen_from, nullptr});
  });
  for (size_t index = 0; index < pieces_.size(); ++index) {
    const int row = pieces_[index].row;
    const QueryBlock into = a_.Queries(row, 1, index);
    if (index > 0 && pieces_[index - 1].row == row) {
      kernels::MergePartials(a_.Queries(row, 1, index - 1), into, value_dim);
    }
    const bool last = index + 1 == pieces_.size() || pieces_[index + 1].row != row;
    if (last) {
      kernels::FinishPartials(into, value_dim, a_.Row(a_.attended, row, a_.attended_width()));
    }
  }
}

void Decoder::DecodeStep(std::span<DecodeRow> rows, float* logits) {
  const ModelConfig& config = model_->config();
  const int count = static_cast<int>(rows.size());
  KV_CHECK(count >= 1 && count <= kMaxDecodeRows);
  int positions[kMaxDecodeRows];
  for (int i = 0; i < count; ++i) {
    DecodeRow& row = rows[static_cast<size_t>(i)];
    KV_CHECK(!row.open->full() && row.position < config.max_positions);
    KV_CHECK(row.past->tokens() + row.open->tokens() == row.position);
    row.status = OkStatus();
    positions[i] = row.position;
    model_->Embed(row.token, a_.Row(a_.x, i, config.hidden));
  }
  for (int layer = 0; layer < config.layers; ++layer) {
    a_.ProjectState(layer, std::span(positions, static_cast<size_t>(count)));
    // Keys and values go to a slot behind the open tile's last token, which counts only at the end.
    tiles_.clear();
    pieces_.clear();
    for (int i = 0; i < count; ++i) {
      DecodeRow& row = rows[static_cast<size_t>(i)];
      // A failed row runs on without attention: the others' bits do not depend on it.
      std::fill_n(a_.Row(a_.attended, i, a_.attended_width()), a_.attended_width(), 0.0F);
      if (!row.status.ok()) continue;
      OpenTile& open = *row.open;
      std::copy_n(a_.Row(a_.k, i, a_.key_width()), a_.key_width(), open.Keys(layer, open.tokens()));
      std::copy_n(a_.Row(a_.v, i, a_.value_width()), a_.value_width(),
                  open.Values(layer, open.tokens()));
      row.status = CutPieces(i, row, layer);
    }
    AttendPieces(rows, layer);
    a_.FinishAttention(layer, count);
    a_.Mlp(layer, count);
  }
  a_.Logits(count, logits);
  for (DecodeRow& row : rows) {
    if (row.status.ok()) ++row.open->tokens_;
  }
}

}  // namespace kvant::node
