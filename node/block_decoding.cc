#include "node/block_decoding.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <utility>

namespace kvant::node {

// What tasks in the pool share with the owner, who may be gone before they begin.
struct BlockDecoding::Shared {
  kernels::ThreadPool* pool = nullptr;
  const Clock* clock = nullptr;
  std::mutex mutex;
  std::condition_variable changed;  // an outcome more, or a layer less at work
  bool stopped = false;
  size_t at_work = 0;
  std::vector<std::pair<std::shared_ptr<Strand>, Outcome>> outcomes;
};

// One block.
struct BlockDecoding::Strand {
  uint64_t operation = 0;
  size_t index = 0;
  BlockArrival* arrival = nullptr;
  size_t open = 0;  // the owner's alone: layers whose outcomes were not taken
  // Under Shared::mutex.
  std::deque<uint16_t> layers;  // that did not begin
  bool active = false;          // one of them has a task in the pool, or is at work
  bool abandoned = false;
};

BlockDecoding::BlockDecoding(kernels::ThreadPool* pool, const Clock* clock)
    : shared_(std::make_shared<Shared>()) {
  shared_->pool = pool;
  shared_->clock = clock;
}

BlockDecoding::~BlockDecoding() {
  std::unique_lock lock(shared_->mutex);
  shared_->stopped = true;
  shared_->changed.wait(lock, [&] { return shared_->at_work == 0; });
}

void BlockDecoding::DoNext(const std::shared_ptr<Shared>& shared,
                           const std::shared_ptr<Strand>& strand) {
  std::unique_lock lock(shared->mutex);
  if (shared->stopped) return;
  const uint16_t layer = strand->layers.front();
  strand->layers.pop_front();
  const bool abandoned = strand->abandoned;
  ++shared->at_work;
  lock.unlock();

  Outcome outcome;
  outcome.operation = strand->operation;
  outcome.index = strand->index;
  if (abandoned) {
    outcome.status = MakeStatus(StatusCode::kCancelled, "nobody waits for the block any more");
  } else {
    const TimePoint started = shared->clock->Now();
    outcome.status = strand->arrival->Decode(layer, &outcome.ready);
    outcome.took = shared->clock->Now() - started;
  }

  lock.lock();
  --shared->at_work;
  // After an error an arrival is not used any more.
  strand->abandoned = strand->abandoned || !outcome.status.ok();
  shared->outcomes.emplace_back(strand, std::move(outcome));
  strand->active = !strand->layers.empty();
  // Under the mutex: an owner who stops may end the pool.
  if (strand->active && !shared->stopped) {
    shared->pool->Post([shared, strand] { DoNext(shared, strand); });
  }
  shared->changed.notify_all();
}

void BlockDecoding::Begin(uint64_t operation, size_t index, BlockArrival* arrival, uint16_t layer) {
  std::shared_ptr<Strand>& strand = strands_[arrival];
  if (strand == nullptr) {
    strand = std::make_shared<Strand>();
    strand->operation = operation;
    strand->index = index;
    strand->arrival = arrival;
  }
  ++strand->open;
  ++open_;
  const std::lock_guard lock(shared_->mutex);
  strand->layers.push_back(layer);
  if (strand->active) return;
  strand->active = true;
  shared_->pool->Post([shared = shared_, strand] { DoNext(shared, strand); });
}

void BlockDecoding::Abandon(const BlockArrival* arrival) {
  const auto found = strands_.find(arrival);
  if (found == strands_.end()) return;
  const std::lock_guard lock(shared_->mutex);
  found->second->abandoned = true;
}

bool BlockDecoding::Take(std::vector<Outcome>* outcomes) {
  if (open_ == 0) return false;
  std::vector<std::pair<std::shared_ptr<Strand>, Outcome>> taken;
  {
    const std::lock_guard lock(shared_->mutex);
    taken.swap(shared_->outcomes);
  }
  for (auto& [strand, outcome] : taken) {
    --open_;
    if (--strand->open == 0) strands_.erase(strand->arrival);
    outcomes->push_back(std::move(outcome));
  }
  return !taken.empty();
}

bool BlockDecoding::HelpOrWait(Duration at_most) {
  if (open_ == 0) return false;
  const auto any = [&] { return !shared_->outcomes.empty(); };
  {
    const std::lock_guard lock(shared_->mutex);
    if (any()) return true;
  }
  if (shared_->pool->DoTask()) return true;
  std::unique_lock lock(shared_->mutex);
  return shared_->changed.wait_for(lock, at_most, any);
}

}  // namespace kvant::node
