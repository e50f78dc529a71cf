#include "tests/support/watched_shard.h"

#include <gtest/gtest.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <utility>

namespace kvant::support {

std::vector<int32_t> WatchedTokens() {
  std::vector<int32_t> tokens(kWatchedBlocks * node::kBlockTokens + 9);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>('a' + i * i % 7);
  return tokens;
}

WatchedShard::WatchedShard() : memory_(4 << 20), transport_(hub_.MakeTransport()) {
  spdlog::set_level(spdlog::level::err);
  KV_CHECK(transport_->Listen("loopback:shard").ok());
  region_ = *transport_->Register(memory_);
  ShardServerOptions options;
  options.store.arena = memory_;
  server_ = std::make_unique<ShardServer>(options);
  pump_ = std::make_unique<ServerPump>(transport_.get(), server_.get());
}

WatchedShard::Node WatchedShard::Connect(const std::string& codec, uint64_t local_cache_bytes,
                                         const std::filesystem::path& model,
                                         const std::string& store) {
  node::NodeOptions options = NodeWorldOptions().node;
  options.model = model;
  options.codec = codec;
  options.store = store;
  options.local_cache_bytes = local_cache_bytes;
  // On a busy machine the link looks slow, and `auto` is to find it fast enough for everything.
  options.fetch_budget_ms = 1e6;
  return Connect(options);
}

WatchedShard::Node WatchedShard::Connect(const node::NodeOptions& options) {
  Node made;
  made.transport = hub_.MakeTransport();
  made.node = *node::NodeRuntime::Create(options);
  const Status status = made.node->ConnectTier(made.transport.get(), map(), std::chrono::seconds(2),
                                               [this] { Turn(); });
  KV_CHECK(status.ok());
  made.node->Start(nullptr);
  // Else a tiny model is computed too fast for anything to be fetched.
  for (int i = 0; i < 100; ++i) made.node->planner().SawPrefill(1, std::chrono::hours(1));
  return made;
}

std::byte* WatchedShard::Find(std::span<const std::byte> payload) {
  const auto found = std::search(memory_.begin(), memory_.end(), payload.begin(), payload.end());
  return found == memory_.end() ? nullptr : &*found;
}

node::SupplyNeed WatchedNeed(node::Wire wire, size_t blocks) {
  node::SupplyNeed need;
  need.tokens = WatchedTokens();
  need.blocks = blocks;
  need.domain = "tenant/";
  need.wire = wire;
  return need;
}

void Complete(node::BlockSupply* supply, node::TierLink* tier, const node::SupplyJobPtr& job) {
  const TimePoint deadline = SteadyClock().Now() + std::chrono::seconds(20);
  const auto all_complete = [&] {
    return std::all_of(job->blocks.begin(), job->blocks.end(),
                       [](const node::CachedBlockPtr& b) { return b != nullptr && b->complete(); });
  };
  while (!all_complete()) {
    if (SteadyClock().Now() >= deadline) {
      ADD_FAILURE() << "the blocks do not come";
      break;
    }
    if (tier != nullptr) tier->Poll();
    if (supply->Advance(job) == node::BlockSupply::Progress::kCompute) {
      EXPECT_TRUE(supply->ComputeNext(job).ok());
    }
  }
}

node::SupplyJobPtr Supply(node::NodeRuntime& node, node::Wire wire, size_t blocks) {
  const node::SupplyJobPtr job = node.supply().Start(WatchedNeed(wire, blocks));
  Complete(&node.supply(), node.tier(), job);
  node.Drain();
  return job;
}

}  // namespace kvant::support
