#include "transport/transport_bench.h"

#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <thread>

#include "base/bytes.h"
#include "base/random.h"
#include "transport/arena.h"
#include "transport/factory.h"
#include "transport/shared_memory.h"
#include "transport/tcp_socket.h"
#include "transport/transport_bench_internal.h"

namespace kvant {
namespace bench {
namespace {

constexpr int kRounds = 4;  // of ours and plain in turn, so that both meet the same machine
constexpr Duration kConnectTimeout = std::chrono::seconds(10);
// Whoever has something to poll is woken earlier.
constexpr Duration kNap = std::chrono::milliseconds(1);
constexpr uint64_t kGiB = uint64_t{1} << 30;

// Messages: a letter, then fields.
//   r: a slice begins: window id, key, length. q: slots that are asked for. e: the slice ends.
//   d: slots that were read. c: the server's CPU seconds in this slice, as a double.
std::vector<std::byte> SlotMessage(char letter, std::span<const uint32_t> slots) {
  std::vector<std::byte> message(1 + slots.size_bytes());
  message[0] = static_cast<std::byte>(letter);
  if (!slots.empty()) std::memcpy(message.data() + 1, slots.data(), slots.size_bytes());
  return message;
}

// One side over a transport of ours.
class Side {
 public:
  Side(Transport* transport, RegisteredArena* arena) : transport_(transport), arena_(arena) {}
  virtual ~Side() = default;

 protected:
  // In one process without threads, gives the other side its turn.
  void Step() {
    if (other_turn) other_turn();
  }
  Status SendMessage(std::span<const std::byte> message) {
    const TimePoint start = SteadyClock().Now();
    while (true) {
      Endpoint* endpoint = transport_->Find(peer_);
      if (endpoint == nullptr) return Unavailable("the bench: the peer is gone");
      const Status status = endpoint->Send(message);
      if (status.code() != StatusCode::kResourceExhausted) return status;
      if (SteadyClock().Now() - start > kStuck) return status;
      Poll();
      Step();
    }
  }
  // The last slice's memory is lent again when the peer has let go of it.
  Result<Lease> Lend(uint64_t bytes) {
    const TimePoint start = SteadyClock().Now();
    while (true) {
      Result<Lease> lease = arena_->Lend(bytes);
      if (lease.status().code() != StatusCode::kResourceExhausted) return lease;
      if (SteadyClock().Now() - start > kStuck) return lease;
      Poll();
      Step();
    }
  }
  // Whether anything came.
  bool Poll() {
    const size_t before = events_.size();
    transport_->Poll(&events_);
    return events_.size() > before;
  }

 public:
  std::function<void()> other_turn;
  Duration poll_before_sleep = std::chrono::microseconds(200);

 protected:
  Transport* transport_;
  RegisteredArena* arena_;
  EndpointId peer_ = 0;
  std::vector<Event> events_;
};

class OurAsker final : public Asker, public Side {
 public:
  using Side::Side;
  Status Connect(const std::string& address) {
    KV_ASSIGN_OR_RETURN(const Endpoint* endpoint, transport_->Connect(address, kConnectTimeout));
    peer_ = endpoint->id();
    const TimePoint start = SteadyClock().Now();
    while (SteadyClock().Now() - start < kConnectTimeout) {
      Poll();
      Step();
      for (const Event& event : events_) {
        if (event.kind == Event::Kind::kClosed) return event.status;
        if (event.kind == Event::Kind::kConnected) {
          events_.clear();
          return OkStatus();
        }
      }
    }
    return MakeStatus(StatusCode::kDeadlineExceeded, "the bench: connecting to {}", address);
  }

  Status Run(const Shape& shape, Duration time, Sample* sample) override {
    KV_ASSIGN_OR_RETURN(Lease lease, Lend(shape.size * shape.outstanding));
    KV_ASSIGN_OR_RETURN(ExposedWindow window,
                        arena_->Expose(lease, peer_, 0, lease.size(), Access::kRemoteReadWrite));
    std::vector<std::byte> begin(25);
    begin[0] = std::byte{'r'};
    StoreLittle(begin.data() + 1, window.remote().id);
    StoreLittle(begin.data() + 9, window.remote().key);
    StoreLittle(begin.data() + 17, window.remote().length);
    KV_RETURN_IF_ERROR(SendMessage(begin));
    Pacer pacer(shape, time, sample);
    Patience patience(poll_before_sleep);
    while (!pacer.finished()) {
      if (!pacer.idle().empty()) {
        const auto request = SlotMessage('q', pacer.idle());
        pacer.Asked();
        KV_RETURN_IF_ERROR(SendMessage(request));
      }
      if (Poll()) {
        patience.Found();
      } else if (patience.Sleep()) {
        transport_->Wait(kNap);
        if (pacer.stuck()) return Unavailable("the bench: the peer does not answer");
      }
      Step();
      KV_RETURN_IF_ERROR(Take(shape, &pacer));
    }
    pacer.Finish();
    KV_RETURN_IF_ERROR(SendMessage(SlotMessage('e', {})));
    return AwaitCpu(sample);
  }

 private:
  Status Take(const Shape& shape, Pacer* pacer) {
    for (const Event& event : events_) {
      if (event.kind == Event::Kind::kClosed) {
        return Unavailable("the bench: the peer is gone: {}", event.status.message());
      }
      if (event.kind == Event::Kind::kWritten && event.immediate < shape.outstanding) {
        pacer->Arrived(event.immediate);
      }
      if (event.kind != Event::Kind::kMessage || event.message[0] != std::byte{'d'}) continue;
      for (size_t at = 1; at + 4 <= event.message.size(); at += 4) {
        pacer->Arrived(LoadLittle<uint32_t>(event.message.data() + at));
      }
    }
    events_.clear();
    return OkStatus();
  }
  Status AwaitCpu(Sample* sample) {
    const TimePoint start = SteadyClock().Now();
    while (SteadyClock().Now() - start < kStuck) {
      if (!Poll()) transport_->Wait(kNap);
      Step();
      for (const Event& event : events_) {
        if (event.kind != Event::Kind::kMessage || event.message.size() != 9) continue;
        double cpu = 0;
        std::memcpy(&cpu, event.message.data() + 1, sizeof(cpu));
        sample->cpu_seconds += cpu;
        events_.clear();
        return OkStatus();
      }
    }
    return Unavailable("the bench: the peer does not end the slice");
  }
};

class OurServer final : public Server, public Side {
 public:
  // `own_process`: its CPU time is not in the asker's.
  OurServer(Transport* transport, RegisteredArena* arena, bool own_process)
      : Side(transport, arena), own_process_(own_process) {}

  Status Serve(const Shape& shape) override {
    KV_RETURN_IF_ERROR(Begin(shape));
    Patience patience(poll_before_sleep);
    TimePoint last = SteadyClock().Now();
    while (!ended_) {
      KV_ASSIGN_OR_RETURN(const bool found, Turn());
      if (found) {
        patience.Found();
        last = SteadyClock().Now();
      } else if (patience.Sleep()) {
        transport_->Wait(kNap);
        if (SteadyClock().Now() - last > kStuck) return Unavailable("the bench: nobody asks");
      }
    }
    return OkStatus();
  }
  Status Begin(const Shape& shape) {
    KV_ASSIGN_OR_RETURN(lease_, Lend(shape.size * shape.outstanding));
    shape_ = shape;
    ended_ = false;
    cpu_start_ = CpuSeconds();
    return OkStatus();
  }
  // One Poll and what follows from it; whether anything came.
  Result<bool> Turn() {
    const bool found = Poll();
    done_.clear();
    for (const Event& event : events_) {
      if (event.kind == Event::Kind::kConnected) peer_ = event.endpoint;
      if (event.kind == Event::Kind::kTransferDone && !shape_.get) {
        done_.push_back(static_cast<uint32_t>(event.cookie));
      }
      if (event.kind == Event::Kind::kMessage) KV_RETURN_IF_ERROR(OnMessage(event.message));
    }
    events_.clear();
    Endpoint* endpoint = transport_->Find(peer_);
    if (endpoint != nullptr && !transfers_.empty()) {
      const size_t accepted = endpoint->Submit(transfers_);
      transfers_.erase(transfers_.begin(), transfers_.begin() + static_cast<ptrdiff_t>(accepted));
    }
    if (!done_.empty()) KV_RETURN_IF_ERROR(SendMessage(SlotMessage('d', done_)));
    return found;
  }

 private:
  Status OnMessage(const std::vector<std::byte>& message) {
    const char letter = static_cast<char>(message[0]);
    if (letter == 'r' && message.size() == 25) {
      window_ = {LoadLittle<uint64_t>(message.data() + 1), LoadLittle<uint64_t>(message.data() + 9),
                 LoadLittle<uint64_t>(message.data() + 17)};
    } else if (letter == 'q') {
      for (size_t at = 1; at + 4 <= message.size(); at += 4) {
        const auto slot = LoadLittle<uint32_t>(message.data() + at);
        Transfer transfer{.op = shape_.get ? Transfer::Op::kWrite : Transfer::Op::kRead,
                          .local = lease_.bytes().subspan(slot * shape_.size, shape_.size),
                          .remote = window_,
                          .remote_offset = slot * shape_.size,
                          .cookie = slot};
        if (shape_.get) transfer.immediate = slot;
        transfers_.push_back(transfer);
      }
    } else if (letter == 'e') {
      ended_ = true;
      lease_.Reset();
      const double cpu = own_process_ ? CpuSeconds() - cpu_start_ : 0;
      std::vector<std::byte> answer(9);
      answer[0] = std::byte{'c'};
      std::memcpy(answer.data() + 1, &cpu, sizeof(cpu));
      return SendMessage(answer);
    }
    return OkStatus();
  }
  bool own_process_;
  Shape shape_;
  Lease lease_;
  RemoteWindow window_;
  std::vector<Transfer> transfers_;
  std::vector<uint32_t> done_;
  bool ended_ = true;
  double cpu_start_ = 0;
};

// The plain loop of memory: memcpy of one slot after the other, out of memory that outlives it.
class PlainMemory final : public Asker {
 public:
  explicit PlainMemory(std::span<const std::byte> from) : from_(from), to_(from.size()) {}
  Status Run(const Shape& shape, Duration time, Sample* sample) override {
    Pacer pacer(shape, time, sample);
    while (!pacer.finished()) {
      const std::vector<uint32_t> slots = pacer.idle();
      pacer.Asked();
      for (const uint32_t slot : slots) {
        std::memcpy(to_.data() + slot * shape.size, from_.data() + slot * shape.size, shape.size);
        pacer.Arrived(slot);
      }
    }
    pacer.Finish();
    return OkStatus();
  }

 private:
  std::span<const std::byte> from_;
  std::vector<std::byte> to_;
};

double Percentile(std::vector<double>* values, double part) {
  if (values->empty()) return 0;
  const auto at = static_cast<ptrdiff_t>(part * static_cast<double>(values->size() - 1));
  std::nth_element(values->begin(), values->begin() + at, values->end());
  return (*values)[static_cast<size_t>(at)];
}

std::vector<Shape> Shapes(const TransportBenchOptions& options) {
  std::vector<Shape> shapes;
  for (const bool get : {true, false}) {
    for (const uint64_t size : options.sizes_bytes) {
      for (const uint32_t outstanding : options.outstanding) {
        shapes.push_back({get, size, outstanding});
      }
    }
  }
  return shapes;
}

uint64_t ArenaBytes(const TransportBenchOptions& options) {
  const uint64_t most = *std::max_element(options.sizes_bytes.begin(), options.sizes_bytes.end()) *
                        *std::max_element(options.outstanding.begin(), options.outstanding.end());
  return most + (uint64_t{1} << 16);
}

// `before_slice`: what the other side must be told first, where it has no thread of its own.
Status RunRows(std::string_view backend, const TransportBenchOptions& options, Asker* ours,
               Asker* plain, const std::function<Status(const Shape&)>& before_slice,
               std::vector<TransportBenchRow>* rows) {
  for (const Shape& shape : Shapes(options)) {
    Sample our_sample;
    Sample plain_sample;
    for (int round = 0; round < kRounds; ++round) {
      const Duration time = options.time_per_row / (2 * kRounds);
      if (before_slice) KV_RETURN_IF_ERROR(before_slice(shape));
      KV_RETURN_IF_ERROR(ours->Run(shape, time, &our_sample));
      KV_RETURN_IF_ERROR(plain->Run(shape, time, &plain_sample));
    }
    const auto rate = [](const Sample& sample) {
      return sample.seconds > 0 ? static_cast<double>(sample.bytes) / sample.seconds / 1e9 : 0;
    };
    const auto cpu_s_per_gib = [](const Sample& sample) {
      return sample.cpu_seconds * static_cast<double>(kGiB) /
             static_cast<double>(std::max<uint64_t>(sample.bytes, 1));
    };
    TransportBenchRow row;
    row.backend = backend;
    row.op = shape.get ? "get" : "put";
    row.size_bytes = shape.size;
    row.outstanding = shape.outstanding;
    row.latency_us_p50 = Percentile(&our_sample.latencies_us, 0.50);
    row.latency_us_p99 = Percentile(&our_sample.latencies_us, 0.99);
    row.gb_per_s = rate(our_sample);
    row.cpu_s_per_gib = cpu_s_per_gib(our_sample);
    row.plain_gb_per_s = rate(plain_sample);
    row.plain_latency_us_p50 = Percentile(&plain_sample.latencies_us, 0.50);
    row.plain_cpu_s_per_gib = cpu_s_per_gib(plain_sample);
    rows->push_back(row);
  }
  return OkStatus();
}

Status ServeRows(const TransportBenchOptions& options, Server* ours, Server* plain) {
  for (const Shape& shape : Shapes(options)) {
    for (int round = 0; round < kRounds; ++round) {
      KV_RETURN_IF_ERROR(ours->Serve(shape));
      if (plain != nullptr) KV_RETURN_IF_ERROR(plain->Serve(shape));
    }
  }
  return OkStatus();
}

Status BenchLoopback(const TransportBenchOptions& options, std::vector<TransportBenchRow>* rows) {
  LoopbackHub hub;
  const auto ours = hub.MakeTransport();
  const auto theirs = hub.MakeTransport();
  KV_ASSIGN_OR_RETURN(const auto our_arena,
                      RegisteredArena::Create(ours.get(), {.bytes = ArenaBytes(options)}));
  KV_ASSIGN_OR_RETURN(const auto their_arena,
                      RegisteredArena::Create(theirs.get(), {.bytes = ArenaBytes(options)}));
  KV_ASSIGN_OR_RETURN(const std::string address, theirs->Listen("loopback:bench"));
  OurAsker asker(ours.get(), our_arena.get());
  OurServer server(theirs.get(), their_arena.get(), false);
  Status failed;
  asker.other_turn = [&] {
    const auto found = server.Turn();
    if (!found.ok()) failed = found.status();
  };
  KV_RETURN_IF_ERROR(asker.Connect(address));
  const std::vector<std::byte> from(ArenaBytes(options));
  PlainMemory plain(from);
  KV_RETURN_IF_ERROR(RunRows(
      "loopback", options, &asker, &plain, [&](const Shape& shape) { return server.Begin(shape); },
      rows));
  return failed;
}

// Two connected sockets over 127.0.0.1.
Result<std::pair<tcp::Socket, tcp::Socket>> ConnectedSockets() {
  KV_ASSIGN_OR_RETURN(const in_addr host, tcp::Resolve("127.0.0.1"));
  KV_ASSIGN_OR_RETURN(const tcp::Socket listener, tcp::ListenOn(host, 0, 1));
  KV_ASSIGN_OR_RETURN(const uint16_t port, tcp::LocalPort(listener));
  KV_ASSIGN_OR_RETURN(tcp::Socket ours, tcp::StartConnect(host, port));
  const TimePoint start = SteadyClock().Now();
  while (SteadyClock().Now() - start < kConnectTimeout) {
    tcp::Socket theirs(accept4(listener.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!theirs) continue;
    tcp::TuneForBulk(ours, kConnectTimeout);
    tcp::TuneForBulk(theirs, kConnectTimeout);
    return std::pair(std::move(ours), std::move(theirs));
  }
  return Unavailable("the bench: connecting a socket to itself");
}

// Between two threads, each with a transport of its own. plain_server: nullptr where the plain loop
// needs no other side. stop: ends the plain loop's wait early.
Status BenchThreads(std::string_view backend, const TransportBenchOptions& options, Transport* ours,
                    Transport* theirs, std::string_view listen, Asker* plain, Server* plain_server,
                    const std::function<void()>& stop, std::vector<TransportBenchRow>* rows) {
  KV_ASSIGN_OR_RETURN(const auto our_arena,
                      RegisteredArena::Create(ours, {.bytes = ArenaBytes(options)}));
  KV_ASSIGN_OR_RETURN(const auto their_arena,
                      RegisteredArena::Create(theirs, {.bytes = ArenaBytes(options)}));
  KV_ASSIGN_OR_RETURN(const std::string address, theirs->Listen(listen));
  Status served;
  // The peer's thread is the one owner of its transport from here to the join.
  std::thread peer([&] {
    OurServer server(theirs, their_arena.get(), false);
    server.poll_before_sleep = options.poll_before_sleep;
    served = ServeRows(options, &server, plain_server);
  });
  OurAsker asker(ours, our_arena.get());
  asker.poll_before_sleep = options.poll_before_sleep;
  Status asked = asker.Connect(address);
  if (asked.ok()) asked = RunRows(backend, options, &asker, plain, {}, rows);
  // If we stopped early, the peer notices within kStuck.
  if (!asked.ok() && stop) stop();
  peer.join();
  KV_RETURN_IF_ERROR(asked);
  return served;
}

Status BenchTcp(const TransportBenchOptions& options, std::vector<TransportBenchRow>* rows) {
  KV_ASSIGN_OR_RETURN(auto sockets, ConnectedSockets());
  KV_ASSIGN_OR_RETURN(const auto ours, MakeTcpTransport({}));
  KV_ASSIGN_OR_RETURN(const auto theirs, MakeTcpTransport({}));
  const auto plain = MakePlainTcpAsker(sockets.first.fd());
  const auto plain_server = MakePlainTcpServer(sockets.second.fd());
  return BenchThreads(
      "tcp", options, ours.get(), theirs.get(), "tcp://127.0.0.1:0", plain.get(),
      plain_server.get(), [&] { shutdown(sockets.first.fd(), SHUT_RDWR); }, rows);
}

Status BenchShm(const TransportBenchOptions& options, std::vector<TransportBenchRow>* rows) {
  KV_ASSIGN_OR_RETURN(const auto ours, MakeShmTransport({}));
  KV_ASSIGN_OR_RETURN(const auto theirs, MakeShmTransport({}));
  KV_ASSIGN_OR_RETURN(SharedMemory from, SharedMemory::Create(ArenaBytes(options)));
  PlainMemory plain(from.bytes());
  return BenchThreads("shm", options, ours.get(), theirs.get(),
                      fmt::format("shm:bench-{:x}", SecureRandomUint64()), &plain, nullptr, {},
                      rows);
}

#ifdef KVANT_HAVE_VERBS
Status BenchVerbs(const TransportBenchOptions& options, std::vector<TransportBenchRow>* rows) {
  KV_ASSIGN_OR_RETURN(const auto ours, MakeVerbsTransport({}));
  KV_ASSIGN_OR_RETURN(const auto theirs, MakeVerbsTransport({}));
  KV_ASSIGN_OR_RETURN(const auto plain, MakePlainVerbsAsker(ArenaBytes(options)));
  return BenchThreads("verbs", options, ours.get(), theirs.get(), "verbs://127.0.0.1:0",
                      plain.get(), nullptr, {}, rows);
}
#endif

#ifdef KVANT_HAVE_MPI
Status BenchMpi(const TransportBenchOptions& options, std::vector<TransportBenchRow>* rows) {
  KV_ASSIGN_OR_RETURN(const auto transport, options.mpi->MakeTransport());
  Status status;
  if (options.mpi->rank() < 2) {
    KV_ASSIGN_OR_RETURN(const auto arena,
                        RegisteredArena::Create(transport.get(), {.bytes = ArenaBytes(options)}));
    if (options.mpi->rank() == 0) {
      OurAsker asker(transport.get(), arena.get());
      const auto plain = MakePlainMpiAsker(options.mpi->state());
      status = asker.Connect("mpi:1");
      if (status.ok()) status = RunRows("mpi", options, &asker, plain.get(), {}, rows);
    } else {
      KV_RETURN_IF_ERROR(transport->Listen("mpi:").status());
      OurServer server(transport.get(), arena.get(), true);
      const auto plain = MakePlainMpiServer(options.mpi->state());
      status = ServeRows(options, &server, plain.get());
    }
  }
  return status;
}
#endif

}  // namespace
}  // namespace bench

Result<std::vector<TransportBenchRow>> RunTransportBench(const TransportBenchOptions& options) {
  if (options.sizes_bytes.empty() || options.outstanding.empty() ||
      std::count(options.outstanding.begin(), options.outstanding.end(), 0U) > 0) {
    return InvalidArgument("the transport bench: give at least one size and one outstanding >= 1");
  }
  std::vector<TransportBenchRow> rows;
  const auto wanted = [&options](std::string_view name) {
    return options.backends.empty() ||
           std::count(options.backends.begin(), options.backends.end(), std::string(name)) > 0;
  };
  for (const std::string& name : options.backends) {
    if (name != "loopback" && name != "shm" && name != "tcp" && name != "mpi" && name != "verbs") {
      return InvalidArgument(
          "the transport bench: no backend '{}'; there are loopback, shm, tcp, mpi, verbs", name);
    }
  }
  const bool ranks = options.mpi != nullptr && options.mpi->size() >= 2;
  if (!options.backends.empty() && wanted("mpi") && !ranks) {
    return MakeStatus(StatusCode::kUnsupported,
                      "the transport bench: mpi needs two ranks; start it with mpirun -np 2");
  }
  const std::optional<std::string> no_device = VerbsUnavailable({});
  if (!options.backends.empty() && wanted("verbs") && no_device) {
    return MakeStatus(StatusCode::kUnsupported, "the transport bench: {}", *no_device);
  }
  const bool first = options.mpi == nullptr || options.mpi->rank() == 0;
  if (first && wanted("loopback")) KV_RETURN_IF_ERROR(bench::BenchLoopback(options, &rows));
  if (first && wanted("shm")) KV_RETURN_IF_ERROR(bench::BenchShm(options, &rows));
  if (first && wanted("tcp")) KV_RETURN_IF_ERROR(bench::BenchTcp(options, &rows));
#ifdef KVANT_HAVE_VERBS
  if (first && !no_device && wanted("verbs")) KV_RETURN_IF_ERROR(bench::BenchVerbs(options, &rows));
#endif
    // The other ranks wait here meanwhile, without using the cores.
#ifdef KVANT_HAVE_MPI
  if (ranks && wanted("mpi")) KV_RETURN_IF_ERROR(bench::BenchMpi(options, &rows));
#endif
  return rows;
}

}  // namespace kvant
