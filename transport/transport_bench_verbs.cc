// The plain loop over RDMA: writes and reads between two queue pairs of this process, one after
// the other, with nobody asked and nobody told.
#include "transport/transport_bench_internal.h"
#include "transport/verbs_device.h"
#include "transport/verbs_queue.h"

namespace kvant::bench {
namespace {

class PlainVerbs final : public Asker {
 public:
  static Result<std::unique_ptr<Asker>> Make(uint64_t bytes) {
    std::unique_ptr<PlainVerbs> made(new PlainVerbs(bytes));
    KV_RETURN_IF_ERROR(made->Prepare());
    return std::unique_ptr<Asker>(std::move(made));
  }

  Status Run(const Shape& shape, Duration time, Sample* sample) override {
    Pacer pacer(shape, time, sample);
    Patience patience;
    while (!pacer.finished()) {
      const std::vector<uint32_t> slots = pacer.idle();
      pacer.Asked();
      for (const uint32_t slot : slots) Put(shape, slot);
      KV_RETURN_IF_ERROR(ours_->Flush());
      bool found = false;
      for (verbs::Completion next; ours_->Next(&next); found = true) {
        if (next.kind == verbs::Completion::Kind::kBroken) return next.status;
        pacer.Arrived(next.request.index);
      }
      if (found) {
        patience.Found();
      } else if (patience.Sleep() && pacer.stuck()) {
        return Unavailable("the bench: the device does not answer");
      }
    }
    pacer.Finish();
    return OkStatus();
  }

 private:
  explicit PlainVerbs(uint64_t bytes) : from_(bytes), to_(bytes) {}

  Status Prepare() {
    KV_ASSIGN_OR_RETURN(device_, verbs::Device::Open({}));
    constexpr int kAccess =
        IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
    KV_ASSIGN_OR_RETURN(auto from, device_->Register(from_.data(), from_.size(), kAccess));
    KV_ASSIGN_OR_RETURN(auto to, device_->Register(to_.data(), to_.size(), kAccess));
    memory_.push_back(std::move(from));
    memory_.push_back(std::move(to));
    KV_ASSIGN_OR_RETURN(ours_, verbs::Queue::Make(device_.get(), nullptr));
    KV_ASSIGN_OR_RETURN(theirs_, verbs::Queue::Make(device_.get(), nullptr));
    KV_RETURN_IF_ERROR(ours_->Connect(theirs_->Introduce(verbs::GreetingType::kHello)));
    return theirs_->Connect(ours_->Introduce(verbs::GreetingType::kHello));
  }

  void Put(const Shape& shape, uint32_t slot) {
    const uint64_t at = slot * shape.size;
    ours_->PutPiece({.write = shape.get,
                     .local = std::span(from_).subspan(at, shape.size),
                     .local_key = memory_[0]->lkey,
                     .remote_address = reinterpret_cast<uintptr_t>(to_.data()) + at,
                     .remote_key = memory_[1]->rkey},
                    slot);
  }

  std::vector<std::byte> from_;
  std::vector<std::byte> to_;
  std::unique_ptr<verbs::Device> device_;
  std::vector<verbs::Owned<ibv_mr>> memory_;
  std::unique_ptr<verbs::Queue> ours_;
  std::unique_ptr<verbs::Queue> theirs_;
};

}  // namespace

Result<std::unique_ptr<Asker>> MakePlainVerbsAsker(uint64_t bytes) {
  return PlainVerbs::Make(bytes);
}

}  // namespace kvant::bench
