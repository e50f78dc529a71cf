#include "cache_service/eviction_queues.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/check.h"

namespace kvant {
namespace {

uint32_t GhostLimit(uint32_t max_blocks, const EvictionPolicy& policy) {
  return static_cast<uint32_t>(std::ceil(max_blocks * policy.ghost_share));
}
// Twice the room that is needed, so that a full bucket rarely loses a key that is young enough.
size_t GhostSlots(uint32_t limit, uint32_t ways) {
  return limit == 0 ? 0 : std::bit_ceil<size_t>(std::max<size_t>(2 * size_t{limit}, ways));
}

}  // namespace

EvictionQueues::EvictionQueues(uint32_t capacity, uint32_t max_blocks, const EvictionPolicy& policy)
    : policy_(policy),
      nodes_(capacity),
      ghosts_(GhostSlots(GhostLimit(max_blocks, policy), kGhostWays)),
      ghost_limit_(GhostLimit(max_blocks, policy)) {}

uint64_t EvictionQueues::BookkeepingBytes(uint32_t capacity, uint32_t max_blocks,
                                          const EvictionPolicy& policy) {
  return capacity * sizeof(Node) +
         GhostSlots(GhostLimit(max_blocks, policy), kGhostWays) * sizeof(Ghost);
}

void EvictionQueues::Insert(uint32_t id, uint64_t fingerprint) {
  Node& node = nodes_[id];
  KV_CHECK(node.line == Line::kNowhere);
  node = Node{};
  node.fingerprint = fingerprint;
  node.line = TakeGhost(fingerprint) ? Line::kMain : Line::kProbation;
  ++QueueOf(node.line).members;
  PushTail(id);
}

void EvictionQueues::Use(uint32_t id) {
  Node& node = nodes_[id];
  if (!node.parked) Unlink(id);
  --QueueOf(node.line).members;
  node.line = Line::kMain;
  ++main_.members;
  if (!node.parked) PushTail(id);
}

void EvictionQueues::Erase(uint32_t id) {
  if (!nodes_[id].parked) Unlink(id);
  Node& node = nodes_[id];
  --QueueOf(node.line).members;
  node.line = Line::kNowhere;
  node.parked = false;
}

void EvictionQueues::Unpark(uint32_t id) {
  Node& node = nodes_[id];
  if (node.line == Line::kNowhere || !node.parked) return;
  node.parked = false;
  PushHead(id);
}

EvictionQueues::Line EvictionQueues::NextLine() const {
  const bool probation = probation_.head != kNone;
  const bool main = main_.head != kNone;
  if (!probation && !main) return Line::kNowhere;
  if (!main) return Line::kProbation;
  if (!probation) return Line::kMain;
  const double all = static_cast<double>(probation_.members) + main_.members;
  return probation_.members >= policy_.probation_share * all ? Line::kProbation : Line::kMain;
}

uint32_t EvictionQueues::PopHead(Line line) {
  const uint32_t id = QueueOf(line).head;
  Unlink(id);
  return id;
}

void EvictionQueues::Leave(uint32_t id) {
  Node& node = nodes_[id];
  if (node.line == Line::kProbation) RememberGhost(node.fingerprint);
  --QueueOf(node.line).members;
  node.line = Line::kNowhere;
}

void EvictionQueues::PushTail(uint32_t id) {
  Queue& queue = QueueOf(nodes_[id].line);
  nodes_[id].previous = queue.tail;
  nodes_[id].next = kNone;
  (queue.tail == kNone ? queue.head : nodes_[queue.tail].next) = id;
  queue.tail = id;
}

void EvictionQueues::PushHead(uint32_t id) {
  Queue& queue = QueueOf(nodes_[id].line);
  nodes_[id].next = queue.head;
  nodes_[id].previous = kNone;
  (queue.head == kNone ? queue.tail : nodes_[queue.head].previous) = id;
  queue.head = id;
}

void EvictionQueues::Unlink(uint32_t id) {
  Node& node = nodes_[id];
  Queue& queue = QueueOf(node.line);
  (node.previous == kNone ? queue.head : nodes_[node.previous].next) = node.next;
  (node.next == kNone ? queue.tail : nodes_[node.next].previous) = node.previous;
  node.previous = node.next = kNone;
}

EvictionQueues::Ghost* EvictionQueues::GhostBucket(uint64_t fingerprint) {
  const size_t buckets = ghosts_.size() / kGhostWays;
  return &ghosts_[(fingerprint & (buckets - 1)) * kGhostWays];
}

void EvictionQueues::RememberGhost(uint64_t fingerprint) {
  if (ghosts_.empty()) return;
  Ghost* bucket = GhostBucket(fingerprint);
  // Ages are differences of a counter that wraps; 0 stays free to mean empty.
  if (++turn_ == 0) turn_ = 1;
  Ghost* oldest =
      std::max_element(bucket, bucket + kGhostWays, [&](const Ghost& a, const Ghost& b) {
        if ((a.turn == 0) != (b.turn == 0)) return b.turn == 0;
        return turn_ - a.turn < turn_ - b.turn;
      });
  *oldest = {static_cast<uint32_t>(fingerprint >> 32), turn_};
}

bool EvictionQueues::TakeGhost(uint64_t fingerprint) {
  if (ghosts_.empty()) return false;
  Ghost* bucket = GhostBucket(fingerprint);
  for (Ghost* ghost = bucket; ghost != bucket + kGhostWays; ++ghost) {
    if (ghost->turn == 0 || ghost->tag != static_cast<uint32_t>(fingerprint >> 32)) continue;
    const bool young = turn_ - ghost->turn < ghost_limit_;
    ghost->turn = 0;
    return young;
  }
  return false;
}

}  // namespace kvant
