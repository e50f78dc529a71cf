// What a shard server remembers: sessions, fetches, puts. Not part of its interface.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "cache_service/interval_set.h"
#include "cache_service/shard_server.h"
#include "cache_service/wire.h"

namespace kvant {

// A request beyond what one client may have.
inline Status BusyStatus(std::string_view what, size_t limit) {
  return MakeStatus(StatusCode::kResourceExhausted,
                    "this client already has {} {}; wait for some of them to end", limit, what);
}
// Untrusted milliseconds as a duration.
inline Duration CappedMs(uint64_t ms, Duration at_most) {
  return std::min<Duration>(std::chrono::milliseconds(std::min<uint64_t>(ms, UINT32_MAX)), at_most);
}

// Single-owner, as ShardServer. shard_server.cc has messages and sessions, shard_fetch.cc and
// shard_put.cc the two directions of bulk bytes.
class ShardServer::Impl {
 public:
  explicit Impl(const ShardServerOptions& options)
      : options_(options), store_(WithFaults(options)) {}

  void OnEvent(const Event& event, TimePoint now);
  void Tick(TimePoint now);
  void TakeActions(std::vector<Action>* out);
  ServerStats stats() const;
  BlockStore& store() { return store_; }

 private:
  // One block of a fetch, pinned until its last transfer is done.
  struct Item {
    PinId pin = 0;
    std::span<std::byte> payload;
    uint64_t offset = 0;  // of the destination in the window
    uint32_t immediate_base = 0;
    uint16_t layer_begin = 0;
    size_t remaining = 0;  // transfers not done, submitted or not
    bool failed = false;
  };
  struct Planned {
    uint32_t item = 0;
    SelectedRange range;
  };
  struct Fetch {
    uint64_t request_id = 0;
    RemoteWindow window;
    TimePoint deadline{};
    std::vector<Item> items;
    std::vector<Planned> plan;  // layer-major across the items
    size_t next = 0;            // of the plan
    size_t outstanding = 0;
  };
  struct Put {
    BlockKey key;
    ReservationId reservation = 0;
    RemoteWindow window;
    std::span<std::byte> payload;
    TimePoint deadline{};
    IntervalSet asked;  // stretches that were read or are queued to be
    std::deque<Interval> queued;
    size_t outstanding = 0;
    bool sealing = false;
    std::vector<std::byte> manifest;
  };
  struct Lease {
    PinId pin = 0;
    TimePoint deadline{};
  };
  struct Session {
    std::string name;
    std::map<uint64_t, Fetch> fetches;  // by arrival: see fetch_order
    std::deque<uint64_t> fetch_order;   // of those with something left to submit
    uint64_t newest_fetch = 0;          // the largest id of a Fetch so far
    std::map<uint64_t, Put> puts;
    std::map<BlockKey, Lease> leases;
    size_t outstanding = 0;
  };
  struct InFlight {
    EndpointId endpoint = 0;
    uint64_t request_id = 0;
    uint32_t item = 0;
    ReservationId reservation = 0;  // 0: a fetch
    uint64_t bytes = 0;
  };

  static BlockStoreOptions WithFaults(const ShardServerOptions& options) {
    BlockStoreOptions store = options.store;
    store.fault_skip_verification =
        options.faults.skip_checksum_verification || options.faults.seal_before_landed;
    store.fault_ignore_pins = options.faults.ignore_lease_in_eviction;
    return store;
  }

  wire::Envelope Answer(uint64_t request_id) const;
  void Send(EndpointId endpoint, const wire::Envelope& envelope);
  void SendDone(EndpointId endpoint, uint64_t request_id, const Status& status);
  void SendPut(EndpointId endpoint, uint64_t put, wire::PutReply::Phase phase,
               const Status& status = OkStatus());

  void OnMessage(EndpointId endpoint, Session* session, std::span<const std::byte> bytes,
                 TimePoint now);
  void Dispatch(EndpointId endpoint, Session* session, const wire::Envelope& request,
                TimePoint now);
  void OnHello(EndpointId endpoint, Session* session, const wire::Envelope& request);
  void OnLookup(EndpointId endpoint, Session* session, const wire::Envelope& request,
                TimePoint now);
  void OnFetch(EndpointId endpoint, Session* session, const wire::Envelope& request, TimePoint now);
  Status CheckFetch(const Session& session, const wire::Fetch& fetch) const;
  // Fills one item and its part of the plan; says in `reply` what became of it.
  void PlanItem(EndpointId endpoint, Session* session, const wire::Fetch& request, uint32_t index,
                Fetch* fetch, wire::FetchItemReply* reply);
  void OnReserve(EndpointId endpoint, Session* session, const wire::Envelope& request,
                 TimePoint now);
  void OnPutRanges(EndpointId endpoint, Session* session, const wire::Envelope& request);
  void OnSeal(EndpointId endpoint, Session* session, const wire::Envelope& request);
  void OnPin(EndpointId endpoint, const wire::Envelope& request, TimePoint now);
  void OnReport(const wire::ReportCorrupt& report);

  void Lend(EndpointId endpoint, Session* session, const BlockKey& key, TimePoint deadline);
  void DropLease(Session* session, const BlockKey& key);
  // Submits what may be submitted for this client.
  void Advance(EndpointId endpoint, Session* session);
  bool SubmitRead(EndpointId endpoint, Session* session);
  bool SubmitWrite(EndpointId endpoint, Session* session);
  void Submit(EndpointId endpoint, Session* session, const Transfer& transfer,
              const InFlight& in_flight);
  void OnTransferDone(uint64_t cookie, const Status& status);
  void OnWriteDone(const InFlight& done, Session* session, const Status& status);
  void OnReadDone(const InFlight& done, Session* session, const Status& status);
  void FailItem(EndpointId endpoint, Fetch* fetch, uint32_t item, const Status& status);
  void ItemStep(Fetch* fetch, uint32_t item);
  void EndFetchIfDone(Session* session, uint64_t request_id);
  // Publishes if the client asked for it and everything has landed.
  void SealIfLanded(EndpointId endpoint, Session* session, uint64_t put_id);
  void FailPut(EndpointId endpoint, Session* session, uint64_t put_id, const Status& status);
  void EndSession(EndpointId endpoint);

  ShardServerOptions options_;
  BlockStore store_;
  std::map<EndpointId, Session> sessions_;
  std::unordered_map<uint64_t, InFlight> in_flight_;
  std::vector<Action> actions_;
  uint64_t next_cookie_ = 1;
  size_t queued_ranges_ = 0;
  ServerStats stats_;
};

}  // namespace kvant
