// A shard process in the simulation: the production server and pump over the simulated transport,
// and the checkers that look into its store.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "cache_service/pump.h"
#include "cache_service/shard_server.h"
#include "tests/simulator/sim_transport.h"
#include "tests/simulator/world.h"

namespace kvant::sim {

// Single-owner.
class SimShard {
 public:
  // index: of the shard in the map. node: its name on the network.
  SimShard(World* world, size_t index, size_t node);

  void Start();
  void Crash();
  bool alive() const { return server_ != nullptr; }
  // 1, 2, ... : which life the shard is in.
  uint64_t life() const { return life_; }
  size_t node() const { return node_; }
  // The process does not run until then.
  void Stall(TimePoint until) { stalled_until_ = until; }

  // A block that this shard promised `client_node` to keep until then, unless their connection
  // ends or loses its order (then its Disorder differs), or the block goes bad.
  enum class Why : uint8_t { kLease, kPin };
  void Promise(const BlockKey& key, size_t client_node, uint64_t disorder, TimePoint until,
               Why why);
  // Takes back what was promised: a lease of one client, a pin for all.
  void ForgetLease(const BlockKey& key, size_t client_node);
  void ForgetPin(const BlockKey& key);
  // Changes one stored byte. False: nothing is stored.
  bool Rot(uint64_t random);
  // REQUIRES: alive().
  BlockStore& store() { return server_->store(); }
  ServerStats stats() const { return server_->stats(); }
  bool IsRotten(const BlockKey& key) const { return rotten_.contains(key); }
  // Compares everything stored with what it must be.
  void CheckAll();
  // After everybody left and all leases are over: nothing is held any more.
  void CheckEmpty();

 private:
  struct Kept {
    BlockKey key;
    size_t client_node;
    uint64_t disorder;
    TimePoint until;
    Why why;
  };

  void Wake();
  void Run();
  void TickLater();
  void Check();
  void CheckBlock(const BlockView& view);

  World* world_;
  size_t index_;
  size_t node_;
  uint64_t life_ = 0;
  std::vector<std::byte> arena_;
  std::unique_ptr<SimTransport> transport_;
  std::unique_ptr<MemoryRegion> region_;
  std::unique_ptr<ShardServer> server_;
  std::unique_ptr<ServerPump> pump_;
  bool awake_ = false;
  TimePoint stalled_until_{};
  uint64_t rounds_ = 0;
  uint64_t sealed_seen_ = 0;
  std::unordered_map<BlockKey, const std::byte*> checked_;
  std::unordered_set<BlockKey> rotten_;       // as they stand in the store
  std::unordered_set<BlockKey> rotten_ever_;  // nothing is promised about these
  std::vector<Kept> kept_;
};

}  // namespace kvant::sim
