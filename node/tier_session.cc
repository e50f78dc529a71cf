#include "node/tier_session.h"

#include <utility>

#include "cluster/membership.h"
#include "transport/factory.h"

namespace kvant::node {
namespace {

constexpr Duration kConnectWait = std::chrono::seconds(2);

}  // namespace

Result<std::unique_ptr<TierSession>> TierSession::Open(const NodeOptions& options,
                                                       const std::string& cache, bool no_cache,
                                                       uint64_t memory_bytes) {
  if (!cache.empty() && no_cache) {
    return InvalidArgument("--cache and --no-cache exclude each other; leave one out");
  }
  std::unique_ptr<TierSession> session(new TierSession);
  NodeOptions node_options = options;
  if (no_cache) node_options.local_cache_bytes = 0;
  std::optional<ShardMap> map;
  if (!cache.empty()) {
    // Before the model is loaded, so that a typing error is told at once.
    KV_ASSIGN_OR_RETURN(map, StaticShardMap(cache));
  }
  KV_ASSIGN_OR_RETURN(session->node_, NodeRuntime::Create(node_options));
  if (map.has_value()) {
    KV_ASSIGN_OR_RETURN(session->remote_,
                        MakeTransport(TransportNameOf(cache), {.tcp_alone = options.no_shm}));
    KV_RETURN_IF_ERROR(
        session->node_->ConnectTier(session->remote_.get(), *std::move(map), kConnectWait));
  } else if (!no_cache) {
    KV_ASSIGN_OR_RETURN(session->embedded_, EmbeddedShard::Create(memory_bytes));
    EmbeddedShard* shard = session->embedded_.get();
    KV_RETURN_IF_ERROR(
        session->node_->ConnectTier(shard->node_side(), shard->map(), kConnectWait,
                                    [shard] { shard->host().Turn(SteadyClock().Now()); }));
  }
  session->node_->Start(nullptr);
  return session;
}

std::string_view TierSession::transport_name() const {
  if (remote_ != nullptr) return remote_->capabilities().name;
  return embedded_ != nullptr ? embedded_->node_side()->capabilities().name : "none";
}

LinkCounters TierSession::counters() const {
  if (remote_ != nullptr) return remote_->counters();
  return embedded_ != nullptr ? embedded_->node_side()->counters() : LinkCounters{};
}

}  // namespace kvant::node
