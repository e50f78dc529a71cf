// The mpi transport: endpoints between ranks over a courier.
#include "transport/mpi_transport.h"

#include <sched.h>

#include <algorithm>
#include <charconv>
#include <ctime>
#include <map>
#include <unordered_map>

#include "transport/endpoint_table.h"
#include "transport/mpi_courier.h"

namespace kvant::mpi {
namespace {

constexpr std::string_view kScheme = "mpi:";
constexpr size_t kMaxMessageBytes = size_t{1} << 20;
constexpr size_t kMaxOutstanding = 256;
// After a Close or a goodbye, what is under way gets this long.
constexpr Duration kGoodbyeTimeout = std::chrono::seconds(2);
// Ranks share cores: poll a little, then sleep longer and longer.
constexpr Duration kSpin = std::chrono::microseconds(50);
constexpr Duration kShortSleep = std::chrono::microseconds(50);
constexpr Duration kLongSleep = std::chrono::milliseconds(1);

constexpr Capabilities kCapabilities = {.name = "mpi",
                                        .max_message_bytes = kMaxMessageBytes,
                                        .max_outstanding = kMaxOutstanding,
                                        .max_transfer_bytes = kMaxTransferBytes,
                                        .crosses_processes = true,
                                        .detects_peer_death = false};

class MpiTransport;

class MpiEndpoint final : public Endpoint {
 public:
  // `there`: the peer's endpoint, 0 while connecting.
  MpiEndpoint(MpiTransport* transport, EndpointId id, int rank, EndpointId there)
      : transport_(transport),
        id_(id),
        rank_(rank),
        there_(there),
        peer_(fmt::format("mpi:{}", rank)) {}

  EndpointId id() const override { return id_; }
  std::string_view peer() const override { return peer_; }
  Status Send(std::span<const std::byte> message) override;
  size_t Submit(std::span<const Transfer> transfers) override;
  void Close() override;
  const LinkCounters& counters() const override { return counters_; }
  void OnReported() { --outstanding_; }

 private:
  friend class MpiTransport;
  enum class State : uint8_t { kConnecting, kOpen, kEnding, kClosed };
  struct Read {
    std::span<std::byte> local;
    uint64_t cookie = 0;
  };
  void SendPacket(Header header, std::span<const std::byte> body = {});
  void Complete(uint64_t cookie, Status status);
  void OnPacket(const Header& header, std::span<const std::byte> body);
  void OnWrite(const Header& header);
  void OnRead(const Header& header);
  void OnReadAnswer(const Header& header);
  // Cancels what can be; kClosed comes when MPI holds none of our memory, or in the end anyway.
  void End(Status why, StatusCode transfers_end_with);
  void TryFinish(TimePoint now);

  MpiTransport* transport_;
  EndpointId id_;
  int rank_;
  EndpointId there_;
  std::string peer_;
  State state_ = State::kConnecting;
  TimePoint deadline_{};
  Status why_;
  StatusCode transfers_end_with_ = StatusCode::kUnavailable;
  std::unordered_map<uint32_t, Read> reads_;  // asked, not answered
  std::map<uint64_t, uint64_t> under_way_;    // cookie -> how many the courier holds
  size_t outstanding_ = 0;                    // accepted, kTransferDone not polled yet
  size_t replies_ = 0;                        // to the peer's reads, not sent yet
  size_t landing_ = 0;                        // the peer's writes, announced, not landed yet
  bool peer_said_goodbye_ = false;
  uint32_t next_read_ = 0;
  LinkCounters counters_;
};

class MpiTransport final : public Transport, private Receiver {
 public:
  explicit MpiTransport(MPI_Comm communicator)
      : windows_(std::make_shared<WindowTable>(std::nullopt)),
        courier_(new Courier(communicator, windows_.get(), this, kMaxMessageBytes)) {}
  MpiTransport(const MpiTransport&) = delete;
  MpiTransport& operator=(const MpiTransport&) = delete;
  ~MpiTransport() override {
    for (auto& [id, endpoint] : endpoints_) endpoint->Close();
    courier_.reset();  // while the endpoints it reports to exist
  }

  const Capabilities& capabilities() const override { return kCapabilities; }
  Result<std::string> Listen(std::string_view address) override {
    const std::string own = fmt::format("mpi:{}", courier_->rank());
    if (address != kScheme && address != own) {
      return InvalidArgument("listening on '{}': this rank is {}", address, own);
    }
    listens_ = true;
    return own;
  }
  Result<Endpoint*> Connect(std::string_view address, Duration timeout) override;
  Endpoint* Find(EndpointId id) override {
    MpiEndpoint* found = endpoints_.Get(id);
    return found == nullptr || found->state_ == MpiEndpoint::State::kClosed ? nullptr : found;
  }
  Result<std::unique_ptr<MemoryRegion>> Register(std::span<std::byte> memory) override {
    return MakeTableRegion(windows_, memory);
  }
  void Poll(std::vector<Event>* events) override;
  void Wait(Duration at_most) override;
  LinkCounters counters() const override { return endpoints_.counters(); }

 private:
  friend class MpiEndpoint;
  MpiEndpoint* NewEndpoint(int rank, EndpointId there) {
    const EndpointId id = next_id_++;
    return endpoints_.Add(std::make_unique<MpiEndpoint>(this, id, rank, there));
  }
  void OnPacket(int rank, const Header& header, std::span<const std::byte> body) override;
  void OnSent(const Outbound& job) override;
  void OnLanded(const Inbound& job) override;
  void Progress();

  std::shared_ptr<WindowTable> windows_;
  std::unique_ptr<Courier> courier_;
  bool listens_ = false;
  EndpointId next_id_ = 1;
  EndpointTable<MpiEndpoint> endpoints_;
  std::vector<EndpointId> timed_;  // endpoints that connect or end
  std::vector<Event> events_;
};

void MpiEndpoint::SendPacket(Header header, std::span<const std::byte> body) {
  header.to = there_;
  header.from = id_;
  counters_.control_bytes_sent += kHeaderBytes + body.size();
  transport_->courier_->SendPacket(rank_, header, body);
}

void MpiEndpoint::Complete(uint64_t cookie, Status status) {
  transport_->events_.push_back({.kind = Event::Kind::kTransferDone,
                                 .endpoint = id_,
                                 .cookie = cookie,
                                 .status = std::move(status)});
}

Status MpiEndpoint::Send(std::span<const std::byte> message) {
  if (message.size() > kMaxMessageBytes) {
    return InvalidArgument("sending {} bytes to {}: at most {} fit a message", message.size(),
                           peer_, kMaxMessageBytes);
  }
  if (state_ != State::kOpen) {
    return Unavailable(
        "sending to {}: the endpoint is {}", peer_,
        state_ == State::kConnecting ? "not connected yet; wait for kConnected" : "closed");
  }
  if (transport_->courier_->Full(rank_)) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "sending to {}: its queue is full; poll, then try again", peer_);
  }
  ++counters_.messages_sent;
  SendPacket({.type = PacketType::kData}, message);
  return OkStatus();
}

size_t MpiEndpoint::Submit(std::span<const Transfer> transfers) {
  if (state_ != State::kOpen) return 0;
  size_t accepted = 0;
  for (const Transfer& transfer : transfers) {
    if (outstanding_ >= kMaxOutstanding) break;
    ++accepted;
    ++outstanding_;
    if (Status status = transport_->windows_->Check(transfer, kMaxTransferBytes); !status.ok()) {
      Complete(transfer.cookie, std::move(status));
      continue;
    }
    Header header{.type = PacketType::kWrite,
                  .immediate = transfer.immediate,
                  .to = there_,
                  .from = id_,
                  .window = transfer.remote.id,
                  .key = transfer.remote.key,
                  .offset = transfer.remote_offset,
                  .length = transfer.local.size()};
    if (transfer.op == Transfer::Op::kWrite) {
      ++under_way_[transfer.cookie];
      counters_.control_bytes_sent += kHeaderBytes;
      transport_->courier_->SendPayload(
          rank_, {.header = header, .bytes = transfer.local, .cookie = transfer.cookie});
    } else {
      header.type = PacketType::kRead;
      header.immediate.reset();
      header.read = next_read_++;
      reads_[header.read] = {transfer.local, transfer.cookie};
      SendPacket(header);
    }
  }
  counters_.transfers_submitted += accepted;
  return accepted;
}

void MpiEndpoint::Close() {
  if (state_ == State::kEnding || state_ == State::kClosed) return;
  SendPacket({.type = PacketType::kGoodbye});
  End(OkStatus(), StatusCode::kCancelled);
}

void MpiEndpoint::End(Status why, StatusCode transfers_end_with) {
  state_ = State::kEnding;
  why_ = std::move(why);
  transfers_end_with_ = transfers_end_with;
  deadline_ = SteadyClock().Now() + kGoodbyeTimeout;
  transport_->timed_.push_back(id_);
  std::vector<uint64_t> cancelled;
  transport_->courier_->CancelWrites(rank_, id_, &cancelled);
  counters_.control_bytes_sent -= cancelled.size() * kHeaderBytes;
  transport_->courier_->CancelReads(rank_, id_, &cancelled);
  for (const uint64_t cookie : cancelled) {
    const auto held = under_way_.find(cookie);
    if (held != under_way_.end() && --held->second == 0) under_way_.erase(held);
  }
  for (const auto& [id, read] : reads_) cancelled.push_back(read.cookie);
  reads_.clear();
  for (const uint64_t cookie : cancelled) {
    Complete(cookie, MakeStatus(transfers_end_with_,
                                "transferring to {}: the endpoint closed first", peer_));
  }
}

void MpiEndpoint::TryFinish(TimePoint now) {
  if (state_ == State::kConnecting && now >= deadline_) {
    End(MakeStatus(StatusCode::kDeadlineExceeded,
                   "connecting to {}: no answer in time; does that rank listen and poll?", peer_),
        StatusCode::kDeadlineExceeded);
  }
  // After the peer's goodbye, what it wrote before still lands.
  const bool busy = !under_way_.empty() || (peer_said_goodbye_ && landing_ > 0);
  if (state_ != State::kEnding || (busy && now < deadline_)) return;
  for (const auto& [cookie, count] : under_way_) {
    for (uint64_t i = 0; i < count; ++i) {
      Complete(cookie, MakeStatus(transfers_end_with_,
                                  "transferring to {}: it does not answer any more", peer_));
    }
  }
  under_way_.clear();
  state_ = State::kClosed;
  transport_->events_.push_back({.kind = Event::Kind::kClosed, .endpoint = id_, .status = why_});
}

void MpiEndpoint::OnPacket(const Header& header, std::span<const std::byte> body) {
  counters_.control_bytes_received += kHeaderBytes + body.size();
  const bool open = state_ == State::kOpen;
  switch (header.type) {
    case PacketType::kWelcome:
      if (state_ != State::kConnecting) return;
      there_ = header.from;
      state_ = State::kOpen;
      transport_->events_.push_back({.kind = Event::Kind::kConnected, .endpoint = id_});
      return;
    case PacketType::kData:
      if (!open) return;
      transport_->events_.push_back(
          {.kind = Event::Kind::kMessage, .endpoint = id_, .message = {body.begin(), body.end()}});
      return;
    case PacketType::kWrite:
      OnWrite(header);
      return;
    case PacketType::kRead:
      OnRead(header);
      return;
    case PacketType::kReadReply:
    case PacketType::kReadRefused:
      OnReadAnswer(header);
      return;
    case PacketType::kGoodbye:
      // The bytes it has announced before are still landing.
      if (state_ == State::kConnecting) {
        End(Unavailable("connecting to {}: it does not listen", peer_), StatusCode::kUnavailable);
      } else if (open) {
        peer_said_goodbye_ = true;
        End(OkStatus(), StatusCode::kUnavailable);
      }
      return;
    case PacketType::kHello:
      return;
  }
}

void MpiEndpoint::OnWrite(const Header& header) {
  Inbound job{.header = header};
  if (state_ == State::kOpen && header.length <= kMaxTransferBytes) {
    const auto window = transport_->windows_->Find(
        id_, {header.window, header.key, 0}, header.offset, header.length, Access::kRemoteWrite);
    if (window) {
      job.sink = Inbound::Sink::kWindow;
      job.bytes = *window;
    }
  }
  ++landing_;
  transport_->courier_->ReceivePayload(rank_, job);
}

void MpiEndpoint::OnRead(const Header& header) {
  const auto window = transport_->windows_->Find(id_, {header.window, header.key, 0}, header.offset,
                                                 header.length, Access::kRemoteRead);
  if (state_ != State::kOpen || !window || replies_ >= kMaxOutstanding) {
    SendPacket({.type = PacketType::kReadRefused, .read = header.read});
    return;
  }
  ++replies_;
  counters_.control_bytes_sent += kHeaderBytes;
  transport_->courier_->SendPayload(rank_, {.header = {.type = PacketType::kReadReply,
                                                       .to = there_,
                                                       .from = id_,
                                                       .read = header.read,
                                                       .window = header.window,
                                                       .length = header.length},
                                            .bytes = *window,
                                            .from_window = true});
}

void MpiEndpoint::OnReadAnswer(const Header& header) {
  const auto found = reads_.find(header.read);
  const bool reply = header.type == PacketType::kReadReply;
  Inbound job{.header = header};
  if (found != reads_.end()) {
    const Read read = found->second;
    reads_.erase(found);
    if (reply && header.length == read.local.size()) {
      job.sink = Inbound::Sink::kRead;
      job.bytes = read.local;
      job.cookie = read.cookie;
      ++under_way_[read.cookie];
    } else {
      Complete(read.cookie, MakeStatus(StatusCode::kPermissionDenied,
                                       "reading {} bytes from {}: it does not expose them to us",
                                       read.local.size(), peer_));
    }
  }
  if (reply) transport_->courier_->ReceivePayload(rank_, job);
}

Result<Endpoint*> MpiTransport::Connect(std::string_view address, Duration timeout) {
  int rank = -1;
  if (address.starts_with(kScheme)) {
    const std::string_view number = address.substr(kScheme.size());
    const auto [end, error] = std::from_chars(number.begin(), number.end(), rank);
    if (error != std::errc() || end != number.end()) rank = -1;
  }
  if (rank < 0 || rank >= courier_->size()) {
    return InvalidArgument("connecting to '{}': give mpi:0 to mpi:{}", address,
                           courier_->size() - 1);
  }
  MpiEndpoint* endpoint = NewEndpoint(rank, 0);
  endpoint->deadline_ = SteadyClock().Now() + timeout;
  timed_.push_back(endpoint->id());
  endpoint->SendPacket({.type = PacketType::kHello});
  return endpoint;
}

void MpiTransport::OnPacket(int rank, const Header& header, std::span<const std::byte> body) {
  if (header.type == PacketType::kHello) {
    if (!listens_) {
      courier_->SendPacket(rank, {.type = PacketType::kGoodbye, .to = header.from}, {});
      return;
    }
    MpiEndpoint* endpoint = NewEndpoint(rank, header.from);
    endpoint->counters_.control_bytes_received += kHeaderBytes;
    endpoint->state_ = MpiEndpoint::State::kOpen;
    endpoint->SendPacket({.type = PacketType::kWelcome});
    events_.push_back({.kind = Event::Kind::kConnected, .endpoint = endpoint->id()});
    return;
  }
  MpiEndpoint* endpoint = endpoints_.Get(header.to);
  if (endpoint != nullptr && endpoint->rank_ == rank) {
    endpoint->OnPacket(header, body);
    return;
  }
  // The endpoint is gone; what was announced must be received all the same.
  if (header.type == PacketType::kWrite || header.type == PacketType::kReadReply) {
    courier_->ReceivePayload(rank, {.header = header});
  } else if (header.type == PacketType::kRead) {
    courier_->SendPacket(
        rank, {.type = PacketType::kReadRefused, .to = header.from, .read = header.read}, {});
  }
}

void MpiTransport::OnSent(const Outbound& job) {
  MpiEndpoint* endpoint = endpoints_.Get(job.header.from);
  if (endpoint == nullptr) return;
  endpoint->counters_.payload_bytes_sent += job.bytes.size();
  if (job.from_window) {
    --endpoint->replies_;
    return;
  }
  const auto held = endpoint->under_way_.find(job.cookie);
  if (held == endpoint->under_way_.end()) return;
  if (--held->second == 0) endpoint->under_way_.erase(held);
  endpoint->Complete(job.cookie, OkStatus());
}

void MpiTransport::OnLanded(const Inbound& job) {
  MpiEndpoint* endpoint = endpoints_.Get(job.header.to);
  if (endpoint == nullptr) return;
  endpoint->counters_.payload_bytes_received += job.header.length;
  if (job.header.type == PacketType::kWrite) --endpoint->landing_;
  if (endpoint->state_ == MpiEndpoint::State::kClosed) return;
  if (job.sink == Inbound::Sink::kRead) {
    const auto held = endpoint->under_way_.find(job.cookie);
    if (held == endpoint->under_way_.end()) return;
    if (--held->second == 0) endpoint->under_way_.erase(held);
    endpoint->Complete(job.cookie, OkStatus());
  } else if (job.sink == Inbound::Sink::kWindow && job.header.immediate) {
    events_.push_back({.kind = Event::Kind::kWritten,
                       .endpoint = endpoint->id(),
                       .window = job.header.window,
                       .immediate = *job.header.immediate});
  }
}

void MpiTransport::Progress() {
  courier_->Progress();
  if (timed_.empty()) return;
  const TimePoint now = SteadyClock().Now();
  for (size_t i = 0; i < timed_.size(); ++i) {  // TryFinish may append
    if (MpiEndpoint* endpoint = endpoints_.Get(timed_[i])) endpoint->TryFinish(now);
  }
  std::erase_if(timed_, [this](EndpointId id) {
    const MpiEndpoint* endpoint = endpoints_.Get(id);
    return endpoint == nullptr || endpoint->state_ == MpiEndpoint::State::kOpen ||
           endpoint->state_ == MpiEndpoint::State::kClosed;
  });
}

void MpiTransport::Poll(std::vector<Event>* events) {
  endpoints_.Bury();
  Progress();
  endpoints_.HandOver(&events_, events, [this](EndpointId id) { windows_->RevokePeer(id); });
}

void MpiTransport::Wait(Duration at_most) {
  const TimePoint start = SteadyClock().Now();
  const TimePoint deadline = start + at_most;
  Duration sleep = kShortSleep;
  for (TimePoint now = start; events_.empty() && now < deadline; now = SteadyClock().Now()) {
    Progress();
    if (!events_.empty()) return;
    if (now - start < kSpin) {
      sched_yield();
      continue;
    }
    const Duration nap = std::min(sleep, deadline - now);
    const timespec time{.tv_sec = 0, .tv_nsec = static_cast<long>(nap.count())};
    nanosleep(&time, nullptr);
    sleep = std::min(sleep * 2, kLongSleep);
  }
}

}  // namespace

std::unique_ptr<Transport> MakeMpiTransport(MPI_Comm communicator) {
  return std::make_unique<MpiTransport>(communicator);
}

}  // namespace kvant::mpi
