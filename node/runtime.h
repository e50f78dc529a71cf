// Everything that a process needs to answer requests: model, blocks, cache link, decoder.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "cache_service/pump.h"
#include "cache_service/shard_host.h"
#include "cluster/shard_map.h"
#include "node/block_class.h"
#include "node/block_supply.h"
#include "node/decoder.h"
#include "node/local_cache.h"
#include "node/model.h"
#include "node/planner.h"
#include "node/scheduler.h"
#include "node/tier_link.h"
#include "transport/loopback.h"
#include "transport/transport.h"

namespace kvant::node {

// What the flags of `kvant run` and `kvant generate` have in common.
struct NodeOptions {
  std::string model;
  std::string weights = "exact";  // WeightFormName
  std::string codec = "tile8";
  std::string store = "plain";   // StoredForm
  std::string pack;              // of --store klt; empty: the one beside the model
  std::string cuts;              // of the pack's, that a block of --store klt holds; empty: fine
  std::vector<int> recompute;    // layers, of the pack's, that its blocks also have cuts for
  std::string also;              // plain or lossless: its blocks hold that besides; or empty
  std::string wire;              // empty: auto with max_kl, else full
  std::optional<double> max_kl;  // nats a token that reading may cost; only with auto
  std::vector<std::string> domains;  // "DOMAIN=tenant,tenant"
  std::string secret_file;           // cluster secret; empty: none
  int threads = 0;                   // 0: one for each core this process may use
  uint64_t local_cache_bytes = uint64_t{256} << 20;
  uint64_t tier_arena_bytes = uint64_t{64} << 20;
  bool no_shm = false;  // shards of this host over tcp as well
  double tier_timeout_s = 5.0;
  double fetch_budget_ms = 50.0;  // of one fetch, for --wire auto
  int max_batch = 8;
};

// What --cuts stands for; empty of blocks that have none.
std::string_view CutsOf(const NodeOptions& options);
// What NodeOptions::wire stands for.
std::string_view WireOf(const NodeOptions& options);

// A shard in this very process: what a node uses when it is given no other cache. Single-owner.
class EmbeddedShard {
 public:
  static Result<std::unique_ptr<EmbeddedShard>> Create(uint64_t memory_bytes);
  Transport* node_side() { return node_side_.get(); }
  const ShardMap& map() const { return *map_; }
  ShardHost& host() { return *host_; }

 private:
  EmbeddedShard() = default;
  LoopbackHub hub_;
  std::unique_ptr<Transport> server_side_;
  std::unique_ptr<Transport> node_side_;
  std::unique_ptr<ShardHost> host_;
  std::optional<ShardMap> map_;
};

// Single-owner.
class NodeRuntime {
 public:
  // Loads the model and prepares everything that needs no network. Errors teach: flags, model.
  static Result<std::unique_ptr<NodeRuntime>> Create(const NodeOptions& options);
  ~NodeRuntime();

  // Starts to connect to the shards; at most `wait` is waited for those that answer, a warning
  // names those that do not. `beside` is called in every round of progress (an embedded shard).
  Status ConnectTier(Transport* transport, ShardMap map, Duration wait,
                     std::function<void()> beside = {});
  // Ends set-up. peer: nullptr, or the prefill nodes.
  void Start(PrefillPeer* peer);
  // Waits for puts under way, within the tier's timeout.
  void Drain();

  const Model& model() const { return *model_; }
  const BlockClass& block_class() const { return *block_class_; }
  const Domains& domains() const { return domains_; }
  Wire wire() const { return wire_; }
  int threads() const { return pool_->threads(); }
  const Clock& clock() const { return SteadyClock(); }
  TierLink* tier() { return tier_.get(); }
  BlockSupply& supply() { return *supply_; }
  Decoder& decoder() { return *decoder_; }
  Planner& planner() { return *planner_; }
  LocalCache& cache() { return *cache_; }
  SchedulerOptions MakeSchedulerOptions() const;

 private:
  NodeRuntime() = default;

  NodeOptions options_;
  Wire wire_ = Wire::kFull;
  Domains domains_;
  std::unique_ptr<kernels::ThreadPool> pool_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<BlockClass> block_class_;
  std::unique_ptr<LocalCache> cache_;
  std::unique_ptr<Planner> planner_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<TierLink> tier_;
  std::unique_ptr<BlockSupply> supply_;
};

}  // namespace kvant::node
