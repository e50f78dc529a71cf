// One bulk connection: messages, and frames out of and into registered memory, over a non-blocking
// stream socket.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "transport/ring.h"
#include "transport/tcp.h"
#include "transport/tcp_socket.h"
#include "transport/tcp_wire.h"
#include "transport/transport.h"
#include "transport/window_table.h"

namespace kvant::tcp {

// What a stream shares with its endpoint and transport. All outlive it.
struct BulkContext {
  EndpointId endpoint = 0;
  WindowTable* windows = nullptr;
  LinkCounters* counters = nullptr;
  TcpDefects* defects = nullptr;
  std::vector<Event>* events = nullptr;  // kMessage, kTransferDone and kWritten go here
  size_t max_outstanding = 0;
  size_t max_message_bytes = 0;
};

// Owned by its endpoint. Single-owner. Invariants:
//   1. Every accepted transfer is in out_ (not wholly sent) or in reads_ (not wholly answered),
//      until its kTransferDone is in the events.
//   2. The peer answers reads in the order asked, so a reply belongs to the front of reads_.
//   3. Bytes land only after the window table allowed it in the same call.
//   4. A message waits for no more than the frame under way and the messages before it.
class BulkStream {
 public:
  BulkStream(Socket socket, const BulkContext& context);

  // Accepts a prefix, and sends what the socket takes at once.
  size_t Submit(std::span<const Transfer> transfers);
  // Queues a copy of a message; `now`: and sends what the socket takes at once. False: the queue is
  // full. REQUIRES: it is no longer than max_message_bytes.
  bool SendMessage(std::span<const std::byte> message, bool now);
  // Sends until the socket would block or a fair share is sent. Not ok: the connection broke.
  Status Send();
  // Receives likewise. Not ok: the connection broke, or the peer violates the protocol
  // (kInvalidArgument).
  Status Receive();
  // Edge-triggered readiness, as epoll reports it.
  void OnReady(bool readable, bool writable, bool hung_up);
  // Whether Send or Receive could make progress without further readiness.
  bool wants_turn() const { return (readable_ && !peer_said_goodbye_) || (writable_ && sending()); }
  // Cancels all transfers but the frame under way and ends the stream, after the messages, with a
  // goodbye; what the peer still sends is thrown away.
  void SayGoodbye();
  bool said_goodbye() const { return closing_ && !sending(); }
  bool peer_said_goodbye() const { return peer_said_goodbye_; }
  // Completes everything with this code; nothing moves afterwards.
  void Abort(StatusCode code, std::string_view peer);
  // The transport handed over this many kTransferDone: they no longer count as outstanding.
  void OnReported(size_t count) { unreported_ -= count; }
  Socket& socket() { return socket_; }

 private:
  struct Out {
    std::array<std::byte, kBulkHeaderBytes> header{};
    std::span<const std::byte> payload;
    uint64_t cookie = 0;
    uint64_t window = 0;  // of a reply: what it is read from
    BulkOp op = BulkOp::kWrite;
  };
  struct PendingRead {
    std::span<std::byte> local;
    uint64_t cookie = 0;
    uint32_t tag = 0;
  };
  enum class Sink : uint8_t { kNone, kWindow, kRead, kDiscard, kMessage };

  bool sending() const { return !out_.empty() || !messages_.empty(); }
  // Whether the frame that is sent next, or is under way, is a message.
  bool MessageIsNext() const { return front_sent_ > 0 ? message_under_way_ : !messages_.empty(); }
  void Queue(const BulkHeader& header, std::span<const std::byte> payload, uint64_t cookie);
  void Complete(uint64_t cookie, Status status);
  void Account(size_t sent);
  void AccountMessage(uint64_t* left);
  void AccountFrame(uint64_t* left);
  // Interprets a header that arrived; sets sink_ and the payload that follows.
  Status OnHeader();
  Status OnMessage();
  Status OnWrite(const BulkHeader& header);
  Status OnRead(const BulkHeader& header);
  Status OnReadAnswer(const BulkHeader& header);
  void OnPayloadDone();
  // `count` more bytes of the payload are in place.
  void Landed(size_t count);
  // Where the next bytes of the payload go; decides anew whether they may.
  std::span<std::byte> Destination();
  Status ReceiveClosing();

  Socket socket_;
  BulkContext context_;
  bool readable_ = true;
  bool writable_ = true;
  bool hung_up_ = false;
  bool closing_ = false;
  bool peer_said_goodbye_ = false;

  Ring<Out> out_;
  Ring<std::vector<std::byte>> messages_;  // with their headers
  size_t queued_message_bytes_ = 0;
  // Frames of sent messages: the next ones need no allocation.
  std::vector<std::vector<std::byte>> spare_frames_;
  uint64_t front_sent_ = 0;         // bytes of the frame under way that the kernel took
  bool message_under_way_ = false;  // while front_sent_ > 0: it is messages_.front()
  size_t unsent_writes_ = 0;        // of out_
  size_t unsent_reads_ = 0;         // of out_, and the last ones of reads_
  size_t replies_in_out_ = 0;
  size_t unreported_ = 0;  // completed, kTransferDone not polled yet
  Ring<PendingRead> reads_;
  uint32_t next_tag_ = 0;

  std::vector<std::byte> staging_;  // bytes received beyond the current payload
  size_t staged_begin_ = 0;
  size_t staged_end_ = 0;
  Sink sink_ = Sink::kNone;
  int small_frames_ = 0;  // that came one after the other
  BulkHeader incoming_;
  std::vector<std::byte> message_;  // that is arriving
  std::span<std::byte> landing_;    // where the rest of the payload goes
  uint64_t payload_left_ = 0;
};

}  // namespace kvant::tcp
