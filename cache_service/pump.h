// The glue of production: carries events of a Transport to a state machine, and its actions back.
// Single thread, no clock but the one given; the simulator may use it with a simulated Transport.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "cache_service/actions.h"
#include "cache_service/cache_client.h"
#include "cache_service/shard_server.h"
#include "cluster/shard_map.h"
#include "transport/arena.h"
#include "transport/transport.h"

namespace kvant {

// Does actions in order for each endpoint and keeps what the transport refuses for now.
// Single-owner. Invariant: each transfer given is reported exactly once, by the transport or, when
// its endpoint is gone, through TakeFailed.
class ActionQueue {
 public:
  explicit ActionQueue(Transport* transport) : transport_(transport) {}
  // Moves actions in. An endpoint whose queue grows past kMaxQueuedBytes is closed: its peer does
  // not read.
  void Add(std::vector<Action>* actions);
  // Does what can be done now. True if anything was.
  bool Flush();
  // Appends kTransferDone events of transfers whose endpoint is gone.
  void TakeFailed(std::vector<Event>* events);
  void OnClosed(EndpointId endpoint);
  bool empty() const { return queues_.empty(); }

  static constexpr size_t kMaxQueuedBytes = size_t{64} << 20;

 private:
  struct Queue {
    std::deque<Action> actions;
    size_t message_bytes = 0;
  };
  bool FlushOne(EndpointId id, Queue* queue);
  // Submits the transfers at the queue's head; returns how many were taken.
  size_t SubmitRun(Endpoint* endpoint, Queue* queue);
  void Drop(Queue* queue);

  Transport* transport_;
  std::unordered_map<EndpointId, Queue> queues_;
  std::vector<Event> failed_;
};

// Serves a shard over a transport that listens already. Single-owner; borrows both.
class ServerPump {
 public:
  ServerPump(Transport* transport, ShardServer* server);
  // One round: polls, steps the server, acts. True if anything happened: the caller waits on the
  // transport only after a round without.
  bool Turn(TimePoint now);
  // The same with events that somebody else polled; leaves the vector empty.
  bool TurnWith(std::vector<Event>* events, TimePoint now);

 private:
  Transport* transport_;
  ShardServer* server_;
  ActionQueue queue_;
  std::vector<Event> events_;
  std::vector<Action> actions_;
  TimePoint next_tick_{};
};

struct CacheConnectionOptions {
  uint64_t arena_bytes = uint64_t{64} << 20;  // for buffers of fetches and puts
  Duration connect_timeout = std::chrono::seconds(2);
  // A shard that could not be reached is tried again after this, doubled up to the maximum.
  Duration reconnect_after = std::chrono::milliseconds(50);
  Duration reconnect_at_most = std::chrono::seconds(2);
  CacheClientOptions client{};
};

// What a node holds: the connection to all shards of a map. Owns arena and client; borrows
// the transport, which it may share with others in the same thread. Single-owner.
class CacheConnection {
 public:
  // Starts to connect to every shard; does not wait.
  static Result<std::unique_ptr<CacheConnection>> Create(Transport* transport, ShardMap map,
                                                         const Clock* clock,
                                                         CacheConnectionOptions options = {});
  ~CacheConnection();

  CacheClient& client() { return *client_; }
  const ShardMap& map() const { return client_->map(); }
  // A buffer for a fetch or put. kResourceExhausted: none free now; Poll until operations ended.
  Result<std::shared_ptr<Lease>> Lend(uint64_t bytes);

  // One round: polls the transport, steps the client, acts, reconnects, appends what happened.
  // Transport events of other endpoints go to `foreign`, or are lost if it is null.
  // True if anything happened.
  bool Poll(std::vector<ClientEvent>* events, std::vector<Event>* foreign = nullptr);
  // The same with transport events that somebody else polled; takes those of the client out.
  bool PollWith(std::vector<Event>* transport_events, std::vector<ClientEvent>* events);
  // Sends what the client was asked for since the last Poll, which would do so too, but may come
  // late. True if anything was sent.
  bool Flush();

  // Waits until every shard is reached or found unreachable. Returns how many are reached.
  size_t WaitConnected(Duration at_most);
  // For simple programs: start one operation, wait for it, `at_most` being its deadline. Events of
  // other operations meanwhile are kept for the next Poll; foreign transport events are lost.
  Result<ClientEvent> LookupBlocking(std::span<const BlockKey> chain, Duration at_most);
  // Returns the kItemDone events in order of the items.
  Result<std::vector<ClientEvent>> FetchBlocking(FetchRequest request, Duration at_most);
  // The buffer holds the payload. True if stored, false if it was there already or somebody else is
  // writing it.
  Result<bool> PutBlocking(PutRequest request, const BlockManifest& manifest, Duration at_most);

 private:
  struct ShardLink {
    EndpointId endpoint = 0;
    bool connecting = false;
    TimePoint retry_at{};
    Duration backoff{};
  };
  CacheConnection(Transport* transport, ShardMap map, const Clock* clock,
                  CacheConnectionOptions options, std::unique_ptr<RegisteredArena> arena);
  void Connect(size_t shard, TimePoint now);
  void Backoff(ShardLink* link, TimePoint now);
  // True if the event was about a connection coming or going.
  bool OnLinkEvent(const Event& event, TimePoint now);
  // Polls until the done event of `op`; collects all its events.
  Status RunUntil(OpId op, Duration at_most, std::vector<ClientEvent>* of_op);

  Transport* transport_;
  const Clock* clock_;
  CacheConnectionOptions options_;
  std::unique_ptr<RegisteredArena> arena_;
  std::unique_ptr<CacheClient> client_;
  std::vector<ShardLink> links_;
  ActionQueue queue_;
  std::vector<Event> events_;
  std::vector<Action> actions_;
  std::vector<ClientEvent> kept_;
  TimePoint next_tick_{};
};

}  // namespace kvant
