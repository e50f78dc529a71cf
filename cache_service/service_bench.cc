#include "cache_service/service_bench.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>
#include <unordered_map>

#include "base/random.h"
#include "cache_service/pump.h"
#include "cache_service/shard_host.h"
#include "cluster/shard_map.h"
#include "transport/factory.h"

namespace kvant {
namespace {

constexpr uint64_t kSmallBlock = 64;
constexpr size_t kBlocksToGet = 64;  // of each size, got at random
constexpr Duration kPatience = std::chrono::seconds(10);

// One client's operations at one shard, which may need a turn on this thread.
class Bench {
 public:
  static Result<std::unique_ptr<Bench>> Connect(Transport* transport, const std::string& address,
                                                std::function<void()> server_turn,
                                                const ServiceBenchOptions& options) {
    KV_ASSIGN_OR_RETURN(ShardMap map, ShardMap::Make(kStaticEpoch, {Shard{address}}));
    std::unique_ptr<Bench> bench(new Bench(options, std::move(server_turn)));
    KV_ASSIGN_OR_RETURN(bench->connection_,
                        CacheConnection::Create(transport, std::move(map), &SteadyClock()));
    bench->transport_ = transport;
    const TimePoint begun = SteadyClock().Now();
    while (!bench->cache().Reachable(0)) {
      bench->Turn();
      if (SteadyClock().Now() - begun > kPatience)
        return Unavailable("the service bench: the shard can't be reached");
    }
    return bench;
  }

  // Rows of lookups while ever more small blocks are stored.
  Status Lookups(std::vector<ServiceBenchRow>* rows) {
    std::vector<BlockKey> keys;
    for (const size_t wanted : options_.stored) {
      std::vector<double> ignored;
      const auto put = [&]() -> Result<OpId> {
        const size_t i = keys.size();
        keys.push_back(NewKey());
        // Chains of as many blocks as a lookup asks for.
        return Put(keys[i], i % options_.chain == 0 ? BlockKey{} : keys[i - 1], kSmallBlock);
      };
      KV_RETURN_IF_ERROR(Run(
          1, ClientEvent::Kind::kPutDone, put, [&] { return keys.size() >= wanted; }, &ignored));
      const auto lookup = [&]() -> Result<OpId> {
        const size_t first = random_.Below(wanted / options_.chain) * options_.chain;
        const TimePoint now = SteadyClock().Now();
        return cache().Lookup(std::span(keys).subspan(first, options_.chain), Duration{},
                              now + kPatience, now);
      };
      ServiceBenchRow row{.op = "lookup", .stored = wanted, .outstanding = options_.lookups};
      KV_RETURN_IF_ERROR(Measure(ClientEvent::Kind::kLookupDone, lookup, row, rows));
    }
    return OkStatus();
  }

  // Rows of gets and puts of whole blocks.
  Status Blocks(std::vector<ServiceBenchRow>* rows) {
    for (const uint64_t size : options_.sizes_bytes) {
      std::vector<BlockKey> keys;
      std::vector<double> ignored;
      const auto put = [&]() -> Result<OpId> {
        keys.push_back(NewKey());
        return Put(keys.back(), {}, size);
      };
      KV_RETURN_IF_ERROR(Run(
          1, ClientEvent::Kind::kPutDone, put, [&] { return keys.size() >= kBlocksToGet; },
          &ignored));
      const auto get = [&]() -> Result<OpId> {
        KV_ASSIGN_OR_RETURN(std::shared_ptr<Lease> buffer, connection_->Lend(size));
        const TimePoint now = SteadyClock().Now();
        FetchItem item{.key = keys[random_.Below(kBlocksToGet)],
                       .run = 0,
                       .selection = SelectAll(),
                       .offset = 0,
                       .capacity = size};
        return cache().Fetch(
            {.items = {std::move(item)}, .buffer = std::move(buffer), .deadline = now + kPatience},
            now);
      };
      for (const size_t outstanding : options_.outstanding) {
        ServiceBenchRow row{.op = "get", .size_bytes = size, .outstanding = outstanding};
        KV_RETURN_IF_ERROR(Measure(ClientEvent::Kind::kFetchDone, get, row, rows));
        row.op = "put";
        const auto put_new = [&] { return Put(NewKey(), {}, size); };
        KV_RETURN_IF_ERROR(Measure(ClientEvent::Kind::kPutDone, put_new, row, rows));
        // What was put anew may have pushed out what is got.
        keys.clear();
        KV_RETURN_IF_ERROR(Run(
            1, ClientEvent::Kind::kPutDone, put, [&] { return keys.size() >= kBlocksToGet; },
            &ignored));
      }
    }
    return OkStatus();
  }

 private:
  Bench(const ServiceBenchOptions& options, std::function<void()> server_turn)
      : options_(options), server_turn_(std::move(server_turn)) {}

  CacheClient& cache() { return connection_->client(); }
  BlockKey NewKey() {
    BlockKey key;
    for (std::byte& byte : key.bytes) byte = static_cast<std::byte>(random_.Next());
    return key;
  }

  Result<OpId> Put(const BlockKey& key, const BlockKey& parent, uint64_t bytes) {
    KV_ASSIGN_OR_RETURN(std::shared_ptr<Lease> buffer, connection_->Lend(bytes));
    BlockManifest manifest;
    manifest.key = key;
    manifest.codec = 2;
    manifest.token_count = 64;
    manifest.Append(0, 0, 0, 0, buffer->bytes(), 0);
    const TimePoint now = SteadyClock().Now();
    const OpId op = cache().BeginPut({.key = key,
                                      .parent = parent,
                                      .run = 0,
                                      .payload_bytes = bytes,
                                      .manifest_rows = 1,
                                      .buffer = std::move(buffer),
                                      .deadline = now + kPatience},
                                     now);
    cache().PutReady(op, 0, bytes, now);
    cache().SealPut(op, manifest, now);
    return op;
  }

  bool Turn() {
    events_.clear();
    const bool found = connection_->Poll(&events_);
    if (server_turn_) server_turn_();
    return found;
  }

  // Keeps operations going: `start` begins one, an event of `done` ends it. Until `finished()` says
  // so and nothing is under way.
  Status Run(size_t outstanding, ClientEvent::Kind done, const std::function<Result<OpId>()>& start,
             const std::function<bool()>& finished, std::vector<double>* latencies_us) {
    std::unordered_map<OpId, TimePoint> under_way;
    TimePoint last = SteadyClock().Now();
    while (!under_way.empty() || !finished()) {
      while (under_way.size() < outstanding && !finished()) {
        const TimePoint now = SteadyClock().Now();
        KV_ASSIGN_OR_RETURN(const OpId op, start());
        under_way.emplace(op, now);
      }
      const bool found = Turn();
      const TimePoint now = SteadyClock().Now();
      if (!found && !server_turn_) transport_->Wait(std::chrono::milliseconds(1));
      for (const ClientEvent& event : events_) {
        if (event.kind != done) continue;
        KV_RETURN_IF_ERROR(event.status);
        const auto begun = under_way.find(event.op);
        if (begun == under_way.end()) continue;
        latencies_us->push_back(Seconds(now - begun->second) * 1e6);
        under_way.erase(begun);
        last = now;
      }
      if (now - last > kPatience)
        return Unavailable("the service bench: the shard does not answer");
    }
    return OkStatus();
  }

  Status Measure(ClientEvent::Kind done, const std::function<Result<OpId>()>& start,
                 ServiceBenchRow row, std::vector<ServiceBenchRow>* rows) {
    std::vector<double> latencies;
    const TimePoint begun = SteadyClock().Now();
    KV_RETURN_IF_ERROR(Run(
        row.outstanding, done, start,
        [&] { return SteadyClock().Now() - begun >= options_.time_per_row; }, &latencies));
    row.per_s = static_cast<double>(latencies.size()) / Seconds(SteadyClock().Now() - begun);
    std::sort(latencies.begin(), latencies.end());
    row.us_p50 = latencies[latencies.size() / 2];
    row.us_p99 = latencies[latencies.size() * 99 / 100];
    rows->push_back(row);
    return OkStatus();
  }

  const ServiceBenchOptions& options_;
  std::function<void()> server_turn_;
  Transport* transport_ = nullptr;
  std::unique_ptr<CacheConnection> connection_;
  std::vector<ClientEvent> events_;
  Random random_{1};
};

ShardHostOptions HostOptions(const ServiceBenchOptions& options) {
  // Room for all small blocks, with what each costs besides its payload, and for some large ones.
  const size_t most = *std::max_element(options.stored.begin(), options.stored.end());
  const uint64_t largest =
      *std::max_element(options.sizes_bytes.begin(), options.sizes_bytes.end());
  return {.memory_bytes = (uint64_t{16} << 20) + most * 4096 + 4 * kBlocksToGet * largest,
          .expected_block_bytes = 1024,
          .populate = true};  // as of a shard that has been full once
}

// server_turn: of a server on this thread.
Status RunRows(std::string_view name, Transport* transport, const std::string& address,
               const std::function<void()>& server_turn, const ServiceBenchOptions& options,
               std::vector<ServiceBenchRow>* rows) {
  const size_t before = rows->size();
  KV_ASSIGN_OR_RETURN(const auto bench, Bench::Connect(transport, address, server_turn, options));
  // A shard full of small blocks would have to give up dozens of them for each large one.
  KV_RETURN_IF_ERROR(bench->Blocks(rows));
  KV_RETURN_IF_ERROR(bench->Lookups(rows));
  for (size_t i = before; i < rows->size(); ++i) (*rows)[i].transport = name;
  return OkStatus();
}

Status OnOneThread(const ServiceBenchOptions& options, std::vector<ServiceBenchRow>* rows) {
  LoopbackHub hub;
  const auto theirs = hub.MakeTransport();
  const auto ours = hub.MakeTransport();
  KV_ASSIGN_OR_RETURN(const std::string address, theirs->Listen("loopback:service"));
  KV_ASSIGN_OR_RETURN(const auto host, ShardHost::Create(theirs.get(), HostOptions(options)));
  return RunRows(
      "loopback", ours.get(), address, [&] { host->Turn(SteadyClock().Now()); }, options, rows);
}

Status OnTwoThreads(std::string_view backend, const std::string& listen,
                    const ServiceBenchOptions& options, std::vector<ServiceBenchRow>* rows) {
  KV_ASSIGN_OR_RETURN(const auto theirs, MakeTransport(backend, {.tcp_alone = true}));
  KV_ASSIGN_OR_RETURN(const auto ours, MakeTransport(backend, {.tcp_alone = true}));
  KV_ASSIGN_OR_RETURN(const std::string address, theirs->Listen(listen));
  KV_ASSIGN_OR_RETURN(const auto host, ShardHost::Create(theirs.get(), HostOptions(options)));
  std::atomic<bool> stop = false;
  // The one owner of the server's side until the join.
  std::thread server([&] {
    while (!stop) {
      if (!host->Turn(SteadyClock().Now())) theirs->Wait(std::chrono::milliseconds(1));
    }
  });
  const Status status = RunRows(backend, ours.get(), address, {}, options, rows);
  stop = true;
  server.join();
  return status;
}

}  // namespace

Result<std::vector<ServiceBenchRow>> RunServiceBench(const ServiceBenchOptions& options) {
  const bool valid =
      options.chain > 0 && options.lookups > 0 && !options.stored.empty() &&
      *std::min_element(options.stored.begin(), options.stored.end()) >= options.chain &&
      std::is_sorted(options.stored.begin(), options.stored.end());
  if (!valid) {
    return InvalidArgument(
        "the service bench: give ascending numbers of stored blocks, at least a chain of them");
  }
  if (options.sizes_bytes.empty() || options.outstanding.empty() ||
      std::count(options.sizes_bytes.begin(), options.sizes_bytes.end(), 0U) > 0 ||
      std::count(options.outstanding.begin(), options.outstanding.end(), 0U) > 0) {
    return InvalidArgument("the service bench: give at least one size and one outstanding >= 1");
  }
  std::vector<ServiceBenchRow> rows;
  KV_RETURN_IF_ERROR(OnOneThread(options, &rows));
  const std::string name = fmt::format("shm:service-{:x}", SecureRandomUint64());
  KV_RETURN_IF_ERROR(OnTwoThreads("shm", name, options, &rows));
  KV_RETURN_IF_ERROR(OnTwoThreads("tcp", "tcp://127.0.0.1:0", options, &rows));
  return rows;
}

}  // namespace kvant
