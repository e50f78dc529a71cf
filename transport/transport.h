// How bytes get from one process to another: control messages and one-sided bulk transfers.
//
// The contract that every backend keeps (docs/transport-guide.md says it in words, and
// tests/transport_conformance_test.cc holds every backend to it):
//   1. Nothing blocks but Wait(), and Wait() returns by its deadline.
//   2. Each accepted Transfer completes exactly once, with kTransferDone, whatever becomes of the
//      peer. A Transfer that Submit refused never completes.
//   3. Messages on one endpoint arrive at most once and in order. So do the writes of one endpoint;
//      a write's kWritten comes after all bytes of it, and of earlier writes on the same endpoint,
//      have landed. Nothing is said about the order between messages and writes.
//   4. After kClosed nothing more arrives from that endpoint, and all its transfers have completed.
//   5. Bytes land only inside a window that was exposed to that peer and is not revoked.
// Wire faults may break 3 and the bytes themselves: whoever uses bytes verifies their checksums.
//
// What a kTransferDone says:
//   - ok of a write: the bytes left local memory, which may be reused. They have landed when the
//   peer
//     says so (its kWritten, a message of its own). A peer discards, without a word to the writer,
//     what it did not expose or has revoked; no kWritten follows there.
//   - ok of a read: the bytes have landed in local memory. kPermissionDenied: the peer does not
//   expose
//     that range to us (any more).
//   - kInvalidArgument: local memory is not registered, the range lies outside the remote window,
//     or the transfer is longer than max_transfer_bytes. Nothing was sent.
//   - kCancelled: our Close came first. kUnavailable: the connection broke.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/status.h"

namespace kvant {

// Names an endpoint within one Transport; never reused. 0 is none.
using EndpointId = uint64_t;

// What a peer must know to reach an exposed window. Travels inside control messages.
struct RemoteWindow {
  uint64_t id = 0;      // unique within the exporting transport
  uint64_t key = 0;     // secret: without it, id cannot be used
  uint64_t length = 0;  // bytes
};

enum class Access : uint8_t { kRemoteRead = 1, kRemoteWrite = 2, kRemoteReadWrite = 3 };

// One contiguous range between registered local memory and a peer's window.
struct Transfer {
  enum class Op : uint8_t { kWrite, kRead };  // kWrite: local to remote
  Op op = Op::kWrite;
  std::span<std::byte> local;  // inside a registered region; borrowed until kTransferDone
  RemoteWindow remote{};
  uint64_t remote_offset = 0;           // bytes
  std::optional<uint32_t> immediate{};  // kWrite only: the peer sees kWritten with this value
  uint64_t cookie = 0;                  // comes back in kTransferDone
};

struct Event {
  enum class Kind : uint8_t {
    kConnected,     // endpoint: a peer reached us, or our Connect succeeded
    kMessage,       // endpoint, message
    kTransferDone,  // endpoint, cookie, status
    kWritten,       // endpoint, window, immediate: a peer's write with immediate has landed
    kClosed,        // endpoint, status: ok after a Close on either side, else what broke
  };
  Kind kind = Kind::kMessage;
  EndpointId endpoint = 0;
  std::vector<std::byte> message{};
  uint64_t cookie = 0;
  Status status{};
  uint64_t window = 0;
  uint32_t immediate = 0;
};

// Bytes that crossed, headers of this transport included (those of TCP/IP or MPI below it not).
// A bulk frame's header counts as control; only the bytes of blocks are payload.
struct LinkCounters {
  uint64_t control_bytes_sent = 0;
  uint64_t control_bytes_received = 0;
  uint64_t payload_bytes_sent = 0;
  uint64_t payload_bytes_received = 0;
  uint64_t messages_sent = 0;
  uint64_t transfers_submitted = 0;

  LinkCounters& operator+=(const LinkCounters& more);
};

struct Capabilities {
  std::string_view name;         // "loopback", "mpi", "shm", "tcp", "verbs"
  size_t max_message_bytes = 0;  // Send refuses more
  size_t max_outstanding = 0;    // transfers in flight on one endpoint; Submit refuses more
  uint64_t max_transfer_bytes = 0;
  bool crosses_processes = false;
  bool detects_peer_death = false;  // kClosed arrives when the peer's process dies
};

// A connection to one peer. Owned by its Transport; valid until the Poll after the one that brought
// kClosed.
class Endpoint {
 public:
  virtual ~Endpoint() = default;
  virtual EndpointId id() const = 0;
  // For logs and reports: "tcp://127.0.0.1:7070", "mpi:2".
  virtual std::string_view peer() const = 0;
  // Queues a copy of the message. kResourceExhausted: poll, then try again. kInvalidArgument: too
  // long. kUnavailable: the endpoint is closed.
  virtual Status Send(std::span<const std::byte> message) = 0;
  // Accepts a prefix of `transfers` and returns its length; 0 is back-pressure or a closed
  // endpoint.
  virtual size_t Submit(std::span<const Transfer> transfers) = 0;
  // Ends the connection; kClosed follows after all its transfers have completed.
  virtual void Close() = 0;
  virtual const LinkCounters& counters() const = 0;
};

// Memory that transfers may touch. Owns nothing: the memory outlives it, and it outlives its use.
class MemoryRegion {
 public:
  virtual ~MemoryRegion() = default;
  virtual std::span<std::byte> bytes() const = 0;
  // Lets `peer` reach [offset, offset + length). kInvalidArgument: outside. kUnavailable: is gone.
  virtual Result<RemoteWindow> Expose(EndpointId peer, uint64_t offset, uint64_t length,
                                      Access access) = 0;
  // Takes the window back. True: no byte lands in it any more. False: one may still be landing (a
  // receive that cannot be called off), until Landing(window_id) turns false; do not lend the
  // memory again before. Unknown ids are ignored, with true.
  virtual bool Revoke(uint64_t window_id) = 0;
  virtual bool Landing(uint64_t window_id) const = 0;
};

// Single-owner: one thread calls everything, its endpoints' and regions' methods included.
class Transport {
 public:
  virtual ~Transport() = default;
  virtual const Capabilities& capabilities() const = 0;
  // Accepts peers. Returns the address that they connect to (a port of 0 is filled in).
  // kUnavailable: the address is in use or not ours.
  virtual Result<std::string> Listen(std::string_view address) = 0;
  // Starts connecting. kConnected, or kClosed with the reason, follows within `timeout`.
  virtual Result<Endpoint*> Connect(std::string_view address, Duration timeout) = 0;
  // nullptr when unknown or closed.
  virtual Endpoint* Find(EndpointId id) = 0;
  virtual Result<std::unique_ptr<MemoryRegion>> Register(std::span<std::byte> memory) = 0;
  // Zeroed pages for a region, of which peers reach what is exposed: shm exposes no others.
  // UnmapPages takes them back, after their regions. REQUIRES: whole pages.
  virtual Result<std::span<std::byte>> MapPages(uint64_t bytes);
  virtual void UnmapPages(std::span<std::byte> pages);
  // Makes progress and appends what happened. Never blocks.
  virtual void Poll(std::vector<Event>* events) = 0;
  // Sleeps until there may be something to poll, at most this long.
  virtual void Wait(Duration at_most) = 0;
  // The sum over all endpoints, closed ones included.
  virtual LinkCounters counters() const = 0;
};

}  // namespace kvant
