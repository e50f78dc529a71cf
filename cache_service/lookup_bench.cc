#include "cache_service/lookup_bench.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>
#include <unordered_map>

#include "base/random.h"
#include "cache_service/pump.h"
#include "cache_service/shard_host.h"
#include "cluster/shard_map.h"
#include "transport/loopback.h"
#include "transport/shm.h"

namespace kvant {
namespace {

constexpr size_t kBlockBytes = 64;
constexpr Duration kPatience = std::chrono::seconds(10);

std::vector<BlockKey> RandomKeys(size_t count) {
  Random random(1);
  std::vector<BlockKey> keys(count);
  for (BlockKey& key : keys) {
    for (std::byte& byte : key.bytes) byte = static_cast<std::byte>(random.Next());
  }
  return keys;
}

// Keeps operations going: `start` begins one, an event of `done` ends it.
class Client {
 public:
  Client(CacheConnection* connection, std::function<void()> other_turn)
      : connection_(*connection), other_turn_(std::move(other_turn)) {}

  // Until `finished()` says so and nothing is under way.
  Status Run(size_t outstanding, ClientEvent::Kind done, const std::function<Result<OpId>()>& start,
             const std::function<bool()>& finished, std::vector<double>* latencies_us) {
    std::unordered_map<OpId, TimePoint> under_way;
    std::vector<ClientEvent> events;
    TimePoint last = SteadyClock().Now();
    while (!under_way.empty() || !finished()) {
      while (under_way.size() < outstanding && !finished()) {
        KV_ASSIGN_OR_RETURN(const OpId op, start());
        under_way.emplace(op, SteadyClock().Now());
      }
      events.clear();
      const bool found = connection_.Poll(&events);
      if (other_turn_) {
        other_turn_();
      } else if (!found) {
        std::this_thread::yield();
      }
      const TimePoint now = SteadyClock().Now();
      for (const ClientEvent& event : events) {
        if (event.kind != done) continue;
        KV_RETURN_IF_ERROR(event.status);
        const auto begun = under_way.find(event.op);
        if (begun == under_way.end()) continue;
        latencies_us->push_back(Seconds(now - begun->second) * 1e6);
        under_way.erase(begun);
        last = now;
      }
      if (now - last > kPatience) return Unavailable("the lookup bench: the shard does not answer");
    }
    return OkStatus();
  }

 private:
  CacheConnection& connection_;
  std::function<void()> other_turn_;
};

// `turn` gives a server on this thread its turn.
Status RunRows(std::string_view name, Transport* transport, const std::string& address,
               const std::function<void()>& turn, const LookupBenchOptions& options,
               std::vector<LookupBenchRow>* rows) {
  KV_ASSIGN_OR_RETURN(ShardMap map, ShardMap::Make(kStaticEpoch, {Shard{address}}));
  KV_ASSIGN_OR_RETURN(const auto connection,
                      CacheConnection::Create(transport, std::move(map), &SteadyClock()));
  const TimePoint begun = SteadyClock().Now();
  std::vector<ClientEvent> ignored;
  while (!connection->client().Reachable(0)) {
    connection->Poll(&ignored);
    if (turn) turn();
    if (SteadyClock().Now() - begun > kPatience)
      return Unavailable("the lookup bench: the shard can't be reached");
  }
  Client client(connection.get(), turn);
  CacheClient& cache = connection->client();
  const std::vector<BlockKey> keys =
      RandomKeys(*std::max_element(options.stored.begin(), options.stored.end()));
  size_t stored = 0;
  for (const size_t wanted : options.stored) {
    std::vector<double> latencies;
    const auto put = [&]() -> Result<OpId> {
      const size_t i = stored++;
      KV_ASSIGN_OR_RETURN(std::shared_ptr<Lease> buffer, connection->Lend(kBlockBytes));
      std::fill(buffer->bytes().begin(), buffer->bytes().end(), std::byte{7});
      BlockManifest manifest;
      manifest.key = keys[i];
      manifest.codec = 2;
      manifest.token_count = 64;
      manifest.Append(0, 0, 0, 0, buffer->bytes(), 0);
      const TimePoint now = SteadyClock().Now();
      // Chains of as many blocks as a lookup asks for.
      const OpId op = cache.BeginPut({.key = keys[i],
                                      .parent = i % options.chain == 0 ? BlockKey{} : keys[i - 1],
                                      .run = 0,
                                      .payload_bytes = kBlockBytes,
                                      .manifest_rows = 1,
                                      .buffer = buffer,
                                      .deadline = now + kPatience},
                                     now);
      cache.PutReady(op, 0, kBlockBytes, now);
      cache.SealPut(op, manifest, now);
      return op;
    };
    KV_RETURN_IF_ERROR(client.Run(
        1, ClientEvent::Kind::kPutDone, put, [&] { return stored >= wanted; }, &latencies));

    Random random(2);
    const auto lookup = [&]() -> Result<OpId> {
      const size_t first = random.Below(wanted / options.chain) * options.chain;
      const TimePoint now = SteadyClock().Now();
      return cache.Lookup(std::span(keys).subspan(first, options.chain), Duration{},
                          now + kPatience, now);
    };
    latencies.clear();
    const TimePoint start = SteadyClock().Now();
    const auto over = [&] { return SteadyClock().Now() - start >= options.time_per_row; };
    KV_RETURN_IF_ERROR(
        client.Run(options.outstanding, ClientEvent::Kind::kLookupDone, lookup, over, &latencies));
    LookupBenchRow row;
    row.transport = name;
    row.stored = wanted;
    row.keys_per_s = static_cast<double>(latencies.size() * options.chain) /
                     Seconds(SteadyClock().Now() - start);
    const auto middle = latencies.begin() + static_cast<ptrdiff_t>(latencies.size() / 2);
    std::nth_element(latencies.begin(), middle, latencies.end());
    row.lookup_us_p50 = *middle;
    rows->push_back(row);
  }
  return OkStatus();
}

ShardHostOptions HostOptions(const LookupBenchOptions& options) {
  // Room for all of them, with what a block costs besides its payload.
  const size_t most = *std::max_element(options.stored.begin(), options.stored.end());
  return {.memory_bytes = (uint64_t{16} << 20) + most * 4096, .expected_block_bytes = 1024};
}

Status OverLoopback(const LookupBenchOptions& options, std::vector<LookupBenchRow>* rows) {
  LoopbackHub hub;
  const auto theirs = hub.MakeTransport();
  const auto ours = hub.MakeTransport();
  KV_ASSIGN_OR_RETURN(const std::string address, theirs->Listen("loopback:lookups"));
  KV_ASSIGN_OR_RETURN(const auto host, ShardHost::Create(theirs.get(), HostOptions(options)));
  return RunRows(
      "loopback", ours.get(), address, [&] { host->Turn(SteadyClock().Now()); }, options, rows);
}

Status OverShm(const LookupBenchOptions& options, std::vector<LookupBenchRow>* rows) {
  KV_ASSIGN_OR_RETURN(const auto theirs, MakeShmTransport({}));
  KV_ASSIGN_OR_RETURN(const auto ours, MakeShmTransport({}));
  KV_ASSIGN_OR_RETURN(const std::string address,
                      theirs->Listen(fmt::format("shm:lookups-{:x}", SecureRandomUint64())));
  KV_ASSIGN_OR_RETURN(const auto host, ShardHost::Create(theirs.get(), HostOptions(options)));
  std::atomic<bool> stop = false;
  // The one owner of the server's side until the join.
  std::thread server([&] {
    while (!stop) {
      if (!host->Turn(SteadyClock().Now())) theirs->Wait(std::chrono::milliseconds(1));
    }
  });
  const Status status = RunRows("shm", ours.get(), address, {}, options, rows);
  stop = true;
  server.join();
  return status;
}

}  // namespace

Result<std::vector<LookupBenchRow>> RunLookupBench(const LookupBenchOptions& options) {
  const bool valid =
      options.chain > 0 && options.outstanding > 0 && !options.stored.empty() &&
      *std::min_element(options.stored.begin(), options.stored.end()) >= options.chain &&
      std::is_sorted(options.stored.begin(), options.stored.end());
  if (!valid) {
    return InvalidArgument(
        "the lookup bench: give ascending numbers of stored blocks, at least a chain of them");
  }
  std::vector<LookupBenchRow> rows;
  KV_RETURN_IF_ERROR(OverLoopback(options, &rows));
  KV_RETURN_IF_ERROR(OverShm(options, &rows));
  return rows;
}

}  // namespace kvant
