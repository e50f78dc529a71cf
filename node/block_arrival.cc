#include "node/block_arrival.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace kvant::node {

BlockArrival::BlockArrival(const BlockClass* block_class, CachedBlockPtr block,
                           std::span<const int32_t> tokens, int position)
    : block_class_(block_class),
      block_(std::move(block)),
      tokens_(tokens.begin(), tokens.end()),
      position_(position) {}

Status BlockArrival::Accept(const std::shared_ptr<const BlockManifest>& manifest) {
  if (reader_ != nullptr) return OkStatus();
  KV_RETURN_IF_ERROR(block_class_->CheckManifest(block_->key, *manifest));
  KV_ASSIGN_OR_RETURN(form_, block_class_->FormOf(*manifest));
  // What was copied was verified against the manifest that it came with.
  if (block_->manifest != nullptr && *block_->manifest != *manifest) {
    return Unavailable(
        "the tier's copy is not the one of which a part was here: it was evicted and put again by "
        "a node with other kernels, or in another form");
  }
  block_->manifest = manifest;
  const std::vector<Selection> missing =
      block_class_->Missing(block_->copied ? &*block_->copied : nullptr, block_->portion);
  const auto is_missing = [&](size_t i) {
    const ManifestRow& row = manifest->rows[i];
    return std::any_of(missing.begin(), missing.end(), [&](const Selection& selection) {
      return selection.Takes(row.part, row.cut, row.layer);
    });
  };
  if (form_->whole_at_any_cut()) {
    if (block_->stored.manifest() == nullptr) {
      block_->stored = StoredRows(
          manifest, [&](size_t i) { return form_->InPortion(manifest->rows[i], block_->portion); });
    }
  } else if (!form_->plain()) {
    arrived_ = StoredRows(manifest, is_missing);
  }
  BlockToRead read;
  read.manifest = manifest;
  read.tokens = tokens_;
  read.position = position_;
  read.portion = block_->portion;
  read.payload = block_->bytes;
  read.stored = form_->whole_at_any_cut() ? &block_->stored : &arrived_;
  if (block_->needs_entering) read.entering = &block_->entering;
  reader_ = form_->MakeReader(read);

  std::vector<bool> here(form_->global_layers().size(), false);
  for (const bool waits : {false, true}) {
    for (size_t i = 0; i < manifest->rows.size(); ++i) {
      const ManifestRow& row = manifest->rows[i];
      if (!form_->InPortion(row, block_->portion)) continue;
      if (is_missing(i) == waits) here[row.layer] = !waits;
    }
  }
  for (size_t layer = 0; layer < here.size(); ++layer) {
    if (here[layer]) whole_.push_back(static_cast<uint16_t>(layer));
  }
  return OkStatus();
}

std::span<std::byte> BlockArrival::Place(size_t row) {
  if (form_->whole_at_any_cut()) return block_->stored.Row(row);
  if (!form_->plain()) return arrived_.Row(row);
  const ManifestRow& at = block_->manifest->rows[row];
  const uint64_t offset = block_class_->layout(block_->portion.scope)
                              .Row(static_cast<kernels::SegmentKind>(at.kind), at.cut, at.layer)
                              .offset;
  return std::span(block_->bytes).subspan(offset, at.length);
}

Status BlockArrival::TakeLayer(uint16_t layer, std::span<const SelectedRow> rows,
                               const std::byte* packed, uint64_t* bytes) {
  *bytes = 0;
  for (const SelectedRow& selected : rows) {
    const ManifestRow& row = block_->manifest->rows[selected.row];
    if (row.layer != layer) continue;
    const std::span<std::byte> to = Place(selected.row);
    std::memcpy(to.data(), packed + selected.packed_offset, row.length);
    KV_RETURN_IF_ERROR(VerifyRange(*block_->manifest, selected.row, to));
    *bytes += row.length;
  }
  whole_.push_back(layer);
  return OkStatus();
}

void BlockArrival::MarkReady(std::span<const int> ready) {
  for (const int layer : ready) block_->MarkReady(layer);
}

Status BlockArrival::DecodeWhole() {
  std::vector<int> ready;
  for (const uint16_t layer : TakeWhole()) KV_RETURN_IF_ERROR(Decode(layer, &ready));
  MarkReady(ready);
  return OkStatus();
}

CachedBlockPtr ReadLess(const BlockClass& block_class, const CachedBlock& held,
                        const Portion& wanted, std::span<const int32_t> tokens, int position) {
  auto block = std::make_shared<CachedBlock>(block_class, held, wanted);
  // Every layer slides, and nothing of them was attended, so that nobody fetched a manifest.
  if (held.manifest == nullptr) return block->complete() ? block : nullptr;
  BlockArrival arrival(&block_class, block, tokens, position);
  const bool read = arrival.Accept(held.manifest).ok() && arrival.DecodeWhole().ok();
  return read && block->complete() ? block : nullptr;
}

}  // namespace kvant::node
