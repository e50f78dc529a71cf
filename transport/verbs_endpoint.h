// One peer of a verbs transport, and what all endpoints of it share.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "transport/ring.h"
#include "transport/tcp_socket.h"
#include "transport/verbs.h"
#include "transport/verbs_greeting.h"
#include "transport/verbs_queue.h"
#include "transport/verbs_windows.h"
#include "transport/watcher.h"
#include "transport/window_table.h"

namespace kvant::verbs {

// After a Close, what was begun before and the peer's goodbye get this long.
inline constexpr Duration kGoodbyeTimeout = std::chrono::seconds(1);

// Where a window is that is exposed, or was and may still be landed in.
struct Exposed {
  EndpointId peer = 0;
  const std::byte* begin = nullptr;
};

// Memory that is registered with the device.
struct Registered {
  std::span<std::byte> bytes;
  ibv_mr* memory = nullptr;
};

// Owned by the transport, outlives its endpoints. Single-owner.
struct VerbsShared {
  VerbsShared(const VerbsOptions& given, std::unique_ptr<Device> opened);
  // The key by which the device knows memory of ours. REQUIRES: it is registered, or empty.
  uint32_t LocalKey(std::span<const std::byte> local) const;

  const VerbsOptions options;
  const std::unique_ptr<Device> device;
  Owned<ibv_comp_channel> channel;
  Watcher watcher;
  WindowPool pool;
  WindowTable memory;  // only which memory is registered
  std::vector<Registered> registered;
  std::vector<Event> events;
  std::unordered_map<uint64_t, Exposed> exposed;  // by window id
  uint64_t generation = 0;                        // of windows
};

class VerbsEndpoint final : public Endpoint {
 public:
  // Connects: `socket` is on its way, or failed already where there is none.
  VerbsEndpoint(VerbsShared* shared, EndpointId id, std::string peer, tcp::Socket socket,
                std::unique_ptr<Queue> queue, TimePoint deadline);
  // Accepts: both ends stand.
  VerbsEndpoint(VerbsShared* shared, EndpointId id, std::string peer, tcp::Socket socket,
                std::unique_ptr<Queue> queue);
  VerbsEndpoint(const VerbsEndpoint&) = delete;
  VerbsEndpoint& operator=(const VerbsEndpoint&) = delete;

  EndpointId id() const override { return id_; }
  std::string_view peer() const override { return peer_; }
  Status Send(std::span<const std::byte> message) override;
  size_t Submit(std::span<const Transfer> transfers) override;
  void Close() override;
  const LinkCounters& counters() const override { return counters_; }

  // The transport drives these.
  void OnSocket();
  void Progress();
  // Whether a Poll now would do something.
  bool ReadyNow() {
    return queue_ != nullptr && is_open() && (queue_->has_unflushed() || queue_->Ready());
  }
  // Before a sleep: the channel is to tell of what comes.
  void Arm() {
    if (queue_ != nullptr && is_open()) queue_->Arm();
  }
  bool HasTimer() const {
    return (state_ != State::kOpen && state_ != State::kClosed) || revoking_ > 0;
  }
  TimePoint deadline() const { return state_ == State::kOpen ? release_deadline_ : deadline_; }
  void OnTimer(TimePoint now);
  bool closed() const { return state_ == State::kClosed; }
  void OnReported() { --unreported_; }
  // The transport goes away: says goodbye. Whether that is still on its way.
  void Leave();
  bool Leaving();
  // A window for the peer. kResourceExhausted: it, or the device, has too many.
  Result<RemoteWindow> Expose(const Registered& memory, std::span<std::byte> bytes, Access access);
  // False: the peer was told to let go, and has not said yet that it has.
  bool Revoke(uint64_t window);
  // The window's memory goes away.
  void Drop(uint64_t window);
  void Fail(const Status& why) { Finish(why, StatusCode::kUnavailable); }

 private:
  enum class State : uint8_t { kConnecting, kHello, kOpen, kClosing, kClosed };
  // A transfer of which something was posted.
  struct Active {
    Transfer transfer{};
    Status status{};
    uint32_t under_way = 0;  // pieces
    bool all_posted = false;
    bool in_use = false;
  };
  // A record that waits for a credit.
  struct Outgoing {
    RecordType type = RecordType::kMessage;
    uint64_t window = 0;
    std::vector<std::byte> message{};
  };

  bool is_open() const { return state_ == State::kOpen || state_ == State::kClosing; }
  // Posts a record, or keeps it until it can be.
  void Say(RecordType type, uint64_t window);
  void PutRecord(RecordType type, bool last, std::span<const std::byte> body);
  void PutWindowRecord(RecordType type, uint64_t window);
  void FlushOutbox();
  // Takes completions.
  void Take();
  void OnRecord(std::span<const std::byte> record);
  void OnWindowRecord(RecordType type, std::span<const std::byte> body);
  void OnRevoked(uint64_t window);
  void OnLanded(const ExposedSlot* slot, uint32_t immediate);
  void OnDone(const Request& request);
  // Posts all that can be posted.
  void Post();
  // Posts the next piece of the first transfer, or ends it; false: it must wait.
  bool Step();
  // Ends the first transfer where nothing of it, or nothing more, travels as a piece.
  bool EndFirst(Status status);
  uint32_t Begin(const Transfer& transfer);
  void EndIfDone(uint32_t index);
  void Complete(uint64_t cookie, Status status);
  // Ends what was not begun, and of what was all that is not posted.
  void CancelWaiting(StatusCode code);
  void Violate(std::string_view what);
  void Finish(const Status& why, StatusCode transfers_end_with);

  VerbsShared* shared_;
  EndpointId id_;
  std::string peer_;
  Greeter greeter_;
  State state_ = State::kConnecting;
  TimePoint deadline_{};
  bool ended_ = false;    // nobody is at the other end of the socket
  bool goodbye_ = false;  // the peer's was read
  bool said_goodbye_ = false;
  StatusCode ends_with_ = StatusCode::kUnavailable;  // what the end cuts off
  std::unique_ptr<Queue> queue_;
  // Ends before the queue, which windows hold on to while they are bound.
  ExposedWindows exposed_;
  KnownWindows known_;
  std::vector<std::byte> incoming_;  // pieces of a message
  Ring<Outgoing> outbox_;
  size_t outbox_at_ = 0;  // of the first, what was posted already
  size_t outbox_bytes_ = 0;
  Ring<Transfer> waiting_;
  uint64_t waiting_at_ = 0;     // of the first, what was posted already
  uint32_t waiting_index_ = 0;  // of the first, in active_, when something was
  std::vector<Active> active_;
  std::vector<uint32_t> idle_;  // of active_
  uint64_t bytes_under_way_ = 0;
  size_t unreported_ = 0;        // completed, but not polled
  uint64_t untold_written_ = 0;  // payload that the peer does not know of yet
  uint64_t untold_read_ = 0;
  Ring<uint64_t> let_go_;  // windows that the peer has let go of, to be invalidated
  size_t revoking_ = 0;    // windows that it has not
  TimePoint release_deadline_{};
  LinkCounters counters_;
};

}  // namespace kvant::verbs
