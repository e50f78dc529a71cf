#include "cache_service/pump.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace kvant {
namespace {
constexpr Duration kServerTick = std::chrono::milliseconds(50);
constexpr Duration kClientTick = std::chrono::milliseconds(5);
// Transfers handed to Submit at once.
constexpr size_t kBatch = 16;
}  // namespace

// ---- ActionQueue.

void ActionQueue::Add(std::vector<Action>* actions) {
  for (Action& action : *actions) {
    Queue& queue = queues_[action.endpoint];
    queue.message_bytes += action.message.size();
    queue.actions.push_back(std::move(action));
  }
  actions->clear();
}

bool ActionQueue::Flush() {
  bool progress = false;
  for (auto it = queues_.begin(); it != queues_.end();) {
    progress = FlushOne(it->first, &it->second) || progress;
    it = it->second.actions.empty() ? queues_.erase(it) : std::next(it);
  }
  return progress;
}

bool ActionQueue::FlushOne(EndpointId id, Queue* queue) {
  Endpoint* endpoint = transport_->Find(id);
  if (endpoint == nullptr) {
    Drop(queue);
    return true;
  }
  if (queue->message_bytes > kMaxQueuedBytes) {
    endpoint->Close();
    Drop(queue);
    return true;
  }
  bool progress = false;
  while (!queue->actions.empty()) {
    Action& action = queue->actions.front();
    if (action.kind == Action::Kind::kTransfer) {
      const size_t accepted = SubmitRun(endpoint, queue);
      progress = progress || accepted > 0;
      if (accepted == 0) return progress;
      continue;
    }
    if (action.kind == Action::Kind::kClose) {
      endpoint->Close();
      Drop(queue);
      return true;
    }
    // Anything but back-pressure is final: the endpoint is closed and says so itself.
    if (endpoint->Send(action.message).code() == StatusCode::kResourceExhausted) return progress;
    queue->message_bytes -= action.message.size();
    queue->actions.pop_front();
    progress = true;
  }
  return progress;
}

size_t ActionQueue::SubmitRun(Endpoint* endpoint, Queue* queue) {
  Transfer batch[kBatch];
  size_t count = 0;
  for (const Action& action : queue->actions) {
    if (action.kind != Action::Kind::kTransfer || count == kBatch) break;
    batch[count++] = action.transfer;
  }
  const size_t accepted = endpoint->Submit(std::span(batch, count));
  KV_CHECK(accepted <= count);
  queue->actions.erase(queue->actions.begin(),
                       queue->actions.begin() + static_cast<ptrdiff_t>(accepted));
  return accepted;
}

void ActionQueue::Drop(Queue* queue) {
  for (const Action& action : queue->actions) {
    if (action.kind != Action::Kind::kTransfer) continue;
    Event event;
    event.kind = Event::Kind::kTransferDone;
    event.endpoint = action.endpoint;
    event.cookie = action.transfer.cookie;
    event.status = Unavailable("a transfer was to be submitted on an endpoint that is closed");
    failed_.push_back(std::move(event));
  }
  queue->actions.clear();
  queue->message_bytes = 0;
}

void ActionQueue::OnClosed(EndpointId endpoint) {
  const auto found = queues_.find(endpoint);
  if (found == queues_.end()) return;
  Drop(&found->second);
  queues_.erase(found);
}

void ActionQueue::TakeFailed(std::vector<Event>* events) {
  std::move(failed_.begin(), failed_.end(), std::back_inserter(*events));
  failed_.clear();
}

// ---- ServerPump.

ServerPump::ServerPump(Transport* transport, ShardServer* server)
    : transport_(transport), server_(server), queue_(transport) {}

bool ServerPump::Turn(TimePoint now) {
  events_.clear();
  transport_->Poll(&events_);
  return TurnWith(&events_, now);
}

bool ServerPump::TurnWith(std::vector<Event>* events, TimePoint now) {
  bool progress = !events->empty();
  queue_.TakeFailed(events);
  for (const Event& event : *events) {
    if (event.kind == Event::Kind::kClosed) queue_.OnClosed(event.endpoint);
    server_->OnEvent(event, now);
  }
  events->clear();
  if (now >= next_tick_) {
    server_->Tick(now);
    next_tick_ = now + kServerTick;
  }
  server_->TakeActions(&actions_);
  queue_.Add(&actions_);
  return queue_.Flush() || progress;
}

// ---- CacheConnection.

Result<std::unique_ptr<CacheConnection>> CacheConnection::Create(Transport* transport, ShardMap map,
                                                                 const Clock* clock,
                                                                 CacheConnectionOptions options) {
  ArenaOptions arena_options;
  arena_options.bytes = options.arena_bytes;
  KV_ASSIGN_OR_RETURN(auto arena, RegisteredArena::Create(transport, arena_options));
  std::unique_ptr<CacheConnection> connection(
      new CacheConnection(transport, std::move(map), clock, std::move(options), std::move(arena)));
  const TimePoint now = clock->Now();
  for (size_t shard = 0; shard < connection->links_.size(); ++shard) {
    connection->Connect(shard, now);
  }
  return connection;
}

CacheConnection::CacheConnection(Transport* transport, ShardMap map, const Clock* clock,
                                 CacheConnectionOptions options,
                                 std::unique_ptr<RegisteredArena> arena)
    : transport_(transport),
      clock_(clock),
      options_(std::move(options)),
      arena_(std::move(arena)),
      links_(map.size()),
      queue_(transport) {
  client_ = std::make_unique<CacheClient>(std::move(map), arena_.get(), options_.client);
}

CacheConnection::~CacheConnection() {
  for (const ShardLink& link : links_) {
    Endpoint* endpoint = link.endpoint == 0 ? nullptr : transport_->Find(link.endpoint);
    if (endpoint != nullptr) endpoint->Close();
  }
}

Result<std::shared_ptr<Lease>> CacheConnection::Lend(uint64_t bytes) {
  KV_ASSIGN_OR_RETURN(Lease lease, arena_->Lend(bytes));
  return std::make_shared<Lease>(std::move(lease));
}

void CacheConnection::Connect(size_t shard, TimePoint now) {
  ShardLink& link = links_[shard];
  const Result<Endpoint*> endpoint =
      transport_->Connect(client_->map().shards()[shard].address, options_.connect_timeout);
  if (!endpoint.ok()) {
    Backoff(&link, now);
    return;
  }
  link.endpoint = (*endpoint)->id();
  link.connecting = true;
}

void CacheConnection::Backoff(ShardLink* link, TimePoint now) {
  link->endpoint = 0;
  link->connecting = false;
  link->backoff = link->backoff == Duration::zero()
                      ? options_.reconnect_after
                      : std::min(2 * link->backoff, options_.reconnect_at_most);
  link->retry_at = now + link->backoff;
}

bool CacheConnection::OnLinkEvent(const Event& event, TimePoint now) {
  for (size_t shard = 0; shard < links_.size(); ++shard) {
    ShardLink& link = links_[shard];
    if (link.endpoint != event.endpoint || link.endpoint == 0) continue;
    if (event.kind == Event::Kind::kConnected) {
      link.connecting = false;
      link.backoff = Duration::zero();
      client_->BindShard(shard, event.endpoint, now);
      return true;
    }
    if (event.kind == Event::Kind::kClosed) {
      queue_.OnClosed(event.endpoint);
      client_->OnEvent(event, now);
      Backoff(&link, now);
      return true;
    }
  }
  return false;
}

bool CacheConnection::Poll(std::vector<ClientEvent>* events, std::vector<Event>* foreign) {
  events_.clear();
  transport_->Poll(&events_);
  const bool progress = PollWith(&events_, events);
  if (foreign != nullptr) {
    std::move(events_.begin(), events_.end(), std::back_inserter(*foreign));
  }
  events_.clear();
  return progress;
}

bool CacheConnection::PollWith(std::vector<Event>* transport_events,
                               std::vector<ClientEvent>* events) {
  const TimePoint now = clock_->Now();
  const size_t before = transport_events->size();
  const size_t had = events->size();
  std::erase_if(*transport_events, [&](const Event& event) {
    return OnLinkEvent(event, now) || client_->OnEvent(event, now);
  });
  bool progress = transport_events->size() != before;
  for (size_t shard = 0; shard < links_.size(); ++shard) {
    if (links_[shard].endpoint == 0 && links_[shard].retry_at <= now) Connect(shard, now);
  }
  if (now >= next_tick_) {
    client_->Tick(now);
    next_tick_ = now + kClientTick;
  }
  progress = Flush() || progress;
  std::move(kept_.begin(), kept_.end(), std::back_inserter(*events));
  kept_.clear();
  client_->TakeEvents(events);
  return progress || events->size() != had;
}

bool CacheConnection::Flush() {
  client_->TakeActions(&actions_);
  queue_.Add(&actions_);
  return queue_.Flush();
}

size_t CacheConnection::WaitConnected(Duration at_most) {
  const TimePoint deadline = clock_->Now() + at_most;
  while (true) {
    const bool connecting = std::any_of(links_.begin(), links_.end(),
                                        [](const ShardLink& link) { return link.connecting; });
    const TimePoint now = clock_->Now();
    if (!connecting || now >= deadline) break;
    std::vector<ClientEvent> events;
    if (!Poll(&events)) transport_->Wait(std::min<Duration>(deadline - now, kClientTick));
    std::move(events.begin(), events.end(), std::back_inserter(kept_));
  }
  size_t reached = 0;
  for (size_t shard = 0; shard < links_.size(); ++shard) reached += client_->Reachable(shard);
  return reached;
}

Status CacheConnection::RunUntil(OpId op, Duration at_most, std::vector<ClientEvent>* of_op) {
  // The operation's own deadline ends it; this one only guards against a clock that stands still.
  const TimePoint deadline = clock_->Now() + at_most + std::chrono::seconds(1);
  std::vector<ClientEvent> others;
  bool done = false;
  Status status;
  while (!done) {
    if (clock_->Now() >= deadline) {
      status = MakeStatus(StatusCode::kDeadlineExceeded, "operation {} did not end in time", op);
      break;
    }
    std::vector<ClientEvent> events;
    const bool progress = Poll(&events);
    for (ClientEvent& event : events) {
      if (event.op != op) {
        others.push_back(std::move(event));
        continue;
      }
      using Kind = ClientEvent::Kind;
      done = done || (event.kind != Kind::kLayerArrived && event.kind != Kind::kItemDone);
      of_op->push_back(std::move(event));
    }
    if (!done && !progress) transport_->Wait(kClientTick);
  }
  kept_ = std::move(others);
  return status;
}

Result<ClientEvent> CacheConnection::LookupBlocking(std::span<const BlockKey> chain,
                                                    Duration at_most) {
  const TimePoint now = clock_->Now();
  const OpId op = client_->Lookup(chain, Duration::zero(), now + at_most, now);
  std::vector<ClientEvent> events;
  KV_RETURN_IF_ERROR(RunUntil(op, at_most, &events));
  KV_RETURN_IF_ERROR(events.back().status);
  return std::move(events.back());
}

Result<std::vector<ClientEvent>> CacheConnection::FetchBlocking(FetchRequest request,
                                                                Duration at_most) {
  const TimePoint now = clock_->Now();
  std::vector<ClientEvent> items(request.items.size());
  request.deadline = now + at_most;
  const OpId op = client_->Fetch(std::move(request), now);
  std::vector<ClientEvent> events;
  KV_RETURN_IF_ERROR(RunUntil(op, at_most, &events));
  for (ClientEvent& event : events) {
    if (event.kind == ClientEvent::Kind::kItemDone) items[event.item] = std::move(event);
  }
  return items;
}

Result<bool> CacheConnection::PutBlocking(PutRequest request, const BlockManifest& manifest,
                                          Duration at_most) {
  const TimePoint now = clock_->Now();
  request.deadline = now + at_most;
  const OpId op = client_->BeginPut(request, now);
  client_->SealPut(op, manifest, now);
  std::vector<ClientEvent> events;
  KV_RETURN_IF_ERROR(RunUntil(op, at_most, &events));
  KV_RETURN_IF_ERROR(events.back().status);
  return !events.back().already_there;
}

}  // namespace kvant
