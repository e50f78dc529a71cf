// Shards and one node over the loopback transport, in one thread on a clock of their own.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "cache_service/pump.h"
#include "tests/block_maker.h"
#include "transport/loopback.h"

namespace kvant {

class LoopbackCluster {
 public:
  struct Shard {
    std::vector<std::byte> memory;
    std::unique_ptr<Transport> transport;
    std::unique_ptr<MemoryRegion> region;
    std::unique_ptr<ShardServer> server;
    std::unique_ptr<ServerPump> pump;
  };

  // Puts something between the node and its transport, e.g. faults.
  using Wrap = std::function<std::unique_ptr<Transport>(std::unique_ptr<Transport>)>;

  explicit LoopbackCluster(int shards, uint64_t memory_bytes = 1 << 20, const Wrap& wrap = {},
                           const ServerFaults& server_faults = {}) {
    std::vector<kvant::Shard> named;
    for (int i = 0; i < shards; ++i) named.push_back({"loopback:shard" + std::to_string(i)});
    for (const kvant::Shard& shard : named) Start(shard.address, memory_bytes, server_faults);
    node_transport_ = hub_.MakeTransport();
    if (wrap) node_transport_ = wrap(std::move(node_transport_));
    CacheConnectionOptions options;
    options.arena_bytes = 4 << 20;
    auto connection = CacheConnection::Create(
        node_transport_.get(), *ShardMap::Make(kStaticEpoch, named), &clock_, options);
    EXPECT_TRUE(connection.ok()) << connection.status().ToString();
    node_ = *std::move(connection);
    for (int i = 0; i < 20; ++i) Step();
  }

  CacheConnection& node() { return *node_; }
  CacheClient& client() { return node_->client(); }
  ShardServer& server(size_t shard = 0) { return *shards_[shard].server; }
  TimePoint now() const { return clock_.Now(); }
  std::vector<ClientEvent>& events() { return events_; }

  // One round of everybody, a tenth of a millisecond long.
  void Step() {
    StepShards();
    node_->Poll(&events_);
  }
  // One round of the shards alone.
  void StepShards() {
    clock_.Advance(std::chrono::microseconds(100));
    for (Shard& shard : shards_) {
      if (shard.pump) shard.pump->Turn(clock_.Now());
    }
  }
  // Steps until the operation's done event came; returns it. The operation's other events stay.
  ClientEvent Await(OpId op, int steps = 200000) {
    for (int i = 0; i < steps; ++i) {
      for (size_t at = 0; at < events_.size(); ++at) {
        const ClientEvent::Kind kind = events_[at].kind;
        if (events_[at].op != op || kind == ClientEvent::Kind::kLayerArrived ||
            kind == ClientEvent::Kind::kItemDone) {
          continue;
        }
        ClientEvent event = events_[at];
        events_.erase(events_.begin() + static_cast<ptrdiff_t>(at));
        return event;
      }
      Step();
    }
    ADD_FAILURE() << "operation " << op << " did not end";
    return {};
  }
  void Kill(size_t shard) {
    shards_[shard].pump.reset();
    shards_[shard].server.reset();
    shards_[shard].region.reset();
    shards_[shard].transport.reset();
  }

  TimePoint Soon(Duration duration = std::chrono::seconds(2)) const {
    return clock_.Now() + duration;
  }
  ClientEvent Put(const TestBlock& block, uint64_t run) {
    Result<std::shared_ptr<Lease>> buffer = node_->Lend(block.payload.size());
    EXPECT_TRUE(buffer.ok());
    std::copy(block.payload.begin(), block.payload.end(), (*buffer)->bytes().begin());
    PutRequest request;
    request.key = block.key;
    request.parent = block.parent;
    request.run = run;
    request.payload_bytes = block.payload.size();
    request.manifest_rows = block.manifest.rows.size();
    request.buffer = *buffer;
    request.deadline = Soon();
    const OpId op = client().BeginPut(request, now());
    client().SealPut(op, block.manifest, now());
    return Await(op);
  }

 private:
  void Start(const std::string& address, uint64_t memory_bytes, const ServerFaults& faults) {
    Shard shard;
    shard.memory.resize(memory_bytes);
    shard.transport = hub_.MakeTransport();
    EXPECT_TRUE(shard.transport->Listen(address).ok());
    auto region = shard.transport->Register(shard.memory);
    EXPECT_TRUE(region.ok());
    shard.region = *std::move(region);
    ShardServerOptions options;
    options.store.arena = shard.memory;
    options.store.max_blocks = 256;
    options.store.max_pins = 1024;
    options.store.max_user_pinned_bytes = memory_bytes / 4;
    options.faults = faults;
    shard.server = std::make_unique<ShardServer>(options);
    shard.pump = std::make_unique<ServerPump>(shard.transport.get(), shard.server.get());
    shards_.push_back(std::move(shard));
  }

  ManualClock clock_;
  LoopbackHub hub_;
  std::vector<Shard> shards_;
  std::unique_ptr<Transport> node_transport_;
  std::unique_ptr<CacheConnection> node_;
  std::vector<ClientEvent> events_;
};

}  // namespace kvant
