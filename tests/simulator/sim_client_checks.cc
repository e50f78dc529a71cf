// The checkers of the simulated client: what every answer of the cache must be.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "tests/simulator/sim_client.h"
#include "tests/simulator/sim_shard.h"

namespace kvant::sim {
namespace {

constexpr std::byte kPoison{0xA7};
// How much later than its deadline an operation may end, while its client runs.
constexpr Duration kSlack = std::chrono::milliseconds(50);

}  // namespace

bool SimClient::Undisturbed(const Operation& operation, size_t shard) const {
  const SimShard& there = *world_->shards[shard];
  return there.alive() && there.life() == operation.lives[shard] &&
         world_->network.Disorder(node_, there.node()) == operation.disorder[shard];
}

void SimClient::CheckDeadlines() {
  for (auto& [id, operation] : operations_) {
    if (world_->now() < operation.deadline + kSlack) continue;
    if (!operation.overdue_since.has_value()) {
      operation.overdue_since = world_->now();
    } else if (world_->now() >= *operation.overdue_since + kSlack) {
      return Fail(fmt::format("operation {} of kind {} did not end by its deadline", id,
                              static_cast<int>(operation.kind)));
    }
  }
  if (connection_->client().open_operations() != operations_.size()) {
    Fail(fmt::format("the client counts {} open operations, {} were not told to be done",
                     connection_->client().open_operations(), operations_.size()));
  }
}

void SimClient::CheckMemory() {
  const TimePoint now = world_->now();
  for (const Quiet& quiet : quiet_) {
    const auto bytes = quiet.lease->bytes();
    if (!std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == kPoison; })) {
      return Fail("somebody wrote into memory that no operation was given");
    }
  }
  std::erase_if(quiet_, [now](const Quiet& quiet) { return quiet.until <= now; });
  for (const Settled& settled : settled_) {
    for (const Item& item : settled.operation.items) {
      if (item.intact) CheckItem(settled.operation, item, "some time after it ended");
    }
  }
  std::erase_if(settled_, [now](const Settled& settled) { return settled.until <= now; });
}

void SimClient::CheckStatus(const Operation& operation, const Status& status) {
  Outcomes& outcomes = world_->outcomes;
  if (status.code() == StatusCode::kDataLoss) {
    ++outcomes.data_loss;
  } else if (status.code() == StatusCode::kResourceExhausted) {
    ++outcomes.refused;
  } else if (!status.ok()) {
    ++outcomes.failed;
  }
  if (status.ok() || world_->journal.failed()) return;
  const bool early = world_->now() < operation.deadline;
  if (status.code() == StatusCode::kDeadlineExceeded && early && !operation.cancelled) {
    return Fail("an operation says that its deadline passed, and it did not: " + status.ToString());
  }
  if (status.code() == StatusCode::kCancelled && !operation.cancelled) {
    return Fail("an operation says that it was cancelled, and it was not: " + status.ToString());
  }
  if (status.code() == StatusCode::kDataLoss && !operation.torn &&
      world_->Damage() == operation.damage && world_->outcomes.rotten == 0) {
    return Fail("bytes were bad, and nothing on the way damaged any: " + status.ToString());
  }
  if (!world_->plan.strict || operation.cancelled) return;
  const bool reachable = std::ranges::all_of(operation.reachable, [](bool yes) { return yes; });
  const bool excused =
      status.code() == StatusCode::kResourceExhausted || !reachable ||
      (operation.kind == Operation::Kind::kPin && status.code() == StatusCode::kUnavailable) ||
      operation.torn || operation.abandoned || operation.foreign_manifest;
  if (!excused) Fail("an operation failed, and nothing went wrong: " + status.ToString());
}

void SimClient::OnEvent(const ClientEvent& event) {
  world_->journal.Note(world_->now(), "event of kind {} for operation {}, code {}",
                       static_cast<uint64_t>(event.kind), event.op,
                       static_cast<uint64_t>(event.status.code()));
  const auto found = operations_.find(event.op);
  if (found == operations_.end()) {
    return Fail(fmt::format("an event for operation {}, which is not open", event.op));
  }
  using Kind = ClientEvent::Kind;
  if (event.kind == Kind::kLayerArrived) return OnLayer(&found->second, event);
  if (event.kind == Kind::kItemDone) return OnItem(&found->second, event);
  Operation operation = std::move(found->second);
  operations_.erase(found);
  ++world_->outcomes.operations;
  CheckStatus(operation, event.status);
  const auto ends = [&](Operation::Kind kind) {
    if (operation.kind == kind) return true;
    Fail(fmt::format("operation {} ended as one of another kind", event.op));
    return false;
  };
  switch (event.kind) {
    case Kind::kLookupDone:
      if (ends(Operation::Kind::kLookup)) OnLookup(std::move(operation), event);
      break;
    case Kind::kFetchDone:
      if (ends(Operation::Kind::kFetch)) OnFetch(std::move(operation), event);
      break;
    case Kind::kPutDone:
      if (ends(Operation::Kind::kPut)) OnPut(std::move(operation), event);
      break;
    case Kind::kPinDone:
      if (ends(Operation::Kind::kPin)) OnPin(std::move(operation), event);
      break;
    default:
      ends(Operation::Kind::kStats);
  }
}

void SimClient::OnLookup(Operation operation, const ClientEvent& event) {
  const std::vector<BlockKey>& keys = operation.chain->keys;
  if (!event.status.ok()) return;
  if (event.blocks.size() != keys.size()) return Fail("a lookup answered for another chain");
  size_t prefix = 0;
  while (prefix < keys.size() && event.blocks[prefix].state == LookupState::kPresent) ++prefix;
  if (prefix != event.prefix_blocks) return Fail("a lookup miscounted its prefix");
  for (size_t i = 0; i < keys.size(); ++i) {
    const size_t shard = OwnerOf(*operation.chain, i);
    const bool undisturbed = Undisturbed(operation, shard);
    if (event.blocks[i].state != LookupState::kPresent || !undisturbed) continue;
    if (!world_->announced.contains(keys[i])) {
      return Fail(fmt::format("a lookup found block {}, which nobody sealed", keys[i].ShortHex()));
    }
    const OracleBlock& truth = world_->oracle.Block(keys[i]);
    if (event.blocks[i].payload_bytes != truth.payload.size() ||
        event.blocks[i].cuts != truth.manifest.CutsAvailable() ||
        event.blocks[i].cut_ends != truth.manifest.EndsOfCuts()) {
      return Fail(fmt::format("a lookup describes block {} wrongly", keys[i].ShortHex()));
    }
    const bool plain = world_->network.Disorder(node_, world_->shards[shard]->node()) == 0;
    if (operation.keep > Duration::zero() && newest_lookup_[keys[i]] == event.op &&
        world_->plan.shard_max_pins > 1000 && !operation.cancelled &&
        (plain || !fetched_once_.contains(keys[i])) && !FetchOpen(keys[i])) {
      world_->shards[shard]->Promise(keys[i], node_, operation.disorder[shard],
                                     operation.started + operation.keep, SimShard::Why::kLease);
    }
  }
  if (world_->closing || operation.cancelled) return;
  if (prefix > 0 && random_.Chance(0.9)) {
    const size_t first = random_.Chance(0.7) ? 0 : random_.Below(prefix);
    StartFetch(operation.chain, first, prefix, false);
  }
  for (size_t i = prefix; i < keys.size() && operations_.size() < 24; ++i) {
    if (random_.Chance(0.9)) StartPut(operation.chain, i, false);
  }
}

bool SimClient::FetchOpen(const BlockKey& key) const {
  return std::ranges::any_of(operations_, [&](const auto& entry) {
    return std::ranges::any_of(entry.second.items,
                               [&](const Item& item) { return item.key == key; });
  });
}

void SimClient::CheckItem(const Operation& operation, const Item& item, const char* when) {
  const OracleBlock& truth = world_->oracle.Block(item.key);
  const std::byte* place = operation.buffer->bytes().data() + item.offset;
  for (const ExpectedRow& row : ExpectedRows(truth.manifest, item.selection)) {
    if (item.missing.contains(row.layer)) continue;
    if (std::memcmp(place + row.packed_offset, truth.payload.data() + row.payload_offset,
                    row.length) == 0) {
      continue;
    }
    return Fail(
        fmt::format("WRONG BYTE: layer {} of block {}, {}", row.layer, item.key.ShortHex(), when));
  }
}

void SimClient::OnLayer(Operation* operation, const ClientEvent& event) {
  world_->journal.Note(world_->now(), "layer {} of item {}", event.layer, event.item);
  if (event.item >= operation->items.size()) return Fail("a layer arrived for no item");
  Item& item = operation->items[event.item];
  if (item.done) return Fail("a layer arrived after its item was done");
  if (item.missing.erase(event.layer) == 0) {
    return Fail(fmt::format("layer {} arrived twice, or was not asked for", event.layer));
  }
  if (event.manifest == nullptr || !(*event.manifest == world_->oracle.Block(item.key).manifest)) {
    return Fail("a layer arrived with another manifest than the one that was sealed");
  }
  if (!world_->announced.contains(item.key)) {
    return Fail(fmt::format("block {} was served, and nobody sealed it", item.key.ShortHex()));
  }
  ++world_->outcomes.layers;
  CheckItem(*operation, item, "when it arrived");
}

void SimClient::OnItem(Operation* operation, const ClientEvent& event) {
  if (event.item >= operation->items.size()) return Fail("an item ended that was not asked for");
  Item& item = operation->items[event.item];
  if (item.done) return Fail("an item ended twice");
  item.done = true;
  CheckStatus(*operation, event.status);
  item.intact = event.status.ok() && event.present;
  if (!item.intact) return;
  if (!item.missing.empty()) return Fail("an item ended well, and a layer of it did not arrive");
  CheckItem(*operation, item, "when its item ended");
}

void SimClient::OnFetch(Operation operation, const ClientEvent& event) {
  bool all_intact = true;
  for (const Item& item : operation.items) {
    if (!item.done) return Fail("a fetch ended before one of its items");
    if (item.intact) CheckItem(operation, item, "when its fetch ended");
    all_intact = all_intact && item.intact;
  }
  if (all_intact && !event.status.ok() && !operation.cancelled) {
    return Fail("a fetch failed though all of its items ended well: " + event.status.ToString());
  }
  std::vector<bool> ours(operation.buffer->size());
  for (const Item& item : operation.items) {
    std::fill_n(ours.begin() + static_cast<ptrdiff_t>(item.offset), item.length, true);
  }
  for (size_t i = 0; i < ours.size(); ++i) {
    if (!ours[i] && operation.buffer->bytes()[i] != kPoison) {
      return Fail(fmt::format("a fetch wrote beside its items, at {} of its buffer", i));
    }
  }
  if (operation.probe) {
    if (all_intact) probe_shard_.reset();
    probe_again_ = world_->now() + std::chrono::milliseconds(20);
    return;
  }
  if (settled_.size() < 4) {
    const TimePoint until = world_->now() + std::chrono::milliseconds(random_.Below(100));
    settled_.push_back({std::move(operation), until});
  }
}

void SimClient::OnPut(Operation operation, const ClientEvent& event) {
  const bool stored = event.status.ok() && !event.already_there;
  if (stored && (!operation.sealed || operation.torn || operation.foreign_manifest)) {
    return Fail(fmt::format("a put of block {} was stored though it was {}",
                            operation.key.ShortHex(),
                            operation.sealed ? "not what its manifest says" : "not sealed"));
  }
  if (stored && Undisturbed(operation, operation.shard)) {
    // Nothing was ever given up there, so what was acknowledged must be there.
    SimShard& shard = *world_->shards[operation.shard];
    const StoreStats stats = shard.store().stats();
    if (stats.evicted == 0 && stats.dropped_corrupt == 0 && world_->outcomes.rotten == 0 &&
        shard.store().Find(operation.key) != BlockState::kPresent) {
      return Fail(fmt::format("a put of block {} was acknowledged, and it is not there",
                              operation.key.ShortHex()));
    }
  }
  if (stored) ++world_->outcomes.stored;
  if (!operation.probe) return;
  if (stored) {
    StartFetch(operation.chain, 0, 1, true);
  } else {
    probe_again_ = world_->now() + std::chrono::milliseconds(20);
  }
}

void SimClient::OnPin(Operation operation, const ClientEvent& event) {
  if (!event.status.ok() || operation.keep == Duration::zero() || operation.cancelled) return;
  // Pins are the block's, whoever asked; only where nobody else did is the outcome certain.
  if (world_->pin_calls[operation.key] != 1 || !Undisturbed(operation, operation.shard)) return;
  world_->shards[operation.shard]->Promise(
      operation.key, node_, operation.disorder[operation.shard],
      operation.started + std::min(operation.keep, kMaxLease), SimShard::Why::kPin);
}

}  // namespace kvant::sim
