// Gets a sequence's whole blocks from wherever they come soonest: the node's own memory, the tier,
// a prefill node, or computing them here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "node/block_class.h"
#include "node/block_past.h"
#include "node/decoder.h"
#include "node/first_layers.h"
#include "node/local_cache.h"
#include "node/planner.h"
#include "node/tier_link.h"

namespace kvant::node {

// Somebody who computes blocks and puts them into the tier: the prefill nodes.
class PrefillPeer {
 public:
  virtual ~PrefillPeer() = default;
  // ok: the block is in the tier. Else it will not be, and why.
  using BlockDone = std::function<void(size_t block, const Status& status)>;
  // Asks for the blocks `missing` (ascending) of `tokens`. `done` is called once for each of them,
  // within a deadline of the peer's own. An empty `done`: nobody waits.
  virtual void Ask(std::span<const int32_t> tokens, std::span<const BlockKey> keys,
                   const std::string& tenant, std::span<const size_t> missing, BlockDone done) = 0;
};

// What a job wants.
struct SupplyNeed {
  std::vector<int32_t> tokens;  // its first blocks * kBlockTokens are covered by blocks
  size_t blocks = 0;
  std::string tenant;  // said to a prefill peer, which has the same table of domains
  std::string domain;
  Wire wire = Wire::kFull;  // what will be read of blocks that are only read
  // Blocks that must be in the tier in the end, ascending: those found here are published as well.
  std::vector<size_t> publish;
  PrefillPeer::BlockDone published;  // once for each block of `publish`
};

// One sequence's blocks on their way. Made and advanced by BlockSupply, read by its owner.
struct SupplyJob {
  enum class Place : uint8_t {
    kUnknown,
    kHere,     // blocks[i] is set, complete or arriving
    kTier,     // to be fetched; blocks[i] is set if a part of it is here
    kPeer,     // a prefill node computes it
    kCompute,  // to be computed here
  };
  SupplyNeed need;
  std::vector<BlockKey> keys;          // [blocks]
  std::vector<CachedBlockPtr> blocks;  // [blocks]
  std::vector<Place> place;            // [blocks]
  // [blocks] fetches left of a block that a peer announced: somebody else may still be writing it.
  std::vector<uint8_t> patience;
  TimePoint fetch_again_at{};  // not before then
  Cuts read_cuts;
  size_t full_before = 0;    // blocks before this one are needed at the full cut, to compute others
  std::vector<Scope> scope;  // [blocks] layers that are attended, by the tail or to compute others
  bool took_local = false;
  bool looking_up = false;
  bool planned = false;
  size_t fetches = 0;  // under way
  Plan plan;
  TimePoint plan_started{};
  bool plan_open = false;
  size_t local_hits = 0;  // blocks
  size_t tier_found = 0;  // blocks that the tier had when it was asked
  size_t tier_hits = 0;   // those of them that were to be fetched
  size_t recomputed = 0;  // blocks that were to be had elsewhere, but failed
  std::vector<LookupBlock> found;
  // Of fetched blocks whose first layers are recomputed; nullptr: there are none.
  std::unique_ptr<FirstLayers> first_layers;

  // What of a block is needed where `read` is enough for who only reads.
  Portion NeedOf(size_t block, const BlockClass& block_class, const Cuts& read) const {
    return {block < full_before ? block_class.FullCuts() : block_class.ReadCuts(block, read),
            scope[block]};
  }
};
using SupplyJobPtr = std::shared_ptr<SupplyJob>;

struct SupplyStats {
  uint64_t local_hit_blocks = 0;
  uint64_t tier_hit_blocks = 0;
  uint64_t computed_blocks = 0;
  uint64_t first_layers_blocks = 0;  // of which only the first layers were computed
  uint64_t asked_blocks = 0;         // of prefill peers
  // Of sliding layers: stored bytes of fetched blocks that were left in the tier, since no token
  // would attend them, and what of them was fetched later, for a shorter prefix.
  uint64_t sliding_bytes_skipped = 0;
  uint64_t sliding_bytes_fetched_later = 0;
};

// Single-owner; borrows everything.
class BlockSupply {
 public:
  // tier, peer: nullptr where there is none.
  BlockSupply(const BlockClass* block_class, LocalCache* cache, TierLink* tier, PrefillPeer* peer,
              Planner* planner, Decoder* decoder, const Clock* clock)
      : block_class_(block_class),
        cache_(cache),
        tier_(tier),
        peer_(peer),
        planner_(planner),
        decoder_(decoder),
        clock_(clock) {}

  SupplyJobPtr Start(SupplyNeed need);

  enum class Progress : uint8_t {
    kWaiting,  // for the network or a peer
    kCompute,  // ComputeNext would help
    kReady,    // every block is here, or arriving
  };
  // Does all that needs no computing. Call it again after a failure: what failed is recomputed.
  Progress Advance(const SupplyJobPtr& job);
  // Computes one block, or the first layers of one. REQUIRES: Advance said kCompute just now.
  Status ComputeNext(const SupplyJobPtr& job);

  const SupplyStats& stats() const { return stats_; }
  // Somebody computed tokens behind whole blocks in so long, without what it waited for those.
  void SawPrefill(int position, size_t tokens, Duration took) {
    planner_->SawPrefill(block_class_->PrefillWork(position, static_cast<int>(tokens)), took);
  }

 private:
  void TakeLocal(SupplyJob* job);
  void LookUp(const SupplyJobPtr& job);
  void PlanSources(const SupplyJobPtr& job);
  void AskPeer(const SupplyJobPtr& job, std::span<const size_t> missing);
  void DropFailed(SupplyJob* job);
  // Computes what was still to be fetched from a shard that missed its deadline: each further fetch
  // might miss it too, one behind the other.
  void GiveUpShard(SupplyJob* job, size_t shard);
  Portion NeedOf(const SupplyJob& job, size_t block) const;
  // Finds anew who attends which block, and so what is needed of it. Needs only grow.
  void FindNeeds(SupplyJob* job) const;
  // Finds needs, and has fetched what a block that is here falls short of them.
  void RaiseNeeds(SupplyJob* job);
  // The block to be built upon; nullptr if nothing of it is in memory.
  CachedBlockPtr HeldOf(const SupplyJob& job, size_t block) const;
  // Whether a block in memory is attended by this job as it is. `auto` takes what is here, rather
  // than decode it anew.
  bool Serves(const SupplyJob& job, const Portion& held, const Portion& need) const;
  // What of a block in memory is attended by who needs `need`: the block itself, or less of it
  // (ReadLess). nullptr: it does not hold that, or not yet.
  CachedBlockPtr Serving(const SupplyJob& job, size_t block, const CachedBlockPtr& held,
                         const Portion& need) const;
  // Stored bytes that take a block from a portion (nullptr: nothing) to `need`: by its manifest if
  // `known` came from the tier, else forecast by what a lookup said.
  uint64_t StoredBytes(const BlockManifest* known, const CutEnds& ends, const Portion* held,
                       const Portion& need) const;
  CutEnds EndsOf(const SupplyJob& job, size_t block) const;
  // Adds what taking a block from what is here of it (nullptr: nothing) to `need` would take.
  void AddWork(const SupplyJob& job, size_t block, const CachedBlock* held, const Portion& need,
               FetchWork* work) const;
  // What a fetch of these blocks would take, were `read` enough for who only reads; with it that of
  // blocks which are here and fall short of that.
  FetchWork WorkOf(const SupplyJob& job, std::span<const size_t> blocks, const Cuts& read) const;
  // What computing these blocks would have to fetch of others first.
  FetchWork AlsoFetch(const SupplyJob& job, std::span<const size_t> computed) const;
  // What `auto` reads where these blocks are to come from the tier.
  void ChooseRead(SupplyJob* job, std::span<const size_t> blocks) const;
  void StartFetches(const SupplyJobPtr& job);
  // Starts one fetch. False: no buffer is free now.
  bool StartFetch(const SupplyJobPtr& job, std::span<const size_t> indices,
                  const std::vector<BlockFetch>& blocks);
  void CountSliding(const CachedBlock& block, const CutEnds& ends);
  bool TakeIfHere(SupplyJob* job, size_t block);
  void PublishFromMemory(const SupplyJobPtr& job, size_t block);
  void Seal(const SupplyJobPtr& job, size_t block, TierLink::PutId put,
            const BlockManifest& manifest);
  void ClosePlan(SupplyJob* job);
  TierLink::PutId BeginPut(const SupplyJob& job, size_t block, uint64_t stored_bytes);
  // Puts a block of which all is there.
  void PutWhole(const SupplyJobPtr& job, size_t block, const BlockManifest& manifest,
                std::span<const std::byte> stored);
  // Has a fetched block's first layers computed, if its way is for readers who do that.
  void WantFirstLayers(SupplyJob* job, size_t block);
  Status ComputeFirstLayers(SupplyJob* job);
  static BlockToStore ToStore(const SupplyJob& job, size_t block);

  const BlockClass* block_class_;
  LocalCache* cache_;
  TierLink* tier_;
  PrefillPeer* peer_;
  Planner* planner_;
  Decoder* decoder_;
  const Clock* clock_;
  SupplyStats stats_;
  Duration computing_ = Duration::max();  // of the last block
  CutEnds last_ends_{};                   // of the last block whose ends were known; or 0
};

}  // namespace kvant::node
