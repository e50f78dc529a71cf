// One end of a reliable connection: its queue pair and completion queue, the memory that records
// are staged in, and the credits of both ends.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "transport/ring.h"
#include "transport/verbs_device.h"
#include "transport/verbs_wire.h"

namespace kvant::verbs {

// What was posted, and comes back when it is done. In the order of posting.
struct Request {
  enum class Kind : uint8_t { kRecord, kPiece, kBind, kInvalidate };
  Kind kind = Kind::kRecord;
  uint32_t index = 0;  // the caller's
  uint32_t bytes = 0;
};

struct Completion {
  enum class Kind : uint8_t {
    kRecord,     // record: header and body, until the next Renew
    kImmediate,  // immediate: of a write that has landed
    kDone,       // request
    kBroken,     // status: the connection is of no use any more
  };
  Kind kind = Kind::kDone;
  std::span<const std::byte> record{};
  uint32_t immediate = 0;
  Request request{};
  Status status{};
};

// Memory of ours and of the peer, of an RDMA operation.
struct Piece {
  bool write = true;
  std::span<std::byte> local{};
  uint32_t local_key = 0;
  uint64_t remote_address = 0;
  uint32_t remote_key = 0;
  std::optional<uint32_t> immediate{};  // as PackImmediate made it
  bool last = true;                     // of its transfer: who waits for it is told soon
};

// Single-owner. Invariants: at most kRequests requests are posted and not taken back, at most
// kReceives receives, and the completion queue has a slot for each of both, so it never overflows;
// a record is posted only for a receive that the peer has posted, so none meets a peer without one.
class Queue {
 public:
  static constexpr uint32_t kRequests = 256;
  static constexpr uint16_t kReceives = 64;

  // Receives are posted; it can't send before Connect. The channel's events name the Queue.
  static Result<std::unique_ptr<Queue>> Make(const Device* device, ibv_comp_channel* channel);
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  // What the peer must know. Of a frame of this type.
  Greeting Introduce(GreetingType type) const;
  Status Connect(const Greeting& peer);

  // Everything that was posted is done.
  bool idle() const { return posted_.empty(); }
  // Room for that many requests.
  bool HasRoom(uint32_t requests) const { return posted_.size() + requests <= kRequests; }
  // Whether a record, or a write with an immediate, may be posted: each takes one of the peer's
  // receives. The last of these is kept for a record that gives credits back.
  bool HasCredit() const { return credits_ > 1 && staged_ < kStaged; }
  // Whether it is time to give credits back. Then there is room and credit for a record of it.
  bool OwesCredits() const {
    return owed_ >= kReceives / 2 && credits_ > 0 && staged_ < kStaged && HasRoom(1);
  }

  // Each adds to a chain, which Flush hands to the device at once. REQUIRES: HasRoom, and HasCredit
  // of a record or an immediate (OwesCredits of kCredits).
  void PutRecord(RecordHeader header, std::span<const std::byte> body);
  void PutPiece(const Piece& piece, uint32_t index);
  void PutBind(ibv_mw* window, uint32_t device_key, ibv_mr* memory, std::span<std::byte> bytes,
               int access);
  void PutInvalidate(uint32_t device_key, uint32_t index);
  // Posts anew the receives of the completions that were taken.
  void Renew();
  // Posts what was put.
  Status Flush();
  bool has_unflushed() const { return chained_ > 0; }

  // Takes the next completion, if there is one.
  bool Next(Completion* next);
  // Whether Next has something.
  bool Ready();
  void AddCredits(uint16_t credits) { credits_ += credits; }
  // Asks for an event of the channel at the next completion.
  void Arm();
  void OnArmedEvent() { armed_ = false; }

 private:
  static constexpr uint32_t kStaged = 64;
  static constexpr uint32_t kChain = 32;
  static constexpr uint32_t kWantedInline = 128;  // bytes
  static constexpr size_t kPollAtOnce = 32;

  explicit Queue(const Device* device);
  Status Create(ibv_comp_channel* channel);
  ibv_send_wr& Add(Request request, ibv_wr_opcode opcode, std::span<const std::byte> local,
                   uint32_t local_key);
  void PostSends();
  std::byte* ReceiveBuffer(uint64_t index) { return memory_.data() + index * kMaxRecordBytes; }

  const Device* device_;
  uint32_t sequence_;
  std::vector<std::byte> memory_;  // receives, then staged records
  Owned<ibv_mr> memory_key_;
  Owned<ibv_cq> completions_;
  Owned<ibv_qp> pair_;
  uint32_t max_inline_ = 0;
  int failed_ = 0;  // errno of a post

  std::array<ibv_send_wr, kChain> chain_{};
  std::array<ibv_sge, kChain> parts_{};
  uint32_t chained_ = 0;
  uint32_t unsignalled_ = 0;
  Ring<Request> posted_;
  uint64_t first_posted_ = 0;  // number of the first in posted_
  uint64_t retire_until_ = 0;  // numbers below are done
  uint32_t staged_ = 0;
  uint32_t next_staged_ = 0;

  std::array<uint16_t, kReceives> taken_{};  // receives to be posted anew
  uint16_t taken_count_ = 0;
  uint32_t credits_ = 0;
  uint16_t owed_ = 0;

  std::array<ibv_wc, kPollAtOnce> polled_{};
  size_t polled_count_ = 0;
  size_t polled_at_ = 0;
  bool armed_ = false;
};

}  // namespace kvant::verbs
