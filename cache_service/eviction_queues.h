// Which block to give up next: the three queues of S3-FIFO (Yang et al., "FIFO queues are all you
// need for cache eviction", SOSP 2023) over the leaves of a prefix tree.
//
// New blocks go on probation, a use takes them to the main queue, and a key that was given up on
// probation lately (ghost) goes to the main queue at once: so a scan of blocks that are never used
// again passes by those that are. A use moves a block to the end of its queue. S3-FIFO saves that
// for the sake of threads; a shard has one, and on conversations recency is worth more
// (docs/performance.md).
//
// Only blocks that may be evicted need to stand in a queue: when the hand meets one that may not
// (it has children, or is pinned), the block is parked, and comes back to the head of the line when
// it may be evicted again. So each step of the hand is paid by an insert, a use or an unpark, and a
// victim costs constant time, amortised.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvant {

// Order in which blocks are given up. docs/performance.md has the hit ratios measured.
struct EvictionPolicy {
  // Share of the blocks that may be on probation; as long as there are more, victims come from
  // there.
  double probation_share = 0.65;
  // Keys given up on probation that are remembered, relative to the most blocks there may be.
  double ghost_share = 1.0;
};

// Single-owner. Ids are indices below `capacity`; allocates everything at construction.
class EvictionQueues {
 public:
  static constexpr uint32_t kNone = ~uint32_t{0};

  EvictionQueues(uint32_t capacity, uint32_t max_blocks, const EvictionPolicy& policy);

  // A new block. fingerprint: 64 bits of its key.
  void Insert(uint32_t id, uint64_t fingerprint);
  void Use(uint32_t id);
  // Forgets a block that went for another reason than age.
  void Erase(uint32_t id);
  // A parked block may be evicted again. Does nothing for one that stands in a queue.
  void Unpark(uint32_t id);
  // The block to give up, already taken out; kNone if none may be. evictable(id) says which may.
  template <typename Evictable>
  uint32_t TakeVictim(Evictable&& evictable) {
    while (true) {
      const Line line = NextLine();
      if (line == Line::kNowhere) return kNone;
      const uint32_t id = PopHead(line);
      if (evictable(id)) {
        Leave(id);
        return id;
      }
      nodes_[id].parked = true;
    }
  }

  static uint64_t BookkeepingBytes(uint32_t capacity, uint32_t max_blocks,
                                   const EvictionPolicy& policy);
  // Whether `id` was inserted and has not left.
  bool Contains(uint32_t id) const { return nodes_[id].line != Line::kNowhere; }

 private:
  enum class Line : uint8_t { kNowhere, kProbation, kMain };
  struct Node {
    uint64_t fingerprint = 0;
    uint32_t previous = kNone;
    uint32_t next = kNone;
    Line line = Line::kNowhere;
    bool parked = false;
  };
  struct Queue {
    uint32_t head = kNone;  // next victim
    uint32_t tail = kNone;
    uint32_t members = 0;  // parked ones too
  };
  // What was given up lately: buckets of a few, the oldest of which is overwritten.
  struct Ghost {
    uint32_t tag = 0;
    uint32_t turn = 0;  // 0: empty
  };
  static constexpr uint32_t kGhostWays = 4;

  Queue& QueueOf(Line line) { return line == Line::kMain ? main_ : probation_; }
  Line NextLine() const;
  uint32_t PopHead(Line line);
  void Leave(uint32_t id);
  void PushTail(uint32_t id);
  void PushHead(uint32_t id);
  void Unlink(uint32_t id);
  Ghost* GhostBucket(uint64_t fingerprint);
  void RememberGhost(uint64_t fingerprint);
  bool TakeGhost(uint64_t fingerprint);

  EvictionPolicy policy_;
  std::vector<Node> nodes_;
  std::vector<Ghost> ghosts_;
  uint32_t ghost_limit_ = 0;
  uint32_t turn_ = 0;
  Queue probation_;
  Queue main_;
};

}  // namespace kvant
