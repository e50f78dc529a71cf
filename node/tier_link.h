// A node's link to the cache tier: looks chains up, fetches blocks into the node's own memory layer
// by layer, publishes blocks as they are computed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "cache_service/pump.h"
#include "node/block_class.h"
#include "node/block_decoding.h"
#include "node/link_meter.h"
#include "node/local_cache.h"
#include "node/planner.h"

namespace kvant::node {

struct TierStats {
  uint64_t fetched_blocks = 0;
  uint64_t fetched_bytes = 0;  // payload as it is stored, verified
  uint64_t failed_blocks = 0;  // unreachable, gone meanwhile, too late
  uint64_t unread_blocks = 0;  // stored in a form that this node does not read
  uint64_t data_loss = 0;      // bytes that did not match their checksum, or were not well-formed
  uint64_t put_blocks = 0;
  uint64_t put_already_there = 0;
  uint64_t put_failed = 0;
  Status put_failure;  // the last one
};

struct TierLinkOptions {
  std::string name = "node";                   // said to the shards, for their logs
  Duration timeout = std::chrono::seconds(5);  // of one lookup, fetch or put
  uint64_t arena_bytes = uint64_t{64} << 20;   // for blocks on their way; two blocks at least
  // Decodes what takes long; borrowed. nullptr, or of one thread: the thread that polls does.
  kernels::ThreadPool* pool = nullptr;
};

// A block to be fetched, new, and its place in its sequence.
struct BlockFetch {
  CachedBlockPtr block;
  uint64_t run = 0;
  CutEnds ends{};                     // what a lookup said of it, or 0
  std::span<const int32_t> tokens{};  // its own; borrowed for the call
  int position = 0;                   // of the first
};

// Single-owner. Callbacks run inside Poll and must not call back into the link's Poll.
// A fetched layer is ready when a Poll saw that it is whole, verified and decoded.
class TierLink {
 public:
  using LookupDone = std::function<void(const std::vector<LookupBlock>& blocks)>;
  using FetchDone = std::function<void()>;  // every block is complete or failed
  using PutDone = std::function<void(const Status& status)>;
  using PutId = OpId;

  // Starts to connect to all shards of `map`; does not wait. Borrows the pointers.
  static Result<std::unique_ptr<TierLink>> Create(Transport* transport, ShardMap map,
                                                  const BlockClass* block_class, const Clock* clock,
                                                  Planner* planner, const TierLinkOptions& options);
  ~TierLink();

  // Called in every Poll, for whatever must make progress together with this link (a shard in the
  // same process). Optional.
  void SetBeside(std::function<void()> beside) { beside_ = std::move(beside); }
  // One round of progress. True if anything happened.
  bool Poll();
  // Decodes what nobody has begun to, or sleeps until something may have happened.
  void Wait(Duration at_most);

  // REQUIRES: chain starts at a chain's block whose index is a multiple of kRunBlocks.
  void Lookup(std::span<const BlockKey> chain, LookupDone done);
  // A lookup found some blocks whose rows can't be those of this node's form.
  void SawUnread(size_t blocks);
  // Fills blocks: moves what of their portions was not copied into them, and nothing else. False:
  // no buffer free now, try again after a Poll. REQUIRES: each block lacks something.
  bool Fetch(std::span<const BlockFetch> blocks, FetchDone done);
  // Of fetched blocks that awaited what enters their layers, some have it now (FirstLayers).
  void EnteringKnown() { entering_known_ = true; }
  // Whether one Fetch should take so many blocks that lack so many bytes together.
  bool FetchTakes(size_t blocks, uint64_t bytes) const;
  // Stored bytes that a block was made without, at most. 0: it lacks nothing.
  uint64_t MissingBytes(const BlockFetch& fetch) const;

  // Starts to publish a block of so many stored bytes. 0: no buffer free now.
  PutId BeginPut(const BlockKey& key, const BlockKey& parent, uint64_t run, uint64_t stored_bytes);
  // The rows of this layer stand in `payload` (a whole block's, stored plain). Layers come in
  // order.
  void PutLayer(PutId put, int layer, std::span<const std::byte> payload);
  // All that is stored, at once.
  void PutAll(PutId put, std::span<const std::byte> stored);
  // REQUIRES: PutAll was called, or PutLayer for every layer; `put` was neither sealed nor
  // cancelled before.
  void SealPut(PutId put, const BlockManifest& manifest, PutDone done);
  void CancelPut(PutId put);

  // No operation is under way.
  bool idle() const { return operations_.empty(); }
  bool Reachable(size_t shard) const { return connection_->client().Reachable(shard); }
  const ShardMap& map() const { return connection_->map(); }
  const TierStats& stats() const { return stats_; }
  // Of one lookup, fetch or put, from its beginning.
  Duration timeout() const { return timeout_; }

 private:
  TierLink();
  struct Operation;
  void OnEvent(const ClientEvent& event);
  void OnLayer(OpId op, Operation* operation, const ClientEvent& event);
  // Has all that is whole of an arrival decoded, here or by others.
  void Decode(OpId op, Operation* operation, size_t index);
  void OnDecoded(const BlockDecoding::Outcome& outcome);
  void SawDecoding(Operation* operation, const BlockArrival& arrival, size_t layers, Duration took);
  // Has no more decoded of blocks that nobody has any more, or that are late.
  void GiveUpDecoding();
  // Has decoded what awaited what this node computes, and ends fetches that waited for nothing
  // else.
  void Resume();
  // Whether all of a fetch is here and decoded, as far as it will be.
  static bool IsOver(const Operation& operation);
  // A fetch whose bytes or decoding may have ended just now.
  void EndOrHold(OpId op);
  void FinishFetch(OpId op);
  // What came of a block can't be used; if it is corrupt, its shard is told.
  void Refuse(Operation* operation, size_t index, const Status& status);
  void FailBlock(const BlockArrival& arrival, const Status& status);
  // Once for each tag and basis that blocks could not be read for.
  void WarnUnread(const BlockManifest& manifest, const Status& status);

  std::unique_ptr<CacheConnection> connection_;
  Transport* transport_ = nullptr;
  const BlockClass* block_class_ = nullptr;
  const Clock* clock_ = nullptr;
  Planner* planner_ = nullptr;
  std::optional<LinkMeter> meter_;
  uint64_t arena_bytes_ = 0;
  Duration timeout_{};
  TierStats stats_;
  std::function<void()> beside_;
  std::unordered_map<OpId, std::unique_ptr<Operation>> operations_;
  std::vector<ClientEvent> events_;
  std::vector<BlockDecoding::Outcome> decoded_;
  std::vector<std::pair<uint32_t, std::optional<Digest>>> warned_of_;
  bool warned_of_rows_ = false;
  double decoders_ = 1;  // threads that decode beside each other
  bool entering_known_ = false;
  size_t held_ = 0;  // fetches that have ended, but for what awaits what enters it
  // Goes first: others decode for the operations.
  std::unique_ptr<BlockDecoding> decoding_;
};

}  // namespace kvant::node
