#include "transport/tcp_bulk.h"

#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace kvant::tcp {
namespace {

// A call sends at most this much before other endpoints get their turn,
constexpr uint64_t kSendShareBytes = uint64_t{8} << 20;
// and receives about this much: whoever polls verifies and answers what has landed while the peer
// sends on. With all of many blocks received first, the two would take turns.
constexpr uint64_t kReceiveShareBytes = uint64_t{256} << 10;
constexpr size_t kMaxIovecs = 64;
// One sendmsg takes at most this much: more would not fit the socket's buffer anyway.
constexpr uint64_t kMaxBatchBytes = uint64_t{4} << 20;
// After some small frames, this much beyond the payload is received with it: many frames a call,
// for a copy of little bytes. Else only what holds a short message and the next header, so that
// next to no payload is ever copied.
constexpr size_t kStagingBytes = 32768;
constexpr size_t kShortStagingBytes = 512;
constexpr uint64_t kSmallPayload = 8192;
constexpr int kSomeSmallFrames = 4;
constexpr size_t kScratchBytes = 65536;
// Messages that wait to be sent: so many, and so many bytes before one more is taken.
constexpr size_t kQueuedMessages = 1024;
constexpr size_t kQueuedMessageBytes = size_t{16} << 20;
constexpr size_t kSpareFrames = 16;
constexpr size_t kSpareFrameBytes = 4096;

// Where discarded bytes go. One a thread, as two streams of a thread never receive at once.
std::span<std::byte> Scratch() {
  thread_local std::vector<std::byte> scratch(kScratchBytes);
  return scratch;
}

// What a peer gets of a window that was revoked while it was reading.
std::span<const std::byte> Zeros() {
  static constexpr std::array<std::byte, 65536> kZeros{};
  return kZeros;
}

bool WouldBlock(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

}  // namespace

BulkStream::BulkStream(Socket socket, const BulkContext& context)
    : socket_(std::move(socket)), context_(context), staging_(kStagingBytes) {}

void BulkStream::Queue(const BulkHeader& header, std::span<const std::byte> payload,
                       uint64_t cookie) {
  Out& out = out_.push_back({});
  Encode(header, out.header);
  out.payload = payload;
  out.cookie = cookie;
  out.window = header.window;
  out.op = header.op;
}

void BulkStream::Complete(uint64_t cookie, Status status) {
  ++unreported_;
  context_.events->push_back({.kind = Event::Kind::kTransferDone,
                              .endpoint = context_.endpoint,
                              .cookie = cookie,
                              .status = std::move(status)});
}

size_t BulkStream::Submit(std::span<const Transfer> transfers) {
  if (closing_ || peer_said_goodbye_) return 0;
  size_t accepted = 0;
  for (const Transfer& transfer : transfers) {
    if (unsent_writes_ + reads_.size() + unreported_ >= context_.max_outstanding) break;
    ++accepted;
    if (Status status = context_.windows->Check(transfer, kMaxTransferBytes); !status.ok()) {
      Complete(transfer.cookie, std::move(status));
      continue;
    }
    BulkHeader header{.window = transfer.remote.id,
                      .key = transfer.remote.key,
                      .offset = transfer.remote_offset,
                      .length = transfer.local.size()};
    if (transfer.op == Transfer::Op::kWrite) {
      header.op = BulkOp::kWrite;
      header.immediate = transfer.immediate;
      Queue(header, transfer.local, transfer.cookie);
      ++unsent_writes_;
    } else {
      header.op = BulkOp::kRead;
      header.tag = next_tag_++;
      Queue(header, {}, transfer.cookie);
      reads_.push_back({transfer.local, transfer.cookie, header.tag});
      ++unsent_reads_;
    }
  }
  context_.counters->transfers_submitted += accepted;
  // A broken connection shows again, and is handled, in the next Poll.
  if (accepted > 0 && writable_) static_cast<void>(Send());
  return accepted;
}

bool BulkStream::SendMessage(std::span<const std::byte> message, bool now) {
  if (messages_.size() >= kQueuedMessages || queued_message_bytes_ >= kQueuedMessageBytes) {
    return false;
  }
  std::vector<std::byte> frame;
  if (!spare_frames_.empty()) {
    frame = std::move(spare_frames_.back());
    spare_frames_.pop_back();
  }
  frame.resize(kMessageHeaderBytes + message.size());
  EncodeMessageHeader(static_cast<uint32_t>(message.size()),
                      std::span(frame).first<kMessageHeaderBytes>());
  std::copy(message.begin(), message.end(), frame.begin() + kMessageHeaderBytes);
  queued_message_bytes_ += frame.size();
  messages_.push_back(std::move(frame));
  // A broken connection shows again, and is handled, in the next Poll.
  if (now && writable_) static_cast<void>(Send());
  return true;
}

Status BulkStream::Send() {
  uint64_t budget = kSendShareBytes;
  while (writable_ && sending() && budget > 0) {
    std::array<iovec, kMaxIovecs> parts;
    size_t count = 0;
    uint64_t batch = 0;
    const auto add = [&](std::span<const std::byte> bytes) {
      parts[count++] = {const_cast<std::byte*>(bytes.data()), bytes.size()};
      batch += bytes.size();
    };
    const auto room = [&] { return count + 2 <= kMaxIovecs && batch < kMaxBatchBytes; };
    uint64_t skip = front_sent_;
    // Whether the whole rest of the frame went in.
    const auto add_frame = [&](Out& out) {
      const uint64_t header_skip = std::min<uint64_t>(skip, kBulkHeaderBytes);
      const uint64_t payload_skip = skip - header_skip;
      skip = 0;
      if (header_skip < kBulkHeaderBytes) add(std::span(out.header).subspan(header_skip));
      const std::span<const std::byte> rest = out.payload.subspan(payload_skip);
      if (rest.empty()) return true;
      if (out.op != BulkOp::kReadReply || context_.windows->Exposed(out.window)) {
        add(rest);
        return true;
      }
      const auto zeros = Zeros().first(std::min(rest.size(), Zeros().size()));
      add(zeros);
      return zeros.size() == rest.size();
    };
    // The frame under way, then messages, then the other frames: as Account takes them.
    const bool frame_first = !MessageIsNext();
    bool whole = !frame_first || add_frame(out_.front());
    for (size_t i = 0; i < messages_.size() && whole && room(); ++i) {
      add(std::span(messages_[i]).subspan(skip));
      skip = 0;
      whole = i + 1 == messages_.size() || room();
    }
    for (size_t i = frame_first ? 1 : 0; i < out_.size() && whole && room(); ++i) {
      whole = add_frame(out_[i]);
    }
    msghdr message{};
    message.msg_iov = parts.data();
    message.msg_iovlen = count;
    const ssize_t sent = sendmsg(socket_.fd(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent < 0) {
      if (!WouldBlock(errno)) return Unavailable("sending: {}", std::strerror(errno));
      if (errno != EINTR) writable_ = false;
      return OkStatus();
    }
    Account(static_cast<size_t>(sent));
    if (static_cast<uint64_t>(sent) < batch) writable_ = false;
    budget -= std::min<uint64_t>(budget, static_cast<uint64_t>(sent));
  }
  return OkStatus();
}

void BulkStream::Account(size_t sent) {
  uint64_t left = sent;
  while (left > 0) {
    message_under_way_ = MessageIsNext();
    if (message_under_way_) {
      AccountMessage(&left);
    } else {
      AccountFrame(&left);
    }
  }
}

void BulkStream::AccountMessage(uint64_t* left) {
  const uint64_t whole = messages_.front().size();
  const uint64_t taken = std::min(*left, whole - front_sent_);
  context_.counters->control_bytes_sent += taken;
  front_sent_ += taken;
  *left -= taken;
  if (front_sent_ < whole) return;
  front_sent_ = 0;
  queued_message_bytes_ -= whole;
  // Out of the ring, which would keep the memory of a long one.
  std::vector<std::byte> frame = std::move(messages_.front());
  messages_.pop_front();
  if (spare_frames_.size() < kSpareFrames && frame.capacity() <= kSpareFrameBytes) {
    spare_frames_.push_back(std::move(frame));
  }
}

void BulkStream::AccountFrame(uint64_t* left) {
  Out& out = out_.front();
  const uint64_t total = kBulkHeaderBytes + out.payload.size();
  const uint64_t taken = std::min(*left, total - front_sent_);
  const uint64_t of_header =
      front_sent_ < kBulkHeaderBytes ? std::min(taken, kBulkHeaderBytes - front_sent_) : 0;
  context_.counters->control_bytes_sent += of_header;
  context_.counters->payload_bytes_sent += taken - of_header;
  front_sent_ += taken;
  *left -= taken;
  if (front_sent_ < total) return;
  front_sent_ = 0;
  if (out.op == BulkOp::kWrite) {
    --unsent_writes_;
    Complete(out.cookie, OkStatus());
  } else if (out.op == BulkOp::kRead) {
    --unsent_reads_;
  } else if (out.op == BulkOp::kReadReply || out.op == BulkOp::kReadRefused) {
    --replies_in_out_;
  }
  out_.pop_front();
}

void BulkStream::OnReady(bool readable, bool writable, bool hung_up) {
  readable_ = readable_ || readable || hung_up;
  writable_ = writable_ || writable;
  hung_up_ = hung_up_ || hung_up;
}

std::span<std::byte> BulkStream::Destination() {
  if (sink_ == Sink::kWindow && !context_.windows->Exposed(incoming_.window)) {
    sink_ = Sink::kDiscard;
    ++context_.defects->discarded_writes;
  }
  if (sink_ == Sink::kDiscard) {
    return Scratch().first(std::min<uint64_t>(payload_left_, kScratchBytes));
  }
  return landing_.first(payload_left_);
}

void BulkStream::Landed(size_t count) {
  payload_left_ -= count;
  if (sink_ == Sink::kDiscard) {
    context_.defects->discarded_bytes += count;
  } else {
    landing_ = landing_.subspan(count);
  }
  LinkCounters& counters = *context_.counters;
  (sink_ == Sink::kMessage ? counters.control_bytes_received : counters.payload_bytes_received) +=
      count;
}

Status BulkStream::Receive() {
  if (closing_) return ReceiveClosing();
  uint64_t budget = kReceiveShareBytes;
  while (!peer_said_goodbye_) {
    // What is staged comes first: it was received first.
    const size_t staged = staged_end_ - staged_begin_;
    if (sink_ != Sink::kNone && staged > 0 && payload_left_ > 0) {
      const std::span<std::byte> to = Destination();
      const size_t count = std::min(staged, to.size());
      std::memcpy(to.data(), staging_.data() + staged_begin_, count);
      staged_begin_ += count;
      Landed(count);
      if (payload_left_ > 0) continue;
    }
    if (sink_ != Sink::kNone && payload_left_ == 0) {
      OnPayloadDone();
      continue;
    }
    if (sink_ == Sink::kNone && staged >= kMessageHeaderBytes) {
      const bool message = IsMessage(std::span(staging_).subspan(staged_begin_, staged));
      if (message || staged >= kBulkHeaderBytes) {
        KV_RETURN_IF_ERROR(message ? OnMessage() : OnHeader());
        continue;
      }
    }
    if (!readable_ || budget == 0) return OkStatus();
    // Either a payload with nothing staged, or less than a header staged.
    if (staged_begin_ > 0) {
      std::memmove(staging_.data(), staging_.data() + staged_begin_, staged);
      staged_begin_ = 0;
      staged_end_ = staged;
    }
    std::array<iovec, 2> parts;
    size_t count = 0;
    size_t payload_room = 0;
    if (sink_ != Sink::kNone) {
      const std::span<std::byte> to = Destination();
      payload_room = to.size();
      parts[count++] = {to.data(), to.size()};
    }
    size_t staging_room = 0;
    if (payload_room == payload_left_) {
      staging_room =
          (small_frames_ >= kSomeSmallFrames ? staging_.size() : kShortStagingBytes) - staged;
      parts[count++] = {staging_.data() + staged, staging_room};
    }
    msghdr message{};
    message.msg_iov = parts.data();
    message.msg_iovlen = count;
    const ssize_t got = recvmsg(socket_.fd(), &message, MSG_DONTWAIT);
    if (got < 0) {
      if (!WouldBlock(errno)) return Unavailable("receiving: {}", std::strerror(errno));
      if (errno != EINTR) readable_ = false;
      return OkStatus();
    }
    if (got == 0) return Unavailable("the peer is gone without a goodbye");
    const size_t in_payload = std::min(static_cast<size_t>(got), payload_room);
    Landed(in_payload);
    staged_end_ += static_cast<size_t>(got) - in_payload;
    // A short read means that the socket is empty; only a hang-up needs another look.
    if (static_cast<size_t>(got) < payload_room + staging_room && !hung_up_) readable_ = false;
    budget -= std::min<uint64_t>(budget, static_cast<uint64_t>(got));
  }
  return OkStatus();
}

Status BulkStream::ReceiveClosing() {
  for (int i = 0; i < 64 && readable_; ++i) {
    const ssize_t got = recv(socket_.fd(), Scratch().data(), kScratchBytes, MSG_DONTWAIT);
    if (got == 0) return Unavailable("the peer is gone without a goodbye");
    if (got < 0) {
      if (!WouldBlock(errno)) return Unavailable("receiving: {}", std::strerror(errno));
      if (errno != EINTR) readable_ = false;
    }
  }
  return OkStatus();
}

Status BulkStream::OnHeader() {
  const auto raw = std::span<const std::byte, kBulkHeaderBytes>(staging_.data() + staged_begin_,
                                                                kBulkHeaderBytes);
  const auto header = DecodeBulkHeader(raw);
  staged_begin_ += kBulkHeaderBytes;
  context_.counters->control_bytes_received += kBulkHeaderBytes;
  if (!header) return InvalidArgument("the peer sent a malformed bulk frame");
  if (header->length > kMaxTransferBytes) {
    return InvalidArgument("the peer sent a bulk frame of {} bytes, more than {}", header->length,
                           kMaxTransferBytes);
  }
  incoming_ = *header;
  switch (header->op) {
    case BulkOp::kWrite:
      return OnWrite(*header);
    case BulkOp::kRead:
      ++small_frames_;
      return OnRead(*header);
    case BulkOp::kReadReply:
    case BulkOp::kReadRefused:
      return OnReadAnswer(*header);
    case BulkOp::kGoodbye:
      peer_said_goodbye_ = true;
      return OkStatus();
    case BulkOp::kHello:
    case BulkOp::kMessage:
      break;
  }
  return InvalidArgument("the peer sent a second hello");
}

Status BulkStream::OnMessage() {
  const auto length = DecodeMessageHeader(std::span<const std::byte, kMessageHeaderBytes>(
      staging_.data() + staged_begin_, kMessageHeaderBytes));
  staged_begin_ += kMessageHeaderBytes;
  context_.counters->control_bytes_received += kMessageHeaderBytes;
  if (!length) return InvalidArgument("the peer sent a malformed message frame");
  if (*length > context_.max_message_bytes) {
    return InvalidArgument("the peer sent a message of {} bytes, more than {}", *length,
                           context_.max_message_bytes);
  }
  incoming_ = {.op = BulkOp::kMessage, .length = *length};
  message_.resize(*length);
  sink_ = Sink::kMessage;
  landing_ = message_;
  payload_left_ = *length;
  return OkStatus();
}

Status BulkStream::OnWrite(const BulkHeader& header) {
  const auto window = context_.windows->Find(context_.endpoint, {header.window, header.key, 0},
                                             header.offset, header.length, Access::kRemoteWrite);
  payload_left_ = header.length;
  if (window) {
    sink_ = Sink::kWindow;
    landing_ = *window;
  } else {
    sink_ = Sink::kDiscard;
    ++context_.defects->discarded_writes;
  }
  return OkStatus();
}

Status BulkStream::OnRead(const BulkHeader& header) {
  if (replies_in_out_ >= context_.max_outstanding) {
    return InvalidArgument("the peer has more than {} reads in flight", context_.max_outstanding);
  }
  ++replies_in_out_;
  const auto window = context_.windows->Find(context_.endpoint, {header.window, header.key, 0},
                                             header.offset, header.length, Access::kRemoteRead);
  if (window) {
    Queue({.op = BulkOp::kReadReply,
           .tag = header.tag,
           .window = header.window,
           .offset = header.offset,
           .length = header.length},
          *window, 0);
  } else {
    ++context_.defects->refused_reads;
    Queue({.op = BulkOp::kReadRefused, .tag = header.tag, .window = header.window}, {}, 0);
  }
  return OkStatus();
}

Status BulkStream::OnReadAnswer(const BulkHeader& header) {
  // An answer to a request that has not left yet is a forgery, too.
  if (reads_.size() <= unsent_reads_ || reads_.front().tag != header.tag) {
    return InvalidArgument("the peer answered a read that was not asked next");
  }
  const PendingRead read = reads_.front();
  if (header.op == BulkOp::kReadRefused) {
    reads_.pop_front();
    Complete(read.cookie, MakeStatus(StatusCode::kPermissionDenied,
                                     "reading {} bytes: the peer does not expose them to us",
                                     read.local.size()));
    return OkStatus();
  }
  if (header.length != read.local.size()) {
    return InvalidArgument("the peer answered a read of {} bytes with {}", read.local.size(),
                           header.length);
  }
  sink_ = Sink::kRead;
  landing_ = read.local;
  payload_left_ = header.length;
  return OkStatus();
}

void BulkStream::OnPayloadDone() {
  small_frames_ = incoming_.length <= kSmallPayload ? small_frames_ + 1 : 0;
  if (sink_ == Sink::kRead) {
    const uint64_t cookie = reads_.front().cookie;
    reads_.pop_front();
    Complete(cookie, OkStatus());
  } else if (sink_ == Sink::kWindow && incoming_.immediate) {
    context_.events->push_back({.kind = Event::Kind::kWritten,
                                .endpoint = context_.endpoint,
                                .window = incoming_.window,
                                .immediate = *incoming_.immediate});
  } else if (sink_ == Sink::kMessage) {
    context_.events->push_back({.kind = Event::Kind::kMessage,
                                .endpoint = context_.endpoint,
                                .message = std::exchange(message_, {})});
  }
  sink_ = Sink::kNone;
}

void BulkStream::SayGoodbye() {
  closing_ = true;
  // The frame under way must be finished, or the goodbye would be taken for its payload.
  const size_t keep = front_sent_ > 0 && !message_under_way_ ? 1 : 0;
  for (size_t i = keep; i < out_.size(); ++i) {
    if (out_[i].op != BulkOp::kWrite) continue;
    --unsent_writes_;
    Complete(out_[i].cookie, MakeStatus(StatusCode::kCancelled, "the endpoint was closed first"));
  }
  out_.truncate(keep);
  for (; !reads_.empty(); reads_.pop_front()) {
    Complete(reads_.front().cookie,
             MakeStatus(StatusCode::kCancelled, "the endpoint was closed first"));
  }
  Queue({.op = BulkOp::kGoodbye}, {}, 0);
}

void BulkStream::Abort(StatusCode code, std::string_view peer) {
  closing_ = true;
  readable_ = false;
  writable_ = false;
  messages_.truncate(0);
  for (; !out_.empty(); out_.pop_front()) {
    if (out_.front().op != BulkOp::kWrite) continue;
    Complete(out_.front().cookie,
             MakeStatus(code, "transferring to {}: the endpoint closed first", peer));
  }
  for (; !reads_.empty(); reads_.pop_front()) {
    Complete(reads_.front().cookie,
             MakeStatus(code, "reading from {}: the endpoint closed first", peer));
  }
}

}  // namespace kvant::tcp
