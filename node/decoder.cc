#include "node/decoder.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "kernels/vector.h"

namespace kvant::node {
namespace {

using kernels::LayerTile;
using kernels::QueryBlock;

// Pieces of attention are fixed, so that neither the number of threads nor the batch decides how
// partial softmaxes are merged. 16 query rows share one read of a tile; 8 blocks are 512 tokens,
// enough work to be worth a piece.
constexpr int kPrefillRowsPerPiece = 16;
constexpr int kBlocksPerPiece = 8;

// A product of prefill always has all rows, one of decode as many as there are sequences.
void PrefillProduct(const kernels::Weight& weight, const float* x, int /*rows*/, float* y,
                    kernels::ThreadPool* pool) {
  kernels::PrefillLinear(weight, x, y, pool);
}
void DecodeProduct(const kernels::Weight& weight, const float* x, int rows, float* y,
                   kernels::ThreadPool* pool) {
  kernels::DecodeLinear(weight, x, rows, y, pool);
}

// Some blocks of one decode row's past, or its open tile.
struct DecodePiece {
  int row = 0;
  size_t first_tile = 0;
  int tiles = 0;  // 0: the open tile
};

}  // namespace

OpenTile::OpenTile(const ModelConfig& config)
    : kv_width_(config.kv_width()),
      data_(static_cast<size_t>(config.layers) * 2 * kBlockTokens *
            static_cast<size_t>(config.kv_width())) {}

size_t OpenTile::Offset(int layer, bool value, int token) const {
  const int segment = layer * 2 + (value ? 1 : 0);
  return static_cast<size_t>(segment * kBlockTokens + token) * static_cast<size_t>(kv_width_);
}
const float* OpenTile::keys(int layer) const { return data_.data() + Offset(layer, false, 0); }
const float* OpenTile::values(int layer) const { return data_.data() + Offset(layer, true, 0); }

// The buffers of a forward pass and what prefill and decode do alike. Rows are a prefill's tokens
// or a decode step's sequences.
struct Decoder::Activations {
  static constexpr int kRows = std::max(kBlockTokens, kMaxDecodeRows);
  using Product = void (*)(const kernels::Weight&, const float* x, int rows, float* y,
                           kernels::ThreadPool*);

  Activations(const Model* for_model, kernels::ThreadPool* with_pool)
      : model(*for_model),
        config(for_model->config()),
        pool(with_pool),
        x(Rows(config.hidden)),
        normed(Rows(config.hidden)),
        projected(Rows(config.hidden)),
        q(Rows(config.q_width())),
        k(Rows(config.kv_width())),
        v(Rows(config.kv_width())),
        attended(Rows(config.q_width())),
        gate(Rows(config.intermediate)),
        up(Rows(config.intermediate)) {
    ReservePartials(kRows);
  }

  static size_t Rows(int width) { return static_cast<size_t>(kRows) * static_cast<size_t>(width); }
  float* Row(std::vector<float>& buffer, int row, int width) {
    return buffer.data() + static_cast<size_t>(row) * static_cast<size_t>(width);
  }

  // Room for the partial softmaxes of `count` query rows.
  void ReservePartials(size_t count) {
    const auto heads = static_cast<size_t>(config.q_heads);
    const auto width = static_cast<size_t>(config.q_width());
    if (max.size() >= count * heads) return;
    max.resize(count * heads);
    sum.resize(count * heads);
    weighted.resize(count * width);
  }

  // `rows` queries from q row `first_row` on, whose partials are kept from `first_partial` on.
  QueryBlock Queries(int first_row, int rows, size_t first_partial) {
    const auto heads = static_cast<size_t>(config.q_heads);
    QueryBlock block;
    block.rows = rows;
    block.q_heads = config.q_heads;
    block.q = Row(q, first_row, config.q_width());
    block.scale = 1.0F / std::sqrt(static_cast<float>(config.head_dim));
    block.max = max.data() + first_partial * heads;
    block.sum = sum.data() + first_partial * heads;
    block.weighted = weighted.data() + first_partial * static_cast<size_t>(config.q_width());
    return block;
  }

  // x -> q, k, v with rotary positions. position_of(row) is asked for the first `rows` rows.
  template <typename PositionOf>
  void ProjectQkv(const LayerWeights& layer, Product product, int rows,
                  const PositionOf& position_of) {
    kernels::RmsNorm(x.data(), layer.attention_norm, rows, config.hidden, config.rms_norm_eps,
                     normed.data());
    product(layer.query, normed.data(), rows, q.data(), pool);  // [rows][q_heads][head_dim]
    product(layer.key, normed.data(), rows, k.data(), pool);    // [rows][kv_heads][head_dim]
    product(layer.value, normed.data(), rows, v.data(), pool);  // [rows][kv_heads][head_dim]
    for (int row = 0; row < rows; ++row) {
      model.rope().Apply(Row(q, row, config.q_width()), config.q_heads, position_of(row));
      model.rope().Apply(Row(k, row, config.kv_width()), config.kv_heads, position_of(row));
    }
  }

  // x += output(attended); x += mlp(x).
  void FinishLayer(const LayerWeights& layer, Product product, int rows) {
    const size_t residual = static_cast<size_t>(rows) * static_cast<size_t>(config.hidden);
    product(layer.output, attended.data(), rows, projected.data(), pool);  // [rows][hidden]
    kernels::AddInPlace(x.data(), projected.data(), residual);

    kernels::RmsNorm(x.data(), layer.mlp_norm, rows, config.hidden, config.rms_norm_eps,
                     normed.data());
    product(layer.gate, normed.data(), rows, gate.data(), pool);  // [rows][intermediate]
    product(layer.up, normed.data(), rows, up.data(), pool);      // [rows][intermediate]
    kernels::SiluMultiply(gate.data(), up.data(),
                          static_cast<size_t>(rows) * static_cast<size_t>(config.intermediate));
    product(layer.down, gate.data(), rows, projected.data(), pool);  // [rows][hidden]
    kernels::AddInPlace(x.data(), projected.data(), residual);
  }

  // logits[rows][vocab] = output(norm(x)).
  void Logits(Product product, int rows, float* logits) {
    kernels::RmsNorm(x.data(), model.final_norm(), rows, config.hidden, config.rms_norm_eps,
                     normed.data());
    product(model.output(), normed.data(), rows, logits, pool);
  }

  // Appends one layer of all of a past's blocks to `tiles`.
  Status CollectTiles(PastBlocks* past, int layer) {
    for (int block = 0; block < past->blocks(); ++block) {
      LayerTile& tile = tiles.emplace_back();
      KV_RETURN_IF_ERROR(past->Layer(block, layer, &tile));
      KV_DCHECK(tile.shape.kv_heads == config.kv_heads && tile.shape.head_dim == config.head_dim);
    }
    return OkStatus();
  }

  const Model& model;
  const ModelConfig& config;
  kernels::ThreadPool* pool;
  std::vector<float> x;          // [kRows][hidden], the residual stream
  std::vector<float> normed;     // [kRows][hidden]
  std::vector<float> projected;  // [kRows][hidden]
  std::vector<float> q;          // [kRows][q_heads][head_dim]
  std::vector<float> k;          // [kRows][kv_heads][head_dim]
  std::vector<float> v;          // [kRows][kv_heads][head_dim]
  std::vector<float> attended;   // [kRows][q_heads][head_dim]
  std::vector<float> gate;       // [kRows][intermediate]
  std::vector<float> up;         // [kRows][intermediate]
  // Partial softmaxes; as many query rows as a step needs.
  std::vector<float> max;        // [partials][q_heads]
  std::vector<float> sum;        // [partials][q_heads]
  std::vector<float> weighted;   // [partials][q_heads][head_dim]
  std::vector<LayerTile> tiles;  // of the layer under work
  std::vector<DecodePiece> pieces;
  std::vector<float> padded_logits;  // [kBlockTokens][vocab], once prefill was asked for logits
};

Decoder::Decoder(const Model* model, kernels::ThreadPool* pool)
    : model_(model), pool_(pool), activations_(std::make_unique<Activations>(model, pool)) {}
Decoder::~Decoder() = default;

Status Decoder::ForwardBlock(const PrefillBlock& block, const LayerSink& sink, bool to_the_end) {
  Activations& a = *activations_;
  const ModelConfig& config = a.config;
  const int tokens = static_cast<int>(block.tokens.size());
  KV_CHECK(tokens >= 1 && tokens <= kBlockTokens);
  KV_CHECK(block.position % kBlockTokens == 0 && block.past->tokens() == block.position);
  KV_CHECK(block.position + tokens <= config.max_positions);
  static_assert(kBlockTokens == kernels::kPrefillRows, "a block is one product of prefill");
  int visible[kBlockTokens];  // causal: a token sees itself and what stands before it
  for (int row = 0; row < kBlockTokens; ++row) visible[row] = row + 1;

  // The rows of padding are computed like any other and looked at by nobody.
  std::fill(a.x.begin(), a.x.end(), 0.0F);
  std::fill(a.attended.begin(), a.attended.end(), 0.0F);
  for (int row = 0; row < tokens; ++row) {
    model_->Embed(block.tokens[static_cast<size_t>(row)], a.Row(a.x, row, config.hidden));
  }
  for (int layer = 0; layer < config.layers; ++layer) {
    const LayerWeights& weights = model_->layer(layer);
    a.ProjectQkv(weights, PrefillProduct, kBlockTokens,
                 [&](int row) { return block.position + std::min(row, tokens - 1); });
    KV_RETURN_IF_ERROR(sink(layer, a.k.data(), a.v.data()));
    // Nobody reads what the last layer would add to the stream, unless for logits.
    if (layer + 1 == config.layers && !to_the_end) break;

    a.tiles.clear();
    KV_RETURN_IF_ERROR(a.CollectTiles(block.past, layer));
    const int pieces = (tokens + kPrefillRowsPerPiece - 1) / kPrefillRowsPerPiece;
    pool_->ParallelFor(pieces, [&](int piece) {
      const int first = piece * kPrefillRowsPerPiece;
      const int end = std::min(first + kPrefillRowsPerPiece, tokens);
      const QueryBlock queries = a.Queries(first, end - first, static_cast<size_t>(first));
      kernels::InitPartials(queries, config.head_dim);
      for (const LayerTile& tile : a.tiles) kernels::AttendTile(queries, tile);
      kernels::AttendRaw(queries, a.k.data(), a.v.data(), end, config.kv_heads, config.head_dim,
                         visible + first);
      kernels::FinishPartials(queries, config.head_dim, a.Row(a.attended, first, config.q_width()));
    });
    a.FinishLayer(weights, PrefillProduct, kBlockTokens);
  }
  return OkStatus();
}

Status Decoder::Prefill(const PrefillBlock& block, const LayerSink& sink, float* logits) {
  KV_RETURN_IF_ERROR(ForwardBlock(block, sink, logits != nullptr));
  if (logits == nullptr) return OkStatus();
  Activations& a = *activations_;
  const auto vocab = static_cast<size_t>(a.config.vocab);
  a.padded_logits.resize(kBlockTokens * vocab);
  a.Logits(PrefillProduct, kBlockTokens, a.padded_logits.data());
  std::copy_n(a.padded_logits.data(), block.tokens.size() * vocab, logits);
  return OkStatus();
}

Status Decoder::PrefillTail(const PrefillBlock& block, OpenTile* open, float* logits) {
  KV_CHECK(open->tokens() == 0);
  Activations& a = *activations_;
  const size_t tokens = block.tokens.size();
  const size_t values = tokens * static_cast<size_t>(a.config.kv_width());
  const LayerSink sink = [&](int layer, const float* keys, const float* vals) {
    std::copy_n(keys, values, open->data_.data() + open->Offset(layer, false, 0));
    std::copy_n(vals, values, open->data_.data() + open->Offset(layer, true, 0));
    return OkStatus();
  };
  KV_RETURN_IF_ERROR(ForwardBlock(block, sink, true));
  open->tokens_ = static_cast<int>(tokens);
  // Only one row is looked at, so it is computed alone.
  std::copy_n(a.Row(a.x, static_cast<int>(tokens) - 1, a.config.hidden), a.config.hidden,
              a.x.data());
  a.Logits(DecodeProduct, 1, logits);
  return OkStatus();
}

void Decoder::DecodeStep(std::span<DecodeRow> rows, float* logits) {
  Activations& a = *activations_;
  const ModelConfig& config = a.config;
  const int count = static_cast<int>(rows.size());
  KV_CHECK(count >= 1 && count <= kMaxDecodeRows);
  for (int i = 0; i < count; ++i) {
    DecodeRow& row = rows[static_cast<size_t>(i)];
    KV_CHECK(!row.open->full() && row.position < config.max_positions);
    KV_CHECK(row.past->tokens() + row.open->tokens() == row.position);
    row.status = OkStatus();
    model_->Embed(row.token, a.Row(a.x, i, config.hidden));
  }
  for (int layer = 0; layer < config.layers; ++layer) {
    const LayerWeights& weights = model_->layer(layer);
    a.ProjectQkv(weights, DecodeProduct, count,
                 [&](int row) { return rows[static_cast<size_t>(row)].position; });

    // Keys and values go to a slot behind the open tile's last token, which counts only at the end.
    a.tiles.clear();
    a.pieces.clear();
    for (int i = 0; i < count; ++i) {
      DecodeRow& row = rows[static_cast<size_t>(i)];
      // A failed row runs on without attention: the others' bits do not depend on it.
      std::fill_n(a.Row(a.attended, i, config.q_width()), config.q_width(), 0.0F);
      if (!row.status.ok()) continue;
      std::copy_n(a.Row(a.k, i, config.kv_width()), config.kv_width(),
                  row.open->data_.data() + row.open->Offset(layer, false, row.open->tokens()));
      std::copy_n(a.Row(a.v, i, config.kv_width()), config.kv_width(),
                  row.open->data_.data() + row.open->Offset(layer, true, row.open->tokens()));
      const size_t first_tile = a.tiles.size();
      row.status = a.CollectTiles(row.past, layer);
      if (!row.status.ok()) continue;
      for (size_t tile = first_tile; tile < a.tiles.size(); tile += kBlocksPerPiece) {
        const size_t left = a.tiles.size() - tile;
        a.pieces.push_back({i, tile, static_cast<int>(std::min<size_t>(left, kBlocksPerPiece))});
      }
      a.pieces.push_back({i, 0, 0});
    }

    a.ReservePartials(a.pieces.size());
    pool_->ParallelFor(static_cast<int>(a.pieces.size()), [&](int index) {
      const DecodePiece& piece = a.pieces[static_cast<size_t>(index)];
      const QueryBlock query = a.Queries(piece.row, 1, static_cast<size_t>(index));
      kernels::InitPartials(query, config.head_dim);
      for (int tile = 0; tile < piece.tiles; ++tile) {
        kernels::AttendTile(query, a.tiles[piece.first_tile + static_cast<size_t>(tile)]);
      }
      if (piece.tiles > 0) return;
      const OpenTile& open = *rows[static_cast<size_t>(piece.row)].open;
      kernels::AttendRaw(query, open.keys(layer), open.values(layer), open.tokens() + 1,
                         config.kv_heads, config.head_dim, nullptr);
    });
    for (size_t index = 0; index < a.pieces.size(); ++index) {
      const int row = a.pieces[index].row;
      const QueryBlock into = a.Queries(row, 1, index);
      if (index > 0 && a.pieces[index - 1].row == row) {
        kernels::MergePartials(a.Queries(row, 1, index - 1), into, config.head_dim);
      }
      const bool last = index + 1 == a.pieces.size() || a.pieces[index + 1].row != row;
      if (last) {
        kernels::FinishPartials(into, config.head_dim, a.Row(a.attended, row, config.q_width()));
      }
    }
    a.FinishLayer(weights, DecodeProduct, count);
  }
  a.Logits(DecodeProduct, count, logits);
  for (DecodeRow& row : rows) {
    if (row.status.ok()) ++row.open->tokens_;
  }
}

}  // namespace kvant::node
