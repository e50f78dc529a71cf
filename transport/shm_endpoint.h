// One peer of a shm transport, and what all endpoints of it share.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "transport/ring.h"
#include "transport/shared_memory.h"
#include "transport/shm.h"
#include "transport/shm_channel.h"
#include "transport/shm_socket.h"
#include "transport/watcher.h"
#include "transport/window_table.h"

namespace kvant::shm {

class ShmEndpoint;

// After a Close, what was accepted before and the peer's goodbye get this long.
inline constexpr Duration kGoodbyeTimeout = std::chrono::seconds(1);

// Memory that may be exposed.
struct Pages {
  uint64_t number = 0;
  SharedMemory memory;
};

// A window that is exposed, or was and may still be landed in.
struct Exposed {
  EndpointId peer = 0;
  const std::byte* begin = nullptr;
  uint32_t slot = 0;
  bool revoked = false;
  std::shared_ptr<Channel> channel;  // nullptr: the peer is gone, nothing lands
};

// Owned by the transport, outlives its endpoints. Single-owner.
struct ShmShared {
  explicit ShmShared(const ShmOptions& given);
  // Takes the window back; true: nothing lands in it any more, and it is forgotten.
  bool Revoke(uint64_t id);

  const ShmOptions options;
  Watcher watcher;
  tcp::Socket bell;    // an eventfd that peers write to when this process sleeps
  WindowTable memory;  // only which memory is registered
  std::vector<Event> events;
  std::vector<Pages> pages;
  std::unordered_map<uint64_t, Exposed> exposed;  // by window id
  std::function<ShmEndpoint*(EndpointId)> find;
  uint64_t generation = 0;
  uint64_t next_pages = 1;
};

class ShmEndpoint final : public Endpoint {
 public:
  // Connects: hello was sent over `socket`, or will never be where there is none.
  ShmEndpoint(ShmShared* shared, EndpointId id, std::string peer, tcp::Socket socket,
              std::unique_ptr<Channel> channel, TimePoint deadline);
  // Accepts: both ends know all.
  ShmEndpoint(ShmShared* shared, EndpointId id, std::string peer, tcp::Socket socket,
              std::unique_ptr<Channel> channel, tcp::Socket their_bell);
  ShmEndpoint(const ShmEndpoint&) = delete;
  ShmEndpoint& operator=(const ShmEndpoint&) = delete;

  EndpointId id() const override { return id_; }
  std::string_view peer() const override { return peer_; }
  Status Send(std::span<const std::byte> message) override;
  size_t Submit(std::span<const Transfer> transfers) override;
  void Close() override;
  const LinkCounters& counters() const override;

  // The transport drives these.
  void OnSocket();
  void Progress();
  // Whether a Poll now would do something.
  bool ReadyNow();
  // Says to the peer that this process is about to sleep, or no longer.
  void SetSleeping(bool sleeping);
  bool HasTimer() const { return state_ == State::kHello || state_ == State::kClosing; }
  TimePoint deadline() const { return deadline_; }
  void OnTimer(TimePoint now);
  bool closed() const { return state_ == State::kClosed; }
  void OnReported() { --unreported_; }
  // The transport goes away.
  void Leave();
  // A window for the peer. kResourceExhausted: it has too many, or reads its socket too slowly.
  Result<RemoteWindow> Expose(const Pages& pages, uint64_t offset, uint64_t length, Access access);
  void GiveBack(uint32_t slot) { free_slots_.push_back(slot); }
  // Nothing of these pages is exposed any more, nor will be.
  void Forget(uint64_t pages);
  void Fail(const Status& why) { Finish(why, StatusCode::kUnavailable); }

 private:
  enum class State : uint8_t { kHello, kOpen, kClosing, kClosed };
  void CountSent(uint64_t bytes) { counters_.control_bytes_sent += bytes; }
  void OnPacket(Packet packet);
  void ReadRing();
  void OnRecord(const Record& record);
  void Transfers();
  // Carries out the next piece of the first transfer; false: it must wait.
  bool Step();
  Status CopyPiece(const Transfer& transfer, uint64_t at, uint64_t bytes);
  std::span<std::byte> PagesOfPeer(uint64_t number);
  void Complete(uint64_t cookie, Status status);
  void FlushOutbox();
  // Wakes the peer if it sleeps.
  void Ring();
  void Finish(const Status& why, StatusCode transfers_end_with);

  ShmShared* shared_;
  EndpointId id_;
  std::string peer_;
  tcp::Socket socket_;
  std::shared_ptr<Channel> channel_;
  tcp::Socket their_bell_;
  State state_ = State::kHello;
  TimePoint deadline_{};
  bool ended_ = false;    // nobody is at the other end of the socket
  bool goodbye_ = false;  // the peer's was read
  bool said_goodbye_ = false;
  std::vector<std::byte> incoming_;  // pieces of a message
  kvant::Ring<std::vector<std::byte>> outbox_;
  size_t outbox_at_ = 0;  // of the first, what is in the ring already
  size_t outbox_bytes_ = 0;
  kvant::Ring<Transfer> queue_;
  uint64_t queue_at_ = 0;            // of the first, what was copied already
  size_t unreported_ = 0;            // completed, but not polled
  std::vector<Pages> theirs_;        // memory that the peer announced
  std::vector<uint64_t> announced_;  // ours that it knows
  std::vector<uint32_t> free_slots_;
  uint32_t next_slot_ = 0;
  LinkCounters counters_;
  mutable LinkCounters all_counters_;
};

}  // namespace kvant::shm
