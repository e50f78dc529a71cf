#include "tests/simulator/sim_client.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "tests/simulator/sim_shard.h"

namespace kvant::sim {
namespace {

constexpr Duration kTick = std::chrono::milliseconds(5);
constexpr size_t kMostOpen = 16;    // operations of one client
constexpr int kMostPolls = 10'000;  // of one round; more never come to rest
constexpr std::byte kPoison{0xA7};  // memory to which nothing was written yet
constexpr uint64_t kProbePrompts = uint64_t{1} << 20;

}  // namespace

SimClient::SimClient(World* world, size_t number, size_t node, uint64_t seed)
    : world_(world), number_(number), node_(node), random_(seed) {}

void SimClient::Start() {
  ++life_;
  world_->journal.Note(world_->now(), "client {} starts, life {}", number_, life_);
  transport_ = std::make_unique<SimTransport>(&world_->network, node_, [this] { Wake(); });
  CacheConnectionOptions options;
  options.arena_bytes = world_->plan.client_arena_bytes;
  options.connect_timeout = std::chrono::milliseconds(500);
  options.client.name = fmt::format("client{}", number_);
  auto connection =
      CacheConnection::Create(transport_.get(), world_->map, &world_->network.clock(), options);
  KV_CHECK(connection.ok());
  connection_ = *std::move(connection);
  TickLater();
}

void SimClient::Crash() {
  world_->journal.Note(world_->now(), "client {} ends", number_);
  world_->network.Kill(transport_.get());
  operations_.clear();
  quiet_.clear();
  settled_.clear();
  fetched_once_.clear();
  newest_lookup_.clear();
  events_.clear();
  connection_.reset();
  transport_.reset();
  awake_ = false;
}

void SimClient::Fail(const std::string& what) {
  world_->Fail(fmt::format("client {}: {}", number_, what));
}

void SimClient::Wake() {
  if (awake_) return;
  awake_ = true;
  const TimePoint when = std::max(world_->now() + std::chrono::microseconds(5), stalled_until_);
  world_->network.At(when, [this, life = life_] {
    if (life != life_ || !alive()) return;
    awake_ = false;
    if (world_->now() < stalled_until_) return Wake();
    Run();
  });
}

void SimClient::TickLater() {
  world_->network.After(kTick, [this, life = life_] {
    if (life != life_ || !alive()) return;
    Wake();
    TickLater();
  });
}

void SimClient::Run() {
  PollOnce();
  CheckDeadlines();
  CheckMemory();
  Work();
  PollOnce();
}

void SimClient::PollOnce() {
  int polls = 0;
  bool more = true;
  while (more) {
    more = connection_->Poll(&events_);
    const std::vector<ClientEvent> events = std::move(events_);
    events_.clear();
    // At once: only now nothing else has happened since the client verified the bytes.
    for (const ClientEvent& event : events) OnEvent(event);
    if (++polls > kMostPolls) return Fail("never comes to rest");
  }
}

void SimClient::Work() {
  for (auto& [id, operation] : operations_) {
    if (operation.kind == Operation::Kind::kPut) AdvancePut(id, &operation);
  }
  if (probe_shard_.has_value() && operations_.empty() && world_->now() >= probe_again_) {
    ProbeAgain();
  }
  if (world_->closing) return;
  if (!operations_.empty() && random_.Chance(world_->plan.cancelled)) CancelSomething();
  while (operations_.size() < kMostOpen && !world_->closing && random_.Chance(world_->plan.pace)) {
    StartSomething();
  }
}

void SimClient::StartSomething() {
  if (++world_->started >= world_->plan.operations) world_->closing = true;
  const uint64_t dice = random_.Below(100);
  const std::shared_ptr<Chain> chain = RandomChain();
  if (dice < 60) {
    Duration lease{};
    if (random_.Chance(0.5)) {
      lease = std::chrono::milliseconds(20 + random_.Below(1500));
    }
    StartLookup(chain, lease);
  } else if (dice < 72) {
    StartFetch(chain, 0, chain->keys.size(), false);
  } else if (dice < 84) {
    StartPut(chain, random_.Below(chain->keys.size()), false);
  } else if (dice < 92) {
    StartPin();
  } else if (dice < 94) {
    Operation stats = MakeOperation(Operation::Kind::kStats, nullptr);
    stats.shard = random_.Below(world_->map.size());
    const OpId id = connection_->client().Stats(stats.shard, stats.deadline, world_->now());
    Remember(id, std::move(stats));
  } else if (dice < 97) {
    // A false alarm, mostly: the shard must look for itself and keep what is good.
    const size_t index = random_.Below(chain->keys.size());
    connection_->client().ReportCorrupt(chain->keys[index], RunOf(chain->keys, index),
                                        world_->now());
  } else if (auto lease = connection_->Lend(64 + random_.Below(4096)); lease.ok()) {
    std::ranges::fill((*lease)->bytes(), kPoison);
    quiet_.push_back(
        {*std::move(lease), world_->now() + std::chrono::milliseconds(1 + random_.Below(300))});
  }
}

SimClient::Operation SimClient::MakeOperation(Operation::Kind kind, std::shared_ptr<Chain> chain) {
  Operation operation;
  operation.kind = kind;
  operation.started = world_->now();
  const Plan& plan = world_->plan;
  const auto spread = static_cast<uint64_t>((plan.deadline_most - plan.deadline_least).count());
  operation.deadline = world_->now() + plan.deadline_least + Duration(random_.Below(spread + 1));
  operation.chain = std::move(chain);
  operation.damage = world_->Damage();
  for (const auto& shard : world_->shards) {
    operation.disorder.push_back(world_->network.Disorder(node_, shard->node()));
    operation.lives.push_back(shard->life());
    operation.reachable.push_back(connection_->client().Reachable(operation.reachable.size()));
  }
  return operation;
}

void SimClient::Remember(OpId id, Operation operation) {
  world_->journal.Note(world_->now(), "client {} starts operation {} of kind {}", number_, id,
                       static_cast<uint64_t>(operation.kind));
  if (!operations_.emplace(id, std::move(operation)).second) {
    Fail(fmt::format("operation {} was named twice", id));
  }
}

std::shared_ptr<SimClient::Chain> SimClient::MakeChain(size_t domain, uint64_t prompt,
                                                       size_t blocks) {
  std::vector<uint32_t> tokens;
  for (size_t block = 0; block < blocks; ++block) {
    // The first blocks are shared by many prompts, the fifth by none.
    const uint64_t variant = prompt >> (block < 4 ? 4 - block : 0);
    for (uint32_t i = 0; i < world_->plan.oracle.block_tokens; ++i) {
      tokens.push_back(static_cast<uint32_t>(variant * 1009 + block * 31 + i));
    }
  }
  auto chain = std::make_shared<Chain>();
  chain->domain = domain;
  chain->keys = world_->chains[domain].Keys(tokens);
  return chain;
}

std::shared_ptr<SimClient::Chain> SimClient::RandomChain() {
  const Plan& plan = world_->plan;
  const size_t domain = random_.Below(plan.tenants) % plan.domains;
  // Few prompts are asked for often.
  const uint64_t prompt = random_.Below(1 + random_.Below(plan.prompts));
  return MakeChain(domain, prompt, 1 + random_.Below(plan.chain_blocks));
}

size_t SimClient::OwnerOf(const Chain& chain, size_t index) const {
  return world_->map.Owner(RunOf(chain.keys, index));
}

Selection SimClient::RandomSelection(const BlockManifest& manifest) {
  Selection selection = SelectAll();
  if (random_.Chance(0.4)) return selection;
  const auto available = manifest.CutsAvailable();
  selection.cuts = {};
  selection.cuts[0] = static_cast<uint8_t>(random_.Below(available[0] + 1u));
  selection.cuts[1] = static_cast<uint8_t>(random_.Below(available[1] + 1u));
  if (selection.cuts[0] + selection.cuts[1] == 0) selection.cuts[random_.Below(2)] = 255;
  if (random_.Chance(0.5)) {
    selection.layer_begin = static_cast<uint16_t>(random_.Below(manifest.LayerEnd()));
    selection.layer_end = static_cast<uint16_t>(selection.layer_begin + 1 + random_.Below(3));
  } else if (random_.Chance(0.5)) {
    std::vector<bool> layers(manifest.LayerEnd());
    layers[random_.Below(layers.size())] = true;
    for (size_t i = 0; i < layers.size(); ++i) layers[i] = layers[i] || random_.Chance(0.4);
    selection.SetLayers(layers);
  }
  for (size_t part = 0; part < 2; ++part) {
    if (selection.cuts[part] == 0 || !random_.Chance(0.3)) continue;
    const uint8_t end = std::min(selection.cuts[part], available[part]);
    selection.first_cuts[part] = static_cast<uint8_t>(random_.Below(end));
  }
  return selection;
}

void SimClient::StartLookup(std::shared_ptr<Chain> chain, Duration lease) {
  Operation lookup = MakeOperation(Operation::Kind::kLookup, std::move(chain));
  lookup.keep = lease;
  const OpId id =
      connection_->client().Lookup(lookup.chain->keys, lease, lookup.deadline, world_->now());
  for (const BlockKey& key : lookup.chain->keys) {
    newest_lookup_[key] = id;
    for (const auto& shard : world_->shards) shard->ForgetLease(key, node_);
  }
  Remember(id, std::move(lookup));
}

void SimClient::StartFetch(const std::shared_ptr<Chain>& chain, size_t first, size_t last,
                           bool probe) {
  Operation fetch = MakeOperation(Operation::Kind::kFetch, chain);
  fetch.probe = probe;
  FetchRequest request;
  uint64_t end = 0;
  for (size_t index = first; index < last; ++index) {
    const BlockKey& key = chain->keys[index];
    const OracleBlock& truth = world_->oracle.Block(key);
    const size_t times = probe || random_.Chance(0.9) ? 1 : 2;
    for (size_t i = 0; i < times; ++i) {
      Item item;
      item.key = key;
      item.shard = OwnerOf(*chain, index);
      item.selection = probe ? SelectAll() : RandomSelection(truth.manifest);
      for (const ExpectedRow& row : ExpectedRows(truth.manifest, item.selection)) {
        item.missing.insert(row.layer);
        item.length += row.length;
      }
      if (item.length == 0) continue;
      end += 64 * random_.Below(3);
      item.offset = end;
      end += item.length;
      request.items.push_back(
          {key, RunOf(chain->keys, index), item.selection, item.offset, item.length});
      world_->journal.Note(world_->now(), "item: {} bytes at {} of block {:016x}", item.length,
                           item.offset, key.Prefix64());
      fetch.items.push_back(std::move(item));
    }
    fetched_once_.insert(key);
    for (const auto& shard : world_->shards) shard->ForgetLease(key, node_);
  }
  if (fetch.items.empty()) return;
  auto lease = connection_->Lend(end + 64);
  if (!lease.ok()) {
    probe_again_ = world_->now() + std::chrono::milliseconds(20);
    return;
  }
  fetch.buffer = *std::move(lease);
  std::ranges::fill(fetch.buffer->bytes(), kPoison);
  request.buffer = fetch.buffer;
  request.deadline = fetch.deadline;
  const OpId id = connection_->client().Fetch(std::move(request), world_->now());
  Remember(id, std::move(fetch));
}

void SimClient::StartPut(const std::shared_ptr<Chain>& chain, size_t index, bool probe) {
  Operation put = MakeOperation(Operation::Kind::kPut, chain);
  put.probe = probe;
  put.index = index;
  put.key = chain->keys[index];
  put.shard = OwnerOf(*chain, index);
  const OracleBlock& truth = world_->oracle.Block(put.key);
  if (!probe) {
    put.torn = random_.Chance(world_->plan.torn);
    put.abandoned = random_.Chance(world_->plan.abandoned);
    put.foreign_manifest = random_.Chance(world_->plan.torn / 4);
  }
  auto lease = connection_->Lend(truth.payload.size());
  if (!lease.ok()) {
    probe_again_ = world_->now() + std::chrono::milliseconds(20);
    return;
  }
  put.buffer = *std::move(lease);
  std::ranges::fill(put.buffer->bytes(), kPoison);
  for (uint64_t offset = 0; offset < truth.payload.size();) {
    const uint64_t length =
        std::min<uint64_t>(truth.payload.size() - offset, 1 + random_.Below(4096));
    put.announce.push_back({offset, length});
    offset += length;
  }
  for (size_t i = put.announce.size(); i > 1; --i) {
    std::swap(put.announce[i - 1], put.announce[random_.Below(i)]);
  }
  PutRequest request;
  request.key = put.key;
  if (index > 0) request.parent = chain->keys[index - 1];
  request.run = RunOf(chain->keys, index);
  request.payload_bytes = truth.payload.size();
  request.manifest_rows = truth.manifest.rows.size();
  request.buffer = put.buffer;
  request.deadline = put.deadline;
  const OpId id = connection_->client().BeginPut(request, world_->now());
  Remember(id, std::move(put));
}

void SimClient::AdvancePut(OpId id, Operation* put) {
  const OracleBlock& truth = world_->oracle.Block(put->key);
  while (!put->announce.empty() && (put->probe || random_.Chance(0.7))) {
    const Stretch stretch = put->announce.back();
    put->announce.pop_back();
    // Not before: what the shard reads too early shows as poison.
    std::byte* to = put->buffer->bytes().data() + stretch.offset;
    std::memcpy(to, truth.payload.data() + stretch.offset, stretch.length);
    if (put->torn) to[random_.Below(stretch.length)] ^= std::byte{1};
    connection_->client().PutReady(id, stretch.offset, stretch.length, world_->now());
  }
  if (!put->announce.empty() || put->sealed || put->abandoned) return;
  put->sealed = true;
  if (put->foreign_manifest) {
    BlockManifest other = truth.manifest;
    other.key.bytes[0] ^= std::byte{1};
    connection_->client().SealPut(id, other, world_->now());
    return;
  }
  world_->announced[put->key] = RunOf(put->chain->keys, put->index);
  connection_->client().SealPut(id, truth.manifest, world_->now());
}

void SimClient::StartPin() {
  const std::shared_ptr<Chain> chain = RandomChain();
  const size_t index = random_.Below(chain->keys.size());
  Operation pin = MakeOperation(Operation::Kind::kPin, chain);
  pin.key = chain->keys[index];
  pin.shard = OwnerOf(*chain, index);
  if (random_.Chance(0.8)) {
    pin.keep = Duration(1 + random_.Below(static_cast<uint64_t>(world_->plan.longest_pin.count())));
  }
  world_->shards[pin.shard]->ForgetPin(pin.key);
  ++world_->pin_calls[pin.key];
  const OpId id = connection_->client().Pin(pin.key, RunOf(chain->keys, index), pin.keep,
                                            pin.deadline, world_->now());
  Remember(id, std::move(pin));
}

void SimClient::CancelSomething() {
  auto it = operations_.begin();
  std::advance(it, static_cast<ptrdiff_t>(random_.Below(operations_.size())));
  if (it->second.probe) return;
  it->second.cancelled = true;
  connection_->client().Cancel(it->first, world_->now());
}

void SimClient::BeginProbe(size_t shard) {
  probe_shard_ = shard;
  probe_again_ = world_->now();
}

void SimClient::ProbeAgain() {
  std::shared_ptr<Chain> chain;
  do {
    probe_prompt_ += 16;  // a first block that nobody has
    chain = MakeChain(0, kProbePrompts * (number_ + 1) + probe_prompt_, 1);
  } while (OwnerOf(*chain, 0) != *probe_shard_);
  StartPut(chain, 0, true);
}

}  // namespace kvant::sim
