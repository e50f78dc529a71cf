// Decodes what arrived of blocks on the threads of a pool, so that the thread which polls the
// network goes on polling it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "kernels/thread_pool.h"
#include "node/block_arrival.h"

namespace kvant::node {

// Layers of one block are decoded one after the other, in the order of Begin; blocks beside each
// other. Other threads touch nothing but what BlockArrival::Decode does: what they made becomes
// ready only when the owner takes it. Single-owner; borrows the pool and the clock.
class BlockDecoding {
 public:
  // What became of one layer.
  struct Outcome {
    uint64_t operation = 0;  // as Begin was told
    size_t index = 0;
    Status status;           // of Decode; kCancelled: it was abandoned before it began
    std::vector<int> ready;  // where ok
    Duration took{};
  };

  BlockDecoding(kernels::ThreadPool* pool, const Clock* clock);
  // Waits for what has begun; the rest never begins.
  ~BlockDecoding();
  BlockDecoding(const BlockDecoding&) = delete;
  BlockDecoding& operator=(const BlockDecoding&) = delete;

  // Has a whole layer decoded. `arrival` stays where it is, and what it reads and writes alive,
  // until the layer's outcome was taken or this is gone. operation, index: said with the outcomes;
  // an arrival always has the same.
  void Begin(uint64_t operation, size_t index, BlockArrival* arrival, uint16_t layer);
  // What did not begin of an arrival ends without being decoded. It has outcomes all the same.
  void Abandon(const BlockArrival* arrival);
  // Appends the outcomes there are, and forgets them. True if there were any.
  bool Take(std::vector<Outcome>* outcomes);
  // Decodes a layer on the calling thread, or sleeps until there is an outcome. False: nothing is
  // to be decoded, or nothing came within `at_most`.
  bool HelpOrWait(Duration at_most);
  // Layers whose outcomes were not taken.
  size_t open() const { return open_; }

 private:
  struct Shared;
  struct Strand;
  static void DoNext(const std::shared_ptr<Shared>& shared, const std::shared_ptr<Strand>& strand);

  std::shared_ptr<Shared> shared_;
  std::unordered_map<const BlockArrival*, std::shared_ptr<Strand>> strands_;
  size_t open_ = 0;
};

}  // namespace kvant::node
