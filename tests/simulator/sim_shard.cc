#include "tests/simulator/sim_shard.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace kvant::sim {
namespace {

constexpr Duration kTick = std::chrono::milliseconds(20);
constexpr int kMostTurns = 10'000;  // of one round; more never come to rest

}  // namespace

SimShard::SimShard(World* world, size_t index, size_t node)
    : world_(world), index_(index), node_(node) {}

void SimShard::Start() {
  ++life_;
  const Plan& plan = world_->plan;
  world_->journal.Note(world_->now(), "shard {} starts, life {}", index_, life_);
  arena_.assign(plan.shard_arena_bytes, std::byte{0xDB});
  transport_ = std::make_unique<SimTransport>(&world_->network, node_, [this] { Wake(); });
  region_ = *transport_->Register(arena_);
  ShardServerOptions options;
  options.store.arena = arena_;
  options.store.max_blocks = plan.shard_max_blocks;
  options.store.max_pins = plan.shard_max_pins;
  options.store.max_user_pinned_bytes = plan.user_pin_bytes;
  options.store.hash_seed = life_;
  options.limits.max_transfers_per_client = plan.network.max_outstanding;
  options.faults = plan.server_faults;
  server_ = std::make_unique<ShardServer>(options);
  pump_ = std::make_unique<ServerPump>(transport_.get(), server_.get());
  KV_CHECK(transport_->Listen(world_->map.shards()[index_].address).ok());
  TickLater();
}

void SimShard::Crash() {
  world_->journal.Note(world_->now(), "shard {} crashes", index_);
  world_->network.Kill(transport_.get());
  pump_.reset();
  server_.reset();
  region_.reset();
  transport_.reset();
  awake_ = false;
  sealed_seen_ = 0;
  checked_.clear();
  rotten_.clear();
  rotten_ever_.clear();
  kept_.clear();
}

void SimShard::Wake() {
  if (awake_) return;
  awake_ = true;
  // Several events may gather before the process gets to run.
  const TimePoint when = std::max(world_->now() + std::chrono::microseconds(5), stalled_until_);
  world_->network.At(when, [this, life = life_] {
    if (life != life_ || !alive()) return;
    if (world_->now() < stalled_until_) {
      awake_ = false;
      return Wake();
    }
    awake_ = false;
    Run();
  });
}

void SimShard::TickLater() {
  world_->network.After(kTick, [this, life = life_] {
    if (life != life_ || !alive()) return;
    Wake();
    TickLater();
  });
}

void SimShard::Run() {
  int turns = 0;
  while (pump_->Turn(world_->now())) {
    if (++turns > kMostTurns) {
      world_->Fail(fmt::format("shard {} never comes to rest", index_));
      return;
    }
  }
  Check();
}

void SimShard::Check() {
  const StoreStats stats = server_->store().stats();
  if (stats.used_bytes > stats.limit_bytes) {
    world_->Fail(fmt::format("shard {} uses {} bytes, its limit is {}", index_, stats.used_bytes,
                             stats.limit_bytes));
  }
  std::erase_if(rotten_, [this](const BlockKey& key) {
    return server_->store().Find(key) != BlockState::kPresent;
  });
  if (stats.sealed != sealed_seen_) {
    sealed_seen_ = stats.sealed;
    server_->store().ForEach([this](const BlockView& view) {
      const auto found = checked_.find(view.key);
      if (found == checked_.end() || found->second != view.payload.data()) CheckBlock(view);
    });
  }
  if (++rounds_ % 512 == 0) CheckAll();

  const TimePoint now = world_->now();
  std::erase_if(kept_, [&](const Kept& kept) {
    return now >= kept.until || rotten_ever_.contains(kept.key) ||
           world_->network.Disorder(kept.client_node, node_) != kept.disorder;
  });
  for (const Kept& kept : kept_) {
    if (server_->store().Find(kept.key) == BlockState::kPresent) continue;
    world_->Fail(fmt::format("shard {} lost block {} under a {} of node {}", index_,
                             kept.key.ShortHex(), kept.why == Why::kPin ? "pin" : "lease",
                             kept.client_node));
  }
}

void SimShard::CheckBlock(const BlockView& view) {
  checked_[view.key] = view.payload.data();
  const std::string who = fmt::format("shard {}, block {}", index_, view.key.ShortHex());
  const auto announced = world_->announced.find(view.key);
  if (announced == world_->announced.end()) {
    return world_->Fail(who + ": visible, and no client ever sealed it");
  }
  if (world_->map.Owner(announced->second) != index_) {
    return world_->Fail(who + ": stored at a shard that does not own its run");
  }
  const OracleBlock& truth = world_->oracle.Block(view.key);
  const Result<BlockManifest> manifest = ParseManifest(view.manifest);
  if (!manifest.ok() || !(*manifest == truth.manifest)) {
    return world_->Fail(who + ": visible with another manifest than the one that was sealed");
  }
  if (rotten_.contains(view.key)) return;
  if (!std::equal(view.payload.begin(), view.payload.end(), truth.payload.begin(),
                  truth.payload.end())) {
    world_->Fail(who + ": visible with wrong bytes (sealed before they were there, or unverified)");
  }
}

void SimShard::CheckAll() {
  const std::string broken = server_->store().CheckInvariants();
  if (!broken.empty()) {
    return world_->Fail(
        fmt::format("shard {}: an invariant of the store is broken: {}", index_, broken));
  }
  server_->store().ForEach([this](const BlockView& view) { CheckBlock(view); });
}

void SimShard::CheckEmpty() {
  const ServerStats stats = server_->stats();
  if (stats.store.reservations != 0 || stats.store.pins != 0 || stats.clients != 0) {
    world_->Fail(fmt::format(
        "shard {}: everybody has left, and {} reservations, {} pins and {} clients are held",
        index_, stats.store.reservations, stats.store.pins, stats.clients));
  }
  CheckAll();
}

void SimShard::Promise(const BlockKey& key, size_t client_node, uint64_t disorder, TimePoint until,
                       Why why) {
  if (alive() && !rotten_ever_.contains(key))
    kept_.push_back({key, client_node, disorder, until, why});
}

void SimShard::ForgetLease(const BlockKey& key, size_t client_node) {
  std::erase_if(kept_, [&](const Kept& kept) {
    return kept.why == Why::kLease && kept.key == key && kept.client_node == client_node;
  });
}

void SimShard::ForgetPin(const BlockKey& key) {
  std::erase_if(kept_, [&](const Kept& kept) { return kept.why == Why::kPin && kept.key == key; });
}

bool SimShard::Rot(uint64_t random) {
  std::vector<BlockView> views;
  server_->store().ForEach([&](const BlockView& view) { views.push_back(view); });
  if (views.empty()) return false;
  std::sort(views.begin(), views.end(),
            [](const BlockView& a, const BlockView& b) { return a.key < b.key; });
  const BlockView& view = views[random % views.size()];
  view.payload[(random >> 20) % view.payload.size()] ^=
      static_cast<std::byte>(1 + (random >> 52) % 255);
  rotten_.insert(view.key);
  rotten_ever_.insert(view.key);
  world_->journal.Note(world_->now(), "shard {}: a byte of block {:016x} rots", index_,
                       view.key.Prefix64());
  return true;
}

}  // namespace kvant::sim
