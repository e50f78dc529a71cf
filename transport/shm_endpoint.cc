#include "transport/shm_endpoint.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/bytes.h"
#include "base/random.h"

namespace kvant::shm {
namespace {

// Of one Poll, so that every endpoint has its turn.
constexpr int kRecordsATurn = 1024;
// Then whoever polls uses what has landed, and the peer goes on meanwhile.
constexpr uint64_t kBytesATurn = uint64_t{256} << 10;
// Revoking waits for no more than a piece.
constexpr uint64_t kPieceBytes = uint64_t{1} << 20;
// Messages that wait for the peer to take some.
constexpr size_t kMaxOutboxBytes = size_t{4} << 20;
// Memory blocks that one peer may announce.
constexpr size_t kMaxPages = 64;

}  // namespace

ShmShared::ShmShared(const ShmOptions& given)
    : options(given), bell(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)), memory(std::nullopt) {}

bool ShmShared::Revoke(uint64_t id) {
  const auto found = exposed.find(id);
  if (found == exposed.end()) return true;
  Exposed& window = found->second;
  window.revoked = true;
  if (window.channel != nullptr) {
    WindowSlot& slot = window.channel->our_window(window.slot);
    slot.key.store(0, std::memory_order_seq_cst);
    if (slot.landing.load(std::memory_order_seq_cst) != 0) return false;
    if (ShmEndpoint* endpoint = find(window.peer)) endpoint->GiveBack(window.slot);
  }
  exposed.erase(found);
  return true;
}

ShmEndpoint::ShmEndpoint(ShmShared* shared, EndpointId id, std::string peer, tcp::Socket socket,
                         std::unique_ptr<Channel> channel, TimePoint deadline)
    : shared_(shared),
      id_(id),
      peer_(std::move(peer)),
      socket_(std::move(socket)),
      channel_(std::move(channel)),
      deadline_(deadline) {
  CountSent(sizeof(PacketHeader));
  if (socket_) shared_->watcher.Watch(socket_.fd(), id_);
}

ShmEndpoint::ShmEndpoint(ShmShared* shared, EndpointId id, std::string peer, tcp::Socket socket,
                         std::unique_ptr<Channel> channel, tcp::Socket their_bell)
    : shared_(shared),
      id_(id),
      peer_(std::move(peer)),
      socket_(std::move(socket)),
      channel_(std::move(channel)),
      their_bell_(std::move(their_bell)),
      state_(State::kOpen) {
  CountSent(sizeof(PacketHeader));
  counters_.control_bytes_received += sizeof(PacketHeader);
  shared_->watcher.Watch(socket_.fd(), id_);
  shared_->events.push_back({.kind = Event::Kind::kConnected, .endpoint = id_});
}

Status ShmEndpoint::Send(std::span<const std::byte> message) {
  if (message.size() > shared_->options.max_message_bytes) {
    return InvalidArgument("sending a message of {} bytes to {}: at most {}", message.size(), peer_,
                           shared_->options.max_message_bytes);
  }
  if (state_ == State::kClosing || state_ == State::kClosed)
    return Unavailable("sending to {}: it is closed", peer_);
  if (outbox_bytes_ + message.size() > kMaxOutboxBytes ||
      outbox_.size() >= kMaxOutboxBytes / sizeof(Record)) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "sending to {}: {} bytes wait already; poll first", peer_, outbox_bytes_);
  }
  ++counters_.messages_sent;
  if (state_ == State::kOpen && outbox_.empty() && message.size() <= kMaxPieceBytes &&
      channel_->HasSpace(message.size())) {
    channel_->Put({.bytes = static_cast<uint32_t>(message.size())}, message);
    CountSent(sizeof(Record) + message.size());
    Ring();
    return OkStatus();
  }
  outbox_.push_back(std::vector<std::byte>(message.begin(), message.end()));
  outbox_bytes_ += message.size();
  return OkStatus();
}

size_t ShmEndpoint::Submit(std::span<const Transfer> transfers) {
  if (state_ == State::kClosing || state_ == State::kClosed) return 0;
  const size_t outstanding = queue_.size() + unreported_;
  const size_t most = shared_->options.max_outstanding;
  const size_t accepted = std::min(transfers.size(), most - std::min(most, outstanding));
  for (const Transfer& transfer : transfers.first(accepted)) queue_.push_back(transfer);
  counters_.transfers_submitted += accepted;
  return accepted;
}

const LinkCounters& ShmEndpoint::counters() const {
  all_counters_ = counters_;
  if (channel_ != nullptr) {
    const Side& theirs = channel_->theirs();
    all_counters_.payload_bytes_received += theirs.written.load(std::memory_order_relaxed);
    all_counters_.payload_bytes_sent += theirs.read.load(std::memory_order_relaxed);
  }
  return all_counters_;
}

void ShmEndpoint::Complete(uint64_t cookie, Status status) {
  ++unreported_;
  shared_->events.push_back({.kind = Event::Kind::kTransferDone,
                             .endpoint = id_,
                             .cookie = cookie,
                             .status = std::move(status)});
}

void ShmEndpoint::Ring() {
  if (!their_bell_ || channel_->theirs().sleeping.exchange(0, std::memory_order_seq_cst) == 0)
    return;
  const uint64_t once = 1;
  // A bell that can't be rung because it was rung so often is rung.
  static_cast<void>(write(their_bell_.fd(), &once, sizeof(once)) == sizeof(once));
}

void ShmEndpoint::SetSleeping(bool sleeping) {
  channel_->ours().sleeping.store(sleeping ? 1 : 0, std::memory_order_seq_cst);
}

bool ShmEndpoint::ReadyNow() {
  if (state_ == State::kHello || state_ == State::kClosed) return false;
  if (channel_->Readable()) return true;
  if (!outbox_.empty()) {
    const size_t left = outbox_.front().size() - outbox_at_;
    return channel_->HasSpace(std::min<uint64_t>(left, kMaxPieceBytes));
  }
  if (state_ == State::kClosing && !said_goodbye_) return channel_->HasSpace(0);
  return !queue_.empty() && (!queue_.front().immediate || channel_->HasSpace(0));
}

void ShmEndpoint::OnSocket() {
  Packet packet;
  while (state_ != State::kClosed) {
    switch (ReceivePacket(socket_, &packet)) {
      case Received::kNothing:
        return;
      case Received::kMalformed:
        Fail(InvalidArgument("{}: a packet that is none of shm's", peer_));
        return;
      case Received::kEnd:
        ended_ = true;
        shared_->watcher.Unwatch(socket_.fd());
        return;
      case Received::kPacket:
        OnPacket(std::move(packet));
    }
  }
}

void ShmEndpoint::OnPacket(Packet packet) {
  const PacketHeader& header = packet.header;
  counters_.control_bytes_received += sizeof(header) + packet.text.size();
  const bool hello = state_ == State::kHello;
  if (hello && header.type == PacketType::kRefused) {
    Fail(Unavailable("connecting to {}: {}", peer_, packet.text));
    return;
  }
  if (hello && header.type == PacketType::kWelcome && packet.files.size() == 1) {
    their_bell_ = std::move(packet.files[0]);
    state_ = State::kOpen;
    shared_->events.push_back({.kind = Event::Kind::kConnected, .endpoint = id_});
    return;
  }
  if (!hello && header.type == PacketType::kPages && packet.files.size() == 1 &&
      theirs_.size() < kMaxPages) {
    auto mapped = SharedMemory::Map(std::move(packet.files[0]), header.second);
    if (mapped.ok()) {
      theirs_.push_back({header.first, *std::move(mapped)});
    } else {
      Fail(mapped.status());
    }
    return;
  }
  if (!hello && header.type == PacketType::kForget) {
    std::erase_if(theirs_, [&](const Pages& pages) { return pages.number == header.first; });
    return;
  }
  Fail(InvalidArgument("{}: a packet of type {} at the wrong time", peer_,
                       static_cast<int>(header.type)));
}

void ShmEndpoint::OnRecord(const Record& record) {
  counters_.control_bytes_received += sizeof(Record) + record.bytes;
  switch (record.kind) {
    case RecordKind::kMessage:
      if (incoming_.size() > shared_->options.max_message_bytes) {
        Fail(InvalidArgument("{}: a message of more than {} bytes", peer_,
                             shared_->options.max_message_bytes));
        return;
      }
      if (record.last == 0) return;
      shared_->events.push_back({.kind = Event::Kind::kMessage,
                                 .endpoint = id_,
                                 .message = std::exchange(incoming_, {})});
      return;
    case RecordKind::kWritten: {
      const auto found = shared_->exposed.find(record.window);
      if (found == shared_->exposed.end() || found->second.peer != id_ || found->second.revoked)
        return;
      shared_->events.push_back({.kind = Event::Kind::kWritten,
                                 .endpoint = id_,
                                 .window = record.window,
                                 .immediate = record.immediate});
      return;
    }
    case RecordKind::kGoodbye:
      goodbye_ = true;
      return;
  }
  Fail(InvalidArgument("{}: a record of unknown kind", peer_));
}

void ShmEndpoint::ReadRing() {
  bool took = false;
  for (int i = 0; i < kRecordsATurn && !goodbye_ && state_ != State::kClosed; ++i) {
    const auto record = channel_->Take(&incoming_);
    if (!record) break;
    took = true;
    OnRecord(*record);
  }
  if (state_ == State::kClosed) return;
  if (channel_->broken()) {
    Fail(InvalidArgument("{}: what it wrote into the ring is no record", peer_));
    return;
  }
  if (took && channel_->theirs().waits_for_space.exchange(0, std::memory_order_seq_cst) != 0)
    Ring();
}

std::span<std::byte> ShmEndpoint::PagesOfPeer(uint64_t number) {
  for (int attempt = 0; attempt < 2; ++attempt) {
    for (const Pages& pages : theirs_) {
      if (pages.number == number) return pages.memory.bytes();
    }
    // Announced before the window was, but perhaps not read yet.
    if (!ended_) OnSocket();
  }
  return {};
}

Status ShmEndpoint::CopyPiece(const Transfer& transfer, uint64_t at, uint64_t bytes) {
  const RemoteWindow& remote = transfer.remote;
  const bool write = transfer.op == Transfer::Op::kWrite;
  const auto access = static_cast<uint32_t>(write ? Access::kRemoteWrite : Access::kRemoteRead);
  WindowSlot& slot = channel_->their_window(remote.id % kWindows);
  const auto load = [](const auto& field) { return field.load(std::memory_order_relaxed); };
  // Whoever revokes clears the key first and then looks for who is landing.
  slot.landing.fetch_add(1, std::memory_order_seq_cst);
  std::span<std::byte> there;
  bool exposed = remote.key != 0 && slot.key.load(std::memory_order_seq_cst) == remote.key &&
                 load(slot.id) == remote.id && (load(slot.access) & access) != 0 &&
                 RangeFits(transfer.remote_offset, transfer.local.size(), load(slot.length));
  if (exposed && bytes > 0) {
    const std::span<std::byte> pages = PagesOfPeer(load(slot.pages));
    const uint64_t offset = load(slot.offset);
    // The peer's own words are not believed.
    exposed = state_ != State::kClosed && RangeFits(offset, load(slot.length), pages.size()) &&
              RangeFits(transfer.remote_offset, transfer.local.size(), pages.size() - offset);
    if (exposed) there = pages.subspan(offset + transfer.remote_offset + at, bytes);
  }
  if (!there.empty()) {
    std::byte* local = transfer.local.data() + at;
    std::memcpy(write ? there.data() : local, write ? local : there.data(), bytes);
  }
  slot.landing.fetch_sub(1, std::memory_order_seq_cst);
  if (!exposed) {
    return MakeStatus(StatusCode::kPermissionDenied, "{} does not expose that window to us", peer_);
  }
  Side& ours = channel_->ours();
  (write ? ours.written : ours.read).fetch_add(bytes, std::memory_order_relaxed);
  (write ? counters_.payload_bytes_sent : counters_.payload_bytes_received) += bytes;
  return OkStatus();
}

bool ShmEndpoint::Step() {
  const Transfer& transfer = queue_.front();
  const bool write = transfer.op == Transfer::Op::kWrite;
  const bool says = write && transfer.immediate.has_value();
  Status status;
  if (queue_at_ == 0) status = shared_->memory.Check(transfer, kMaxTransferBytes);
  const uint64_t left = transfer.local.size() - queue_at_;
  const uint64_t bytes = std::min(left, kPieceBytes);
  const bool last = bytes == left;
  if (status.ok() && last && says && !channel_->HasSpace(0)) return false;
  if (status.ok()) {
    status = CopyPiece(transfer, queue_at_, bytes);
    if (state_ == State::kClosed) return false;
    if (status.ok() && !last) {
      queue_at_ += bytes;
      return true;
    }
    if (status.ok() && says) {
      channel_->Put({.kind = RecordKind::kWritten,
                     .immediate = *transfer.immediate,
                     .window = transfer.remote.id},
                    {});
      CountSent(sizeof(Record));
      Ring();
    }
    // Writes at what is not exposed are discarded without a word.
    if (write) status = OkStatus();
  }
  Complete(transfer.cookie, std::move(status));
  queue_.pop_front();
  queue_at_ = 0;
  return true;
}

void ShmEndpoint::Transfers() {
  uint64_t moved = 0;
  while (!queue_.empty() && moved < kBytesATurn && state_ == State::kOpen) {
    const uint64_t before =
        std::min<uint64_t>(queue_.front().local.size() - queue_at_, kPieceBytes);
    if (!Step()) return;
    moved += before;
  }
}

void ShmEndpoint::FlushOutbox() {
  bool put = false;
  while (!outbox_.empty()) {
    const std::span<const std::byte> left = std::span(outbox_.front()).subspan(outbox_at_);
    const auto bytes = std::min<uint64_t>(left.size(), kMaxPieceBytes);
    if (!channel_->HasSpace(bytes)) break;
    const bool last = bytes == left.size();
    channel_->Put({.bytes = static_cast<uint32_t>(bytes), .last = static_cast<uint8_t>(last)},
                  left.first(bytes));
    CountSent(sizeof(Record) + bytes);
    put = true;
    outbox_at_ += bytes;
    outbox_bytes_ -= bytes;
    if (!last) continue;
    outbox_.pop_front();
    outbox_at_ = 0;
  }
  if (state_ == State::kClosing && outbox_.empty() && !said_goodbye_ && channel_->HasSpace(0)) {
    channel_->Put({.kind = RecordKind::kGoodbye}, {});
    CountSent(sizeof(Record));
    said_goodbye_ = put = true;
  }
  if (put) Ring();
}

void ShmEndpoint::Progress() {
  if (state_ == State::kHello) {
    if (ended_) Fail(Unavailable("connecting to {}: it went away", peer_));
    return;
  }
  if (state_ == State::kClosed) return;
  const bool ended = ended_;  // seen before the ring was read to its end
  ReadRing();
  if (state_ == State::kClosed) return;
  Transfers();
  if (state_ == State::kClosed) return;
  FlushOutbox();
  if (channel_->broken()) {
    Fail(InvalidArgument("{}: it took more from the ring than there was", peer_));
  } else if (goodbye_ && state_ == State::kOpen) {
    // Our goodbye, for a peer that waits for it.
    state_ = State::kClosing;
    outbox_ = {};
    outbox_at_ = outbox_bytes_ = 0;
    FlushOutbox();
    Finish(OkStatus(), StatusCode::kUnavailable);
  } else if (state_ == State::kClosing && ((said_goodbye_ && goodbye_) || ended)) {
    Finish(OkStatus(), StatusCode::kCancelled);
  } else if (ended && !channel_->Readable()) {
    Fail(Unavailable("{}: its process is gone", peer_));
  }
}

void ShmEndpoint::Close() {
  if (state_ == State::kClosing || state_ == State::kClosed) return;
  for (; !queue_.empty(); queue_.pop_front()) {
    Complete(queue_.front().cookie,
             MakeStatus(StatusCode::kCancelled, "{}: closed before it was done", peer_));
  }
  if (state_ == State::kHello) {
    Finish(OkStatus(), StatusCode::kCancelled);
    return;
  }
  state_ = State::kClosing;
  deadline_ = SteadyClock().Now() + kGoodbyeTimeout;
  FlushOutbox();
}

void ShmEndpoint::OnTimer(TimePoint now) {
  if (now < deadline_ || !HasTimer()) return;
  if (state_ == State::kHello) {
    Fail(MakeStatus(StatusCode::kDeadlineExceeded, "connecting to {}: no answer in time", peer_));
  } else {
    Finish(OkStatus(), StatusCode::kCancelled);
  }
}

void ShmEndpoint::Leave() {
  if (state_ != State::kOpen && state_ != State::kClosing) return;
  state_ = State::kClosing;
  FlushOutbox();
}

void ShmEndpoint::Finish(const Status& why, StatusCode transfers_end_with) {
  if (state_ == State::kClosed) return;
  for (; !queue_.empty(); queue_.pop_front()) {
    Complete(queue_.front().cookie,
             MakeStatus(transfers_end_with, "{}: the connection ended before it was done", peer_));
  }
  state_ = State::kClosed;
  // Of a process that is gone nothing lands.
  std::vector<uint64_t> windows;
  for (auto& [id, window] : shared_->exposed) {
    if (window.peer != id_) continue;
    if (ended_) window.channel = nullptr;
    windows.push_back(id);
  }
  for (const uint64_t id : windows) {
    if (!shared_->Revoke(id)) shared_->exposed[id].peer = 0;
  }
  if (socket_ && !ended_) shared_->watcher.Unwatch(socket_.fd());
  shared_->events.push_back({.kind = Event::Kind::kClosed, .endpoint = id_, .status = why});
}

Result<RemoteWindow> ShmEndpoint::Expose(const Pages& pages, uint64_t offset, uint64_t length,
                                         Access access) {
  if (std::find(announced_.begin(), announced_.end(), pages.number) == announced_.end()) {
    if (!SendPacket(socket_,
                    {.type = PacketType::kPages,
                     .first = pages.number,
                     .second = pages.memory.bytes().size()},
                    {}, {pages.memory.fd()})) {
      // A process that is gone shows in the next poll, too.
      if (errno != EAGAIN) return Unavailable("{}: its process is gone", peer_);
      return MakeStatus(StatusCode::kResourceExhausted,
                        "exposing memory to {}: its socket is full; poll first", peer_);
    }
    CountSent(sizeof(PacketHeader));
    announced_.push_back(pages.number);
  }
  uint32_t index = next_slot_;
  if (!free_slots_.empty()) {
    index = free_slots_.back();
    free_slots_.pop_back();
  } else if (next_slot_ == kWindows) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "exposing memory to {}: it has {} windows; revoke some first", peer_,
                      kWindows);
  } else {
    ++next_slot_;
  }
  const uint64_t id = kShmBit | ++shared_->generation * kWindows | index;
  const uint64_t key = SecureRandomUint64() | 1;
  WindowSlot& slot = channel_->our_window(index);
  slot.access.store(static_cast<uint32_t>(access), std::memory_order_relaxed);
  slot.id.store(id, std::memory_order_relaxed);
  slot.pages.store(pages.number, std::memory_order_relaxed);
  slot.offset.store(offset, std::memory_order_relaxed);
  slot.length.store(length, std::memory_order_relaxed);
  slot.key.store(key, std::memory_order_seq_cst);
  shared_->exposed[id] = {.peer = id_,
                          .begin = pages.memory.bytes().data() + offset,
                          .slot = index,
                          .channel = channel_};
  return RemoteWindow{id, key, length};
}

void ShmEndpoint::Forget(uint64_t pages) {
  const auto found = std::find(announced_.begin(), announced_.end(), pages);
  if (found == announced_.end() || state_ == State::kClosed) return;
  announced_.erase(found);
  // Where it can't be said, the peer keeps the mapping until the connection ends.
  if (SendPacket(socket_, {.type = PacketType::kForget, .first = pages}, {}, {}))
    CountSent(sizeof(PacketHeader));
}

}  // namespace kvant::shm
