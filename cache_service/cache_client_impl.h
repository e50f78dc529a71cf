// What a cache client remembers: operations and the requests they wait for. Not part of its
// interface.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cache_service/arriving_block.h"
#include "cache_service/cache_client.h"
#include "cache_service/wire.h"

namespace kvant {

// A duration as it travels: whole milliseconds, at least one.
inline uint32_t WholeMs(Duration duration) {
  const auto ms = std::chrono::ceil<std::chrono::milliseconds>(duration).count();
  return static_cast<uint32_t>(std::clamp<int64_t>(ms, 1, UINT32_MAX));
}

// Single-owner, as CacheClient. cache_client.cc has shards, lookups and deadlines, client_fetch.cc
// and client_put.cc the two directions of bulk bytes.
class CacheClient::Impl {
 public:
  Impl(ShardMap map, RegisteredArena* arena, CacheClientOptions options)
      : map_(std::move(map)),
        arena_(arena),
        options_(std::move(options)),
        endpoints_(map_.size(), 0) {}

  void BindShard(size_t shard, EndpointId endpoint, TimePoint now);
  bool Reachable(size_t shard) const { return endpoints_[shard] != 0; }
  const ShardMap& map() const { return map_; }
  OpId Lookup(std::span<const BlockKey> chain, Duration lease, TimePoint deadline, TimePoint now);
  OpId Fetch(FetchRequest request, TimePoint now);
  OpId BeginPut(const PutRequest& request, TimePoint now);
  void PutReady(OpId op, uint64_t payload_offset, uint64_t length, TimePoint now);
  void SealPut(OpId op, const BlockManifest& manifest, TimePoint now);
  void Cancel(OpId op, TimePoint now);
  OpId Pin(const BlockKey& key, uint64_t run, Duration duration, TimePoint deadline, TimePoint now);
  OpId Stats(size_t shard, TimePoint deadline, TimePoint now);
  void ReportCorrupt(const BlockKey& key, uint64_t run, TimePoint now);
  bool OnEvent(const Event& event, TimePoint now);
  void Tick(TimePoint now);
  void TakeActions(std::vector<Action>* out);
  void TakeEvents(std::vector<ClientEvent>* out);
  size_t open_operations() const {
    return lookups_.size() + fetches_.size() + puts_.size() + calls_.size();
  }
  const ClientStats& stats() const { return stats_; }

 private:
  // A message on its way, or answered in pieces: what the answer is about.
  struct Request {
    enum class Kind : uint8_t { kLookup, kFetch, kPut, kCall } kind = Kind::kLookup;
    OpId op = 0;
    size_t shard = 0;
  };
  struct LookupOp {
    TimePoint deadline{};
    std::vector<LookupBlock> blocks;
    Status status;
    std::map<uint64_t, std::vector<size_t>> waiting;  // request to indices of its keys
  };
  struct FetchPart {
    std::vector<size_t> items;         // of the operation
    std::vector<uint32_t> immediates;  // base by item of the part, increasing
    EndpointId endpoint = 0;
    ExposedWindow window;
    size_t open = 0;  // items not ended
  };
  struct FetchOp {
    FetchRequest request;
    std::vector<ArrivingBlock> blocks;  // by item
    std::vector<bool> ended;            // by item
    size_t open = 0;
    Status status;
    std::map<uint64_t, FetchPart> parts;  // by request
  };
  struct PutOp {
    PutRequest request;
    size_t shard = 0;
    uint64_t request_id = 0;
    bool reserved = false;
    bool sealing = false;
    std::vector<std::pair<uint64_t, uint64_t>> ready;  // offset, length; not announced yet
    ExposedWindow window;
  };
  struct CallOp {
    TimePoint deadline{};
    uint64_t request_id = 0;
    ClientEvent::Kind event = ClientEvent::Kind::kPinDone;
  };

  uint64_t NewRequest(Request::Kind kind, OpId op, size_t shard);
  wire::Envelope Ask(uint64_t request_id, TimePoint deadline, TimePoint now) const;
  void Send(size_t shard, const wire::Envelope& envelope);
  Status Unreachable(size_t shard) const;
  // A window onto the first `length` bytes of a buffer for a shard. kUnavailable names the shard,
  // also where the transport knows before we do that it is gone.
  Result<ExposedWindow> Expose(const Lease& buffer, size_t shard, uint64_t length, Access access);

  void OnMessage(size_t shard, std::span<const std::byte> bytes, TimePoint now);
  void OnRefused(uint64_t request_id, const Request& request, const Status& status);
  void OnClosed(EndpointId endpoint);
  bool OnWritten(const Event& event, TimePoint now);

  void OnLookupReply(uint64_t request_id, const Request& request, const wire::LookupReply& reply);
  // status not ok: those keys stay kUnreachable; the caller hears of it only if it can do
  // something.
  void EndLookupPart(uint64_t request_id, OpId op, const Status& status);
  void EndLookup(OpId op, const Status& status);

  void StartPart(OpId op, FetchOp* fetch, size_t shard, std::vector<size_t> items, TimePoint now);
  void OnFetchReply(uint64_t request_id, const Request& request, const wire::FetchReply& reply,
                    TimePoint now);
  void OnFetchItem(FetchOp* fetch, OpId op, FetchPart* part, size_t item,
                   const wire::FetchItemReply& reply, TimePoint now);
  void ReportLayers(FetchOp* fetch, OpId op, FetchPart* part, size_t item, TimePoint now);
  void EndItem(FetchOp* fetch, OpId op, FetchPart* part, size_t item, const Status& status,
               bool present);
  void EndPart(FetchOp* fetch, OpId op, uint64_t request_id, const Status& status);
  void EndFetchIfDone(OpId op);
  void EndFetch(OpId op, const Status& status);

  void OnPutReply(const Request& request, const wire::PutReply& reply, TimePoint now);
  void SendReady(PutOp* put, TimePoint now);
  void SendSeal(const PutOp& put, const BlockManifest& manifest, TimePoint now);
  void EndPut(OpId op, const Status& status, bool already_there, bool tell_shard, TimePoint now);

  void EndCall(OpId op, const Status& status, std::string text);
  ClientEvent& Report(ClientEvent::Kind kind, OpId op, Status status);

  ShardMap map_;
  RegisteredArena* arena_;
  CacheClientOptions options_;
  std::vector<EndpointId> endpoints_;  // by shard, 0: not reached
  std::map<EndpointId, size_t> shard_of_;
  std::map<uint64_t, Request> requests_;
  std::map<std::pair<EndpointId, uint64_t>, uint64_t> windows_;  // of fetches, to their request
  std::map<OpId, LookupOp> lookups_;
  std::map<OpId, FetchOp> fetches_;
  std::map<OpId, PutOp> puts_;
  std::map<OpId, CallOp> calls_;
  std::vector<Action> actions_;
  std::vector<ClientEvent> events_;
  uint64_t next_op_ = 1;
  uint64_t next_request_ = 1;
  ClientStats stats_;
};

}  // namespace kvant
