#include "cluster/shard_map.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/bytes.h"

namespace kvant {
namespace {

// The finalizer of splitmix64 (Steele, Lea, Flood, 2014): every input bit reaches every output bit.
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15U;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

// FNV-1a, mixed: placement must be the same in every build and on every machine, for ever.
uint64_t HashAddress(std::string_view address) {
  uint64_t hash = 0xcbf29ce484222325U;
  for (const char c : address) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
  return Mix(hash);
}

}  // namespace

Result<ShardMap> ShardMap::Make(uint64_t epoch, std::vector<Shard> shards) {
  if (shards.empty()) return InvalidArgument("a shard map needs at least one shard");
  if (shards.size() > kMaxShards) {
    return InvalidArgument("{} shards named, at most {} are possible", shards.size(), kMaxShards);
  }
  std::sort(shards.begin(), shards.end(),
            [](const Shard& a, const Shard& b) { return a.address < b.address; });
  for (size_t i = 0; i < shards.size(); ++i) {
    if (shards[i].address.empty()) return InvalidArgument("a shard's address is empty");
    if (!(shards[i].weight > 0) || !std::isfinite(shards[i].weight)) {
      return InvalidArgument("shard {}: weight {} must be positive and finite", shards[i].address,
                             shards[i].weight);
    }
    if (i > 0 && shards[i].address == shards[i - 1].address) {
      return InvalidArgument("shard {} is named twice", shards[i].address);
    }
  }
  return ShardMap(epoch, std::move(shards));
}

ShardMap::ShardMap(uint64_t epoch, std::vector<Shard> shards)
    : epoch_(epoch), shards_(std::move(shards)) {
  identity_.reserve(shards_.size());
  for (const Shard& shard : shards_) identity_.push_back(HashAddress(shard.address));
}

double ShardMap::Score(size_t shard, uint64_t run) const {
  // 53 bits, shifted by a half so that u is never 0 or 1.
  const uint64_t bits = Mix(identity_[shard] ^ Mix(run)) >> 11;
  const double u = (static_cast<double>(bits) + 0.5) * 0x1p-53;
  return shards_[shard].weight / -std::log(u);
}

size_t ShardMap::Owner(uint64_t run) const {
  size_t best = 0;
  double best_score = Score(0, run);
  for (size_t i = 1; i < shards_.size(); ++i) {
    const double score = Score(i, run);
    if (score > best_score) {
      best = i;
      best_score = score;
    }
  }
  return best;
}

std::vector<size_t> ShardMap::Owners(uint64_t run, size_t n) const {
  std::vector<std::pair<double, size_t>> order;
  order.reserve(shards_.size());
  for (size_t i = 0; i < shards_.size(); ++i) order.emplace_back(-Score(i, run), i);
  n = std::min(n, order.size());
  std::partial_sort(order.begin(), order.begin() + static_cast<ptrdiff_t>(n), order.end());
  std::vector<size_t> owners;
  owners.reserve(n);
  for (size_t i = 0; i < n; ++i) owners.push_back(order[i].second);
  return owners;
}

}  // namespace kvant
