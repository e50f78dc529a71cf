// A client process in the simulation: the production connection over the simulated transport, a
// workload of lookups, fetches, streamed puts and pins over chains with shared prefixes, and the
// checkers that compare every answer with the oracle.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "base/random.h"
#include "cache_service/pump.h"
#include "tests/simulator/sim_transport.h"
#include "tests/simulator/world.h"

namespace kvant::sim {

// Single-owner.
class SimClient {
 public:
  SimClient(World* world, size_t number, size_t node, uint64_t seed);

  void Start();
  void Crash();
  bool alive() const { return connection_ != nullptr; }
  size_t node() const { return node_; }
  void Stall(TimePoint until) { stalled_until_ = until; }
  bool idle() const { return operations_.empty(); }
  // After the faults ended: puts and fetches fresh blocks on a shard until it works once.
  void BeginProbe(size_t shard);
  bool probing() const { return probe_shard_.has_value(); }

 private:
  struct Chain {
    size_t domain = 0;
    std::vector<BlockKey> keys;
  };
  struct Item {
    BlockKey key;
    size_t shard = 0;
    Selection selection;
    uint64_t offset = 0;
    uint64_t length = 0;
    std::set<uint16_t> missing;  // layers that have not arrived
    bool done = false;
    bool intact = false;  // ended ok and present
  };
  struct Stretch {
    uint64_t offset = 0;
    uint64_t length = 0;
  };
  struct Operation {
    enum class Kind : uint8_t { kLookup, kFetch, kPut, kPin, kStats };
    Kind kind = Kind::kLookup;
    TimePoint started{};
    TimePoint deadline{};
    std::optional<TimePoint> overdue_since{};  // first poll that found it overdue
    bool cancelled = false;
    bool probe = false;
    std::shared_ptr<Chain> chain{};
    std::shared_ptr<Lease> buffer{};
    std::vector<Item> items{};         // fetch
    std::vector<uint64_t> disorder{};  // by shard, when it started
    std::vector<uint64_t> lives{};     // by shard, when it started
    std::vector<bool> reachable{};     // by shard, when it started
    uint64_t damage = 0;               // World::Damage() when it started
    Duration keep{};                   // lookup: lease; pin: duration
    BlockKey key{};                    // put, pin
    size_t index = 0;                  // put: in the chain
    size_t shard = 0;                  // put, pin, stats
    std::vector<Stretch> announce{};   // put: not yet ready
    bool torn = false;                 // put
    bool abandoned = false;            // put
    bool foreign_manifest = false;     // put: sealed with another key's manifest
    bool sealed = false;               // put: SealPut was called
  };
  struct Quiet {  // memory that nobody may write
    std::shared_ptr<Lease> lease;
    TimePoint until;
  };
  struct Settled {  // a finished fetch whose bytes must stay as they are
    Operation operation;
    TimePoint until;
  };

  void Wake();
  void Run();
  void TickLater();
  void Work();
  void PollOnce();
  void StartSomething();
  void StartLookup(std::shared_ptr<Chain> chain, Duration lease);
  void StartFetch(const std::shared_ptr<Chain>& chain, size_t first, size_t last, bool probe);
  void StartPut(const std::shared_ptr<Chain>& chain, size_t index, bool probe);
  void StartPin();
  void AdvancePut(OpId id, Operation* put);
  void CancelSomething();
  void ProbeAgain();

  Operation MakeOperation(Operation::Kind kind, std::shared_ptr<Chain> chain);
  void Remember(OpId id, Operation operation);
  std::shared_ptr<Chain> MakeChain(size_t domain, uint64_t prompt, size_t blocks);
  std::shared_ptr<Chain> RandomChain();
  Selection RandomSelection(const BlockManifest& manifest);
  size_t OwnerOf(const Chain& chain, size_t index) const;

  void OnEvent(const ClientEvent& event);
  void OnLookup(Operation operation, const ClientEvent& event);
  void OnLayer(Operation* operation, const ClientEvent& event);
  void OnItem(Operation* operation, const ClientEvent& event);
  void OnFetch(Operation operation, const ClientEvent& event);
  void OnPut(Operation operation, const ClientEvent& event);
  void OnPin(Operation operation, const ClientEvent& event);
  void CheckItem(const Operation& operation, const Item& item, const char* when);
  void CheckStatus(const Operation& operation, const Status& status);
  void CheckDeadlines();
  void CheckMemory();
  // Nothing happened on the way to a shard since the operation started that would excuse it.
  bool Undisturbed(const Operation& operation, size_t shard) const;
  bool FetchOpen(const BlockKey& key) const;
  void Fail(const std::string& what);

  World* world_;
  size_t number_;
  size_t node_;
  Random random_;
  uint64_t life_ = 0;
  std::unique_ptr<SimTransport> transport_;
  std::unique_ptr<CacheConnection> connection_;
  bool awake_ = false;
  TimePoint stalled_until_{};
  std::map<OpId, Operation> operations_;
  std::vector<Quiet> quiet_;
  std::vector<Settled> settled_;
  std::set<BlockKey> fetched_once_;
  std::map<BlockKey, OpId> newest_lookup_;  // only its lease counts
  std::vector<ClientEvent> events_;
  std::optional<size_t> probe_shard_;
  uint64_t probe_prompt_ = 0;
  TimePoint probe_again_{};
};

}  // namespace kvant::sim
