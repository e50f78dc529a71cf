// Moves packets and payloads between MPI ranks, nonblocking. Knows ranks and windows, not
// endpoints.
#pragma once

#include <mpi.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "base/clock.h"
#include "transport/transport.h"
#include "transport/window_table.h"

namespace kvant::mpi {

enum class PacketType : uint8_t {
  kHello = 1,        // from: the connector's endpoint
  kWelcome = 2,      // answer to a hello: both endpoints are known
  kData = 3,         // a message follows
  kWrite = 4,        // a payload comes with `tag`, for the window
  kRead = 5,         // asks for a range of the window; `read` comes back
  kReadReply = 6,    // a payload comes with `tag`, in answer to `read`
  kReadRefused = 7,  // in answer to `read`
  kGoodbye = 8,      // nothing follows between these endpoints
};

// The 64 bytes that open every packet, little-endian; docs/transport-guide.md has the table.
inline constexpr size_t kHeaderBytes = 64;
struct Header {
  PacketType type = PacketType::kHello;
  std::optional<uint32_t> immediate{};
  EndpointId to = 0;    // the receiver's endpoint; 0 in a hello
  EndpointId from = 0;  // the sender's
  uint32_t tag = 0;     // of the payload messages
  uint32_t read = 0;
  uint64_t window = 0;
  uint64_t key = 0;
  uint64_t offset = 0;
  uint64_t length = 0;
};

// A payload to send, announced by its header.
struct Outbound {
  Header header{};
  std::span<std::byte> bytes{};
  uint64_t cookie = 0;
  bool from_window = false;  // a read reply: bytes are header.window's, and guarded by it
  uint64_t posted = 0;       // bytes given to MPI
  uint64_t sent = 0;         // bytes that MPI is done with
};

// A payload to receive, as its header announced it.
struct Inbound {
  enum class Sink : uint8_t { kWindow, kRead, kDiscard };
  Header header{};
  Sink sink = Sink::kDiscard;
  std::span<std::byte> bytes{};  // unless discarded
  uint64_t cookie = 0;           // of a read
  uint64_t posted = 0;
  uint64_t landed = 0;
};

// What arrives. Called from Courier::Progress only.
class Receiver {
 public:
  virtual ~Receiver() = default;
  virtual void OnPacket(int rank, const Header& header, std::span<const std::byte> body) = 0;
  virtual void OnSent(const Outbound& job) = 0;
  // In the order of the headers of one rank.
  virtual void OnLanded(const Inbound& job) = 0;
};

// Single-owner (MPI_THREAD_FUNNELED). Invariants, per rank:
//   1. Packets are sent and received in order; so are payloads, each after its header.
//   2. A header that was sent is followed by all its payload, whatever happens to endpoints.
//   3. While MPI holds a piece of a window, the window table counts it as landing.
class Courier {
 public:
  Courier(MPI_Comm communicator, WindowTable* windows, Receiver* receiver, size_t max_body_bytes);
  // Waits a bounded time for what is under way, then calls it off.
  ~Courier();
  Courier(const Courier&) = delete;
  Courier& operator=(const Courier&) = delete;

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(lanes_.size()); }
  // Whether so many packets to this rank are under way that a sender should wait.
  bool Full(int rank) const;
  void SendPacket(int rank, const Header& header, std::span<const std::byte> body);
  // Sends header and payload when those before are on their way. Chooses the tag.
  void SendPayload(int rank, const Outbound& job);
  // Takes back the writes of endpoint `from` whose header was not sent, into `cancelled`.
  void CancelWrites(int rank, EndpointId from, std::vector<uint64_t>* cancelled);
  void ReceivePayload(int rank, const Inbound& job);
  // Throws away what MPI has not been given memory for yet of the reads of endpoint `to`; appends
  // the cookies of those that MPI holds no memory of, which then never land.
  void CancelReads(int rank, EndpointId to, std::vector<uint64_t>* cancelled);
  void Progress();
  // Nothing is under way.
  bool Idle() const;

 private:
  struct IncomingPacket {
    std::vector<std::byte> bytes;
    bool complete = false;
  };
  // One rank's traffic. Element addresses in deques are stable while ends are pushed and popped.
  struct Lane {
    size_t packets_out = 0;
    std::deque<IncomingPacket> packets_in;
    std::deque<std::unique_ptr<Outbound>> waiting;  // header not sent
    std::deque<std::unique_ptr<Outbound>> sending;  // header sent
    size_t pieces_out = 0;
    std::deque<std::unique_ptr<Inbound>> landing;
    size_t pieces_in = 0;
    bool scratch_busy = false;
    std::vector<std::byte> scratch;
    uint32_t next_tag = 0;
  };
  // What a request of MPI is about.
  struct Work {
    enum class Kind : uint8_t { kPacketOut, kPacketIn, kPieceOut, kPieceIn };
    Kind kind = Kind::kPacketOut;
    int rank = 0;
    std::vector<std::byte> packet{};     // kPacketOut: its bytes
    IncomingPacket* incoming = nullptr;  // kPacketIn
    Outbound* outbound = nullptr;        // kPieceOut
    Inbound* inbound = nullptr;          // kPieceIn
    uint64_t bytes = 0;
    uint64_t window = 0;  // held while landing
    bool scratch = false;
  };

  MPI_Request* Start(Work work);
  void Finish(Work* work);
  void TakePackets();
  void DeliverPackets(int rank);
  void StartSends(int rank);
  void StartReceives(int rank);
  void Settle(int rank);
  void CallOff();

  MPI_Comm communicator_;
  WindowTable* windows_;
  Receiver* receiver_;
  size_t max_body_bytes_;
  int rank_ = 0;
  uint32_t tag_count_ = 0;
  std::vector<Lane> lanes_;
  std::vector<MPI_Request> requests_;  // side by side with works_
  std::vector<Work> works_;
  std::vector<int> finished_;
  std::vector<std::vector<std::byte>> spare_packets_;
};

}  // namespace kvant::mpi
