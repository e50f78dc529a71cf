// The plain loop that the mpi backend is measured against: the same requests with MPI_Isend and
// MPI_Irecv, nothing around them.
#include <mpi.h>
#include <sched.h>

#include <deque>

#include "transport/mpi_state.h"
#include "transport/transport_bench_internal.h"

namespace kvant::bench {
namespace {

constexpr int kNoteTag = 900;
constexpr int kFirstSlotTag = 1000;
constexpr int kPeerRank[] = {1, 0};
constexpr uint32_t kEnd = UINT32_MAX;

// Nonblocking sends and receives of slots, and notes about them.
class Slots {
 public:
  Slots(MPI_Comm comm, int peer, const Shape& shape, std::vector<std::byte>* memory)
      : comm_(comm), peer_(peer), shape_(shape), memory_(memory) {
    memory_->resize(shape.size * shape.outstanding);
    sends_.assign(shape.outstanding, MPI_REQUEST_NULL);
    receives_.assign(shape.outstanding, MPI_REQUEST_NULL);
    notes_.assign(shape.outstanding, 0);
    note_sends_.assign(shape.outstanding, MPI_REQUEST_NULL);
  }
  void SendNote(uint32_t slot) {
    MPI_Wait(&note_sends_[slot], MPI_STATUS_IGNORE);
    notes_[slot] = slot;
    MPI_Isend(&notes_[slot], 1, MPI_UINT32_T, peer_, kNoteTag, comm_, &note_sends_[slot]);
  }
  void SendSlot(uint32_t slot) {
    MPI_Wait(&sends_[slot], MPI_STATUS_IGNORE);
    MPI_Isend(At(slot), Count(), MPI_BYTE, peer_, Tag(slot), comm_, &sends_[slot]);
  }
  void ReceiveSlot(uint32_t slot) {
    MPI_Irecv(At(slot), Count(), MPI_BYTE, peer_, Tag(slot), comm_, &receives_[slot]);
  }
  // A slot whose receive ended, if any; makes progress on sends, too.
  std::optional<uint32_t> Received() {
    int index = MPI_UNDEFINED;
    int done = 0;
    MPI_Testany(static_cast<int>(receives_.size()), receives_.data(), &index, &done,
                MPI_STATUS_IGNORE);
    if (done == 0 || index == MPI_UNDEFINED) return std::nullopt;
    return static_cast<uint32_t>(index);
  }
  std::optional<uint32_t> ReceivedNote() {
    int found = 0;
    MPI_Iprobe(peer_, kNoteTag, comm_, &found, MPI_STATUS_IGNORE);
    if (found == 0) return std::nullopt;
    uint32_t slot = 0;
    MPI_Recv(&slot, 1, MPI_UINT32_T, peer_, kNoteTag, comm_, MPI_STATUS_IGNORE);
    return slot;
  }
  void Settle() {
    MPI_Waitall(static_cast<int>(sends_.size()), sends_.data(), MPI_STATUSES_IGNORE);
    MPI_Waitall(static_cast<int>(note_sends_.size()), note_sends_.data(), MPI_STATUSES_IGNORE);
  }

 private:
  std::byte* At(uint32_t slot) { return memory_->data() + slot * shape_.size; }
  int Count() const { return static_cast<int>(shape_.size); }
  static int Tag(uint32_t slot) { return kFirstSlotTag + static_cast<int>(slot); }
  MPI_Comm comm_;
  int peer_;
  Shape shape_;
  std::vector<std::byte>* memory_;
  std::vector<MPI_Request> sends_;
  std::vector<MPI_Request> receives_;
  std::vector<MPI_Request> note_sends_;
  std::vector<uint32_t> notes_;
};

class PlainMpiAsker final : public Asker {
 public:
  explicit PlainMpiAsker(const MpiState* state) : state_(state) {}
  Status Run(const Shape& shape, Duration time, Sample* sample) override {
    Slots slots(state_->world, kPeerRank[state_->rank], shape, &memory_);
    Pacer pacer(shape, time, sample);
    while (!pacer.finished()) {
      for (const uint32_t slot : pacer.idle()) {
        if (shape.get) slots.ReceiveSlot(slot);
        slots.SendNote(slot);
        if (!shape.get) slots.SendSlot(slot);
      }
      pacer.Asked();
      bool found = false;
      while (const auto slot = shape.get ? slots.Received() : slots.ReceivedNote()) {
        pacer.Arrived(*slot);
        found = true;
      }
      if (!found) sched_yield();
      if (pacer.stuck()) return Unavailable("the plain MPI loop: rank 1 does not answer");
    }
    pacer.Finish();
    slots.Settle();
    MPI_Send(&kEnd, 1, MPI_UINT32_T, kPeerRank[state_->rank], kNoteTag, state_->world);
    double peer_cpu = 0;
    MPI_Recv(&peer_cpu, 1, MPI_DOUBLE, kPeerRank[state_->rank], kNoteTag, state_->world,
             MPI_STATUS_IGNORE);
    sample->cpu_seconds += peer_cpu;
    return OkStatus();
  }

 private:
  const MpiState* state_;
  std::vector<std::byte> memory_;
};

class PlainMpiServer final : public Server {
 public:
  explicit PlainMpiServer(const MpiState* state) : state_(state) {}
  Status Serve(const Shape& shape) override {
    Slots slots(state_->world, kPeerRank[state_->rank], shape, &memory_);
    const double cpu_start = CpuSeconds();
    TimePoint last = SteadyClock().Now();
    while (true) {
      bool found = false;
      while (const auto slot = slots.ReceivedNote()) {
        if (*slot == kEnd) {
          slots.Settle();
          const double cpu = CpuSeconds() - cpu_start;
          MPI_Send(&cpu, 1, MPI_DOUBLE, kPeerRank[state_->rank], kNoteTag, state_->world);
          return OkStatus();
        }
        if (*slot >= shape.outstanding) return Unavailable("the plain MPI loop: a bad note");
        found = true;
        if (shape.get) {
          slots.SendSlot(*slot);
        } else {
          slots.ReceiveSlot(*slot);
        }
      }
      while (const auto slot = slots.Received()) {
        slots.SendNote(*slot);
        found = true;
      }
      if (found) {
        last = SteadyClock().Now();
      } else {
        sched_yield();
        if (SteadyClock().Now() - last > kStuck) {
          return Unavailable("the plain MPI loop: rank 0 does not ask");
        }
      }
    }
  }

 private:
  const MpiState* state_;
  std::vector<std::byte> memory_;
};

}  // namespace

std::unique_ptr<Asker> MakePlainMpiAsker(const MpiState* state) {
  return std::make_unique<PlainMpiAsker>(state);
}
std::unique_ptr<Server> MakePlainMpiServer(const MpiState* state) {
  return std::make_unique<PlainMpiServer>(state);
}

}  // namespace kvant::bench
