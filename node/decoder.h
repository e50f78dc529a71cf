// The forward pass. Prefill computes one block of up to 64 tokens and attends every earlier block
// as it is stored, so that a block's bytes are a function of its tokens and its class alone. Decode
// computes one token for each of several sequences; a row's result does not depend on the other
// rows.
//
// How a sequence of n prompt tokens is computed: whole blocks cover the tokens
// [0, floor((n - 1) / 64) * 64) and may come from anywhere; the 1 to 64 tokens behind them are
// computed by PrefillTail, whose logits choose the first new token, and stay raw in the sequence's
// OpenTile. So do the tokens that follow, until its owner encodes the full tile into a block.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "kernels/attention.h"
#include "kernels/thread_pool.h"
#include "node/activations.h"
#include "node/model.h"

namespace kvant::node {

// Tokens of a block, and rows of a prefill.
inline constexpr int kBlockTokens = 64;
// Rows that one DecodeStep may have.
inline constexpr int kMaxDecodeRows = Activations::kRows;

// The encoded blocks of one sequence's past, oldest first; kBlockTokens tokens each. Called only on
// the thread that called the Decoder, and of a layer with a window only for blocks that reach into
// it.
class PastBlocks {
 public:
  virtual ~PastBlocks() = default;
  // Tokens of all blocks together.
  virtual int tokens() const = 0;
  virtual int blocks() const = 0;
  // Gives one layer of one block. May wait for its bytes to arrive, within a deadline of its own.
  // The ranges stay valid until the Decoder's call returns. An error fails that row only.
  virtual Status Layer(int block, int layer, kernels::LayerTile* out) = 0;
};

// Raw fp32 state of the tokens since a sequence's last encoded block: keys and values, or rope keys
// and latents (ModelConfig::StateShape). Single-owner.
class OpenTile {
 public:
  explicit OpenTile(const ModelConfig& config);
  int tokens() const { return tokens_; }
  bool full() const { return tokens_ == kBlockTokens; }
  const float* keys(int layer) const;    // [tokens][keys.kv_heads][keys.head_dim], rope applied
  const float* values(int layer) const;  // [tokens][values.kv_heads][values.head_dim]
  void Clear() { tokens_ = 0; }

 private:
  friend class Decoder;
  float* Keys(int layer, int token);
  float* Values(int layer, int token);

  size_t key_width_;
  size_t value_width_;
  int tokens_ = 0;
  std::vector<float> keys_;    // [layers][kBlockTokens][key_width]
  std::vector<float> values_;  // [layers][kBlockTokens][value_width]
};

// Takes a layer's queries (rope applied), [tokens][q_heads][KeyDim], valid for the call.
using QuerySink = std::function<void(int layer, const float* queries)>;

// Takes what enters a layer, [tokens][hidden] of the residual stream, valid for the call.
using EnteringSink = std::function<void(int layer, const float* x)>;

// A block to compute. REQUIRES: past->tokens() == position and a multiple of kBlockTokens; tokens
// inside the vocabulary; position + tokens.size() <= max_positions.
struct PrefillBlock {
  std::span<const int32_t> tokens;  // 1..kBlockTokens
  int position = 0;                 // of the first token
  PastBlocks* past = nullptr;
  const QuerySink* queries = nullptr;      // nullptr: nobody looks at them
  const EnteringSink* entering = nullptr;  // likewise
  // Whose state is the last that is computed; no logits then. -1: the model's last.
  int last_layer = -1;
};

// Takes a layer's keys (rope applied) and values, or rope keys and latents, as they are computed:
// [tokens][kv_heads][head_dim] of ModelConfig::StateShape, valid for the call. Layers come in
// order. An error ends the prefill with it.
using LayerSink = std::function<Status(int layer, const float* keys, const float* values)>;

// One sequence's next token. REQUIRES: past->tokens() + open->tokens() == position <
// max_positions; open is not full; token inside the vocabulary; no two rows share an open tile.
struct DecodeRow {
  int32_t token = 0;
  int position = 0;
  PastBlocks* past = nullptr;
  OpenTile* open = nullptr;  // gets the token's keys and values if status is ok
  Status status;             // set by DecodeStep
};

// Single-owner; several may share one model. Owns the activations.
class Decoder {
 public:
  // Both are borrowed.
  Decoder(const Model* model, kernels::ThreadPool* pool);
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  // Errors are those of `past` and `sink`. logits: nullptr, or [tokens][vocab].
  Status Prefill(const PrefillBlock& block, const LayerSink& sink, float* logits);

  // Computes a prompt's tokens behind its last whole block: their keys and values go raw into
  // `open`, the last token's logits to logits[vocab]. On an error `open` is empty.
  // REQUIRES: open is empty.
  Status PrefillTail(const PrefillBlock& block, OpenTile* open, float* logits);

  // Computes all rows (1..kMaxDecodeRows). A row whose past fails gets that status, keeps its open
  // tile as it was and leaves its logits undefined; the other rows are not affected.
  // logits: [rows][vocab].
  void DecodeStep(std::span<DecodeRow> rows, float* logits);

 private:
  // Some blocks of one decode row's past, or its open tile.
  struct DecodePiece {
    int row = 0;
    size_t first_tile = 0;  // index into tiles_
    int tiles = 0;          // 0: the open tile
    int position = 0;       // of the first tile's first token
  };

  // Rows whose output of the last layer is left in the residual stream, one behind the other.
  enum class Outputs : uint8_t { kNone, kLastRow, kAllRows };
  Status ForwardBlock(const PrefillBlock& block, const LayerSink& sink, Outputs outputs);
  // Rows from `first_row` on attend tiles_, which begin at block `first_block`, and the block's own
  // tokens.
  void AttendBlock(const PrefillBlock& block, int layer, int first_block, int first_row);
  // Cuts one row's past and open tile into pieces_.
  Status CutPieces(int row, const DecodeRow& from, int layer);
  void AttendPieces(std::span<const DecodeRow> rows, int layer);
  // Appends one layer of a past's blocks from `first` on to tiles_.
  Status CollectTiles(PastBlocks* past, int layer, int first);

  const Model* model_;
  kernels::ThreadPool* pool_;
  Activations a_;
  std::vector<kernels::LayerTile> tiles_;  // of the layer under work
  std::vector<DecodePiece> pieces_;
};

}  // namespace kvant::node
