// Hit ratios of eviction policies on a trace of requests: what the numbers in docs/performance.md
// come from. Runs the real BlockStore beside simple models of LRU, FIFO and Belady's optimum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "cache_service/eviction_queues.h"

namespace kvant {

// A request is the chain of its prompt's blocks, each named by a number; equal numbers are equal
// blocks, and a block is always preceded by the same one.
struct RequestTrace {
  std::vector<std::vector<uint32_t>> requests;
  uint32_t distinct_blocks = 0;  // names are 0 .. distinct_blocks - 1
  uint64_t total_blocks = 0;
};

// Reads JSON lines, gzipped or not, each with a field hash_ids. kInvalidArgument names file and
// line.
Result<RequestTrace> ReadTrace(const std::string& path);

// Blocks that were there when a request asked for them, counting only its longest stored prefix: a
// block behind a gap is of no use. All blocks of a request are stored after it.
// blocks: the most that are kept.

// The shard's own store with this policy.
uint64_t StoreHits(const RequestTrace& trace, uint32_t blocks, const EvictionPolicy& policy);
// Least recently used, the tail of a chain before its head (as vLLM frees them): the best that LRU
// can do on chains.
uint64_t LruHits(const RequestTrace& trace, uint32_t blocks);
// First in, first out, the tail of a chain first.
uint64_t FifoHits(const RequestTrace& trace, uint32_t blocks);
// Belady's optimum: what is used again furthest in the future goes first, or is not kept at all.
uint64_t OptimalHits(const RequestTrace& trace, uint32_t blocks);

}  // namespace kvant
