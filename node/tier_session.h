// A node and the cache it was told to use: kvantd shards, one in this process, or none.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/status.h"
#include "node/runtime.h"
#include "transport/transport.h"

namespace kvant::node {

// Single-owner.
class TierSession {
 public:
  // cache: addresses of kvantd, comma separated; empty: a shard of memory_bytes in this process, or
  // nothing at all if no_cache.
  static Result<std::unique_ptr<TierSession>> Open(const NodeOptions& options,
                                                   const std::string& cache, bool no_cache,
                                                   uint64_t memory_bytes);

  NodeRuntime& node() { return *node_; }
  // "tcp", "shm", "tcp and shm", "loopback", "none": the way that connections took.
  std::string_view transport_name() const;
  // Bytes between the node and its shards.
  LinkCounters counters() const;
  // nullptr unless the shard is in this process.
  const ShardHost* embedded() const { return embedded_ ? &embedded_->host() : nullptr; }

 private:
  TierSession() = default;
  // Declared first: they outlive the node, which borrows them.
  std::unique_ptr<EmbeddedShard> embedded_;
  std::unique_ptr<Transport> remote_;
  std::unique_ptr<NodeRuntime> node_;
};

}  // namespace kvant::node
