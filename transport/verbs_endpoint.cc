#include "transport/verbs_endpoint.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/bytes.h"

namespace kvant::verbs {
namespace {

// Of one Poll, so that every endpoint has its turn.
constexpr int kCompletionsATurn = 1024;
// What one request moves at most: revoking waits for no more than what is under way.
constexpr uint64_t kPieceBytes = uint64_t{1} << 20;
// Of one endpoint: at 400 Gbit/s that is what a link holds for 160 us.
constexpr uint64_t kMaxBytesUnderWay = uint64_t{8} << 20;
// Records that wait for credits.
constexpr size_t kMaxOutboxBytes = size_t{4} << 20;
constexpr size_t kMaxOutbox = size_t{1} << 17;
// What an immediate is on the wire.
constexpr uint64_t kImmediateBytes = 4;

uint32_t TakeUpTo32Bits(uint64_t* count) {
  const auto part =
      static_cast<uint32_t>(std::min<uint64_t>(*count, std::numeric_limits<uint32_t>::max()));
  *count -= part;
  return part;
}

}  // namespace

VerbsShared::VerbsShared(const VerbsOptions& given, std::unique_ptr<Device> opened)
    : options(given),
      device(std::move(opened)),
      channel(device->library().create_channel(device->context()),
              device->library().destroy_channel),
      pool(device.get()),
      memory(std::nullopt) {}

uint32_t VerbsShared::LocalKey(std::span<const std::byte> local) const {
  const auto found =
      std::find_if(registered.begin(), registered.end(), [local](const Registered& candidate) {
        return local.data() >= candidate.bytes.data() &&
               local.data() + local.size() <= candidate.bytes.data() + candidate.bytes.size();
      });
  KV_CHECK(found != registered.end());
  return found->memory->lkey;
}

VerbsEndpoint::VerbsEndpoint(VerbsShared* shared, EndpointId id, std::string peer,
                             tcp::Socket socket, std::unique_ptr<Queue> queue, TimePoint deadline)
    : shared_(shared),
      id_(id),
      peer_(std::move(peer)),
      greeter_(std::move(socket)),
      deadline_(deadline),
      queue_(std::move(queue)),
      exposed_(&shared->pool) {
  if (greeter_.socket()) shared_->watcher.Watch(greeter_.socket().fd(), id_, EPOLLOUT);
}

VerbsEndpoint::VerbsEndpoint(VerbsShared* shared, EndpointId id, std::string peer,
                             tcp::Socket socket, std::unique_ptr<Queue> queue)
    : shared_(shared),
      id_(id),
      peer_(std::move(peer)),
      greeter_(std::move(socket)),
      state_(State::kOpen),
      queue_(std::move(queue)),
      exposed_(&shared->pool) {
  counters_.control_bytes_sent = kGreetingBytes;
  counters_.control_bytes_received = 2 * kGreetingBytes;
  shared_->watcher.Watch(greeter_.socket().fd(), id_);
  shared_->events.push_back({.kind = Event::Kind::kConnected, .endpoint = id_});
}

void VerbsEndpoint::OnSocket() {
  if (state_ == State::kConnecting) {
    if (const Status status = tcp::FinishConnect(greeter_.socket()); !status.ok()) {
      Fail(Unavailable("connecting to {}: {}", peer_, status.message()));
      return;
    }
    tcp::TuneForBulk(greeter_.socket(), shared_->options.silence_timeout);
    shared_->watcher.Change(greeter_.socket().fd(), id_, EPOLLIN);
    if (!greeter_.Send(queue_->Introduce(GreetingType::kHello))) {
      Fail(Unavailable("connecting to {}: it takes no hello", peer_));
      return;
    }
    counters_.control_bytes_sent += kGreetingBytes;
    state_ = State::kHello;
    return;
  }
  if (state_ == State::kClosed) return;
  Greeting greeting;
  std::string text;
  switch (greeter_.Receive(&greeting, &text)) {
    case Greeter::Received::kNothing:
      return;
    case Greeter::Received::kMalformed:
      Violate("what it says over the socket is no greeting of this release");
      return;
    case Greeter::Received::kEnd:
      ended_ = true;
      shared_->watcher.Unwatch(greeter_.socket().fd());
      return;
    case Greeter::Received::kGreeting:
      break;
  }
  counters_.control_bytes_received += kGreetingBytes + text.size();
  if (state_ == State::kHello && greeting.type == GreetingType::kRefused) {
    Fail(Unavailable("connecting to {}: {}", peer_, text));
  } else if (state_ == State::kHello && greeting.type == GreetingType::kWelcome) {
    Status status = queue_->Connect(greeting);
    if (status.ok() && !greeter_.Send({.type = GreetingType::kReady}))
      status = Unavailable("it went away");
    if (!status.ok()) {
      Fail(Unavailable("connecting to {}: {}", peer_, status.message()));
      return;
    }
    counters_.control_bytes_sent += kGreetingBytes;
    state_ = State::kOpen;
    shared_->events.push_back({.kind = Event::Kind::kConnected, .endpoint = id_});
  } else {
    Violate("a greeting at the wrong time");
  }
}

Status VerbsEndpoint::Send(std::span<const std::byte> message) {
  if (message.size() > shared_->options.max_message_bytes) {
    return InvalidArgument("sending a message of {} bytes to {}: at most {}", message.size(), peer_,
                           shared_->options.max_message_bytes);
  }
  if (state_ == State::kClosing || state_ == State::kClosed)
    return Unavailable("sending to {}: it is closed", peer_);
  if (outbox_bytes_ + message.size() > kMaxOutboxBytes || outbox_.size() >= kMaxOutbox) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "sending to {}: {} bytes wait already; poll first", peer_, outbox_bytes_);
  }
  ++counters_.messages_sent;
  if (state_ == State::kOpen && outbox_.empty() && message.size() <= kMaxPieceBytes &&
      queue_->HasRoom(1) && queue_->HasCredit()) {
    PutRecord(RecordType::kMessage, true, message);
  } else {
    outbox_.push_back({.message = std::vector<std::byte>(message.begin(), message.end())});
    outbox_bytes_ += message.size();
  }
  if (state_ == State::kOpen) Post();
  return OkStatus();
}

size_t VerbsEndpoint::Submit(std::span<const Transfer> transfers) {
  if (state_ == State::kClosing || state_ == State::kClosed) return 0;
  const size_t outstanding =
      waiting_.size() + active_.size() - idle_.size() - (waiting_at_ > 0 ? 1 : 0) + unreported_;
  const size_t most = shared_->options.max_outstanding;
  const size_t accepted = std::min(transfers.size(), most - std::min(most, outstanding));
  for (const Transfer& transfer : transfers.first(accepted)) waiting_.push_back(transfer);
  counters_.transfers_submitted += accepted;
  if (state_ == State::kOpen) Post();
  return accepted;
}

void VerbsEndpoint::Complete(uint64_t cookie, Status status) {
  ++unreported_;
  shared_->events.push_back({.kind = Event::Kind::kTransferDone,
                             .endpoint = id_,
                             .cookie = cookie,
                             .status = std::move(status)});
}

void VerbsEndpoint::PutRecord(RecordType type, bool last, std::span<const std::byte> body) {
  counters_.control_bytes_sent += kRecordHeaderBytes + body.size();
  queue_->PutRecord({.type = type,
                     .last = last,
                     .written = TakeUpTo32Bits(&untold_written_),
                     .read = TakeUpTo32Bits(&untold_read_)},
                    body);
}

void VerbsEndpoint::PutWindowRecord(RecordType type, uint64_t window) {
  if (type != RecordType::kExposed) {
    std::array<std::byte, sizeof(window)> body;
    StoreLittle(body.data(), window);
    PutRecord(type, true, body);
    return;
  }
  const ExposedSlot* slot = exposed_.Find(window);
  KV_CHECK(slot != nullptr);
  WindowRecord record{.id = slot->id,
                      .key = slot->key,
                      .address = reinterpret_cast<uintptr_t>(slot->bytes.data()),
                      .length = slot->bytes.size(),
                      .access = static_cast<uint32_t>(slot->access)};
  if (slot->window != nullptr) {
    record.device_key = ibv_inc_rkey(slot->window->rkey);
    const int access =
        ((record.access & static_cast<uint32_t>(Access::kRemoteRead)) != 0 ? IBV_ACCESS_REMOTE_READ
                                                                           : 0) |
        ((record.access & static_cast<uint32_t>(Access::kRemoteWrite)) != 0
             ? IBV_ACCESS_REMOTE_WRITE
             : 0);
    queue_->PutBind(slot->window, record.device_key, slot->memory, slot->bytes, access);
  }
  PutRecord(RecordType::kExposed, true, Encode(record));
}

void VerbsEndpoint::Say(RecordType type, uint64_t window) {
  if (said_goodbye_) return;
  outbox_.push_back({.type = type, .window = window});
  if (is_open()) FlushOutbox();
}

void VerbsEndpoint::FlushOutbox() {
  // Two: a window is bound before it is announced.
  while (!outbox_.empty() && queue_->HasCredit() && queue_->HasRoom(2)) {
    const Outgoing& first = outbox_.front();
    if (first.type == RecordType::kMessage) {
      const std::span<const std::byte> left = std::span(first.message).subspan(outbox_at_);
      const size_t bytes = std::min(left.size(), kMaxPieceBytes);
      const bool last = bytes == left.size();
      PutRecord(RecordType::kMessage, last, left.first(bytes));
      outbox_at_ += bytes;
      outbox_bytes_ -= bytes;
      if (!last) continue;
      outbox_at_ = 0;
    } else {
      PutWindowRecord(first.type, first.window);
    }
    outbox_.pop_front();
  }
}

void VerbsEndpoint::Take() {
  Completion next;
  for (int i = 0; i < kCompletionsATurn && state_ != State::kClosed && queue_->Next(&next); ++i) {
    switch (next.kind) {
      case Completion::Kind::kRecord:
        OnRecord(next.record);
        break;
      case Completion::Kind::kImmediate: {
        counters_.control_bytes_received += kImmediateBytes;
        const uint32_t slot = next.immediate >> 16;
        OnLanded(slot < exposed_.size() ? &exposed_[slot] : nullptr, next.immediate & 0xFFFF);
        break;
      }
      case Completion::Kind::kDone:
        OnDone(next.request);
        break;
      case Completion::Kind::kBroken:
        Fail(Unavailable("{}: {}", peer_, next.status.message()));
        break;
    }
  }
}

void VerbsEndpoint::OnRecord(std::span<const std::byte> record) {
  counters_.control_bytes_received += record.size();
  const auto header = record.size() < kRecordHeaderBytes
                          ? std::nullopt
                          : DecodeRecordHeader(record.first<kRecordHeaderBytes>());
  if (!header) {
    Violate("a record that is none");
    return;
  }
  queue_->AddCredits(header->credits);
  counters_.payload_bytes_received += header->written;
  counters_.payload_bytes_sent += header->read;
  if (goodbye_) return;
  const std::span<const std::byte> body = record.subspan(kRecordHeaderBytes);
  switch (header->type) {
    case RecordType::kMessage:
      if (incoming_.size() + body.size() > shared_->options.max_message_bytes) {
        Violate("a message that is too long");
        return;
      }
      incoming_.insert(incoming_.end(), body.begin(), body.end());
      if (!header->last) return;
      shared_->events.push_back({.kind = Event::Kind::kMessage,
                                 .endpoint = id_,
                                 .message = std::exchange(incoming_, {})});
      return;
    case RecordType::kWritten:
      if (body.size() != kWrittenBytes) {
        Violate("a record that is none");
        return;
      }
      OnLanded(exposed_.Find(LoadLittle<uint64_t>(body.data())),
               LoadLittle<uint32_t>(body.data() + 8));
      return;
    case RecordType::kExposed:
    case RecordType::kRevoke:
    case RecordType::kRevoked:
      OnWindowRecord(header->type, body);
      return;
    case RecordType::kCredits:
      return;
    case RecordType::kGoodbye:
      goodbye_ = true;
      return;
  }
}

void VerbsEndpoint::OnWindowRecord(RecordType type, std::span<const std::byte> body) {
  if (type == RecordType::kExposed) {
    const auto record = DecodeWindow(body);
    if (!record || !known_.Add(*record)) Violate("a window that can't be");
    return;
  }
  if (body.size() != sizeof(uint64_t)) {
    Violate("a record that is none");
    return;
  }
  const auto id = LoadLittle<uint64_t>(body.data());
  if (type == RecordType::kRevoked) {
    OnRevoked(id);
    return;
  }
  KnownWindow* window = known_.Find(id);
  if (window == nullptr || !window->usable) {
    Violate("a window revoked that is not exposed");
    return;
  }
  window->usable = false;
  window->letting_go = window->outstanding > 0;
  if (!window->letting_go) Say(RecordType::kRevoked, id);
}

void VerbsEndpoint::OnRevoked(uint64_t window) {
  ExposedSlot* slot = exposed_.Find(window);
  if (slot == nullptr || slot->state == ExposedSlot::State::kExposed || slot->let_go) {
    Violate("a window let go of that was not revoked");
    return;
  }
  slot->let_go = true;
  --revoking_;
  release_deadline_ = SteadyClock().Now() + shared_->options.release_timeout;
  if (slot->window == nullptr) {
    shared_->exposed.erase(window);
    exposed_.Release(slot);
    return;
  }
  slot->state = ExposedSlot::State::kInvalidating;
  let_go_.push_back(window);
}

void VerbsEndpoint::OnLanded(const ExposedSlot* slot, uint32_t immediate) {
  if (slot == nullptr || slot->state != ExposedSlot::State::kExposed || goodbye_) return;
  shared_->events.push_back(
      {.kind = Event::Kind::kWritten, .endpoint = id_, .window = slot->id, .immediate = immediate});
}

void VerbsEndpoint::OnDone(const Request& request) {
  switch (request.kind) {
    case Request::Kind::kRecord:
    case Request::Kind::kBind:
      return;
    case Request::Kind::kInvalidate: {
      ExposedSlot& slot = exposed_[request.index];
      shared_->exposed.erase(slot.id);
      exposed_.Release(&slot);
      return;
    }
    case Request::Kind::kPiece:
      break;
  }
  Active& active = active_[request.index];
  const bool write = active.transfer.op == Transfer::Op::kWrite;
  (write ? counters_.payload_bytes_sent : counters_.payload_bytes_received) += request.bytes;
  (write ? untold_written_ : untold_read_) += request.bytes;
  bytes_under_way_ -= request.bytes;
  --active.under_way;
  EndIfDone(request.index);
}

void VerbsEndpoint::EndIfDone(uint32_t index) {
  Active& active = active_[index];
  if (!active.all_posted || active.under_way > 0) return;
  Complete(active.transfer.cookie, std::move(active.status));
  const uint64_t id = active.transfer.remote.id;
  active = {};
  idle_.push_back(index);
  KnownWindow* window = known_.Find(id);
  if (--window->outstanding > 0 || !window->letting_go) return;
  window->letting_go = false;
  Say(RecordType::kRevoked, id);
}

uint32_t VerbsEndpoint::Begin(const Transfer& transfer) {
  if (idle_.empty()) {
    idle_.push_back(static_cast<uint32_t>(active_.size()));
    active_.emplace_back();
  }
  const uint32_t index = idle_.back();
  idle_.pop_back();
  active_[index] = {.transfer = transfer, .in_use = true};
  return index;
}

bool VerbsEndpoint::EndFirst(Status status) {
  if (waiting_at_ > 0) {
    active_[waiting_index_].status = std::move(status);
    active_[waiting_index_].all_posted = true;
    EndIfDone(waiting_index_);
  } else {
    Complete(waiting_.front().cookie, std::move(status));
  }
  waiting_.pop_front();
  waiting_at_ = 0;
  return true;
}

bool VerbsEndpoint::Step() {
  const Transfer& transfer = waiting_.front();
  const bool write = transfer.op == Transfer::Op::kWrite;
  if (waiting_at_ == 0) {
    Status status = shared_->memory.Check(transfer, kMaxTransferBytes);
    if (!status.ok()) return EndFirst(std::move(status));
  }
  KnownWindow* window = known_.Find(transfer);
  if (window == nullptr) {
    // Writes at what is not exposed are discarded without a word.
    return EndFirst(write ? OkStatus()
                          : MakeStatus(StatusCode::kPermissionDenied,
                                       "{} does not expose that window to us", peer_));
  }
  const uint64_t left = transfer.local.size() - waiting_at_;
  const uint64_t bytes =
      std::min({left, kPieceBytes, uint64_t{shared_->device->max_message_bytes()}});
  const bool last = bytes == left;
  const bool says = write && last && transfer.immediate.has_value();
  if (!queue_->HasRoom(2) || (says && !queue_->HasCredit()) ||
      (bytes_under_way_ > 0 && bytes_under_way_ + bytes > kMaxBytesUnderWay)) {
    return false;
  }
  const auto packed =
      says && bytes > 0 ? PackImmediate(transfer.remote.id, *transfer.immediate) : std::nullopt;
  if (bytes > 0) {
    if (waiting_at_ == 0) {
      waiting_index_ = Begin(transfer);
      ++window->outstanding;
    }
    queue_->PutPiece(
        {.write = write,
         .local = transfer.local.subspan(waiting_at_, bytes),
         .local_key = shared_->LocalKey(transfer.local),
         .remote_address = window->record.address + transfer.remote_offset + waiting_at_,
         .remote_key = window->record.device_key,
         .immediate = packed,
         .last = last},
        waiting_index_);
    ++active_[waiting_index_].under_way;
    bytes_under_way_ += bytes;
    waiting_at_ += bytes;
  }
  if (packed) {
    counters_.control_bytes_sent += kImmediateBytes;
  } else if (says) {
    PutRecord(RecordType::kWritten, true, EncodeWritten(transfer.remote.id, *transfer.immediate));
  }
  return last ? EndFirst(OkStatus()) : true;
}

void VerbsEndpoint::Post() {
  queue_->Renew();
  FlushOutbox();
  for (; !let_go_.empty() && queue_->HasRoom(1); let_go_.pop_front()) {
    ExposedSlot* slot = exposed_.Find(let_go_.front());
    if (slot->window == nullptr) {
      exposed_.Release(slot);
    } else {
      queue_->PutInvalidate(slot->window->rkey, SlotOf(slot->id));
    }
  }
  while (!waiting_.empty() && Step()) {
  }
  if (state_ == State::kClosing && !said_goodbye_ && outbox_.empty() && queue_->HasRoom(1) &&
      queue_->HasCredit()) {
    PutRecord(RecordType::kGoodbye, true, {});
    said_goodbye_ = true;
  }
  if (queue_->OwesCredits()) PutRecord(RecordType::kCredits, true, {});
  if (const Status status = queue_->Flush(); !status.ok()) Fail(status);
}

void VerbsEndpoint::Progress() {
  if (state_ == State::kClosed) return;
  if (!is_open()) {
    if (ended_) Fail(Unavailable("connecting to {}: it went away", peer_));
    return;
  }
  const bool ended = ended_;  // seen before all that came was taken
  Take();
  if (state_ == State::kClosed) return;
  if (goodbye_ && state_ == State::kOpen) {
    // Our goodbye, for a peer that waits for it.
    outbox_ = {};
    outbox_at_ = outbox_bytes_ = 0;
    CancelWaiting(StatusCode::kUnavailable);
    state_ = State::kClosing;
    deadline_ = SteadyClock().Now() + kGoodbyeTimeout;
  }
  Post();
  if (state_ == State::kClosed) return;
  if (state_ == State::kClosing &&
      ((said_goodbye_ && goodbye_ && queue_->idle()) || (ended && !queue_->Ready()))) {
    Finish(OkStatus(), ends_with_);
  } else if (ended && !queue_->Ready()) {
    Fail(Unavailable("{}: its process is gone", peer_));
  }
}

void VerbsEndpoint::CancelWaiting(StatusCode code) {
  while (!waiting_.empty())
    EndFirst(MakeStatus(code, "{}: the connection ended before it was done", peer_));
}

void VerbsEndpoint::Close() {
  if (state_ == State::kClosing || state_ == State::kClosed) return;
  ends_with_ = StatusCode::kCancelled;
  if (!is_open()) {
    Finish(OkStatus(), ends_with_);
    return;
  }
  CancelWaiting(ends_with_);
  state_ = State::kClosing;
  deadline_ = SteadyClock().Now() + kGoodbyeTimeout;
  Post();
}

void VerbsEndpoint::OnTimer(TimePoint now) {
  if (!HasTimer() || now < deadline()) return;
  if (state_ == State::kClosing) {
    Finish(OkStatus(), ends_with_);
  } else if (state_ == State::kOpen) {
    Fail(Unavailable("{}: it does not let go of a window that was revoked", peer_));
  } else {
    Fail(MakeStatus(StatusCode::kDeadlineExceeded, "connecting to {}: no answer in time", peer_));
  }
}

void VerbsEndpoint::Leave() {
  if (is_open()) Close();
}

bool VerbsEndpoint::Leaving() {
  if (state_ != State::kClosing) return false;
  Take();
  if (state_ == State::kClosing) Post();
  return state_ == State::kClosing && !(said_goodbye_ && queue_->idle());
}

void VerbsEndpoint::Violate(std::string_view what) { Fail(InvalidArgument("{}: {}", peer_, what)); }

void VerbsEndpoint::Finish(const Status& why, StatusCode transfers_end_with) {
  if (state_ == State::kClosed) return;
  state_ = State::kClosed;
  said_goodbye_ = true;
  CancelWaiting(transfers_end_with);
  // The device lets go of all memory before anybody is told that a transfer is done.
  exposed_.DropAll();
  queue_.reset();
  std::erase_if(shared_->exposed, [this](const auto& entry) { return entry.second.peer == id_; });
  for (const Active& active : active_) {
    if (!active.in_use) continue;
    Complete(active.transfer.cookie,
             MakeStatus(transfers_end_with, "{}: the connection ended before it was done", peer_));
  }
  active_.clear();
  idle_.clear();
  if (greeter_.socket() && !ended_) shared_->watcher.Unwatch(greeter_.socket().fd());
  greeter_ = Greeter(tcp::Socket());
  shared_->events.push_back({.kind = Event::Kind::kClosed, .endpoint = id_, .status = why});
}

Result<RemoteWindow> VerbsEndpoint::Expose(const Registered& memory, std::span<std::byte> bytes,
                                           Access access) {
  const ExposedSlot* slot = outbox_.size() >= kMaxOutbox
                                ? nullptr
                                : exposed_.Add(++shared_->generation, bytes, memory.memory, access);
  if (slot == nullptr) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "exposing memory to {}: {} windows are exposed to it; revoke some first",
                      peer_, exposed_.size());
  }
  const RemoteWindow remote{slot->id, slot->key, bytes.size()};
  shared_->exposed[remote.id] = {.peer = id_, .begin = bytes.data()};
  Say(RecordType::kExposed, remote.id);
  return remote;
}

bool VerbsEndpoint::Revoke(uint64_t window) {
  ExposedSlot* slot = exposed_.Find(window);
  if (slot == nullptr || slot->state != ExposedSlot::State::kExposed) return slot == nullptr;
  slot->state = ExposedSlot::State::kRevoked;
  if (revoking_++ == 0) release_deadline_ = SteadyClock().Now() + shared_->options.release_timeout;
  Say(RecordType::kRevoke, window);
  return false;
}

void VerbsEndpoint::Drop(uint64_t window) {
  ExposedSlot* slot = exposed_.Find(window);
  if (slot == nullptr) return;
  Revoke(window);
  // A window that is to be bound must be there until it is.
  if (const Status status = queue_->Flush(); !status.ok()) {
    Fail(status);
    return;
  }
  exposed_.Drop(slot);
  shared_->exposed.erase(window);
}

}  // namespace kvant::verbs
