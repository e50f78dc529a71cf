#include "cache_service/hit_ratio.h"

#include <zlib.h>

#include <algorithm>
#include <limits>
#include <list>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <unordered_map>
#include <utility>

#include "base/bytes.h"
#include "base/check.h"
#include "cache_service/block_store.h"
#include "transport/range_allocator.h"

namespace kvant {
namespace {

constexpr size_t kPayloadBytes = 8;

// Appends the next line without its newline; false at the end.
bool ReadLine(gzFile file, std::string* line) {
  line->clear();
  char piece[4096];
  while (gzgets(file, piece, sizeof(piece)) != nullptr) {
    *line += piece;
    if (line->back() != '\n') continue;
    line->pop_back();
    return true;
  }
  return !line->empty();
}

Status ParseLine(const std::string& line, std::unordered_map<uint64_t, uint32_t>* names,
                 RequestTrace* trace) {
  const nlohmann::json request = nlohmann::json::parse(line, nullptr, false);
  if (!request.is_object() || !request.contains("hash_ids") || !request["hash_ids"].is_array()) {
    return InvalidArgument("expected a JSON object with an array hash_ids");
  }
  std::vector<uint32_t>& chain = trace->requests.emplace_back();
  for (const nlohmann::json& id : request["hash_ids"]) {
    if (!id.is_number_unsigned()) return InvalidArgument("hash_ids holds something else than ids");
    const auto next = static_cast<uint32_t>(names->size());
    chain.push_back(names->try_emplace(id.get<uint64_t>(), next).first->second);
  }
  trace->total_blocks += chain.size();
  trace->distinct_blocks = static_cast<uint32_t>(names->size());
  return OkStatus();
}

BlockKey KeyOf(uint32_t block) {
  BlockKey key;
  std::byte name[4];
  StoreLittle(name, block);
  key.bytes = Sha256(name);
  return key;
}

// A BlockStore of so many blocks with payloads of a few bytes.
class TinyStore {
 public:
  TinyStore(uint32_t blocks, const EvictionPolicy& policy) {
    constexpr uint64_t kGranule = RangeAllocator::kGranule;
    const uint64_t block_bytes =
        (MaxManifestBytes(1) + kGranule - 1) / kGranule * kGranule + kGranule;
    arena_.resize(block_bytes * blocks);
    BlockStoreOptions options;
    options.arena = arena_;
    options.max_blocks = blocks;
    options.max_pins = 1;
    options.policy = policy;
    store_ = std::make_unique<BlockStore>(options);
  }

  // False if it cannot be stored.
  bool Put(const BlockKey& key, const BlockKey& parent) {
    ReserveRequest request;
    request.key = key;
    request.parent = parent;
    request.payload_bytes = kPayloadBytes;
    request.manifest_bytes = MaxManifestBytes(1);
    request.deadline = TimePoint::max();
    const Result<ReserveResult> reserved = store_->Reserve(request);
    if (!reserved.ok()) return false;
    if (reserved->found == BlockState::kPresent) {
      store_->Touch(key);
      return true;
    }
    BlockManifest manifest;
    manifest.key = key;
    manifest.token_count = 1;
    manifest.Append(0, 0, 0, 0, reserved->payload, 0);
    return store_->Seal(reserved->reservation, EncodeManifest(manifest)).ok();
  }
  BlockStore& store() { return *store_; }

 private:
  std::vector<std::byte> arena_;
  std::unique_ptr<BlockStore> store_;
};

// A queue of which the front goes first. `refresh`: a use moves a block to the back.
uint64_t QueueHits(const RequestTrace& trace, uint32_t blocks, bool refresh) {
  std::list<uint32_t> queue;
  std::vector<std::list<uint32_t>::iterator> at(trace.distinct_blocks, queue.end());
  uint64_t hits = 0;
  for (const std::vector<uint32_t>& chain : trace.requests) {
    size_t prefix = 0;
    while (prefix < chain.size() && at[chain[prefix]] != queue.end()) ++prefix;
    hits += prefix;
    for (auto block = chain.rbegin(); block != chain.rend(); ++block) {
      if (at[*block] == queue.end()) {
        at[*block] = queue.insert(queue.end(), *block);
      } else if (refresh) {
        queue.splice(queue.end(), queue, at[*block]);
      }
    }
    while (queue.size() > blocks) {
      at[queue.front()] = queue.end();
      queue.pop_front();
    }
  }
  return hits;
}

}  // namespace

Result<RequestTrace> ReadTrace(const std::string& path) {
  const std::unique_ptr<gzFile_s, int (*)(gzFile)> file(gzopen(path.c_str(), "rb"), gzclose);
  if (file == nullptr) return InvalidArgument("trace {}: cannot be opened", path);
  RequestTrace trace;
  std::unordered_map<uint64_t, uint32_t> names;
  std::string line;
  for (size_t number = 1; ReadLine(file.get(), &line); ++number) {
    const Status status = ParseLine(line, &names, &trace);
    if (!status.ok())
      return InvalidArgument("trace {}, line {}: {}", path, number, status.message());
  }
  if (trace.total_blocks == 0) return InvalidArgument("trace {}: no blocks in it", path);
  return trace;
}

uint64_t StoreHits(const RequestTrace& trace, uint32_t blocks, const EvictionPolicy& policy) {
  std::vector<BlockKey> keys;
  for (uint32_t block = 0; block < trace.distinct_blocks; ++block) keys.push_back(KeyOf(block));
  TinyStore tiny(blocks, policy);
  uint64_t hits = 0;
  for (const std::vector<uint32_t>& chain : trace.requests) {
    size_t prefix = 0;
    while (prefix < chain.size() &&
           tiny.store().Find(keys[chain[prefix]]) == BlockState::kPresent) {
      tiny.store().Touch(keys[chain[prefix++]]);
    }
    hits += prefix;
    for (size_t i = prefix; i < chain.size(); ++i) {
      if (!tiny.Put(keys[chain[i]], i == 0 ? BlockKey{} : keys[chain[i - 1]])) break;
    }
  }
  return hits;
}

uint64_t LruHits(const RequestTrace& trace, uint32_t blocks) {
  return QueueHits(trace, blocks, true);
}
uint64_t FifoHits(const RequestTrace& trace, uint32_t blocks) {
  return QueueHits(trace, blocks, false);
}

uint64_t OptimalHits(const RequestTrace& trace, uint32_t blocks) {
  constexpr size_t kNever = std::numeric_limits<size_t>::max();
  // next[r][i]: the request after r that uses block i of r again.
  std::vector<std::vector<size_t>> next(trace.requests.size());
  std::vector<size_t> soonest(trace.distinct_blocks, kNever);
  for (size_t r = trace.requests.size(); r-- > 0;) {
    for (const uint32_t block : trace.requests[r]) next[r].push_back(soonest[block]);
    for (const uint32_t block : trace.requests[r]) soonest[block] = r;
  }
  // (next use, depth, block): the last is given up first. A chain's tail is never needed sooner
  // than its head, so what is kept has no gaps, and the optimum for blocks is that for prefixes.
  using Kept = std::tuple<size_t, size_t, uint32_t>;
  std::set<Kept> kept;
  std::unordered_map<uint32_t, Kept> entry;
  uint64_t hits = 0;
  for (size_t r = 0; r < trace.requests.size(); ++r) {
    const std::vector<uint32_t>& chain = trace.requests[r];
    size_t prefix = 0;
    while (prefix < chain.size() && entry.contains(chain[prefix])) ++prefix;
    hits += prefix;
    for (size_t i = 0; i < chain.size(); ++i) {
      const auto old = entry.find(chain[i]);
      if (old != entry.end()) {
        kept.erase(old->second);
        entry.erase(old);
      }
      if (next[r][i] == kNever) continue;
      entry[chain[i]] = {next[r][i], i, chain[i]};
      kept.insert(entry[chain[i]]);
    }
    while (kept.size() > blocks) {
      entry.erase(std::get<2>(*kept.rbegin()));
      kept.erase(std::prev(kept.end()));
    }
  }
  return hits;
}

}  // namespace kvant
