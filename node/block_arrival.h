// One block on its way out of the tier into a node's memory: what of it has come is verified,
// decoded where it is stored in another form than it is attended in, and made ready.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/status.h"
#include "cache_service/manifest.h"
#include "node/block_class.h"
#include "node/local_cache.h"
#include "node/stored_form.h"

namespace kvant::node {

// Single-owner, but for Decode; borrows the class. Not used any more after an error.
class BlockArrival {
 public:
  // tokens: the block's, copied; position: of the first. REQUIRES: the block is not complete, or
  // empty.
  BlockArrival(const BlockClass* block_class, CachedBlockPtr block, std::span<const int32_t> tokens,
               int position);

  // What the tier says that the block is; later calls do nothing. Layers of which nothing is
  // missing are whole then.
  // kDataLoss: it is no block of this class. kUnsupported: it is in a form that is not read here.
  // kUnavailable: what the block was begun with is of another writing.
  Status Accept(const std::shared_ptr<const BlockManifest>& manifest);
  // All rows of a selection that are of one manifest layer have arrived, at `packed` plus their
  // packed_offset. Copies them to where they will be read and verifies them there, so that nothing
  // can change in between: the layer is whole. Returns their bytes in `bytes`.
  // kDataLoss: a checksum differs.
  // REQUIRES: Accept was ok; `rows` is SelectRows of one selection of what is missing.
  Status TakeLayer(uint16_t layer, std::span<const SelectedRow> rows, const std::byte* packed,
                   uint64_t* bytes);

  // Manifest layers that became whole since this was asked last. They are to be decoded in this
  // order, one at a time. None as long as the block awaits what enters them.
  std::vector<uint16_t> TakeWhole() {
    if (block_->awaits_entering()) return {};
    return std::exchange(whole_, {});
  }
  bool has_whole() const { return !whole_.empty(); }
  // Whether decoding takes so long that a thread which has else to do should leave it to others.
  // REQUIRES: Accept was ok.
  bool decodes_long() const { return form_->whole_at_any_cut(); }
  // Decodes a whole layer, on any thread. Returns in `ready` what may be attended then.
  // kDataLoss: it is not well-formed.
  Status Decode(uint16_t layer, std::vector<int>* ready) { return reader_->Arrived(layer, ready); }
  void MarkReady(std::span<const int> ready);
  // All that is whole, here and now.
  Status DecodeWhole();

  const CachedBlockPtr& block() const { return block_; }

 private:
  // Where a row stands once it was verified.
  std::span<std::byte> Place(size_t row);

  const BlockClass* block_class_;
  CachedBlockPtr block_;
  std::vector<int32_t> tokens_;
  int position_;
  const StoredForm* form_ = nullptr;
  StoredRows arrived_;  // of a form that is not plain and whole with all cuts alone
  std::unique_ptr<StoredReader> reader_;
  std::vector<uint16_t> whole_;
};

// The block that those attend who want `wanted` of one that holds more, in a form where that is not
// the same (BlockClass::Serves). nullptr: its stored rows are not well-formed.
// REQUIRES: held is complete and covers it; the form is whole at any cut.
CachedBlockPtr ReadLess(const BlockClass& block_class, const CachedBlock& held,
                        const Portion& wanted, std::span<const int32_t> tokens, int position);

}  // namespace kvant::node
