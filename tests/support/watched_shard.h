// A shard whose memory a test looks into, nodes that share it, and one prefix that they supply.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cache_service/pump.h"
#include "cache_service/shard_server.h"
#include "node/block_supply.h"
#include "node/runtime.h"
#include "tests/support/node_world.h"
#include "transport/loopback.h"

namespace kvant::support {

// Whole blocks of WatchedTokens.
inline constexpr size_t kWatchedBlocks = 5;
std::vector<int32_t> WatchedTokens();

// Single-owner.
class WatchedShard {
 public:
  WatchedShard();
  struct Node {
    std::unique_ptr<Transport> transport;
    std::unique_ptr<node::NodeRuntime> node;
  };
  Node Connect(const std::string& codec, uint64_t local_cache_bytes,
               const std::filesystem::path& model = TinyModel(),
               const std::string& store = "plain");
  Node Connect(const node::NodeOptions& options);
  std::unique_ptr<Transport> MakeTransport() { return hub_.MakeTransport(); }
  ShardMap map() const { return *ShardMap::Make(kStaticEpoch, {Shard{"loopback:shard"}}); }
  void Turn() { pump_->Turn(SteadyClock().Now()); }
  // Whole payloads as they lie in the shard's memory: where each begins.
  std::byte* Find(std::span<const std::byte> payload);
  const BlockStore& store() const { return server_->store(); }
  ServerStats stats() const { return server_->stats(); }

 private:
  LoopbackHub hub_;
  std::vector<std::byte> memory_;
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<MemoryRegion> region_;
  std::unique_ptr<ShardServer> server_;
  std::unique_ptr<ServerPump> pump_;
};

// The job for the first blocks of WatchedTokens.
node::SupplyNeed WatchedNeed(node::Wire wire, size_t blocks = kWatchedBlocks);
// Advances a job until all its blocks are complete.
void Complete(node::BlockSupply* supply, node::TierLink* tier, const node::SupplyJobPtr& job);
// Both, with what a node needs; waits for its puts.
node::SupplyJobPtr Supply(node::NodeRuntime& node, node::Wire wire, size_t blocks = kWatchedBlocks);

}  // namespace kvant::support
