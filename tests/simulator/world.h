// What all parts of one simulation share, and what its checkers know from outside.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "cache_service/block_key.h"
#include "cache_service/shard_server.h"
#include "cluster/shard_map.h"
#include "tests/simulator/journal.h"
#include "tests/simulator/oracle.h"
#include "tests/simulator/sim_network.h"

namespace kvant::sim {

class SimShard;

// How one simulation is laid out; drawn from its seed (simulation.cc).
struct Plan {
  size_t shards = 1;
  size_t clients = 1;
  size_t tenants = 1;
  size_t domains = 1;   // tenant t is in domain t % domains
  size_t prompts = 16;  // different ones a domain has
  size_t chain_blocks = 12;
  uint64_t shard_arena_bytes = 0;
  uint32_t shard_max_blocks = 0;
  uint32_t shard_max_pins = 0;
  uint64_t user_pin_bytes = 0;
  uint64_t client_arena_bytes = 0;
  size_t operations = 0;  // of all clients together, then the workload ends
  double pace = 0.1;      // chance that a client starts something whenever it runs
  Duration deadline_least{};
  Duration deadline_most{};
  Duration longest_pin{};
  double torn = 0;       // puts whose bytes are not what their manifest says
  double abandoned = 0;  // puts that are never sealed
  double cancelled = 0;  // operations that are cancelled early
  // Nothing goes wrong by plan, so no operation may fail but for lack of room.
  bool strict = false;
  NetworkShape network;
  NetworkFaults faults;  // while the workload runs
  // What the nemesis may do, and how often.
  Duration nemesis_every{};
  bool crash_shards = false;
  bool crash_clients = false;
  bool partitions = false;
  bool cuts = false;
  bool stalls = false;
  bool leaps = false;
  bool rot = false;
  OracleShape oracle;
  ServerFaults server_faults;
};

// What came of it all, to see that a run was worth its time.
struct Outcomes {
  uint64_t operations = 0;
  uint64_t layers = 0;     // arrived, and right
  uint64_t stored = 0;     // puts sealed
  uint64_t refused = 0;    // for lack of room
  uint64_t data_loss = 0;  // bad bytes found by who was to use them
  uint64_t failed = 0;     // for any other reason
  uint64_t rotten = 0;     // stored bytes that were changed
  uint64_t crashes = 0;

  Outcomes& operator+=(const Outcomes& more);
};

// Single-owner.
struct World {
  World(const Plan& the_plan, ShardMap the_map, uint64_t network_seed, Journal* the_journal);
  ~World();

  TimePoint now() const { return network.now(); }
  // Counts faults that may damage bytes, of payload or of messages.
  uint64_t Damage() const {
    return network.tally().payload + network.tally().messages + network.tally().transfers +
           outcomes.rotten;
  }
  void Fail(std::string what) { journal.Fail(now(), std::move(what)); }

  Plan plan;
  ShardMap map;
  Journal& journal;
  SimNetwork network;
  Oracle oracle;
  std::vector<KeyChain> chains;                      // by domain
  std::vector<std::unique_ptr<SimShard>> shards;     // by index in the map
  std::unordered_map<BlockKey, uint64_t> announced;  // key to run: some client sealed such a put
  std::unordered_map<BlockKey, size_t> pin_calls;    // how often any client pinned or unpinned
  Outcomes outcomes;
  size_t started = 0;    // of the plan's operations
  bool closing = false;  // no new operations
};

}  // namespace kvant::sim
